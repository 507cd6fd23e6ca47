"""Lines about the progress of probes: now and then, and none for what is quick."""

import numpy as np
import pytest
import torch

from selfsight.probes import dense_heads, linear, progress
from selfsight.probes.attentive import EP_LARS, Memory, attentive
from selfsight.probes.knn import knn
from selfsight.probes.segmentation import _shares
from selfsight.probes.store import Bank


class Clock:
    """Every look at it takes so many seconds."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def monotonic(self):
        self.now += self.seconds
        return self.now


def test_a_line_says_what_is_done_how_fast_and_what_is_left(monkeypatch, capsys):
    monkeypatch.setattr(progress, "time", Clock(5.0))
    said = progress.Progress("training of 3 heads", 1000)
    for _ in range(6):
        said(100)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "training of 3 heads: 300 of 1,000 steps, 20 per second, 35 s left",
        "training of 3 heads: 600 of 1,000 steps, 20 per second, 20 s left",
    ]
    monkeypatch.setattr(progress, "time", Clock(100.0))
    said = progress.Progress("k-NN", 3, "queries")
    said(), said(2)
    assert capsys.readouterr().out == "k-NN: 1 of 3 queries, 0.01 per second, 3 min left\n"  # the last says nothing


def do_attentive():
    x, labels = torch.randn(40, 4, 8), torch.arange(40) % 2
    recipe = EP_LARS._replace(epochs=3, batch_size=16)
    attentive(Memory(x), labels, Memory(x), labels, select=np.arange(40) < 8, num_queries=(2,), recipe=recipe)


def do_linear():
    x, labels = torch.randn(40, 8), torch.arange(40) % 2
    linear.linear(x, labels, x, labels, select=np.arange(40) < 8, lrs=(0.1,), weight_decays=(0.0,), epochs=3)


def do_knn():
    x, labels = torch.randn(40, 8), torch.arange(40) % 2
    knn(x, labels, x.repeat(200, 1), labels.repeat(200))


def do_segmentation():
    columns = {key: np.arange(8) for key in ("ids", "part", "key", "content", "labels")}
    bank = Bank(columns, {"patches": np.random.default_rng(0).normal(size=(8, 4, 8)).astype(np.float32)})
    recipe = dense_heads.Recipe(epochs=3, batch_size=4, lrs=(0.01,))
    dense_heads.fit(bank, np.zeros((8, 4, 1), np.int32), np.arange(8), 2, recipe, (0,), read=(None, True),
                    shares=lambda ids: _shares(ids, 2, 255))  # fmt: skip


@pytest.mark.parametrize(("work", "what"), [
    (do_attentive, "training of 1 heads: "), (do_linear, "training of 1 linear heads: "), (do_knn, "k-NN: "),
    (do_segmentation, "training of 1 linear heads: "),
])  # fmt: skip
def test_long_work_says_where_it_stands_and_quick_work_says_nothing(work, what, monkeypatch, capsys):
    work()
    assert not capsys.readouterr().out
    monkeypatch.setattr(progress, "time", Clock(20.0))
    work()
    assert capsys.readouterr().out.startswith(what)
