"""Side-car tars: object ids for the samples of other shards, `<key>.objects.png` in the order of the data.

A side-car has the name of its shard and lies in another folder. It is written with webdataset's `TarWriter` (mtime 0,
no owner: equal masks are equal files) under `<name>.partial`, and gets its name when it is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from .manifest import Shards
from .source import DataError, Source
from .tar import Member, scan, split_name

FIELD, WHY = "objects.png", "error.txt"  # members of a sample; the second says why its image could not be used
PER_FILE = 10_000  # samples in a side-car of a folder, which has no shards of its own


class SideCar(NamedTuple):
    """A file to write, and the samples of the source that it is about."""

    path: Path
    ids: range


class Labelled(NamedTuple):
    """One sample of a side-car: PNG bytes, and why there are no objects if the image could not be used."""

    key: str
    png: bytes
    why: str = ""


def plan(source: Source, out: Path | None) -> list[SideCar]:
    """A side-car per shard, in `out` or in `objects/` beside the shard; DataError where names would collide.

    A source without shards (a folder) gets `objects-000000.tar` … in `out`.
    """
    if not isinstance(source, Shards):
        if out is None:
            raise DataError("side-cars of a folder need out=, the folder to write")
        starts = range(0, len(source), PER_FILE)
        ends = (min(start + PER_FILE, len(source)) for start in starts)
        return [SideCar(out / f"objects-{i:06d}.tar", range(*ids)) for i, ids in enumerate(zip(starts, ends))]
    cars, start = [], 0
    for shard, length in zip(map(Path, source.paths), source.lengths):
        path = (out or shard.parent / "objects") / shard.name
        if path.exists() and path.samefile(shard):
            raise DataError(f"out={path.parent} holds the data itself: choose another folder")
        cars.append(SideCar(path, range(start, start + length)))
        start += length
    if len({car.path for car in cars}) < len(cars):
        raise DataError(f"shards of equal names in different folders cannot share out={out}: name one folder of them "
                        "at a time, or leave out= away")  # fmt: skip
    return cars


def members(path: Path) -> dict[str, dict[str, Member]]:
    """Key -> extension -> member of a side-car. DataError for a file that was not written here."""
    found: dict[str, dict[str, Member]] = {}
    for member in scan(str(path)):
        key, extension = split_name(member.name) or (member.name, "")
        if extension not in (FIELD, WHY):
            raise DataError(f"{path} holds {member.name}, so it is no side-car of object ids: choose another out=")
        found.setdefault(key, {})[extension] = member
    return found


def is_complete(car: SideCar, key: Callable[[int], str]) -> bool:
    """Whether a side-car is there. DataError if what is there is about other samples."""
    if not car.path.exists():
        return False
    if list(members(car.path)) != [key(id) for id in car.ids]:
        raise DataError(f"{car.path} has other keys than the data: remove it, or choose another out=")
    return True


def write(path: Path, samples: Iterable[Labelled]) -> None:
    """Write one side-car; what an earlier attempt left behind is replaced."""
    from webdataset import TarWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with (
            partial.open("wb") as file,
            TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as tar,
        ):
            for sample in samples:
                why = {WHY: sample.why.encode("utf-8", "replace")} if sample.why else {}
                tar.write({"__key__": sample.key, FIELD: sample.png, **why})
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_back(cars: Sequence[SideCar], wanted: Iterable[int]) -> tuple[dict[int, bytes], list[str]]:
    """From the files: the PNGs of some samples whose images could be used, and why others (all of them) could not."""
    wanted, pngs, unusable = set(wanted), {}, []
    for car in cars:
        with car.path.open("rb") as file:
            for id, found in zip(car.ids, members(car.path).values()):
                if WHY in found:
                    unusable.append(_content(file, found[WHY]).decode("utf-8", "replace"))
                elif id in wanted:
                    pngs[id] = _content(file, found[FIELD])
    return pngs, unusable


def _content(file: IO[bytes], member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
