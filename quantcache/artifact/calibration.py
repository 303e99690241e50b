"""The calibration artifact: the constants a model's cache needs, as safetensors and JSON, on disk or on the Hub.

A folder holds ``calibration.safetensors`` (tensors), ``calibration_config.json`` (everything else) and ``README.md``
(the card). Names are chosen so that the artifact can lie inside a model's own folder. Shape legend: H is the layer's
number of key/value heads (Hkv), D the dimension of a key or a value.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelHubMixin
from transformers import PreTrainedConfig

from quantcache.accounting.memory import bits_per_encoded_element
from quantcache.artifact import cache_layout, hub
from quantcache.artifact.card import is_untouched, render_card
from quantcache.artifact.files import ARTIFACT_FILES, CONFIG_NAME, DIGEST, TENSORS_NAME, from_files, to_files
from quantcache.artifact.identity import check_identity
from quantcache.artifact.index import bundled_index, find_entry, no_such_folder, read_index
from quantcache.artifact.synthetic import random_constants
from quantcache.coding.allocation import allocate_layers, check_rates
from quantcache.coding.schema import CodecSettings, Coding, LayerCalibration, Metadata, Rate, SideBits
from quantcache.common import compat
from quantcache.common.errors import ArtifactError, CalibrationMismatch
from quantcache.common.tensor_file import save_file
from quantcache.common.units import show_bits
from quantcache.common.writing import only_writer, partial_folder, put_together, steadily

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUBFOLDER = "quantcache"
"""Where a model's own folder or repository carries its calibration."""


class Calibration(ModelHubMixin, library_name="quantcache", tags=["kv-cache", "quantization"], license="apache-2.0"):
    """Per-model constants of the spectral KV cache.

    Args:
        layers: Constants of every compressed layer, by layer index.
        metadata: Provenance, codec settings and bits.
    """

    def __init__(self, layers: dict[int, LayerCalibration], metadata: Metadata):
        self.layers = dict(sorted(layers.items()))
        self.metadata = metadata
        # Codecs built from this calibration, by layer, side and device: all caches of a model share its constants.
        self.codecs: dict[tuple[int, str, str], Any] = {}
        self.shards: dict[tuple[int, int], Calibration] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What copies and other processes get."""
        return {"layers": self.layers, "metadata": self.metadata, "codecs": {}, "shards": {}}

    def __repr__(self) -> str:
        model = self.metadata.base_model.get("id") or self.metadata.base_model.get("model_type") or "unknown model"
        return f"Calibration({model}, {len(self.layers)} layers, {show_bits(self.bits)})"

    @property
    def bits(self) -> float:
        """Mean code width in bits over all coded dimensions (0 when every side is dense)."""
        coded = [s.widths for layer in self.layers.values() for s in (layer.key, layer.value) if s.widths is not None]
        elements = sum(w.numel() for w in coded)
        return sum(int(w.sum()) for w in coded) / elements if elements else 0.0

    @property
    def bits_per_element(self) -> float:
        """Bits per encoded element with codes and gains counted."""
        return bits_per_encoded_element(self.layers)

    # ------------------------------------------------------------------ rates

    def with_bits(
        self,
        bits: float | None = None,
        *,
        key_bits: SideBits | None = None,
        value_bits: SideBits | None = None,
        min_bits: int | None = None,
    ) -> Calibration:
        """Allocate other bits from the stored spectra, without recalibrating. What is not given stays as it is.

        Args:
            bits: Mean code width in bits, 0 to 8, fractional allowed.
            key_bits: Separate bits for the keys, ``"dense"`` to leave them uncompressed, or ``"joint"``.
            value_bits: The same for the values.
            min_bits: Smallest width given to any dimension.

        Returns:
            A calibration that shares this one's transforms; this one itself where nothing is given.

        Raises:
            ValueError: A number of bits is outside ``[min_bits, 8]``, or ``bits`` alone is given and both sides have
                bits of their own, which it would not change.
        """
        rate = self.metadata.rate.given(bits=bits, key_bits=key_bits, value_bits=value_bits, min_bits=min_bits)
        if bits is not None and key_bits is None and value_bits is None and not rate.shared:
            raise ValueError(
                f"bits={bits!r} changes nothing: this calibration has key_bits={rate.key_bits!r} and "
                f"value_bits={rate.value_bits!r}; give those, or 'joint' for a side that is to share the bits"
            )
        return self if rate is self.metadata.rate else self.with_rate(rate)

    def with_rate(self, rate: Rate) -> Calibration:
        """Allocate at a rate, whatever the present one.

        Args:
            rate: The whole of it: what it leaves out is joint, with no smallest width.

        Returns:
            A calibration that shares this one's transforms.

        Raises:
            ValueError: A number of bits is outside ``[min_bits, 8]``.
        """
        check_rates(rate)
        rate = replace(rate, bits=float(rate.bits))
        layers = allocate_layers(self.layers, rate, self.metadata.codec, self.metadata.joint)
        return Calibration(layers, replace(self.metadata, rate=rate))

    def with_coding(self, coding: Coding, passes: int | None = None) -> Calibration:
        """Let codes mean something else, at the same bits and without recalibrating.

        Args:
            coding: ``"scalar"`` or ``"trellis"``.
            passes: How often encoding seeks the best paths through a trellis; None for as often as now. A second time
                makes encoding slower and the error 1.5 % smaller; decoding does not change.

        Returns:
            A calibration that shares this one's transforms, allocated anew.

        Raises:
            SettingsError: ``coding`` is not one of these, or ``passes`` out of range.
        """
        passes = self.metadata.codec.passes if passes is None else passes
        codec = replace(self.metadata.codec, coding=coding, passes=passes)
        return Calibration(self.layers, replace(self.metadata, codec=codec)).with_rate(self.metadata.rate)

    def shard(self, rank: int, size: int) -> Calibration:
        """The constants of one process's heads under tensor parallelism, which gives out heads in contiguous runs.

        Args:
            rank: The process's place among those that share the heads.
            size: How many share them.

        Returns:
            A calibration of this one's layers, bits and metadata with 1/size of the heads; made once.

        Raises:
            CalibrationMismatch: The heads cannot be shared out evenly.
            ValueError: There is no such place among so many.
        """
        if not 0 <= rank < size:
            raise ValueError(f"rank must lie between 0 and {size - 1}, got {rank}")
        if (rank, size) not in self.shards:
            layers = {}
            for index, layer in self.layers.items():
                if layer.key.num_heads % size or layer.value.num_heads % size:
                    raise CalibrationMismatch(
                        f"layer {index} has {layer.key.num_heads} key/value heads: they cannot be split "
                        f"over {size} processes"
                    )
                layers[index] = LayerCalibration(layer.rope, layer.key.heads(rank, size), layer.value.heads(rank, size))
            self.shards.setdefault((rank, size), Calibration(layers, self.metadata))
        return self.shards[rank, size]

    # ------------------------------------------------------------- compatibility

    def check_compatible(self, model: PreTrainedModel | PreTrainedConfig, *, strict: bool = False) -> None:
        """Refuse a model of another geometry, and warn of one with other weights, another rotation or name.

        Args:
            model: The model, or its config where no weights can be compared.
            strict: Refuse whatever would be warned of.

        Raises:
            CalibrationMismatch: Number of layers, key/value heads, head dimension or layer types differ; with
                ``strict`` also weights, rotation or name.
        """
        theirs = cache_layout.cache_config(model if isinstance(model, PreTrainedConfig) else model.config)
        for name, ours in self.metadata.cache_config.items():
            if name in theirs and theirs[name] != ours:
                made_for = self.metadata.base_model.get("id")
                whose = f": it was made for {made_for}" if made_for else ""
                raise CalibrationMismatch(f"calibration has {name} {ours!r}, the model has {theirs[name]!r}{whose}")
        check_identity(self.layers, self.metadata, model, strict)

    @classmethod
    def synthetic(
        cls, config: PreTrainedConfig, bits: float = 3.0, seed: int = 0, codec: CodecSettings | None = None
    ) -> Calibration:
        """A stand-in of the right geometry for speed and memory work; its codes mean nothing for fidelity.

        Args:
            config: ``model.config``.
            bits: Mean code width.
            seed: Seed of the random transforms.
            codec: Codec choices; the defaults if None.

        Returns:
            A calibration with random orthogonal transforms and geometric spectra.
        """
        return cls(*random_constants(config, seed, codec)).with_bits(bits)

    # -------------------------------------------------------------- files and Hub

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        config: Any = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the artifact into a folder, each file complete or not at all.

        Other files of the folder are left alone, a model's ``config.json`` and ``README.md`` included; the card of a
        calibration that is replaced is replaced too, unless somebody has changed it.

        Args:
            save_directory: Folder to write into; created if missing.
            repo_id: Hub repository, for ``push_to_hub``.
            push_to_hub: Whether to push the folder afterwards, to ``repo_id``.
            config: Ignored; the signature is ModelHubMixin's.
            model_card_kwargs: ``metrics``, a list of table rows for the card.
            push_to_hub_kwargs: Passed on to ``push_to_hub``.

        Returns:
            The commit's URL when pushed, else None.

        Raises:
            HubError: It was to be pushed, and the Hub refuses or cannot be reached; the folder is written.
            OSError: The folder cannot be written to.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        with partial_folder(directory) as temporary:
            self._save_pretrained(temporary)
            card = self.generate_model_card(**(model_card_kwargs or {}))
            names = [TENSORS_NAME, CONFIG_NAME]
            own = directory / "README.md"
            if not own.exists() or is_untouched(
                own, lambda: str(self.from_pretrained(directory).generate_model_card())
            ):
                (temporary / "README.md").write_text(str(card), encoding="utf-8")
                names.append("README.md")
            with only_writer(directory):
                put_together(temporary, directory, names)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or directory.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> str:
        """Push the artifact to the Hub in one commit, creating the repository where there is none.

        Args:
            repo_id: Hub repository, ``owner/name``.
            model_card_kwargs: ``metrics``, a list of table rows for the card.
            kwargs: ModelHubMixin's own: ``token``, ``private``, ``branch``, ``commit_message`` and others.

        Returns:
            The commit's URL.

        Raises:
            HubError: The Hub refuses, or cannot be reached.
        """
        card = {"repo_id": repo_id, **(model_card_kwargs or {})}
        push = super().push_to_hub
        return hub.checked(
            lambda: str(push(repo_id, model_card_kwargs=card, **kwargs)), repo_id, kwargs.get("branch"), "the artifact"
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors, config = to_files(self.layers, self.metadata)
        (save_directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        # One entry: the library writes several in any order, and equal calibrations are to give equal files.
        save_file(tensors, save_directory / TENSORS_NAME, metadata={DIGEST: config[DIGEST]})

    def generate_model_card(
        self,
        *args: Any,
        metrics: list[dict[str, Any]] | None = None,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> ModelCard:
        """The artifact's card.

        Args:
            args: Ignored; the signature is ModelHubMixin's.
            metrics: Rows of a measured table, as ``quantcache eval --json`` gives them.
            repo_id: The calibration's own repository, if it is known.
            kwargs: Accepted for huggingface_hub's sake, and ignored.

        Returns:
            A card naming base model, bits and recipe.
        """
        _, config = to_files(self.layers, self.metadata)
        return ModelCard(render_card(config, self.bits, self.bits_per_element, metrics, repo_id))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        **model_kwargs: Any,
    ) -> Calibration:
        """Load an artifact from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: Folder, or Hub repository id.
            force_download: Download even what is cached.
            token: Hub access token; by default that of the login.
            cache_dir: Hub cache folder.
            local_files_only: Never go to the network.
            revision: Hub branch, tag or commit.
            subfolder: Folder inside the folder or repository; ``quantcache/`` is also looked into by itself.
            model_kwargs: Refused; the signature is ModelHubMixin's.

        Returns:
            The calibration.

        Raises:
            ArtifactError: A file is missing, malformed, or of an unknown major schema, or the download failed.
            TypeError: An argument is unknown here, such as ``bits``.
        """
        if model_kwargs:
            raise TypeError(
                f"Calibration.from_pretrained takes no {', '.join(model_kwargs)}: with_bits() changes its bits, and "
                "SpectralCache takes the rest"
            )
        subfolder = subfolder or None  # "" is what transformers calls none
        if os.path.isdir(pretrained_model_name_or_path):
            folder = Path(pretrained_model_name_or_path) / (subfolder or "")
            if subfolder is None and not (folder / CONFIG_NAME).exists() and (folder / SUBFOLDER).is_dir():
                folder = folder / SUBFOLDER
            missing = [name for name in ARTIFACT_FILES if not (folder / name).is_file()]
            if missing:
                raise ArtifactError(f"{folder} is not a calibration folder: missing {' and '.join(missing)}")
            files = folder / CONFIG_NAME, folder / TENSORS_NAME
            return cls(*steadily(files, lambda: from_files(*files)))
        if os.path.isfile(pretrained_model_name_or_path):
            file = pretrained_model_name_or_path
            raise ArtifactError(f"{file} is a file: a calibration is a folder with {CONFIG_NAME} and {TENSORS_NAME}")
        repo_id = hub.require_repo_id(pretrained_model_name_or_path)
        if "/" not in repo_id:  # a folder that is not here, most likely: to ask the Hub would take long where it is not
            raise no_such_folder(repo_id)
        options: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "token": token,
            "local_files_only": local_files_only,
        }
        try:
            config_path = hub.download(repo_id, CONFIG_NAME, subfolder=subfolder, **options)
        except hub.FileNotOnHub:
            if subfolder is not None:
                raise
            subfolder = SUBFOLDER  # a model's repository that carries its calibration
            config_path = hub.download(repo_id, CONFIG_NAME, subfolder=subfolder, **options)
        options["revision"] = hub.commit_of(config_path) or revision  # a branch may move between two downloads
        return cls(*from_files(config_path, hub.download(repo_id, TENSORS_NAME, subfolder=subfolder, **options)))

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel | str,
        *,
        revision: str | None = None,
        index: str | Path | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Calibration:
        """Load the published calibration of a model.

        Args:
            model: A loaded model, its Hub id, or a bundled calibration's name, such as ``wiki11m``.
            revision: The model's commit, where only its id is given.
            index: The index to look into; the one that comes with quantcache if None.
            token: Hub access token; by default that of the login.
            cache_dir: Hub cache folder.
            local_files_only: Never go to the network.

        Returns:
            The calibration, each of its files as the index says.

        Raises:
            ArtifactError: The index does not have the model at this revision, or a file is not the one published.
            CalibrationMismatch: The calibration does not fit the model.
        """
        name = model if isinstance(model, str) else compat.model_id(model)
        revision = revision if isinstance(model, str) else compat.model_revision(model)
        entry = find_entry(read_index(Path(index) if index else bundled_index()), name, revision)
        files = entry.files(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        calibration = cls(*from_files(*files))
        if not isinstance(model, str):
            calibration.check_compatible(model)
        return calibration
