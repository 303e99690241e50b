"""Append-only storage of encoded blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantcache.coding.growth import GROWTH, grown
from quantcache.common.errors import QuantCacheError


class Loan:
    """Whether buffers are held by several caches; one for all stores that were made of the same buffers.

    Attributes:
        lent: Whether they are.
    """

    __slots__ = ("lent",)

    def __init__(self) -> None:
        self.lent = False


class BlockStore:
    """Growing buffers, one per field of a codec, with the block index first.

    Every operation gives a new store and leaves this one's blocks as they are, so that a layer can prepare several
    stores and put them in place together. Growing copies the buffer, so that an append costs a constant amortised
    number of copies of one block.

    Attributes:
        count: Blocks held.
        buffers: The fields; those behind ``count`` are unused room.
        loan: Whether a fork holds the same buffers: they are then copied before they are written to.
    """

    def __init__(self, count: int = 0, buffers: dict[str, Tensor] | None = None, loan: Loan | None = None) -> None:
        self.count = count
        self.buffers: dict[str, Tensor] = buffers or {}
        self.loan = loan or Loan()

    @property
    def capacity(self) -> int:
        """Blocks that fit without growing."""
        return next(iter(self.buffers.values())).shape[0] if self.buffers else 0

    def appended(self, fields: dict[str, Tensor]) -> BlockStore:
        """A store with more blocks. A first addition, such as a prefill's, is given exactly the room it needs.

        The new store takes over the unused room of this one: only one of the two may be appended to again.

        Args:
            fields: The fields of n blocks, ``[n, ...]`` each.

        Returns:
            The new store.

        Raises:
            QuantCacheError: They are not of the names, shapes and dtypes of the blocks before them.
        """
        added = next(iter(fields.values())).shape[0]
        count = self.count + added
        if not self.buffers:
            # Copies: a view would keep the whole prompt it was cut from alive.
            return BlockStore(count, {k: v.clone(memory_format=torch.contiguous_format) for k, v in fields.items()})
        # torch would spread a smaller field over the room and cast another dtype; a missing one would be what lay there
        for name in {**self.buffers, **fields}:
            held, new = self.buffers.get(name), fields.get(name)
            expected = None if held is None else ((added, *held.shape[1:]), held.dtype)
            found = None if new is None else (tuple(new.shape), new.dtype)
            if found != expected:
                raise QuantCacheError(
                    f"blocks must have the fields of those before them: {name} is {_described(found)}, expected "
                    f"{_described(expected)}"
                )
        buffers, loan = self.buffers, self.loan
        if count > self.capacity:
            buffers, loan = self._copied(grown(self.count, count)), Loan()
        elif loan.lent or self._read_only():
            buffers, loan = self._copied(self.capacity), Loan()
        for name, value in fields.items():
            buffers[name][self.count : count] = value
        return BlockStore(count, buffers, loan)

    def _read_only(self) -> bool:
        """Whether the buffers are of torch's inference mode, which is over: torch refuses to write to them."""
        return not torch.is_inference_mode_enabled() and any(buffer.is_inference() for buffer in self.buffers.values())

    def _copied(self, capacity: int) -> dict[str, Tensor]:
        """The used part in new buffers."""
        copied = {}
        for name, buffer in self.buffers.items():
            copied[name] = buffer.new_empty((capacity, *buffer.shape[1:]))
            copied[name][: self.count] = buffer[: self.count]
        return copied

    def slice(self, start: int, stop: int) -> dict[str, Tensor]:
        """Views of some blocks.

        Args:
            start: First block.
            stop: One past the last block.

        Returns:
            Fields ``[stop - start, B, ...]``.
        """
        return {name: buffer[start:stop] for name, buffer in self.buffers.items()}

    def truncated(self, count: int) -> BlockStore:
        """A store of the first blocks, without room that the growth rule would not have allocated.

        Args:
            count: Blocks to keep.

        Returns:
            The new store.
        """
        new = BlockStore(min(self.count, count), self.buffers, self.loan)
        if not new.count:
            return BlockStore()
        return new.copy() if new.capacity > new.count + new.count // GROWTH else new

    def mapped(self, function: Callable[[Tensor], Tensor]) -> BlockStore:
        """A store whose buffers are a function of this one's used parts, batch dimension second.

        Args:
            function: Maps ``[count, B, ...]`` to a new tensor ``[count, B', ...]``.

        Returns:
            The new store.
        """
        return BlockStore(self.count, {name: function(buffer[: self.count]) for name, buffer in self.buffers.items()})

    def mapped_fields(self, fields: dict[str, Tensor]) -> BlockStore:
        """A store of as many blocks with other fields.

        Args:
            fields: The fields, ``[count, B, ...]`` each; copied.

        Returns:
            The new store.
        """
        return BlockStore().appended(fields)

    def copy(self) -> BlockStore:
        """An independent copy of the used part."""
        return self.mapped(torch.clone)

    def fork(self) -> BlockStore:
        """A store of the same buffers; whichever of the two is written to first gets its own.

        Whoever has made another store of these buffers in the meantime will copy them too, before it next writes.
        """
        self.loan.lent = bool(self.buffers)
        return BlockStore(self.count, self.buffers, self.loan)

    def nbytes(self) -> dict[str, int]:
        """Bytes of the used part of every field."""
        return {name: buffer[: self.count].nbytes for name, buffer in self.buffers.items()}

    def slack(self, name: str) -> int:
        """Bytes of a field that are allocated but unused."""
        return self.buffers[name][self.count :].nbytes

    def moved(self, device: torch.device | str) -> BlockStore:
        """A store with its buffers on another device.

        Args:
            device: Where to.

        Returns:
            The new store; on the same device it has the same buffers.
        """
        buffers = {name: moved(buffer, device) for name, buffer in self.buffers.items()}
        same = all(buffer is self.buffers[name] for name, buffer in buffers.items())
        return BlockStore(self.count, buffers, self.loan if same else None)


def _described(kind: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if kind is None else f"{kind[1]} of shape {list(kind[0])}"


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on another device, whole by the time that anybody can read it.

    Work on a GPU waits for a copy to it by itself. The CPU would not wait for a copy to the CPU.

    Args:
        tensor: The tensor.
        device: Where to.

    Returns:
        A copy; on the same device the tensor itself.
    """
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")
