"""What tells of long work: a bar on a terminal, a line now and then in a log."""

import pytest

from quantcache import calibrate
from quantcache.common import progress
from quantcache.common.progress import progress_bar
from tests.families import FAMILIES, random_tokens, shared_model


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the bar goes by, in seconds; a list of one."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_for_each_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as bar:
        task = bar.add_task("calibrating", total=32_768)
        for _ in range(20):
            clock[0] += 15
            bar.advance(task, 512)
        other = bar.add_task("measuring", total=None)
        clock[0] += 3600
        bar.update(other, completed=7, description="predicting")
    out, err = capsys.readouterr()
    lines = [f"calibrating: {2048 * n:,} of 32,768 after {n} min" for n in range(1, 6)]
    assert not out
    assert err.splitlines() == [*lines, "predicting: 7 after 65 min"]


def test_short_work_and_unwanted_progress_say_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as bar:
        bar.advance(bar.add_task("short", total=1))
    with progress_bar(wanted=False) as bar:
        task = bar.add_task("long", total=2)
        clock[0] += 3600
        bar.advance(task)
    assert capsys.readouterr() == ("", "")


def test_a_log_that_cannot_be_written_stops_nothing(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    with progress_bar() as bar, open("/dev/null") as unwritable:
        monkeypatch.setattr("sys.stderr", unwritable)
        task = bar.add_task("long", total=2)
        clock[0] += 3600
        bar.advance(task)
        assert bar.tasks[0].completed == 1


def test_a_terminal_gets_a_bar_that_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich goes by
    bar = progress_bar()
    assert not bar.disable
    assert bar.live.transient


def test_a_calibration_tells_of_both_its_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    calibrate(shared_model(FAMILIES[0]), random_tokens(2, 256))
    err = capsys.readouterr().err
    assert "calibrating: 512 of 512 after 0 min\n" in err
    assert "measuring what it costs: 512 after 0 min\n" in err
