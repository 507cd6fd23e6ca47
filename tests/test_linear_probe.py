"""The grid of linear heads: each head trains as if alone, and nothing is chosen on the test split."""

import math

import numpy as np
import pytest
import torch

from selfsight.probes import ProbeError
from selfsight.probes.linear import _fit, held_out, linear


def data(n=400, q=200, d=8, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    centers = 1.2 * torch.randn(classes, d, generator=g)
    labels, test_labels = torch.arange(n) % classes, torch.arange(q) % classes
    scale = 10 ** torch.linspace(-2, 2, d)  # features of very different sizes: standardisation must cope
    train = (centers[labels] + torch.randn(n, d, generator=g)) * scale
    return train, labels, (centers[test_labels] + torch.randn(q, d, generator=g)) * scale, test_labels


def run(*, lrs=(0.01, 0.1), weight_decays=(0.0,), epochs=20, seed=0, tensors=None):
    train, labels, test, test_labels = tensors or data()
    select = held_out(np.arange(len(train)))
    return linear(train, labels, test, test_labels, select=select, lrs=lrs, weight_decays=weight_decays,
                  epochs=epochs, batch_size=64, seed=seed)  # fmt: skip


def test_learns_separable_classes_far_above_chance():
    assert run().top1 > 75


def test_every_head_trains_as_torch_sgd_would_alone():
    train, labels, _, _ = data(n=96)
    x = (train - train.mean(0)) / train.std(0)
    heads = [(0.05, 0.0), (0.2, 0.01)]
    weight, bias = _fit(x, labels, 3, heads, epochs=4, batch=32, seed=3)
    for i, (lr, wd) in enumerate(heads):
        g = torch.Generator().manual_seed(3)
        head = torch.nn.Linear(8, 3)
        head.weight.data = torch.randn(3, 8, generator=g) * 0.01
        head.bias.data.zero_()
        groups = [{"params": [head.weight], "weight_decay": wd}, {"params": [head.bias]}]
        sgd, steps = torch.optim.SGD(groups, lr=lr, momentum=0.9), 12
        for epoch in range(4):
            for j, rows in enumerate(torch.randperm(96, generator=g).split(32)):
                for group in sgd.param_groups:
                    group["lr"] = lr * 32 / 256 * 0.5 * (1 + math.cos(math.pi * (3 * epoch + j) / steps))
                sgd.zero_grad()
                torch.nn.functional.cross_entropy(head(x[rows]), labels[rows]).backward()
                sgd.step()
        # Momentum is applied before the rate in both, so a rate that changes per step agrees too.
        torch.testing.assert_close(weight[i], head.weight.data, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bias[i], head.bias.data, rtol=1e-4, atol=1e-6)


def test_same_seed_same_result():
    first, second = run(seed=4), run(seed=4)
    assert first.grid == second.grid and torch.equal(first.predictions, second.predictions)


def test_a_useless_learning_rate_is_not_chosen():
    result = run(lrs=(1e-9, 0.1))
    assert result.lr == 0.1
    assert result.grid[0]["select_top1"] < result.grid[1]["select_top1"] == result.select_top1


def test_nothing_of_the_choice_depends_on_the_test_split():
    train, labels, test, test_labels = data()
    one = run(tensors=(train, labels, test, test_labels))
    other = run(tensors=(train, labels, test.flip(0), test_labels))
    assert one.grid == other.grid and one.top1 != other.top1


def test_the_held_out_tenth_follows_the_id_alone():
    ids = np.arange(20_000)
    mask = held_out(ids)
    assert 0.09 < mask.mean() < 0.11
    assert np.array_equal(held_out(ids[::-1]), mask[::-1])


def test_unlabelled_samples_are_refused():
    train, labels, test, test_labels = data()
    with pytest.raises(ProbeError, match="200 of 200 test samples have no label"):
        run(tensors=(train, labels, test, torch.full_like(test_labels, -1)))
