"""The pass itself: samples are read and cut in threads ahead of the model, features come out batch by batch."""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..data.decode import decode, size_of
from ..data.source import SampleError, Source
from . import ProbeError
from .bank import AUTOCAST, normalise
from .cuts import ROTATIONS, Cut, crops, windows
from .identity import How
from .readout import Want, read_out

AHEAD = 2  # batches of samples that are read before they are needed
LOOKED_AT = 64  # images whose size tells how many windows there are


class Encoded(NamedTuple):
    """Rows of some samples: columns and arrays by name, how many samples they are, and those that gave none."""

    columns: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]
    samples: int
    bad: list[tuple[int, str]]


class _Seen(NamedTuple):
    pixels: Tensor  # uint8 [v, c, s, s]
    label: int
    key: int
    content: int


def hash64(data: bytes) -> int:
    """A uint64 that tells samples apart (two of a million are equal by chance once in 30 million times)."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _look(source: Source, id: int, cut: Cut) -> _Seen | str:
    """One sample, or the sentence that says what is wrong with it."""
    try:
        raw = source.read(id)
        return _Seen(crops(raw, cut), raw.label, hash64(raw.key.encode("utf-8", "surrogateescape")), hash64(raw.image))
    except SampleError as error:
        return str(error)


def encode_samples(
    model: nn.Module, source: Source, ids: np.ndarray, wants: Sequence[Want], cut: Cut, how: How
) -> Iterator[Encoded]:
    """Features of samples in order, `how.batch_size` samples at a time. model: in eval mode, on `how.device`."""
    model = model.to(memory_format=torch.channels_last) if how.channels_last else model
    for part, seen in _ahead(source, ids, cut, how):
        good = [(i, s) for i, s in zip(part.tolist(), seen) if not isinstance(s, str)]
        bad = [(i, s) for i, s in zip(part.tolist(), seen) if isinstance(s, str)]
        counts = [len(s.pixels) for _, s in good]
        columns = {
            "ids": np.repeat(np.array([i for i, _ in good], np.int64), counts),
            "part": np.concatenate([np.arange(n) for n in counts]) if good else np.zeros(0, np.int64),
            **{name: np.repeat(np.array([getattr(s, field) for _, s in good], kind), counts)
               for name, field, kind in (("labels", "label", np.int64), ("key", "key", np.uint64),
                                         ("content", "content", np.uint64))},
        }  # fmt: skip
        pixels = [s.pixels for _, s in good]
        arrays = _encode(model, torch.cat(pixels), wants, how) if pixels else {}
        yield Encoded(columns, arrays, len(part), bad)


def _ahead(source: Source, ids: np.ndarray, cut: Cut, how: How) -> Iterator[tuple[np.ndarray, list[_Seen | str]]]:
    """Batches of ids and what was seen of them; the threads stay `AHEAD` batches in front."""
    parts = iter([ids[i : i + how.batch_size] for i in range(0, len(ids), how.batch_size)])
    pool = ThreadPoolExecutor(max(1, how.workers))
    waiting: deque[tuple[np.ndarray, list[Future]]] = deque()

    def send() -> None:
        for part in parts:
            waiting.append((part, [pool.submit(_look, source, int(i), cut) for i in part]))
            return

    try:
        for _ in range(1 + AHEAD):
            send()
        while waiting:
            part, futures = waiting.popleft()
            seen = [future.result() for future in futures]
            send()
            yield part, seen
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def place_of(source: Source, id: int, decoded: bool = True) -> str | None:
    """File and key of a sample that can be read and, unless `decoded` is false, decoded; None for another."""
    try:
        raw = source.read(id)
        if decoded:
            decode(raw.image, raw.where)
        return raw.where
    except SampleError:
        return None


def look_over(source: Source, ids: np.ndarray, workers: int) -> tuple[dict[str, np.ndarray], list[tuple[int, str]]]:
    """Columns of samples without any array (`store.Bank`), and those that are no images; nothing is decoded."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        read = list(pool.map(lambda i: _about(source, i), ids.tolist(), chunksize=64))
    good = [(i, *r) for i, r in zip(ids.tolist(), read) if not isinstance(r, str)]
    bad = [(i, r) for i, r in zip(ids.tolist(), read) if isinstance(r, str)]
    names = {"ids": np.int64, "labels": np.int64, "key": np.uint64, "content": np.uint64}
    rows = zip(*good) if good else [()] * len(names)
    columns = {name: np.array(row, dtype) for (name, dtype), row in zip(names.items(), rows)}
    return columns | {"part": np.zeros(len(good), np.int64)}, bad


def _about(source: Source, id: int) -> tuple[int, int, int] | str:
    """Label, key and content of one sample, or the sentence that says what is wrong with it."""
    try:
        raw = source.read(id)
        size_of(raw.image, raw.where)
        return raw.label, hash64(raw.key.encode("utf-8", "surrogateescape")), hash64(raw.image)
    except SampleError as error:
        return str(error)


@torch.no_grad()
def _encode(model: nn.Module, pixels: Tensor, wants: Sequence[Want], how: How) -> dict[str, np.ndarray]:
    """uint8 [n, c, s, s] to the arrays wanted, in batches of the model; patch tokens in the type they are stored in."""
    kind, dtype = torch.device(how.device).type, AUTOCAST.get(how.precision)
    found: dict[str, list[np.ndarray]] = {want.name: [] for want in wants}
    for part in pixels.split(how.batch_size):
        x = normalise(part, how.mean, how.std, how.device)
        x = x.contiguous(memory_format=torch.channels_last) if how.channels_last else x
        with torch.autocast(kind, dtype) if dtype else contextlib.nullcontext():
            for name, values in read_out(model, x, wants).items():
                if not values.isfinite().all():
                    raise ProbeError(f"features ({name}) contain NaN or infinity; the backbone has diverged"
                                     + ("" if dtype is None else ", or bank.precision=32-true is needed"))  # fmt: skip
                found[name].append(_as_stored(values, name, how.dtype))
    return {name: np.concatenate(values) for name, values in found.items()}


def _as_stored(values: Tensor, name: str, dtype: str) -> np.ndarray:
    """float32, or the chosen type for patch tokens; ProbeError where that cannot hold them."""
    if not name.startswith("patches") or dtype == "float32":
        return values.float().cpu().numpy()
    half = values.half()
    if half.isinf().any() and not values.isinf().any():
        raise ProbeError(f"the patch tokens reach {values.abs().max().item():.0f}, more than bank.dtype=float16 can "
                         "hold; use bank.dtype=float32")  # fmt: skip
    return half.cpu().numpy()


def count_crops(source: Source, ids: Sequence[int], cut: Cut) -> float:
    """Rows per sample; for windows on average over a few of them."""
    if cut.kind != "windows":
        return float(ROTATIONS) if cut.kind == "rotations" else 1.0
    counts = []
    for i in np.asarray(ids)[np.linspace(0, len(ids) - 1, min(len(ids), LOOKED_AT)).astype(int)]:
        with contextlib.suppress(SampleError):
            raw = source.read(int(i))
            counts.append(len(windows(cut, *size_of(raw.image, raw.where))))
    return float(np.mean(counts)) if counts else 1.0
