"""``quantcache serve``."""

from __future__ import annotations

import contextlib
import logging
import socket
from typing import TYPE_CHECKING, Annotated

import typer

from quantcache.cli.loading import find_model, load_calibration, model_placement, quiet_unless_watched
from quantcache.cli.options import (
    BackendOption,
    BitsOption,
    CalibrationOption,
    DebugFlag,
    DeviceOption,
    DtypeOption,
    JsonFlag,
    ModelArgument,
    QualityOption,
    ResidualOption,
    SinksOption,
    TrustOption,
)
from quantcache.cli.session import session
from quantcache.cli.terminal import report
from quantcache.common.defaults import RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.common.errors import QuantCacheError
from quantcache.common.interrupts import Terminated

if TYPE_CHECKING:
    from fastapi import FastAPI

    from quantcache.cache.prefixes import PrefixStore


def serve(
    model: ModelArgument,
    calibration: CalibrationOption,
    also: Annotated[
        list[str] | None, typer.Option(metavar="MODEL=ARTIFACT", help="Another model with its calibration; repeatable.")
    ] = None,
    allow_dense: Annotated[
        bool, typer.Option("--allow-dense", help="Also serve models without a calibration, uncompressed.")
    ] = False,
    bits: BitsOption = None,
    quality: QualityOption = None,
    sinks: SinksOption = SINK_LENGTH,
    residual: ResidualOption = RESIDUAL_LENGTH,
    backend: BackendOption = "auto",
    prefix_bytes: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for caches of earlier requests, such as 2GB; 0 for none.")
    ] = "1GB",
    prefix_folder: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where caches go that leave memory; they survive restarts.")
    ] = None,
    prefix_folder_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most bytes of that folder. Default: 8 times those in memory.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at.")] = 8000,
    enable_cors: Annotated[bool, typer.Option("--enable-cors", help="Let browsers call from any origin.")] = False,
    reasoning: Annotated[str, typer.Option(help="on, off or auto (what the chat template does).")] = "auto",
    chat_template_kwargs: Annotated[str | None, typer.Option(help="JSON object of chat template keywords.")] = None,
    decision_config: Annotated[str | None, typer.Option(help="File of transformers' decision endpoint.")] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="Attention implementation. Default: attention on the codes.")
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="Quantize weights: bnb-4bit or bnb-8bit.")] = None,
    model_timeout: Annotated[
        int, typer.Option(help="Seconds until an idle model is unloaded, where there are several.")
    ] = 300,
    default_seed: Annotated[int | None, typer.Option(help="Seed of torch.")] = None,
    continuous_batching: Annotated[
        bool, typer.Option("--continuous-batching", help="Refused: it has a cache of its own.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Refused: it needs a static cache.")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Serve models over transformers' OpenAI-compatible API, with the cache of every request compressed.

    Example: quantcache serve smollm2-135m -c smollm2-135m --prefix-folder prefixes/
    """
    with session(json, debug) as run:
        from quantcache.common import compat

        compat.require_server()
        from quantcache.cli.serving.models import CONTINUOUS_BATCHING, Compression
        from quantcache.cli.serving.server import ServerOptions, application, template_keywords

        if continuous_batching:
            raise QuantCacheError(CONTINUOUS_BATCHING)
        if compile:
            raise QuantCacheError(
                "--compile needs a static cache, which cannot hold compressed blocks: serve without it"
            )
        set_logging(log_level)
        template = template_keywords(chat_template_kwargs, reasoning)
        pairs = named_calibrations(model, calibration, also or [])
        store = prefix_store(prefix_bytes, prefix_folder, prefix_folder_bytes)
        calibrations = {name: load_calibration(artifact, bits, quality) for name, artifact in pairs.items()}
        for name in pairs:
            find_model(name)
        place, kind = model_placement(device, dtype)
        lengths = {"sink_length": sinks, "residual_length": residual, "backend": backend}
        models = {
            "device": place,
            "dtype": kind,
            "trust_remote_code": trust_remote_code,
            "attn_implementation": attn_implementation,
            "quantization": quantization,
            "model_timeout": model_timeout,
        }
        if default_seed is not None:
            import torch

            torch.manual_seed(default_seed)
        compression = Compression(calibrations, lengths, store, allow_dense)
        told = ServerOptions(models, template, decision_config, enable_cors)
        with listener(host, port) as endpoint, quiet_unless_watched(), application(compression, told) as app:
            run_server(app, endpoint, ", ".join(pairs))
        statistics = None if store is None else store.statistics().to_dict()
        run.finish({"models": list(pairs), "prefixes": statistics}, "stopped")


def listener(host: str, port: int) -> socket.socket:
    """Take the port, before models are loaded: who calls in the meantime waits.

    Args:
        host: Address.
        port: Port; 0 for any that is free.

    Returns:
        The socket.

    Raises:
        OSError: The port is taken, or the address is not this machine's.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from error


def run_server(app: FastAPI, endpoint: socket.socket, models: str) -> None:
    """Serve until Ctrl-C or SIGTERM; requests in progress end first.

    Args:
        app: The application.
        endpoint: Where it listens.
        models: What is served, for people to read.
    """
    import uvicorn

    host, port = endpoint.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    report("note", f"serving {models} at http://{shown}:{port}/v1; Ctrl-C stops")
    with contextlib.suppress(KeyboardInterrupt, Terminated):  # uvicorn has ended in order, and passes the signal on
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[endpoint])


def named_calibrations(model: str, calibration: str, also: list[str]) -> dict[str, str]:
    """Which model has which calibration.

    Args:
        model: The first model.
        calibration: Its calibration.
        also: Others, each ``MODEL=ARTIFACT``.

    Returns:
        Calibrations by model.

    Raises:
        ValueError: An entry is malformed, or a model is named twice.
    """
    found = {model: calibration}
    for entry in also:
        name, equals, artifact = entry.partition("=")
        if not (name and equals and artifact):
            raise ValueError(f"--also must be MODEL=ARTIFACT, got {entry!r}")
        if name in found:
            raise ValueError(f"{name} has two calibrations: {found[name]} and {artifact}")
        found[name] = artifact
    return found


def prefix_store(size: str, folder: str | None, folder_size: str | None) -> PrefixStore | None:
    """Where caches of earlier requests are kept.

    Args:
        size: Bytes in memory, as users write them.
        folder: Where caches go that leave memory.
        folder_size: Bytes of the folder.

    Returns:
        The store; None if there is no room for anything.

    Raises:
        ValueError: A size cannot be read, or belongs to a folder that is not named.
    """
    from quantcache.cache.prefixes import PrefixStore
    from quantcache.planning.units import parse_bytes

    if folder is None and folder_size is not None:
        raise ValueError("--prefix-folder-bytes needs --prefix-folder")
    memory = 0 if size == "0" else parse_bytes(size, "--prefix-bytes")
    most = None if folder_size is None else parse_bytes(folder_size, "--prefix-folder-bytes")
    if not memory and not (folder and most):
        return None
    return PrefixStore(memory, folder, most)


def set_logging(level: str) -> None:
    """How much transformers and quantcache say.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.

    Raises:
        ValueError: The level is unknown.
    """
    from transformers.utils import logging as theirs

    if level not in ("debug", "info", "warning", "error"):
        raise ValueError(f"--log-level must be debug, info, warning or error, got {level!r}")
    theirs.set_verbosity(theirs.log_levels[level])
    logging.getLogger("quantcache").setLevel(level.upper())
