"""The options that several verbs take."""

from __future__ import annotations

from typing import Annotated

import typer

from quantcache.common.defaults import QUALITIES
from quantcache.common.sources import MODEL_HELP

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
DebugFlag = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help=MODEL_HELP),
]
CALIBRATION_HELP = "folder, Hub id, or the name of a model whose calibration is bundled"
CalibrationOption = Annotated[
    str,
    typer.Option(
        "--calibration",
        "-c",
        metavar="ARTIFACT",
        help=f"The model's calibration: {CALIBRATION_HELP}.",
    ),
]
BitsOption = Annotated[
    float | None,
    typer.Option(min=0, max=8, help="Bits per element on average, without gains. Default: the calibration's."),
]
QualityOption = Annotated[
    str | None,
    typer.Option(
        metavar="WORD",
        help="In place of --bits: the fewest whose predicted KL, in nats per token, is at most "
        + ", ".join(f"{limit:g} ({word})" for word, limit in QUALITIES.items())
        + ".",
    ),
]
SinksOption = Annotated[int, typer.Option(min=0, help="First tokens kept as they are.")]
ResidualOption = Annotated[int, typer.Option(min=0, help="Recent tokens kept as they are.")]
BackendOption = Annotated[str, typer.Option(help="auto, cpu, triton, cuda or torch.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:N, or 'auto' to spread over devices. Default: cuda if there is one.")
]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: float32 on a CPU, else the checkpoint's.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Allow model code from the Hub to run.")]
