"""What came of putting somebody's weights into a model: printed at the start, kept as init.json."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass
class Report:
    """matched: part -> number of tensors taken over; left: pattern of the file's names -> how many; fresh: what keeps
    its initial values."""

    source: str  # as it was typed
    what: str  # in words: an official file, a run folder …
    layout: str
    fits: list[str]  # this layout, and those that read the file alike
    networks: str  # which of the file's networks went where
    sha256: str | None = None
    matched: dict[str, int] = dataclasses.field(default_factory=dict)
    changed: list[str] = dataclasses.field(default_factory=list)
    left: dict[str, int] = dataclasses.field(default_factory=dict)
    fresh: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def official(self) -> bool:
        """Whether the layout was told from keys, not from a folder's own description."""
        return self.what.startswith("checkpoint ")

    def text(self) -> str:
        """Lines for the first screen."""
        layout = f"{self.layout} layout" if len(self.fits) == 1 else f"the layouts {', '.join(self.fits)} read it alike"
        layout = f" ({layout})" if self.official else ""
        rows = [
            ("weights", f"{self.what}, {self.networks}{layout}"),
            ("matched", _counts(self.matched)),
            ("converted", "; ".join(self.changed)),
            ("left", _counts(self.left)),
            ("fresh", _counts(self.fresh)),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(f"  {name:<11} {words}" for name, words in rows if words)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _counts(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({n})" for name, n in parts.items())


def patterns(keys: Iterable[str], depth: int = 2) -> dict[str, int]:
    """Names by their first parts, numbers as *: {"decoder_blocks.*": 96, …}, most frequent first."""

    def pattern(key: str) -> str:
        parts = [re.sub(r"^\d+$", "*", part) for part in key.split(".")]
        return ".".join(parts[:depth])

    return dict(Counter(map(pattern, keys)).most_common())
