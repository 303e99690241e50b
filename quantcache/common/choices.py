"""What may be chosen by name. Imports nothing: the command line lists these before anything is loaded."""

from __future__ import annotations

from typing import Literal, get_args

Quality = Literal["near-lossless", "balanced", "small"]
"""Words for a rate; :data:`quantcache.common.defaults.QUALITIES` has their limits."""

Metric = Literal["fisher", "query", "identity"]
"""How errors are weighed while calibrating."""

METRICS: tuple[Metric, ...] = get_args(Metric)

BackendName = Literal["auto", "cpu", "native", "triton", "cuda", "torch"]
"""Who encodes and attends; "native" is what "cpu" was called before 0.3."""

Basis = Literal["spectral", "flat"]
"""What an export's values are expressed in."""

BASES: tuple[Basis, ...] = get_args(Basis)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""What a model runs in; "auto" is the checkpoint's own."""

DTYPES: tuple[Dtype, ...] = get_args(Dtype)

Suite = Literal[
    "fidelity",
    "divergence",
    "needle",
    "records",
    "lookup",
    "tools",
    "routing",
    "transfer",
    "qa",
    "memory",
    "speed",
]
"""What can be measured. ``speed`` includes speculative decoding."""

SUITES: tuple[Suite, ...] = get_args(Suite)

QuantizedWeights = Literal["int8", "int4", "quanto-int8", "quanto-int4", "torchao-int8", "torchao-int4"]
"""Weights of a model that is measured; without a library's name the first that is installed quantizes them."""

WeightsFormatName = Literal["bf16", "int8", "int4-g128", "gptq", "awq", "gguf-q4_0", "gguf-q5_1", "nf4"]
"""Weights whose bytes are planned for."""

SortColumn = Literal["format", "bits", "bytes", "kl", "agreement", "speed"]
"""By what formats are sorted."""

Reasoning = Literal["on", "off", "auto"]
"""Whether chats think; "auto" is what the chat template does."""

LogLevel = Literal["debug", "info", "warning", "error"]
"""How much a server says."""

Quantization = Literal["bnb-4bit", "bnb-8bit"]
"""How transformers' server quantizes weights."""
