"""Calibration: streaming statistics of a model's keys and values on text, and the transforms they give."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantcache.artifact import cache_layout
from quantcache.artifact.calibration import Calibration
from quantcache.artifact.identity import FINGERPRINT, weight_samples
from quantcache.artifact.recipes import check_metric
from quantcache.attention.output_metrics import output_metrics
from quantcache.attention.probe import RecordingCache, detect_ropes, evaluating, recorded_queries, run
from quantcache.calibration.data import calibration_data
from quantcache.calibration.gradients import gather_gradients, reads_in_chunks, sampled_loss
from quantcache.calibration.yardstick import measure_yardstick
from quantcache.coding.allocation import check_rates
from quantcache.coding.rope import Rope
from quantcache.coding.schema import SIDES, CodecSettings, Metadata, Rate, SideBits
from quantcache.coding.spectral import METRIC_SHRINKAGE
from quantcache.coding.statistics import COVARIANCE_SHRINKAGE, READ_SHARE, LayerStatistics
from quantcache.common import compat
from quantcache.common.ambient import standard_settings
from quantcache.common.choices import Metric
from quantcache.common.defaults import RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.common.errors import QuantCacheError, UnsupportedModel
from quantcache.common.progress import progress_bar

logger = logging.getLogger(__name__)

SAMPLES = 4
"""Tokens for each dimension of a head below which a warning says that they are few."""


@torch.inference_mode(False)
@standard_settings()
def calibrate(
    model: PreTrainedModel,
    data: str | Sequence[str] | Iterable[Tensor],
    tokenizer: PreTrainedTokenizerBase | None = None,
    bits: float = 3.0,
    *,
    key_bits: SideBits = "joint",
    value_bits: SideBits = "joint",
    min_bits: int = 0,
    metric: Metric = "fisher",
    max_tokens: int = 32_768,
    seq_len: int | None = None,
    residual_length: int = RESIDUAL_LENGTH,
    seed: int = 0,
    codec: CodecSettings | None = None,
    predict: bool = True,
    progress: bool = True,
) -> Calibration:
    """Calibrate a model's key/value cache on text.

    One pass gathers means and second moments of every layer's keys and values, in memory that does not depend on the
    number of tokens. With the Fisher metric one backward pass for each sequence measures what an error in any of them
    costs those who read it as codes: the loss is the negative log-likelihood of tokens sampled from the model itself,
    one for each position of the text.

    Args:
        model: A decoder-only model, on any device or placed by ``device_map``.
        data: Texts (with ``tokenizer``), which take turns, a sequence each; or batches of token ids ``[B, T]`` or
            ``[T]``, whose padding is left out, and whose rows are cut where the model's limit is.
        tokenizer: Turns texts into tokens.
        bits: Mean code width in bits, 0 to 8; the per-token gains come on top (8 bits per head and token).
        key_bits: Separate bits for the keys, ``"dense"`` to leave them uncompressed, or ``"joint"``.
        value_bits: The same for the values.
        min_bits: Smallest width given to any coefficient.
        metric: ``fisher``; ``query`` needs no backward pass (keys weighted by the queries, values by the output
            projection); ``identity`` weighs all errors alike.
        max_tokens: Tokens to use at most. Up to 4,096 more, where there are any, show what the calibration costs on
            text that it has not seen.
        seq_len: Length of the sequences that texts are cut into; by default 2,048 or the model's limit.
        residual_length: Recent tokens that caches will keep as they are. What reads a token within so many costs
            nothing, and hardly counts in the Fisher metric; caches that keep fewer lose more than with a calibration
            for them. Models with recurrent layers cannot be read in chunks, and all counts.
        seed: Seed of the sampled labels.
        codec: Codec choices; the defaults if None.
        predict: Let short runs through the compressed cache scale what the calibration predicts of its cost, which
            ``quality`` needs. With few tokens they take longer than the rest.
        progress: Show a progress bar on stderr; where that is no terminal, a line for each minute.

    Returns:
        The calibration.

    Raises:
        UnsupportedModel: The model's cache cannot be compressed, its attention has no known interface, or it reads
            tokens of its own before every text.
        QuantCacheError: The data are empty or too short, or the model is quantized such that no gradient can be had.
        TypeError: The model is only named, and not loaded.
        ValueError: ``metric``, a number of bits or tokens, or a token id is out of range; a batch is not of token ids.
    """
    compat.require_loaded(model, "calibrate")
    check_metric(metric)
    rate = Rate(bits, key_bits, value_bits, min_bits)
    check_rates(rate)
    counts = {"max_tokens": (max_tokens, 1), "seq_len": (seq_len, 1), "residual_length": (residual_length, 0)}
    for name, (count, least) in counts.items():
        if not (isinstance(count, Integral) and count >= least) and (name, count) != ("seq_len", None):
            raise ValueError(f"{name} must be a whole number from {least} up, got {count!r}")
    settings = codec or CodecSettings()
    layers = cache_layout.compressible_layers(model.config)
    compat.require_forward(model)
    if compat.adds_tokens(model):
        raise UnsupportedModel(
            f"{type(model).__name__} puts tokens of its own before every text (PEFT's prompt or prefix tuning): "
            "calibrate the base model, model.get_base_model()"
        )
    _warn_of_half_precision(model)
    given = calibration_data(model, data, tokenizer, seq_len, max_tokens)
    generator = torch.Generator().manual_seed(seed)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        statistics: dict[int, LayerStatistics] = {}
        with evaluating(model), progress_bar(progress) as bar:
            ropes = detect_ropes(model, layers)
            task = bar.add_task("calibrating", total=given.num_tokens)
            for sequence in given.sequences:
                _gather(model, sequence, metric, ropes, statistics, settings, generator, residual_length)
                bar.advance(task, sequence.numel())
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)

    _warn_of_few_tokens(given.num_tokens, statistics)
    outputs = output_metrics(model, {i: s.kv_shape for i, s in statistics.items()}) if metric == "query" else {}
    solved = {index: statistics[index].solve(outputs.get(index)) for index in layers}
    counts_codes = metric == "fisher" and reads_in_chunks(model)
    metadata = Metadata(
        base_model={
            "id": public_name(model),
            "revision": getattr(model.config, "_commit_hash", None),
            "model_type": model.config.model_type,
            FINGERPRINT: weight_samples(model),
        },
        cache_config=cache_layout.cache_config(model.config),
        recipe={
            "metric": metric,
            "tokens": given.num_tokens,
            "sequences": len(given.sequences),
            "seq_len": max(each.shape[-1] for each in given.sequences),
            "seed": seed,
            "sink_length": SINK_LENGTH,
            **({"residual_length": residual_length, "read_share": READ_SHARE} if counts_codes else {}),
            "metric_shrinkage": METRIC_SHRINKAGE,
            "covariance_shrinkage": COVARIANCE_SHRINKAGE,
            "dtype": str(model.dtype).removeprefix("torch."),
            "text_sha256": given.digests,
            "passages": given.passages,
        },
        codec=settings,
        joint=metric == "fisher",
        environment=compat.versions(),
    )
    calibration = Calibration(solved, metadata)
    if predict:
        with progress_bar(progress) as bar:
            task = bar.add_task("measuring what it costs", total=None)
            yardstick = measure_yardstick(
                model, given.sequences, given.held_out, calibration, lambda tokens: bar.advance(task, tokens)
            )
        if yardstick is not None:
            metadata.recipe["yardstick"] = yardstick
    return calibration.with_rate(rate)


def public_name(model: PreTrainedModel) -> str | None:
    """A model's Hub id; of a local folder only the name, so that no path of this machine gets into the artifact.

    Args:
        model: Model as ``from_pretrained`` returned it.

    Returns:
        The name, None if the model has none.
    """
    name = getattr(model.config, "_name_or_path", "") or None
    return Path(name).name if name and os.path.isdir(name) else name


def _gather(
    model: PreTrainedModel,
    sequence: Tensor,
    metric: Metric,
    ropes: dict[int, Rope],
    statistics: dict[int, LayerStatistics],
    settings: CodecSettings,
    generator: torch.Generator,
    residual_length: int,
) -> None:
    """Add one batch of sequences to the statistics."""

    def check(index: int, keys: Tensor, values: Tensor) -> None:
        if index in ropes:
            for side, tensor in zip(SIDES, (keys, values), strict=True):
                require_finite(tensor, f"{side}s of layer {index}")

    def add(index: int, keys: Tensor, values: Tensor) -> None:
        if index not in statistics:
            statistics[index] = LayerStatistics(index, ropes[index], keys, values, settings)
        for side, tensor in zip(SIDES, (keys, values), strict=True):
            statistics[index].add(side, tensor)

    def check_and_add(index: int, keys: Tensor, values: Tensor) -> None:
        check(index, keys, values)
        if index in ropes:
            add(index, keys, values)

    def add_queries(index: int, query: Tensor) -> None:
        if index in ropes:
            statistics[index].add_queries(query, generator)

    def loss(logits: Tensor) -> Tensor:
        require_finite(logits, "logits")
        return sampled_loss(logits, generator)

    if metric == "fisher":
        found = gather_gradients(model, sequence, ropes, residual_length, loss, check)
        for index, sides in found.items():
            add(index, *(sides[side].vectors for side in SIDES))
            for side, gathered in sides.items():
                require_finite(gathered.read[:, :, SINK_LENGTH:], f"gradients at {side}s of layer {index}")
                statistics[index].add_gradients(side, gathered.coded, gathered.read)
        return
    queries = recorded_queries(model, add_queries) if metric == "query" else contextlib.nullcontext()
    with torch.no_grad(), queries:
        require_finite(run(model, sequence, RecordingCache(model.config, check_and_add)).logits, "logits")


def require_finite(tensor: Tensor, what: str) -> None:
    """Refuse what nothing can be learnt from.

    Args:
        tensor: What a model computed, tokens second to last.
        what: What to call it.

    Raises:
        QuantCacheError: A tensor has NaN or infinite values.
    """
    tensor = tensor.detach()
    if not bool(torch.isfinite(tensor).all()):
        kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinite"
        raise QuantCacheError(
            f"the model cannot be calibrated in {str(tensor.dtype).removeprefix('torch.')}: {what} have {kind} values"
        )


def _warn_of_few_tokens(tokens: int, statistics: dict[int, LayerStatistics]) -> None:
    """Say so where the codes will fit the text rather than the model."""
    dim = max(moments.sum.shape[-1] for layer in statistics.values() for moments in layer.moments.values())
    if tokens < SAMPLES * dim:
        logger.warning(
            "%s tokens are few for heads of dimension %s, and what is lost at the same bits is several times as much: "
            "calibrate on %s at least, better on many more",
            f"{tokens:,}",
            dim,
            f"{SAMPLES * dim:,}",
        )


def _warn_of_half_precision(model: PreTrainedModel) -> None:
    """Say why it takes long: checkpoints load in bfloat16, which many CPUs have no instructions for."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.dtype in (torch.bfloat16, torch.float16):
            dtype = str(parameter.dtype).removeprefix("torch.")
            logger.warning("the model is in %s, which is slow on many CPUs: load it with dtype='float32'", dtype)
            return
