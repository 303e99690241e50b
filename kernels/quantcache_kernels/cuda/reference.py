"""The kernel's definition in plain torch: attention on decoded coefficients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantcache_kernels.cuda.layout import ANCHOR


def attention(
    queries: Tensor,
    offsets: Tensor,
    keys: Tensor,
    values: Tensor,
    decoder: Tensor,
    mean: Tensor,
    tokens: int,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one token's queries, each turned to every anchor, in the dtype of the arguments.

    Args:
        queries: In coded coordinates, base 2, ``[N, B, H, G, D]``.
        offsets: What is added to all scores of an anchor, ``[N, B, H, G]``.
        keys: Coefficients, ``[B, H, T, D]``.
        values: Coefficients, ``[B, H, T, D]``.
        decoder: What a sum of coefficients is multiplied by, ``[H, D (coefficient), D]``.
        mean: ``[H, D]``.
        tokens: How many of the T tokens there are.
        starts: First visible token of every row, ``[B]``, or None.

    Returns:
        ``[B, H, G, D]``, and the logarithm of the sum of exponentials, base 2, ``[B, H, G]`` (-1e30 where nothing is
        visible: the output is then the mean).
    """
    anchored = keys.unflatten(2, (-1, ANCHOR))
    scores = torch.einsum("nbhgd,bhntd->bhgnt", queries, anchored) + offsets.permute(1, 2, 3, 0).unsqueeze(-1)
    position = torch.arange(keys.shape[2], dtype=torch.int64, device=keys.device)
    visible = (position < tokens).expand(len(keys), -1)
    if starts is not None:
        visible = visible & (position >= starts[:, None])
    scores = scores.flatten(-2).masked_fill(~visible[:, None, None], float("-inf"))
    lse = torch.logsumexp(scores.double() * math.log(2), dim=-1) / math.log(2)
    weights = torch.softmax(scores.double() * math.log(2), dim=-1).nan_to_num(0.0).to(values.dtype)
    out = torch.einsum("bhgt,bhtd->bhgd", weights, values) @ decoder + mean.unsqueeze(1)
    return out, lse.clamp_min(-1e30)
