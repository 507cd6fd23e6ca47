"""Which training images choose hyper-parameters, so that the reported split never does."""

from __future__ import annotations

from collections.abc import Sequence

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


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation over seeds; None for one seed, which shows none."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def counted(n: int, word: str) -> str:
    """As in "1 seed", "3 seeds"."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"
