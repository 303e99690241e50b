"""What quantcache promises to support, and the table of it that a test run writes.

Every row is tied to tests by ``@pytest.mark.support("row")``; ``refused=True`` says that the row is one that ends in a
clear error. ``make support`` runs those tests and writes ``docs/support.md``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest

ROWS: dict[str, tuple[str, ...]] = {
    "Generating": (
        "greedy",
        "sampling",
        "beam search",
        "beam sampling",
        "num_return_sequences",
        "assisted decoding with a draft model",
        "prompt lookup",
        "chunked prefill",
        "batches",
        "left-padded batches",
        "left padding with any attention implementation",
        "holes in the mask: padding between the turns of a batch",
        "custom 4D masks, boolean and additive",
        "a mask that hides what another shows",
        "prompts that look ahead",
        "multi-turn chat on one cache",
        "pipeline and chat template",
        "TextIteratorStreamer",
        "flex attention",
        "models that compute attention by themselves",
        "use_cache=False",
        "output_attentions",
        "return_dict_in_generate, output_scores and output_logits",
        "inputs_embeds",
        "cache_implementation= and a cache together",
        "enabled(), enable() and disable()",
        "enabled(): concurrent requests on one model",
        "enable(): a calibration found by the model's id",
        "enable(hub=True) without a calibration anywhere",
        "prefixes of earlier prompts (PrefixStore)",
        "prefixes in a folder, after restarts and damage",
        "serve: completions, chat and responses, streamed, concurrent and cancelled",
        "serve: turns of a chat, over restarts",
        "serve: texts that stop an answer",
        "serve: continuous batching, static caches, models without a calibration",
        "prefixes without a calibration, or of a model that remembers requests",
    ),
    "Operations on a cache": (
        "crop, inside an encoded block too",
        "reset() and reuse",
        "copy.deepcopy",
        "fork()",
        "save() and load()",
        "batch_repeat_interleave, batch_select_indices, reorder_cache",
        "rows named by tensors, arrays, lists, masks and negative numbers",
        "offloading to CPU and back",
        "from a filled DynamicCache",
        "quality= in place of bits",
        "quality= beside bits, or without a prediction",
        "a codec of one's own (BlockCache)",
        "iteration over dense keys and values",
        "keys and values to numpy, pickle, torch.save and safetensors",
        "keys and values changed in place",
        "layers one by one, early_initialization, properties",
        "pickle, torch.nn.DataParallel",
        "any order of operations, against a model (property test)",
        "padding, holes and custom masks in any order (property test)",
    ),
    "Models": (
        "RoPE with grouped queries",
        "no RoPE",
        "sliding and full layers",
        "soft cap of scores (Gemma 2)",
        "attention-sink logits (gpt-oss)",
        "RoPE of interleaved pairs (GPT-J)",
        "latent attention (MLA)",
        "layers of different geometry, shared keys and values, latents, one head",
        "attention with recurrence or an indexer in one layer",
        "cross-attention layers in the same cache (Llama 3.2 Vision)",
        "nothing to compress: windows only, recurrent, layers of a model's own kind",
        "quantized, adapted and offloaded weights",
        "vision-language models on the command line",
        "GGUF files, and models that packages bring",
        "PEFT prefix tuning",
        "linear and full attention layers",
        "longrope, whose model switches caches",
        "encoder-decoder",
        "recurrent, without keys and values",
    ),
    "Training and compilation": (
        "gradients through a compressed past",
        "gradient checkpointing",
        "torch.inference_mode",
        "torch.autocast",
        "keys and values of different dtypes",
        "default dtype, default device, deterministic and inference mode",
        "products in less than float32",
        "another number of threads",
        "torch.compile of the decode step",
        "torch.compile with any attention",
        "torch.compile in generate()",
        "torch.export",
    ),
    "Devices": (
        "layers on several devices",
        'device_map="auto"',
        "weights offloaded by accelerate",
        "a device without float64 (Apple's GPUs), emulated",
        "tensor parallel (tp_plan)",
        "data-parallel evaluation",
        "a model that moves to another device",
    ),
    "Faults": (
        "NaN and infinity in keys or values",
        "float16 overflow",
        "zero-length input",
        "1-token prompts, and prompts shorter than the sinks",
        "another batch size mid-way",
        "another dtype mid-way",
        "contexts beyond max_position_embeddings",
        "out of memory while a cache grows",
        "out of memory inside a kernel",
        "masks that broadcast over rows, heads, queries or keys",
        "masks that do not fit",
        "lazily negated, strided and expanded tensors",
        "one row that is not finite",
        "gains that saturate",
        "KeyboardInterrupt inside a forward pass",
        "a forward pass that fails after its last layer",
        "interrupted operations on a cache",
        "a backend with a block layout of its own",
        "CUDA kernels that attend on blocks, emulated",
        "decoding steps that a CUDA graph can repeat, emulated",
        "two threads, two caches, one model",
        "two threads, one cache",
        "copies taken while another thread extends the cache",
        "a process made by fork()",
        "calibrations and caches whose files change once they are loaded",
        "calibration files of two writers, and of writers that were killed",
        "a linear algebra library that returns wrong results",
        "calibration files: fuzz",
        "calibration files: hostile values",
        "a calibration of another model",
        "GGUF files that are damaged, replaced, or converted by two processes",
        "command line: streams, Ctrl-C, hostile text",
        "generate --stats",
        "the notebook of examples/",
        "recipes and indexes that are hard to parse",
        "saved caches: fuzz",
    ),
    "Long haul": (
        "memory is the formula's throughout",
        "time of a step grows linearly",
        "logits are those of a cache built in one go",
        "creating and dropping caches leaks nothing",
    ),
}

UPSTREAM: dict[str, str] = {
    "test_dynamic_cache, test_static_cache_mha_mqa_gqa": "layers one by one, early_initialization, properties",
    "test_hybrid_cache, test_hybrid_chunked_cache, test_sliding_window_cache": "sliding and full layers",
    "test_reorder_cache_retrocompatibility": "batch_repeat_interleave, batch_select_indices, reorder_cache",
    "test_cache_batched": "left-padded batches",
    "test_cache_beam_search": "beam search",
    "test_cache_extra_left_padding": "left-padded batches",
    "test_static_cache_greedy_decoding_pad_left": "left-padded batches",
    "test_quantized_cache_generation": "greedy",
    "test_dynamic_cache_hard": "return_dict_in_generate, output_scores and output_logits",
    "test_cache_copy": "copy.deepcopy",
    "test_offloaded_cache_uses_less_memory_than_dynamic_cache": "offloading to CPU and back",
    "test_static_cache_multi_accelerator": "layers on several devices",
    "test_cache_gptj_model": "RoPE of interleaved pairs (GPT-J)",
    "test_data_parallel_dynamic_cache": "pickle, torch.nn.DataParallel",
    "test_dynamic_cache_exportability, ..._multiple_run, test_hybrid_cache_exportability": "torch.export",
}
"""Tests in transformers' ``tests/utils/test_cache_utils.py``, and the row that holds the same scenario.

Left out are those of static caches alone (out of bounds, exportability, CUDA graphs) and of the old tuple format.
"""

HEADER = """# What is supported

Every row is a way of using a cache and the tests that hold it to its word: against transformers' own cache where
nothing is lost, else against a dense cache of fake-quantized tokens; "refused" means a clear error. It is written
by `make support`, from the outcomes of the tests; `make soak` runs the long forms of the property, fuzz and long-haul
tests.
"""


CHECKLIST = """
## The scenarios of transformers' own tests

Of `tests/utils/test_cache_utils.py` in transformers, without what concerns only static caches and the old tuple format.
"""


@dataclass
class Evidence:
    """Tests of one row.

    Attributes:
        refused: Whether some expect an error.
        works: Whether some expect it to work.
        shown: Whether one of those has passed.
        tests: Test functions, by file and name.
        outcomes: How many of their cases passed, failed or were skipped.
    """

    refused: bool = False
    works: bool = False
    shown: bool = False
    tests: set[str] = field(default_factory=set)
    outcomes: Counter[str] = field(default_factory=Counter)


COLLECTED = pytest.StashKey[dict[str, list[tuple[str, bool]]]]()
"""Marks of every test that was collected, by node id."""

EVIDENCE = pytest.StashKey[dict[str, Evidence]]()
"""What the run has found so far, by row."""


def marks(item: pytest.Item) -> list[tuple[str, bool]]:
    """(row, whether it is refused) of a test's marks.

    Args:
        item: The test.

    Returns:
        One entry for each mark.

    Raises:
        pytest.UsageError: A mark names a row that does not exist.
    """
    known = {row for rows in ROWS.values() for row in rows}
    found = [(mark.args[0], mark.kwargs.get("refused", False)) for mark in item.iter_markers("support")]
    for row, _ in found:
        if row not in known:
            raise pytest.UsageError(f"{item.nodeid}: tests/support.py has no row {row!r}")
    return found


def render(evidence: dict[str, Evidence]) -> str:
    """The table as Markdown.

    Args:
        evidence: What a run has found, by row.

    Returns:
        The text of ``docs/support.md``.
    """
    lines = [HEADER.rstrip()]
    for section, rows in ROWS.items():
        lines += ["", f"## {section}", "", "| | | tests | cases |", "|---|---|---|---|"]
        for row in rows:
            found = evidence.get(row, Evidence())
            status = "**no test**"
            if found.tests:
                status = "yes" if found.shown else "not run: see cases"
                if found.refused:
                    status = f"{status}, refused in part" if found.works else "refused"
            if found.outcomes["failed"]:
                status = "**fails**"
            tests = "<br>".join(f"`{name}`" for name in sorted(found.tests))
            cases = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.outcomes.items()))
            lines.append(f"| {row} | {status} | {tests} | {cases} |")
    lines += ["", *CHECKLIST.strip().splitlines(), "", "| there | row here |", "|---|---|"]
    lines += [f"| {tests} | {row} |" for tests, row in UPSTREAM.items()]
    return "\n".join(lines) + "\n"


def listed(text: str) -> dict[str, set[str]]:
    """Tests of every row of a rendered table.

    Args:
        text: The Markdown.

    Returns:
        Test names by row.
    """
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == 4 and cells[0]:
            found[cells[0]] = {name.strip("`") for name in cells[2].split("<br>") if name}
    return found
