"""``quantcache generate``."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from quantcache.cli.loading import load_calibration, load_model, own_calibration, require_backend
from quantcache.cli.options import (
    BackendOption,
    BitsOption,
    CalibrationOption,
    DebugFlag,
    DeviceOption,
    DtypeOption,
    JsonFlag,
    ModelArgument,
    QualityOption,
    ResidualOption,
    RevisionOption,
    SeedOption,
    SinksOption,
    TrustOption,
    check_rate,
)
from quantcache.cli.reaching import expect_model
from quantcache.cli.session import session
from quantcache.cli.stats import LiveStats
from quantcache.cli.terminal import report
from quantcache.common.defaults import COLDEST, RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.common.errors import QuantCacheError
from quantcache.common.plaintext import read_utf8


def generate(
    model: ModelArgument,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue; '-' reads it from stdin.")
    ],
    calibration: CalibrationOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Tokens to generate at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="T", help="Sampling temperature; 0 takes the most likely token.")
    ] = 0.0,
    seed: SeedOption = 0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Put the prompt into the chat template.", show_default="if the model has one"
        ),
    ] = None,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats",
            help="Show speed, size of the cache and kernels: live on a terminal, then once.",
            show_default=False,
        ),
    ] = False,
    bits: BitsOption = None,
    quality: QualityOption = None,
    sinks: SinksOption = SINK_LENGTH,
    residual: ResidualOption = RESIDUAL_LENGTH,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Generate text from a compressed cache, and say what the cache took.

    Examples:
        quantcache generate wiki11m --prompt "The city of Leiden"
        quantcache generate Qwen/Qwen3-0.6B -c calibration/ --bits 3 -p - < text.txt
    """
    with session(json, debug) as run:
        check_rate(bits, quality)
        if not math.isfinite(temperature):
            raise typer.BadParameter(f"{temperature} is not a number", param_hint="'--temperature'")
        require_backend(backend, device)
        expect_model(model, revision)
        text = read_prompt(prompt)
        if not text.strip():
            raise ValueError("the prompt is empty")
        constants = load_calibration(calibration or own_calibration(model), bits, quality)

        import torch

        from quantcache.cache.spectral_cache import SpectralCache
        from quantcache.coding.packing import BLOCK
        from quantcache.common import compat

        loaded, tokenizer = load_model(
            model, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
        )
        cache = SpectralCache(
            constants,
            model=loaded,
            sink_length=sinks,
            residual_length=residual,
            backend=backend,
        )
        chat = has_template(tokenizer, model, chat)
        inputs = encoded(tokenizer, text, chat).to(loaded.get_input_embeddings().weight.device)
        prompt_tokens = inputs.input_ids.shape[1]
        torch.manual_seed(seed)
        sampling: dict[str, Any] = {"do_sample": temperature >= COLDEST}
        if temperature >= COLDEST:
            sampling["temperature"] = temperature
        started = time.perf_counter()
        with LiveStats(cache, Console(stderr=True)) if stats else contextlib.nullcontext() as watched:
            output = cast(Any, loaded).generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                **compat.generate_argument(cache),
                use_cache=True,
                max_new_tokens=max_new_tokens,
                streamer=watched,
                **sampling,
            )[0, prompt_tokens:]
        seconds = time.perf_counter() - started
        memory, runs_in = cache.memory(), str(loaded.dtype).removeprefix("torch.")
        data = {
            "model": model,
            "dtype": runs_in,
            "chat": chat,
            "bits": constants.bits,
            "text": tokenizer.decode(output, skip_special_tokens=True),
            "prompt_tokens": prompt_tokens,
            "new_tokens": len(output),
            "seconds": seconds,
            "memory": memory.to_dict(),
        }
        line = f"cache of {memory.tokens:,} tokens: {memory.total:,} bytes, bfloat16 takes {memory.bfloat16_bytes:,}; "
        if memory.encoded_elements:
            line += (
                f"{memory.bits_per_element:.3f} bits per encoded element, {memory.bits_per_element_total:.3f} "
                f"including sinks and recent tokens in {runs_in}"
            )
        else:
            recent = f"{residual} to {residual + BLOCK - 1}"
            line += (
                f"nothing is packed yet: the first {sinks} and the last {recent} tokens stay as they are, in {runs_in}"
            )
        if watched is not None:
            data["stats"], line = watched.to_dict(), watched.line()
        report("note", line)
        run.finish(data, data["text"])


def has_template(tokenizer: Any, model: str, wanted: bool | None) -> bool:
    """Whether to use a chat template.

    Args:
        tokenizer: The model's tokenizer.
        model: What the model is called.
        wanted: Whether it is asked for; None where nobody says.

    Returns:
        What is asked for, else whether there is one.

    Raises:
        QuantCacheError: A template is asked for, and the tokenizer has none.
    """
    there = bool(getattr(tokenizer, "chat_template", None))
    if wanted and not there:
        raise QuantCacheError(f"{model} has no chat template: omit --chat")
    return there if wanted is None else wanted


def encoded(tokenizer: Any, text: str, chat: bool) -> Any:
    """The tokens of a prompt.

    Args:
        tokenizer: The model's tokenizer.
        text: The prompt.
        chat: Whether to put it into the chat template, which writes the special tokens itself.

    Returns:
        Token ids and mask.
    """
    if chat:
        message = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    return tokenizer(text, return_tensors="pt", add_special_tokens=not chat, verbose=False)


def read_prompt(given: str) -> str:
    """The prompt of the command line.

    Args:
        given: The option's value; ``-`` stands for stdin.

    Returns:
        The prompt.

    Raises:
        QuantCacheError: The prompt is not UTF-8.
    """
    if given != "-":
        # What is not UTF-8 on the command line arrives as halves of characters.
        return read_utf8(os.fsencode(given) if not _is_text(given) else given.encode(), "--prompt")
    source = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if source is None else read_utf8(source.read(), "stdin")


def _is_text(given: str) -> bool:
    try:
        given.encode()
    except UnicodeEncodeError:
        return False
    return True
