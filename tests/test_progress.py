"""Stages of planned work are numbered, and their time is estimated from what is done."""

from contextlib import contextmanager

import pytest

from oa_train import progress
from oa_train.cli.bars import Bars
from oa_train.progress import Stage, Track, counted, duration


class Told(Track):
    """Notes descriptions, planned and done passes, and lines."""

    def __init__(self):
        self.stages_told, self.lines = [], []

    @contextmanager
    def __call__(self, passes, description):
        stage = [description, passes, 0]
        self.stages_told.append(stage)

        def advance(done):
            stage[2] += done

        yield advance

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_stages_are_numbered_and_their_whole_time_is_said_after_the_first_step(clock):
    told = Told()
    track = told.planned([Stage("first", 10), Stage("second", 90)])
    with track(10, "averaging") as advance:
        clock[0] += 4
        advance(2)  # 2 s a pass
        advance(0)
    with track(90, "evaluating") as advance:
        clock[0] += 20
        advance(2)  # too few to tell: at the pace of all so far, 6 s
        clock[0] += 80
        advance(8)  # 10 s a pass: more than said
    assert [description for description, *_ in told.stages_told] == ["1 of 2  averaging", "2 of 2  evaluating"]
    later = ["this takes about 9 min, 9 min from now", "this takes about 15 min, 13 min from now"]
    assert told.lines == ["this takes about 3 min", *later]


def test_a_slow_short_stage_does_not_set_the_pace_of_later_ones(clock):
    told = Told()
    track = told.planned([Stage("first", 90), Stage("slow", 10), Stage("last", 900)])
    with track(90, "averaging") as advance:
        clock[0] += 90
        advance(90)
    with track(10, "running prompts twice") as advance:
        clock[0] += 20
        advance(10)
    assert told.lines == ["this takes about 17 min"]


def test_short_work_is_not_estimated_and_one_stage_not_numbered(clock):
    told = Told()
    with told.planned([Stage("only", 4)])(4, "evaluating") as advance:
        clock[0] += 2
        advance(2)
    assert (told.lines, told.stages_told) == ([], [["evaluating", 4, 2]])


def test_batches_count_their_prompts():
    told = Told()
    assert list(counted(told, ["abc", "d"], "averaging")) == ["abc", "d"]
    assert told.stages_told == [["averaging", 4, 4]]


@pytest.mark.parametrize(("seconds", "text"), [(40.2, "40 s"), (89, "89 s"), (260, "4 min"), (7800, "2 h 10 min")])
def test_durations_as_a_person_says_them(seconds, text):
    assert duration(seconds) == text


def test_a_log_file_gets_a_line_a_minute(clock, capsys):
    with Bars()(600, "evaluating circuits") as advance:
        for _ in range(600):
            clock[0] += 1
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "evaluating circuits: 10%, 9 min left"
    assert lines[-1] == "evaluating circuits: 600 passes in 10 min"
    assert len(lines) == 10
