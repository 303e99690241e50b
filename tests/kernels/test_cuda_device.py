"""``backend="cuda"`` on a GPU: the parity suite in bfloat16, encoding and conversion of blocks, steps from a graph."""

from __future__ import annotations

import copy

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)  # before what takes seconds to import

from quantcache import Calibration, DecodeGraph, SpectralCache, decode_graphs
from quantcache.backends import cuda_blocks
from quantcache.coding.packing import BLOCK
from quantcache.coding.schema import Coding
from quantcache_kernels.cuda import room
from quantcache_kernels.cuda.driver import unavailable
from tests.builders import scalar_calibration
from tests.families import FAMILIES
from tests.kernels import encoding
from tests.kernels.cases import ATTENTION, CODES, TRELLIS, Case, Kernel, codecs
from tests.kernels.test_cuda_blocks import check_parity, in_bfloat16
from tests.kernels.test_cuda_conversion import random_words
from tests.kernels.test_cuda_encoding import CASES as ENCODED
from tests.kernels.test_parity import encoded_by_torch

DEVICE = torch.device("cuda", 0)

CUDA = Kernel("cuda", lambda: unavailable(DEVICE) or "", device=DEVICE, half=True, multiple=16)

if CUDA.missing():
    pytest.skip("no GPU that runs it", allow_module_level=True)

CASES = {name: in_bfloat16(case) for name, case in (ATTENTION | TRELLIS).items() if not CUDA.leaves(case)}
"""In the dtype that the kernels take."""

CODINGS: tuple[Coding, ...] = ("scalar", "trellis")


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_parity(case: Case, poisoned: None) -> None:
    check_parity(case, CUDA)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("tokens", [1000, 3000])
def test_parity_where_warps_share_constants_and_have_several_units(
    tokens: int, coding: Coding, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = room.device_of(DEVICE)._replace(processors=1)
    monkeypatch.setattr(room, "device_of", lambda device: small)
    check_parity(in_bfloat16(Case(tokens=tokens, heads=3, dim=128, pads=(0, 70, 0), coding=(coding, coding))), CUDA)


@pytest.mark.parametrize("name", ENCODED)
def test_codes(name: str, poisoned: None) -> None:
    case = in_bfloat16((CODES | TRELLIS)[name])
    for side, theirs in codecs(case, DEVICE).items():
        codec, given, expected = encoded_by_torch(case, side)
        moved = [None if each is None else each.to(DEVICE) for each in given]
        codes, gains = cuda_blocks.encoder(theirs).encode(*moved)
        found = {"codes": cuda_blocks._to_portable(theirs, codes).cpu(), "gains": gains.cpu()}
        wrong, ties = encoding.compare(codec, *given, found, expected)
        assert not wrong, f"{wrong} tokens are encoded as no gain factor says, besides {ties} ties"


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_blocks_are_converted_as_plain_torch_does(dim: int, coding: Coding) -> None:
    for codec in codecs(Case(heads=2, dim=dim, coding=(coding, coding)), DEVICE).values():
        words, found = random_words(codec).to(DEVICE), cuda_blocks.prepared(codec).conversion
        tiles = cuda_blocks._from_portable(codec, words)
        assert torch.equal(found.from_portable(words), tiles)
        assert torch.equal(found.to_portable(tiles), words)


def small_model() -> tuple[torch.nn.Module, Calibration]:
    """The small Llama in bfloat16, and a calibration of its geometry."""
    model = FAMILIES[0].make(dtype=torch.bfloat16).to(DEVICE).eval()
    model.set_attn_implementation("spectral")
    return model, scalar_calibration(model.config, 3.0)


@torch.inference_mode()
def test_steps_from_a_graph_are_those_of_the_model() -> None:
    model, calibration = small_model()
    cache = SpectralCache(calibration, model.config, backend="cuda")
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, model.config.vocab_size, (2, 3 * BLOCK), generator=generator).to(DEVICE)
    model(input_ids=prompt, past_key_values=cache, use_cache=True)
    plain, step = cache.fork(), DecodeGraph(model, cache)
    ids = torch.randint(0, model.config.vocab_size, (2 * BLOCK + 8, 2, 1), generator=generator).to(DEVICE)
    for number, token in enumerate(ids):
        expected = model(input_ids=token, past_key_values=plain, use_cache=True).logits
        found = step(token)
        assert torch.equal(found, expected), number
    assert cache.get_seq_length() == plain.get_seq_length() == 3 * BLOCK + len(ids)


@torch.inference_mode()
def test_generate_takes_its_steps_from_graphs() -> None:
    model, calibration = small_model()
    prompt = torch.arange(1, 3 * BLOCK, device=DEVICE)[None] % model.config.vocab_size
    settings = {"max_new_tokens": BLOCK + 20, "do_sample": False, "eos_token_id": None, "use_cache": True}

    def generate(chosen: torch.nn.Module) -> torch.Tensor:
        cache = SpectralCache(copy.deepcopy(calibration), model.config, backend="cuda")
        return chosen.generate(prompt, past_key_values=cache, **settings)

    plain = generate(model)
    with decode_graphs(model):
        assert torch.equal(generate(model), plain)
