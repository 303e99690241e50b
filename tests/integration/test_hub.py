"""Calibrations and exports through a small Hub on this machine: push, pull, revisions, and everything that goes wrong.

The client runs in a process of its own, since huggingface_hub reads its environment when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from quantcache.artifact.calibration import Calibration
from quantcache.artifact.files import CONFIG_NAME, TENSORS_NAME
from tests.families import FAMILIES
from tests.hub_server import TOKEN, HubServer, Repo

ROOT = Path(__file__).resolve().parent.parent.parent
REPO = "some-org/some-calibration"

_CLIENT = """
import gc, json, sys, time, traceback
gc.disable()  # a quarter of what imports take
time.sleep = lambda seconds: None  # huggingface_hub waits between attempts
sys.stdout, answers = sys.stderr, sys.stdout
from types import SimpleNamespace
import huggingface_hub
import torch
torch.set_num_threads(1)
from quantcache import Calibration, SpectralCache
from quantcache.artifact import hub
from quantcache.artifact.finding import find_calibration
from quantcache.common.errors import QuantCacheError
from quantcache.cli import main
gc.freeze()
gc.enable()
scope = dict(globals())
for line in sys.stdin:
    try:
        found = {"value": eval(json.loads(line), scope)}
    except SystemExit as exit:
        found = {"value": exit.code}
    except BaseException as error:
        found = {"error": str(error), "type": type(error).__name__}
        found["expected"] = isinstance(error, QuantCacheError)
        found["trace"] = traceback.format_exc()
    print(json.dumps(found), file=answers, flush=True)
"""


class Client:
    """A process that evaluates expressions with quantcache imported and the server as its Hub."""

    def __init__(self, endpoint: str, home: Path):
        self.home = home
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
        environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(home / "stderr.txt", "w"),  # noqa: SIM115 (the process outlives this call)
            env=environment,
            text=True,
        )

    def ask(self, expression: str) -> dict[str, Any]:
        """Evaluate an expression; gives its ``value``, or ``error``, ``type`` and ``expected``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(expression) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, (self.home / "stderr.txt").read_text()[-3000:]
        return json.loads(line)

    def value(self, expression: str) -> Any:
        """What an expression evaluates to."""
        found = self.ask(expression)
        assert "value" in found, found["trace"]
        return found["value"]

    def error(self, expression: str) -> str:
        """The one line that an expression fails with; it must be one of quantcache's own errors."""
        found = self.ask(expression)
        assert "error" in found, found
        assert found["expected"], found["trace"]
        assert "\n" not in found["error"]
        return found["error"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    """The Hub."""
    with HubServer() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A process that knows the Hub and has no token."""
    running = Client(server.endpoint, tmp_path_factory.mktemp("home"))
    yield running
    running.close()


@pytest.fixture
def hub(server: HubServer) -> HubServer:
    """The Hub, with nothing on it."""
    server.reset()
    return server


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Something to publish."""
    return Calibration.synthetic(FAMILIES[0].make().config, bits=3, seed=7)


@pytest.fixture
def published(hub: HubServer, calibration: Calibration, tmp_path: Path) -> Repo:
    """A repository that holds it."""
    calibration.save_pretrained(tmp_path / "saved")
    repo = hub.repos[REPO] = Repo()
    repo.commit({path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()})
    return repo


def load(cache: Path, **options: Any) -> str:
    """An expression that loads the calibration into a download cache and gives its bits."""
    more = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"Calibration.from_pretrained({REPO!r}, cache_dir={str(cache)!r}{more}).bits"


def finished_files(cache: Path) -> list[str]:
    """Names of the files that a download cache offers to its readers."""
    return sorted(path.name for path in cache.glob("models--*/snapshots/*/*"))


# ------------------------------------------------------------------ calibrations


@pytest.mark.slow
def test_push_and_pull(hub: HubServer, client: Client, calibration: Calibration, tmp_path: Path) -> None:
    calibration.save_pretrained(tmp_path / "saved")
    rows = [{"method": "spectral-3", "kl_mean": 0.0102}]
    saved, kwargs = str(tmp_path / "saved"), {"model_card_kwargs": {"metrics": rows}, "token": TOKEN, "private": True}
    url = client.value(f"Calibration.from_pretrained({saved!r}).push_to_hub({REPO!r}, **{kwargs!r})")
    repo = hub.repos[REPO]
    assert url == f"{hub.endpoint}/{REPO}/commit/{repo.refs['main']}"
    assert repo.private
    files = repo.commits[repo.refs["main"]]
    for name in (CONFIG_NAME, TENSORS_NAME):
        assert files[name] == (tmp_path / "saved" / name).read_bytes()
    card = files["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["library_name"] == "quantcache"
    assert "3-bit" in header["tags"]
    assert "0.0102" in card
    assert f'SpectralCache.from_pretrained("{REPO}"' in card
    assert client.value(load(tmp_path / "cache", token=TOKEN)) == calibration.bits
    hub.requests.clear()
    assert client.value(load(tmp_path / "cache", token=TOKEN)) == calibration.bits
    assert not [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]


def test_revisions(published: Repo, client: Client, calibration: Calibration, tmp_path: Path) -> None:
    calibration.with_bits(2).save_pretrained(tmp_path / "two")
    first = published.refs["main"]
    published.commit({path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}, "dev")
    assert client.value(load(tmp_path / "cache")) == calibration.bits
    assert client.value(load(tmp_path / "cache", revision="dev")) == calibration.with_bits(2).bits
    assert client.value(load(tmp_path / "cache", revision=first)) == calibration.bits
    cache = f"SpectralCache.from_pretrained({REPO!r}, revision='dev', cache_dir={str(tmp_path / 'cache')!r})"
    assert client.value(f"{cache}.calibration.bits") == calibration.with_bits(2).bits
    assert client.error(load(tmp_path / "cache", revision="v9")) == f"{REPO} has no revision v9"


def test_both_files_are_of_one_commit(
    published: Repo, hub: HubServer, client: Client, calibration: Calibration, tmp_path: Path
) -> None:
    """Though the branch moves between the two downloads."""
    calibration.with_bits(2).save_pretrained(tmp_path / "two")
    later = {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    first = published.refs["main"]
    hub.after[CONFIG_NAME] = lambda: published.commit(later)
    assert client.value(load(tmp_path / "cache")) == calibration.bits
    assert published.refs["main"] != first
    assert f"GET /{REPO}/resolve/{first}/{TENSORS_NAME}" in hub.requests
    assert client.value(load(tmp_path / "cache")) == calibration.with_bits(2).bits


def test_a_model_repository_carries_its_calibration(
    hub: HubServer, client: Client, calibration: Calibration, tmp_path: Path
) -> None:
    calibration.save_pretrained(tmp_path / "saved")
    files = {f"quantcache/{path.name}": path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    hub.repos[REPO] = Repo()
    hub.repos[REPO].commit(files | {"config.json": b"{}"})
    assert client.value(load(tmp_path / "cache")) == calibration.bits


@pytest.mark.support("enable(): a calibration found by the model's id")
def test_a_model_finds_the_calibration_in_its_repository(
    hub: HubServer, client: Client, calibration: Calibration, tmp_path: Path
) -> None:
    """Only where it is asked for, and with no request otherwise; the error says how to make one."""
    calibration.save_pretrained(tmp_path / "saved")
    files = {f"quantcache/{path.name}": path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    hub.repos[REPO] = Repo()
    first = hub.repos[REPO].commit({"config.json": b"{}"})

    def find(commit: str | None = None, **options: bool) -> str:
        config = f"SimpleNamespace(_name_or_path={REPO!r}, _commit_hash={commit!r})"
        found = f"find_calibration(SimpleNamespace(config={config}), **{options})"
        return f"(lambda found: [found.source, found.calibration.bits])({found})"

    make = f"'quantcache calibrate {REPO} --text FILE -o calibration/' makes one"
    error = client.error(find(hub=True))
    assert f"no calibration of {REPO} comes with quantcache, and {REPO} has no quantcache/{CONFIG_NAME}" in error
    assert error.endswith(make)
    hub.repos[REPO].commit(files)
    asked = len(hub.requests)
    assert client.error(find()).endswith(f"{make}, hub=True also looks on the Hub")
    assert len(hub.requests) == asked
    assert client.value(find(hub=True)) == [f"the one in {REPO} on the Hub", pytest.approx(3)]
    second = hub.repos[REPO].refs["main"]
    calibration.with_bits(2).save_pretrained(tmp_path / "newer")
    hub.repos[REPO].commit({f"quantcache/{path.name}": path.read_bytes() for path in (tmp_path / "newer").iterdir()})
    for commit, bits in ((None, 2), (first, 2), (second, 3)):  # beside these weights, where there is one
        assert client.value(find(commit, hub=True))[1] == pytest.approx(bits, abs=0.01)


def test_without_access(hub: HubServer, client: Client, tmp_path: Path) -> None:
    nothing = "the Hub has no repository some-org/some-calibration, or it is private and the token has no access"
    assert client.error(load(tmp_path)) == nothing  # 401 without a token
    assert client.error(load(tmp_path, token=TOKEN)) == nothing  # 404 with one
    hub.repos[REPO] = Repo(private=True)
    assert client.error(load(tmp_path)) == nothing
    hub.repos[REPO] = Repo()
    assert "token" in client.error(load(tmp_path, token="hf_wrong"))
    hub.repos[REPO] = Repo(gated=True)
    hub.repos[REPO].commit({CONFIG_NAME: b"{}"})
    assert client.error(load(tmp_path)).startswith(f"{REPO} is gated: request access")
    assert client.error(load(tmp_path, token=TOKEN)).startswith(f"{REPO} is gated: request access")
    assert finished_files(tmp_path) == []


def test_pushing_without_access(hub: HubServer, client: Client, calibration: Calibration, tmp_path: Path) -> None:
    calibration.save_pretrained(tmp_path / "saved")
    message = client.error(
        f"Calibration.from_pretrained({str(tmp_path / 'saved')!r}).push_to_hub({REPO!r}, token='hf_wrong')"
    )
    assert "401" in message
    assert REPO in message
    assert not hub.repos


def test_missing_files(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.repos[REPO] = Repo()
    hub.repos[REPO].commit({"config.json": b"{}"})
    assert client.error(load(tmp_path)) == f"{REPO} has no quantcache/{CONFIG_NAME}"
    assert client.error(load(tmp_path, subfolder="x")) == f"{REPO} has no x/{CONFIG_NAME}"


@pytest.mark.parametrize("fault", ["truncate", "error"])
def test_broken_downloads_leave_nothing(
    published: Repo, hub: HubServer, client: Client, tmp_path: Path, fault: str
) -> None:
    hub.faults[TENSORS_NAME] = fault
    message = client.error(load(tmp_path))
    assert TENSORS_NAME in message
    assert REPO in message
    assert finished_files(tmp_path) == [CONFIG_NAME]
    hub.faults.clear()
    assert client.value(load(tmp_path)) > 0


def test_a_hub_that_refuses_is_not_called_unreachable(
    published: Repo, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    hub.faults[TENSORS_NAME] = "forbid"
    message = client.error(load(tmp_path))
    assert message.startswith(f"the Hub answered 403 for {TENSORS_NAME} of {REPO} at revision ")
    hub.faults[TENSORS_NAME] = "corrupt"
    assert "cannot be read" in client.error(load(tmp_path))


def test_offline(published: Repo, hub: HubServer, client: Client, tmp_path: Path) -> None:
    wanted = f"{CONFIG_NAME} of {REPO} is not in the local cache"
    assert client.error(load(tmp_path, local_files_only=True)).startswith(wanted)
    bits = client.value(load(tmp_path))
    hub.requests.clear()
    assert client.value(load(tmp_path, local_files_only=True)) == bits
    assert not hub.requests
    switch = "setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', {})"  # what HF_HUB_OFFLINE=1 sets
    client.value(switch.format(True))
    try:
        assert client.value(load(tmp_path)) == bits
        assert client.error(load(tmp_path / "other")).startswith(wanted)
    finally:
        client.value(switch.format(False))
    assert not hub.requests


def test_corrupt_downloads_are_found_out_by_the_index(
    published: Repo, hub: HubServer, client: Client, calibration: Calibration, tmp_path: Path
) -> None:
    files = published.commits[published.refs["main"]]
    entry = {
        "model": "some-org/some-model",
        "revision": "a" * 40,
        "artifact": {
            "repo": REPO,
            "revision": published.refs["main"],
            "sha256": {name: hashlib.sha256(files[name]).hexdigest() for name in (CONFIG_NAME, TENSORS_NAME)},
        },
    }
    index = tmp_path / "index.json"
    content = {"format": "quantcache-calibration-index", "schema_version": "1.0", "calibrations": [entry]}
    index.write_text(json.dumps(content), "utf-8")
    published.commit({CONFIG_NAME: b"{}"})  # the index names a commit: later ones change nothing

    def found(cache: str, revision: str = "a" * 40) -> str:
        return (
            f"Calibration.for_model('some-org/some-model', revision={revision!r}, index={str(index)!r}, "
            f"cache_dir={str(tmp_path / cache)!r}).bits"
        )

    assert client.value(found("good")) == calibration.bits
    hub.faults[TENSORS_NAME] = "corrupt"
    message = client.error(found("bad"))
    assert entry["artifact"]["sha256"][TENSORS_NAME] in message
    assert "it is not the calibration that was published" in message
    assert "has no calibration of some-org/some-model at revision bbbb" in client.error(found("good", "b" * 40))


# ------------------------------------------------------------------ exports


def test_a_push_is_checked_before_the_work(hub: HubServer, client: Client) -> None:
    check, log_in = "hub.check_push", "__import__('os').environ.update(HF_TOKEN={!r})"
    client.value(log_in.format("hf_wrong"))
    assert client.error(f"{check}({REPO!r})").startswith("the Hub rejected the token")
    client.value(log_in.format(TOKEN))
    assert client.value(f"{check}({REPO!r})") is None
    assert client.value(f"{check}('somebody/new')") is None
    error = client.error(f"{check}('else/new')")
    assert error == "cannot push to else/new: the token belongs to some-org, somebody, not to else"
    assert client.error(f"{check}('a b')") == "cannot push to a b: repositories on the Hub are called OWNER/NAME"
    assert not hub.repos  # nothing is made for a check


def test_export_round_trip(hub: HubServer, client: Client, tmp_path: Path) -> None:
    family = FAMILIES[0]
    model = family.make(attention="sdpa")
    model.save_pretrained(tmp_path / "model")
    hub.repos["some-org/base"] = Repo()
    commit = hub.repos["some-org/base"].commit(
        {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
        | {"README.md": b"---\nlicense: mit\n---\n\nBase.\n", "pytorch_model.bin": b"not wanted"}
    )
    Calibration.synthetic(model.config, bits=3).save_pretrained(tmp_path / "calibration")
    arguments = ["export", "some-org/base", "-c", str(tmp_path / "calibration"), "-o", str(tmp_path / "out")]
    client.value(f"__import__('os').environ.update(HF_TOKEN={TOKEN!r})")
    assert client.value(f"main({[*arguments, '--push-to-hub', 'some-org/export']!r})") == 0
    assert not [request for request in hub.requests if "pytorch_model.bin" in request]
    repo = hub.repos["some-org/export"]
    files = repo.commits[repo.refs["main"]]
    written = {
        str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert {name: data for name, data in files.items() if name != ".gitattributes"} == written
    card = files["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["base_model"], header["license"], header["library_name"]) == ("some-org/base", "mit", "quantcache")
    assert "logits | differ from the base model's by at most" in card
    assert commit in card
    cache = f"SpectralCache.from_pretrained('some-org/export', cache_dir={str(tmp_path / 'cache')!r})"
    assert client.value(f"{cache}.calibration.metadata.recipe['absorbed']['basis']") == "spectral"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "vo"}


def test_an_export_takes_the_place_of_what_a_repository_had(hub: HubServer, client: Client, tmp_path: Path) -> None:
    """The original's calibration at the root was found before the export's own, and whole weights before its shards."""
    model = FAMILIES[0].make(attention="sdpa")
    model.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    Calibration.synthetic(model.config, bits=3).save_pretrained(tmp_path / "calibration")
    client.value(f"__import__('os').environ.update(HF_TOKEN={TOKEN!r})")
    assert client.value(f"Calibration.from_pretrained({str(tmp_path / 'calibration')!r}).push_to_hub({REPO!r})")
    hub.repos[REPO].commit(
        {"model.safetensors": b"older", "pytorch_model.bin": b"older", "notes.txt": b"kept", "other.gguf": b"kept"}
    )
    arguments = ["export", str(tmp_path / "model"), "-c", str(tmp_path / "calibration"), "-o", str(tmp_path / "out")]
    assert client.value(f"main({[*arguments, '--no-verify', '--push-to-hub', REPO]!r})") == 0
    files = hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]
    assert files["notes.txt"] == files["other.gguf"] == b"kept"
    assert {"model.safetensors", "pytorch_model.bin", CONFIG_NAME, TENSORS_NAME}.isdisjoint(files)
    assert "model.safetensors.index.json" in files
    loaded = f"Calibration.from_pretrained({REPO!r}, cache_dir={str(tmp_path / 'cache')!r})"
    assert client.value(f"{loaded}.metadata.recipe['absorbed']['basis']") == "spectral"


def test_exporting_what_cannot_be_had(hub: HubServer, client: Client, tmp_path: Path, calibration: Calibration) -> None:
    calibration.save_pretrained(tmp_path / "calibration")
    arguments = ["export", "some-org/other", "-c", str(tmp_path / "calibration"), "-o", str(tmp_path / "out")]
    assert client.value(f"main({arguments!r})") == 1
    hub.repos["some-org/other"] = Repo()
    hub.repos["some-org/other"].commit({"config.json": FAMILIES[0].make().config.to_json_string().encode()})
    assert client.value(f"main({arguments!r})") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration"]
    log = (client.home / "stderr.txt").read_text()
    assert "error: the Hub has no repository some-org/other" in log
    assert "is missing model.safetensors (weights in other formats are not read)" in log
