"""The seam that kernels are plugged into: one of another layout needs nothing changed, and says what it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantcache import SpectralCache, backends
from quantcache.backends import REFERENCE, AttentionCall, CacheView, Fields
from quantcache.backends.reference import Reference
from quantcache.coding.blocks import SideCodec
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.schema import SIDES
from quantcache.common.errors import QuantCacheError
from tests.builders import scalar_calibration
from tests.families import FAMILIES, shared_model
from tests.helpers import feed

LLAMA = FAMILIES[0]
CONFIG = shared_model(LLAMA).config


class Backwards(Reference):
    """Plain torch whose words lie backwards: what a kernel with tiles of its own does, as far as others can see."""

    name = "backwards"
    layout = "backwards"

    def __init__(self) -> None:
        self.attended = self.encoded = self.decoded = 0
        self.refusal: str | None = None

    def refuses(self, query: Tensor, view: CacheView, call: AttentionCall) -> str | None:
        """Whatever a test wants."""
        return self.refusal

    def attend(self, query: Tensor, view: CacheView, call: AttentionCall) -> Tensor:
        """Attend, having looked whether blocks are in this layout."""
        self.attended += 1
        assert view.backend is self
        return super().attend(query, view, call)

    def _encode(self, codec: SpectralCodec, x: Tensor, block_table: Tensor, left_padding: Tensor | None) -> Fields:
        self.encoded += 1
        return self.from_portable(codec, codec.encode(x, block_table, left_padding))

    def _decode(self, codec: SpectralCodec, fields: Fields, block_table: Tensor, left_padding: Tensor | None) -> Tensor:
        self.decoded += 1
        return codec.decode(self.to_portable(codec, fields), block_table, left_padding)

    def to_portable(self, codec: SideCodec, fields: Fields) -> Fields:
        """Turn the words round again."""
        return {**fields, "codes": fields["codes"].flip(-1)} if "codes" in fields else fields

    from_portable = to_portable


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> Backwards:
    """The backend, registered as the fastest on CPUs."""
    backend = Backwards()
    monkeypatch.setitem(backends.FASTEST_FIRST, "cpu", (backend,))
    monkeypatch.setitem(backends.BACKENDS, backend.name, backend)
    return backend


def cache(**options: object) -> SpectralCache:
    """An empty cache of the small Llama."""
    return SpectralCache(scalar_calibration(CONFIG, 3), CONFIG, residual_length=16, **options)


def tokens(count: int, rows: int = 1) -> Tensor:
    """Random tokens."""
    return torch.randint(0, CONFIG.vocab_size, (rows, count), generator=torch.Generator().manual_seed(3))


def filled(backend: str = "auto", rows: int = 1) -> SpectralCache:
    """A cache that has seen 300 tokens, a hundred at a time and then one by one."""
    found = cache(backend=backend)
    model = shared_model(LLAMA)
    model.set_attn_implementation("spectral")
    feed(model, found, tokens(300, rows), [100, 100, 60, *[1] * 40])
    return found


def logits(found: SpectralCache) -> Tensor:
    """What the model says next, from one token and from twenty."""
    model = shared_model(LLAMA)
    model.set_attn_implementation("spectral")
    rows = found.layers[0].tails["key"].shape[0]
    return torch.cat(
        (feed(model, found.fork(), tokens(1, rows), [1]), feed(model, found.fork(), tokens(20, rows), [20])), 1
    )


@pytest.mark.support("a backend with a block layout of its own")
def test_a_backend_of_another_layout_needs_nothing_changed(backwards: Backwards, tmp_path: Path) -> None:
    found, expected = filled(rows=2), filled("torch", rows=2)
    assert backwards.attended > 0
    assert backwards.encoded > 0
    layer, twin = found.spectral_layers[0], expected.spectral_layers[0]
    assert layer.state.blocks.layout is backwards
    assert twin.state.blocks.layout is REFERENCE
    assert not torch.equal(layer.stores["key"].buffers["codes"], twin.stores["key"].buffers["codes"])
    for each in (found, expected):
        each.batch_select_indices(torch.tensor([1, 0, 1]))
        each.crop(-40)
    assert torch.equal(logits(found), logits(expected))
    assert backwards.decoded > 0
    for ours, theirs in zip(found.spectral_layers, expected.spectral_layers, strict=True):
        for side in SIDES:
            assert torch.equal(ours.snapshot().dense(side), theirs.snapshot().dense(side))
            assert all(torch.equal(ours.fields(side)[name], field) for name, field in theirs.fields(side).items())
    assert found.memory() == expected.memory()
    found.save(tmp_path / "ours.safetensors")
    expected.save(tmp_path / "theirs.safetensors")
    read = {}
    for name in ("ours", "theirs"):
        for backend in ("auto", "torch"):
            again = SpectralCache.load(
                tmp_path / f"{name}.safetensors", scalar_calibration(CONFIG, 3), config=CONFIG, backend=backend
            )
            read[name, backend] = logits(again)
    assert all(torch.equal(each, logits(expected)) for each in read.values())


@pytest.mark.slow
def test_blocks_follow_a_change_of_backend(backwards: Backwards) -> None:
    found, expected = filled(), logits(filled("torch"))
    for name, layout in (("torch", REFERENCE), ("auto", backwards), ("torch", REFERENCE)):
        for layer in found.spectral_layers:
            layer.backend = name
        assert torch.equal(logits(found), expected)
        assert {layer.snapshot().backend for layer in found.spectral_layers} == {layout}
    for layer in found.spectral_layers:
        layer.backend = "auto"
    found.spectral_layers[0].snapshot()
    found.spectral_layers[0].offload()
    assert found.spectral_layers[0].state.blocks.layout is REFERENCE, "elsewhere blocks are portable"
    assert torch.equal(logits(found), expected)


@pytest.mark.slow
def test_reports_say_who_serves_and_who_does_not(backwards: Backwards, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = cache()
    assert empty.backend_report() == {}
    found = filled()
    reports = found.backend_report()
    assert set(reports) == set(range(CONFIG.num_hidden_layers))
    assert {(report.name, *report.passed_over, report.attends) for report in reports.values()} == {("backwards", None)}
    assert not reports[0].refused
    backwards.refusal = "it is Thursday"
    logits(found)
    assert found.backend_report()[0].refused == {"it is Thursday": 1}
    assert str(found.backend_report()[0]) == "backwards; 1 calls in plain torch: it is Thursday"
    monkeypatch.setattr(Backwards, "unavailable", lambda self, device: "it is asleep")
    later = filled()
    assert later.backend_report()[0].passed_over == {"backwards": "it is asleep"}
    assert later.spectral_layers[0].state.blocks.layout is REFERENCE
    assert str(later.backend_report()[0]) == "torch; not backwards: it is asleep"
    assert torch.equal(logits(later), logits(filled("torch")))


def test_a_side_that_a_backend_lacks_is_encoded_in_its_layout(
    backwards: Backwards, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = filled("torch")
    keys = {id(layer.codecs["key"]) for layer in expected.spectral_layers}
    monkeypatch.setattr(
        Backwards, "lacks", lambda self, codec, dtype: "keys are not its business" if codec.frame.num_fast else None
    )
    found = filled()
    assert keys
    report = found.backend_report()[0]
    assert (report.name, report.attends) == ("backwards", "keys: keys are not its business")
    assert not backwards.attended
    assert torch.equal(logits(found), logits(expected))


def test_names_of_backends_are_checked() -> None:
    for name in ("natve", "", None, 3):
        with pytest.raises(ValueError, match="backend must be one of auto, cpu, cuda, triton, torch"):
            cache(backend=name)
    assert backends.find("native") is backends.find("cpu")
    with pytest.raises(QuantCacheError, match='backend="triton" cannot be used here'):
        backends.choose("triton", torch.device("meta"), {}, {})


def test_a_backend_that_no_device_here_has_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the first block: by then a prompt has been read."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(QuantCacheError, match=r'backend="cuda" cannot be used here: .* do not run on cpu devices'):
        cache(backend="cuda")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not cache(backend="cuda").backend_report(), "the model may be there yet"


def test_what_lies_beyond_the_reach_of_triton_is_left_to_plain_torch() -> None:
    """Products of 32 bits would wrap, and a query read the mask of another, or no memory of its own."""
    view, heads = filled().layers[0].snapshot(), CONFIG.num_attention_heads
    tail = view.value.tail

    def reason(count: int, length: int, between: int) -> str | None:
        query = torch.empty_strided((1, heads, count, 64), (0, 64, between, 1), device="meta")
        mask = torch.empty(1, 1, 1, length, dtype=torch.bool, device="meta")
        return backends.find("triton").refuses(query, view, AttentionCall(mask, 0.1))

    assert reason(1 << 15, 1 << 16, 128) == "the mask of 32768 queries and 65536 tokens has too many elements"
    assert reason(1 << 17, 1 << 10, 1 << 14) == "131072 queries lie too far apart"
    # 8192 of them in a batch of 256 rows: a token of all rows and heads lies together.
    strides = tail.shape[1] * 64, 64, 256 * 16 * 64, 1
    view.value.tail = torch.empty_strided((*tail.shape[:2], 8192, 64), strides, device="meta")
    assert reason(1, view.length, 64) == "8192 recent tokens lie too far apart"
