"""Schedules: plain functions of the optimizer step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def warmup_cosine(
    peak: float, total: int, warmup: int, final: float = 0.0, start: float = 0.0, inclusive: bool = False
) -> Schedule:
    """Linear from `start` at step 0 to `peak` at `warmup`, then a half cosine to `final` at `total` (MAE, DINO …).

    MAE evaluates this at fractional epochs; in steps it is the same function (its first step has rate 0).
    inclusive: as the DINO reference, whose last warm-up step already has the peak.
    """

    def at(step: int) -> float:
        if step < warmup:
            return start + (peak - start) * step / max(1, warmup - 1 if inclusive else warmup)
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * done))

    return at


def cosine(start: float, end: float, total: int) -> Schedule:
    """A half cosine from `start` at step 0 to `end` at `total` (momentum, weight decay)."""
    return warmup_cosine(start, total, 0, final=end)


def linear_then_constant(start: float, end: float, steps: int) -> Schedule:
    """Linear from `start` to `end` over `steps`, then constant (teacher temperature)."""
    return lambda step: end if step >= steps else start + (end - start) * step / steps


def stairs(start: float, end: float, epochs: int, steps_per_epoch: float) -> Schedule:
    """One value per epoch: `epochs` of them from `start` to `end`, both included, then `end` (the DINO reference)."""

    def at(step: int) -> float:
        epoch = int(step / steps_per_epoch)
        return end if epoch >= epochs else start + (end - start) * epoch / max(1, epochs - 1)

    return at
