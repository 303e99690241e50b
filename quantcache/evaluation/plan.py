"""What to measure, on what, and how much of it: the arguments of :func:`quantcache.evaluation.runner.run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantcache.artifact.calibration import Calibration
from quantcache.common.defaults import CHUNK, RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.evaluation import memory, needle, qa
from quantcache.evaluation.methods import RivalStatistics


@dataclass(frozen=True)
class Sizes:
    """How much each suite does.

    Attributes:
        prompts: Number of prompts that are continued in the divergence suite.
        continued_tokens: Tokens of each continuation at most.
        needle_depths: Places of a needle, 0 (start) to 1 (end).
        needle_seeds: Trials of each length and depth.
        task_seeds: Texts, tables or lists of each size, for the suites ``records``, ``lookup`` and ``tools``.
        records: Facts in each text.
        lookup_pairs: Rows of a table.
        tool_shots: Requests that are shown with their calls.
        task_questions: Questions about each table, and requests for each list of tools.
        routing_windows: Number of windows that the routing suite reads.
        transfer_tokens: Tokens calibrated on, for each calibration.
        transfer_windows: Windows of every text that calibrations are compared on.
        questions: Number of questions asked.
        question_shots: Questions that are shown with their answers first.
        answer_tokens: Tokens of an answer at most.
        ladder: Lengths of the memory suite.
        speed_batches: Rows of the speed suite.
        speed_context: Tokens of its prompts at most.
        steps: Decoding steps timed.
        prefills: Number of prefills timed.
        draft_tokens: Tokens generated with a draft model.
        longest: Tokens of a needle's prompt and of a routing window at most, where no lengths are given. Needles are
            planted in prompts of half the context as well where it is None.
        transfer_methods: Methods of the transfer suite at most.
    """

    prompts: int = 4
    continued_tokens: int = 1024
    needle_depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    needle_seeds: int = 3
    task_seeds: int = 3
    records: int = 3
    lookup_pairs: tuple[int, ...] = (16, 32)
    tool_shots: tuple[int, ...] = (8, 24)
    task_questions: int = 8
    routing_windows: int = 2
    transfer_tokens: int = 4096
    transfer_windows: int = 2
    questions: int = 12
    question_shots: int = 2
    answer_tokens: int = 16
    ladder: tuple[int, ...] = memory.LADDER
    speed_batches: tuple[int, ...] = (1, 4)
    speed_context: int = 1024
    steps: int = 24
    prefills: int = 2
    draft_tokens: int = 32
    longest: int | None = None
    transfer_methods: int | None = None


QUICK = Sizes(
    prompts=2,
    continued_tokens=128,
    needle_depths=(0.5,),
    needle_seeds=2,
    task_seeds=1,
    records=2,
    lookup_pairs=(16,),
    tool_shots=(8,),
    task_questions=4,
    routing_windows=1,
    transfer_tokens=1024,
    transfer_windows=1,
    questions=2,
    answer_tokens=8,
    ladder=(128, 1024),
    speed_batches=(1,),
    speed_context=256,
    steps=8,
    prefills=1,
    draft_tokens=12,
    longest=512,
    transfer_methods=1,
)
"""Sizes that give an impression in little time."""


def chosen_sizes(quick: bool, questions: int | None = None, trials: int | None = None) -> Sizes:
    """The sizes that a user asks for.

    Args:
        quick: Take those of :data:`QUICK`.
        questions: Questions asked; None leaves them.
        trials: Needles, texts, tables and prompts of each size; None leaves them.

    Returns:
        The sizes.
    """
    sizes = QUICK if quick else Sizes()
    if questions is not None:
        sizes = replace(sizes, questions=questions)
    if trials is not None:
        sizes = replace(sizes, needle_seeds=trials, task_seeds=trials, prompts=trials)
    return sizes


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        suites: Names out of ``SUITES``.
        methods: Names such as ``dense`` and ``spectral-3``.
        contexts: Tokens in a window; fidelity is measured at each, the other suites use the last.
        tokens: Tokens of text to use at most.
        residuals: Recent tokens that every method keeps; fidelity is measured at each, the other suites use the first.
        equal_tail: Count in the fidelity suite only what reads codes, and at an exact tail of the residual's length.
        sinks: First tokens that every method keeps.
        chunk: Tokens fed at once.
        stride: Tokens by which windows of the fidelity suite slide; None if they do not overlap.
        sizes: How much each suite does.
        needle_form: How needles are stated and asked for.
        lengths: Tokens of the prompts in which needles and records are planted; from the last context if None.
        chat: Put prompts into the tokenizer's chat template; where it has one if None.
        text_name: What results call the text.
    """

    suites: tuple[str, ...]
    methods: tuple[str, ...]
    contexts: tuple[int, ...]
    tokens: int
    residuals: tuple[int, ...] = (RESIDUAL_LENGTH,)
    equal_tail: bool = False
    sinks: int = SINK_LENGTH
    chunk: int = CHUNK
    stride: int | None = None
    sizes: Sizes = field(default_factory=Sizes)
    needle_form: needle.NeedleFormat = field(default_factory=needle.NeedleFormat)
    lengths: tuple[int, ...] | None = None
    chat: bool | None = None
    text_name: str = "text"

    @property
    def seeds(self) -> list[int]:
        """Every seed that is drawn with."""
        sizes = self.sizes
        drawn = {"needle": sizes.needle_seeds, "divergence": sizes.prompts}
        drawn |= dict.fromkeys(("records", "lookup", "tools"), sizes.task_seeds)
        return list(range(max((drawn.get(suite, 1) for suite in self.suites), default=1)))

    @property
    def prompt_lengths(self) -> list[int]:
        """Tokens of the prompts in which something is planted."""
        longest = min(self.contexts[-1], self.sizes.longest or self.contexts[-1])
        half = [longest // 2] if self.sizes.longest is None and longest > 512 else []
        return list(self.lengths or [*half, longest])

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Material:
    """What to measure it on.

    Attributes:
        model: Decoder-only model to measure.
        tokenizer: Tokenizer of that model.
        text: Text to evaluate on.
        calibration: The model's calibration, for methods that need one.
        questions: For the ``qa`` suite.
        domains: Further texts by name, for the ``transfer`` suite: calibrated on in their first half, evaluated on in
            their second.
        length_text: A text to calibrate on at several lengths, for the ``transfer`` suite.
        draft: Draft model for speculative decoding; the model's first half if None.
        statistics: What calibrated rivals are fitted to.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: str
    calibration: Calibration | None = None
    questions: Sequence[qa.Question] | None = None
    domains: Mapping[str, str] = field(default_factory=dict)
    length_text: str | None = None
    draft: PreTrainedModel | None = None
    statistics: RivalStatistics | None = None
