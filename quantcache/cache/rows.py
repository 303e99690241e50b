"""Rows of a batch in every way that callers may index them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantcache.common.errors import RowError


def chosen_rows(indices: Any, count: int) -> Tensor:
    """Rows that an index names, by torch's own rules for indexing.

    Args:
        indices: Row numbers, negative ones counted from the end, or a mask over rows: a tensor, array, list or slice.
        count: Rows there are.

    Returns:
        Row numbers from 0 to count - 1, ``[B']`` int64, in CPU memory.

    Raises:
        RowError: A row does not exist, or the indices have more than one dimension.
    """
    index = indices
    try:
        if isinstance(index, Tensor):
            index = index.detach().cpu()
        elif isinstance(index, list | tuple | range):  # a tuple itself would be one index for each dimension
            index = torch.as_tensor(list(index), device="cpu") if index else slice(0, 0)
        rows: Tensor = torch.arange(count, dtype=torch.int64, device="cpu")[index]
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise RowError(f"cannot choose rows {_described(indices)} of a batch of {count}: {error}") from error
    if rows.dim() != 1:
        raise RowError(f"rows must be chosen by one dimension of indices, got {_described(indices)}")
    return rows


def repeated_rows(repeats: Any, count: int) -> Tensor:
    """Rows of a batch in which each row is repeated in place.

    Args:
        repeats: How often; or one number for each row.
        count: Rows there are.

    Returns:
        Row numbers, as :func:`chosen_rows` gives them.

    Raises:
        RowError: A number is negative, or there are not as many as rows.
    """
    try:
        numbers = torch.as_tensor(repeats, device="cpu")
        if numbers.is_floating_point() or numbers.dtype == torch.bool:
            raise TypeError(f"repeats must be integers, got {numbers.dtype}")
        return torch.arange(count, dtype=torch.int64, device="cpu").repeat_interleave(numbers)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise RowError(f"cannot repeat the rows of a batch of {count} {_described(repeats)} times: {error}") from error


def held_rows(layer: Any) -> int | None:
    """Batch size of what a cache layer holds.

    Args:
        layer: A layer of ours or of transformers' own.

    Returns:
        The size; None if it holds nothing.
    """
    held = getattr(layer, "tails", None)
    if held is None:
        held = {"keys": getattr(layer, "keys", None)}
    every = (*held.values(), *getattr(layer, "conv_states", {}).values())
    return next((tensor.shape[0] for tensor in every if tensor is not None and tensor.dim() > 1), None)


def _described(value: Any) -> str:
    return f"{value.tolist()}" if isinstance(value, Tensor) else f"{value!r}"
