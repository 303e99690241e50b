"""The texts, calibrations and models that users name."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcache.cli.pages import WrongUsage
from quantcache.cli.reaching import expect_model, hub_problem, require_folder
from quantcache.cli.terminal import report
from quantcache.common.choices import DTYPES
from quantcache.common.errors import HubError, QuantCacheError, UnsupportedModel
from quantcache.common.jsonfile import MAX_RESULT_BYTES, parse_json
from quantcache.common.plaintext import read_utf8
from quantcache.common.progress import without_loading_bars
from quantcache.common.sources import OURS, model_source, source_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quantcache.artifact.calibration import Calibration


def read_text(path: Path) -> str:
    """Read a text file.

    Args:
        path: UTF-8 text file; or ``.jsonl``, objects with a ``text`` each.

    Returns:
        Its text, or its texts.

    Raises:
        QuantCacheError: The file is empty, not UTF-8 or not text, or a line of JSON has no text.
        OSError: The file cannot be read.
    """
    text = read_utf8(path.read_bytes(), path)
    if "\0" in text:
        raise QuantCacheError(f"{path} is not UTF-8 text: it holds null characters, as UTF-16 and binary files do")
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        text = "\n\n".join(_text_of(line, f"{path}, line {number}") for number, line in lines if line.strip())
    if not text or text.isspace():
        raise QuantCacheError(f"{path} is empty")
    return text


def _text_of(line: str, place: str) -> str:
    """The text of a line of JSON."""
    try:
        found = parse_json(line, MAX_RESULT_BYTES)["text"]
        if isinstance(found, str):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise QuantCacheError(
        f'{place} is not a JSON object with a "text": call the file .txt if it is to be read as it is'
    )


def load_calibration(name: str, bits: float | None = None, quality: str | None = None) -> Calibration:
    """Load a calibration; an error says what was looked for.

    Args:
        name: Folder, Hub id, or a model whose calibration comes with quantcache.
        bits: Mean code width; the calibration's own by default.
        quality: A word in place of ``bits``.

    Returns:
        The calibration, at these bits.

    Raises:
        QuantCacheError: The calibration is missing or malformed, or has no such rate.
        ValueError: Both ``bits`` and ``quality`` are given.
    """
    from quantcache.artifact.quality import at_quality, check_quality

    check_quality(quality, bits)
    found = _load_calibration(name)
    if quality is not None:
        return at_quality(found, quality)
    return found.with_bits(bits)


def _load_calibration(name: str) -> Calibration:
    """The calibration as it was saved."""
    from quantcache.artifact.calibration import Calibration
    from quantcache.artifact.index import bundled_calibrations

    require_folder(name)
    if not os.path.isdir(name) and name in bundled_calibrations():
        return Calibration.for_model(name)
    if "/" not in name and not os.path.exists(name):
        known = ", ".join(bundled_calibrations())
        raise QuantCacheError(
            f"cannot load calibration {name}: there is no such folder, quantcache comes with calibrations of {known} "
            "only, and one on the Hub is called OWNER/NAME"
        )
    if not os.path.exists(name):
        hub_problem()  # offline its client does not wait for retries
    try:
        return Calibration.from_pretrained(name)
    except (HubError, OSError, ValueError) as error:
        raise QuantCacheError(
            f"cannot load calibration {name}: there is no such folder, and from the Hub: {error}"
        ) from error


def own_calibration(model: str) -> str:
    """Where the calibration of a model is that is named without one.

    Args:
        model: Folder, GGUF file, Hub id, or a name that :mod:`quantcache.common.sources` knows.

    Returns:
        The model's own folder, or a name under which a calibration comes with quantcache.

    Raises:
        QuantCacheError: There is none. The message says how to make one.
    """
    from quantcache.artifact.calibration import SUBFOLDER
    from quantcache.artifact.files import CONFIG_NAME
    from quantcache.artifact.index import bundled_calibrations

    folder = Path(model)
    if any((place / CONFIG_NAME).is_file() for place in (folder, folder / SUBFOLDER)):
        return model
    known = bundled_calibrations()
    if model in known and not folder.is_dir():
        return model
    raise QuantCacheError(
        f"no calibration of {model} is in its folder or comes with quantcache (it has {', '.join(known)}): give "
        f"-c ARTIFACT; 'quantcache calibrate {shlex.quote(model)} --text FILE -o calibration/' makes one"
    )


def load_model(
    name: str,
    *,
    attention: str | None = "spectral",
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    encoders: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        name: Folder, GGUF file, Hub id, or a name that :mod:`quantcache.common.sources` knows.
        attention: Attention implementation; transformers' choice if None, and for a model that computes its own.
        device: Where to; ``"auto"`` spreads the model over devices; cuda if there is one by default.
        dtype: The model's dtype; float32 on a CPU and the checkpoint's elsewhere by default.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Allow model code from the Hub.
        encoders: Also load models without a cache, with transformers' choice of attention.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        QuantCacheError: The model is not a decoder-only language model, or a file that is none.
        OSError: The model cannot be found.
        ValueError: An argument makes no sense.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    import quantcache  # registers the attention
    from quantcache.common import compat

    del quantcache
    device, dtype = model_placement(device, dtype)
    source = find_model(name, revision)
    if Path(source).is_file():  # transformers would read a config.json, and then miss the tokenizer
        raise QuantCacheError(f"{name} is a file: a model is a folder, a .gguf file or a Hub id")
    more: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with quiet_unless_watched(), _naming(name):
        config = AutoConfig.from_pretrained(source, **more)
        compat.require_decoder(config)
        tokenizer = AutoTokenizer.from_pretrained(source, **more)
        encoder = encoders and compat.is_encoder(config)
        try:
            model = (AutoModel if encoder else compat.auto_class(config)).from_pretrained(
                source,
                config=config,
                dtype=dtype,
                attn_implementation=None if encoder else compat.attention_to_load(config, attention),
                device_map=device,
                **more,
            )
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            message = f"transformers has no causal language model of type {config.model_type}"
            raise UnsupportedModel(message) from error  # the original names every model it knows
    ours = source_name(source)
    if ours is not None:
        model.config._name_or_path = ours  # artifacts name it instead of a folder of this machine
    return model.eval(), tokenizer


def model_placement(device: str | None, dtype: str | None) -> tuple[str, str]:
    """Where a model goes, and in which dtype.

    Args:
        device: Where to; ``"auto"`` spreads the model over devices; cuda if there is one by default.
        dtype: The model's dtype; float32 on a CPU and the checkpoint's elsewhere by default.

    Returns:
        Both, as transformers takes them.

    Raises:
        ValueError: The device cannot be used, or there is no such dtype.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "auto":
        try:
            kind = torch.empty(0, dtype=torch.float32, device=device).device.type
            torch.zeros(1, dtype=torch.float32, device=device).item()
        except Exception as error:  # torch has a class of its own for every way a device can be missing
            message = (str(error).splitlines() or [type(error).__name__])[0]
            if message.startswith("Expected one of"):  # torch names every kind of device that it was ever built for
                message = "give cpu, cuda, cuda:N or auto"
            raise ValueError(f"device {device!r} cannot be used: {message}") from error
        device = kind if kind == "cpu" else device
    if dtype is None:
        dtype = "float32" if device.startswith("cpu") else "auto"
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16, float16 or auto, got {dtype!r}")
    return device, dtype


def require_backend(name: str, device: str | None) -> None:
    """Refuse a backend that cannot run where the model will be, before anything is read.

    Args:
        name: What ``--backend`` says.
        device: What ``--device`` says.

    Raises:
        ValueError: The device cannot be used.
        WrongUsage: The backend cannot.
    """
    if name == "auto":
        return
    import torch

    from quantcache import backends

    place = model_placement(device, None)[0]
    if place == "auto":
        place = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        backends.require_usable(name, torch.device(place))
    except QuantCacheError as error:
        raise WrongUsage(f"{error}: leave --backend out, or give another --device") from error


def find_model(name: str, revision: str | None = None) -> str | Path:
    """Find a model's files before anything else is done; of a GGUF file, say that it is being converted.

    Args:
        name: What the user calls the model.
        revision: Branch, tag or commit on the Hub.

    Returns:
        What ``from_pretrained`` takes.

    Raises:
        QuantCacheError: The model is of a package that is not installed, a GGUF file that cannot be converted, or
            nowhere to be found while the Hub cannot be asked.
        FileNotFoundError: The folder or file does not exist.
    """
    expect_model(name, revision)
    with quiet_unless_watched():
        return model_source(name, on_convert=lambda what: report("note", what))


@contextlib.contextmanager
def _naming(model: str) -> Iterator[None]:
    """Say in an error which model cannot be loaded: the Hub's own often do not."""
    try:
        yield
    except OSError as error:
        for weights in Path(model).glob("*.safetensors"):
            weights.open("rb").close()  # what cannot be opened is called missing
        # A name without a slash may be one of ours, misspelt.
        ours = "" if "/" in model or os.path.exists(model) else f"\n{OURS}"
        raise OSError(f"cannot load {model}: {error}{ours}") from error


def quiet_unless_watched() -> contextlib.AbstractContextManager[None]:
    """A context that spares the reader transformers' progress bars where stderr is no terminal."""
    return contextlib.nullcontext() if sys.stderr.isatty() else without_loading_bars()
