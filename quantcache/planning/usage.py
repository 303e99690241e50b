"""The commands and the lines of Python that use a format."""

from __future__ import annotations

import shlex
from typing import Any

from quantcache.artifact.index import bundled_calibrations
from quantcache.common.defaults import RESIDUAL_LENGTH
from quantcache.common.sources import PACKAGED, is_gguf
from quantcache.data import BUNDLED_MODEL
from quantcache.evaluation.methods.installed import OPTIONS
from quantcache.planning.formats import Format

PROMPT = "The city of Leiden"
NEW_TOKENS = 32

_LOADING = {
    "int8": ("from torchao.quantization import Int8WeightOnlyConfig", "TorchAoConfig(Int8WeightOnlyConfig())"),
    "int4-g128": (
        "from torchao.quantization import Int4WeightOnlyConfig",
        "TorchAoConfig(Int4WeightOnlyConfig(group_size=128))",
    ),
    "nf4": (
        "",
        'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)',
    ),
}
"""Import and quantization config of weights that transformers quantizes when it loads them."""

_CHECKPOINTS = {
    "gptq": "a GPTQ checkpoint of the model",
    "awq": "an AWQ checkpoint of the model",
    "gguf-q4_0": "weights loaded from GGUF are dense in transformers",
    "gguf-q5_1": "weights loaded from GGUF are dense in transformers",
}


def commands(form: Format, model: str, calibration: str | None) -> list[str]:
    """What to type to use a format.

    Args:
        form: How the cache is stored.
        model: The model, as given on the command line.
        calibration: Its calibration; None if there is none yet.

    Returns:
        Shell commands; none for formats that quantcache has no command for.
    """
    if form.layout != "spectral":
        return []
    name = shlex.quote(model)
    found = []
    if calibration is None and model in bundled_calibrations():
        calibration = model
    if calibration is None:
        found.append(f"quantcache calibrate {name} --text YOUR_TEXT.txt -o calibration/")
    artifact = shlex.quote(calibration or "calibration/")
    found.append(
        f"quantcache generate {name} -c {artifact} --bits {form.bits:g} --dtype bfloat16 --prompt {shlex.quote(PROMPT)}"
    )
    return found


def python_lines(
    form: Format,
    model: str,
    calibration: str | None,
    *,
    batch: int,
    chunk: int,
    weights: str = "bf16",
    loader: str = "AutoModelForCausalLM",
) -> str:
    """What to write in Python to use a format.

    Args:
        form: The format; one that a cache exists for.
        model: The model, as given on the command line.
        calibration: Its calibration; None if there is none yet.
        batch: B, rows of the batch.
        chunk: Prompt tokens that go through the model at once.
        weights: Name of the weights' format, such as ``bf16``.
        loader: The class of transformers that loads the model.

    Returns:
        A program that generates from one short prompt in every row.
    """
    found_by_us = model == BUNDLED_MODEL or model in PACKAGED or is_gguf(model)
    names = [loader, "AutoTokenizer"]
    extra, loading = _LOADING.get(weights, ("", ""))
    ours: list[str] = []
    cache = ""
    if form.layout == "spectral":
        if calibration is None and model in bundled_calibrations():
            ours.append("from quantcache import Calibration, SpectralCache")
            source = f'Calibration.for_model("{model}")'
            cache = f"cache = SpectralCache({source}, model.config, bits={form.bits:g})"
        else:
            ours.append("from quantcache import SpectralCache")
            source = repr(calibration or "calibration/")
            cache = f"cache = SpectralCache.from_pretrained({source}, config=model.config, bits={form.bits:g})"
    elif form.layout == "quantized":
        names.append("QuantizedCache")
        options: dict[str, Any] = {}
        if form.bits:  # figures and sizes are of so many recent tokens; transformers' default is another
            options = {"nbits": int(form.bits), "residual_length": RESIDUAL_LENGTH, **OPTIONS[form.scheme.stem]}
        arguments = [repr(form.scheme.stem), "model.config", *(f"{name}={value}" for name, value in options.items())]
        cache = f"cache = QuantizedCache({', '.join(arguments)})"
    if loading:
        names.append(loading.partition("(")[0])
    if found_by_us:
        ours.append("from quantcache.common.sources import model_source")
    lines = [extra] if extra else []
    lines.append(f"from transformers import {', '.join(sorted(names))}")
    lines += ["", *ours] if ours else []
    comment = f"  # {_CHECKPOINTS[weights]}" if weights in _CHECKPOINTS else ""
    load = ["name", 'dtype="bfloat16"']
    load += ['attn_implementation="spectral"'] * (form.layout == "spectral")
    load += [f"quantization_config={loading}"] * bool(loading)
    keep = "past_key_values=cache, " if cache else ""
    lines += [
        "",
        f"name = {f'model_source({model!r})' if found_by_us else repr(model)}{comment}",
        f"model = {loader}.from_pretrained({', '.join(load)})",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        *([cache] if cache else []),
        f'inputs = tokenizer(["{PROMPT}"] * {batch}, return_tensors="pt").to(model.device)',
        f"output = model.generate(**inputs, {keep}max_new_tokens={NEW_TOKENS}, prefill_chunk_size={chunk})",
        "print(tokenizer.batch_decode(output, skip_special_tokens=True)[0])",
    ]
    return "\n".join(lines) + "\n"
