"""The part of a page of the docs that a measurement writes, between `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations

import re
from pathlib import Path


def shown(page: Path, name: str) -> str:
    """What stands there."""
    return _find(page.read_text(), name)[2]


def show(page: Path, name: str, text: str) -> None:
    """Put a text there."""
    before = page.read_text()
    found = _find(before, name)
    page.write_text(f"{before[: found.end(1)]}{text}\n{before[found.start(3) :]}")
    print(f"written: {page}")


def _find(text: str, name: str) -> re.Match[str]:
    found = re.search(rf"(<!-- {name} -->\n)(.*?)\n?(<!-- /{name} -->)", text, re.S)
    if found is None:
        raise ValueError(f"the page has no <!-- {name} --> … <!-- /{name} -->")
    return found
