"""A line now and then about work that takes long, as the extraction of features has it."""

from __future__ import annotations

import time

SAY_EVERY = 15.0  # seconds between two lines; what is done before says nothing


class Progress:
    """Call it with every unit of work: `linear: 1,200 of 12,500 steps, 80 per second, 2 min left`."""

    def __init__(self, what: str, total: int, unit: str = "steps"):
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self.began = self.said = time.monotonic()

    def __call__(self, count: int = 1) -> None:
        """Say where the work stands if nothing was said for a while. count: units done since the last call."""
        self.done += count
        now = time.monotonic()
        if now - self.said < SAY_EVERY or self.done >= self.total:
            return
        self.said = now
        rate = self.done / (now - self.began)
        left = (self.total - self.done) / rate
        pace = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        rest = f"{left / 60:,.0f} min" if left >= 90 else f"{left:.0f} s"
        print(f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {pace} per second, {rest} left", flush=True)
