"""Object masks in tars of their own (`data.objects`), so that they can be made again without touching the images.

The side-car of `/d/train-000000.tar` is a tar of the same name in another folder; it holds `<key>.objects.png` or
`<key>.boxes.json` for keys of that shard, in any order. Keys without either are images without objects, and masks
inside the shard count no more. The index of a side-car is that of any shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .manifest import expand, nearby, open_indexes
from .source import DataError
from .tar import Reader

FIELDS = ("objects", "boxes")
_Arrays = dict[str, np.ndarray]


class SideCars:
    """The masks of local shards, by sample number. `count` says how many samples have one.

    patterns: paths as for the shards; further tars among them are left alone. paths, shards: the shards' files and
    index arrays. lines: what the fingerprint of the data says about the side-cars.
    """

    def __init__(
        self, patterns: str | Sequence[str], paths: Sequence[str], shards: Sequence[_Arrays], index_dir: Path | None
    ):
        try:
            self.paths = _by_name(expand(patterns), paths)
            found = open_indexes(self.paths, index_dir, empty=True)
        except DataError as error:
            raise DataError(f"data.objects: {error}") from error
        self._reader = Reader(self.paths, [tuple(header["stamp"]) for header, _ in found])
        self._at = {field: [] for field in FIELDS}
        for path, shard, theirs, (_, own) in zip(paths, self.paths, shards, found):
            rows = _rows(path, theirs, shard, own)
            for field, tables in self._at.items():
                table = np.zeros((len(theirs["ends"]), 2), np.int64)
                if field in own:
                    table[rows] = own[field]
                tables.append(table)
        self._at = {field: np.concatenate(tables) for field, tables in self._at.items()}
        self.count = int(np.logical_or.reduce([table[:, 0] > 0 for table in self._at.values()]).sum())
        self.lines = [[Path(p).name, h["stamp"][0], h["n"], h["key_hash"]] for p, (h, _) in zip(self.paths, found)]

    def read(self, shard: int, id: int, key: str) -> dict[str, bytes | str]:
        """Fields of `Raw`: objects and boxes undecoded, as far as sample `id` of shard `shard` has them, and side."""
        at = {field: table[id].tolist() for field, table in self._at.items()}
        got = {field: self._reader.read(shard, *place) for field, place in at.items() if place[0]}
        return got | {"side": f"{self.paths[shard]}, key {key}"}


def _by_name(found: list[str], shards: Sequence[str]) -> list[str]:
    """The side-car of each shard: the file of the same name."""
    sides: dict[str, str] = {}
    for path in found:
        if (name := Path(path).name) in sides:
            raise DataError(f"{sides[name]} and {path} have the same name: name one side-car per shard")
        sides[name] = path
    names = [Path(path).name for path in shards]
    for name, path in zip(names, shards):
        if name not in sides:
            count = sum(other not in sides for other in names)
            raise DataError(
                f"no side-car named {name} for {path} ({count:,} of {len(names):,} shards have none): "
                f"{nearby(str(Path(found[0]).with_name(name)))}"
            )
        if names.count(name) > 1:
            raise DataError(f"several shards are named {name}: side-cars are found by file name, so name them apart")
    return [sides[name] for name in names]


def _rows(shard: str, theirs: _Arrays, side: str, own: _Arrays) -> np.ndarray:
    """For each key of a side-car, its number in the shard: int64 [k]. Arrays as `manifest.pack` makes them."""
    if np.array_equal(theirs["text"], own["text"]) and np.array_equal(theirs["ends"], own["ends"]):
        return np.arange(len(own["ends"]))
    numbers = {key: number for number, key in enumerate(_keys(theirs))}
    keys = _keys(own)
    unknown = [key for key in keys if key not in numbers]
    if unknown:
        raise DataError(
            f"data.objects: key {unknown[0].decode('utf-8', 'replace')} of {side} is not in {shard} "
            f"({len(unknown):,} of {len(keys):,} keys are not): make the side-car again from this shard"
        )
    return np.array([numbers[key] for key in keys], np.int64)


def _keys(arrays: _Arrays) -> list[bytes]:
    text, ends = arrays["text"].tobytes(), arrays["ends"].tolist()
    return [text[start:end] for start, end in zip([0, *ends], ends)]
