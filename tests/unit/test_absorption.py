"""The maths of absorption: the same coefficients from mapped vectors, equal energies, and what is left to do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from quantcache.coding.codec import SpectralCodec
from quantcache.coding.packing import BLOCK
from quantcache.coding.rope import Frame, Rope
from quantcache.coding.schema import CodecSettings, SideCalibration
from quantcache.common.choices import BASES
from quantcache.export.absorption import (
    Basis,
    ValueMap,
    absorbed_keys,
    absorbed_values,
    equalizing_rotation,
    key_scale,
    map_output_projection,
    map_rows,
    scale_rows,
    value_map,
)
from quantcache.export.projections import input_rows
from tests.builders import gaussian_vectors, random_side
from tests.helpers import error

HEADS, DIM = 2, 48
PLACE = torch.tensor([[4, BLOCK, 4]], dtype=torch.int32)

each_basis = pytest.mark.parametrize("basis", BASES)
each_mean = pytest.mark.parametrize("absorb_mean", [True, False], ids=["mean absorbed", "mean kept"])


def second_moment(side: SideCalibration, mean: Tensor) -> Tensor:
    """E[x xᵀ] of vectors with the side's covariance and some mean, ``[H, D, D]``."""
    inverse = torch.linalg.inv(side.analysis.double())
    return inverse @ torch.diag_embed(side.spectrum) @ inverse.mT + mean[:, :, None] * mean[:, None, :]


def as_map(forward: Tensor) -> ValueMap:
    """A map without a mean."""
    return ValueMap(forward, torch.linalg.inv(forward), torch.zeros(forward.shape[:2], dtype=torch.float64))


@each_basis
@each_mean
def test_coefficients_are_the_same(basis: Basis, absorb_mean: bool) -> None:
    side = random_side(HEADS, DIM, 3)
    values = value_map(side, basis, absorb_mean)
    x = gaussian_vectors(side, 1, BLOCK)
    mapped = torch.einsum("hij,bhtj->bhti", values.forward, x - values.mean[:, None])
    before = SpectralCodec(side, Rope(), CodecSettings(coding="scalar"))
    after = SpectralCodec(absorbed_values(side, values, basis), Rope(), CodecSettings(coding="scalar"))
    exact = torch.einsum("hij,bhtj->bhit", side.analysis.double(), x - side.mean.double()[:, None])
    exact = exact / side.spectrum.sqrt()[:, :, None]
    own = error(before.coefficients(x.float(), PLACE, None), exact)
    assert error(after.coefficients(mapped.float(), PLACE, None), exact) <= 2 * own
    assert torch.equal(after.widths, before.widths)
    assert torch.equal(after.weights, before.weights)
    decoded = after.decode(after.encode(mapped.float(), PLACE, None), PLACE, None)
    back = torch.einsum("hij,bhtj->bhti", values.inverse, decoded.double()) + values.mean[:, None]
    assert error(back, x) <= 1.01 * error(before.decode(before.encode(x.float(), PLACE, None), PLACE, None), x)


@each_mean
def test_spectral_basis_leaves_no_product(absorb_mean: bool) -> None:
    side = random_side(HEADS, DIM, 3)
    values = value_map(side, "spectral", absorb_mean)
    flops = []
    for constants in (side, absorbed_values(side, values, "spectral")):
        codec = SpectralCodec(constants, Rope(), CodecSettings(coding="scalar"))
        with FlopCounterMode(display=False) as counter:
            codec.decode(codec.encode(torch.randn(1, HEADS, BLOCK, DIM), PLACE, None), PLACE, None)
        flops.append(counter.get_total_flops())
    assert flops == [2 * 2 * HEADS * DIM * DIM * BLOCK, 0]


def test_spectral_basis_keeps_the_energy_to_a_factor_of_two() -> None:
    side = random_side(HEADS, DIM, 3)
    values = value_map(side, "spectral", True)
    before = second_moment(side, torch.zeros(HEADS, DIM)).diagonal(dim1=-2, dim2=-1).sum(-1)
    moment = values.forward @ second_moment(side, torch.zeros(HEADS, DIM)) @ values.forward.mT
    energies = moment.diagonal(dim1=-2, dim2=-1)
    assert bool((energies.sum(-1) / before).log2().abs().le(1).all())
    assert bool((energies.diff(dim=-1) <= 1e-9 * energies[:, :1]).all())  # by descending importance


@each_mean
def test_flat_basis_has_equal_energies(absorb_mean: bool) -> None:
    side = random_side(HEADS, DIM, 3)
    values = value_map(side, "flat", absorb_mean)
    left = side.mean.double() - values.mean
    energies = (values.forward @ second_moment(side, left) @ values.forward.mT).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(energies, energies.mean(-1, keepdim=True).expand_as(energies))


def test_flat_basis_costs_least() -> None:
    side = random_side(HEADS, DIM, 3)
    moment, metric = second_moment(side, side.mean.double()), side.analysis.double().mT @ side.analysis.double()

    def cost(forward: Tensor) -> Tensor:
        inverse = torch.linalg.inv(forward)
        energy = (forward @ moment @ forward.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
        return energy * (inverse.mT @ metric @ inverse).diagonal(dim1=-2, dim2=-1).sum(-1)

    best = cost(value_map(side, "flat", False).forward)
    values, vectors = torch.linalg.eigh(moment)
    rivals = [torch.eye(DIM, dtype=torch.float64).expand_as(moment), vectors.mT, side.analysis.double()]
    rivals += [values.rsqrt().unsqueeze(-1) * vectors.mT]
    for rival in rivals:
        assert bool((best < cost(rival)).all())


@pytest.mark.parametrize("dim", [2, 20, 64, 96])
@pytest.mark.parametrize("decay", [1.0, 0.9, 1e-3])
def test_equalizing_rotation(dim: int, decay: float) -> None:
    variances = decay ** torch.arange(dim, dtype=torch.float64)
    rotation = equalizing_rotation(variances, 0)
    eye = torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, eye)
    energies = rotation.square() @ variances
    torch.testing.assert_close(energies, variances.mean().expand(dim))


@pytest.mark.parametrize("layout", ["half", "interleaved", "none"])
@pytest.mark.parametrize("shared", [True, False])
def test_scaled_keys_have_the_same_coefficients(layout: str, shared: bool) -> None:
    rope = Rope(layout, () if layout == "none" else tuple(10_000.0 ** (-i / 16) for i in range(16)))  # type: ignore[arg-type]
    frame = Frame(DIM, rope)
    side = random_side(HEADS, DIM, 3, (frame.num_slow, frame.num_fast))
    scale = key_scale(side, rope, frame, shared)
    first, second = rope.pairs()
    assert torch.equal(scale[:, first], scale[:, second])
    torch.testing.assert_close(scale.log().mean(-1), torch.zeros(HEADS, dtype=torch.float64))
    assert torch.equal(scale[0], scale[1]) == shared
    x = 3 * torch.randn(1, HEADS, BLOCK, DIM, dtype=torch.float64)
    codecs = [SpectralCodec(s, rope, CodecSettings(coding="scalar")) for s in (side, absorbed_keys(side, scale, frame))]
    exact = frame.enter(x, torch.arange(4, 4 + BLOCK), torch.full((BLOCK,), 4)) - side.mean.double()[:, None]
    exact = torch.einsum("hij,bhtj->bhit", side.analysis.double(), exact) / side.spectrum.sqrt()[:, :, None]
    before = codecs[0].coefficients(x.float(), PLACE, None)
    after = codecs[1].coefficients((x * scale[:, None]).float(), PLACE, None)
    assert error(after, exact) <= 2 * error(before, exact)


@pytest.mark.parametrize("layout", ["separate", "concatenated", "grouped"])
def test_rows_of_fused_projections(layout: str) -> None:
    heads, groups, dim = 3, 2, 4
    query, key, value = input_rows(layout, heads, groups, dim)  # type: ignore[arg-type]
    if layout == "separate":
        assert query.tolist() == list(range(24))
        assert key.tolist() == value.tolist() == list(range(12))
        return
    assert sorted([*query.tolist(), *key.tolist(), *value.tolist()]) == list(range(48))
    labels = torch.tensor([ord(c) for c in "qqqqqqkkkvvv" if layout == "concatenated"] or [ord(c) for c in "qqkv" * 3])
    labels = labels.repeat_interleave(dim)
    assert "".join(map(chr, labels[torch.cat((query, key, value))[::dim]])) == "q" * 6 + "k" * 3 + "v" * 3


def test_projections_around_a_map() -> None:
    heads, groups, dim, hidden = 2, 3, 8, 16
    values = as_map(torch.randn(heads, dim, dim, dtype=torch.float64))
    values = ValueMap(values.forward, values.inverse, torch.randn(heads, dim, dtype=torch.float64))
    weight, bias = torch.randn(20, hidden, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    rows = torch.arange(2, 18)
    output, shift = torch.randn(hidden, heads * groups * dim).double(), torch.randn(hidden).double()
    x = torch.randn(5, hidden, dtype=torch.float64)

    def attention_output(weight: Tensor, bias: Tensor, output: Tensor, shift: Tensor) -> Tensor:
        cached = (x @ weight.T + bias)[:, rows].unflatten(1, (heads, dim))
        mixed = cached.repeat_interleave(groups, dim=1).mean(0)  # attention weights that sum to one
        return output @ mixed.flatten() + shift

    before = attention_output(weight, bias, output, shift)
    new_weight, new_bias = weight.clone(), bias.clone()
    map_rows(new_weight, new_bias, rows, values)
    new_output, new_shift = map_output_projection(output, shift, values)
    assert new_shift is not None
    torch.testing.assert_close(attention_output(new_weight, new_bias, new_output, new_shift), before)
    others = torch.tensor([0, 1, 18, 19])
    assert torch.equal(new_weight[others], weight[others])
    assert torch.equal(new_bias[others], bias[others])
    scale_rows(weight, bias, others, torch.full((4,), 2.0, dtype=torch.float64))
    assert torch.equal(weight[others], 2 * new_weight[others])
    assert torch.equal(bias[others], 2 * new_bias[others])
