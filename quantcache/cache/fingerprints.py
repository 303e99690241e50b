"""Digests by which a saved cache knows the calibration and the model that it was filled with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantcache.artifact.calibration import Calibration
from quantcache.coding.schema import SIDES
from quantcache.common.errors import QuantCacheError
from quantcache.common.tensor_file import content_bytes

WEIGHT_SAMPLES = 64
"""Elements of every parameter that go into a model's fingerprint."""


def fingerprint(calibration: Calibration) -> str:
    """Digest of everything that gives codes their meaning.

    Args:
        calibration: The calibration, at some bits.

    Returns:
        SHA-256 in hex.
    """
    settings = asdict(calibration.metadata.codec)
    if settings["coding"] == "scalar":
        del settings["coding"]  # files written before there was a choice have the digest without it
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for index, layer in calibration.layers.items():
        digest.update(json.dumps([index, layer.rope.layout, layer.rope.inv_freq]).encode())
        for side in SIDES:
            for name, tensor in sorted(vars(layer.side(side)).items()):
                digest.update(f"{side}.{name}{None if tensor is None else list(tensor.shape)}".encode())
                if tensor is not None:
                    digest.update(content_bytes(tensor))
    return digest.hexdigest()


def model_fingerprint(model: PreTrainedModel) -> str:
    """Digest of a sample of a model's weights: two checkpoints of one architecture differ in it.

    Args:
        model: The model.

    Returns:
        SHA-256 in hex.

    Raises:
        QuantCacheError: Some weights are not in memory.
    """
    digest = hashlib.sha256()
    samples = []
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise QuantCacheError(
                f"{name} is offloaded, so the model cannot be identified by its weights: leave model out"
            )
        flat = parameter.detach().flatten()
        samples.append(flat[:: max(1, flat.numel() // WEIGHT_SAMPLES)][:WEIGHT_SAMPLES].float())
    devices = {sample.device for sample in samples}
    fetched = {device: iter(_fetched([each for each in samples if each.device == device])) for device in devices}
    for (name, parameter), sample in zip(model.named_parameters(), samples, strict=True):
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(content_bytes(next(fetched[sample.device])))
    return digest.hexdigest()


def _fetched(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Tensors of one device in CPU memory, with one copy: to ask for each would wait for the device each time."""
    return torch.cat(tensors).cpu().split([len(tensor) for tensor in tensors])
