"""Builds the CPU kernels; everything else about the package is in pyproject.toml.

The library has a plain C interface and needs neither torch's headers nor Python's. Where it cannot be built the
installation goes on without it, and quantcache attends in plain torch.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels") / "quantcache_kernels" / "cpu" / "src"
X86 = platform.machine().lower() in ("x86_64", "amd64")

FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-pthread"]
# Which kernels run is decided when the library is loaded: each instruction set has a file of its own.
LEVEL_FLAGS = {
    "level_avx2": ["-mavx2", "-mfma"],
    "level_avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
if sys.platform == "linux":
    FLAGS += ["-Wno-psabi"]  # vectors never cross the library's interface


class BuildKernels(build_ext):
    """Compiles each instruction set's file with its own flags, several at a time."""

    def build_extensions(self) -> None:
        compile_one, compile_all = self.compiler._compile, self.compiler.compile
        begun: list[Future[None]] = []

        def begin(obj, src, ext, cc_args, extra_postargs, pp_opts):  # type: ignore[no-untyped-def]
            flags = [*extra_postargs, *LEVEL_FLAGS.get(Path(src).stem, [])]
            begun.append(pool.submit(compile_one, obj, src, ext, cc_args, flags, pp_opts))

        def compile_and_wait(*args, **kwargs):  # type: ignore[no-untyped-def]
            objects = compile_all(*args, **kwargs)
            for each in begun:
                each.result()  # raises what the compiler did
            return objects

        self.compiler._compile, self.compiler.compile = begin, compile_and_wait
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            super().build_extensions()


# The sources use the vector types of GCC and Clang, which Windows' own compiler lacks.
WINDOWS = sys.platform == "win32"
names = ["runtime", "level_plain", *(LEVEL_FLAGS if X86 else [])]
sanitize = os.environ.get("QUANTCACHE_SANITIZE")  # see `make asan`
extra = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"] if sanitize else []

setup(
    ext_modules=[]
    if WINDOWS
    else [
        Extension(
            "quantcache_kernels.cpu._native",
            sources=[str(SOURCES / f"{name}.cpp") for name in names],
            depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
            define_macros=[("QUANTCACHE_X86", "1")] if X86 else [],
            extra_compile_args=[*FLAGS, *extra],
            extra_link_args=["-pthread", *extra],
            libraries=["dl"] if sys.platform == "linux" else [],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={} if WINDOWS else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
