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


class Place(NamedTuple):
    """Where banks lie, how large one may be (gigabytes), and what to call the model in folder names."""

    root: Path
    max_gb: float = 50.0
    name: str = "backbone"


class Bank:
    """Features of one split. Row r is crop `part[r]` of sample `ids[r]`; a cut with one crop has part 0 everywhere.

    labels int64 [n] (-1: none). key, content: uint64 hashes [n] of the sample's key and of its image's bytes.
    arrays: by `Want.name`, [n, ...], memory-mapped or not. bad: (id, sentence) of samples left out. shown: bool [n],
    with masks only. folder: on disk, if it is there.
    """

    folder: Path | None = None

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


def stored(
    model: nn.Module,
    source: Source,
    ids: Sequence[int],
    wants: Sequence[Want],
    *,
    cut: Cut,
    how: How,
    place: Place,
) -> Bank:
    """The bank of samples `ids` with at least these arrays: found, continued or extracted.

    model: a timm model in eval mode on `how.device` (`readout.plain`). ProbeError in one sentence where it would not
    fit, where the disk is full, or where too many samples cannot be read.
    """
    if not len(ids):
        raise ProbeError(f"{source.describe}: no sample is left to look at")
    facts = identity(model, source, ids, cut, how)
    plan = layout(model, wants, cut.size, cut.channels)
    names = dict.fromkeys(resolve(want, plan.depth).name for want in wants)
    folder = place.root / f"{place.name}-{digest(json.dumps(facts).encode())[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = _found(folder, facts, mend=False)
        if _missing(names, found):
            with _alone(folder) as alone:
                found = _found(folder, facts, mend=True)
                if missing := _missing(names, found):
                    found.append(_extract(model, source, ids, plan, missing, folder, facts, cut, how, place, alone))
        else:
            print(f"features: {len(ids):,} images from {folder}", flush=True)
    except OSError as error:
        if error.errno in FULL:
            raise ProbeError(
                f"the disk of {place.root} is full: the unfinished bank was removed; free some space, or use "
                "bank.folder=<another disk>, bank.dtype=float16 or a smaller probe.bank"
            ) from error
        raise ProbeError(f"the bank of features cannot be kept in {place.root} ({error.strerror}); "
                         "use bank.folder=<a folder that can be written>") from error  # fmt: skip
    bank = _open(found, list(names), plan.depth, source.describe)
    bank.folder = folder
    return bank


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
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"features: another process is working on {folder}; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def _extract(
    model, source, ids, plan: Layout, names, folder: Path, facts, cut: Cut, how: How, place: Place, alone: bool
) -> tuple[Path, dict[str, Any]]:
    """Write the arrays `names`; returns their folder and its bank.json."""
    title = digest(json.dumps(sorted(names)).encode())[:12]
    arrays = {name: (plan.shapes[name], how.dtype if name.startswith("patches") else "float32") for name in names}
    part = Part(folder / f".part-{title}{'' if alone else f'-{os.getpid()}'}", arrays, len(ids))
    try:
        check_size(arrays, len(ids), count_crops(source, ids, cut), part.bytes_written, place)
    except ProbeError:
        if not part.done:  # what another limit allowed to begin is worth keeping
            part.remove()
        raise
    if part.done:
        print(f"features: continuing at {part.done:,} of {len(ids):,} images", flush=True)
    began = said = time.monotonic()
    start = part.done
    limit = max(8, len(ids) // 100)
    try:
        wants = [Want(*_parse(name)) for name in names]
        for batch in encode_samples(model, source, np.asarray(ids)[start:], wants, cut, how):
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
        made = {"identity": facts, "model": place.name, "data": source.describe, "samples": len(ids),
                "made": datetime.datetime.now().isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - began, 2)}  # fmt: skip
        return part.finish(folder / title, made)
    except (OSError, ProbeError) as error:
        if isinstance(error, ProbeError) or error.errno in FULL:
            part.remove()
        raise


def _parse(name: str) -> tuple[str, int | None, bool]:
    """The `Want` of an array's name."""
    kind, *rest = name.split("-")
    return (kind, int(rest[0]), rest[1] == "norm") if rest else (kind, None, True)


def check_size(arrays: dict[str, tuple[tuple[int, ...], str]], samples: int, crops: float, have: int, place: Place):
    """ProbeError, with what would fit, where a bank is larger than `place.max_gb` or than the disk has room for."""
    per = {n: crops * int(np.prod(shape)) * np.dtype(dtype).itemsize for n, (shape, dtype) in arrays.items()}
    need = samples * sum(per.values())
    usage = shutil.disk_usage(place.root)
    room = usage.free - KEEP_FREE * usage.total + have
    allowed = min(place.max_gb * 1e9, room)
    if need <= allowed:
        return
    patches = [n for n in per if n.startswith("patches")]
    choices = []
    if any(arrays[n][1] == "float32" for n in patches):
        half = need - samples * sum(per[n] / 2 for n in patches if arrays[n][1] == "float32")
        choices.append(f"bank.dtype=float16 would take {_gb(half)}")
    if len(patches) > 1:
        choices.append(f"one layer instead of {len(patches)} {_gb(need / len(patches))}")
    choices.append(f"probe.bank={max(1, int(allowed / need * samples)):,} images would fit".replace(",", ""))
    why = f"bank.max_gb={place.max_gb:g} allows" if place.max_gb * 1e9 <= room else f"{place.root} has room for"
    raise ProbeError(f"a bank of {samples:,} images takes {_gb(need)}, and {why} {_gb(max(allowed, 0))}: "
                     f"{', '.join(choices)}")  # fmt: skip


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
