"""Multinomial logistic regression by L-BFGS: the tool for a few labelled samples.

    minimise over W, b:  1/2 |W|^2 + C * sum over samples of cross-entropy(x W^T + b, y)

the form of DINOv2's log_regression (and scikit-learn): the bias is free. float64 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ITER, TRY_ITER, TOLERANCE = 200, 50, 1e-6  # TRY_ITER: in cross-validation, where the ranking is enough


class Scale:
    """Centred by the mean of the fitting samples and divided by their root mean square length, so that the same C
    means the same for every backbone."""

    def __init__(self, x: Tensor):
        x = x.double()
        self.mean = x.mean(0)
        self.length = (x - self.mean).square().sum(1).mean().sqrt().clamp(min=1e-12)

    def __call__(self, x: Tensor) -> Tensor:
        return (x.double() - self.mean) / self.length


def fit(
    x: Tensor, labels: Tensor, classes: int, cost: float, start: Tensor | None = None, max_iter: int = MAX_ITER
) -> Tensor:
    """Weights and bias in one tensor, float64 [classes, D + 1]. x: [n, D], labels int64 [n]; cost: C."""
    x = torch.cat([x.double(), x.new_ones(len(x), 1, dtype=torch.float64)], dim=1)
    both = (x.new_zeros(classes, x.shape[1]) if start is None else start.clone()).requires_grad_()
    solver = torch.optim.LBFGS(
        [both], max_iter=max_iter, tolerance_grad=TOLERANCE, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = 0.5 * both[:, :-1].square().sum() + cost * F.cross_entropy(x @ both.T, labels, reduction="sum")
        loss.backward()
        return loss

    solver.step(closure)
    return both.detach()


def predict(both: Tensor, x: Tensor) -> Tensor:
    """Classes, int64 [n]."""
    return (x.double() @ both[:, :-1].T + both[:, -1]).argmax(1)


def choose_cost(x: Tensor, labels: Tensor, classes: int, costs: Sequence[float], folds: int) -> float:
    """The C of the best accuracy in cross-validation, the smaller of equal ones; folds take turns within each class.

    Nothing but these samples is looked at. With one sample per class there is nothing to leave out: the middle C.
    """
    costs = sorted(costs)
    place = torch.zeros_like(labels)
    for c in labels.unique():
        rows = labels == c
        place[rows] = torch.arange(int(rows.sum()), device=labels.device)
    folds = min(folds, int(place.max()) + 1)
    if folds < 2 or len(costs) == 1:
        return costs[len(costs) // 2]
    hits = [0] * len(costs)
    for fold in range(folds):
        out = place % folds == fold
        scale = Scale(x[~out])
        seen, held, start = scale(x[~out]), scale(x[out]), None
        for i, cost in enumerate(costs):
            start = fit(seen, labels[~out], classes, cost, start, TRY_ITER)  # from the solution before: costs rise
            hits[i] += int((predict(start, held) == labels[out]).sum())
    return costs[max(range(len(costs)), key=lambda i: (hits[i], -i))]
