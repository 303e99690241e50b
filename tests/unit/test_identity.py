"""A calibration of another model of the same geometry is warned of, and nothing else is."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel

import quantcache
from quantcache.artifact.calibration import Calibration
from quantcache.artifact.identity import FINGERPRINT, declared_frequencies, weight_samples
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.calibration.calibrator import calibrate
from quantcache.common.errors import CalibrationMismatch, CalibrationWarning
from quantcache.data import demo_model_path
from quantcache.export import absorb, export_checkpoint
from quantcache.export.absorption import Basis
from tests.builders import PeftWrapper, llama_config
from tests.families import FAMILIES, Family, random_tokens

pytestmark = pytest.mark.support("a calibration of another model")


def make(seed: int = 0, **more: object) -> LlamaForCausalLM:
    """A tiny Llama."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(32, layers=3, **more)).eval()


def calibrated(model: PreTrainedModel) -> Calibration:
    """A calibration, quickly made."""
    tokens = torch.randint(3, 30, (1, 96), generator=torch.Generator().manual_seed(0))
    return calibrate(model, [tokens], metric="identity", progress=False)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """The model calibrated: leave it as you found it."""
    return make()


@pytest.fixture(scope="module")
def saved(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its calibration."""
    folder = tmp_path_factory.mktemp("saved")
    calibrated(model).save_pretrained(folder)
    return folder


@pytest.fixture
def calibration(saved: Path) -> Iterator[Calibration]:
    """Its calibration as it is loaded; warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalibrationWarning)
        yield Calibration.from_pretrained(saved)


def other_heads(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A merged adapter of the values, a percent of the weights in size."""
    torch.manual_seed(0)
    other = make()
    with torch.no_grad():
        for layer in other.model.layers:
            weight = layer.self_attn.v_proj.weight
            weight += 0.01 * weight.std() * torch.randn(weight.shape[0], 1) @ torch.randn(1, weight.shape[1])
    return other


def test_other_weights(calibration: Calibration, model: LlamaForCausalLM, saved: Path) -> None:
    other = make(seed=1)
    for given in (other, other.to(torch.bfloat16), other_heads(model)):
        with pytest.warns(CalibrationWarning, match=r"another model: the weights of .*weight differ"):
            calibration.check_compatible(given)
        with pytest.raises(CalibrationMismatch, match="another model"):
            calibration.check_compatible(given, strict=True)
    with pytest.warns(CalibrationWarning):
        SpectralCache(calibration, model=other)
    with pytest.warns(CalibrationWarning):
        SpectralCache.from_pretrained(saved, model=other)
    with pytest.raises(CalibrationMismatch):
        SpectralCache.from_pretrained(saved, model=other, strict=True)
    with pytest.warns(CalibrationWarning), quantcache.enabled(other, saved):
        pass
    with pytest.raises(CalibrationMismatch):
        quantcache.enable(other, calibration, strict=True)


class Adapter(torch.nn.Module):
    """A projection with an adapter that has not been merged, as PEFT's LoRA wraps it."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base_layer = base
        self.added = torch.nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        """The base's, as PEFT has it."""
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both."""
        added: torch.Tensor = self.base_layer(x) + self.added(x)
        return added


def require_told_apart(
    calibration: Calibration, model: LlamaForCausalLM, own: Calibration, adapted: LlamaForCausalLM, weight: str
) -> None:
    """A model and one with adapters refuse each other's calibration, by name; without its adapters it is the same."""
    for found, given in ((calibration, adapted), (own, model)):
        with pytest.raises(CalibrationMismatch, match=rf"the weights of .*{weight} differ"):
            found.check_compatible(given, strict=True)
    for layer in adapted.model.layers:
        layer.self_attn.v_proj.disable_adapters = True
    calibration.check_compatible(adapted, strict=True)


def test_adapters_on_one_side_alone(calibration: Calibration, model: LlamaForCausalLM) -> None:
    adapted = make()
    for layer in adapted.model.layers:
        layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj)
    own = quantcache.calibrate(adapted, torch.arange(3, 30)[None], progress=False)
    own.check_compatible(adapted, strict=True)
    require_told_apart(calibration, model, own, adapted, r"v_proj.*weight")


class Lora(Adapter):
    """A projection with a LoRA adapter, by the names that PEFT gives its parts."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__(base)
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, base.out_features, bias=False)})
        self.active_adapters, self.disable_adapters, self.merged = ["default"], False, False
        del self.added

    def get_delta_weight(self, name: str) -> torch.Tensor:
        """What merging would add."""
        return self.lora_B[name].weight @ self.lora_A[name].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both."""
        added: torch.Tensor = self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return added


def test_adapters_in_a_wrapper(calibration: Calibration, model: LlamaForCausalLM) -> None:
    """All names begin otherwise in PEFT's wrapper; nothing was compared."""
    adapted = make()
    calibration.check_compatible(PeftWrapper(adapted), strict=True)
    assert weight_samples(PeftWrapper(adapted)) == weight_samples(model)
    for layer in adapted.model.layers:
        layer.self_attn.v_proj = Lora(layer.self_attn.v_proj)
    wrapped = PeftWrapper(adapted)
    own = calibrated(wrapped)
    old = {f"base_model.model.{name}": entry for name, entry in own.metadata.base_model[FINGERPRINT].items()}
    earlier = Calibration(own.layers, replace(own.metadata, base_model={**own.metadata.base_model, FINGERPRINT: old}))
    for found in (own, earlier):
        found.check_compatible(wrapped, strict=True)
        found.check_compatible(adapted, strict=True)
        with pytest.raises(CalibrationMismatch, match=r"the weights of .*v_proj.weight differ"):
            found.check_compatible(model, strict=True)
    for given in (wrapped, adapted):
        with pytest.raises(CalibrationMismatch, match=r"the weights of .*v_proj.weight differ"):
            calibration.check_compatible(given, strict=True)
    for layer in adapted.model.layers:
        layer.self_attn.v_proj.disable_adapters = True
    calibration.check_compatible(wrapped, strict=True)


class Saved(torch.nn.Module):
    """A projection that an adapter has trained whole, as PEFT's ``modules_to_save`` keeps it."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.original_module, self.active_adapters, self.disable_adapters = base, ["default"], False
        self.modules_to_save = torch.nn.ModuleDict({"default": copy.deepcopy(base)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the module at work."""
        found: torch.Tensor = (self.original_module if self.disable_adapters else self.modules_to_save["default"])(x)
        return found


def test_modules_that_an_adapter_has_trained_whole(calibration: Calibration, model: LlamaForCausalLM) -> None:
    """Their names are others, so that nothing was compared."""
    adapted, merged = make(), make()
    for layer, other in zip(adapted.model.layers, merged.model.layers, strict=True):
        layer.self_attn.v_proj = Saved(layer.self_attn.v_proj)
        with torch.no_grad():
            layer.self_attn.v_proj.modules_to_save["default"].weight.mul_(1.5)
            other.self_attn.v_proj.weight.mul_(1.5)
    own = calibrated(adapted)
    for given in (adapted, PeftWrapper(adapted), merged):
        own.check_compatible(given, strict=True)
    require_told_apart(calibration, model, own, adapted, r"v_proj.weight")


def test_an_adapter_that_has_been_merged(calibration: Calibration) -> None:
    """A model is the same with its adapter merged or not."""
    adapted, merged = make(), make()
    for layer, other in zip(adapted.model.layers, merged.model.layers, strict=True):
        layer.self_attn.v_proj = Lora(layer.self_attn.v_proj)
        with torch.no_grad():
            other.self_attn.v_proj.weight += layer.self_attn.v_proj.get_delta_weight("default")
    for made, given in ((adapted, merged), (merged, adapted), (PeftWrapper(adapted), merged)):
        calibrated(made).check_compatible(given, strict=True)
    for layer, other in zip(adapted.model.layers, merged.model.layers, strict=True):
        layer.self_attn.v_proj.merged = True
        layer.self_attn.v_proj.base_layer.weight.data.copy_(other.self_attn.v_proj.weight)
    calibrated(merged).check_compatible(adapted, strict=True)


def test_the_same_weights(calibration: Calibration, model: LlamaForCausalLM, saved: Path, tmp_path: Path) -> None:
    calibration.check_compatible(model, strict=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        calibration.check_compatible(make().to(dtype), strict=True)
    for size in (64, 20):
        resized = make()
        resized.resize_token_embeddings(size, mean_resizing=False)
        calibration.check_compatible(resized, strict=True)
    make().save_pretrained(tmp_path / "elsewhere")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "elsewhere", dtype=torch.bfloat16)
    calibration.check_compatible(loaded, strict=True)
    calibration.check_compatible(torch.compile(model), strict=True)
    with quantcache.enabled(model, saved, strict=True, bits=2.0):
        pass


def test_quantized_weights(calibration: Calibration) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    for weights in (quanto.qint8, quanto.qint4):
        quantized = make()
        quanto.quantize(quantized, weights=weights)
        quanto.freeze(quantized)
        calibration.check_compatible(quantized, strict=True)
        other = make(seed=1)
        quanto.quantize(other, weights=weights)
        quanto.freeze(other)
        with pytest.raises(CalibrationMismatch, match="embed_tokens"):
            calibration.check_compatible(other, strict=True)


def test_weights_that_cannot_be_read(calibration: Calibration, model: LlamaForCausalLM) -> None:
    with torch.device("meta"):
        offloaded = LlamaForCausalLM(model.config)
    calibration.check_compatible(offloaded, strict=True)
    assert weight_samples(offloaded) == {}


def test_a_calibration_made_in_bfloat16(model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    calibration = calibrated(make().to(torch.bfloat16))
    slow = "the model is in bfloat16, which is slow on many CPUs: load it with dtype='float32'"
    assert slow in [each.getMessage() for each in caplog.records]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        calibration.check_compatible(make().to(dtype), strict=True)
    with pytest.raises(CalibrationMismatch):
        calibration.check_compatible(make(seed=1), strict=True)


ROPES = {
    "another base": {"rope_type": "default", "rope_theta": 500_000.0},
    "a base that is near": {"rope_type": "default", "rope_theta": 11_000.0},
    "linear scaling": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 2048},
    "llama3": {
        **{"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 2048},
    },
}


@pytest.mark.parametrize("parameters", ROPES.values(), ids=ROPES)
def test_another_rotation(calibration: Calibration, parameters: dict[str, object]) -> None:
    config = llama_config(32, layers=3, rope_parameters=parameters)
    with pytest.warns(CalibrationWarning, match=r"rotated by .* this model rotates them by"):
        SpectralCache(calibration, config)
    with pytest.raises(CalibrationMismatch, match="radians per token"):
        SpectralCache(calibration, config, strict=True)
    own = calibrated(make(rope_parameters=parameters))  # what the config declares is what its model does
    own.check_compatible(config, strict=True)
    assert declared_frequencies(config, 0) == pytest.approx(own.layers[0].rope.inv_freq, rel=1e-5)


def test_ids(calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(ours: str | None, theirs: str, quantized: bool = False) -> None:
        base_model = {**calibration.metadata.base_model, "id": ours}
        config = llama_config(32, layers=3)
        config._name_or_path = theirs
        if quantized:
            config.quantization_config = {"quant_method": "awq"}
        other = Calibration(calibration.layers, replace(calibration.metadata, base_model=base_model))
        other.check_compatible(config, strict=True)

    check("some/model", "some/model")
    check("some/model", "mirror/Model")
    check("some/model", "some/model-AWQ", quantized=True)
    check("some/model", "")
    check(None, "some/model")
    check("model", "some/other")  # the name of a folder
    check("some/model", "/data/models/x")
    check("some/model", "~/.cache/huggingface/hub/models--some--model/snapshots/0123")
    (tmp_path / "my" / "copy").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    check("some/model", "my/copy")
    with pytest.raises(CalibrationMismatch, match="it was made on some/model, this model is some/other"):
        check("some/model", "some/other")
    with pytest.raises(CalibrationMismatch, match="some/model-AWQ"):
        check("some/model", "some/model-AWQ")


def test_weights_count_for_more_than_names(calibration: Calibration, model: LlamaForCausalLM) -> None:
    base_model = {**calibration.metadata.base_model, "id": "some/model"}
    renamed = Calibration(calibration.layers, replace(calibration.metadata, base_model=base_model))
    same = make()
    same.config._name_or_path = "some/other"
    renamed.check_compatible(same, strict=True)
    with pytest.raises(CalibrationMismatch, match="some/other"):
        renamed.check_compatible(same.config, strict=True)


def test_the_bundled_calibration(demo_model: PreTrainedModel) -> None:
    calibration = Calibration.for_model("wiki11m")
    calibration.check_compatible(demo_model, strict=True)
    calibration.check_compatible(AutoConfig.from_pretrained(demo_model_path()), strict=True)
    config = AutoConfig.from_pretrained(demo_model_path())
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 123_456.0}
    with pytest.raises(CalibrationMismatch, match="radians per token"):
        calibration.check_compatible(config, strict=True)


def test_a_file_of_a_cache_is_loaded_with_its_model(calibration: Calibration, tmp_path: Path) -> None:
    SpectralCache(calibration).save(tmp_path / "prefix")
    with pytest.warns(CalibrationWarning):
        SpectralCache.load(tmp_path / "prefix", calibration, model=make(seed=1))


CHOSEN = ("gpt2", "phi3", "gpt-oss", "glm4", "falcon-mqa", "bloom", "gemma3")
"""Fused projections, experts, interleaved and no rotation, layers of two rotations."""


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in CHOSEN], ids=str)
def test_families(family: Family) -> None:
    own = family.make()
    calibration = calibrate(own, [random_tokens(1, 96)], metric="identity", progress=False)
    assert len(calibration.metadata.base_model[FINGERPRINT]) >= 3
    for given in (own, own.config, family.make(dtype=torch.bfloat16)):
        calibration.check_compatible(given, strict=True)
    with pytest.raises(CalibrationMismatch, match=r"the weights of .* differ"):
        calibration.check_compatible(family.make(seed=1), strict=True)


@pytest.mark.parametrize("basis", ["spectral", "flat"])
def test_a_model_that_has_absorbed_its_basis(calibration: Calibration, basis: Basis, tmp_path: Path) -> None:
    """Embeddings are the same in both, and the calibration of one is wrong for the other."""
    original, rewritten = make(), make()
    own = absorb(rewritten, calibration, basis)
    original.save_pretrained(tmp_path / "model")
    exported = export_checkpoint(tmp_path / "model", calibration, tmp_path / "out", basis=basis, verify=False)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for theirs, model in ((own, rewritten), (exported.calibration, loaded)):
        theirs.check_compatible(model, strict=True)
        theirs.check_compatible(model.to(torch.bfloat16), strict=True)
        for wrong, other in ((theirs, original), (calibration, model)):
            with pytest.raises(CalibrationMismatch, match=r"the weights of .*_proj.weight differ"):
                wrong.check_compatible(other, strict=True)
        with pytest.raises(CalibrationMismatch, match=r"the weights of .*embed_tokens.weight differ"):
            theirs.check_compatible(make(seed=1), strict=True)
    shutil.rmtree(tmp_path / "out" / "quantcache")  # as training further leaves it
    with pytest.warns(CalibrationWarning, match=r"the weights of .*_proj.weight differ\. Is this model an export"):
        export_checkpoint(tmp_path / "out", calibration, tmp_path / "twice", basis=basis, verify=False)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_stand_ins_are_of_their_config(family: Family) -> None:
    config = family.make().config
    Calibration.synthetic(config).check_compatible(config, strict=True)


@pytest.mark.parametrize("parameters", ROPES.values(), ids=ROPES)
def test_stand_ins_of_other_rotations(parameters: dict[str, object]) -> None:
    config = llama_config(32, layers=3, rope_parameters=parameters)
    Calibration.synthetic(config).check_compatible(config, strict=True)
    with pytest.raises(CalibrationMismatch, match="radians per token"):
        Calibration.synthetic(config).check_compatible(llama_config(32, layers=3), strict=True)
