"""The model card that travels with a calibration."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from quantcache.common.errors import ArtifactError
from quantcache.common.plaintext import markdown
from quantcache.common.sources import PACKAGED
from quantcache.data import BUNDLED_MODEL

_BODY = """\
# KV-cache calibration for {model}

Constants with which quantcache stores the KV cache of `{model}` in
**{total:.3f} bits per element** ({bits:.2f} bits of codes, the rest per-token gains; bfloat16 takes 16).

```python
{imports}

name = {name}
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="spectral")
tokenizer = AutoTokenizer.from_pretrained(name)
cache = SpectralCache.from_pretrained({here}, model=model){where}
inputs = tokenizer("The city of Leiden", return_tensors="pt").to(model.device)
output = model.generate(**inputs, past_key_values=cache, max_new_tokens=50)
print(tokenizer.decode(output[0]))
```

| recipe | |
|---|---|
{recipe}
{metrics}"""

_MEASURED = "Measured through the real cache:"


def render_card(
    config: dict[str, Any],
    bits: float,
    total: float,
    metrics: list[dict[str, Any]] | None = None,
    repo_id: str | None = None,
) -> str:
    """Render a calibration's card.

    Args:
        config: The artifact's JSON.
        bits: Mean code width in bits.
        total: Bits per encoded element, gains included.
        metrics: Rows of a measured table, as the evaluation writes them; their keys are the columns.
        repo_id: The calibration's own repository, if it is known.

    Returns:
        Markdown with a YAML header.
    """
    model = config["base_model"].get("id")
    header: dict[str, Any] = {
        "library_name": "quantcache",
        "license": "apache-2.0",
        "tags": ["kv-cache", "quantization", "quantcache", f"{bits:g}-bit"],
    }
    if is_repo_id(model):
        header["base_model"] = model
    shown = {key: value for key, value in config["recipe"].items() if key not in ("passages", "yardstick")}
    recipe = "\n".join(f"| {markdown(key)} | {markdown(value)} |" for key, value in shown.items())
    imports, name = _loaded(model)
    here, where = in_code(repo_id)
    body = _BODY.format(
        model=plain_name(model, "your-model"),
        imports=imports,
        name=name,
        here=here,
        where=where,
        bits=bits,
        total=total,
        recipe=recipe,
        metrics=metrics_table(metrics),
    )
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n{body}"


def is_repo_id(model: str | None) -> bool:
    """Whether a model's name is one that the Hub can link to: an owner and a name."""
    return bool(model) and re.fullmatch(r"[\w.-]+/[\w.-]+", str(model), re.ASCII) is not None


def plain_name(name: str | None, otherwise: str) -> str:
    """A model's name where it can stand in code and in text as it is.

    Args:
        name: The name, as an artifact has it.
        otherwise: What to write in its place.

    Returns:
        One of both.
    """
    return name if name and re.fullmatch(r"[\w./-]+", name, re.ASCII) else otherwise


def in_code(repo_id: str | None) -> tuple[str, str]:
    """What ``from_pretrained`` takes for what a card lies beside, as the card's code has it.

    Args:
        repo_id: The Hub repository, if it is known.

    Returns:
        A literal, and a comment to come behind it: the repository, else the folder that the code is run in.
    """
    name = plain_name(repo_id, ".")
    return f'"{name}"', "  # the folder of this card" if name == "." else ""


def _loaded(model: str | None) -> tuple[str, str]:
    """The imports of a card's code, and its expression for a model's source."""
    plain = f'"{plain_name(model, "your-model")}"'
    imports = ["from quantcache import SpectralCache"]
    if model == BUNDLED_MODEL or model in PACKAGED:
        imports.append("from quantcache.common.sources import model_source")
        plain = f"model_source({plain})"
    elif not is_repo_id(model):
        plain += "  # its folder or Hub id"
    return "\n".join([*imports, "from transformers import AutoModelForCausalLM, AutoTokenizer"]), plain


def is_untouched(path: Path, written: Callable[[], str]) -> bool:
    """Whether a card is as it was written with a calibration, with a table of measurements or without.

    Args:
        path: The card.
        written: Gives the text without measurements.

    Returns:
        False where it says anything else, or the calibration cannot be read.
    """
    try:
        text, found = written(), path.read_text("utf-8")
    except (ArtifactError, OSError, UnicodeDecodeError):
        return False
    rest = found.removeprefix(text)
    table = rf"\n{_MEASURED}\n\n(\|[^\n]*\n)*"
    return found.startswith(text) and (not rest or re.fullmatch(table, rest) is not None)


def metrics_table(metrics: list[dict[str, Any]] | None) -> str:
    """A card's table of measurements.

    Args:
        metrics: Its rows; their keys are the columns.

    Returns:
        Markdown; empty without rows.
    """
    if not metrics:
        return ""
    columns = list(metrics[0])
    lines = ["| " + " | ".join(map(markdown, columns)) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(markdown(row.get(column, "")) for column in columns) + " |" for row in metrics]
    return f"\n{_MEASURED}\n\n" + "\n".join(lines) + "\n"
