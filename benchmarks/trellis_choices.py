"""What choices of the trellis are worth: tiles that share a width, states, and how the encoder finds paths and gains.

python benchmarks/trellis_choices.py [MODEL] [--calibration FOLDER] [--parts tiles states encoder]

Two figures for each: KL divergence through the real cache, with nothing exact but the sinks; and the squared error of
the coefficients in the metric of the calibration, over their energy. An encoder makes that error small, and it shows
differences that drown in the noise of a divergence. Tiles are a setting of the codec. Other states and encoders are
simulated: blocks are kept as what they decode to, with the widths of the codec's own trellis.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import trellis_codebooks
from ablation_codecs import ReconstructingCodec, block_coefficients, codec_cache, root_mean_square, side_codecs
from inputs import study, study_parser
from records import Run, suite_of, write_record
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from quantcache import Calibration, SpectralCache
from quantcache.attention.probe import RecordingCache
from quantcache.attention.probe import run as run_model
from quantcache.coding.codec import SpectralCodec
from quantcache.coding.gains import dequantize_gain, quantize_gain
from quantcache.coding.packing import MAX_WIDTH
from quantcache.coding.schema import SIDES
from quantcache.coding.trellis import CODES, STATES, best_path, nearest_by_subset, subsets_of_path, union_levels
from quantcache.common.defaults import SINK_LENGTH
from quantcache.evaluation.fidelity import measure_fidelity
from quantcache.evaluation.methods import Method

TILES = (2, 4, 8)

Books = dict[int, tuple[float, ...]]
"""Union codebooks by width."""


@dataclass(frozen=True)
class Encoder:
    """How paths and gains are found; the defaults are the codec's.

    Attributes:
        states: States of the trellis.
        search: Whether a token's gain is searched with scalar codes first; otherwise it is the coefficients' root mean
            square.
        corrected: Whether the first pass takes the gain corrected for scalar codes, not the one that was searched.
        passes: How often the best path is sought: every pass but the first with the gain corrected for the last.
        on_path: Whether several gains are tried at the end with every token's subset left as it is.
        power: Power of a token's gain by which its squared error weighs.
    """

    states: int = STATES
    search: bool = True
    corrected: bool = False
    passes: int = 1
    on_path: bool = False
    power: float = 2.0


ENCODERS = {
    "searched gain, one pass": Encoder(),
    "corrected gain, one pass": Encoder(corrected=True),
    "searched gain, two passes": Encoder(passes=2),
    "searched gain, three passes": Encoder(passes=3),
    "no search, one pass": Encoder(search=False),
    "no search, two passes": Encoder(search=False, passes=2),
    "no search, three passes": Encoder(search=False, passes=3),
    "one pass, gain searched on the path": Encoder(on_path=True),
    "two passes, gain searched on the path": Encoder(passes=2, on_path=True),
    "one pass, tokens weigh alike": Encoder(power=0.0),
    "one pass, tokens weigh as their gain": Encoder(power=1.0),
    "one pass, tokens weigh as their gain cubed": Encoder(power=3.0),
}

ON_PATH = (0.9, 0.95, 1.0, 1.05, 1.1)
"""Multiples of the corrected gain that are tried on a path."""


class TrellisCodec(ReconstructingCodec):
    """Our codec with other paths or gains.

    Args:
        codec: Ours, for transform and widths.
        encoder: What differs.
        books: Union codebooks of the trellis.
    """

    def __init__(self, codec: SpectralCodec, encoder: Encoder, books: Books):
        super().__init__(codec)
        self.encoder = encoder
        self.books = {c.width: torch.tensor(books[c.width], dtype=torch.float32) for c in codec.classes}

    def _coded(self, y: Tensor) -> Tensor:
        step, gain = self._first(y)
        if self.encoder.corrected:
            step = gain
        for number in range(self.encoder.passes):
            if number:
                step = gain
            levels, taken = self._paths(y, step)
            gain, _ = self.codec._corrected_gain(y, levels)
        if self.encoder.on_path:
            levels, gain = self._searched_on(taken, y, gain)
        return levels * dequantize_gain(quantize_gain(gain)).unsqueeze(-2)

    def _first(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The step of the first pass, and the gain corrected for scalar codes of it; ``[B, H, 64]`` each."""
        rms = root_mean_square(self.codec, y)
        steps = torch.stack([rms * f for f in (self.codec.gain_search if self.encoder.search else (1.0,))])
        codes = [self.codec._nearest(over(y, step))[1] for step in steps]
        return best_of(steps, *map(torch.stack, zip(*(self.codec._corrected_gain(y, c) for c in codes), strict=True)))

    def _paths(self, y: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Levels ``[B, H, D, 64]`` of the best paths with these steps, and the subset of every token."""
        u, weights = over(y, step), step.unsqueeze(-2).expand_as(y) ** self.encoder.power
        columns, levels = self._by_subset(u)
        flat = u.flatten(0, 2)[columns]
        errors = (flat - levels).square() * weights.flatten(0, 2)[columns]
        taken = torch.zeros(u.flatten(0, 2).shape, dtype=torch.int64)
        taken[columns] = subsets_of_path(best_path(errors, self.encoder.states), self.encoder.states)
        return self._taken(columns, levels, taken, u), taken

    def _by_subset(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows of the flattened coefficients are coded, and their nearest level in each subset."""
        rows = torch.arange(u[..., 0].numel()).view(u.shape[0], -1)
        found = [(rows[:, c.columns].flatten(), self.books[c.width]) for c in self.codec.classes]
        flat = u.flatten(0, 2)
        levels = [nearest_by_subset(flat[own], book)[1] for own, book in found]
        return torch.cat([own for own, _ in found]), torch.cat(levels, dim=1)

    def _taken(self, columns: Tensor, levels: Tensor, taken: Tensor, u: Tensor) -> Tensor:
        """The levels of the subsets that are taken."""
        all_levels = torch.zeros_like(u).flatten(0, 2)
        all_levels[columns] = levels.gather(0, taken[columns][None])[0]
        return all_levels.view(u.shape)

    def _searched_on(self, taken: Tensor, y: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """Levels and gains of the best step for every token with its subsets as they are."""
        steps = torch.stack([gain * factor for factor in ON_PATH])
        levels = torch.stack([self._taken(*self._by_subset(u), taken, u) for u in (over(y, s) for s in steps)])
        gains, saved = map(torch.stack, zip(*(self.codec._corrected_gain(y, each) for each in levels), strict=True))
        best = saved.argmax(0)
        chosen = levels.gather(0, best.unsqueeze(-2).expand_as(y)[None])[0]
        return chosen, gains.gather(0, best[None])[0]


def over(y: Tensor, step: Tensor) -> Tensor:
    """Coefficients ``[B, H, D, 64]`` in units of their tokens' steps."""
    step = step.unsqueeze(-2)
    return torch.where(step > 0, y / step, 0.0)


def best_of(steps: Tensor, gains: Tensor, saved: Tensor) -> tuple[Tensor, Tensor]:
    """Step and gain that explain most, of candidates ``[F, B, H, 64]``."""
    best = saved.argmax(0, keepdim=True)
    return steps.gather(0, best)[0], gains.gather(0, best)[0]


def main() -> None:
    """Measure, print and write the record."""
    parser = study_parser(__doc__, windows=2)
    parser.add_argument(
        "--parts", nargs="+", choices=["tiles", "states", "encoder"], default=["tiles", "states", "encoder"]
    )
    parser.add_argument("--encoders", type=int, nargs="+", help="numbers of the encoders to measure; all by default")
    parser.add_argument("--errors-only", action="store_true", help="no divergences")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    parser.add_argument("--blocks", type=int, default=4096, help="that codebooks of other states are trained on")
    parser.add_argument("--iterations", type=int, default=20, help="of that training")
    options = parser.parse_args()
    given = study("trellis-choices", options)
    bench = Bench(given.run, given.model, given.calibration.with_coding("trellis"), given.tokens, options)
    every = list(ENCODERS.items())
    encoders = dict(every if options.encoders is None else [every[i] for i in options.encoders])
    metrics: dict[str, Any] = {}
    if "tiles" in options.parts:
        metrics["tiles"] = {str(size): bench.tiles(size) for size in TILES}
    if "encoder" in options.parts:
        metrics["encoder"] = {name: bench.simulated(encoder, OURS) for name, encoder in encoders.items()}
    if "states" in options.parts:
        books = {states: trained(given.run, states, options) for states in CODES}
        metrics["distortion"] = {str(s): {str(w): e for w, (_, e) in found.items()} for s, found in books.items()}
        metrics["states"] = {
            str(states): bench.simulated(Encoder(states=states), {w: tuple(b) for w, (b, _) in found.items()})
            for states, found in books.items()
        }
    for part in ("tiles", "states", "encoder"):
        if part in metrics:
            Console().print(table(part, metrics[part], options.bits))
    settings = {**given.settings, "encoders": {n: asdict(e) for n, e in encoders.items()}}
    write_record(suite_of("trellis-choices", options.model), settings, metrics)
    given.run.discard()


OURS: Books = {width: union_levels(width) for width in range(1, MAX_WIDTH + 1)}


def trained(run: Run, states: int, options: argparse.Namespace) -> dict[int, tuple[list[float], float]]:
    """Union codebooks of a trellis and their errors on a unit Gaussian, by width: the codec's own, or trained alike."""

    def book(width: int) -> tuple[list[float], float]:
        if states == STATES:
            levels = torch.tensor(OURS[width], dtype=torch.float32)
        else:
            levels, _ = trellis_codebooks.train(width, states, options.blocks, options.iterations, True)
        return levels.tolist(), trellis_codebooks.distortion(levels, states, options.blocks)

    widths = range(1, MAX_WIDTH + 1)
    return {width: run.cell(f"codebook-{states}-{width}", lambda width=width: book(width)) for width in widths}


class Bench:
    """Measures codecs on one text.

    Args:
        run: Keeps what is measured.
        model: The model.
        calibration: Its calibration, with trellis codes.
        tokens: The text's.
        options: Of the command line.
    """

    def __init__(
        self, run: Run, model: PreTrainedModel, calibration: Calibration, tokens: Tensor, options: argparse.Namespace
    ):
        self.run, self.model, self.calibration = run, model, calibration
        self.tokens, self.options = tokens, options
        self.recorded: dict[tuple[int, str], Tensor] = {}

    def tiles(self, size: int) -> dict[str, Any]:
        """Divergence and error with coefficients sharing a width in tiles, by rate."""
        metadata = self.calibration.metadata
        codec = replace(metadata.codec, group_size=size)
        calibration = Calibration(self.calibration.layers, replace(metadata, codec=codec))

        def maker(allocated: Calibration) -> Callable[[], Any]:
            return lambda: SpectralCache(allocated, self.model.config, residual_length=0)

        found = self.run.cell(f"error {size}", lambda: self._errors(calibration, Encoder(), OURS))
        return joined(found, {} if self.options.errors_only else self._divergences(f"tiles {size}", calibration, maker))

    def simulated(self, encoder: Encoder, books: Books) -> dict[str, Any]:
        """Error with another encoder, and divergence if wanted, by rate."""

        def change(codec: SpectralCodec) -> TrellisCodec:
            return TrellisCodec(codec, encoder, books)

        def maker(allocated: Calibration) -> Callable[[], Any]:
            return codec_cache(allocated, self.model.config, change, SINK_LENGTH, 0)

        found = self.run.cell(f"error {encoder}", lambda: self._errors(self.calibration, encoder, books))
        if self.options.errors_only:
            return joined(found, {})
        return joined(found, self._divergences(str(encoder), self.calibration, maker))

    def _divergences(
        self, name: str, calibration: Calibration, maker: Callable[[Calibration], Callable[[], Any]]
    ) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            methods = [Method(f"{r:g}", "ours", False, maker(calibration.with_bits(r))) for r in self.options.bits]
            found = measure_fidelity(self.model, self.tokens, methods, context=self.options.context)
            return {rate: result.to_dict() for rate, result in found.items()}

        result: dict[str, Any] = self.run.cell(f"divergence {name}", measure)
        print(name, *(entry["kl_mean"] or entry["status"] for entry in result.values()), flush=True)
        return result

    def _errors(self, calibration: Calibration, encoder: Encoder, books: Books) -> dict[str, float]:
        """Weighted squared error over weighted energy of the first window's coefficients, by rate."""
        found = {}
        for rate in self.options.bits:
            lost, total = 0.0, 0.0
            for (index, side), codec in side_codecs(calibration.with_bits(rate)).items():
                y = self._coefficients()[index, side]
                spectrum = calibration.layers[index].side(side).spectrum.double()[..., None]
                lost += float(((y - TrellisCodec(codec, encoder, books)._coded(y)).double().square() * spectrum).sum())
                total += float((y.double().square() * spectrum).sum())
            found[f"{rate:g}"] = lost / total
        print(encoder, calibration.metadata.codec.group_size, found, flush=True)
        return found

    def _coefficients(self) -> dict[tuple[int, str], Tensor]:
        """Unit-variance coefficients of the first window's whole blocks, ``[n, H, D, 64]``, by layer and side."""
        if self.recorded:
            return self.recorded
        codecs = side_codecs(self.calibration)

        def record(index: int, keys: Tensor, values: Tensor) -> None:
            for side, x in zip(SIDES, (keys, values), strict=True):
                if (index, side) in codecs:
                    self.recorded[index, side] = torch.cat([*block_coefficients(codecs[index, side], x)])

        with torch.no_grad():
            run_model(self.model, self.tokens[None, : self.options.context], RecordingCache(self.model.config, record))
        return self.recorded


def joined(errors: dict[str, float], divergences: dict[str, Any]) -> dict[str, Any]:
    """Both figures, by rate."""
    return {rate: {"error": error, **divergences.get(rate, {})} for rate, error in errors.items()}


def table(part: str, rows: dict[str, Any], rates: list[float]) -> Table:
    """A part's results for people: mean KL and error at every rate."""
    result = Table(part, *(f"{rate:g} bits" for rate in rates), title="Mean KL (error in the metric)")
    for name, found in rows.items():
        result.add_row(name, *(f"{entry.get('kl_mean', 0):.5f} ({entry['error']:.5f})" for entry in found.values()))
    return result


if __name__ == "__main__":
    main()
