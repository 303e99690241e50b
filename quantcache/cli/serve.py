"""``quantcache serve``."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantcache.cli.loading import (
    find_model,
    load_calibration,
    model_placement,
    own_calibration,
    quiet_unless_watched,
    require_backend,
)
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
    check_rate,
    check_seed,
    wrong_usage,
)
from quantcache.cli.pages import MODEL, WrongUsage
from quantcache.cli.session import session
from quantcache.cli.terminal import report
from quantcache.common.choices import LogLevel, Quantization, Reasoning
from quantcache.common.defaults import RESIDUAL_LENGTH, SINK_LENGTH
from quantcache.common.errors import QuantCacheError
from quantcache.common.interrupts import Terminated

if TYPE_CHECKING:
    from fastapi import FastAPI

    from quantcache.cache.prefixes import PrefixStore

PREFIXES = "Caches of earlier requests"
ANSWERS = "Answers"


def serve(
    model: ModelArgument,
    calibration: CalibrationOption = None,
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen at.")] = "localhost",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="Port to listen at; 0 for any that is free.")
    ] = 8000,
    also: Annotated[
        list[str] | None, typer.Option(metavar="MODEL=ARTIFACT", help="Another model with its calibration; repeatable.")
    ] = None,
    allow_dense: Annotated[
        bool,
        typer.Option(
            "--allow-dense", help="Also serve models without a calibration, uncompressed.", show_default=False
        ),
    ] = False,
    model_timeout: Annotated[
        int, typer.Option(metavar="SECONDS", help="When an idle model is unloaded, where there are several.")
    ] = 300,
    enable_cors: Annotated[
        bool, typer.Option("--enable-cors", help="Let browsers call from any origin.", show_default=False)
    ] = False,
    log_level: Annotated[LogLevel, typer.Option(help="How much is said on stderr.")] = "warning",
    bits: BitsOption = None,
    quality: QualityOption = None,
    sinks: SinksOption = SINK_LENGTH,
    residual: ResidualOption = RESIDUAL_LENGTH,
    backend: BackendOption = "auto",
    prefix_bytes: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Memory for caches of earlier requests, such as 2GB; 0 for none.",
            rich_help_panel=PREFIXES,
        ),
    ] = "1GB",
    prefix_folder: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Where caches go that leave memory; they survive restarts.", rich_help_panel=PREFIXES
        ),
    ] = None,
    prefix_folder_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most bytes of that folder.",
            show_default="8 times those in memory",
            rich_help_panel=PREFIXES,
        ),
    ] = None,
    reasoning: Annotated[
        Reasoning, typer.Option(help="Thinking; 'auto' is what the chat template does.", rich_help_panel=ANSWERS)
    ] = "auto",
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Object of chat template keywords.", rich_help_panel=ANSWERS),
    ] = None,
    default_seed: Annotated[
        int | None, typer.Option(callback=check_seed, metavar="N", help="Seed of torch.", rich_help_panel=ANSWERS)
    ] = None,
    decision_config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="For transformers' decision endpoint.", rich_help_panel=ANSWERS),
    ] = None,
    attn_implementation: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Attention.", show_default="spectral, on the codes", rich_help_panel=MODEL),
    ] = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Quantize weights as they are loaded.", rich_help_panel=MODEL)
    ] = None,
    continuous_batching: Annotated[bool, typer.Option("--continuous-batching", hidden=True)] = False,
    compile: Annotated[bool, typer.Option("--compile", hidden=True)] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Serve models over transformers' OpenAI-compatible API, with the cache of every request compressed.

    Examples:
        quantcache serve smollm2-135m
        quantcache serve Qwen/Qwen3-0.6B -c calibration/ --prefix-folder prefixes/
    """
    with session(json, debug) as run:
        check_rate(bits, quality)
        require_backend(backend, device)
        memory, disk = prefix_sizes(prefix_bytes, prefix_folder, prefix_folder_bytes)
        keywords = template_keywords(chat_template_kwargs, reasoning)
        given = named_calibrations(model, calibration, also or [])
        from quantcache.common import compat

        compat.require_server()
        from quantcache.cli.serving.models import CONTINUOUS_BATCHING, Compression
        from quantcache.cli.serving.server import ServerOptions, application

        if continuous_batching:
            raise QuantCacheError(CONTINUOUS_BATCHING)
        if compile:
            raise QuantCacheError(
                "--compile needs a static cache, which cannot hold compressed blocks: serve without it"
            )
        set_logging(log_level)
        store = prefix_store(memory, prefix_folder, disk)
        pairs = {name: artifact or own_calibration(name) for name, artifact in given.items()}
        calibrations = {name: load_calibration(artifact, bits, quality) for name, artifact in pairs.items()}
        for name in pairs:
            repo, _, revision = (name, "", "") if os.path.exists(name) else name.partition("@")
            find_model(repo, None if revision in ("", "main") else revision)  # as answers call it
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
        told = ServerOptions(models, keywords, decision_config, enable_cors)
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


def named_calibrations(model: str, calibration: str | None, also: list[str]) -> dict[str, str | None]:
    """Which model has which calibration.

    Args:
        model: The first model.
        calibration: Its calibration; None for its own.
        also: Others, each ``MODEL=ARTIFACT``.

    Returns:
        Calibrations by model.

    Raises:
        WrongUsage: An entry is malformed, or a model is named twice.
    """
    found = {model: calibration}
    for entry in also:
        name, equals, artifact = entry.partition("=")
        if not (name and equals and artifact):
            raise WrongUsage(f"--also must be MODEL=ARTIFACT, got {entry!r}")
        if name in found:
            raise WrongUsage(f"{name} has two calibrations: {found[name] or 'its own'} and {artifact}")
        found[name] = artifact
    return found


def template_keywords(given: str | None, reasoning: Reasoning) -> dict[str, Any]:
    """Keywords of every chat template.

    Args:
        given: A JSON object.
        reasoning: Whether to think.

    Returns:
        The keywords.

    Raises:
        WrongUsage: The text is not a JSON object, or says otherwise than ``reasoning``.
    """
    try:
        found = {} if given is None else json.loads(given)
    except ValueError as error:
        raise WrongUsage(f"--chat-template-kwargs must be a JSON object: {error}") from error
    if not isinstance(found, dict):
        raise WrongUsage(f"--chat-template-kwargs must be a JSON object, got {given}")
    if reasoning == "auto":
        return found
    thinks = reasoning == "on"
    if found.get("enable_thinking", thinks) != thinks:
        raise WrongUsage(f"--reasoning {reasoning} contradicts --chat-template-kwargs {given}")
    return {**found, "enable_thinking": thinks}


def prefix_sizes(memory: str, folder: str | None, disk: str | None) -> tuple[int, int | None]:
    """Read how much room caches of earlier requests have.

    Args:
        memory: Bytes in memory, as users write them.
        folder: Where caches go that leave memory.
        disk: Bytes of the folder.

    Returns:
        Bytes in memory and in the folder; None for the folder's default.

    Raises:
        WrongUsage: A size cannot be read, belongs to a folder that is not named, or is missing for one that is.
    """
    from quantcache.common.units import parse_bytes

    if folder is None and disk is not None:
        raise WrongUsage("--prefix-folder-bytes needs --prefix-folder")
    if memory == "0" and folder is not None and disk is None:
        raise WrongUsage("--prefix-bytes 0 leaves --prefix-folder no bytes: give --prefix-folder-bytes too")
    with wrong_usage():
        return (
            0 if memory == "0" else parse_bytes(memory, "--prefix-bytes"),
            None if disk is None else parse_bytes(disk, "--prefix-folder-bytes"),
        )


def prefix_store(memory: int, folder: str | None, disk: int | None) -> PrefixStore | None:
    """Where caches of earlier requests are kept.

    Args:
        memory: Bytes in memory.
        folder: Where caches go that leave memory.
        disk: Bytes of the folder; None for the store's default.

    Returns:
        The store; None if there is no room for anything.
    """
    from quantcache.cache.prefixes import PrefixStore

    if not memory and not (folder and disk):
        return None
    return PrefixStore(memory, folder, disk)


def set_logging(level: LogLevel) -> None:
    """How much transformers and quantcache say."""
    from transformers.utils import logging as theirs

    theirs.set_verbosity(theirs.log_levels[level])
    logging.getLogger("quantcache").setLevel(level.upper())
