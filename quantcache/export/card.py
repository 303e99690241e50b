"""The model card of an export."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from quantcache.artifact.card import in_code, is_repo_id, metrics_table, plain_name

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


@dataclass(frozen=True)
class LogitDifference:
    """How far the logits of an export are from the original's, measured on text.

    Attributes:
        max_abs: Largest difference of a logit.
        scale: Largest logit of the original, in absolute value.
        kl_mean: Mean KL(original || export) per token in nats.
        top1_agreement: Share of tokens with the same most likely successor.
        tokens: Tokens measured on.
        dtype: The dtype both ran in.
    """

    max_abs: float
    scale: float
    kl_mean: float
    top1_agreement: float
    tokens: int
    dtype: str

    @property
    def relative(self) -> float:
        """Largest difference over largest logit."""
        return self.max_abs / self.scale if self.scale else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {**asdict(self), "relative": self.relative}

    def __str__(self) -> str:
        return (
            f"differ from the base model's by at most {self.max_abs:.2e} (largest logit {self.scale:.2f}), mean KL "
            f"{self.kl_mean:.1e} nats, top-1 agreement {self.top1_agreement:.2%}, over {self.tokens} tokens in "
            f"{self.dtype}"
        )


def render_export_card(
    *,
    base_model: dict[str, Any],
    repo_id: str | None,
    basis: str,
    mean_in_weights: bool,
    bits: float,
    total: float,
    difference: LogitDifference | None,
    inherited: dict[str, Any],
    metrics: list[dict[str, Any]] | None = None,
) -> str:
    """Render an export's card.

    Args:
        base_model: ``{"id", "revision"}`` of the model exported.
        repo_id: The export's own repository, if it is known.
        basis: ``spectral`` or ``flat``.
        mean_in_weights: Whether the biases took the mean of the values.
        bits: Mean code width of the calibration that comes with it.
        total: Bits per encoded element, gains included.
        difference: The measured difference of the logits; None where it was not measured.
        inherited: Header of the base model's card.
        metrics: Rows of a measured table, as ``quantcache eval --json`` gives them.

    Returns:
        Markdown with a YAML header.
    """
    model = base_model.get("id")
    header: dict[str, Any] = {"library_name": "quantcache"}
    if is_repo_id(model):
        header["base_model"] = model
    header |= {name: inherited[name] for name in _INHERITED if name in inherited}
    header["tags"] = ["kv-cache", "quantization", "quantcache", "transformers", f"{bits:g}-bit"]
    revision = base_model.get("revision")
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
        mean="in the biases" if mean_in_weights else "kept by the cache (the projections have no bias for it)",
        difference=difference or "not compared with the base model's",
        bits=bits,
        total=total,
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
