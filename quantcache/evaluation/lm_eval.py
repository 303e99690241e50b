"""The model type ``quantcache`` of lm-eval: its own ``hf``, with every token read through a compressed cache.

lm-eval scores a text in one forward pass, and a single pass never reads what a cache holds. Here the text goes through
the cache in chunks, so that each reads what the cache has made of those before it. ``generate()`` does so by itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import Cache, PreTrainedModel

from quantcache import __version__
from quantcache.artifact.calibration import Calibration
from quantcache.artifact.index import bundled_calibrations
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import SideBits
from quantcache.common import compat
from quantcache.common.choices import BackendName, Quality
from quantcache.common.defaults import CHUNK, RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.common.errors import QuantCacheError
from quantcache.common.registration import ATTENTION_NAME
from quantcache.common.sources import model_source
from quantcache.evaluation.feeding import pieces
from quantcache.evaluation.methods import needs_statistics, parse_methods

_log = logging.getLogger(__name__)


@register_model("quantcache")
class QuantCacheLM(HFLM):
    """lm-eval's ``hf`` model, with a fresh cache of ours for every batch.

    Args:
        pretrained: Folder, GGUF file, Hub id or a name that :mod:`quantcache.common.sources` knows; or a loaded model,
            which keeps its attention implementation.
        calibration: The model's calibration: a folder, a Hub id, or a model whose calibration comes along.
        method: Any method of ``quantcache eval``, such as ``dense`` or ``quanto-4``, in place of the arguments below up
            to ``value_bits``.
        bits: Mean code width; the calibration's by default.
        quality: A word in place of ``bits``, such as ``balanced``.
        key_bits: Separate bits for the keys, ``"dense"`` or ``"joint"``; the calibration's by default.
        value_bits: The same for the values.
        sink_length: First tokens that stay exact.
        residual_length: Recent tokens that stay exact.
        cache_backend: As ``SpectralCache`` takes ``backend``, which means something else to lm-eval.
        strict: Refuse the calibration of another model, which is otherwise warned of.
        chunk: Tokens read at once when a text is scored.
        options: Arguments of lm-eval's ``hf``.

    Raises:
        QuantCacheError: The calibration is missing, or an argument makes no sense.
        UnsupportedModel: The model is an encoder-decoder.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        calibration: str | Path | Calibration | None = None,
        *,
        method: str | None = None,
        bits: float | None = None,
        quality: Quality | None = None,
        key_bits: SideBits | None = None,
        value_bits: SideBits | None = None,
        sink_length: int = SINK_LENGTH,
        residual_length: int = RESIDUAL_LENGTH,
        cache_backend: BackendName = "auto",
        strict: bool = False,
        chunk: int = CHUNK,
        **options: Any,
    ):
        lengths = {"chunk": (chunk, 1), "sink_length": (sink_length, 0), "residual_length": (residual_length, 0)}
        for each, (length, least) in lengths.items():
            if not isinstance(length, int) or length < least:
                raise QuantCacheError(f"{each} must be a whole number of at least {least}, got {length!r}")
        asked = {"bits": bits, "quality": quality, "key_bits": key_bits, "value_bits": value_bits}
        given = [f"{key}={value}" for key, value in asked.items() if value is not None]
        if method is not None and given:
            raise QuantCacheError(f"give either a method or bits, got method={method} and {', '.join(given)}")
        if method is None and calibration is None:
            raise QuantCacheError(
                "there is no calibration: add calibration=FOLDER to --model_args (quantcache calibrate makes one), "
                f"or method=dense; calibrations of {', '.join(bundled_calibrations())} come along"
            )
        self.chunk, self.sink_length, self.residual_length = chunk, sink_length, residual_length
        constants = None if calibration is None else _load(calibration)
        if isinstance(pretrained, str):
            pretrained = str(model_source(pretrained, on_convert=_log.info))
            options.setdefault("attn_implementation", ATTENTION_NAME)
        super().__init__(pretrained, **options)
        self.bits_per_element: float | None = None
        self.first_coded: int | None = None  # tokens in a cache of which some are codes
        self.tokens = self.tokens_from_codes = 0
        if method is not None:
            self._use_method(method, constants)
        elif constants is not None:
            self._use_ours(constants, **asked, backend=cache_backend, strict=strict)

    def _use_ours(self, calibration: Calibration, **options: Any) -> None:
        """Make every cache a :class:`SpectralCache`."""
        options |= {"sink_length": self.sink_length, "residual_length": self.residual_length}
        try:
            empty = SpectralCache(calibration, model=self.model, **options)
        except ValueError as error:  # an argument of the command line
            raise QuantCacheError(str(error)) from error
        assert empty.calibration is not None
        self.make_cache: Callable[[], Cache] = empty.fork  # all caches share one allocation
        self.cache_name = f"spectral-{empty.calibration.bits:g}"
        self.bits_per_element = empty.calibration.bits_per_element
        self.first_coded = self.sink_length + self.residual_length + BLOCK

    def _use_method(self, name: str, calibration: Calibration | None) -> None:
        """Make every cache that of a method to compare with."""
        if needs_statistics([name]):
            raise QuantCacheError(f"method {name} is fitted to a text first: `quantcache eval` can measure it")
        lengths = (self.sink_length, self.residual_length)
        [method] = parse_methods([name], self.model.config, calibration, *lengths)
        self.make_cache, self.cache_name = method.make_cache, method.name
        self.make_cache()  # what is missing is told at once
        if method.sink_length is not None and method.residual_length is not None and method.tile is not None:
            self.first_coded = method.sink_length + method.residual_length + method.tile

    def _get_backend(self, config: Any, **options: Any) -> None:
        """Choose the model's class, as lm-eval does, but no encoder-decoder's."""
        compat.require_decoder(config)
        super()._get_backend(config, **options)

    def _create_model(self, *args: Any, attn_implementation: str | None = None, **options: Any) -> None:
        """Load the model, as lm-eval does; one that computes attention by itself may know no name but its own."""
        if attn_implementation == ATTENTION_NAME:
            attn_implementation = compat.attention_to_load(self.config, attn_implementation)
        super()._create_model(*args, attn_implementation=attn_implementation, **options)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, V]`` of right-padded rows ``[B, T]``, read through a cache chunk by chunk."""
        cache = self.make_cache()
        kind, dtype = self.device.type, self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(device_type=kind, dtype=dtype, enabled=dtype is not None):
            parts = [
                self.model(input_ids=part, **compat.cache_argument(self.model, cache), use_cache=True).logits
                for part in pieces(inps, self.chunk, self.sink_length)
            ]
        return torch.cat(parts, dim=1)

    def _select_cont_toks(self, logits: Tensor, contlen: int | None = None, inplen: int | None = None) -> Tensor:
        """The logits ``[contlen, V]`` that are scored; counts those that were read from codes."""
        if contlen and inplen and self.first_coded is not None:
            begin = self.chunk + self.sink_length  # of the second piece
            begin += max(0, -(-(self.first_coded - begin) // self.chunk)) * self.chunk
            self._count(contlen, inplen - begin)
        return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Continue left-padded rows ``[B, T]`` with a fresh cache; everything else is up to lm-eval."""
        output = super()._model_generate(
            context, max_length, stop, **compat.generate_argument(self.make_cache()), **options
        )
        if self.first_coded is not None:
            # The prompt's pass gives the first token, and reads nothing; a step reads what is there before its token.
            rows, length = output.shape
            new = length - context.shape[1]
            self._count(new, min(new - 1, length - 1 - self.first_coded), rows)
        return output

    def _count(self, tokens: int, coded: int, rows: int = 1) -> None:
        """Note how many tokens were predicted, and how many of them from codes."""
        self.tokens += rows * tokens
        self.tokens_from_codes += rows * min(tokens, max(0, coded))

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results: that of ``hf``, and which cache the model read.

        Returns:
            Ready for JSON. ``tokens_from_codes`` of ``tokens`` were predicted from a cache of which a part was encoded
            (padding counts as tokens of a cache); both are None where the cache decides for itself.
        """
        known = self.first_coded is not None
        if known and self.tokens and not self.tokens_from_codes:
            _log.warning(
                "No token was predicted from encoded ones: the texts are too short for a cache that keeps %d first and "
                "%d recent tokens exact. The scores are those of a dense cache; residual_length=0 encodes more.",
                self.sink_length,
                self.residual_length,
            )
        about = {
            "version": __version__,
            "cache": self.cache_name,
            "bits_per_element": self.bits_per_element,
            "sink_length": self.sink_length,
            "residual_length": self.residual_length,
            "chunk": self.chunk,
            "tokens": self.tokens if known else None,
            "tokens_from_codes": self.tokens_from_codes if known else None,
        }
        return {**super().get_model_info(), "quantcache": about}


def _load(calibration: str | Path | Calibration) -> Calibration:
    """A calibration by folder, Hub id or the name of a model whose calibration comes along."""
    if isinstance(calibration, Calibration):
        return calibration
    if not os.path.isdir(calibration) and str(calibration) in bundled_calibrations():
        return Calibration.for_model(str(calibration))
    return Calibration.from_pretrained(calibration)
