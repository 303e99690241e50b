"""What integration tests share."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
import typer

from quantcache.cli import main
from tests.helpers import Run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keep torch to one thread.

    Tiny models gain nothing from more, and where other processes share the cores, threads that wait for each other
    make small eigendecompositions fifty times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


make_command = functools.cache(typer.main.get_command)
"""What the command line makes of its verbs and their signatures, whenever it is called: a fifth of a second."""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line; gives exit status, stdout and stderr."""
    monkeypatch.setattr(typer.main, "get_command", make_command)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call
