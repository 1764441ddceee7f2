"""What a command says goes into `run.log`, and nothing of the recording outlives the command."""

import logging
import re
import sys
import warnings
from pathlib import Path

import pytest

from oa_train.cli import main as entry
from oa_train.cli.bars import track
from oa_train.cli.main import main
from oa_train.cli.output import console
from oa_train.cli.run_log import LIBRARIES, log, record_in, recording
from oa_train.errors import RunError
from oa_train.progress import counted

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) +\S")
TINY_FIT = [
    *("fit", "--model", "CircuitModule", "--data", "IOI", "--data.batch_size", "2", "--data.batches_per_epoch", "2"),
    *("--data.n_validation", "4", "--data.n_means", "4", "--data.n_test", "4", "--trainer.max_epochs", "1"),
    *("--finish.refit.steps", "1"),
]
TINY_COMPARE = [
    *("compare", "--run", "runs/circuit/version_0", "--compare.fit.steps", "1", "--compare.random_circuits", "1"),
    *("--data.n_test", "4", "--data.n_means", "4", "--data.n_validation", "4"),
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def handlers() -> dict[str, list[logging.Handler]]:
    return {logger.name: list(logger.handlers) for logger in (log, *map(logging.getLogger, LIBRARIES))}


def commanded(monkeypatch: pytest.MonkeyPatch, command) -> None:
    """Have `oa-train demo` run a function."""
    monkeypatch.setattr(entry, "import_module", lambda name: type("Module", (), {"demo": staticmethod(command)}))


def test_a_fit_and_a_comparison_are_recorded_even_when_they_are_quiet(capfd):
    assert main([*TINY_FIT, "--quiet"]) == 0
    assert main(["-q", *TINY_COMPARE]) == 0
    # Lightning writes to the streams of the process as well as to those of Python.
    assert capfd.readouterr() == ("", "")
    log = Path("runs/circuit/version_0/run.log").read_text()
    lines = log.splitlines()
    assert all(LINE.match(line) or re.fullmatch(r"\S{10} \S{12} INFO +", line) for line in lines)
    assert "oa-train fit --model CircuitModule" in lines[0]
    # After so few steps the circuit keeps everything, which needs no refit.
    for words in ("Seed set to 0", "GPU available", "averaging activations: ", "held-out prompts"):
        assert words in log, words
    assert "oa-train -q compare" in log
    assert "results: runs/circuit/version_0/studies/compare_0" in lines[-1]


def test_a_loud_command_says_what_it_records(capfd):
    assert main(TINY_FIT) == 0
    shown = capfd.readouterr()
    assert "results: runs/circuit/version_0" in shown.out
    assert "refitting the constants" in shown.err
    for noise in ("Tip", "GPU available", "weights_only", "Warning", "warning"):
        assert noise not in shown.out + shown.err, noise


def test_an_error_is_recorded_with_its_traceback_and_shown_without(monkeypatch, capsys):
    def command(words):
        record_in(Path())
        raise RunError("The disk is full.\nMake room.")

    commanded(monkeypatch, command)
    assert main(["demo", "-q"]) == 1
    assert capsys.readouterr() == ("", "oa-train: error: The disk is full.\nMake room.\n")
    log = Path("run.log").read_text()
    assert "ERROR   error: The disk is full." in log
    assert "Traceback" in log
    assert "in command" in log


def test_warnings_are_one_line_on_the_terminal_and_recorded_with_their_place(monkeypatch, capsys):
    def command(words):
        record_in(Path())
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("something is odd", UserWarning, stacklevel=1)

    commanded(monkeypatch, command)
    assert main(["demo"]) == 0
    assert capsys.readouterr().err == "oa-train: warning: something is odd\n"
    assert re.search(r"WARNING something is odd \(UserWarning, .*test_run_log.py:\d+\)", Path("run.log").read_text())


def test_what_was_said_before_the_folder_was_known_is_recorded_too(monkeypatch):
    def command(words):
        console.print("early")
        record_in(Path())
        console.print("late")
        # On disk at once, so that a kill loses nothing.
        assert "early" in Path("run.log").read_text()
        assert "late" in Path("run.log").read_text()
        raise KeyboardInterrupt

    commanded(monkeypatch, command)
    assert main(["demo"]) == 130
    assert Path("run.log").read_text().endswith("ERROR   interrupted.\n")


def test_a_second_command_is_appended(monkeypatch):
    commanded(monkeypatch, lambda words: record_in(Path()))
    assert main(["demo"]) == main(["demo"]) == 0
    assert Path("run.log").read_text().count("oa-train demo") == 2


def test_a_folder_that_changes_gets_what_follows():
    Path("other").mkdir()
    with recording(["demo"]):
        record_in(Path())
        record_in(Path("other"))
        console.print("later")
    assert "later" not in Path("run.log").read_text()
    assert "later" in Path("other/run.log").read_text()


def test_a_notice_that_a_library_hands_on_is_recorded_once():
    with recording(["demo"]):
        record_in(Path())
        logging.getLogger("lightning.pytorch").handle(logging.makeLogRecord({"msg": "a notice", "levelno": 20}))
    assert Path("run.log").read_text().count("a notice") == 1


@pytest.mark.parametrize("ending", [None, KeyboardInterrupt, SystemExit(3), RunError("x"), ValueError("y")])
def test_nothing_is_left_behind(monkeypatch, ending):
    def command(words):
        record_in(Path())
        if ending is not None:
            raise ending

    before, streams, shown = handlers(), (sys.stdout, sys.stderr), warnings.showwarning
    filters = list(warnings.filters)
    commanded(monkeypatch, command)
    main(["demo", "-q"])
    assert handlers() == before
    assert (sys.stdout, sys.stderr) == streams
    assert warnings.showwarning is shown
    assert warnings.filters == filters
    open_files = (
        {entry.resolve().name for entry in Path("/proc/self/fd").iterdir()}
        if Path("/proc/self/fd").is_dir()
        else set()
    )
    assert "run.log" not in open_files


def test_without_a_folder_nothing_is_written():
    assert main(["demo", "--foo"]) == 2
    record_in(Path())
    assert not list(Path().iterdir())


def test_help_is_never_quiet(capsys):
    assert main(["-q", "--help"]) == 0
    assert "--quiet" in capsys.readouterr().out


def test_progress_takes_every_step_and_ends_its_bar_when_the_loop_fails(capsys):
    assert list(counted(track, ["ab", "c"], "counting")) == ["ab", "c"]
    assert "counting: 3 passes in 0 s" in capsys.readouterr().err
    steps = counted(track, ["ab", "c"], "failing")
    next(steps)
    steps.close()
    assert not list(counted(track, [], "nothing"))
