"""Recipes: everything that determines the result of a calibration, in one YAML file.

The recipes of popular models come with quantcache (``calibrations/recipes/``).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from quantcache import data
from quantcache.coding.allocation import check_rate
from quantcache.coding.schema import SideBits
from quantcache.common.choices import DTYPES, METRICS, Dtype, Metric
from quantcache.common.defaults import RESIDUAL_LENGTH
from quantcache.common.errors import QuantCacheError
from quantcache.common.plaintext import read_utf8

MAX_BYTES = 64 << 10
"""Size of a recipe that is read; one has some hundred bytes."""


def check_metric(name: str) -> None:
    """Refuse a metric that there is not.

    Args:
        name: What it is called.

    Raises:
        ValueError: No metric has this name.
    """
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")


@dataclass(frozen=True)
class Recipe:
    """How to calibrate one model.

    Attributes:
        model: Folder, GGUF file, Hub id, or a name such as ``wiki11m``.
        revision: Branch, tag or commit of the model; None for its default branch.
        text: ``{"bundled": NAME, "sha256": ...}``, or ``{"files": {PATH: SHA256}}`` relative to the recipe.
        tokens: Tokens to use at most.
        seq_len: Tokens in a sequence.
        bits: Mean code width in bits.
        key_bits: Separate bits for the keys, ``"dense"`` or ``"joint"``.
        value_bits: The same for the values.
        min_bits: Smallest width of any coefficient.
        metric: ``fisher``, ``query`` or ``identity``.
        seed: Seed of the sampled labels.
        dtype: The dtype that the model runs in.
        path: Where the recipe was read from.
        residual_length: Recent tokens that caches will keep as they are; recipes may leave it out.
    """

    model: str
    revision: str | None
    text: dict[str, Any]
    tokens: int
    seq_len: int
    bits: float
    key_bits: float | str
    value_bits: float | str
    min_bits: int
    metric: Metric
    seed: int
    dtype: Dtype
    path: Path
    residual_length: int = RESIDUAL_LENGTH

    def texts(self) -> list[str]:
        """The texts to calibrate on.

        Returns:
            One for each file.

        Raises:
            QuantCacheError: A file is missing, or is not the one that the recipe was written for.
        """
        if "bundled" in self.text:
            wanted = {data.text_path(self.text["bundled"]): self.text["sha256"]}
        else:
            wanted = {self.path.parent / name: digest for name, digest in self.text["files"].items()}
        found = []
        for path, digest in wanted.items():
            try:
                content = path.read_bytes()
            except OSError as error:
                raise QuantCacheError(f"{self.path}: {path}: {error.strerror}") from error
            actual = hashlib.sha256(content).hexdigest()
            if actual != digest:
                raise QuantCacheError(f"{self.path}: {path} has SHA-256 {actual}, the recipe says {digest}")
            found.append(read_utf8(content, path))
        return found

    def side_bits(self, side: str) -> SideBits:
        """The bits of ``"key"`` or ``"value"``, as ``calibrate`` takes them."""
        own = self.key_bits if side == "key" else self.value_bits
        return own if isinstance(own, str) else float(own)  # type: ignore[return-value]


def recipe_names() -> list[str]:
    """Names of the recipes that come with quantcache."""
    return sorted(path.stem for path in (data.calibrations_path() / "recipes").glob("*.yaml"))


def load_recipe(name: str | Path) -> Recipe:
    """Read and check a recipe.

    Args:
        name: A file, or the name of a recipe that comes with quantcache.

    Returns:
        The recipe.

    Raises:
        QuantCacheError: The recipe is unknown or malformed.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = data.calibrations_path() / "recipes" / f"{name}.yaml"
        if str(name) not in recipe_names():
            message = f"unknown recipe {name}: give a .yaml file, or one of {', '.join(recipe_names())}"
            raise QuantCacheError(message)
    try:
        content = _read_yaml(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise QuantCacheError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise QuantCacheError(f"{path} must be a mapping, got {type(content).__name__}")
    known = {field.name for field in fields(Recipe)} - {"path"}
    needed = known - {"residual_length"}
    for problem, keys in (("lacks", needed - content.keys()), ("has unknown keys", content.keys() - known)):
        if keys:
            raise QuantCacheError(f"{path} {problem} {', '.join(sorted(map(str, keys)))}")
    _check(path, content)
    return Recipe(**content, path=path)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without references: a few of them stand for more than any memory, or for themselves."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse references and repeated keys."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases such as *{self.peek_event().anchor} are not supported: write the value out")
        node: yaml.Node | None = super().compose_node(parent, index)
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
            if twice is not None:
                raise yaml.YAMLError(f"it says {twice} twice")
        return node


def _read_yaml(path: Path) -> Any:
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
    try:
        return yaml.load(content.decode("utf-8"), _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _check(path: Path, content: dict[str, Any]) -> None:
    def require(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise QuantCacheError(f"{path}: {name} must be {expected}, got {content[name]!r:.200}")

    def is_number(value: Any, kind: type | tuple[type, ...] = int) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool)

    require("model", isinstance(content["model"], str) and bool(content["model"]), "a folder or Hub id")
    require("revision", content["revision"] is None or isinstance(content["revision"], str), "a string or null")
    for name in ("tokens", "seq_len"):
        require(name, is_number(content[name]) and 0 < content[name] < 1 << 40, "a positive integer")
    if "residual_length" in content:
        residual = content["residual_length"]
        require("residual_length", is_number(residual) and 0 <= residual < 1 << 30, "an integer of at least 0")
    require("seed", is_number(content["seed"]) and content["seed"] >= 0, "an integer of at least 0")
    require("seed", content["seed"] < 1 << 63, "an integer below 2^63")
    require("min_bits", is_number(content["min_bits"]) and 0 <= content["min_bits"] <= 8, "an integer from 0 to 8")
    require("metric", content["metric"] in METRICS, f"one of {', '.join(METRICS)}")
    require("dtype", content["dtype"] in DTYPES, f"one of {', '.join(DTYPES)}")
    for name, words in (("bits", ()), ("key_bits", ("joint", "dense")), ("value_bits", ("joint", "dense"))):
        value = content[name]
        expected = " or ".join(["a number from min_bits to 8", *words])
        require(name, value in words if isinstance(value, str) else is_number(value, (int, float)), expected)
        if not isinstance(value, str):
            try:
                check_rate(float(value), content["min_bits"])
            except ValueError:
                require(name, False, expected)
    _check_text(path, content["text"])


def _check_text(path: Path, text: Any) -> None:
    keys = set(text) if isinstance(text, dict) else set()
    if keys == {"bundled", "sha256"} and all(isinstance(value, str) for value in text.values()):
        return
    files = text["files"] if keys == {"files"} else None
    if isinstance(files, dict) and files and all(isinstance(item, str) for pair in files.items() for item in pair):
        return
    raise QuantCacheError(
        f"{path}: text must be {{bundled: NAME, sha256: DIGEST}} or {{files: {{PATH: DIGEST, ...}}}}, got {text!r:.200}"
    )
