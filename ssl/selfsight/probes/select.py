"""Which training images choose hyper-parameters, so that the reported split never does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..data.rng import key_of, uniform

SELECT_SHARE = 0.1


def held_out(ids: np.ndarray, share: float = SELECT_SHARE) -> np.ndarray:
    """bool [n]: samples of the selection split. A hash of the id, so the split survives any reordering or subset.

    Where chance leaves a small set with less than half of the share, the samples with the smallest hashes are taken.
    """
    drawn = uniform(key_of(0, np.asarray(ids)), "probe/select", 1)[:, 0]
    each = np.unique(drawn)  # one per sample, also where a sample has several rows
    wanted = int(np.ceil(share * len(each)))
    return drawn < share if (each < share).sum() > wanted / 2 else drawn <= each[max(wanted - 1, 0)]


def at_the_end(grid: Sequence[Mapping[str, Any]], score: str) -> str:
    """A sentence where one learning rate of a grid (rows with "lr" and `score` in percent, None: diverged) is better
    than all others and the first or the last, so that the optimum may lie beyond. Else ""."""
    best: dict[float, float] = {}
    for row in grid:
        if row[score] is not None:
            best[row["lr"]] = max(row[score], best.get(row["lr"], row[score]))
    ranked, lrs = sorted(best.values()), sorted(best)
    if len(lrs) < 2 or ranked[-1] == ranked[-2] or ranked[-1] == 100:
        return ""
    for what, end, factor in (("highest", lrs[-1], 10), ("lowest", lrs[0], 0.1)):
        if best[end] == ranked[-1]:
            further = " and ".join(f"{lr:.2g}" for lr in sorted([end * factor**0.5, end * factor]))
            return f"the {what} learning rate, {end:g}, was the best, and the optimum may lie beyond: add {further}"
    return ""


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation over seeds; None for one seed, which shows none."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def counted(n: int, word: str) -> str:
    """As in "1 seed", "3 seeds"."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"
