"""Export: a model's folder rewritten with its value basis absorbed, complete or not at all."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from quantcache import data
from quantcache.artifact import hub
from quantcache.artifact.calibration import SUBFOLDER, Calibration
from quantcache.artifact.files import ARTIFACT_FILES
from quantcache.artifact.identity import other_projection
from quantcache.common import compat
from quantcache.common.ambient import standard_settings
from quantcache.common.choices import Basis
from quantcache.common.errors import CalibrationWarning, QuantCacheError
from quantcache.common.sequences import text_tokens
from quantcache.common.writing import partial_folder
from quantcache.export.card import card_header, render_export_card
from quantcache.export.checkpoint import Checkpoint
from quantcache.export.model import absorbed_calibration, changed_tensors, check, layer_maps, require_finite
from quantcache.export.projections import find_projections
from quantcache.export.report import ExportReport, LogitDifference

logger = logging.getLogger(__name__)

RECORD_NAME = "export.json"
RECORD_FORMAT = "quantcache-export"

WEIGHT_PATTERNS = [
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf"),
    *("*.tflite", "*.ot", "*.index.json"),
]
"""Weights in whatever format: those that are not rewritten are left out, since they have not absorbed anything."""

DOWNLOAD_IGNORE = [p for p in WEIGHT_PATTERNS if p not in ("*.safetensors", "*.index.json")]

STALE = ("model*.safetensors", "pytorch_model*.bin", "*.index.json", *ARTIFACT_FILES)
"""What a repository may have from before an export that would be loaded in its place: weights in one file rather than
shards, and a calibration at its root, which is the original's."""

VERIFY_TOKENS = 256

Progress = Callable[[str, int, int], None]
"""Told what is being done, and how many bytes of how many are done."""


@standard_settings()
def export_checkpoint(
    model: str | Path,
    calibration: Calibration,
    output: str | Path,
    *,
    basis: Basis = "spectral",
    verify: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    repo_id: str | None = None,
    metrics: list[dict[str, Any]] | None = None,
    on_progress: Progress | None = None,
) -> ExportReport:
    """Write a model with the value basis of its calibration folded into its weights.

    The result loads with plain ``AutoModelForCausalLM.from_pretrained`` and computes what the model computes. It
    carries the matching calibration, so that ``SpectralCache.from_pretrained(output)`` works. Shards are rewritten one
    tensor at a time; everything else of the folder is copied. Nothing appears at ``output`` before all of it is done.

    Args:
        model: Folder or Hub id of a model with safetensors weights.
        calibration: Calibration of the model as it is.
        output: Folder to write; it must not exist, or be empty. The folder around it must exist.
        basis: ``spectral`` for SpectralCache, ``flat`` for quantizers with one step per token.
        verify: Load the model and then the export, and compare their logits.
        revision: Hub branch, tag or commit.
        token: Hub access token; by default that of the login.
        cache_dir: Hub cache folder.
        local_files_only: Never go to the network.
        repo_id: The export's own repository, for its card.
        metrics: Rows of a measured table for its card.
        on_progress: Called with a phase, what is done of it, and how much there is.

    Returns:
        What was done.

    Raises:
        UnsupportedModel: The architecture is unknown, or the weights are quantized.
        CalibrationMismatch: The calibration is for another geometry. Of another model a warning says so.
        HubError: The model cannot be downloaded.
        QuantCacheError: The weights or the config are malformed, the model is an export or an adapter, the calibration
            is an export's, or ``output`` is taken or cannot be made.
        ValueError: The basis is unknown.
    """
    tell = on_progress or (lambda what, done, total: None)
    output = Path(output)
    place = Path(os.path.realpath(output))
    # Cut, so that there is room for more: a name may have 255 bytes.
    prefix = f".{os.fsdecode(os.fsencode(place.name)[:128])}-partial-"
    _require_free(output, place, prefix)
    folder, base_model = _locate(model, revision, token, cache_dir, local_files_only)
    config = _config(folder)
    base_model["model_type"] = config.model_type
    _require_plain(folder)
    check(config, calibration, basis)
    checkpoint = Checkpoint(folder)
    _name_or_warn(base_model, folder, calibration, checkpoint)
    projections = find_projections(config, calibration, checkpoint.tensors)
    maps = layer_maps(calibration, projections, basis, checkpoint.tensors)

    # A folder that is there may be where another file system is mounted, and cannot be renamed over then.
    with partial_folder(place if place.is_dir() else place.parent, prefix) as partial:
        left_out = _copy_others(folder, partial, checkpoint)
        count = 0
        sizes = [(folder / shard).stat().st_size for shard in checkpoint.shards]
        for number, shard in enumerate(checkpoint.shards):
            tell(f"writing {shard}", sum(sizes[:number]), sum(sizes))
            shutil.copyfile(folder / shard, partial / shard)
        for number, (index, found) in enumerate(projections.items()):
            tell(f"absorbing layer {index}", number, len(projections))
            for name, tensor in changed_tensors(found, maps[index], checkpoint.read):
                require_finite(name, tensor)
                checkpoint.write(partial, name, tensor)
                count += 1
        absorbed = absorbed_calibration(calibration, maps, projections, basis, Checkpoint(partial).find)
        difference = None
        if verify:
            tell("comparing logits", 0, 1)
            difference = compare_logits(folder, partial)
        report = ExportReport(
            output=output,
            base_model=base_model,
            basis=basis,
            layers=len(projections),
            tensors=count,
            shards=len(checkpoint.shards),
            mean_in_weights=all(p.takes_mean for p in projections.values()),
            keys_scaled=sum(m.keys is not None for m in maps.values()),
            left_out=left_out,
            difference=difference,
            calibration=absorbed,
        )
        _write_extras(partial, report, card_header(folder / "README.md"), repo_id, metrics)
        _put_in_place(partial, place)
    return report


def _put_in_place(partial: Path, place: Path) -> None:
    """Rename a whole export into place; into a folder that is there, file by file."""
    if not place.is_dir():
        os.replace(partial, place)
        return
    names = [path.name for path in partial.iterdir()]
    try:
        for name in names:
            os.replace(partial / name, place / name)
    except BaseException:
        for name in names:
            if os.path.lexists(place / name):
                os.replace(place / name, partial / name)  # to be cleared away with the rest
        raise


def compare_logits(original: Path, export: Path) -> LogitDifference:
    """Measure how far an export's logits are from the original's; one model is in memory at a time.

    Args:
        original: The model's folder.
        export: Folder of the export.

    Returns:
        The difference.
    """
    first, dtype = _logits(original)
    second, _ = _logits(export)
    a, b = first.log_softmax(-1), second.log_softmax(-1)
    return LogitDifference(
        max_abs=float((first - second).abs().max()),
        scale=float(first.abs().max()),
        kl_mean=float((a.exp() * (a - b)).sum(-1).mean()),
        top1_agreement=float((first.argmax(-1) == second.argmax(-1)).double().mean()),
        tokens=first.shape[0],
        dtype=str(dtype).removeprefix("torch."),
    )


def _logits(folder: Path) -> tuple[Tensor, torch.dtype]:
    """Logits ``[T, V]`` of some text in float64, in the checkpoint's own dtype and without a cache."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.eval()
    text_config = model.config.get_text_config(decoder=True)
    count = min(VERIFY_TOKENS, compat.position_limit(model.config) or VERIFY_TOKENS)
    ids = _text_tokens(folder, count)
    if ids.shape[1] < count or int(ids.max()) >= text_config.vocab_size:
        ids = torch.randint(
            0,
            text_config.vocab_size,
            (1, count),
            generator=torch.Generator().manual_seed(0),
            dtype=torch.int64,
            device="cpu",
        )
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0].double(), model.dtype


def _text_tokens(folder: Path, count: int) -> Tensor:
    """Tokens of the bundled text, ``[1, T]``; none where the folder has no tokenizer, or one without words."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever is wrong with it, it is copied as it is and matters for this comparison only
        logger.info("comparing on random tokens: %s has no tokenizer (%s)", folder, error)
        return torch.empty(1, 0, dtype=torch.int64, device="cpu")
    return text_tokens(tokenizer, data.evaluation_text(), count)[None]


def _require_free(output: Path, place: Path, prefix: str) -> None:
    taken = place.exists() and not place.is_dir()
    if taken or (place.is_dir() and any(not path.name.startswith(prefix) for path in place.iterdir())):
        raise QuantCacheError(f"{output} exists already: give a folder that does not, or an empty one")
    if not place.parent.is_dir():
        raise QuantCacheError(f"there is no folder {place.parent} to write {place.name} into")


def _locate(
    model: str | Path,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> tuple[Path, dict[str, Any]]:
    """A model's folder; id and revision where it comes from the Hub."""
    if os.path.isdir(model):
        return Path(model), {"id": None, "revision": None}
    repo_id = hub.require_repo_id(model)
    folder = hub.download_model(
        repo_id,
        revision=revision,
        ignore=[*DOWNLOAD_IGNORE, "original/*"],
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    return folder, {"id": repo_id, "revision": folder.name}


def _config(folder: Path) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, StrictDataclassError) as error:
        message = " ".join(str(error).split())
        raise QuantCacheError(f"transformers cannot read the config in {folder}: {message}") from error
    return config


def _require_plain(folder: Path) -> None:
    """Refuse folders that are more than a model."""
    record = folder / SUBFOLDER / RECORD_NAME
    if record.exists():
        raise QuantCacheError(f"{folder} is an export already ({SUBFOLDER}/{RECORD_NAME}): export its base model")
    if (folder / "adapter_config.json").exists():
        raise QuantCacheError(f"{folder} holds an adapter (adapter_config.json): merge it into the model first")


def _name_or_warn(base_model: dict[str, Any], folder: Path, calibration: Calibration, weights: Checkpoint) -> None:
    """Name a local model, after its calibration's where the folder is named like it; warn where the two differ."""
    theirs = calibration.metadata.base_model
    name = folder.resolve().name
    if base_model["id"] is None:
        same = str(theirs.get("id") or "").rpartition("/")[2] == name
        base_model["id"] = theirs["id"] if same and not os.path.isabs(theirs["id"]) else name
    # Exactness does not depend on the calibration, but what it is good for does.
    for key in ("id", "revision"):
        ours, other = base_model[key], theirs.get(key)
        if ours and other and ours != other and not os.path.isabs(other):
            warnings.warn(f"the calibration's {key} is {other}, the model's is {ours}", stacklevel=3)
    differs = other_projection(theirs, weights.find)
    if differs:
        message = f"the calibration was made for another model: the weights of {differs} differ"
        warnings.warn(f"{message}. Is this model an export, or trained further?", CalibrationWarning, stacklevel=3)


def _copy_others(folder: Path, partial: Path, checkpoint: Checkpoint) -> list[str]:
    """Copy everything but weights, calibrations and the card; gives the weights that are left out."""
    left_out = []
    own = {*checkpoint.shards, *ARTIFACT_FILES, "README.md"}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or relative.parts[0] == SUBFOLDER or any(p.startswith(".") for p in relative.parts):
            continue
        if str(relative) in own:
            continue
        is_index = str(relative) == "model.safetensors.index.json"
        if not is_index and any(fnmatch.fnmatch(path.name, pattern) for pattern in WEIGHT_PATTERNS):
            left_out.append(str(relative))
            continue
        (partial / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, partial / relative)
    return left_out


def _write_extras(
    partial: Path,
    report: ExportReport,
    inherited: dict[str, Any],
    repo_id: str | None,
    metrics: list[dict[str, Any]] | None,
) -> None:
    """The calibration, the record and the card of an export."""
    report.calibration.save_pretrained(partial / SUBFOLDER)
    (partial / SUBFOLDER / "README.md").unlink()  # the export's own card says how to use both together
    record = {
        "format": RECORD_FORMAT,
        "schema_version": "1.0",
        "base_model": report.base_model,
        "basis": report.basis,
        "value_mean": "weights" if report.mean_in_weights else "cache",
        "layers": list(report.calibration.layers),
        "tensors": report.tensors,
        "keys_scaled": report.keys_scaled,
        "logits": None if report.difference is None else report.difference.to_dict(),
        "environment": compat.versions(),
    }
    (partial / SUBFOLDER / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    card = render_export_card(report, inherited, repo_id, metrics)
    (partial / "README.md").write_text(card, "utf-8")
