"""Padding, holes and custom masks: exact where nothing is lossy, and elsewhere no loss of fidelity."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from quantcache import Calibration, SpectralCache
from quantcache.cache.files import DESCRIPTION
from quantcache.coding.schema import SIDES
from quantcache.common.compat import attention as reading
from quantcache.common.tensor_file import checksum
from quantcache.data import calibrations_path, text_path
from tests import warm
from tests.builders import scalar_calibration
from tests.families import FAMILIES, OTHERS, Family, random_tokens, shared_model
from tests.helpers import error, few

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = FAMILIES[0]
ATTENTIONS = ("spectral", "sdpa", "eager", "two_dimensional")

ROUNDING, CLOSE = 2e-5, 2e-3
"""See test_generate.py."""


def two_dimensional(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention that is given the 2D mask, as flash attention is."""
    length, count = key.shape[2], query.shape[2]
    mask = (torch.arange(length) <= torch.arange(length - count, length)[:, None])[None, None]
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None].bool()
    return sdpa_attention_forward(module, query, key, value, mask, **{**kwargs, "is_causal": False})


AttentionInterface.register("two_dimensional", two_dimensional)
AttentionMaskInterface.register("two_dimensional", flash_attention_mask)


# ---------------------------------------------------------------------- fidelity, on text

Step = tuple[Tensor, Tensor | None, Tensor | None]
"""Tokens, 2D mask and positions of a forward pass."""


@pytest.fixture(scope="module")
def text(demo_tokenizer: Any) -> Tensor:
    """Tokens of the bundled text."""
    return demo_tokenizer(text_path("wiki_evaluation.txt").read_text("utf-8"), return_tensors="pt").input_ids[0]


@functools.cache
def calibration() -> Calibration:
    """The bundled model's calibration."""
    return Calibration.from_pretrained(calibrations_path() / "wiki11m")


def steps_of(rows: Sequence[Tensor], shown: Tensor, cuts: Sequence[int], positions: bool = True) -> list[Step]:
    """Forward passes over rows of tokens that lie where the mask shows something, as ``generate`` makes them."""
    tokens = torch.ones(shown.shape, dtype=torch.int64)
    for row, mask in enumerate(shown):
        tokens[row, mask] = rows[row][: int(mask.sum())]
    places, steps, first = (shown.long().cumsum(-1) - 1).clamp_min(0), [], 0
    for count in cuts:
        span = slice(first, first + count)
        first += count
        steps.append((tokens[:, span], shown[:, :first].long(), places[:, span] if positions else None))
    return steps


LENGTH, PREFILL, CHUNK = 336, 240, 32
SLOTS = torch.arange(LENGTH)
LEFT = torch.stack([SLOTS >= 0, SLOTS >= 130])
HOLES = torch.stack([(SLOTS >= 20) & ~((SLOTS >= 90) & (SLOTS < 120)), ~((SLOTS >= 60) & (SLOTS % 60 < 9))])


class Reader:
    """Two rows of text, and how far a spectral cache is from the dense one on each of them alone and in a batch."""

    def __init__(self, model: PreTrainedModel, text: Tensor):
        self.model, self.rows = copy.deepcopy(model), [text[:LENGTH], text[2000:][:LENGTH]]
        cut = (PREFILL, *[CHUNK] * ((LENGTH - PREFILL) // CHUNK))
        self.expected = [self.read("sdpa", [(row[None], None, None)], dense=True)[0] for row in self.rows]
        self.cuts = {"one": cut, "two": (150, PREFILL - 150, *cut[1:]), "many": (80, 80, PREFILL - 160, *cut[1:])}

    @torch.no_grad()
    def read(self, attention: str, steps: Sequence[Step], dense: bool = False) -> Tensor:
        """What the model says of every token, ``[B, T, V]`` float64."""
        self.model.set_attn_implementation(attention)
        config = self.model.config
        cache = DynamicCache(config=config) if dense else SpectralCache(calibration(), config, residual_length=0)
        logits = [
            self.model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).logits.double()
            for tokens, mask, positions in steps
        ]
        return torch.cat(logits, dim=1).log_softmax(-1)

    def divergence(self, row: int, found: Tensor, shown: Tensor) -> float:
        """Mean KL of a row's tokens behind the prompt; ``found`` is of its tokens alone."""
        first = int(shown[:PREFILL].sum())
        expected = self.expected[row][first : len(found)]
        return float((expected.exp() * (expected - found[first:])).sum(-1).mean())

    @functools.cache  # noqa: B019
    def alone(self, row: int, shown: tuple[bool, ...], cuts: str) -> float:
        """Mean KL of a row without its padding, in the same forward passes."""
        mask = torch.tensor(shown)
        ends = [int(part.sum()) for part in mask.split(self.cuts[cuts])]
        edges = [0, *torch.tensor(ends).cumsum(0).tolist()]
        steps: list[Step] = [(self.rows[row][None, a:b], None, None) for a, b in pairwise(edges) if b > a]
        return self.divergence(row, self.read("spectral", steps)[0], mask)

    def ratio(self, attention: str, shown: Tensor, cuts: str, positions: bool = True) -> float:
        """How many times farther from the dense cache the rows are in one batch with these masks."""
        found = self.read(attention, steps_of(self.rows, shown, self.cuts[cuts], positions))
        batch = sum(self.divergence(row, found[row, shown[row]], shown[row]) for row in range(2))
        return batch / sum(self.alone(row, tuple(shown[row].tolist()), cuts) for row in range(2))


@pytest.fixture(scope="module")
def reader(demo_model: PreTrainedModel, text: Tensor) -> Reader:
    """The bundled model on two rows of the bundled text."""
    return Reader(demo_model, text)


@pytest.mark.slow
@pytest.mark.support("left padding with any attention implementation")
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_left_padding_costs_no_fidelity(reader: Reader, attention: str) -> None:
    assert reader.ratio(attention, LEFT, "one") < 1.5


@pytest.mark.slow
@pytest.mark.support("left padding with any attention implementation")
def test_left_padding_costs_no_fidelity_where_positions_count_slots(reader: Reader) -> None:
    assert reader.ratio("spectral", LEFT, "one", positions=False) < 1.5


@pytest.mark.slow
@pytest.mark.support("chunked prefill")
def test_padding_longer_than_a_chunk_costs_no_fidelity(reader: Reader) -> None:
    assert reader.ratio("spectral", LEFT, "many") < 1.5


@pytest.mark.slow
@pytest.mark.support("holes in the mask: padding between the turns of a batch")
@pytest.mark.parametrize("cuts", ["two", "many"])
def test_holes_cost_no_fidelity(reader: Reader, cuts: str) -> None:
    assert reader.ratio("spectral", HOLES, cuts) < 1.5


# ---------------------------------------------------------------------- logits, on random tokens


@functools.cache
def model_of(attention: str, family: Family = LLAMA) -> PreTrainedModel:
    """A small model."""
    return family.make(attention=attention)


def empty(**options: Any) -> SpectralCache:
    """An empty cache of the small model."""
    config = model_of("sdpa").config
    return SpectralCache(scalar_calibration(config, 8.0), config, **{"residual_length": 0, **options})


PASSTHROUGH = {"key_bits": "dense", "value_bits": "dense"}
Pass = tuple[Tensor, dict[str, Any]]


@torch.no_grad()
def logits_of(attention: str, cache: DynamicCache, passes: Sequence[Pass]) -> list[Tensor]:
    """Logits of every forward pass."""
    return [model_of(attention)(tokens, past_key_values=cache, **more).logits.double() for tokens, more in passes]


def block_diagonal() -> list[Pass]:
    """Documents read side by side, then a question about all of them."""
    which = torch.arange(270) // 90
    apart = torch.tril(which[:, None] == which)[None, None]
    together = torch.ones(1, 1, 10, 280, dtype=torch.bool)
    together[..., 270:] = torch.tril(together[..., 270:])
    tokens = random_tokens(1, 280, seed=1)
    positions = torch.cat([torch.arange(90)] * 3 + [torch.arange(90, 100)])[None]
    return [
        (tokens[:, :270], {"attention_mask": apart, "position_ids": positions[:, :270]}),
        (tokens[:, 270:], {"attention_mask": together, "position_ids": positions[:, 270:]}),
    ]


def last_rows_hide_the_start() -> list[Pass]:
    """A prompt of which the last queries look at its end only."""
    tokens, mask = random_tokens(2, 230, seed=2), torch.ones(2, 1, 200, 200, dtype=torch.bool).tril()
    mask[:, :, 150:, :60] = False
    return [(tokens[:, :200], {"attention_mask": mask}), (tokens[:, 200:216], {}), (tokens[:, 216:], {})]


def hidden_once() -> list[Pass]:
    """A 2D mask that hides the start in one call and shows it in the next."""
    tokens, mask = random_tokens(2, 240, seed=3), torch.ones(2, 240, dtype=torch.int64)
    hiding = mask[:, :200].clone()
    hiding[:, :40] = 0
    return [
        (tokens[:, :200], {"attention_mask": hiding}),
        (tokens[:, 200:210], {"attention_mask": mask[:, :210]}),
        (tokens[:, 210:], {}),
    ]


def hidden_in_the_prompt() -> list[Pass]:
    """The same with the positions of left padding, so that kernels are at work until the padding is shown."""
    (first, more), *_ = hidden_once()
    positions, new = torch.arange(-40, 200).expand(2, -1), random_tokens(2, 14, seed=10)
    hiding = torch.nn.functional.pad(more["attention_mask"], (0, 4), value=1)
    return [
        (first, {**more, "position_ids": positions[:, :200].clamp_min(0)}),
        (new[:, :4], {"attention_mask": hiding, "position_ids": positions[:, 200:204]}),
        (new[:, 4:], {"position_ids": positions[:, 204:214]}),
        (new[:, 4:], {"attention_mask": torch.ones(2, 224).long(), "position_ids": positions[:, 214:224]}),
    ]


def hidden_later() -> list[Pass]:
    """The other way round, and back."""
    tokens, mask = random_tokens(2, 240, seed=4), torch.ones(2, 240, dtype=torch.int64)
    hiding = mask[:, :210].clone()
    hiding[0, :130], hiding[1, 3:9] = 0, 0
    return [
        (tokens[:, :200], {"attention_mask": mask[:, :200]}),
        (tokens[:, 200:210], {"attention_mask": hiding}),
        (tokens[:, 210:], {"attention_mask": mask}),
    ]


def holes() -> list[Pass]:
    """Rows of other lengths in the turns of a chat."""
    tokens, mask = random_tokens(3, 260, seed=5), torch.ones(3, 260, dtype=torch.int64)
    mask[0, :30], mask[1, 100:131], mask[2, 120:131], mask[2, 200] = 0, 0, 0, 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    edges = (0, 131, 180, 181, 260)
    return [
        (tokens[:, a:b], {"attention_mask": mask[:, :b], "position_ids": positions[:, a:b]}) for a, b in pairwise(edges)
    ]


def additive() -> list[Pass]:
    """Left padding as a float mask, broadcast over the batch, and one that differs between heads."""
    tokens, lowest = random_tokens(2, 280, seed=6), torch.finfo(torch.float32).min
    mask = torch.zeros(1, 1, 200, 200).masked_fill(~torch.ones(200, 200).tril().bool(), lowest)
    mask[..., 50:, :50] = lowest
    by_head = torch.zeros(2, 4, 6, 206)
    by_head[:, 1, :, :90], by_head[0, 2, :, 120:199], by_head[..., 200:] = (
        lowest,
        -3.0,
        torch.triu(torch.full((6, 6), lowest), 1),
    )
    one_row = torch.ones(1, 1, 1, 207, dtype=torch.bool)
    one_row[..., 60:80] = False
    return [
        (tokens[:, :200], {"attention_mask": mask}),
        (tokens[:, 200:206], {"attention_mask": by_head}),
        (tokens[:, 206:207], {"attention_mask": one_row}),
        (tokens[:, 207:], {}),
    ]


def never_shown() -> list[Pass]:
    """A row of nothing but padding beside another, which wakes up after several blocks."""
    tokens, mask = random_tokens(2, 300, seed=7), torch.ones(2, 300, dtype=torch.int64)
    mask[1, :200] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    edges = (0, 90, 160, 230, 300)
    last = mask.clone()
    last[1, 100:200] = 1  # what was padding is shown after all
    return [
        (tokens[:, a:b], {"attention_mask": (last if b == 300 else mask)[:, :b], "position_ids": positions[:, a:b]})
        for a, b in pairwise(edges)
    ]


SCENES = {
    scene.__name__: pytest.param(scene, marks=pytest.mark.support(row), id=scene.__name__)
    for scene, row in {
        block_diagonal: "custom 4D masks, boolean and additive",
        last_rows_hide_the_start: "custom 4D masks, boolean and additive",
        additive: "custom 4D masks, boolean and additive",
        hidden_once: "a mask that hides what another shows",
        hidden_in_the_prompt: "a mask that hides what another shows",
        hidden_later: "a mask that hides what another shows",
        never_shown: "a mask that hides what another shows",
        holes: "holes in the mask: padding between the turns of a batch",
    }.items()
}
in_scene = pytest.mark.parametrize("scene", list(SCENES.values()))


def looked_at(passes: Sequence[Pass], logits: Sequence[Tensor]) -> Tensor:
    """The logits of tokens that are no padding, ``[N, V]``."""
    found = []
    for (tokens, more), each in zip(passes, logits, strict=True):
        mask = more.get("attention_mask")
        plain = mask is not None and mask.ndim == 2
        found.append(each[mask[:, -tokens.shape[1] :].bool()] if plain else each.flatten(0, 1))
    return torch.cat(found)


@in_scene
@pytest.mark.parametrize("residual_length", few([0, 64], [0]))
def test_passthrough_is_exact_under_any_mask(scene: Any, residual_length: int) -> None:
    passes = scene()
    for attention, dense in (("spectral", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")):
        expected = looked_at(passes, logits_of(dense, DynamicCache(config=model_of(dense).config), passes))
        cache = empty(residual_length=residual_length, **PASSTHROUGH)
        found = looked_at(passes, logits_of(attention, cache, passes))
        assert all(layer.spans for layer in cache.spectral_layers)
        assert error(found, expected) <= (ROUNDING * float(expected.std()) if attention == "spectral" else 0)


@in_scene
@pytest.mark.parametrize("backend", few(["auto", "torch"], ["auto"]))
def test_every_attention_reads_the_same_codes_under_any_mask(scene: Any, backend: Any) -> None:
    passes = scene()
    expected = looked_at(passes, logits_of("sdpa", empty(backend=backend), passes))
    found = looked_at(passes, logits_of("spectral", empty(backend=backend), passes))
    assert error(found, expected) <= CLOSE * float(expected.std())


@in_scene
def test_eight_bits_stay_close_under_any_mask(scene: Any) -> None:
    passes = scene()
    expected = looked_at(passes, logits_of("sdpa", DynamicCache(config=model_of("sdpa").config), passes))
    found = looked_at(passes, logits_of("spectral", empty(), passes))
    plain = [(tokens, {}) for tokens, _ in passes]
    unmasked = looked_at(plain, logits_of("sdpa", DynamicCache(config=model_of("sdpa").config), plain))
    usual = error(looked_at(plain, logits_of("spectral", empty(), plain)), unmasked) / float(unmasked.std())
    assert error(found, expected) / float(expected.std()) <= 1.5 * usual


@in_scene
def test_saved_copied_and_forked_caches_keep_what_they_know_of_padding(scene: Any, tmp_path: Path) -> None:
    *before, last = scene()
    cache = empty(residual_length=20)
    logits_of("spectral", cache, before)
    cache.save(tmp_path / "cache")
    loaded = SpectralCache.load(tmp_path / "cache", cache.calibration, config=model_of("sdpa").config)
    others = [loaded, copy.deepcopy(cache), cache.fork()]
    (expected,) = logits_of("spectral", cache, [last])
    for other in others:
        (found,) = logits_of("spectral", other, [last])
        assert torch.equal(found, expected)
        for ours, theirs in zip(other.spectral_layers, cache.spectral_layers, strict=True):
            told = [
                (state.blocks.left_padding, state.blocks.origins, state.trail) for state in (ours.state, theirs.state)
            ]
            for mine, its in zip(*told, strict=True):
                assert (mine is None) == (its is None)
                assert mine is None or torch.equal(mine, its)


@pytest.mark.parametrize("keep", [100, 50, 4, 2])
def test_a_cache_cut_in_front_of_where_a_row_begins_can_be_saved(keep: int, tmp_path: Path) -> None:
    tokens, more = random_tokens(2, 240, seed=3), random_tokens(2, 90, seed=4)
    mask = torch.ones(2, keep + 90, dtype=torch.int64)
    mask[0, :keep] = 0
    cache = empty(residual_length=20)
    padded = (torch.arange(240) >= torch.tensor([[120], [0]])).long()
    logits_of("spectral", cache, [(tokens, {"attention_mask": padded})])
    cache.crop(keep - 240)
    cache.save(tmp_path / "cache")
    loaded = SpectralCache.load(tmp_path / "cache", cache.calibration, config=model_of("sdpa").config)
    found, expected = (logits_of("spectral", each, [(more, {"attention_mask": mask})])[0] for each in (loaded, cache))
    assert torch.equal(found, expected)


def test_saved_caches_of_schema_2_0_load(tmp_path: Path) -> None:
    tokens, last = random_tokens(2, 240, seed=3), random_tokens(2, 1, seed=4)
    mask = torch.ones(2, 241, dtype=torch.int64)
    mask[0, :30] = 0
    cache = empty(residual_length=20)
    logits_of("spectral", cache, [(tokens, {"attention_mask": mask[:, :240]})])
    path = tmp_path / "cache"
    cache.save(path)
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()[DESCRIPTION])
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(".lead")}
    description |= {"schema_version": "2.0", "sha256": checksum(tensors)}
    save_file(tensors, path, metadata={"format": "pt", DESCRIPTION: json.dumps(description)})
    loaded = SpectralCache.load(path, cache.calibration, config=model_of("sdpa").config)
    step = [(last, {"attention_mask": mask})]
    (expected,), (found,) = (logits_of("spectral", each, step) for each in (cache, loaded))
    assert torch.equal(found, expected)


# ---------------------------------------------------------------------- what a layer learns


@pytest.mark.support("left padding with any attention implementation")
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_learns_the_same(attention: str) -> None:
    passes = [holes()[0], (random_tokens(3, 1, seed=9), {"attention_mask": holes()[1][1]["attention_mask"][:, :132]})]
    cache, model = empty(), model_of(attention)
    with torch.no_grad():
        for tokens, more in passes:
            model(tokens, past_key_values=cache, **more)
    for layer in cache.spectral_layers:
        assert layer.state.blocks.left_padding.tolist() == [30, 0, 0]
        assert layer.state.blocks.origins is None
        for side in SIDES:
            dense = layer.snapshot().dense(side)
            assert torch.equal(layer.sinks[side][0], dense[0, :, 30:34])
            assert torch.equal(layer.state.blocks.leads[side][0], dense[0, :, :4])


def test_what_lay_before_padded_rows_goes_with_them() -> None:
    """Once only rows are left that begin at slot 0, their sinks lie before the first block: no second copy is kept."""
    (tokens, more), *_ = holes()
    cache, model = empty(), model_of("spectral")
    with torch.no_grad():
        model(tokens, past_key_values=cache, **more)
        model(tokens[:, :1], past_key_values=cache)  # which encodes what is due
        assert all(layer.state.blocks.leads for layer in cache.spectral_layers)
        cache.batch_select_indices(torch.tensor([1]))
        for step in random_tokens(1, 70, seed=3).split(1, dim=1):
            model(step, past_key_values=cache)
    for layer in cache.spectral_layers:
        assert (layer.state.blocks.left_padding, layer.state.blocks.leads) == (None, {})
        assert torch.equal(layer.sinks["key"], layer.snapshot().dense("key")[:, :, :4])


def test_a_custom_mask_is_never_padding() -> None:
    for passes in (block_diagonal(), last_rows_hide_the_start(), additive()):
        cache = empty()
        logits_of("spectral", cache, passes)
        assert [layer.state.blocks.left_padding for layer in cache.spectral_layers] == [None, None]


@pytest.mark.parametrize("put_in_order", ["rollback", "fork", "another length"])
def test_the_mask_of_a_pass_that_failed_is_not_the_next_ones(put_in_order: str) -> None:
    """It fails once its mask is made, before any layer has its tokens."""
    model, cache, tokens = model_of("spectral"), empty(), random_tokens(2, 200, seed=3)
    mask = (torch.arange(200) >= torch.tensor([[80], [0]])).long()

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(tokens, attention_mask=mask, past_key_values=cache)
    handle.remove()
    count = 200
    if put_in_order == "rollback":
        cache.rollback()
    elif put_in_order == "fork":
        cache = cache.fork()
    else:
        count = 190
    seen = torch.ones(1, 1, count, count, dtype=torch.bool).tril()
    logits_of("spectral", cache, [(tokens[:, :count], {"attention_mask": seen})])
    assert [layer.state.blocks.left_padding for layer in cache.spectral_layers] == [None, None]


def test_where_positions_count_slots_frames_do_too() -> None:
    tokens, mask = random_tokens(2, 150, seed=1), torch.ones(2, 150, dtype=torch.int64)
    mask[0, :50] = 0
    cache = empty()
    logits_of("sdpa", cache, [(tokens, {"attention_mask": mask})])
    layer = cache.spectral_layers[0]
    assert (layer.state.blocks.left_padding.tolist(), layer.state.blocks.origins.tolist()) == ([50, 0], [0, 0])
    offset = empty()
    logits_of("sdpa", offset, [(tokens, {"position_ids": torch.arange(1000, 1150)[None]})])
    assert (
        offset.spectral_layers[0].state.blocks.left_padding,
        offset.spectral_layers[0].state.blocks.origins.tolist(),
    ) == (
        None,
        [-1000, -1000],
    )


def test_what_masks_are_read_from_is_there() -> None:
    """The first to fail where transformers renames what its masks are prepared by: padding is then not known of."""
    prepares = inspect.unwrap(masking_utils._preprocess_mask_arguments)
    arguments = inspect.signature(prepares).parameters
    assert {"attention_mask", "position_ids"} <= arguments.keys()


@pytest.mark.parametrize("renamed", ["function", "arguments"])
def test_masks_that_cannot_be_read_are_warned_of(
    renamed: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reading.warn_of_unread_masks()
    assert not caplog.records
    if renamed == "function":
        monkeypatch.delattr(masking_utils, "_preprocess_mask_arguments")
    else:
        monkeypatch.setattr(masking_utils, "_preprocess_mask_arguments", lambda mask, positions: None)
    reading.warn_of_unread_masks()
    (record,) = caplog.records
    assert re.match(r"transformers \d+\..* does not tell .* padding", record.message)


def test_a_process_with_a_cache_is_warned() -> None:
    code = (
        "from transformers import masking_utils; del masking_utils._preprocess_mask_arguments; import quantcache.cache"
    )
    ended = subprocess.run([*warm.python(), "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0
    assert "does not tell caches what is padding" in ended.stderr


@pytest.mark.parametrize("name", ["gpt-oss", "falcon-mqa", "llama"])
@pytest.mark.parametrize("start", [None, 0, 1000])
def test_positions_that_no_mask_is_told_are_known(name: str, start: int | None) -> None:
    """gpt-oss and Falcon make their masks without them; keys of padded rows would be coded elsewhere."""
    model = shared_model(next(family for family in FAMILIES + OTHERS if family.name == name))
    cache = SpectralCache(scalar_calibration(model.config, 3.0), model.config, residual_length=0)
    mask = (torch.arange(150) >= torch.tensor([[50], [0]])).long()
    more = {} if start is None else {"position_ids": torch.arange(start, start + 150)[None]}
    with torch.no_grad():
        model(random_tokens(2, 150, seed=1), attention_mask=mask, past_key_values=cache, **more)
    for layer in cache.spectral_layers:
        blocks = layer.state.blocks
        assert blocks.left_padding is not None
        assert blocks.origins is not None
        assert (blocks.left_padding.tolist(), blocks.origins.tolist()) == ([50, 0], [-(start or 0)] * 2)


@pytest.mark.parametrize("attention", ["spectral", "eager"])
def test_positions_beside_a_custom_mask_are_known(attention: str) -> None:
    """Coded at their slots, keys of a padded row were up to sixteen times further from the dense ones' logits."""
    model = LLAMA.make(attention=attention)
    cache = SpectralCache(scalar_calibration(model.config, 3.0), model.config, residual_length=9999)
    shown = torch.arange(150) >= torch.tensor([[50], [0]])
    mask = torch.ones(150, 150, dtype=torch.bool).tril() & shown[:, None, None]
    positions = (shown.long().cumsum(-1) - 1).clamp_min(0)
    for span in (slice(0, 140), slice(140, 141), slice(141, 150)):
        hidden = ~mask[:, :, span, : span.stop]
        added = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        more = {"attention_mask": added, "position_ids": positions[:, span], "past_key_values": cache}
        with torch.no_grad():
            model(random_tokens(2, 150, seed=1)[:, span], **more)
    for layer in cache.spectral_layers:
        assert layer.state.trail is not None
        assert torch.equal(layer.state.trail[:, 0].long(), torch.arange(150) - positions)


@pytest.mark.support("batch_repeat_interleave, batch_select_indices, reorder_cache")
@pytest.mark.parametrize("options", [PASSTHROUGH, {}], ids=["passthrough", "codes"])
def test_pruned_rows_go_on_under_other_masks(options: dict[str, Any]) -> None:
    *before, _ = holes()
    for rows, mask in (([1], None), ([0, 2], None), ([2, 0, 0], "shown"), ([0], "hidden")):
        caches = [empty(**options), empty(**options), DynamicCache(config=model_of("sdpa").config)]
        more: dict[str, Any] = {}
        if mask is not None:
            shown = torch.ones(len(rows), 201, dtype=torch.int64)
            shown[:, :20] = int(mask == "shown")
            more["attention_mask"] = shown
        found = []
        for attention, cache in zip(("spectral", "sdpa", "sdpa"), caches, strict=True):
            logits_of(attention, cache, before)
            cache.batch_select_indices(torch.tensor(rows))
            cache.crop(-10)
            steps = [(random_tokens(len(rows), 30, seed=8), more), (random_tokens(len(rows), 3, seed=9), {})]
            found.append(torch.cat(logits_of(attention, cache, steps), dim=1))
        assert error(found[0], found[1]) <= CLOSE * float(found[1].std())
        if options:
            assert torch.equal(found[1], found[2])


@pytest.mark.support("left-padded batches")
def test_a_compressed_dynamic_cache_is_told_of_its_padding() -> None:
    (first, *_), dense = holes(), DynamicCache(config=model_of("sdpa").config)
    logits_of("sdpa", dense, [first])
    told = SpectralCache.from_dynamic_cache(
        dense,
        scalar_calibration(model_of("sdpa").config, 8.0),
        residual_length=0,
        attention_mask=first[1]["attention_mask"],
    )
    filled = empty()
    logits_of("sdpa", filled, [first])
    filled.spectral_layers[0].flush()
    for ours, theirs in zip(told.spectral_layers, filled.spectral_layers, strict=True):
        assert torch.equal(ours.state.blocks.left_padding, theirs.state.blocks.left_padding)
        for side in SIDES:
            assert torch.equal(ours.sinks[side], theirs.sinks[side])


def test_masks_broadcast_over_many_queries() -> None:
    tokens, mask = random_tokens(2, 700, seed=1), torch.ones(1, 1, 1, 700, dtype=torch.bool)
    mask[..., 100:400] = False
    passes = [(tokens[:, :300], {}), (tokens[:, 300:], {"attention_mask": mask})]
    expected = logits_of("sdpa", DynamicCache(config=model_of("sdpa").config), passes)[-1]
    found = logits_of("spectral", empty(**PASSTHROUGH), passes)[-1]
    assert error(found, expected) <= ROUNDING * float(expected.std())


def test_padding_that_a_mask_shows_reads_as_it_was_coded() -> None:
    """Also where a row's start was not known yet when its padding was encoded."""
    before = never_shown()[:-1]
    cache = empty()
    logits_of("sdpa", cache, before)
    layer = cache.spectral_layers[0]
    reference = DynamicCache(config=model_of("sdpa").config)
    logits_of("sdpa", reference, before)
    assert layer.state.blocks.left_padding.tolist() == [0, 200]
    for side in SIDES:
        given = getattr(reference.layers[0], f"{side}s")[:, :, : layer.state.blocks.end]
        found = layer.snapshot().dense(side)[:, :, : layer.state.blocks.end]
        errors = (found - given).norm(dim=(1, 3)) / given.norm(dim=(1, 3))
        assert errors[1, 4:190].mean() < 2 * errors[0, 4:190].mean()  # coded twice
        assert torch.equal(found[:, :, :4], given[:, :, :4])
