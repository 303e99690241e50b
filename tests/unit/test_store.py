"""Growing buffers of encoded blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantcache.backends.store import BlockStore
from quantcache.coding.growth import GROWTH, capacity
from quantcache.common.errors import QuantCacheError

LIMIT = 2000
MAX_SLACK = 0.12


def block(index: int, count: int = 1) -> dict[str, Tensor]:
    """Fields of some blocks that tell where they come from."""
    ids = torch.arange(index, index + count)
    return {
        "codes": ids[:, None, None].expand(-1, 2, 3).int(),
        "gains": (ids[:, None, None] % 251).expand(-1, 2, 1).to(torch.uint8),
    }


def grown(count: int) -> BlockStore:
    """A store grown to some blocks one by one."""
    store = BlockStore()
    for index in range(count):
        store = store.appended(block(index))
    return store


def assert_holds(store: BlockStore, count: int) -> None:
    """The store holds exactly the first ``count`` blocks."""
    assert store.count == count
    expected = block(0, count)
    for name, value in store.slice(0, count).items():
        assert torch.equal(value, expected[name])


def slack_share(store: BlockStore) -> float:
    """Unused bytes over used bytes."""
    return sum(store.slack(name) for name in store.buffers) / sum(store.nbytes().values())


def test_slack_and_copies_while_growing_one_by_one() -> None:
    store, copied, buffer = BlockStore(), 0, None
    for count in range(1, LIMIT + 1):
        held = buffer.data_ptr() if buffer is not None else None
        store = store.appended(block(count - 1))
        buffer_before, buffer = buffer, store.buffers["codes"]
        if held is not None and buffer.data_ptr() != held:
            assert buffer_before is not buffer
            copied += count - 1
        assert store.capacity == capacity(count, 0)
        assert slack_share(store) <= MAX_SLACK
    assert_holds(store, LIMIT)
    # A full store of c blocks is copied when it grows by max(1, c // 16) >= c / 31: 31 copies per block appended.
    assert copied <= 31 * store.capacity
    # Doubling would copy less and waste more: the growth rule is the trade that was chosen.
    assert store.capacity <= LIMIT * (1 + 1 / GROWTH)


@pytest.mark.parametrize("prefilled", [1, 5, 16, 100, 1000])
def test_slack_while_growing_from_a_prefill(prefilled: int) -> None:
    store = BlockStore()
    store = store.appended(block(0, prefilled))
    assert store.capacity == prefilled
    for index in range(prefilled, prefilled + 200):
        store = store.appended(block(index))
        assert store.capacity == capacity(index + 1, prefilled)
        assert slack_share(store) <= MAX_SLACK
    assert_holds(store, prefilled + 200)


def test_append_of_many_blocks() -> None:
    store = BlockStore()
    for index, count in ((0, 3), (3, 40), (43, 1), (44, 7)):
        store = store.appended(block(index, count))
    assert_holds(store, 51)
    assert slack_share(store) <= MAX_SLACK


def test_first_append_keeps_no_view_of_its_source() -> None:
    source = torch.arange(100_000).view(100, 1000)
    store = BlockStore()
    store = store.appended({"dense": source[10:12]})
    assert store.buffers["dense"].untyped_storage().nbytes() == 2 * source[0].nbytes
    source.zero_()
    assert store.slice(0, 1)["dense"][0, 0] == 10_000


def test_views_taken_before_growing_stay_valid() -> None:
    store = grown(20)
    views = {name: value.clone() for name, value in store.slice(0, 20).items()}
    held = store.slice(0, 20)
    for index in range(20, 60):
        store = store.appended(block(index))
    assert all(torch.equal(held[name], views[name]) for name in views)


@pytest.mark.parametrize("keep", [0, 1, 2, 5, 15, 16, 100, 399, 400])
def test_truncate_gives_memory_back(keep: int) -> None:
    store = grown(400)
    store = store.truncated(keep)
    if keep:
        assert_holds(store, keep)
        assert slack_share(store) <= MAX_SLACK
    else:
        assert (store.count, store.capacity, store.buffers) == (0, 0, {})
    for index in range(keep, keep + 5):
        store = store.appended(block(index))
    assert_holds(store, keep + 5)


def test_truncate_beyond_the_end_changes_nothing() -> None:
    store = grown(10)
    store = store.truncated(50)
    assert_holds(store, 10)


@pytest.mark.parametrize("count", range(1, 40))
def test_slack_after_dropping_one_block(count: int) -> None:
    """Speculative decoding crops a little all the time."""
    store = grown(count + 1)
    store = store.truncated(count)
    assert slack_share(store) <= MAX_SLACK


def test_repeated_small_crops_of_a_large_store_do_not_copy_it() -> None:
    store = grown(1000)
    address = store.buffers["codes"].data_ptr()
    for _ in range(10):
        store = store.truncated(store.count - 1)
        store = store.appended(block(store.count))
    assert store.buffers["codes"].data_ptr() == address


def test_copy_is_independent() -> None:
    store = grown(33)
    twin = store.copy()
    assert twin.capacity == twin.count == 33
    twin.buffers["codes"].zero_()
    twin = twin.truncated(2)
    store = store.appended(block(33))
    assert_holds(store, 34)
    assert twin.count == 2


def test_map_batch_replaces_the_used_part() -> None:
    store = grown(40)
    store = store.mapped(lambda buffer: buffer.repeat_interleave(2, dim=1))
    assert store.capacity == store.count == 40
    assert {name: value.shape[1] for name, value in store.buffers.items()} == {"codes": 4, "gains": 4}


def test_bytes_of_an_empty_store() -> None:
    store = BlockStore()
    assert store.capacity == 0
    assert store.nbytes() == {}
    assert store.slice(0, 0) == {}
    store = store.truncated(0)
    assert store.copy().count == 0


def test_bytes_by_field() -> None:
    store = grown(33)
    room = store.capacity
    assert room > 33
    assert store.nbytes() == {"codes": 33 * 2 * 3 * 4, "gains": 33 * 2}
    assert (store.slack("codes"), store.slack("gains")) == ((room - 33) * 24, (room - 33) * 2)


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("writer", ["original", "fork"])
def test_forks_share_buffers_until_one_is_written_to(writer: str, count: int) -> None:
    store = grown(count)
    fork = store.fork()
    address = store.buffers["codes"].data_ptr()
    assert fork.buffers["codes"].data_ptr() == address
    store, fork = (store.appended(block(count)), fork) if writer == "original" else (store, fork.appended(block(count)))
    kept, changed = (fork, store) if writer == "original" else (store, fork)
    assert kept.buffers["codes"].data_ptr() == address != changed.buffers["codes"].data_ptr()
    assert_holds(kept, count)
    assert_holds(changed, count + 1)
    again = kept.truncated(count - 1).appended({name: value + 1 for name, value in block(7).items()})
    assert again.buffers["codes"].data_ptr() != address
    assert_holds(kept, count)


def test_an_append_that_fails_leaves_the_store_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    store = grown(32)
    assert store.capacity == store.count

    def out_of_memory(*_: object) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "_copied", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            store.appended(block(32))
    assert_holds(store, 32)
    assert_holds(store.appended(block(32)), 33)


def test_stores_of_inference_mode_go_on_outside() -> None:
    """torch refuses to write to its tensors once inference mode is over."""
    with torch.inference_mode():
        store = BlockStore().appended(block(0, 64)).appended(block(64))
    assert store.capacity > store.count + 1
    for index in (65, 66):
        store = store.appended(block(index))
    assert_holds(store, 67)
    assert not any(buffer.is_inference() for buffer in store.buffers.values())


@pytest.mark.parametrize("count", [1, 8])  # with and without room
@pytest.mark.parametrize("wrong", ["missing", "unknown", "rows", "blocks", "dtype"])
def test_blocks_have_the_fields_of_those_before_them(wrong: str, count: int) -> None:
    """Torch spreads and casts what it is given, and the room of a field that is missing may hold anything."""
    store, fields = grown(count), block(count, 2)
    if wrong == "missing":
        del fields["gains"]
    elif wrong == "unknown":
        fields["more"] = fields["gains"]
    else:
        gains = fields["gains"]
        fields["gains"] = {"rows": gains[:, :1], "blocks": gains[:1], "dtype": gains.float()}[wrong]
    with pytest.raises(QuantCacheError, match=r"fields of those before them: (gains|more) is"):
        store.appended(fields)
    assert_holds(store.appended(block(count)), count + 1)
