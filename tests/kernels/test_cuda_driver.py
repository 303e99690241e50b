"""What the CUDA driver's part does without a GPU: compiling, what it keeps on disk, and which thread may launch."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantcache_kernels.cuda import compiler, driver, room
from quantcache_kernels.cuda.structures import PlacesArguments

CUBIN = b"\x7fELF machine code"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """NVRTC is not asked; yields what it would have been asked for."""
    seen: list[str] = []

    def compile_it(text: str, options: tuple[str, ...]) -> bytes:
        seen.append(options[0])
        return CUBIN

    monkeypatch.setattr(compiler, "_compile_by_nvrtc", compile_it)
    return seen


def test_machine_code_is_compiled_once(
    compilations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTCACHE_CUDA_CACHE", str(tmp_path))
    assert [compiler.compiled((9, 0), "conversion.h") for _ in range(2)] == [CUBIN] * 2
    assert compilations == ["--gpu-architecture=sm_90"]
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert kept.stat().st_mode & 0o777 == 0o644, "another user of the folder may read it"
    whole = kept.read_bytes()
    for broken in (b"", whole[:3], whole[:-1], CUBIN, bytes(len(whole)), whole.replace(b"code", b"c0de")):
        kept.write_bytes(broken)
        assert compiler.compiled((9, 0), "conversion.h") == CUBIN
        assert kept.read_bytes() == whole
    assert len(compilations) == 7


def test_machine_code_is_its_compilers_own(
    compilations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where NVRTC was missing for a while, what nvcc has made is not taken for NVRTC's, nor for another nvcc's."""

    def missing(text: str, options: tuple[str, ...]) -> bytes:
        raise compiler.CudaError("none of libnvrtc.so can be loaded")

    versions = ["release 12.4"]
    monkeypatch.setenv("QUANTCACHE_CUDA_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "has_nvcc", lambda: True)
    monkeypatch.setattr(compiler, "_nvcc_version", lambda: versions[-1])
    monkeypatch.setattr(compiler, "_compile_by_nvcc", lambda text, options: versions[-1].encode())
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_compile_by_nvrtc", missing)
        assert [compiler.compiled((9, 0), "conversion.h") for _ in range(2)] == [b"release 12.4"] * 2
        versions.append("release 13.1")
        assert compiler.compiled((9, 0), "conversion.h") == b"release 13.1"
    assert compiler.compiled((9, 0), "conversion.h") == CUBIN


def test_a_full_disk_is_left_as_it_was(
    compilations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setenv("QUANTCACHE_CUDA_CACHE", str(tmp_path))
    monkeypatch.setattr(Path, "replace", full)
    assert compiler.compiled((9, 0), "conversion.h") == CUBIN
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_user_without_a_home_compiles_every_time(compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("QUANTCACHE_CUDA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert [compiler.compiled((9, 0), "conversion.h") for _ in range(2)] == [CUBIN] * 2
    assert len(compilations) == 2


def test_a_folder_that_may_not_be_read_is_passed_over(
    compilations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setenv("QUANTCACHE_CUDA_CACHE", str(tmp_path))
    for name in ("stat", "read_bytes", "mkdir"):  # root may read everything
        monkeypatch.setattr(Path, name, refused)
    assert compiler.compiled((9, 0), "conversion.h") == CUBIN
    assert len(compilations) == 1


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A torch for CUDA 13 beside packages of NVRTC, none of them loaded; yields what is asked of the linker."""
    asked: list[str] = []

    def opened(name: str) -> str:
        asked.append(name)
        if name.startswith("libnvrtc.so."):
            raise OSError(f"{name}: cannot open shared object file")
        return name

    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(ctypes, "CDLL", opened)
    compiler.nvrtc.cache_clear()
    yield asked
    compiler.nvrtc.cache_clear()


def test_nvrtc_is_that_of_torchs_own_version(installed: list[str], tmp_path: Path) -> None:
    assert str(compiler.nvrtc()) == "libnvrtc.so", "nothing else is there"
    compiler.nvrtc.cache_clear()
    for folder, version in (("cu13", "13"), ("cuda_nvrtc", "12")):
        packages = tmp_path / "nvidia" / folder / "lib"
        packages.mkdir(parents=True)
        for name in (f"libnvrtc.so.{version}", f"libnvrtc-builtins.so.{version}.0", f"libnvrtc.alt.so.{version}"):
            (packages / name).touch()
    installed.clear()
    own = tmp_path / "nvidia" / "cu13" / "lib"
    assert str(compiler.nvrtc()) == str(own / "libnvrtc.so.13"), "not another version that the system happens to have"
    assert installed[0] == str(own / "libnvrtc-builtins.so.13.0"), "which NVRTC does not find by itself"
    assert not [name for name in installed if "12" in Path(name).name]


class Driver:
    """A libcuda whose calls are noted, and which launches nothing where the thread has no context."""

    limit = 99 << 10

    def __init__(self) -> None:
        self.current = threading.local()
        self.calls: list[str] = []

    def cuLaunchKernelEx(self, given: Any, function: object, *others: Any) -> int:
        """Launch."""
        self.calls.append("launch")
        self.given = given._obj
        if not getattr(self.current, "context", None):
            return driver.NO_CONTEXT
        return int(self.given.shared_bytes > self.limit)

    def cuDeviceGet(self, handle: Any, device: int) -> int:
        """The handle of a device."""
        handle._obj.value = 10 + device
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, handle: ctypes.c_int) -> int:
        """Its context."""
        context._obj.value = 100 + handle.value
        return 0

    def cuCtxSetCurrent(self, context: ctypes.c_void_p) -> int:
        """Make it the thread's."""
        self.calls.append(f"context {context.value}")
        self.current.context = context.value
        return 0

    def cuGetErrorString(self, status: int, text: Any) -> int:
        """Words for an error."""
        text._obj.value = b"launched wrongly"
        return 0


def test_a_new_thread_may_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Driver()
    monkeypatch.setattr(driver, "_cuda", lambda: library)
    kernel = driver.Kernel(ctypes.c_void_p(1), 2)
    failed: list[compiler.CudaError] = []

    def launch(shared_bytes: int = 0) -> None:
        try:
            kernel.launch((1, 1), 32, shared_bytes, PlacesArguments(), 0)
        except compiler.CudaError as error:
            failed.append(error)

    for _ in range(2):
        thread = threading.Thread(target=launch)
        thread.start()
        thread.join()
    assert not failed
    assert library.calls == 2 * ["launch", "context 112", "launch"]
    launch()
    assert library.calls == 3 * ["launch", "context 112", "launch"]
    launch()
    assert library.calls[-2:] == ["launch", "launch"], "it has its context now"
    launch(library.limit + 1)
    assert [str(error) for error in failed] == ["CUDA: launched wrongly (1)"], "another error is told"


@pytest.mark.parametrize("follows", [False, True])
def test_a_kernel_that_waits_for_the_one_before_may_begin_early(follows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Driver()
    monkeypatch.setattr(driver, "_cuda", lambda: library)
    driver.Kernel(ctypes.c_void_p(1), 2, follows).launch((3, 5), 64, 1 << 10, PlacesArguments(), 7)
    given, attribute = library.given, library.given.attributes.contents
    assert (given.grid_x, given.grid_y, given.grid_z, given.block_x, given.stream) == (3, 5, 1, 64, 7)
    assert (given.num_attributes, attribute.which, attribute.value) == (follows, driver.PROGRAMMATIC, 1)
    assert (ctypes.sizeof(driver.LaunchAttribute), ctypes.sizeof(driver.LaunchConfig)) == (72, 56), (
        "as the driver has it"
    )


class Loader:
    """A libcuda that loads modules; notes how much shared memory launches may have."""

    def __init__(self) -> None:
        self.functions: list[bytes] = []
        self.limits: dict[bytes, tuple[int, int]] = {}

    def cuModuleLoadData(self, module: object, binary: bytes) -> int:
        """Load."""
        return 0

    def cuModuleGetFunction(self, function: Any, module: object, name: bytes) -> int:
        """Number the functions."""
        self.functions.append(name)
        function._obj.value = len(self.functions)
        return 0

    def cuFuncGetAttribute(self, value: Any, which: int, function: object) -> int:
        """As if the source declared so much shared memory."""
        value._obj.value = {driver.STATIC_SHARED: 16}[which]
        return 0

    def cuFuncSetAttribute(self, function: ctypes.c_void_p, which: int, value: int) -> int:
        """Allow so much shared memory."""
        assert function.value is not None
        self.limits[self.functions[function.value - 1]] = which, value
        return 0


@pytest.mark.parametrize(("capability", "early"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((12, 1), True)])
def test_what_is_loaded_is_ready_for_any_launch(
    capability: tuple[int, int], early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Hopper nobody begins early. Threads that launch with more and less shared memory share a kernel."""
    library, properties = Loader(), SimpleNamespace(shared_memory_per_block_optin=99 << 10)
    monkeypatch.setattr(driver, "_cuda", lambda: library)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    found = driver._loaded(0, CUBIN, *driver.CODE_KERNELS)
    assert {name for name, kernel in found.items() if kernel.follows} == (driver.FOLLOWING if early else set())
    assert library.limits == {name.encode(): (driver.MOST_SHARED, (99 << 10) - 16) for name in driver.CODE_KERNELS}


@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "8.0, this device has 7.5"), ((8, 0), None)])
def test_a_gpu_is_told_what_it_lacks(
    capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(driver, "_cuda", lambda: None)
    monkeypatch.setattr(driver, "has_nvcc", lambda: True)
    driver.unavailable.cache_clear()
    found = driver.unavailable(torch.device("cuda", 0))
    driver.unavailable.cache_clear()
    assert found == (reason and f"the CUDA kernels need compute capability {reason}")


@pytest.mark.parametrize(
    ("capability", "warps"), [((8, 0), 12), ((8, 6), 8), ((8, 9), 8), ((9, 0), 16), ((10, 3), 16), ((12, 1), 8)]
)
def test_warps_of_a_device_are_those_of_its_machine_code(
    capability: tuple[int, int], warps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        multi_processor_count=1,
        shared_memory_per_multiprocessor=100 << 10,
        shared_memory_per_block_optin=99 << 10,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert room.device_of.__wrapped__(torch.device("cuda", 0)).max_warps == warps


def test_who_may_begin_early_waits_in_its_source() -> None:
    text = compiler.source("codes.h")
    for kernel in driver.CODE_KERNELS:
        body = text.split(f" {kernel}(GIVEN")[1].split("\nKERNEL ")[0]
        assert ("await_launch_before();" in body) == (kernel in driver.FOLLOWING), kernel
