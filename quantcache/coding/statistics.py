"""Statistics of one layer's keys and values, and the transforms that follow from them."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcache.coding.rope import Frame, Rope, anchor_of
from quantcache.coding.schema import SIDES, CodecSettings, LayerCalibration, SideCalibration
from quantcache.coding.spectral import METRIC_SHRINKAGE, Moments, shrink, split_klt
from quantcache.common.ambient import float64_device
from quantcache.common.defaults import SINK_LENGTH
from quantcache.common.errors import UnsupportedModel

COVARIANCE_SHRINKAGE = 1e-4
"""Share of isotropic covariance mixed in, so that directions the text never took stay representable."""

READ_SHARE = 0.02
"""How much of what every reader makes of a token counts beside what the readers of its codes do.

It is much less noisy, since most is read while it is recent, and it is what counts in caches with a shorter residual.
"""


class LayerStatistics:
    """Second moments of one layer's framed keys and values, and of the metric at them."""

    def __init__(self, index: int, rope: Rope, keys: Tensor, values: Tensor, settings: CodecSettings):
        self.index, self.rope = index, rope
        device = float64_device(keys.device)
        self.frames = {
            "key": Frame(keys.shape[-1], rope, settings.fast_wavelength, device),
            "value": Frame(values.shape[-1], Rope(), device=device),
        }
        shapes = {"key": keys.shape, "value": values.shape}
        self.moments = {side: Moments(shapes[side][1], shapes[side][3], device) for side in SIDES}
        self.metrics = {side: Moments(shapes[side][1], shapes[side][3], device) for side in SIDES}
        self.read_metrics = {side: Moments(shapes[side][1], shapes[side][3], device) for side in SIDES}

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Hkv and the dimension of a value."""
        heads, dim = self.moments["value"].sum.shape
        return heads, dim

    def _framed(self, side: str, x: Tensor, position: int | Tensor = 0) -> Tensor:
        """Framed vectors of sequences after their sinks: ``[B, H, T, D]`` to ``[H, B * T', D]``."""
        frame = self.frames[side]
        slots = torch.arange(SINK_LENGTH, x.shape[2], dtype=torch.int64, device=frame.order.device)
        x = x.detach()[:, :, SINK_LENGTH:].to(frame.order.device).double()
        anchors = anchor_of(slots, SINK_LENGTH)
        if isinstance(position, Tensor):
            position = position[SINK_LENGTH:].to(frame.order.device)
        return frame.enter(x, slots + position, anchors + position).transpose(0, 1).flatten(1, 2)

    def add(self, side: str, x: Tensor, position: int | Tensor = 0) -> None:
        """Add the vectors of one batch of sequences, ``[B, H, T, D]``, whose first tokens stand at a position.

        Where positions do not count tokens, ``[T]``: what each token's is ahead of such a count.
        """
        self.moments[side].add(self._framed(side, x, position))

    def add_gradients(self, side: str, coded: Tensor, read: Tensor) -> None:
        """Add the loss gradients at the vectors of one batch, ``[B, H, T, D]``.

        Args:
            side: ``key`` or ``value``.
            coded: Where they are read as codes.
            read: Wherever they are read.
        """
        self.metrics[side].add(self._framed(side, coded))
        self.read_metrics[side].add(self._framed(side, read))

    def add_queries(self, query: Tensor, generator: torch.Generator) -> None:
        """Add queries ``[B, Hq, T, D]``, each as a randomly drawn earlier key sees it."""
        frame = self.frames["key"]
        _batch, _heads, length, dim = query.shape
        if dim != frame.head_dim:
            raise UnsupportedModel(
                f"layer {self.index} caches keys of dimension {frame.head_dim} but its queries have {dim}, so they "
                "cannot weigh the keys: use metric='fisher'"
            )
        device = frame.order.device
        positions = torch.arange(SINK_LENGTH, length, dtype=torch.int64, device="cpu")
        drawn = torch.rand(len(positions), generator=generator, dtype=torch.float32, device="cpu") * (
            positions - SINK_LENGTH + 1
        )
        keys = (drawn.long() + SINK_LENGTH).to(device)
        framed = frame.enter(query.detach()[:, :, SINK_LENGTH:].to(device).double(), keys, anchor_of(keys, SINK_LENGTH))
        kv_heads = self.moments["key"].sum.shape[0]
        self.metrics["key"].add(framed.unflatten(1, (kv_heads, -1)).transpose(0, 1).reshape(kv_heads, -1, dim))

    def solve(self, output_metric: Tensor | None = None, shrinkage: float = COVARIANCE_SHRINKAGE) -> LayerCalibration:
        """The layer's transforms.

        Args:
            output_metric: The values' metric from the layer's output projection; that of their gradients if None.
            shrinkage: Share of isotropic covariance mixed in; more where the samples are few.

        Returns:
            Means, transforms and spectra, without widths.
        """
        sides = {}
        for side in SIDES:
            frame, moments, metric = self.frames[side], self.moments[side], self.metrics[side]
            matrix = metric.second_moment + READ_SHARE * self.read_metrics[side].second_moment
            if side == "value" and output_metric is not None:
                matrix = output_metric.to(matrix)
            elif not metric.count:
                matrix = torch.eye(frame.head_dim, dtype=torch.float64, device=matrix.device).expand_as(matrix)
            covariance = shrink(moments.covariance, shrinkage)
            transform = split_klt(covariance, matrix, (frame.num_slow, frame.num_fast), METRIC_SHRINKAGE)
            sides[side] = SideCalibration(
                moments.mean.float().cpu(), transform.analysis.float().cpu(), transform.spectrum.cpu()
            )
        return LayerCalibration(self.rope, sides["key"], sides["value"])
