"""What every test gets: no network, a fixed seed, the bundled model."""

from __future__ import annotations

import gc
import ipaddress
import os
import platform
import socket
from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings

from tests import support

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_TESTS = os.environ.get("QUANTCACHE_HUB_TESTS") == "1"
if not HUB_TESTS:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported; nothing above imports it

if not torch.cuda.is_available():
    # Triton's kernels run on the CPU, operation by operation. Triton reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # The processes share the cores, as do those that tests start: threads that wait for each other would take them.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# torch lists the functions that obey torch.device when it first needs the list, and keeps it. If a test has another
# function in torch.empty's place just then, torch.device("meta") has no effect on torch.empty ever after.
with torch.device("cpu"):
    torch.empty(0)

ROOT = Path(__file__).resolve().parent.parent

# A slow machine is not a bug, and what CI finds must be found again on the next run.
settings.register_profile("quantcache", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("quantcache")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--support-table`` writes the table of what is supported from the run's outcomes."""
    parser.addoption("--support-table", type=Path, help="write the support table to this file")
    parser.addoption("--threads", help="run every test at each of these numbers of threads (0: torch's default, first)")


def pytest_report_header() -> str:
    """What the tests run on."""
    import importlib.metadata as packages

    names = ("torch", "triton", "transformers", "huggingface_hub", "numpy")
    found = {name: next((d.version for d in packages.distributions(name=name)), "none") for name in names}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    versions = {"Python": platform.python_version()} | found
    return f"{', '.join(f'{name} {version}' for name, version in versions.items())}, on {device}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Repeat every test for ``--threads``."""
    counts = metafunc.config.getoption("--threads")
    if counts is not None:
        metafunc.parametrize("threads", [int(count) for count in counts.split(",")], indirect=True, scope="session")


@pytest.fixture(scope="session", autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    """Set torch's number of threads where ``--threads`` asks for it; once set, nothing gives the default back."""
    count = getattr(request, "param", 0)
    if count:
        torch.set_num_threads(count)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note the marks of all tests, and skip, with the reason in the summary, what this machine cannot run."""
    config.stash[support.COLLECTED] = {item.nodeid: support.marks(item) for item in items}
    config.stash[support.EVIDENCE] = defaultdict(support.Evidence)
    # What takes minutes goes first: at the end, the other processes of a run would wait for it.
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("hub") and not HUB_TESTS:
            item.add_marker(pytest.mark.skip(reason="needs the Hub: set QUANTCACHE_HUB_TESTS=1"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep what imports and collection of the tests leave out of every collection of garbage: it is there to stay.

    To look for garbage meanwhile took a third of their time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """The same for what the modules before have left, imports and shared models: it is there to stay, too."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Count outcomes by row of the support table."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        for row, refused in item.config.stash[support.COLLECTED].get(item.nodeid, []):
            evidence = item.config.stash[support.EVIDENCE][row]
            evidence.refused |= refused
            evidence.works |= not refused
            evidence.shown |= not refused and report.outcome == "passed"
            evidence.tests.add(item.nodeid.partition("[")[0])
            evidence.outcomes[report.outcome] += 1
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the support table, if asked to."""
    path = session.config.getoption("--support-table")
    if path is not None:
        path.write_text(support.render(session.config.stash[support.EVIDENCE]), encoding="utf-8")


def _is_local(host: str | bytes | None) -> bool:
    """Whether a host name or address stays on this machine, without asking a name server."""
    if host is None:
        return True
    name = host.decode() if isinstance(host, bytes) else host
    if name in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Fail whatever reaches for another machine; Unix sockets and the loopback range stay open."""
    if HUB_TESTS:
        yield
        return

    def guard(name: str) -> Any:
        original = getattr(socket.socket, name)

        def guarded(self: socket.socket, *args: Any) -> Any:
            address = args[-1]  # connect(address), sendto(data[, flags], address)
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
                raise RuntimeError(f"tests must not use the network: {name} to {address[0]!r}")
            return original(self, *args)

        return guarded

    original_getaddrinfo = socket.getaddrinfo

    def getaddrinfo(host: str | bytes | None, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(host):
            raise RuntimeError(f"tests must not use the network: look-up of {host!r}")
        return original_getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, guard(name))
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


@pytest.fixture(scope="session", autouse=True)
def short_yardsticks() -> Iterator[None]:
    """Let calibrations measure their own cost on fewer tokens: of 2,048 the bundled model takes half a minute."""
    from quantcache.calibration import yardstick

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yardstick, "YARDSTICK_TOKENS", 260)
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same torch seed."""
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # that also notes, with a stack trace, to seed GPUs once there are any: a millisecond for every test
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def demo_model() -> PreTrainedModel:
    """The bundled model in fp32, shared by all tests: leave it as you found it."""
    from transformers import AutoModelForCausalLM

    from quantcache.data import demo_model_path

    return AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def demo_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the bundled model."""
    from transformers import AutoTokenizer

    from quantcache.data import demo_model_path

    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Larger texts that lie beside the checkout where they are to be had; skips where they are not."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return path
