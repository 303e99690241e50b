"""Where files are written to, with which permissions, and what is left after interruptions and by several at once."""

from __future__ import annotations

import copy
import itertools
import json
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch

from quantcache.artifact.calibration import Calibration
from quantcache.artifact.files import CONFIG_NAME, TENSORS_NAME
from quantcache.cache import prefix_folder
from quantcache.cache.prefixes import PrefixStore
from quantcache.cache.spectral_cache import SpectralCache
from quantcache.common import writing
from quantcache.common.errors import ArtifactError, QuantCacheError
from quantcache.common.jsonfile import write_json
from quantcache.evaluation.cells import Cells
from quantcache.export import export_checkpoint
from tests import warm
from tests.families import FAMILIES, random_tokens, shared_model
from tests.helpers import Run, feed

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = next(family for family in FAMILIES if family.name == "llama")
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60.0
"""What takes milliseconds may take longer on a busy machine; a lock that is kept would be waited for without end."""


def calibration(bits: float = 3.0) -> Calibration:
    """A stand-in."""
    return Calibration.synthetic(shared_model(LLAMA).config, bits)


def filled(tokens: int = 150) -> SpectralCache:
    """A cache of random tokens."""
    cache = SpectralCache(calibration(), shared_model(LLAMA).config, residual_length=0)
    feed(shared_model(LLAMA), cache, random_tokens(1, tokens, seed=1), (tokens,))
    return cache


WRITERS: dict[str, Callable[[Path], None]] = {
    "result": lambda path: write_json(path, {"a": 1}),
    "cache": lambda path: filled().save(path),
}
writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


# ---------------------------------------------------------------------- where to


@writers
def test_links_are_followed(write: Callable[[Path], None], tmp_path: Path) -> None:
    link, there, nowhere = tmp_path / "link", tmp_path / "far" / "there", tmp_path / "dangling"
    there.parent.mkdir()
    there.write_text("old")
    link.symlink_to(there)
    nowhere.symlink_to(there.parent / "new")
    for path in (link, nowhere):
        write(path)
        assert path.is_symlink()
        assert len(path.resolve().read_bytes()) > len("old")
    assert {path.name for path in there.parent.iterdir()} == {"there", "new"}


@writers
def test_devices_pipes_and_folders_are_refused(write: Callable[[Path], None], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to(os.devnull)  # a link to it, lest a failing test replaces the machine's
    for name in ("pipe", "folder", "null"):
        with pytest.raises(OSError, match=f"{name} is a (folder|device or a pipe): give a file"):
            write(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "folder", "null"}


def test_an_evaluation_tells_so_before_the_work(run: Run, tmp_path: Path) -> None:
    status, _, err = run("eval", "wiki11m", "--text", tmp_path / "none", "-o", os.devnull)
    assert (status, err) == (1, f"error: {os.devnull} is a device or a pipe: give a file\n")


@writers
def test_names_of_every_length_and_kind(write: Callable[[Path], None], tmp_path: Path) -> None:
    names = ["x" * 255, "\u65e5 \u672c 'quoted' \n$x", os.fsdecode(b"not utf-8 \xff")]
    for name in names:
        write(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_a_folder_of_prefixes_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = shared_model(LLAMA), random_tokens(1, 150, seed=1)
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "first")
    store = PrefixStore(0, "prefixes", 1 << 30)
    monkeypatch.chdir(tmp_path / "second")
    assert store.add(text[0].tolist(), filled(), model)
    assert len(list((tmp_path / "first" / "prefixes").iterdir())) == 1
    assert not list((tmp_path / "second").iterdir())


# ---------------------------------------------------------------------- permissions


@writers
def test_what_replaces_a_private_file_is_private(write: Callable[[Path], None], tmp_path: Path) -> None:
    path, usual = tmp_path / "file", tmp_path / "usual"
    usual.touch()
    write(path)
    assert path.stat().st_mode == usual.stat().st_mode
    path.chmod(0o600)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nobody_changes_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the whole process's: two threads that ask for it at once may leave it at zero, and files open to all."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
    calibration().save_pretrained(tmp_path / "calibration")
    for name, write in WRITERS.items():
        write(tmp_path / name)
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()} == {usual}


# ---------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("raised", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("failing", [1, 2])
def test_an_interrupted_save_leaves_the_old_artifact(
    failing: int, raised: type[BaseException], existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if existing:
        calibration(3.0).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    rename, calls = os.replace, itertools.count(1)

    def fail(*args: Any) -> None:
        if next(calls) == failing:
            raise raised("simulated")
        rename(*args)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(raised, match="simulated"):
        calibration(2.0).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    if existing:
        assert Calibration.from_pretrained(tmp_path).bits == calibration(3.0).bits


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from quantcache.common.jsonfile import write_json
from tests.integration.test_writing import WRITERS, calibration

folder = Path(sys.argv[2])
writers = {"calibration": lambda path: calibration(2.0).save_pretrained(path), **WRITERS}
writers["result"] = lambda path: write_json(path, ["long"] * 10_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
for name in ("calibration", "cache", "result"):
    try:
        writers[name](folder / name)
    except OSError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_files_and_one_error(tmp_path: Path) -> None:
    calibration().save_pretrained(tmp_path / "calibration")
    for name in ("cache", "result"):
        (tmp_path / name).write_bytes(b"old")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    found = subprocess.run(
        [*warm.python(), "-c", FULL, str(ROOT), str(tmp_path)], env=environment, capture_output=True, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    lines = found.stdout.decode().splitlines()
    assert len(lines) == 3
    assert all("File too large" in line and str(tmp_path) in line for line in lines)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_terminated_calibration_leaves_nothing(tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("The city of Leiden lies on the old Rhine. " * 100, "utf-8")
    stop = "import time, quantcache.artifact.calibration as c; c.save_file = lambda *a, **k: time.sleep(60)"
    arguments = ["calibrate", "wiki11m", "--text", str(text), "--tokens", "256", "--seq-len", "128", "-o", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    code = f"{stop}; from quantcache.cli import main; main({arguments!r})"
    process = subprocess.Popen([*warm.python(), "-c", code], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 3 * SECONDS
    while not list(out.glob(f"{writing.PREFIX}*/{CONFIG_NAME}")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(SECONDS) == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_caches_leave_memory_when_writing_them_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    store, text = PrefixStore(1 << 30, tmp_path), random_tokens(1, 150, seed=1)[0].tolist()
    store.add(text, filled(), shared_model(LLAMA))
    store.max_bytes = store.statistics().bytes + 1
    monkeypatch.setattr(prefix_folder, "write_cache", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.add([7] * 150, filled(), shared_model(LLAMA))
    assert not store._leaving
    empty = SpectralCache(calibration(), shared_model(LLAMA).config, residual_length=0)
    assert store.fork([*text, 5], empty, shared_model(LLAMA)) is None


class _Interrupted(OrderedDict):  # type: ignore[type-arg]
    """What a store holds, and Ctrl-C right behind a change of it."""

    at = ""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        if self.at == "a new one":
            raise KeyboardInterrupt

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(key)
        if self.at == "an old one":
            raise KeyboardInterrupt

    def pop(self, *args: Any) -> Any:
        found = super().pop(*args)
        if self.at == "an old one" and found is not None:
            raise KeyboardInterrupt
        return found


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("at", ["a new one", "an old one"])
def test_a_store_counts_right_after_interrupts(at: str, folder: bool, tmp_path: Path) -> None:
    model, text = shared_model(LLAMA), random_tokens(1, 150, seed=1)[0].tolist()
    store = PrefixStore(1 << 30, tmp_path if folder else None)
    store.add(text, filled(), model)
    each = store.statistics().bytes
    store.max_bytes, store._held = each + 1, _Interrupted(store._held)
    store._held.at = at
    with pytest.raises(KeyboardInterrupt):
        store.add([7] * 150, filled(), model)
    store._held.at = ""
    assert store.statistics().bytes == each * store.statistics().caches
    assert not store._leaving
    store._held = OrderedDict(store._held)
    assert store.add([8] * 150, filled(), model)
    assert (store.statistics().caches, store.statistics().bytes) == (1, each)


# ---------------------------------------------------------------------- several processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_child_of_fork_does_not_keep_its_parents_turn(tmp_path: Path) -> None:
    read, write = os.pipe()
    with writing.only_writer(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the parent is done
            os._exit(0)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the turn does not end"))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with writing.only_writer(tmp_path):
            pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.close(write)
        os.waitpid(child, 0)
        os.close(read)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_leftovers_of_a_process_whose_id_is_used_again(tmp_path: Path) -> None:
    """In a container every start has the same few ids, and what was killed there would stay for good."""
    own, started = f"{writing.PREFIX}{platform.node()}-{os.getpid()}", writing._started(os.getpid())
    gone, kept = tmp_path / f"{own}-1-ab", [tmp_path / f"{own}-{started}-ab", tmp_path / f"{own}-0-ab"]
    for folder in (gone, *kept):
        folder.mkdir()
    with writing.partial_folder(tmp_path) as mine:
        assert mine.name.startswith(f"{own}-{started}-")
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_folders_that_are_written_into_are_left_alone(tmp_path: Path) -> None:
    """Whoever it is: of a writer in another container neither process id nor clock says anything."""
    other = tmp_path / f"{writing.PREFIX}{platform.node()}-999999999-1-ab"
    longer = tmp_path / f"{writing.PREFIX}{platform.node()}-7-999999999-1-ab"  # of a machine called NAME-7
    for folder in (other, longer):
        folder.mkdir()
    with writing.only_writer(other), writing.partial_folder(tmp_path):
        assert other.exists()
        assert longer.exists()
    with writing.partial_folder(tmp_path):
        assert not other.exists()
        assert longer.exists()


@pytest.mark.slow
def test_two_runs_with_the_same_cells(tmp_path: Path) -> None:
    path, settings = tmp_path / "run.cells", {"context": 512}
    code = (
        "import sys; from pathlib import Path; from quantcache.evaluation.cells import Cells; "
        f"cells = Cells(Path({str(path)!r}), {settings!r}); cells.put('qa', 'dense', 'a', {{'found': 1}}); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    other = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        before = path.read_bytes()
        for restart in (False, True):
            with pytest.raises(QuantCacheError, match=r"another run is at work on .*run\.cells: let it end"):
                Cells(path, settings, restart)
        assert path.read_bytes() == before
    finally:
        other.kill()
        other.wait()
    cells = Cells(path, settings)
    assert cells.reused == 1
    cells.put("qa", "dense", "b", {"found": 2})
    assert Cells(path, settings).reused == 2
    assert [each.name for each in tmp_path.iterdir()] == ["run.cells"]


def test_writers_of_one_folder_keep_to_its_bytes_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = shared_model(LLAMA), [random_tokens(1, 150, seed=seed)[0].tolist() for seed in range(3)]
    cache, write, seen = filled(), prefix_folder.write_cache, []
    PrefixStore(0, tmp_path, 1 << 30).add(texts[0], cache, model)
    (size,) = [file.stat().st_size for file in tmp_path.iterdir()]
    stores = [PrefixStore(0, tmp_path, 2 * size + size // 2) for _ in range(2)]

    def meanwhile(*args: Any, **kwargs: Any) -> None:
        """Another process writes while this one does."""
        monkeypatch.setattr(prefix_folder, "write_cache", write)
        assert stores[1].add(texts[2], cache, model)
        write(*args, **kwargs)

    rename = os.replace

    def counted(*args: Any) -> None:
        rename(*args)
        seen.append(stores[0].statistics().file_bytes)

    monkeypatch.setattr(prefix_folder, "write_cache", meanwhile)
    monkeypatch.setattr(os, "replace", counted)
    assert stores[0].add(texts[1], cache, model)
    assert max(seen) <= 2 * size + size // 2
    assert stores[0].statistics().files == 2


# ---------------------------------------------------------------------- damage, and copies in memory


@pytest.mark.parametrize("name", ["rope.0.inv_freq", "layers.0.key.mean", "layers.1.value.analysis"])
def test_one_flipped_bit_is_found(name: str, tmp_path: Path) -> None:
    calibration().save_pretrained(tmp_path)
    path = tmp_path / TENSORS_NAME
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    data[8 + size + json.loads(data[8 : 8 + size])[name]["data_offsets"][0]] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{TENSORS_NAME}.* is damaged: its tensors have checksum"):
        Calibration.from_pretrained(tmp_path)


def test_what_the_json_says_may_be_edited(tmp_path: Path) -> None:
    calibration().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text("utf-8"))
    config["base_model"]["id"] = "org/another"
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config), "utf-8")
    assert Calibration.from_pretrained(tmp_path).metadata.base_model["id"] == "org/another"


def sent(made: Calibration) -> Calibration:
    """A calibration as a process that is started gets it."""
    found: Calibration = ForkingPickler.loads(ForkingPickler.dumps(made))
    return found


@pytest.mark.parametrize("copied", [copy.deepcopy, sent], ids=["deep", "sent"])
def test_a_calibration_in_use_is_copied(copied: Callable[[Calibration], Calibration]) -> None:
    """What caches have built from it stays behind."""
    used = calibration()
    model, tokens = shared_model(LLAMA), random_tokens(1, 200, seed=2)

    def logits(made: Calibration) -> torch.Tensor:
        return feed(model, SpectralCache(made, model.config, residual_length=0), tokens, (150, 50))

    expected = logits(used)
    assert torch.equal(logits(copied(used)), expected)
    assert torch.equal(logits(used), expected)


# ---------------------------------------------------------------------- exports


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder."""
    path = tmp_path_factory.mktemp("model") / "model"
    shared_model(LLAMA).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["folder", "link", "dangling link", "working directory", "long name"])
def test_where_exports_go(kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = output = tmp_path / ("x" * 255 if kind == "long name" else "target")
    if kind in ("folder", "link", "working directory"):
        target.mkdir()
    if "link" in kind:
        output = tmp_path / "link"
        output.symlink_to(target)
    if kind == "working directory":
        monkeypatch.chdir(target)
        output = Path()
    state = target.stat().st_ino if target.exists() else None
    export_checkpoint(source, calibration(), output, verify=False)
    assert {path.name for path in target.iterdir()} >= {"model.safetensors", "config.json", "quantcache"}
    assert {path.name for path in tmp_path.iterdir()} <= {target.name, "link"}
    assert not list(target.glob(".*"))
    assert state in (None, target.stat().st_ino), "a folder that is there may be a mount: it cannot be renamed over"


def test_an_export_that_fails_at_its_end_leaves_an_empty_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    rename, calls = os.replace, itertools.count()

    def fail(first: Any, second: Any) -> None:
        if Path(second).parent == out and next(calls) == 2:
            raise KeyboardInterrupt
        rename(first, second)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(source, calibration(), out, verify=False)
    assert not list(out.iterdir())
    (out / ".out-partial-elsewhere-1-1-ab").mkdir()  # of one that was killed
    export_checkpoint(source, calibration(), out, verify=False)
    shutil.rmtree(out / ".out-partial-elsewhere-1-1-ab")
    with pytest.raises(QuantCacheError, match="out exists already"):
        export_checkpoint(source, calibration(), out, verify=False)
