"""A spectral layer under random interleavings of everything a cache can be asked to do, against a list of tokens."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from quantcache.accounting.measuring import measure
from quantcache.accounting.memory import PLACE_BYTES
from quantcache.artifact.calibration import Calibration
from quantcache.backends import BackendName
from quantcache.backends.padding import Arrivals
from quantcache.cache.files import read_cache, read_description, write_cache
from quantcache.cache.layer import SpectralLayer
from quantcache.coding.blocks import DenseCodec, SideCodec
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.growth import GROWTH
from quantcache.coding.packing import BLOCK
from quantcache.coding.rope import ANCHOR_LENGTH, Rope
from quantcache.coding.schema import SIDES, CodecSettings, Coding, LayerCalibration, Metadata, SideCalibration
from tests.builders import held_bytes, random_side
from tests.helpers import implementation
from tests.property.effort import SOAK, examples, report

HEADS, KEY_DIM, VALUE_DIM = 2, 32, 16
DIMS = {"key": KEY_DIM, "value": VALUE_DIM}
ROPE = Rope("half", tuple(10_000.0 ** (-i / 16) for i in range(16)))
CODINGS: tuple[Coding, ...] = get_args(Coding)
SETTINGS = {coding: CodecSettings(gain_search=(0.8, 1.0), coding=coding) for coding in CODINGS}
MAX_TOKENS = 900
MAX_ROWS = 6
MAX_SLACK = 0.12


@functools.cache
def coded(side: str, coding: Coding) -> SpectralCodec:
    """A codec of mixed widths."""
    dim = DIMS[side]
    widths = torch.tensor([4, 3, 2, 0]).repeat_interleave(dim // 8).repeat(2).expand(HEADS, -1)
    constants = random_side(HEADS, dim, widths, (16, dim - 16), seed=len(side))
    return SpectralCodec(constants, ROPE if side == "key" else Rope(), SETTINGS[coding])


@dataclass
class Block:
    """A block as it was when it was encoded."""

    start: int
    length: int
    anchor: int
    fields: dict[str, dict[str, Tensor]]


@dataclass
class Model:
    """The oracle: every token as it was appended, as it must read now, and what was encoded when.

    Attributes:
        given: Tokens as appended, ``[B, H, T, D]`` by side.
        expected: Tokens as they must read, and by how much float32 may differ, by side.
        blocks: The encoded blocks.
        pending: Whether the newest tokens await their reader.
    """

    rows: int
    sinks: int
    residual: int
    dtype: torch.dtype
    backend: BackendName
    codecs: dict[str, SideCodec]
    given: dict[str, Tensor] = field(default_factory=dict)
    expected: dict[str, Tensor] = field(default_factory=dict)
    rounding: dict[str, Tensor] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    pending: bool = False

    def clear(self) -> None:
        """Forget everything."""
        for side, dim in DIMS.items():
            self.given[side] = torch.zeros(self.rows, HEADS, 0, dim, dtype=self.dtype)
            self.expected[side] = self.given[side].clone()
            self.rounding[side] = torch.zeros(self.rows, HEADS, 0)
        self.blocks, self.pending = [], False

    @property
    def length(self) -> int:
        """T."""
        return self.given["key"].shape[2]

    @property
    def encoded_end(self) -> int:
        """Slot behind the last encoded token."""
        return self.blocks[-1].start + self.blocks[-1].length if self.blocks else 0

    def append(self, new: dict[str, Tensor]) -> None:
        """Add tokens after what was due has been encoded."""
        self.settle()
        for side, tokens in new.items():
            self.given[side] = torch.cat((self.given[side], tokens), dim=2)
            self.expected[side] = torch.cat((self.expected[side], tokens), dim=2)
            exact = torch.zeros(tokens.shape[:3])
            self.rounding[side] = torch.cat((self.rounding[side], exact), dim=2)
        self.pending = True

    def settle(self) -> None:
        """Encode what is due, once and for all."""
        if not self.pending:
            return
        self.pending = False
        while True:
            start = self.encoded_end if self.blocks else self.sinks
            if self.length - start - self.residual < BLOCK:
                return
            anchor = self.blocks[-1].anchor if self.blocks else start
            if start + BLOCK - anchor > ANCHOR_LENGTH:
                anchor = start
            place = torch.tensor([[start, BLOCK, anchor]], dtype=torch.int32)
            block = Block(start, BLOCK, anchor, {})
            slots = slice(start, start + BLOCK)
            for side, codec in self.codecs.items():
                fields = implementation(self.backend).encode(codec, self.given[side][:, :, slots], place, None)
                block.fields[side] = {name: value[0].clone() for name, value in fields.items()}
                decoded = codec.decode(fields, place, None)
                self.expected[side][:, :, slots] = decoded.to(self.dtype)
                self.rounding[side][:, :, slots] = rounding_of(codec, fields, self.dtype)
            self.blocks.append(block)

    def crop(self, keep: int) -> None:
        """Keep the first tokens; a cut block keeps its codes."""
        self.settle()
        for tensors in (self.given, self.expected, self.rounding):
            for side in SIDES:
                tensors[side] = tensors[side][:, :, :keep].clone()
        if keep <= self.sinks:
            self.blocks = []
        self.blocks = [replace(b, length=min(b.length, keep - b.start)) for b in self.blocks if b.start < keep]

    def take(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows."""
        self.settle()
        self.rows = len(rows)
        for tensors in (self.given, self.expected, self.rounding):
            for side in SIDES:
                tensors[side] = tensors[side][rows]
        for block in self.blocks:
            block.fields = {s: {n: v[rows] for n, v in fields.items()} for s, fields in block.fields.items()}


def rounding_of(codec: SideCodec, fields: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """By how much a decoded token may differ when its products are summed in another order, ``[B, H, 64]``.

    A sum of D float32 products differs by at most D units of 2^-24 of the sum of their sizes, either way; rounding to
    the model's dtype can then fall to the neighbouring number. The rotation keeps a token's norm.
    """
    if not isinstance(codec, SpectralCodec):
        return torch.zeros(())
    scaled = codec.dequantize(fields)[0].abs()
    size = (codec.decoder.abs() @ scaled).norm(dim=-2) + codec.mean.norm(dim=-1)[:, None]
    unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    return (2 * (codec.dim + 8) * 2.0**-24 + unit) * size


readers = st.sampled_from(["ours", "stock", "none"])


tried: Counter[str] = Counter()
"""Sequences and operations so far."""


@pytest.fixture(autouse=True, scope="module")
def counted() -> Iterator[None]:
    """Report how much was tried."""
    yield
    report("operations on a layer", tried)


class LayerMachine(RuleBasedStateMachine):
    """Drives a layer and the oracle in step."""

    @initialize(
        rows=st.integers(1, 3),
        sinks=st.sampled_from([4, 4, 0, 1, 70]),
        residual=st.sampled_from([64, 64, 0, 7]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        backend=st.sampled_from(["auto", "torch"]),
        dense=st.sampled_from([(), (), ("key",), ("value",), SIDES]),
        masked=st.sampled_from([False, False, True]),
        coding=st.sampled_from(CODINGS),
        seed=st.integers(0, 2**31),
    )
    def start(
        self,
        rows: int,
        sinks: int,
        residual: int,
        dtype: torch.dtype,
        backend: BackendName,
        dense: tuple[str, ...],
        masked: bool,
        coding: Coding,
        seed: int,
    ) -> None:
        """Make an empty layer; one that codes nothing may be told of padding and positions, which changes nothing."""
        dense = SIDES if masked else dense
        tried["sequences"] += 1
        self.generator = torch.Generator().manual_seed(seed)
        codecs: dict[str, SideCodec] = {side: DenseCodec() if side in dense else coded(side, coding) for side in SIDES}
        self.coding: Coding = coding
        self.layer = SpectralLayer(lambda *_: codecs, None, sinks, residual, backend)
        self.model = Model(rows, sinks, residual, dtype, backend, codecs)
        self.model.clear()
        self.masked = masked

    def told(self, count: int) -> Arrivals | None:
        """What a forward pass says: nothing, or any mask of all slots, whatever earlier ones said, and positions."""
        if not self.masked:
            return None
        rows, length = self.model.rows, self.model.length
        kind = int(torch.randint(0, 5, (1,), generator=self.generator))
        if kind == 0:
            return None  # a custom 4D mask
        shown = torch.ones(rows, length, dtype=torch.bool)
        if kind == 1:
            shown = torch.arange(length) >= torch.randint(0, length + 1, (rows, 1), generator=self.generator)
        elif kind == 2:
            shown = torch.rand(rows, length, generator=self.generator) < 0.7
        elif kind == 3:
            shown = torch.arange(length) >= torch.randint(0, 80, (rows, 1), generator=self.generator)
        positions = (shown.long().cumsum(-1) - 1).clamp_min(0)[:, length - count :] if kind < 4 else None
        tried[("custom mask", "left padding", "holes", "short padding", "no padding")[kind]] += 1
        return Arrivals.of(shown, positions, length, count)

    def random_tokens(self, count: int) -> dict[str, Tensor]:
        """New tokens, with now and then one far larger than the rest."""
        new = {}
        for side, dim in DIMS.items():
            x = torch.randn(self.model.rows, HEADS, count, dim, generator=self.generator)
            x = x * torch.where(torch.rand(count, 1, generator=self.generator) < 0.02, 50.0, 3.0)
            new[side] = x.to(self.model.dtype)
        return new

    @rule(count=st.sampled_from([200, 150, 129, BLOCK, BLOCK + 1]), reader=readers)
    def append_many(self, count: int, reader: str) -> None:
        """Append about as much as makes a block or two."""
        self.append(count, reader)

    @rule(count=st.integers(1, 200), reader=readers)
    def append(self, count: int, reader: str) -> None:
        """Append, and have the new tokens read by our attention, by somebody else, or by nobody."""
        count = min(count, MAX_TOKENS - self.model.length)
        if not count:
            return
        new = self.random_tokens(count)
        self.model.append(new)
        keys, values = self.layer.update(new["key"], new["value"], arrivals=self.told(count))
        assert keys.shape == (self.model.rows, HEADS, self.model.length, KEY_DIM)
        assert values.shape == (self.model.rows, HEADS, self.model.length, VALUE_DIM)
        if reader == "ours":
            self.layer.flush()
            self.model.settle()
        elif reader == "stock":
            for side, lazy in (("key", keys), ("value", values)):
                dense = lazy + 0
                self.check_dense(side, dense)
                assert torch.equal(dense[:, :, -count:], new[side]), "a call reads its own tokens exactly"
            self.model.settle()

    @precondition(lambda self: self.model.length)
    @rule(remove=st.integers(0, 10))
    def crop_a_little(self, remove: int) -> None:
        """Crop as speculative decoding does."""
        self.crop(max(0, self.model.length - remove))

    @precondition(lambda self: self.model.length > 200)
    @rule(keep=st.integers(0, MAX_TOKENS) | st.sampled_from([0, 3, 4, 5, 68, 69, 132]))
    def crop_to(self, keep: int) -> None:
        """Crop by any amount, to the sinks and to the ends of blocks in particular."""
        self.crop(min(keep, self.model.length))

    def crop(self, keep: int) -> None:
        """Keep the first tokens."""
        remove = self.model.length - keep
        self.model.crop(keep)
        self.layer.crop(-remove)

    @precondition(lambda self: self.model.length)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        """Let every row continue another one."""
        rows = data.draw(st.lists(st.integers(0, self.model.rows - 1), min_size=1, max_size=3), label="rows")
        self.model.take(torch.tensor(rows))
        self.layer.reorder_cache(torch.tensor(rows))

    @precondition(lambda self: self.model.length)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats: int) -> None:
        """Repeat every row."""
        assume(self.model.rows * repeats <= MAX_ROWS)
        self.model.take(torch.arange(self.model.rows).repeat_interleave(repeats))
        self.layer.batch_repeat_interleave(repeats)

    @precondition(lambda self: self.model.length)
    @rule(data=st.data(), as_mask=st.booleans())
    def select(self, data: st.DataObject, as_mask: bool) -> None:
        """Keep some rows."""
        kept = data.draw(st.sets(st.integers(0, self.model.rows - 1), min_size=1), label="kept")
        rows, before = torch.tensor(sorted(kept)), self.model.rows
        self.model.take(rows)
        mask = torch.zeros(before, dtype=torch.bool)
        mask[rows] = True
        self.layer.batch_select_indices(mask if as_mask else rows)

    @rule(wreck=st.sampled_from(["append", "crop", "reorder", "reset"]), keep=st.booleans())
    def fork(self, wreck: str, keep: bool) -> None:
        """Go on with a fork or with what it came from, and ruin the other."""
        other = self.layer.fork()
        self.model.settle()
        if not keep:
            other, self.layer = self.layer, other
        self.ruin(other, wreck)

    @precondition(lambda self: self.model.length > 300)
    @rule()
    def save_and_load(self) -> None:
        """Go on with what comes back from a file."""
        self.layer = self.through_a_file(self.layer)
        self.model.settle()

    def through_a_file(self, layer: SpectralLayer) -> SpectralLayer:
        """The layer as a process finds it that loads it."""
        sides = [LayerCalibration(ROPE, *(self.constants(side) for side in SIDES))]
        calibration = Calibration(dict(enumerate(sides)), Metadata(codec=SETTINGS[self.coding]))
        found = SpectralLayer(layer.make_codecs, None, layer.sink_length, layer.residual_length, layer.backend)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "layer"
            write_cache(path, SimpleNamespace(layers=[layer]), calibration, None)
            read_cache(path, read_description(path), SimpleNamespace(layers=[found]), calibration)
        return found

    def constants(self, side: str) -> SideCalibration:
        """What a file says of a side's codec: none has widths that says nothing of its codes."""
        return SideCalibration(torch.zeros(HEADS, DIMS[side]), torch.zeros(0), torch.zeros(0))

    @rule(wreck=st.sampled_from(["append", "crop", "reorder", "overwrite"]))
    def deepcopy(self, wreck: str) -> None:
        """Go on with a copy, and ruin the original."""
        original, self.layer = self.layer, copy.deepcopy(self.layer)
        self.model.settle()
        self.ruin(original, wreck)

    def ruin(self, original: SpectralLayer, wreck: str) -> None:
        """Change another layer beyond recognition."""
        if not original.is_initialized:
            return
        if wreck == "append":
            new = self.random_tokens(200)
            original.update(new["key"], new["value"])
            original.flush()
        elif wreck == "crop":
            original.crop(-(self.model.length // 2))
        elif wreck == "reorder":
            original.reorder_cache(torch.zeros(1, dtype=torch.int64))
        elif wreck == "reset":
            original.reset()
        else:
            held = [*original.tails.values(), *original.sinks.values(), *original.state.blocks.table.buffers.values()]
            held += [buffer for store in original.stores.values() for buffer in store.buffers.values()]
            held += [
                *original.state.blocks.leads.values(),
                *(each for each in original.state.blocks.grid if each is not None),
            ]
            for tensor in held:
                tensor.zero_()

    @precondition(lambda self: self.model.length > 500)
    @rule(rows=st.integers(1, 3))
    def reset(self, rows: int) -> None:
        """Forget everything; what follows may be of another batch size."""
        self.layer.reset()
        self.model.rows = rows
        self.model.clear()

    # ------------------------------------------------------------------ what must hold

    def check_dense(self, side: str, found: Tensor) -> None:
        """Dense slots are exact; encoded ones are what their codes decoded to when they were made."""
        expected, rounding = self.model.expected[side], self.model.rounding[side]
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        difference = (found.double() - expected.double()).abs().amax(-1) if found.numel() else torch.zeros(())
        assert (difference <= rounding.double()).all()

    @invariant()
    def tokens_and_blocks(self) -> None:
        """Lengths, spans and places agree with the oracle."""
        tried["operations"] += 1
        model, layer = self.model, self.layer
        assert layer.get_seq_length() == model.length
        assert layer.state.blocks.end == model.encoded_end
        assert [(s.start, s.length, s.anchor) for s in layer.spans] == [
            (b.start, b.length, b.anchor) for b in model.blocks
        ]
        end = model.sinks
        for span in layer.spans:
            assert span.start == end
            assert 1 <= span.length <= BLOCK
            assert span.anchor <= span.start <= span.anchor + ANCHOR_LENGTH - BLOCK
            end = span.end
        assert layer.state.blocks.cut == any(span.length < BLOCK for span in layer.spans)
        if layer.is_initialized:
            block_table = layer.snapshot().block_table
            assert block_table.tolist() == [[b.start, b.length, b.anchor] for b in model.blocks]
            for side in SIDES:
                assert layer.stores[side].count == len(model.blocks)

    @invariant()
    def codes_are_those_of_the_first_encoding(self) -> None:
        """Every code and gain is bit for bit what the first and only encoding of its block gave."""
        for side in SIDES:
            stored = self.layer.stores[side].slice(0, len(self.model.blocks))
            for name, buffer in stored.items():
                for i, block in enumerate(self.model.blocks):
                    assert torch.equal(buffer[i], block.fields[side][name])

    @invariant()
    def contents(self) -> None:
        """What a stock consumer would read."""
        if self.layer.is_initialized:
            view = self.layer.snapshot()
            for side in SIDES:
                self.check_dense(side, view.dense(side))

    @invariant()
    def memory(self) -> None:
        """Bytes are those of the tensors held, and of each kind what the oracle says."""
        model, layer = self.model, self.layer
        memory = measure(SimpleNamespace(layers=[layer]))
        assert memory.total == held_bytes(layer)
        if not layer.is_initialized:
            assert memory.total == 0
            return
        size = model.dtype.itemsize
        per_token = model.rows * HEADS * (KEY_DIM + VALUE_DIM)
        assert memory.tokens == model.length
        assert memory.elements == model.length * per_token
        assert memory.residual == (model.length - model.encoded_end) * per_token * size
        # Sinks, and what lies before the first block where that is not them.
        aside = 1 if layer.state.blocks.left_padding is None else 2
        assert memory.sinks == (aside * model.sinks * per_token * size if model.blocks else 0)
        stored = [t for b in model.blocks for fields in b.fields.values() for t in fields.values()]
        assert memory.codes + memory.gains + memory.dense == sum(t.nbytes for t in stored)
        room = max(len(model.blocks), layer.state.blocks.table.capacity)
        told = [
            each
            for each in (layer.state.blocks.left_padding, layer.state.blocks.origins, layer.state.trail)
            if each is not None
        ]
        assert self.masked or not told
        assert memory.bookkeeping == PLACE_BYTES * room + sum(each.nbytes for each in told)
        assert room <= len(model.blocks) * (1 + 1 / GROWTH)
        assert memory.slack <= MAX_SLACK * memory.total


LayerMachine.TestCase.settings = settings(
    max_examples=examples(80),
    stateful_step_count=50 if SOAK else 30,
    phases=set(Phase) - {Phase.explain},
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestLayer = pytest.mark.slow(
    pytest.mark.support("any order of operations, against a model (property test)")(LayerMachine.TestCase)
)


class FewOperations(LayerMachine):
    """The same with fewer examples, for runs that leave out what takes long."""


FewOperations.TestCase.settings = settings(LayerMachine.TestCase.settings, max_examples=16)
TestFewOperations = FewOperations.TestCase
