"""More than one device or process: constants follow the layers, and each rank gets its heads' share of them."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file

import quantcache
from quantcache.artifact.calibration import Calibration
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.calibration.calibrator import calibrate
from quantcache.coding.schema import SIDES
from quantcache.common.errors import CalibrationMismatch, QuantCacheError
from tests import warm
from tests.builders import scalar_calibration
from tests.families import FAMILIES, random_tokens, shared_model
from tests.helpers import error, feed
from tests.integration.two_ranks import STEPS, log_likelihood

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = FAMILIES[0]
ROOT = Path(__file__).resolve().parent.parent.parent
TOKENS = random_tokens(2, sum(STEPS), seed=5)

ROUNDING = 2e-5
"""See test_generate.py: two float32 runs of a whole model that read the same codes."""


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """A stand-in of the model's geometry."""
    return scalar_calibration(shared_model(LLAMA).config, 3.0)


def expected_logits(calibration: Calibration) -> torch.Tensor:
    """Of one process and one device."""
    model = shared_model(LLAMA)
    return feed(model, SpectralCache(calibration, model.config, residual_length=0), TOKENS, STEPS)


# ---------------------------------------------------------------------- devices


@pytest.mark.support("weights offloaded by accelerate")
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(calibration: Calibration, where: str, tmp_path: Path) -> None:
    model = LLAMA.make()
    if where == "cpu":
        model = accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    else:
        model = accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert next(model.parameters()).is_meta
    cache = SpectralCache(calibration, model.config, residual_length=0)
    assert torch.equal(feed(model, cache, TOKENS, STEPS), expected_logits(calibration))
    with quantcache.enabled(model, calibration, residual_length=0):
        found = model.generate(TOKENS[:, :130], max_new_tokens=10, do_sample=False, pad_token_id=2)
    assert found.shape == (2, 140)
    own, expected = (calibrate(each, TOKENS, progress=False, predict=False) for each in (model, shared_model(LLAMA)))
    assert torch.equal(own.layers[1].value.analysis, expected.layers[1].value.analysis)
    model.set_attn_implementation("sdpa")
    with quantcache.enabled(model, calibration):  # which looks whether the model can attend on codes
        assert model.config._attn_implementation == "spectral"


def test_a_model_that_is_nowhere(calibration: Calibration) -> None:
    """As it is built to be filled later."""
    with torch.device("meta"):
        model = type(shared_model(LLAMA))(shared_model(LLAMA).config)
    for use in (lambda: calibrate(model, TOKENS, progress=False), lambda: SpectralCache.self_calibrating(model)):
        with pytest.raises(QuantCacheError, match="has no weights in memory: it is on torch's device 'meta'"):
            use()


@pytest.mark.support("layers on several devices")
def test_dispatched_layers(calibration: Calibration, tmp_path: Path) -> None:
    """``device_map`` with hooks on every module, as transformers sets them for several devices."""
    LLAMA.make().save_pretrained(tmp_path)
    layers = {f"model.layers.{i}": "cpu" for i in range(2)}
    others = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    device_map = dict.fromkeys(others, "cpu") | layers
    model = type(shared_model(LLAMA)).from_pretrained(
        tmp_path, device_map=device_map, attn_implementation="spectral", dtype=torch.float32
    )
    accelerate.dispatch_model(model, device_map, main_device="cpu", force_hooks=True)
    assert hasattr(model.model.layers[0], "_hf_hook")
    cache = SpectralCache(calibration, model.config, residual_length=0)
    assert torch.equal(feed(model, cache, TOKENS, STEPS), expected_logits(calibration))


@pytest.mark.support('device_map="auto"')
def test_layers_that_transformers_has_placed(tmp_path: Path) -> None:
    """Memory for two of four layers: the others go to disk, as they would to a second device."""
    whole = dataclasses.replace(LLAMA, config=LLAMA.config | {"num_hidden_layers": 4}).make()
    whole.save_pretrained(tmp_path / "model")
    model = type(whole).from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": sum(parameter.nbytes for parameter in whole.parameters()) * 3 // 4},
        offload_folder=tmp_path / "weights",
        attn_implementation="spectral",
        dtype=torch.float32,
    )
    assert {str(place) for name, place in model.hf_device_map.items() if ".layers." in name} == {"cpu", "disk"}
    calibration = scalar_calibration(whole.config, 3.0)
    found, expected = (
        feed(each, SpectralCache(calibration, each.config, residual_length=0), TOKENS, STEPS) for each in (model, whole)
    )
    assert torch.equal(found, expected)


@pytest.mark.support("layers on several devices")
@pytest.mark.gpu
def test_constants_follow_their_layers(calibration: Calibration) -> None:
    model = LLAMA.make()
    model.model.layers[1].cuda()
    for layer, device in zip(model.model.layers, ("cpu", "cuda:0"), strict=True):
        add_hook_to_module(layer, AlignDevicesHook(execution_device=device, io_same_device=False))
    add_hook_to_module(model.model.norm, AlignDevicesHook(execution_device="cpu"))
    cache = SpectralCache(calibration, model.config, residual_length=0)
    found = feed(model, cache, TOKENS, STEPS)
    for layer, device in zip(cache.spectral_layers, ("cpu", "cuda"), strict=True):
        held = [layer.codecs["key"].encoder, layer.tails["key"], layer.stores["value"].buffers["codes"]]
        assert {tensor.device.type for tensor in held} == {device}
    expected = expected_logits(calibration)
    # Another device rounds otherwise, and a value between two codes may fall to either: see CLOSE in test_generate.py.
    assert error(found, expected) < 2e-3 * float(expected.std())


@pytest.mark.support("offloading to CPU and back")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_offloading_and_coming_back(calibration: Calibration, device: str) -> None:
    model = LLAMA.make().to(device)
    found = []
    for offloaded in (False, True):
        cache = SpectralCache(calibration, model.config, residual_length=0)
        feed(model, cache, TOKENS[:, :150].to(device), (150,))
        if offloaded:
            for layer in cache.spectral_layers:
                layer.offload()
                held = [*layer.tails.values(), *(b for s in layer.stores.values() for b in s.buffers.values())]
                assert {tensor.device.type for tensor in held} == {"cpu"}
            cache.spectral_layers[0].prefetch()  # the other comes back by itself
        found.append(feed(model, cache, TOKENS[:, 150:].to(device), STEPS[1:]))
    assert torch.equal(found[0], found[1])


# ---------------------------------------------------------------------- processes


def test_shards_are_runs_of_heads(calibration: Calibration) -> None:
    shards = [calibration.shard(rank, 2) for rank in range(2)]
    assert calibration.shard(0, 2) is shards[0]
    for index, layer in calibration.layers.items():
        for side in SIDES:
            for name, whole in vars(layer.side(side)).items():
                parts = [getattr(shard.layers[index].side(side), name) for shard in shards]
                assert torch.equal(torch.cat(parts), whole)
    assert shards[0].metadata == calibration.metadata
    with pytest.raises(
        CalibrationMismatch, match="layer 0 has 2 key/value heads: they cannot be split over 3 processes"
    ):
        calibration.shard(0, 3)
    with pytest.raises(ValueError, match="rank must lie between 0 and 1, got 2"):
        calibration.shard(2, 2)


@pytest.mark.support("tensor parallel (tp_plan)")
def test_a_shard_serves_a_process_that_says_which_it_is(calibration: Calibration) -> None:
    """Without torch.distributed, or where it has other groups, the shard is the caller's to pass."""
    keys, values = (torch.randn(1, 2, 100, 64) for _ in SIDES)
    for rank in range(2):
        whole = SpectralCache(calibration, residual_length=0).spectral_layers[0]
        own = SpectralCache(calibration.shard(rank, 2), residual_length=0).spectral_layers[0]
        whole.update(keys, values)
        own.update(keys[:, rank : rank + 1], values[:, rank : rank + 1])
        for layer in (whole, own):
            layer.flush()
        for side in SIDES:
            expected = whole.snapshot().dense(side)[:, rank : rank + 1]
            assert error(own.snapshot().dense(side), expected) <= ROUNDING * float(expected.norm())
    with pytest.raises(CalibrationMismatch, match=r"\(heads, dimension\) \(1, 64\), the calibration's \(2, 64\)"):
        SpectralCache(calibration).spectral_layers[0].update(keys[:, :1], values[:, :1])


def as_two_ranks(*arguments: object) -> None:
    """Run ``two_ranks.py`` as two processes on this machine, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    command = [*warm.python(), "-m", "tests.integration.two_ranks", *map(str, arguments)]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "".join(error[-3000:] for error in errors)


@pytest.fixture(scope="module")
def ranks(calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """What two ranks have found."""
    folder = tmp_path_factory.mktemp("ranks")
    shared_model(LLAMA).save_pretrained(folder / "model")
    calibration.save_pretrained(folder / "calibration")
    as_two_ranks(folder / "model", folder / "calibration", folder)
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.support("tensor parallel (tp_plan)")
def test_two_ranks_give_the_logits_of_one_process(
    ranks: list[dict[str, torch.Tensor]], calibration: Calibration
) -> None:
    expected, model = expected_logits(calibration), shared_model(LLAMA)
    with quantcache.enabled(model, calibration, residual_length=0):
        tokens = model.generate(TOKENS[:, :130], max_new_tokens=12, do_sample=False, pad_token_id=2)
    for found in ranks:
        # Sums over heads are taken in another order, and a value between two codes may fall to either.
        assert error(found["logits"], expected) < 2e-3 * float(expected.std())
        assert torch.equal(found["generated"], tokens)


@pytest.mark.slow
@pytest.mark.support("data-parallel evaluation")
def test_rows_shared_out_by_accelerate(ranks: list[dict[str, torch.Tensor]], calibration: Calibration) -> None:
    rows = random_tokens(5, 160, seed=6).split(1)
    expected = torch.tensor([log_likelihood(shared_model(LLAMA), calibration, row) for row in rows])
    for found in ranks:
        torch.testing.assert_close(found["likelihoods"].float(), expected, rtol=1e-5, atol=0)
