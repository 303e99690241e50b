"""The model card of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from quantcache.artifact.card import in_code, is_repo_id, metrics_table, plain_name
from quantcache.export.report import ExportReport

_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")

_BASES = {
    "spectral": "Cached values are the coefficients that quantcache codes, so its cache needs no value transform at "
    "run time. Of use only together with `SpectralCache`.",
    "flat": "Cached values carry the same energy in every coordinate and rotary pairs of keys are balanced, for "
    "quantizers with one step per token. `SpectralCache` works on it too.",
}

_BODY = """\
# {title}

`{model}` with a basis of its key/value cache folded into the projections around it (`{basis}`). {meaning}
It computes what `{model}` computes, in plain transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({here}){where}
tokenizer = AutoTokenizer.from_pretrained({here})
```

With quantcache, its cache takes **{total:.3f} bits per element** ({bits:.2f} bits of codes, the rest per-token gains):

```python
from quantcache import SpectralCache

model = AutoModelForCausalLM.from_pretrained({here}, attn_implementation="spectral")
cache = SpectralCache.from_pretrained({here}, model=model)
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
output = model.generate(**inputs, past_key_values=cache, max_new_tokens=50)
print(tokenizer.decode(output[0]))
```

| | |
|---|---|
| base model | `{model}`{revision} |
| method | value basis `{basis}` of quantcache, computed in float64 and rounded once to the checkpoint's dtype |
| mean of the values | {mean} |
| logits | {difference} |
{metrics}"""


def render_export_card(
    report: ExportReport,
    inherited: dict[str, Any],
    repo_id: str | None = None,
    metrics: list[dict[str, Any]] | None = None,
) -> str:
    """Render an export's card.

    Args:
        report: What the export did.
        inherited: Header of the base model's card.
        repo_id: The export's own repository, if it is known.
        metrics: Rows of a measured table, as ``quantcache eval --json`` gives them.

    Returns:
        Markdown with a YAML header.
    """
    basis, bits = report.basis, report.calibration.bits
    model = report.base_model.get("id")
    header: dict[str, Any] = {"library_name": "quantcache"}
    if is_repo_id(model):
        header["base_model"] = model
    header |= {name: inherited[name] for name in _INHERITED if name in inherited}
    header["tags"] = ["kv-cache", "quantization", "quantcache", "transformers", f"{bits:g}-bit"]
    revision = report.base_model.get("revision")
    title = repo_id or f"{plain_name(model, 'model').rpartition('/')[2]}, {basis} basis"
    here, where = in_code(repo_id)
    body = _BODY.format(
        title=title,
        model=plain_name(model, "the base model"),
        revision=f" at `{plain_name(revision, 'a commit')}`" if revision else "",
        basis=basis,
        meaning=_BASES[basis],
        here=here,
        where=where,
        mean="in the biases" if report.mean_in_weights else "kept by the cache (the projections have no bias for it)",
        difference=report.difference or "not compared with the base model's",
        bits=bits,
        total=report.calibration.bits_per_element,
        metrics=metrics_table(metrics),
    )
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n{body}"


def card_header(path: Path) -> dict[str, Any]:
    """The YAML header of a card.

    Args:
        path: A ``README.md``.

    Returns:
        Its header; empty where there is none, or none that can be read.
    """
    try:
        parts = path.read_text("utf-8").split("---\n", 2)
        header = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return header if isinstance(header, dict) else {}
