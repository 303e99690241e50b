"""Make the second model of the ablations: a Qwen3 with QK norm, so that nothing is settled on one architecture alone.

A model that is trained from scratch in the minutes that a CPU has does not use its context yet, and then any cache will
do. So it starts from wiki11m's weights; every query and key is then normalized per head, with weights that keep their
mean size, and the whole is trained on. Keys of one length are another thing to code than wiki11m's. The recipe is
fixed: seed, text, batches, steps and one thread. Another processor or version of torch may round otherwise; then the
figures come out alike, but not the hash.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from inputs import read
from records import SCRATCH
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from quantcache import data
from quantcache.calibration.passages import shared, sketch
from quantcache.cli.loading import load_model
from quantcache.common.sequences import text_tokens
from quantcache.data import BUNDLED_MODEL
from quantcache.evaluation.provenance import MAX_SHARED, model_sha256, text_sha256

COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "pad_token_id",
)
"""What the two configs share."""

SEED = 0
CONTEXT = 1024
BATCH = 1
PEAK_RATE, WEIGHT_DECAY, WARMUP = 3e-4, 0.1, 0.1
"""Largest learning rate, weight decay of matrices, and the share of the steps in which the rate rises."""


def main() -> None:
    """Train, evaluate, save, and say what came out."""
    options = parse_arguments()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # so that sums are rounded alike whatever the machine has
    first, tokenizer = load_model(BUNDLED_MODEL, device="cpu", dtype="float32")
    text, source = read("wiki_calib.txt", data.calibration_text)
    evaluation_text, evaluation_source = read("wiki_eval.txt", data.evaluation_text)
    hits, size = shared(sketch(text), evaluation_text)
    if text == evaluation_text or hits > MAX_SHARED * size:
        sys.exit(f"error: {source} and the evaluation text {evaluation_source} overlap")
    tokens = text_tokens(tokenizer, text)
    held_out = text_tokens(tokenizer, evaluation_text, options.windows * CONTEXT)
    model = converted(first, tokens[:CONTEXT])
    before = perplexity(first, held_out), perplexity(model, held_out)
    print(f"perplexity of {BUNDLED_MODEL} {before[0]:.2f}, with QK norm {before[1]:.2f}")
    print(f"trained on {source}, SHA-256 {text_sha256(text)}")
    print(f"{len(tokens):,} tokens, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    started = time.perf_counter()
    loss = train(model, tokens, options.steps)
    seconds = time.perf_counter() - started
    save(model, tokenizer, options.output)
    saved, _ = load_model(str(options.output), device="cpu", dtype="float32")
    result = perplexity(saved, held_out)
    print(f"{options.steps} steps of {BATCH} x {CONTEXT} tokens in {seconds:.0f} s, last training loss {loss:.3f}")
    print(f"perplexity {result:.2f} on {len(held_out):,} tokens of {evaluation_source}, windows of {CONTEXT}")
    print(f"model SHA-256, in float32: {model_sha256(saved)}")
    print(f"saved in {options.output}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="steps of the optimizer")
    parser.add_argument("--windows", type=int, default=16, help=f"windows of {CONTEXT} held-out tokens")
    parser.add_argument("--output", type=Path, default=SCRATCH / "second-model", help="folder of the saved model")
    return parser.parse_args()


@torch.no_grad()
def converted(first: PreTrainedModel, tokens: Tensor) -> Qwen3ForCausalLM:
    """A Qwen3 with a Llama's weights, whose queries and keys are normalized to the mean size that they had.

    Args:
        first: The Llama.
        tokens: A text to take the sizes from, ``[T]``.

    Returns:
        The model. It is not the same function: sizes no longer differ by head and token.
    """
    told = first.config
    model = Qwen3ForCausalLM(
        Qwen3Config(
            **{name: getattr(told, name) for name in COPIED},
            eos_token_id=told.eos_token_id,
            rope_parameters=dict(told.rope_parameters),
            tie_word_embeddings=True,
        )
    )
    _, unexpected = model.load_state_dict(first.state_dict(), strict=False)
    assert not unexpected
    sizes: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, given: object, output: Tensor) -> None:
            heads = output.unflatten(-1, (-1, told.head_dim))
            sizes[path] = heads.square().mean(-1).sqrt().mean()

        return hook

    projections = {path: m for path, m in first.named_modules() if path.endswith(("q_proj", "k_proj"))}
    hooks = [module.register_forward_hook(keep(path)) for path, module in projections.items()]
    first(tokens[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    for path, size in sizes.items():
        model.get_submodule(path.replace("_proj", "_norm")).weight.fill_(size)
    return model.eval()


def train(model: PreTrainedModel, tokens: Tensor, steps: int) -> float:
    """Train a model on windows drawn from a text.

    Args:
        model: Changed in place.
        tokens: The text's tokens, ``[N]``.
        steps: Steps of the optimizer.

    Returns:
        Mean loss of the last tenth of the steps.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    generator = torch.Generator().manual_seed(SEED)
    windows = tokens.unfold(0, CONTEXT, 1)
    losses: list[float] = []
    model.train()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=steps)
        for step in range(steps):
            batch = windows[torch.randint(len(windows), (BATCH,), generator=generator)]  # [B, T]
            loss = model(batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            bar.advance(task)
            if (step + 1) % max(1, steps // 20) == 0:
                recent = losses[-max(1, steps // 20) :]
                print(f"step {step + 1}: loss {sum(recent) / len(recent):.3f}", file=sys.stderr, flush=True)
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def rate_at(step: int, steps: int) -> float:
    """Share of the largest learning rate at a step: a linear rise, then half a cosine down to 0."""
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: Tensor) -> float:
    """Perplexity per token over windows that do not overlap, the last one whole.

    Args:
        model: The model.
        tokens: Tokens, ``[N]``.

    Returns:
        The perplexity.
    """
    losses = [model(w[None], labels=w[None], use_cache=False).loss.double() for w in tokens.unfold(0, CONTEXT, CONTEXT)]
    return torch.stack(losses).mean().exp().item()


def save(model: PreTrainedModel, tokenizer: object, folder: Path) -> None:
    """Write model and tokenizer, complete or not at all."""
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


if __name__ == "__main__":
    main()
