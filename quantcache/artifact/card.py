"""The model card that travels with a calibration."""

from __future__ import annotations

import re
from typing import Any

import yaml

from quantcache.common.plaintext import markdown

_BODY = """\
# KV-cache calibration for {model}

Constants with which quantcache stores the KV cache of `{model}` in
**{total:.3f} bits per element** ({bits:.2f} bits of codes, the rest per-token gains; bfloat16 takes 16).

```python
from quantcache import SpectralCache
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{model}", attn_implementation="spectral")
cache = SpectralCache.from_pretrained("{here}", config=model.config)
model.generate(**inputs, past_key_values=cache)
```

| recipe | |
|---|---|
{recipe}
{metrics}"""


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
    body = _BODY.format(
        model=plain_name(model, "your-model"),
        here=plain_name(repo_id, "path-or-hub-id"),
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
    return "\nMeasured through the real cache:\n\n" + "\n".join(lines) + "\n"
