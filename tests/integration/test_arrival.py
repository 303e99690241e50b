"""What a layer stores does not depend on how its tokens arrived; operations do what they do to dense tokens."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantcache.artifact.calibration import Calibration
from quantcache.backends import BackendName
from quantcache.cache.layer import SpectralLayer
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.calibration.calibrator import calibrate
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import SIDES
from tests.families import FAMILIES, random_tokens, shared_model
from tests.helpers import left_padding
from tests.property.effort import examples
from tests.reference import ReferenceLayer

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("llama", "cohere", "gpt-neox", "gpt2")
"""Half-split, interleaved, partial and no rotation."""

MOST = 340
"""Tokens that a layer is given at most."""


@functools.cache
def calibration_of(name: str) -> Calibration:
    """A calibration of one of the families."""
    family = next(family for family in FAMILIES if family.name == name)
    return calibrate(shared_model(family), random_tokens(2, 128), predict=False, progress=False)


@functools.cache
def tokens_of(name: str, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random keys and values that the calibration of a family is right for in size, ``[B, H, MOST, D]``."""
    layer = calibration_of(name).layers[0]
    shape = (rows, layer.key.num_heads, MOST, layer.key.dim)
    generator = torch.Generator().manual_seed(5)
    return {
        side: (torch.randn(shape, generator=generator) + layer.side(side).mean[:, None]).to(dtype) for side in SIDES
    }


def empty_layer(name: str, sink_length: int, residual_length: int, backend: BackendName = "auto") -> SpectralLayer:
    """The first layer of an empty cache at 3 bits."""
    cache = SpectralCache(
        calibration_of(name), sink_length=sink_length, residual_length=residual_length, backend=backend
    )
    return cache.spectral_layers[0]


def append(layer: SpectralLayer, tokens: dict[str, Tensor], first: int, last: int, pads: Sequence[int] = ()) -> None:
    """Give a layer some tokens, as a model whose attention is ours does."""
    new = (tokens[side][:, :, first:last] for side in SIDES)
    layer.update(*new, arrivals=left_padding(pads, last, last - first))
    layer.flush()


def stored(layer: SpectralLayer, pads: Sequence[int] = ()) -> dict[str, Tensor]:
    """Everything that a layer holds, bit for bit, except the codes of blocks that hold nothing but a row's padding."""
    held: dict[str, Tensor] = {"spans": torch.tensor([[span.start, span.length, span.anchor] for span in layer.spans])}
    for side in SIDES:
        held[f"{side}.tail"] = layer.tails[side]
        if layer.spans:
            held[f"{side}.sinks"] = layer.sinks[side]
        for name, buffer in layer.stores[side].buffers.items():
            for row, pad in enumerate(pads or [0] * layer.tails[side].shape[0]):
                read = torch.tensor([span.end > pad for span in layer.spans])
                held[f"{side}.{name}.{row}"] = buffer[: layer.stores[side].count][read, row]
    if layer.spans:
        held["block_table"] = layer.state.blocks.table.buffers["block_table"][: layer.state.blocks.table.count]
    return held


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Fail unless two layers hold the same."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@st.composite
def edges(draw: st.DrawFn, most: int = MOST) -> list[int]:
    """Where the chunks of a sequence begin and end."""
    length = draw(st.integers(1, most))
    if draw(st.booleans()):
        first = draw(st.integers(1, length))  # a prefill, then single tokens
        return [0, *range(first, length + 1)]
    cuts = draw(st.lists(st.integers(1, length), max_size=12))
    return sorted({0, length, *cuts})


names, sinks, residuals = st.sampled_from(NAMES), st.sampled_from([0, 1, 4, 7]), st.sampled_from([0, 5, 64])
backends: st.SearchStrategy[BackendName] = st.sampled_from(["torch", "auto"])


@pytest.mark.slow
@given(names, edges(), sinks, residuals, backends, st.sampled_from([torch.float32, torch.bfloat16]))
@example("llama", list(range(0, 331)), 4, 64, "auto", torch.float32)
@example("llama", list(range(0, 200)), 4, 0, "torch", torch.bfloat16)
@settings(max_examples=examples(25))
def test_codes_do_not_depend_on_arrival(
    name: str, cuts: list[int], sink_length: int, residual_length: int, backend: BackendName, dtype: torch.dtype
) -> None:
    tokens = tokens_of(name, 2, dtype)
    chunked, whole = (empty_layer(name, sink_length, residual_length, backend) for _ in range(2))
    for first, last in pairwise(cuts):
        append(chunked, tokens, first, last)
    append(whole, tokens, 0, cuts[-1])
    assert_same(stored(chunked), stored(whole))
    blocks = max(0, cuts[-1] - sink_length - residual_length) // BLOCK
    assert len(whole.spans) == blocks
    assert whole.get_seq_length() == cuts[-1]


@pytest.mark.slow
@given(names, edges(), sinks, residuals, backends, st.tuples(st.integers(0, 150), st.integers(0, 150), st.just(0)))
@example("llama", list(range(0, 200)), 4, 0, "torch", (37, 3, 0))
@example("llama", [0, 50, 100, 300], 4, 0, "auto", (120, 70, 0))
@settings(max_examples=examples(15))
def test_padded_codes_do_not_depend_on_arrival(
    name: str, cuts: list[int], sink_length: int, residual_length: int, backend: BackendName, pads: tuple[int, ...]
) -> None:
    if cuts[-1] <= max(pads):
        cuts = [*cuts, max(pads) + 1]
    tokens = tokens_of(name, 3, torch.float32)
    chunked, whole = (empty_layer(name, sink_length, residual_length, backend) for _ in range(2))
    for first, last in pairwise(cuts):
        append(chunked, tokens, first, last, pads)
    append(whole, tokens, 0, cuts[-1], pads)
    assert_same(stored(chunked, pads), stored(whole, pads))


@given(edges(160), st.data())
@settings(max_examples=examples(20))
def test_codes_do_not_depend_on_the_reader(cuts: list[int], data: st.DataObject) -> None:
    tokens = tokens_of("llama", 2, torch.float32)
    layer, expected = empty_layer("llama", 4, 0), empty_layer("llama", 4, 0)
    for first, last in pairwise(cuts):
        keys, values = layer.update(tokens["key"][:, :, first:last], tokens["value"][:, :, first:last])
        reader = data.draw(st.sampled_from(["nobody", "keys", "both", "layer"]))
        if reader in ("keys", "both"):
            assert keys.add(0).shape[2] == last
        if reader == "both":
            assert values.add(0).shape[2] == last
        if reader == "layer":
            assert torch.equal(layer.keys.add(0)[:, :, first:last], tokens["key"][:, :, first:last])
        append(expected, tokens, first, last)
    layer.flush()
    assert_same(stored(layer), stored(expected))


# ---------------------------------------------------------------------- operations

OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 90)),
    st.tuples(st.just("crop"), st.integers(0, 150)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 9), min_size=1, max_size=3)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 9), min_size=1, max_size=3)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("copy"), st.none()),
    st.tuples(st.just("offload"), st.none()),
    st.tuples(st.just("reset"), st.none()),
)


@given(names, st.lists(OPERATIONS, min_size=1, max_size=12), st.sampled_from([0, 4]), st.sampled_from([0, 20]))
@example("llama", [("append", 90), ("crop", 40), ("append", 90), ("crop", 60), ("append", 90)], 4, 0)
@settings(max_examples=examples(60))
@pytest.mark.support("any order of operations, against a model (property test)")
def test_operations_do_what_they_do_to_dense_tokens(
    name: str, operations: list[tuple[str, object]], sink_length: int, residual_length: int
) -> None:
    layer = empty_layer(name, sink_length, residual_length)
    dense = ReferenceLayer(layer)
    originals: list[tuple[SpectralLayer, dict[str, Tensor]]] = []
    generator = torch.Generator().manual_seed(7)
    rows, shape = 2, tokens_of(name, 1, torch.float32)["key"].shape
    for operation, argument in operations:
        length = dense.get_seq_length()
        if operation == "append":
            new = {side: torch.randn(rows, shape[1], argument, shape[3], generator=generator) for side in SIDES}
            layer.update(new["key"], new["value"])
            layer.flush()
            dense.update(new["key"], new["value"])
        elif operation == "crop":
            for each in (layer, dense):
                each.crop(-min(argument, length))
        elif operation in ("select", "reorder") and length:
            indices = torch.tensor(argument) % rows
            for each in (layer, dense):
                (each.batch_select_indices if operation == "select" else each.reorder_cache)(indices)
            rows = len(indices)
        elif operation == "repeat" and length and rows < 4:
            for each in (layer, dense):
                each.batch_repeat_interleave(argument)
            rows *= argument
        elif operation == "copy" and length:
            originals.append((layer, stored(copy.deepcopy(layer))))
            layer = copy.deepcopy(layer)
        elif operation == "offload":
            layer.offload()
            layer.prefetch()
        elif operation == "reset":
            layer.reset()
            dense, rows = ReferenceLayer(layer), 2
        assert layer.get_seq_length() == dense.get_seq_length()
        if dense.get_seq_length():
            dense.quantize()
            assert [(span.start, span.length, span.anchor) for span in layer.spans] == dense.blocks
            # Several blocks decoded at once may round otherwise than one at a time; a wrong code is off by a tenth.
            torch.testing.assert_close(layer.keys.materialize(), dense.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(layer.values.materialize(), dense.values, rtol=1e-4, atol=1e-4)
    for original, before in originals:
        assert_same(stored(original), before)
