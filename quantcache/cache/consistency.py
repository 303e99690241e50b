"""A cache whose layers stay consistent through interruptions and concurrent use by threads.

Every forward pass brings each layer its tokens, one layer after the other, so there are moments at which layers
disagree. Nothing may be built on such a moment: a pass that failed is noticed by whatever comes next, operations
change all layers or none, and copies are taken of one moment or refused.
"""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from quantcache.cache.layer import SpectralLayer
from quantcache.cache.passes import ForwardPass, Outcome, watch
from quantcache.cache.rows import chosen_rows, held_rows, repeated_rows
from quantcache.cache.settling import busy, first_layer, follows_text, lengths, unsettled, unusable
from quantcache.cache.transaction import commit, detached_copy, is_unchanged, shallow_copy, state_copy
from quantcache.common import processes
from quantcache.common.errors import QuantCacheError

ATTEMPTS = 100
"""How often a copy is tried while another thread keeps changing the cache."""


class ConsistentCache(DynamicCache):
    """A DynamicCache that notices what would leave its layers out of step.

    Attributes:
        foreign: Layers that hold another input's tokens, whose lengths are their own.
        broken: Why the cache must be put in order before it can be used, or None.
        updating: The thread that is inside an update or an operation, while there is one.
        forward_pass: The last forward pass, where it could be watched.
    """

    foreign: frozenset[int] = frozenset()
    broken: str | None = None
    updating: int | None = None
    forward_pass: ForwardPass | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values; see :meth:`SpectralLayer.update`.

        Args:
            key_states: ``[B, Hkv, Tnew, D]``.
            value_states: ``[B, Hkv, Tnew, Dv]``.
            layer_idx: Index of the layer.
            args: Passed on.
            kwargs: Passed on.

        Returns:
            Keys and values of all T tokens, lazy from a spectral layer.

        Raises:
            QuantCacheError: A forward pass was interrupted, two threads use the cache at once, or the tokens do not
                continue what is cached.
        """
        processes.use_living_threads()
        me = threading.get_ident()
        try:
            if not self._is_ours(me):
                self._break("two threads use it at once")
            layer = self._layer_at(layer_idx)
            if layer is None:
                raise QuantCacheError(
                    f"the model caches keys and values of layer {layer_idx}, the cache has {len(self.layers)} layers: "
                    "it was made for another model"
                )
            if isinstance(layer, DynamicLayer):
                if layer_idx not in self.foreign:
                    self._check_lengths(layer, layer_idx, key_states.shape[2])
                if not isinstance(layer, SpectralLayer) and layer.is_initialized and layer.device != key_states.device:
                    layer.device = key_states.device
                    layer.prefetch()
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        finally:
            if self.updating == me:  # nothing here that a signal handler could come between
                del self.updating

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """Take a layer's new convolution state; see DynamicCache."""
        self._begin_with_states(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """Take a layer's new recurrent state; see DynamicCache."""
        self._begin_with_states(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens cached, T; see DynamicCache."""
        processes.use_living_threads()  # what a model asks for before it computes anything
        return super().get_seq_length(layer_idx)

    def _layer_at(self, index: int) -> Any:
        """A layer; None where a model of more layers asks for one."""
        return self.layers[index] if index < len(self.layers) else None

    # ------------------------------------------------------------------ what is refused

    def _break(self, reason: str) -> NoReturn:
        """Refuse to go on until somebody has put the cache in order."""
        self.broken = unusable(reason)
        raise QuantCacheError(self.broken)

    def _is_ours(self, me: int) -> bool:
        """Mark the cache as being changed by this thread; False if another one is in the middle of a change."""
        holder = vars(self).setdefault("updating", me)  # one call into C: atomic
        if holder == me:
            return True
        if any(thread.ident == holder for thread in threading.enumerate()):
            return False
        self.updating = me  # that thread has ended
        return True

    def _require_idle(self, search: bool = False) -> None:
        """Refuse what another thread that uses the cache must not meet; ``search`` as of :func:`busy`."""
        other = busy(self, search)
        if other is not None:
            raise QuantCacheError(f"{other}: wait until it has returned")

    def _require_settled(self, layers: list[Any]) -> None:
        """Refuse what needs to know which tokens there are."""
        self._require_idle()
        reason = unsettled(self, layers)
        if self.broken is not None or reason is not None:
            raise QuantCacheError(self.broken or unusable(str(reason)))

    def _check_lengths(self, layer: DynamicLayer, index: int, count: int) -> None:
        """Refuse an update that finds some layers ahead of others: each forward pass brings every layer its tokens."""
        if self.broken is not None:
            raise QuantCacheError(self.broken)
        first = first_layer(self)
        if index == first:
            self._begin_pass(layer.get_seq_length())
            return
        leader: Any = self.layers[first]
        ours, theirs = layer.get_seq_length() + count, leader.get_seq_length() if leader.is_initialized else None
        if theirs is not None and ours != theirs:
            cause = "because a forward pass was interrupted or another thread is in one"
            self._break(f"layer {index} would hold {ours} tokens and layer {first} holds {theirs}, {cause}")

    def _begin_pass(self, start: int) -> None:
        """Refuse to begin a forward pass on what another one has left unfinished."""
        last = self.forward_pass
        if last is not None and last.thread != threading.get_ident() and last.outcome() is Outcome.RUNNING:
            self._break("another thread is in one of its forward passes")
        reason = unsettled(self, self.layers)
        if reason is not None:
            self._break(reason)
        self.forward_pass = watch(self, start)

    def _begin_with_states(self, index: int) -> None:
        """Begin a forward pass at states that change before any layer counts its tokens: they would not tell."""
        if torch.compiler.is_dynamo_compiling() or index > (first := first_layer(self)):
            return
        if self.broken is not None:
            raise QuantCacheError(self.broken)
        last = self.forward_pass
        if last is None or last.thread != threading.get_ident() or last.outcome() is not Outcome.RUNNING:
            self._begin_pass(self.get_seq_length(first))

    # ------------------------------------------------------------------ operations on all layers

    def _change(self, action: Callable[[], None]) -> None:
        """Do something to the layers while no other thread may."""
        me = threading.get_ident()
        try:
            if not self._is_ours(me):
                raise QuantCacheError("another thread is changing the cache: wait until it has returned")
            action()
        finally:
            if self.updating == me:
                del self.updating

    def _drop_refused(self) -> None:
        """Roll back a pass that ended because tokens of an earlier one are not finite: they cost no other row."""
        refused = any(isinstance(layer, SpectralLayer) and layer.state.refused for layer in self.layers)
        if refused and busy(self) is None and (self.broken is not None or unsettled(self, self.layers) is not None):
            self._roll_back()

    def _apply(self, operation: Callable[[Any], None], settled: bool = True, **state: Any) -> None:
        """Prepare an operation on copies of all layers, then put all of them in place at once."""
        if settled:
            self._drop_refused()
            self._require_settled(self.layers)
        prepared = [state_copy(layer) for layer in self.layers]
        for layer in prepared:
            operation(layer)
        commit([*self.layers, self], [*map(vars, prepared), state])

    def rollback(self) -> int:
        """Drop the tokens that an interrupted forward pass has brought.

        Returns:
            Tokens kept, T.

        Raises:
            QuantCacheError: A layer of transformers' own cannot go back, and ``reset()`` is what is left; or another
                thread is using the cache.
        """
        self._change(self._roll_back)
        return max(lengths(self, self.layers), default=0)

    def _roll_back(self) -> None:
        self._require_idle(search=True)
        layers: list[Any] = [layer for i, layer in enumerate(self.layers) if follows_text(self, i, layer)]
        held = [layer.get_seq_length() for layer in layers]
        keep = min(held)
        if self.forward_pass is not None and self.forward_pass.outcome(search=True) is Outcome.FAILED:
            keep = min([self.forward_pass.start, *filter(None, held)])
        elif self.broken is None and len(lengths(self, self.layers)) < 2:
            return  # nothing was interrupted
        if not keep:
            self._clear()
            return
        stateful = next((each for each in self.layers if isinstance(each, LinearAttentionCacheLayerMixin)), None)
        if stateful is not None:
            raise QuantCacheError(f"a {type(stateful).__name__} cannot go back: call reset()")
        for layer, length in zip(layers, held, strict=True):
            if length > keep and not isinstance(layer, SpectralLayer):
                raise QuantCacheError(
                    f"a {type(layer).__name__} holds {length} tokens and cannot be rolled back to {keep}: call reset()"
                )

        def cut(layer: Any) -> None:
            if isinstance(layer, SpectralLayer) and layer.get_seq_length() > keep:
                layer.crop(keep - layer.get_seq_length())

        self._apply(cut, settled=False, broken=None, forward_pass=None)

    def reset(self) -> None:
        """Forget all tokens.

        Raises:
            QuantCacheError: Another thread is using the cache.
        """

        def clear() -> None:
            self._require_idle(search=True)
            self._clear()

        self._change(clear)

    def _clear(self) -> None:
        self.broken = unusable("reset() was interrupted")  # transformers' own layers may be cleared in place
        super().reset()
        for layer in self.layers:
            if isinstance(layer, DynamicLayer) and not isinstance(layer, SpectralLayer):
                # transformers 5.17 keeps as many zeros as there were tokens, and goes on behind them
                commit([layer], [{"keys": None, "values": None, "is_initialized": False}])
        commit([self], [{"broken": None, "forward_pass": None}])

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens, of all layers or none.

        Args:
            tokens_to_remove: Zero or negative, as transformers defines it.

        Raises:
            TypeError: The count is not a whole number.
            QuantCacheError: A forward pass was interrupted, or another thread is using the cache.
        """
        count = operator.index(tokens_to_remove)  # assisted decoding passes tensors

        def cut(layer: Any) -> None:
            if not isinstance(layer, DynamicLayer) or layer.is_initialized:  # a window of transformers' own would fail
                layer.crop(count)

        self._change(lambda: self._apply(cut))

    def reorder_cache(self, beam_idx: Any) -> None:
        """Gather rows, in all layers or none.

        Args:
            beam_idx: Row of the present cache that each new row continues, ``[B']``.

        Raises:
            RowError: A row does not exist.
            QuantCacheError: A forward pass was interrupted, or another thread is using the cache.
        """
        self._gather(lambda count: chosen_rows(beam_idx, count))

    def batch_select_indices(self, indices: Any) -> None:
        """Keep some rows, in all layers or none.

        Args:
            indices: Row numbers, negative ones counted from the end, or a mask over rows: tensor, array or list.

        Raises:
            RowError: A row does not exist.
            QuantCacheError: A forward pass was interrupted, or another thread is using the cache.
        """
        self._gather(lambda count: chosen_rows(indices, count))

    def batch_repeat_interleave(self, repeats: Any) -> None:
        """Repeat every row in place, in all layers or none.

        Args:
            repeats: How often; or one number for each row.

        Raises:
            RowError: A number is negative, or there are not as many as rows.
            QuantCacheError: A forward pass was interrupted, or another thread is using the cache.
        """
        self._gather(lambda count: repeated_rows(repeats, count))

    def _gather(self, choose: Callable[[int], Any]) -> None:
        def gather() -> None:
            count = next(filter(None, map(held_rows, self.layers)), None)
            if count is not None:
                rows = choose(count)
                self._apply(lambda layer: layer.reorder_cache(rows))

        self._change(gather)

    # ------------------------------------------------------------------ copies

    def _taken(self, take: Callable[[Any], Any]) -> Self:
        """A cache whose layers are made of this one's, as they are at one moment."""
        if any(isinstance(layer, SpectralLayer) and layer.state.refused for layer in self.layers):
            self._change(self._drop_refused)
        for _ in range(ATTEMPTS):
            if any(isinstance(layer, SpectralLayer) and layer.state.pending for layer in self.layers):
                self._require_settled(self.layers)
                self._change(self._finish)
            seen = [state_copy(layer) for layer in self.layers]
            self._require_settled(seen)
            new = self._of([take(layer) for layer in seen])
            if self.holds(seen):
                return new
        raise QuantCacheError("another thread keeps changing the cache: wait until it has returned")

    def _finish(self) -> None:
        """Encode what is due and has waited for nobody."""
        self._require_settled(self.layers)
        for layer in self.layers:
            if isinstance(layer, SpectralLayer):
                layer.flush_if_finite()

    def _of(self, layers: list[Any]) -> Self:
        """This cache with other layers, which no forward pass has seen yet."""
        new = copy.copy(self)
        vars(new).pop("updating", None)
        new.layers, new.forward_pass = layers, None
        return new

    def settled(self) -> Self:
        """The cache as it is at one moment, to be read while :meth:`holds` says so.

        Returns:
            A cache that shares everything with this one.

        Raises:
            QuantCacheError: A forward pass was interrupted, or another thread is using the cache.
        """
        return self._taken(lambda layer: layer)

    def at_one_moment(self) -> Self:
        """The cache as it is now, in the middle of a forward pass too: each layer at one moment.

        Returns:
            A cache to read sizes from.
        """
        return self._of([state_copy(layer) for layer in self.layers])

    def holds(self, layers: list[Any]) -> bool:
        """Whether the cache still holds what some copies of its layers do, and no other thread is changing it.

        Args:
            layers: As :func:`quantcache.cache.transaction.state_copy` gives them.

        Returns:
            True if so.
        """
        return busy(self) is None and all(map(is_unchanged, self.layers, layers))

    def fork(self) -> Self:
        """A cache of the same tokens that shares the encoded blocks: of one prefix, as many as are wanted.

        Whichever cache encodes a block first copies what it shares, so a fork is free for as long as its own tokens
        fit into the residual window. Layers of transformers' own are copied at once.

        Returns:
            The new cache.

        Raises:
            QuantCacheError: A forward pass was interrupted, or another thread is using the cache.
        """
        return self._taken(lambda layer: layer.fork() if isinstance(layer, SpectralLayer) else detached_copy(layer))

    def __copy__(self) -> Self:
        """Another cache of the same layers."""
        return shallow_copy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy what is stored; the calibration and its constants are shared."""
        new = self._taken(detached_copy)
        memo[id(self)] = new
        memo.update((id(old), copied) for old, copied in zip(self.layers, new.layers, strict=True))
        return new
