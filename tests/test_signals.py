"""A signal at an awkward moment: the run stops at a step boundary with the documented code, and goes on bit for bit."""

import errno
import os
import signal

import pytest

import runs
from kill_driver import SMALL
from selfsight.results import eval_results
from selfsight.training import checkpoint, module
from selfsight.training.judge import Judge
from selfsight.training.log import read_metrics
from selfsight.training.loop import RunStopped
from selfsight.training.stop import Agreed, Agreement

TERM, INT, USR1, USR2 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2
PLACES = ("update", "checkpoint", "evaluation")
LEFT = ("image_size", "knn.bank", "knn.queries")
WORDS = (
    *(word for word in SMALL if word.split("=")[0] not in ("knn.every_n_steps", "checkpoint.every_n_steps")),
    *("max_steps=5", "knn.every_n_steps=2", "checkpoint.every_n_steps=2", "knn.bank=16", "knn.queries=8"),
)


def at(place, monkeypatch, *signals, step=2):
    """Send signals to this process when it first is there, at this step."""
    left, when = list(signals), step

    def send(step):
        while step == when and left:
            os.kill(os.getpid(), left.pop(0))

    if place == "evaluation":
        evaluate = Judge.evaluate

        def interrupted(self, step, *args):
            send(step)
            return evaluate(self, step, *args)

        monkeypatch.setattr(Judge, "evaluate", interrupted)
        return
    where, point = {"update": (module, "step.update"), "checkpoint": (checkpoint, "checkpoint.written")}[place]
    monkeypatch.setattr(where, "fault", lambda name, step=None: send(step) if name == point else None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals") / "whole"
    runs.run_here(folder, *WORDS, without=LEFT)
    return runs.final_state(folder)


def cases():
    """A few of all in the default set."""
    quick = {("update", (TERM,)), ("checkpoint", (USR1, USR1)), ("evaluation", (INT,))}
    for place in PLACES:
        for signals in ((TERM,), (INT,), (USR1,), (USR2,), (TERM, TERM), (USR1, USR1), (INT, TERM)):
            marks = () if (place, signals) in quick else pytest.mark.slow
            yield pytest.param(place, signals, marks=marks, id=f"{place}-{'-'.join(s.name for s in signals)}")


@pytest.mark.parametrize(("place", "signals"), list(cases()))
def test_a_signal_at_any_moment_stops_at_a_step_boundary_and_costs_nothing(tmp_path, whole, place, signals):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunStopped, match="by a signal at step 3;") as stopped:
        at(place, patch, *signals)
        runs.run_here(tmp_path / "r", *WORDS, without=LEFT)
    assert stopped.value.code == 128 + signals[-1]
    assert checkpoint.newest(tmp_path / "r" / "checkpoints").name == "step-000000003"
    assert not list((tmp_path / "r" / "checkpoints").glob(".*"))
    runs.run_here(tmp_path / "r", *WORDS, without=LEFT)
    runs.assert_identical(runs.final_state(tmp_path / "r"), whole)


@pytest.mark.parametrize("heard", ["at once", "when it asks"])
def test_a_run_that_is_told_to_stop_saves_once_and_before_it_looks(tmp_path, monkeypatch, heard):
    """And the row of its step stands before it looks. The second: as with several processes, which hear of each other
    one step late unless they wait."""
    events, log = [], tmp_path / "r" / "metrics.csv"

    def noting(owner, name, what, step_of):
        own = getattr(owner, name)

        def noted(*args, **kwargs):
            events.append((what, step_of(args)))
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    noting(checkpoint, "save", "saved", lambda args: args[1])
    noting(Judge, "evaluate", "looked", lambda args: (args[1], [int(r["step"]) for r in read_metrics(log)][-1:]))
    at("update", monkeypatch, TERM, step=1)
    if heard == "when it asks":
        monkeypatch.setattr(Agreement, "later", lambda self, *mine: Agreed(0, 0, 0))
    words = [word for word in WORDS if not word.startswith("checkpoint.every")]
    with pytest.raises(RunStopped, match="by a signal at step 2;"):
        runs.run_here(tmp_path / "r", *words, "checkpoint.every_n_steps=100", without=LEFT)
    assert events == [("looked", (0, [])), ("saved", 2), ("looked", (2, [2]))]
    folder = tmp_path / "r" / "checkpoints"
    assert checkpoint.newest(folder).name == "step-000000002" == checkpoint.best(folder).name
    runs.run_here(tmp_path / "r", *words, "checkpoint.every_n_steps=100", without=LEFT)
    rows = read_metrics(tmp_path / "r" / "metrics.csv")
    assert [int(row["step"]) for row in rows if row.get("knn")] == [0, 2, 4, 5]


def test_a_run_that_is_told_to_stop_leaves_long_evaluations_to_the_same_command(tmp_path, monkeypatch, capsys):
    words = (*WORDS, "eval.knn.every_n_steps=2", "eval.knn.how=inline")
    at("update", monkeypatch, TERM, step=1)
    with monkeypatch.context() as patch, pytest.raises(RunStopped, match="by a signal at step 2;") as stopped:
        patch.setattr(checkpoint, "mark_best", full)
        runs.run_here(tmp_path / "r", *words, without=LEFT)
    assert stopped.value.code == 128 + TERM
    assert "step 2 stands, but cannot be marked as the best ([Errno 28] No space left" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path / "r" / "checkpoints").name == "step-000000002"
    assert not eval_results(tmp_path / "r", "knn")
    runs.run_here(tmp_path / "r", *words, without=LEFT)
    assert list(eval_results(tmp_path / "r", "knn")) == [2, 4, 5]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
