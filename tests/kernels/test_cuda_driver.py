"""What the CUDA driver's part does without a GPU: compiling, what it keeps on disk, and which thread may launch."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantcache_kernels.cuda import driver

CUBIN = b"\x7fELF machine code"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """NVRTC is not asked; yields what it would have been asked for."""
    seen: list[str] = []

    def compile_it(text: str, options: tuple[str, ...]) -> bytes:
        seen.append(options[0])
        return CUBIN

    monkeypatch.setattr(driver, "_compile_by_nvrtc", compile_it)
    return seen


def test_machine_code_is_compiled_once(
    compilations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTCACHE_CUDA_CACHE", str(tmp_path))
    assert [driver.compiled_conversion((9, 0)) for _ in range(2)] == [CUBIN] * 2
    assert compilations == ["--gpu-architecture=sm_90"]
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert kept.stat().st_mode & 0o777 == 0o644, "another user of the folder may read it"
    for broken in (b"", CUBIN[:3]):
        kept.write_bytes(broken)
        assert driver.compiled_conversion((9, 0)) == CUBIN
        assert kept.read_bytes() == CUBIN
    assert len(compilations) == 3


def test_a_user_without_a_home_compiles_every_time(compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("QUANTCACHE_CUDA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert [driver.compiled_conversion((9, 0)) for _ in range(2)] == [CUBIN] * 2
    assert len(compilations) == 2


def test_a_folder_that_may_not_be_read_is_passed_over(
    compilations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setenv("QUANTCACHE_CUDA_CACHE", str(tmp_path))
    for name in ("stat", "read_bytes", "mkdir"):  # root may read everything
        monkeypatch.setattr(Path, name, refused)
    assert driver.compiled_conversion((9, 0)) == CUBIN
    assert len(compilations) == 1
