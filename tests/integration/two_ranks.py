"""One of two ranks, as ``torchrun two_ranks.py MODEL CALIBRATION OUTPUT`` starts them.

Feeds tokens through compressed caches of a model that transformers has split over the ranks, then shares out rows of
tokens over ranks that each have the whole model, and writes what came of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import distributed
from transformers import AutoModelForCausalLM, PreTrainedModel

import quantcache
from quantcache.artifact.calibration import Calibration
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.common.errors import QuantCacheError
from tests.families import random_tokens
from tests.helpers import feed

STEPS = (150, 1, 1, 20, 1)


def load(path: str, **options: object) -> PreTrainedModel:
    """The model, attending on codes."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()
    model.set_attn_implementation("spectral")
    return model


def log_likelihood(model: PreTrainedModel, calibration: Calibration, row: torch.Tensor) -> float:
    """Mean log-likelihood of a row of tokens ``[1, T]`` through a compressed cache."""
    cache = SpectralCache(calibration, model.config, residual_length=0)
    logits = feed(model, cache, row, (row.shape[1] - 10, *[1] * 10))[0, -11:-1].log_softmax(-1)
    return float(logits.gather(-1, row[0, -10:, None]).mean())


def main(model_path: str, calibration_path: str, output: str) -> None:
    """Run one rank."""
    torch.set_num_threads(1)
    model = load(model_path, tp_plan="auto")
    calibration = Calibration.from_pretrained(calibration_path)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    cache = SpectralCache(calibration, model.config, residual_length=0)
    tokens = random_tokens(2, sum(STEPS), seed=5)
    logits = feed(model, cache, tokens, STEPS)
    layer = cache.spectral_layers[1]
    heads = calibration.layers[1].key.num_heads // size
    assert layer.tails["key"].shape[1] == heads
    assert torch.equal(layer.codecs["key"].mean, calibration.layers[1].key.mean[rank * heads : (rank + 1) * heads])
    with pytest.raises(QuantCacheError, match="a tensor-parallel cache cannot be saved"):
        cache.save(Path(output) / "cache")
    with quantcache.enabled(model, calibration, residual_length=0):
        generated = model.generate(tokens[:, :130], max_new_tokens=12, do_sample=False, pad_token_id=2)

    whole = load(model_path)
    rows = list(random_tokens(5, 160, seed=6).split(1))
    with PartialState(cpu=True).split_between_processes(rows) as mine:
        assert 2 <= len(mine) <= 3
        gathered = gather_object([log_likelihood(whole, calibration, row) for row in mine])
    likelihoods = torch.tensor(gathered, dtype=torch.float64)
    found = {"logits": logits, "generated": generated, "likelihoods": likelihoods}
    save_file(found, Path(output) / f"rank{rank}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
