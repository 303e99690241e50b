"""The environment record."""

from __future__ import annotations

import getpass
import json
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from quantcache.common.env import environment, git_state

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def test_environment_is_json() -> None:
    record = environment()
    assert json.loads(json.dumps(record)) == record
    assert record["versions"]["python"] == platform.python_version()
    assert record["versions"]["torch"] == str(torch.__version__)
    assert record["versions"].keys() >= {"transformers", "huggingface_hub", "safetensors", "scipy", "triton"}
    assert record["cpu"]["cores"] >= 1
    assert record["cpu"]["threads"] == torch.get_num_threads()
    assert len(record["gpus"]) == torch.cuda.device_count()


def test_environment_does_not_name_the_host_or_its_user() -> None:
    values = json.dumps(environment())
    assert str(Path.home()) not in values or str(Path.home()) == "/"
    for name in {platform.node(), getpass.getuser()} - {"", "root", "localhost"}:
        assert f'"{name}"' not in values


def git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


@needs_git
def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git(tmp_path, "init")
    assert git_state(tmp_path) == {"commit": None, "dirty": False}
    (tmp_path / "file").write_text("a")
    assert git_state(tmp_path) == {"commit": None, "dirty": True}
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    state = git_state(tmp_path)
    assert state is not None
    assert len(state["commit"]) == 40
    assert not state["dirty"]
    (tmp_path / "file").write_text("b")
    changed = git_state(tmp_path)
    assert changed == {"commit": state["commit"], "dirty": True}


@needs_git
def test_records_are_no_change(tmp_path: Path) -> None:
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "first")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "record.json").write_text("{}")
    state = git_state(tmp_path)
    assert state is not None
    assert not state["dirty"]
    (results.parent / "script.py").write_text("")
    state = git_state(tmp_path)
    assert state is not None
    assert state["dirty"]


@needs_git
def test_the_state_of_this_checkout_is_found() -> None:
    root = Path(__file__).resolve().parents[2]
    assert (environment()["git"] is not None) == (root / ".git").exists()
