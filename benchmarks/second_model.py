"""Train the second model of the ablations: a small Qwen3, so that nothing is settled on one architecture alone.

It differs from wiki11m where that may matter to a codec: keys are normalized per head (QK norm), two query heads share
a KV head instead of three, it is shallower and narrower, and it was trained otherwise. The tokenizer is wiki11m's. The
recipe is fixed: seed, texts, batches, steps and one thread. Another processor or version of torch may round otherwise;
then the figures come out alike, but not the hash.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from pathlib import Path

import torch
from fidelity import SHARED, read, tokenized
from records import SCRATCH
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from quantcache import data
from quantcache.cli.session import BUNDLED_MODEL, load_model
from quantcache.evaluation.provenance import MOST_SHARED, model_sha256, text_sha256
from quantcache.passages import shared, sketch

SEED = 0
HIDDEN = 256
CONTEXT = 1024
BATCH = 1
PEAK_RATE, WEIGHT_DECAY, WARMUP = 1.5e-3, 0.1, 0.05
"""Largest learning rate, weight decay of matrices, and the share of the steps in which the rate rises."""


def main() -> None:
    """Train, evaluate, save, and say what came out."""
    options = parse_arguments()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # so that sums are rounded alike whatever the machine has
    first, tokenizer = load_model(BUNDLED_MODEL, device="cpu", dtype="float32")
    texts = training_texts()
    evaluation_text, evaluation_source = read("wiki_eval.txt", data.evaluation_text)
    for name, text in texts.items():
        hits, size = shared(sketch(text), evaluation_text)
        if text == evaluation_text or hits > MOST_SHARED * size:
            sys.exit(f"error: {name} and the evaluation text {evaluation_source} overlap")
    tokens = torch.cat([tokenizer(text, return_tensors="pt", verbose=False).input_ids[0] for text in texts.values()])
    model = Qwen3ForCausalLM(config(tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.pad_token_id))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(start(first.get_input_embeddings().weight.double()))
    for name, text in texts.items():
        print(f"trained on {name}, SHA-256 {text_sha256(text)}")
    print(f"{len(tokens):,} tokens, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    started = time.perf_counter()
    loss = train(model, tokens, options.steps)
    seconds = time.perf_counter() - started
    held_out = tokenized(tokenizer, evaluation_text, options.windows * CONTEXT)
    round_parameters(model)
    result = perplexity(model, held_out)
    save(model, tokenizer, options.output)
    print(f"{options.steps} steps of {BATCH} x {CONTEXT} tokens in {seconds:.0f} s, last training loss {loss:.3f}")
    print(f"perplexity {result:.2f} on {len(held_out):,} tokens of {evaluation_source}, windows of {CONTEXT}")
    print(f"model SHA-256 {model_sha256(model)}")
    print(f"saved in {options.output}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=700, help="steps of the optimizer")
    parser.add_argument("--windows", type=int, default=16, help=f"windows of {CONTEXT} held-out tokens")
    parser.add_argument("--output", type=Path, default=SCRATCH / "second-model", help="folder of the saved model")
    return parser.parse_args()


def training_texts() -> dict[str, str]:
    """Texts that nothing is evaluated on, by name."""
    text, source = read("wiki_calib.txt", data.calibration_text)
    texts = {source: text}
    path = SHARED / "wikitext2_valid.txt"
    if path.is_file():
        texts[f"../shared/data/{path.name}"] = path.read_text(encoding="utf-8")
    return texts


def config(vocabulary: int, eos: int, pad: int) -> Qwen3Config:
    """The architecture, for a tokenizer's vocabulary."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def start(embeddings: Tensor) -> Tensor:
    """Embeddings to start from, so that the few training tokens are left for attention: wiki11m's, made narrower.

    Args:
        embeddings: wiki11m's, ``[V, 384]``.

    Returns:
        Their principal components, of the scale of random ones, ``[V, 256]``.
    """
    _, directions = torch.linalg.eigh(embeddings.T @ embeddings)  # ascending
    narrow = embeddings @ directions[:, -HIDDEN:]
    return narrow * (0.02 / narrow.square().mean().sqrt())


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
def round_parameters(model: PreTrainedModel) -> None:
    """Make parameters those that are saved: bfloat16, but computed with in float32; RoPE's frequencies stay exact."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


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
