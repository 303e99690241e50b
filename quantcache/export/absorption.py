"""The maths of absorption: changes of basis of values and keys that the weights around the cache take in.

With v = W_V h + b_V the cached value, T an invertible matrix for each key/value head and μ the head's mean::

    v'  = T (v - μ)        W_V' = T W_V            b_V' = T (b_V - μ)
    o   = W_O v + b_O      W_O' = W_O T⁻¹          b_O' = b_O + W_O μ

Attention weights sum to one, so the output is what it was. Of keys only what commutes with RoPE can be absorbed: one
scale for each rotary pair, which the queries take inversely. Everything is computed in float64 and rounded once.

Shapes: H key/value heads, G query heads on each, D dimension of a value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantcache.coding import linalg
from quantcache.coding.rope import Frame, Rope
from quantcache.coding.schema import SideCalibration
from quantcache.common.choices import Basis


@dataclass(frozen=True)
class ValueMap:
    """The change of basis of one layer's values.

    Attributes:
        forward: T, ``[H, D, D]`` float64.
        inverse: T⁻¹, ``[H, D, D]`` float64.
        mean: μ, ``[H, D]`` float64; zero where the mean stays in the cache.
    """

    forward: Tensor
    inverse: Tensor
    mean: Tensor


def value_map(side: SideCalibration, basis: Basis, absorb_mean: bool) -> ValueMap:
    """The change of basis that a layer's calibration asks for.

    ``spectral`` takes the analysis transform itself, scaled for each head by a power of two that about keeps the
    energy: the cached values are the codec's coefficients, by descending importance.

    ``flat`` gives every coordinate the same energy. A quantizer with one step for all coordinates of a token makes an
    error proportional to tr(T S Tᵀ), S the values' second moment, at a cost proportional to tr(T⁻ᵀ M T⁻¹), M the
    metric. Their product is least for T = Q Λ^-¼ Uᵀ A with A S Aᵀ = U Λ Uᵀ and any rotation Q (Cauchy-Schwarz): the
    variances are halfway to white. Q is :func:`equalizing_rotation`'s.

    Args:
        side: The constants of the layer's values.
        basis: ``spectral`` or ``flat``.
        absorb_mean: Whether the weights take the mean as well.

    Returns:
        The map.
    """
    analysis, mean = side.analysis.double(), side.mean.double()
    absorbed = mean if absorb_mean else torch.zeros_like(mean)
    if basis == "spectral":
        energy = (linalg.inverse(analysis).square().sum(-2) * side.spectrum).sum(-1)  # tr Σ, [H]
        total = side.spectrum.sum(-1)
        exponent = torch.where((energy > 0) & (total > 0), (energy / total).log2() / 2, 0.0).round()
        forward = analysis * torch.exp2(exponent)[:, None, None]
    else:
        left = torch.einsum("hij,hj->hi", analysis, mean - absorbed)
        moment = torch.diag_embed(side.spectrum) + left[:, :, None] * left[:, None, :]  # A S Aᵀ
        variances, vectors = linalg.eigh(moment)
        variances = variances.clamp_min(1e-12 * variances[:, -1:].clamp_min(1e-30))
        half = variances.pow(-0.25).unsqueeze(-1) * vectors.transpose(-1, -2)
        # The scale is free: about the energy of the values as they were.
        inverse = linalg.inverse(analysis)
        energy = (inverse @ moment @ inverse.transpose(-1, -2)).diagonal(dim1=-2, dim2=-1).sum(-1)
        scale = (energy / variances.sqrt().sum(-1)).sqrt()[:, None, None]
        rotations = torch.stack([equalizing_rotation(row.sqrt(), head) for head, row in enumerate(variances)])
        forward = scale * rotations @ half @ analysis
    return ValueMap(forward, linalg.inverse(forward), absorbed)


def key_scale(side: SideCalibration, rope: Rope, frame: Frame, shared: bool) -> Tensor:
    """Scales of the rotary pairs of keys that even out what one quantization step costs in each of them.

    For a step that follows the energy of all pairs, (m / e)^¼ is best for a pair of energy e and metric m (the
    one-dimensional case of :func:`value_map`'s ``flat``); for one that follows the largest pair, e^-½. The range of a
    token is in between, and so is their geometric mean m^⅛ e^-⅜, which measured better than either. Energy and metric
    are sums over the pair, so that no rotation changes them; dimensions that do not rotate are pairs of one.

    Args:
        side: The constants of the layer's keys.
        rope: Their rotation.
        frame: The frame that they are coded in.
        shared: Whether all heads must have the same scales (the weight of a norm takes them).

    Returns:
        ``[H, D]`` float64 in the order of cached keys, of geometric mean 1.
    """
    analysis, mean = side.analysis.double(), side.mean.double()
    inverse = linalg.inverse(analysis)
    energy = torch.einsum("hij,hj->hi", inverse.square(), side.spectrum) + mean.square()
    metric = analysis.square().sum(-2)
    both = torch.stack((energy, metric))[..., frame.inverse_order.cpu()]  # [2, H, D]
    if shared:
        both = both.sum(1, keepdim=True).expand_as(both)
    first, second = rope.pairs()
    paired = both.clone()
    paired[..., first] = paired[..., second] = both[..., first] + both[..., second]
    floor = 1e-12 * paired.amax(-1, keepdim=True).clamp_min(1e-30)
    energy, metric = paired.maximum(floor)
    logarithm = metric.log() / 8 - 3 * energy.log() / 8
    scale: Tensor = (logarithm - logarithm.mean(-1, keepdim=True)).exp()
    return scale


def equalizing_rotation(variances: Tensor, seed: int) -> Tensor:
    """A rotation after which uncorrelated coordinates all have the same variance.

    A random rotation mixes all coordinates; then every plane rotation of one coordinate above the mean with one below
    it brings the latter to the mean. Source: R. Bendel and M. Mickey, "Population correlation matrices for sampling
    experiments" (1978); that it exists is the Schur-Horn theorem.

    Args:
        variances: ``[D]`` float64.
        seed: Seed of the random rotation.

    Returns:
        Q, ``[D, D]`` float64: the diagonal of Q diag(variances) Qᵀ is constant.
    """
    dim = variances.shape[0]
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu")
    orthogonal, triangular = linalg.qr(gaussian)
    rotation: Tensor = orthogonal * triangular.diagonal().sign()
    mean = float(variances.mean())
    for _ in range(dim - 1):
        energies = rotation.square() @ variances
        low, high = int(energies.argmin()), int(energies.argmax())
        a, b = float(energies[low]) - mean, float(energies[high]) - mean
        if a >= 0 or b <= 0:
            break
        cross = float((rotation[low] * rotation[high]) @ variances)
        # tangent t of the angle that brings `low` to the mean: a + 2 t cross + t² b = 0
        tangent = (-cross + (cross * cross - a * b) ** 0.5) / b
        cosine = (1.0 + tangent * tangent) ** -0.5
        sine = tangent * cosine
        rows = rotation[[low, high]]
        rotation[low] = cosine * rows[0] + sine * rows[1]
        rotation[high] = cosine * rows[1] - sine * rows[0]
    return rotation


def scale_rows(weight: Tensor, bias: Tensor | None, rows: Tensor, scale: Tensor) -> None:
    """Scale outputs of a projection, in place.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]``, or None.
        rows: Which outputs, ``[m]``.
        scale: ``[m]`` float64.
    """
    weight[rows] = (weight[rows].double() * scale[:, None]).to(weight.dtype)
    if bias is not None:
        bias[rows] = (bias[rows].double() * scale).to(bias.dtype)


def map_rows(weight: Tensor, bias: Tensor | None, rows: Tensor, values: ValueMap) -> None:
    """Fold a map into the outputs of a projection that are the values, in place.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]``, or None.
        rows: Which outputs are the values, head by head, ``[H * D]``.
        values: The map; its mean must be zero where there is no bias.
    """
    heads, dim = values.mean.shape
    mapped = values.forward @ weight[rows].double().unflatten(0, (heads, dim))
    weight[rows] = mapped.flatten(0, 1).to(weight.dtype)
    if bias is not None:
        centred = bias[rows].double().unflatten(0, (heads, dim)) - values.mean
        bias[rows] = (values.forward @ centred.unsqueeze(-1)).flatten().to(bias.dtype)


def map_output_projection(weight: Tensor, bias: Tensor | None, values: ValueMap) -> tuple[Tensor, Tensor | None]:
    """Fold the inverse of a map into the projection that reads the attention's output.

    Args:
        weight: ``[out, H * G * D]``.
        bias: ``[out]``, or None.
        values: The map; its mean must be zero where there is no bias.

    Returns:
        Weight and bias in their dtypes.
    """
    heads, dim = values.mean.shape
    per_head = weight.double().unflatten(1, (heads, -1, dim))  # [out, H, G, D]
    mapped = torch.einsum("ohgd,hde->ohge", per_head, values.inverse).flatten(1).to(weight.dtype)
    if bias is None:
        return mapped, None
    shift = torch.einsum("ohgd,hd->o", per_head, values.mean)
    return mapped, (bias.double() + shift).to(bias.dtype)


def absorbed_values(side: SideCalibration, values: ValueMap, basis: Basis) -> SideCalibration:
    """The calibration of values after absorption: the same coefficients from mapped values.

    Args:
        side: The constants of the values before.
        values: Change of basis of the values.
        basis: The basis the map was made for; ``spectral`` leaves an exactly diagonal transform.

    Returns:
        The constants of the values after; spectrum and widths are the same.
    """
    if basis == "spectral":
        # forward is the analysis times a power of two for each head: what is left is its inverse, without rounding.
        scale = (values.forward.square().sum((-1, -2)) / side.analysis.double().square().sum((-1, -2))).sqrt()
        left = torch.exp2(-scale.log2().round())[:, None, None]
        analysis = left * torch.eye(side.dim, dtype=torch.float64, device="cpu")
    else:
        analysis = side.analysis.double() @ values.inverse
    mean = torch.einsum("hij,hj->hi", values.forward, side.mean.double() - values.mean)
    return replace(side, mean=mean.float(), analysis=analysis.float())


def absorbed_keys(side: SideCalibration, scale: Tensor, frame: Frame) -> SideCalibration:
    """The calibration of keys after absorption: the same coefficients from scaled keys.

    Args:
        side: The constants of the keys before.
        scale: ``[H, D]`` in the order of cached keys.
        frame: The frame that they are coded in.

    Returns:
        The constants of the keys after; spectrum and widths are the same.
    """
    framed = scale[:, frame.order.cpu()]
    analysis = side.analysis.double() / framed.unsqueeze(-2)
    return replace(side, mean=(side.mean.double() * framed).float(), analysis=analysis.float())
