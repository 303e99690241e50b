"""Analysis of real models: every family, encoders, and the command on the bundled one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel, PreTrainedTokenizerBase

from quantcache import data
from quantcache.analysis import Report, analyze, analyzer, gathering
from quantcache.analysis.gathering import MOMENT_BYTES, gather
from quantcache.analysis.grade import collect_samples, grade
from quantcache.analysis.targets import find_inputs, observed_inputs
from quantcache.artifact.calibration import Calibration
from quantcache.attention.probe import RecordingCache, detect_ropes
from quantcache.attention.probe import run as run_model
from quantcache.calibration.calibrator import calibrate
from quantcache.coding.schema import LayerCalibration
from quantcache.coding.spectral import Moments
from quantcache.common import compat
from quantcache.common.errors import QuantCacheError
from quantcache.evaluation.fidelity import FidelityResult
from tests.families import FAMILIES, OTHERS, Family, random_tokens, shared_model
from tests.helpers import Run

LLAMA = FAMILIES[0]


class Letters:
    """A tokenizer of a token for each character, of the tiny models' vocabulary."""

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoding", (), {"input_ids": [3 + ord(letter) % 250 for letter in text]})()

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(i) for i in ids)


def letters(length: int) -> str:
    return "".join(chr(int(i)) for i in random_tokens(1, length)[0])


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS], ids=str)
def test_every_input_of_every_family_is_found(family: Family) -> None:
    """Every matrix of a layer is read by exactly one target, whose size is that of the matrix's input."""
    model = shared_model(family)
    tokens = random_tokens(1, 24)
    with torch.no_grad():
        targets = find_inputs(model, lambda: model(tokens))
        seen: dict[Any, int] = {}
        with observed_inputs(model, targets, lambda t, x: seen.update({t: seen.get(t, 0) + x[..., 0].numel()})):
            model(tokens)
    layers = {t.layer for t in targets}
    assert layers == set(range(model.config.get_text_config().num_hidden_layers))
    for layer in layers:
        own = [t for t in targets if t.layer == layer]
        kinds = [t.kind for t in own]
        assert {"qkv", "o", "down"} <= set(kinds)
        names = [name for t in own for name in t.projections]
        assert len(names) == len(set(names))
        matrices = {
            name.rpartition(f".{layer}.")[2]: module
            for name, module in model.named_modules()
            if f".{layer}." in name and type(module).__name__ in ("Linear", "Conv1D", "FalconLinear")
        }
        assert {name for name in names if ".experts." not in name} == matrices.keys()
        for target in own:
            for name in set(target.projections) & matrices.keys():
                weight = matrices[name].weight
                assert target.dim == weight.shape[0 if type(matrices[name]).__name__ == "Conv1D" else 1]
    for target, count in seen.items():
        per_token = model.config.num_experts_per_tok if target.experts else 1
        assert count == 24 * per_token
    assert seen.keys() == set(targets)


def test_moments_are_those_of_the_inputs() -> None:
    """Against inputs kept whole, and the same in one pass and in many."""
    model = shared_model(LLAMA)
    sequences = [random_tokens(1, 64, seed) for seed in range(2)]
    kept: list[torch.Tensor] = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0][0]))
    cached = []
    with torch.no_grad():
        for sequence in sequences:
            run_model(model, sequence, RecordingCache(model.config, lambda i, k, v: cached.append((i, k, v))))
    handle.remove()
    x = torch.cat(kept).double()
    values = torch.cat([v[0, :, 4:] for i, _, v in cached if i == 1], dim=1).double()
    ropes = detect_ropes(model, [0, 1])
    for budget in (MOMENT_BYTES, 1):
        found: dict[Any, Any] = {}
        gathered = gather(
            model, sequences, ropes, lambda t, m, f=found: f.update({(t.layer, t.kind): m}), moment_bytes=budget
        )
        moments = found[1, "down"]
        assert moments.count == len(x) == 128
        torch.testing.assert_close(moments.full.second_moment[0], x.T @ x / len(x))
        torch.testing.assert_close(moments.energy, x.pow(2).sum(0))
        own: Moments = gathered.cache[1, "value"]
        torch.testing.assert_close(own.mean, values.mean(1))
        assert own.count == 2 * 60
        # A rotation changes no length: the energy of keys is the same with it and without.
        energies = [
            gathered.cache[1, name].second_moment.diagonal(dim1=1, dim2=2).sum(1) for name in ("key", "rotated key")
        ]
        torch.testing.assert_close(*energies, rtol=1e-5, atol=0)


def test_windows_show_no_sinks_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with a window were taken to look at all tokens, and to share out their attention so."""
    monkeypatch.setattr(gathering, "SINK_SHARE", 1e-9)  # any share at all
    model = shared_model(next(family for family in FAMILIES if family.name == "gemma2"))
    windows = {i for i, kind in enumerate(model.config.layer_types) if kind == "sliding_attention"}
    layers = set(range(model.config.num_hidden_layers))
    window, length = model.config.sliding_window, 120
    ropes = detect_ropes(model, sorted(layers))
    found = gather(model, [random_tokens(1, length)], ropes, lambda target, moments: None).sinks
    assert found is not None
    first = length // 2 - window + 1  # that the earliest query sees
    for (position, _), sink in found.items():
        assert sink.layers == (layers if position >= first else layers - windows), position


@pytest.mark.slow
def test_grade_is_between_flat_codes_and_the_bound() -> None:
    """Codes of one width for all, without a transform worth the name, earn nothing; the calibrated ones some of it."""
    model = shared_model(LLAMA)
    calibration = calibrate(model, random_tokens(3, 256), progress=False)
    samples, block_table = collect_samples(model, random_tokens(1, 400, seed=9), [0, 1])
    found = {(g.side, g.bits): g for g in grade(calibration, samples, block_table, (2.0, 4.0))}
    assert set(found) == {(side, bits) for side in ("all", "key", "value") for bits in (2.0, 4.0)}
    for each in found.values():
        assert 0 < each.share < 1
        assert each.realised == pytest.approx(each.share * each.possible)
    flat = calibration.with_bits(4)
    layers = {
        index: LayerCalibration(
            layer.rope, *(replace(side, widths=torch.full_like(side.widths, 4)) for side in (layer.key, layer.value))
        )
        for index, layer in flat.layers.items()
    }

    class Flat(Calibration):
        def with_rate(self, *_: Any) -> Calibration:
            return self

    worse = grade(Flat(layers, flat.metadata), samples, block_table, (4.0,))[0]
    assert worse.realised < found["all", 4.0].realised


@pytest.mark.parametrize(
    "make",
    [
        lambda: BertModel(
            BertConfig(
                vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
            )
        ),
        lambda: ModernBertModel(
            ModernBertConfig(
                vocab_size=256,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                pad_token_id=0,
                cls_token_id=1,
                sep_token_id=2,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
    ],
    ids=["bert", "modernbert"],
)
def test_encoders_show_their_weights_inputs(make: Any) -> None:
    model = make().eval()
    assert compat.is_encoder(model.config)
    report = analyze(model, Letters(), letters(600), seq_len=256, progress=False)
    assert {target.name for target in report.targets} == {"qkv", "o", "gate_up", "down"}
    assert (report.grades, report.divergences, report.calibration, report.held_out) == ((), (), None, 0)
    assert any("is an encoder: it keeps no key/value cache" in note for note in report.notes)
    assert "gain" in report.summary()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "mixtral", "gpt2", "bloom", "deepseek-v3"])
def test_families_get_a_whole_report(name: str) -> None:
    family = next(f for f in (*FAMILIES, *OTHERS) if f.name == name)
    report = analyze(family.make(), Letters(), letters(600), seq_len=256, progress=False)
    names = {target.name for target in report.targets}
    assert {"key", "value", "qkv", "o", "down"} <= names
    assert ("rotated key" in names) == any(size for _, size in family.ropes.values())
    layers = {t.layer for t in report.targets if t.name == "key"}
    assert layers == set(family.ropes)
    assert len(report.grades) == 9
    assert all(each.predicted is not None for each in report.divergences)
    windowed = report.layers > len(layers)
    assert any("bounded cache" in note for note in report.notes) == windowed
    assert Report.from_json(report.to_json()) == report


def test_a_divergence_that_cannot_be_measured_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that was to be verified only lacked the figure."""
    model = shared_model(LLAMA)
    failed = FidelityResult("ours", False, "out of memory")
    monkeypatch.setattr(analyzer, "measure_fidelity", lambda *args, **more: {"spectral-3": failed})
    found, notes = analyzer._divergences(model, Calibration.synthetic(model.config), torch.zeros(64).long(), Progress())
    assert {each.measured for each in found} == {None}
    assert notes == ["The divergence at 3 bits could not be measured: out of memory."]


def test_a_text_too_short_is_refused() -> None:
    with pytest.raises(QuantCacheError, match="two sequences of at least 256 tokens: the text gives 300"):
        analyze(shared_model(LLAMA), Letters(), letters(300), progress=False)


def test_another_models_calibration_is_refused() -> None:
    other = Calibration.synthetic(shared_model(FAMILIES[1]).config)
    with pytest.raises(QuantCacheError, match="head_dim"):
        analyze(shared_model(LLAMA), Letters(), letters(600), calibration=other, progress=False)


@pytest.mark.slow
def test_command(run: Run, tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    """On the bundled model: three files that agree, a prediction within twice of what was measured."""
    status, out, err = run(
        "analyze", "wiki11m", "-o", tmp_path / "out", "--tokens", 768, "--seq-len", 256, "--verify", "--json"
    )
    assert status == 0, err
    printed = json.loads(out)
    files = ["report.html", "report.json", "report.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    report = Report.from_json(tmp_path / "out" / "report.json")
    assert {k: v for k, v in printed.items() if k not in ("files", "seconds")} == report.to_dict()
    assert report.to_html() == (tmp_path / "out" / "report.html").read_text("utf-8")
    assert report.model == "wiki11m"
    assert (report.tokens, report.seq_len, report.held_out) == (768, 256, 256)
    assert len(report.targets) == 6 * (2 * 3 + 4)
    for each in report.divergences:
        assert each.predicted is not None
        assert each.measured is not None
        told = any(note.startswith(f"At {each.bits:g} bits the prediction is") for note in report.notes)
        assert 0.5 <= each.predicted / each.measured <= 2 or told
    assert any("rest on runs on text that the calibration has seen, and are too low" in note for note in report.notes)
    bits = [rate.bits for rate in report.qualities]
    assert [rate.quality for rate in report.qualities] == ["near-lossless", "balanced", "small"]
    assert bits == sorted(bits, reverse=True)
    assert [(each.layer, each.side, each.head) for each in report.widths] == [
        (layer, side, head) for layer in range(6) for side in ("key", "value") for head in range(2)
    ]
    assert sum(each.bits for each in report.widths) / len(report.widths) == pytest.approx(3, abs=0.01)
    assert str(tmp_path) not in report.to_json()


def test_command_refuses_the_calibration_text(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(data.calibration_text(), encoding="utf-8")
    folder = data.calibrations_path() / "wiki11m"
    status, out, err = run("analyze", "wiki11m", "-o", tmp_path / "out", "-c", folder, "--text", text)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: text.txt")
