"""When a run is judged and when it draws: k-NN and pictures each at their own steps, off when told so."""

from types import SimpleNamespace

import pytest
import torch

import runs
from selfsight.objectives.objective import Objective
from selfsight.training import judge
from selfsight.training.log import read_metrics, written
from selfsight.training.loop import AfterStep

DRAW = ("pictures.every_n_steps",)  # off in runs.TINY


def judged(folder):
    return [int(row["step"]) for row in read_metrics(folder / "metrics.csv") if "rankme" in row]


def drawn(folder):
    return sorted(int(path.stem.split("-")[1]) for path in (folder / "pictures").glob("pca-*.png"))


def test_zero_is_off_and_pictures_keep_their_own_steps(tmp_path, monkeypatch, capsys):
    def never(*_):
        pytest.fail("a bank was decoded")

    monkeypatch.setattr(judge, "Online", never)
    words = ("max_steps=3", "knn.every_n_steps=0", "pictures.every_n_steps=2")
    summary = runs.run_here(tmp_path / "r", *words, without=DRAW)
    assert judged(tmp_path / "r") == [] and drawn(tmp_path / "r") == [0, 2, 3]
    assert summary["knn"] is None
    assert "judged" not in capsys.readouterr().out


def test_by_default_a_run_is_judged_five_times_and_draws_whenever_it_is(tmp_path, capsys):
    runs.run_here(tmp_path / "r", "max_steps=10", without=DRAW)
    assert judged(tmp_path / "r") == drawn(tmp_path / "r") == [0, 2, 4, 6, 8, 10]
    assert "judged      every 2 steps: 20-NN: cosine, centred" in capsys.readouterr().out


def test_a_try_out_is_judged_only_when_asked(tmp_path):
    runs.run_here(tmp_path / "r", "max_steps=9", without=DRAW)
    assert judged(tmp_path / "r") == drawn(tmp_path / "r") == []
    runs.run_here(tmp_path / "asked", "max_steps=3", "knn.every_n_steps=2", "pictures.every_n_steps=0", without=DRAW)
    assert judged(tmp_path / "asked") == [0, 2, 3] and drawn(tmp_path / "asked") == []


@pytest.mark.slow
def test_a_compiled_run_trains_as_an_eager_one_and_judging_compiles_nothing(tmp_path, monkeypatch):
    compile, evaluate, graphs = Objective.compile, judge.Judge.evaluate, []

    def counted(self, *what):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        numbers = evaluate(self, *what)
        graphs.append((before, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
        return numbers

    words = ("max_steps=2", "knn.every_n_steps=1")
    eager = runs.run_here(tmp_path / "eager", *words)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(Objective, "compile", lambda self, **words: compile(self, backend="aot_eager", **words))
    monkeypatch.setattr(judge.Judge, "evaluate", counted)
    compiled = runs.run_here(tmp_path / "compiled", *words, "trainer.compile=true")
    assert graphs[0] == (0, 0) and graphs[1][0] > 0 and len(set(graphs[1] + graphs[2])) == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    for key in ("loss_first", "loss_last", "knn_untrained", "rankme"):
        assert compiled[key] == pytest.approx(eager[key], rel=1e-4), key


def test_an_equal_score_is_no_better_one():
    """Scores are compared as the rows have them, with six digits."""
    after = SimpleNamespace(plan=SimpleNamespace(keep_best=True), best_knn=float(written(200 / 7)))
    assert not AfterStep._is_best(after, {"knn": 200 / 7})
    assert AfterStep._is_best(after, {"knn": 201 / 7})
