"""Files of calibrations and caches while others write, read, cut and overwrite them; and processes made by fork()."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantcache.artifact import calibration as artifact
from quantcache.artifact.calibration import Calibration
from quantcache.artifact.files import CONFIG_NAME, TENSORS_NAME
from quantcache.cache import enabling
from quantcache.cache import files as cache_files
from quantcache.cache.prefixes import PrefixStore
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.coding.schema import SIDES
from quantcache.common import processes, writing
from quantcache.common.errors import ArtifactError
from quantcache.common.tensor_file import TensorFile
from tests.builders import scalar_calibration
from tests.families import FAMILIES, random_tokens, shared_model
from tests.helpers import feed

MODEL = FAMILIES[0]


def calibration(name: str = "a", bits: float = 3.0) -> Calibration:
    """A stand-in that is called something."""
    made = scalar_calibration(shared_model(MODEL).config, bits, seed=ord(name[0]))
    return Calibration(
        made.layers, replace(made.metadata, base_model={**made.metadata.base_model, "id": f"org/{name}"})
    )


def told(found: Calibration) -> tuple[Any, float, float]:
    """Name, rate by its tensors and rate by its description."""
    return found.metadata.base_model["id"], round(found.bits, 2), found.metadata.rate.bits


def without_digests(folder: Path) -> None:
    """Make an artifact one of an old version."""
    config = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
    del config["digest"]
    (folder / CONFIG_NAME).write_text(json.dumps(config | {"schema_version": "1.0"}), "utf-8")
    save_file(load_file(folder / TENSORS_NAME), folder / TENSORS_NAME, metadata={"format": "pt"})


# ---------------------------------------------------------------------- files that change once they are loaded


def cut(path: Path) -> None:
    """Leave nothing of a file."""
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    """Other bytes in the same file."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 4)
        file.write(os.urandom(path.stat().st_size))


@pytest.mark.support("calibrations and caches whose files change once they are loaded")
@pytest.mark.parametrize("damage", [cut, overwrite, Path.unlink])
def test_what_is_loaded_owns_its_memory(damage: Callable[[Path], None], tmp_path: Path) -> None:
    made, model = calibration(), shared_model(MODEL)
    made.save_pretrained(tmp_path)
    loaded = Calibration.from_pretrained(tmp_path)
    cache = SpectralCache(loaded, model.config, residual_length=0)
    feed(model, cache, random_tokens(2, 150, seed=1), (150,))
    cache.save(tmp_path / "prefix")
    again = SpectralCache.load(tmp_path / "prefix", loaded)
    for name in (TENSORS_NAME, CONFIG_NAME, "prefix"):
        damage(tmp_path / name)
    for index, layer in made.layers.items():
        for side in SIDES:
            for name, tensor in vars(layer.side(side)).items():
                assert torch.equal(getattr(loaded.layers[index].side(side), name), tensor)
    assert all(
        torch.equal(x, y)
        for ours, theirs in zip(again, cache, strict=True)
        for x, y in zip(ours[:2], theirs[:2], strict=True)
    )


def header(entries: Any, data: bytes = b"") -> bytes:
    """A safetensors file."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """One tensor's entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends after 0 bytes, 8 are needed"),
        (b"1234567", "ends after 7 bytes"),
        (struct.pack("<Q", 1 << 60) + b"{}", "not a safetensors file: its header claims 1,152,921,504,606"),
        (header(b"[]"), "malformed"),
        (header(b"{" * 100_000), "malformed"),
        (header(b'{"a": NaN}'), "malformed"),
        (header(b'{"a": {}, "a": {}}'), "it says 'a' twice"),
        (header(b"\xff\xfe"), "malformed"),
        (header({"__metadata__": {"a": 1}}), "metadata are not strings"),
        (header({"x": entry()}, b"1234"), "take 8 bytes, it has 4"),
        (header({"x": entry()}, b"123456789"), "take 8 bytes, it has 9"),
        (header({"x": entry(shape=[3])}, b"12345678"), "8 bytes for F32"),
        (header({"x": entry(shape=[-2])}, b"12345678"), "shape"),
        (header({"x": entry(shape=[True, 2])}, b"12345678"), "shape"),
        (header({"x": entry(shape=[1 << 62, 1 << 62])}, b"12345678"), "8 bytes for F32"),
        (header({"x": entry(offsets=[8, 0])}, b"12345678"), "ends at 0"),
        (header({"x": entry(offsets=[4, 12])}, b"123456789012"), "begins at byte 4"),
        (header({"x": entry(), "y": entry()}, b"12345678"), "begins at byte 0 of the data, expected 8"),
        (header({"x": entry(dtype=7)}, b"12345678"), "dtype 7"),
    ],
)
def test_malformed_tensor_files(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"cannot be read: .*{message}"):
        TensorFile(path)


def test_tensor_files_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    kinds = (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
    tensors = {str(kind): (torch.arange(6) % 2).to(kind).reshape(2, 3) for kind in kinds}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "x", metadata={"a": "b"})
    with TensorFile(tmp_path / "x") as file, safe_open(tmp_path / "x", framework="pt") as theirs:
        assert file.metadata == theirs.metadata()
        assert file.keys() == set(theirs.keys())
        for name, tensor in tensors.items():
            found = file.read(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found, tensor)
    save_file({"x": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "y")
    with TensorFile(tmp_path / "y") as file, pytest.raises(ArtifactError, match="x has dtype 'F8_E4M3'"):
        file.read("x")
    with TensorFile(tmp_path / "x") as file:
        cut(tmp_path / "x")
        with pytest.raises(ArtifactError, match="it ends after"):
            file.read("scalar")


# ---------------------------------------------------------------------- files that do not belong together


@pytest.mark.support("calibration files of two writers, and of writers that were killed", refused=True)
@pytest.mark.parametrize("mixed", [CONFIG_NAME, TENSORS_NAME])
@pytest.mark.parametrize("old", [(), ("a",), ("b",)], ids=["both new", "first old", "second old"])
def test_files_of_two_calibrations_are_refused(
    old: tuple[str, ...], mixed: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(writing, "PATIENCE", 0.05)
    for name in ("a", "b"):
        calibration(name).save_pretrained(tmp_path / name)
        if name in old:
            without_digests(tmp_path / name)
            assert told(Calibration.from_pretrained(tmp_path / name))[0] == f"org/{name}"
    shutil.copy(tmp_path / "a" / mixed, tmp_path / "b" / mixed)
    with pytest.raises(
        ArtifactError, match=r"calibration_config.json \(.*\) and calibration.safetensors \(.*\) were not"
    ):
        Calibration.from_pretrained(tmp_path / "b")
    calibration("b").save_pretrained(tmp_path / "b")
    assert told(Calibration.from_pretrained(tmp_path / "b"))[0] == "org/b"


@pytest.mark.support("calibration files of two writers, and of writers that were killed")
@pytest.mark.parametrize("killed_at", ["writing", "renaming"])
def test_a_killed_writer(killed_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves is refused or the old artifact, and the next writer clears it away."""
    calibration("a").save_pretrained(tmp_path)
    rename = os.replace

    def die(source: Any, target: Any) -> None:
        if killed_at == "renaming":
            rename(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    new = calibration("b")
    monkeypatch.setattr(artifact.os, "replace", die)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of fork() where there are threads
        child = os.fork()
    if child == 0:
        new.save_pretrained(tmp_path)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    monkeypatch.undo()
    assert len(list(tmp_path.glob(".quantcache-*"))) == 1
    if killed_at == "writing":
        assert told(Calibration.from_pretrained(tmp_path)) == told(calibration("a"))
    else:
        monkeypatch.setattr(writing, "PATIENCE", 0.05)
        with pytest.raises(ArtifactError, match="or saving was interrupted"):
            Calibration.from_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    assert not list(tmp_path.glob(".quantcache-*"))
    assert told(Calibration.from_pretrained(tmp_path)) == told(new)


@pytest.mark.support("calibration files of two writers, and of writers that were killed")
def test_whose_leftovers_are_cleared_away(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    own = f".quantcache-{platform.node()}-"
    gone = [tmp_path / f"{own}{dead.pid}-x", tmp_path / ".quantcache-elsewhere-1-x", tmp_path / ".quantcache-ab12"]
    kept = [tmp_path / f"{own}{os.getpid()}-x", tmp_path / ".quantcache-elsewhere-2-x", tmp_path / ".quantcache-cd34"]
    for folder in (*gone, *kept):
        folder.mkdir()
    for folder in gone[1:]:  # of another machine, or of a version that did not say whose
        os.utime(folder, (time.time() - writing.STALE_SECONDS - 60,) * 2)
    with writing.partial_folder(tmp_path):
        pass
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def beside(writers: list[Callable[[], None]], read: Callable[[], Any], seconds: float = 0.7) -> Counter[Any]:
    """What a reader sees while writers write again and again."""
    seen: Counter[Any] = Counter()
    failures: list[BaseException] = []
    stop = threading.Event()

    def run(write: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                write()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(write,)) for write in writers]
    for thread in threads:
        thread.start()
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(seen) == 0:
            seen[read()] += 1
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert not failures
    return seen


@pytest.mark.support("calibration files of two writers, and of writers that were killed")
def test_a_reader_beside_two_writers_of_one_folder(tmp_path: Path) -> None:
    first, second = calibration("a", 2.0), calibration("b", 6.0)
    first.save_pretrained(tmp_path)
    writers = [lambda: first.save_pretrained(tmp_path) and None, lambda: second.save_pretrained(tmp_path) and None]
    whole = {told(first), told(second)}
    assert set(beside(writers, lambda: told(Calibration.from_pretrained(tmp_path)))) <= whole
    assert told(Calibration.from_pretrained(tmp_path)) in whole
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_NAME, TENSORS_NAME, "README.md"}


@pytest.mark.slow
@pytest.mark.support("calibration files of two writers, and of writers that were killed")
def test_a_reader_beside_a_writer_of_saved_caches(tmp_path: Path) -> None:
    made, model, path = calibration(), shared_model(MODEL), tmp_path / "prefix"
    caches = []
    for length in (100, 200):
        caches.append(SpectralCache(made, model.config, residual_length=0))
        feed(model, caches[-1], random_tokens(1, length, seed=length), (length,))
    caches[0].save(path)

    def write() -> None:
        for cache in caches:
            cache.save(path)

    seen = beside([write], lambda: SpectralCache.load(path, made).get_seq_length())
    assert set(seen) <= {100, 200}


def test_reading_gives_up_on_files_that_stay_as_they_are(tmp_path: Path) -> None:
    path, calls = tmp_path / "x", []

    def damaged() -> None:
        calls.append(1)
        raise ArtifactError("damaged")

    with pytest.raises(ArtifactError, match="damaged"):
        writing.steadily([path], damaged)
    assert len(calls) == 1

    def changing() -> None:
        path.write_bytes(b"x" * len(calls))
        damaged()

    calls.clear()
    with pytest.raises(ArtifactError, match="damaged"):
        writing.steadily([path], changing)
    assert len(calls) == writing.READS


def test_a_cache_that_another_thread_changes_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SpectralCache(calibration(), shared_model(MODEL).config)
    feed(shared_model(MODEL), cache, random_tokens(1, 40, seed=1), (40,))
    save = save_file

    def slow(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        cache.crop(-1)

    monkeypatch.setattr(cache_files, "save_file", slow)
    with pytest.raises(Exception, match="another thread changed the cache while it was being written"):
        cache.save(tmp_path / "prefix")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- fork()


@pytest.mark.support("a process made by fork()")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.parametrize("inherited", [False, True], ids=["its own cache", "an inherited cache"])
def test_a_forked_child_goes_on_with_one_thread(inherited: bool) -> None:
    made, model, prompt = calibration(), shared_model(MODEL), random_tokens(1, 300, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        cache = SpectralCache(made, model.config, residual_length=0)
        feed(model, cache, prompt, (300,))
        expected = feed(model, cache.fork(), prompt[:, :5], (5,))
        torch.set_num_threads(2)
        (torch.ones(600, 600) @ torch.ones(600, 600)).sum()  # torch's threads are there
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            status = 1
            try:
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    ours = cache if inherited else SpectralCache(made, model.config, residual_length=0)
                    if not inherited:
                        feed(model, ours, prompt, (300,))
                    found = feed(model, ours, prompt[:, :5], (5,))
                said = [str(each.message) for each in told if each.category is RuntimeWarning]
                right = torch.equal(found, expected)
                status = 0 if right and torch.get_num_threads() == 1 and len(said) == 1 and "forked" in said[0] else 2
            finally:
                os._exit(status)
        end = time.monotonic() + 30
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
            time.sleep(0.02)
        if not ended[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert ended[0], "the child hangs"
        assert os.waitstatus_to_exitcode(ended[1]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.support("a process made by fork()")
@pytest.mark.parametrize("used", ["a store", "enable()"])
def test_a_forked_child_does_not_wait_for_its_parents_threads(used: str) -> None:
    """A thread of the parent may have been in the middle of something; the child does not have it."""
    model, store = shared_model(MODEL), PrefixStore(1 << 30)
    lock = store._lock if used == "a store" else enabling._lock
    taken, done = threading.Event(), threading.Event()

    def busy() -> None:
        with lock:
            taken.set()
            done.wait(60)

    thread = threading.Thread(target=busy)
    thread.start()
    assert taken.wait(20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            store.statistics() if used == "a store" else enabling.disable(model)
        finally:
            os._exit(0)
    end = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.02)
    done.set()
    thread.join()
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended[0], "the child hangs"


@pytest.mark.support("a process made by fork()")
def test_where_no_threads_are_lost_nothing_is_changed(monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    threads = torch.get_num_threads()
    processes.use_living_threads()
    monkeypatch.setattr(processes, "_threads_lost", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    processes.use_living_threads()
    assert not processes._threads_lost
    monkeypatch.undo()
    assert torch.get_num_threads() == threads
    assert not recwarn.list
