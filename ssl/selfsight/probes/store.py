"""A bank of features on disk: one pass of a frozen backbone over a split, kept as memory-mapped .npy files.

    <root>/<model>-<hash>/<arrays>/   ids, labels, part, key, content, pooled, patches-11-norm … .npy and bank.json

The hash is that of `identity`: other weights, data or transform lie elsewhere. Each inner folder holds the arrays of
one extraction; a later probe takes what is there from any of them and extracts only what is missing. A folder appears
by renaming, so what stands is complete; what is being written (`.part-…`) continues where it stopped. Rows are appended
with plain writes, never through a map, because a full disk then is an error and not a crash.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..data.source import Source
from . import ProbeError
from .cuts import Cut
from .identity import How, digest, identity
from .part import COLUMNS, Part, damage
from .passes import count_crops, encode_samples
from .readout import Layout, Want, layout, resolve

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KEEP_FREE = 0.02  # share of the disk that a bank leaves alone
SAY_EVERY = 15.0  # seconds between lines about the progress
LOCK = ".lock"
RETRIES = 3


class Place(NamedTuple):
    """Where banks lie, how large one may be (gigabytes), and what to call the model in folder names."""

    root: Path
    max_gb: float = 50.0
    name: str = "backbone"


class Bank:
    """Features of one split. Row r is crop `part[r]` of sample `ids[r]`; a cut with one crop has part 0 everywhere.

    labels int64 [n] (-1: none). key, content: uint64 hashes [n] of the sample's key and of its image's bytes.
    arrays: by `Want.name`, [n, ...], memory-mapped or not. bad: (id, sentence) of samples left out. shown: bool [n],
    with masks only. made: folders on disk that came into being for this bank.
    """

    made: Sequence[Path] = ()

    def __init__(self, columns, arrays, *, bad=(), depth: int = 0, describe: str = "", shown: Tensor | None = None):
        self.ids, self.part, self.key, self.content = (columns[k] for k in ("ids", "part", "key", "content"))
        self.labels = torch.from_numpy(np.array(columns["labels"], dtype=np.int64))
        self.arrays: dict[str, np.ndarray] = arrays
        self.bad, self.depth, self.describe, self.shown = list(bad), depth, describe, shown

    def __len__(self) -> int:
        return len(self.ids)

    def array(self, kind: str, layer: int | None = None, norm: bool = True) -> np.ndarray:
        """One array as it is stored, [n, ...]."""
        return self.arrays[resolve(Want(kind, layer, norm), self.depth).name]

    def vectors(
        self, kind: str = "pooled", layer: int | None = None, rows: Sequence[int] | None = None, norm: bool = True
    ) -> Tensor:
        """float32 [n or rows, D] of "pooled", "class" or "mean", in memory."""
        return _rows(self.array(kind, layer, norm), rows)

    def read(self, want: Want) -> Tensor:
        """The same by what was asked for."""
        return self.vectors(want.kind, want.layer, norm=want.norm)

    def tokens(self, layer: int | None = None, rows: Sequence[int] | None = None, norm: bool = True) -> Tensor:
        """Patch tokens float32 [rows, N, D] of a layer (None: the output), in the order of the rows."""
        return _rows(self.array("patches", layer, norm), rows)


def _rows(array: np.ndarray, rows: Sequence[int] | None) -> Tensor:
    """Rows as float32. Read in the order of the file, which disks like, and put where they belong."""
    if rows is None:
        return torch.from_numpy(np.array(array, dtype=np.float32))
    wanted = np.asarray(rows)
    out = np.empty((len(wanted), *array.shape[1:]), dtype=np.float32)
    for at in np.argsort(wanted, kind="stable"):
        out[at] = array[wanted[at]]
    return torch.from_numpy(out)


class Plan(NamedTuple):
    """A bank that is asked for: `names` of the arrays, and in `facts` all that decides them (`identity`)."""

    model: nn.Module
    source: Source
    ids: np.ndarray
    cut: Cut
    how: How
    place: Place
    facts: dict[str, Any]
    layout: Layout
    names: list[str]

    @property
    def folder(self) -> Path:
        return self.place.root / f"{self.place.name}-{digest(json.dumps(self.facts).encode())[:16]}"

    def arrays(self, names: Iterable[str]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape of a row and type, as they are stored."""
        return {n: (self.layout.shapes[n], self.how.dtype if n.startswith("patches") else "float32") for n in names}


def plan(
    model: nn.Module, source: Source, ids: Sequence[int], wants: Sequence[Want], *, cut: Cut, how: How, place: Place,
    labels: np.ndarray | None = None,
) -> Plan:  # fmt: skip
    """What a bank of samples `ids` with at least these arrays would be. model: a timm model in eval mode on
    `how.device` (`readout.plain`). labels: of the samples (`labels_of`), where they are known."""
    if not len(ids):
        raise ProbeError(f"{source.describe}: no sample is left to look at")
    facts = identity(model, source, ids, cut, how, labels)
    found = layout(model, wants, cut.size, cut.channels)
    names = list(dict.fromkeys(resolve(want, found.depth).name for want in wants))
    return Plan(model, source, np.asarray(ids), cut, how, place, facts, found, names)


def stored(*args, **kwargs) -> Bank:
    """`plan` and `make` in one."""
    return make(plan(*args, **kwargs))


def make(asked: Plan) -> Bank:
    """The bank, found, continued or extracted.

    ProbeError in one sentence where it would not fit, where the disk is full, or where too many samples cannot be read.
    """
    folder, root = asked.folder, asked.place.root
    try:
        for _ in range(RETRIES):
            try:
                return _make(asked, folder)
            except FileNotFoundError:  # somebody removed their features between our look and our opening them
                continue
        return _make(asked, folder)
    except ProbeError:
        _tidy(folder)
        raise
    except OSError as error:
        if error.errno in FULL:
            _tidy(folder)
        if error.errno in FULL:
            raise ProbeError(
                f"the disk of {root} is full: the unfinished bank was removed; free some space, or use "
                "bank.folder=<another disk>, bank.dtype=float16 or a smaller probe.bank"
            ) from error
        raise ProbeError(f"the bank of features cannot be kept in {root} ({error.strerror}); "
                         "use bank.folder=<a folder that can be written>") from error  # fmt: skip


def _make(asked: Plan, folder: Path) -> Bank:
    folder.mkdir(parents=True, exist_ok=True)
    found, made = _found(folder, asked.facts, mend=False), []
    if _missing(asked.names, found):
        with _alone(folder) as alone:
            found = _found(folder, asked.facts, mend=True)
            if missing := _missing(asked.names, found):
                check_sizes([asked])
                found.append(_extract(asked, missing, alone))
                made.append(found[-1][0])
    else:
        print(f"features: {len(asked.ids):,} images from {folder}", flush=True)
    bank = _open(found, asked.names, asked.layout.depth, asked.source.describe)
    bank.made = made
    return bank


def remove(made: Iterable[Path]) -> None:
    """Take extractions off the disk (`Bank.made`), and their folders where nothing else is left."""
    for path in made:
        shutil.rmtree(path, ignore_errors=True)
        _tidy(path.parent)


def _tidy(folder: Path) -> None:
    """Remove the folder of a bank if nothing is in it, and its root if that was made for it alone."""
    with contextlib.suppress(OSError), (folder / LOCK).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # whoever works there keeps the folder
        if [p.name for p in folder.iterdir()] == [LOCK]:
            shutil.rmtree(folder)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def _open(found: list[tuple[Path, dict]], names: list[str], depth: int, describe: str) -> Bank:
    """The arrays that are wanted, each from the first folder that has it."""
    at = {name: next(path for path, meta in found if name in meta["arrays"]) for name in names}
    first = at[names[0]]
    columns = {name: np.load(first / f"{name}.npy") for name in COLUMNS}
    arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name, path in at.items()}
    meta = next(meta for path, meta in found if path == first)
    return Bank(columns, arrays, bad=[tuple(b) for b in meta["bad"]], depth=depth, describe=describe)


def _missing(names: Iterable[str], found: list[tuple[Path, dict]]) -> list[str]:
    return [name for name in names if not any(name in meta["arrays"] for _, meta in found)]


def _found(folder: Path, facts: dict[str, Any], mend: bool) -> list[tuple[Path, dict[str, Any]]]:
    """Complete extractions in this folder, without those that are damaged or say that they were made of something
    else. mend: remove these (only for who is `_alone`)."""
    out = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        try:
            meta = json.loads((path / "bank.json").read_text())
            why = _other(meta["identity"], facts) or damage(path, meta)
            if not why and out and meta["columns"]["ids"]["crc"] != out[0][1]["columns"]["ids"]["crc"]:
                why = "it holds other rows than the bank beside it"
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"its bank.json cannot be read ({type(error).__name__})"
        if not why:
            out.append((path, meta))
        elif mend:
            print(f"warning: the bank {path} is not used: {why}; it is removed and made again", flush=True)
            shutil.rmtree(path)
    return out


def _other(made_of: dict[str, Any], facts: dict[str, Any]) -> str:
    """In words, what of a bank differs from what is asked for; empty if nothing does."""
    different = [key for key in facts if made_of.get(key) != json.loads(json.dumps(facts[key]))]
    return f"it was made of other {' and '.join(different)}" if different else ""


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """One process at a time extracts into a folder; the lock goes with the process, however that ends.

    False on file systems without locks: then every process writes under a name of its own, and nothing is continued.
    """
    with contextlib.ExitStack() as stack:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / LOCK).open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"features: another process is working on {folder}; waiting for it", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                yield False
                return
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                    break  # else who had the lock has removed it with the folder
        yield True


def _own_name() -> str:
    """Of this process, among those of all machines that may share a disk."""
    return f"{platform.node()}-{os.getpid()}"


def _extract(asked: Plan, names: list[str], alone: bool) -> tuple[Path, dict[str, Any]]:
    """Write the arrays `names`; returns their folder and its bank.json."""
    source, ids, folder = asked.source, asked.ids, asked.folder
    title = _title(names)
    part = Part(folder / f".part-{title}{'' if alone else f'-{_own_name()}'}", asked.arrays(names), len(ids))
    if part.done:
        print(f"features: continuing at {part.done:,} of {len(ids):,} images", flush=True)
    began = said = time.monotonic()
    start = part.done
    limit = max(8, len(ids) // 100)
    try:
        wants = [Want(*_parse(name)) for name in names]
        for batch in encode_samples(asked.model, source, ids[start:], wants, asked.cut, asked.how):
            part.append(batch.columns, batch.arrays, batch.samples, batch.bad)
            if len(part.bad) > limit:
                raise ProbeError(f"{len(part.bad)} of the first {part.done} samples are unusable (limit {limit}), "
                                 f"e.g. {part.bad[-1][1]}")  # fmt: skip
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                rate = (part.done - start) / (said - began)
                print(f"features: {part.done:,} of {len(ids):,} images, {rate:,.0f} per second", flush=True)
        if not part.rows:
            raise ProbeError(f"no sample of {source.describe} could be read, e.g. {part.bad[0][1]}")
        made = {"identity": asked.facts, "model": asked.place.name, "data": source.describe, "samples": len(ids),
                "made": datetime.datetime.now().isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - began, 2)}  # fmt: skip
        return part.finish(folder / title, made)
    except (OSError, ProbeError) as error:
        if isinstance(error, ProbeError) or error.errno in FULL:
            part.remove()
        raise


def _title(names: Iterable[str]) -> str:
    """Folder name of an extraction of these arrays."""
    return digest(json.dumps(sorted(names)).encode())[:12]


def _parse(name: str) -> tuple[str, int | None, bool]:
    """The `Want` of an array's name."""
    kind, *rest = name.split("-")
    return (kind, int(rest[0]), rest[1] == "norm") if rest else (kind, None, True)


class Need(NamedTuple):
    """Bytes of a bank. whole: still to write; have: of these already there, unfinished; kept: of everything else in its
    folder, asked for or not; per: of each array asked for, if any is missing (another bank would need them all), and
    columns: of ids, labels and the like beside them."""

    per: dict[str, float]
    columns: float
    whole: float
    have: int
    kept: int


def need(asked: Plan) -> Need:
    """What a bank takes and what is missing of it."""
    try:
        found = _found(asked.folder, asked.facts, mend=False)
    except FileNotFoundError:  # not there, or removed meanwhile
        found = []
    if not (missing := _missing(asked.names, found)):
        return Need({}, 0, 0, 0, _bytes(path for path, _ in found))
    rows = len(asked.ids) * count_crops(asked.source, asked.ids, asked.cut)
    per = {n: rows * int(np.prod(shape)) * np.dtype(d).itemsize for n, (shape, d) in asked.arrays(asked.names).items()}
    columns = rows * sum(np.dtype(dtype).itemsize for dtype in COLUMNS.values())  # every extraction has its own
    part = asked.folder / f".part-{_title(missing)}"
    others = (p for p in asked.folder.glob(".part-*") if p != part)
    kept = _bytes(path for path, _ in found) + _bytes(others)
    return Need(per, columns, sum(per[name] for name in missing) + columns, _bytes([part]), kept)


def _bytes(folders: Iterable[Path]) -> int:
    """Of the arrays in these folders."""
    total = 0
    for path in (file for folder in folders for file in folder.glob("*.npy")):
        with contextlib.suppress(FileNotFoundError):  # another process has just finished it
            total += path.stat().st_size
    return total


def check_sizes(plans: Sequence[Plan]) -> None:
    """ProbeError, with what would fit, where one bank would become larger than `place.max_gb`, or where all together
    are larger than the disk has room for. Looked at before the first is begun."""
    needs = [need(asked) for asked in plans]
    for asked, one in zip(plans, needs):
        if one.whole and one.whole + one.kept > (limit := asked.place.max_gb * 1e9):
            parts = f" ({_gb(one.kept)} in {asked.folder} and {_gb(one.whole)} to come)" if one.kept else ""
            choices = _choices(asked, [one], len(asked.ids), limit)
            if one.kept and (anew := sum(one.per.values()) + one.columns) <= limit:
                choices = f"once that folder is removed, what this probe reads would take {_gb(anew)}"
            raise ProbeError(f"a bank of {len(asked.ids):,} images takes {_gb(one.whole + one.kept)}{parts}, and "
                             f"bank.max_gb={asked.place.max_gb:g} allows {_gb(limit)}: {choices}")  # fmt: skip
    root = next(p for p in (plans[0].place.root, *plans[0].place.root.absolute().parents) if p.exists())
    usage, whole = shutil.disk_usage(root), sum(one.whole for one in needs)
    room = max(0, usage.free - KEEP_FREE * usage.total + sum(one.have for one in needs))
    if whole > room:
        images = sum(len(asked.ids) for asked, one in zip(plans, needs) if one.whole)
        raise ProbeError(f"a bank of {images:,} images takes {_gb(whole)}, and {plans[0].place.root} has room for "
                         f"{_gb(room)}: {_choices(plans[0], needs, images, room)}")  # fmt: skip


def _choices(asked: Plan, needs: Sequence[Need], images: int, allowed: float) -> str:
    """What would make it fit. Another type or other images make another bank, which needs all of its arrays."""
    whole = sum(sum(n.per.values()) + n.columns for n in needs)
    patches = {name for n in needs for name in n.per if name.startswith("patches")}
    tokens = sum(size for n in needs for name, size in n.per.items() if name in patches)
    choices = []
    if patches and asked.how.dtype == "float32":
        choices.append(f"bank.dtype=float16 would take {_gb(whole - tokens / 2)}")
    if len(patches) > 1 and not any(n.kept for n in needs):
        choices.append(f"one layer instead of {len(patches)} {_gb(whole - tokens + tokens / len(patches))}")
    if fits := int(allowed / whole * images):
        choices.append(f"{fits} images would fit (probe.bank for the training split, probe.test for the test split)")
    choices = choices or ["not even one image would fit"]
    return ", ".join(choices)


def _gb(size: float) -> str:
    if size < 1e5:
        return f"{size / 1e3:,.1f} kB"
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
