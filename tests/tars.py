"""Tar files of given members."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path


def write(path: Path, members: Iterable[tuple[str, bytes]]) -> str:
    """A tar file (compressed if its name ends in .gz) with these names and contents; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)
