"""Progress: the text says how far, how fast and how long; log lines come at most every few seconds."""

import logging

import pytest
from builders import Clock

from sanitize import progress
from sanitize.progress import ProgressDisplay


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


@pytest.fixture(autouse=True)
def not_a_terminal(monkeypatch, caplog):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO, logger="sanitize")


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "sanitize.progress"]


def test_a_line_says_how_far_how_fast_and_how_long(clock, caplog):
    with ProgressDisplay("scan", 4, work=1000) as display:
        clock.now += 10
        display.update(1, 250, items=500)
        assert lines(caplog) == ["scan: 1/4 shards, 500 images, 50 images/s, 30 s left"]


def test_a_note_and_another_unit_are_shown(clock, caplog):
    with ProgressDisplay("fit", 20, work=20, unit="epochs") as display:
        clock.now += 8
        display.update(4, 4, items=80, note="loss 0.5")
        assert lines(caplog) == ["fit: 4/20 epochs, 80 images, 10 images/s, loss 0.5, 32 s left"]


def test_work_done_in_an_earlier_run_does_not_shorten_the_time_left(clock, caplog):
    with ProgressDisplay("scan", 4, work=1000) as display:
        display.skip(500)
        clock.now += 10
        display.update(3, 750, items=100)
        assert lines(caplog) == ["scan: 3/4 shards, 100 images, 10 images/s, 10 s left"]


def test_before_any_work_no_time_left_is_guessed(clock, caplog):
    with ProgressDisplay("scan", 4, work=1000) as display:
        display.skip(500)
        clock.now += 10
        display.update(2, 500, items=0)
        assert lines(caplog) == ["scan: 2/4 shards, 0 images, 0 images/s"]


def test_lines_come_at_most_every_few_seconds_and_the_last_one_at_the_end(clock, caplog):
    with ProgressDisplay("scan", 100, work=100) as display:
        for second in range(1, 13):
            clock.now += 1
            display.update(second, second, items=second)
    assert [line.split(",")[0] for line in lines(caplog)] == [
        "scan: 5/100 shards",
        "scan: 10/100 shards",
        "scan: 12/100 shards",
    ]


def test_a_finished_run_ends_with_a_line_without_time_left(clock, caplog):
    with ProgressDisplay("scan", 2, work=10) as display:
        clock.now += 2
        display.update(2, 10, items=30)
    assert lines(caplog) == ["scan: 2/2 shards, 30 images, 15 images/s"]


def test_nothing_is_said_when_nothing_was_done(caplog):
    with ProgressDisplay("scan", 0, work=0):
        pass
    assert lines(caplog) == []


def test_an_error_is_not_followed_by_a_line_of_success(clock, caplog):
    def fails():
        with ProgressDisplay("scan", 2, work=10) as display:
            clock.now += 1
            display.update(1, 5, items=3)
            raise ValueError

    with pytest.raises(ValueError):
        fails()
    assert lines(caplog) == []


def test_on_a_terminal_a_bar_is_drawn_and_nothing_is_logged(monkeypatch, capsys, caplog):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with ProgressDisplay("scan", 2, work=10) as display:
        display.update(2, 10, items=30, note="1 flagged")
    assert lines(caplog) == []
    shown = capsys.readouterr().err
    assert "scan" in shown
    assert "2/2" in shown
