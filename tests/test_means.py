"""Means of a row: over micro-batches and sessions, each name with its own count."""

import pytest
import torch

from selfsight.training.means import Means

CPU = torch.device("cpu")


def of(*values, name="loss"):
    means = Means()
    for value in values:
        means.add({name: torch.tensor(value)})
    return means


@pytest.mark.parametrize("per_step", [1, 2, 3])
def test_a_row_that_is_interrupted_is_the_mean_of_all_its_steps(per_step):
    before, after = [0.1, 0.7, 0.4], [1.3]
    whole = of(*before, *after).take(CPU)
    state = of(*(v for v in before for _ in range(2))).state(2, CPU)  # two micro-batches each
    means = Means()
    means.restore(state, per_step, CPU)
    for _ in range(per_step):
        means.add({"loss": torch.tensor(after[0])})
    assert means.take(CPU) == pytest.approx(whole, rel=1e-12)


def test_a_name_that_comes_or_goes_is_the_mean_of_the_steps_that_had_it():
    means = of(1.0, 2.0)
    means.restore(of(4.0, 6.0, name="old").state(1, CPU), 1, CPU)
    assert means.take(CPU) == {"loss": 1.5, "old": 5.0}
    assert means.take(CPU) == means.state(1, CPU) == {}
