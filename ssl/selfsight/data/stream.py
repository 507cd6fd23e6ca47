"""`data.mode=stream`: compressed tars and http(s) addresses, read from front to back through webdataset's pipeline.

Not exactly resumable: a stream has no positions, so a continued run sees other samples than an uninterrupted one.
Three things differ from webdataset's own reader. A damaged or cut archive raises (Python's `tarfile` takes it for
the end) and its half-read sample is dropped, never completed with members of the next shard. Only images, labels and
masks are read and nothing is decoded, so no pickle is ever opened. The shards are shuffled before they are dealt to
processes and workers, by (seed, epoch). Commands (`pipe:`) are refused.
"""

from __future__ import annotations

import random
import re
import tarfile
import time
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from typing import IO, Any

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import base_plus_ext, group_by_keys

from .manifest import FIELDS, IMAGES, NO_LABEL, expand, json_label, split_patterns
from .rng import hash_ints
from .source import MAX_FILE, DataError, Raw, SampleError
from .tar import split_name

_TIMEOUT, _RETRY_SECONDS = 60, (1.0, 5.0, 20.0)


class _Strict(tarfile.TarInfo):
    """Header parsing that raises where `tarfile` would quietly end the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no valid header at byte {tar.offset:,} ({error}): damaged or cut short") from None


def _open(url: str) -> IO[bytes]:
    if not url.startswith(("http://", "https://")):
        return open(url, "rb")  # noqa: PTH123  (closed by the caller's `with`)
    for wait in _RETRY_SECONDS:
        try:
            return urllib.request.urlopen(url, timeout=_TIMEOUT)
        except OSError as error:
            if getattr(error, "code", 500) < 500:
                raise
            time.sleep(wait)
    return urllib.request.urlopen(url, timeout=_TIMEOUT)


def _members(urls: Sequence[str], skip_broken: bool) -> Iterator[dict[str, Any]]:
    """Members in webdataset's form {fname, data, __url__}; `{}` ends a shard."""
    for url in urls:
        name, current, have = "", None, set()
        try:
            with _open(url) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Strict) as tar:
                for info in tar:
                    key, extension = split_name(info.name) or ("", "")
                    if info.isreg() and (extension in IMAGES or extension in FIELDS):
                        name = info.name
                        if key != current:
                            current, have = key, set()
                        _refuse_member(url, key, extension, have, info.size)
                        have.add(extension)
                        yield {"fname": name, "data": tar.extractfile(info).read(), "__url__": url}
                    tar.members = []  # tarfile keeps every header otherwise
        except (OSError, EOFError, tarfile.TarError) as error:
            if not skip_broken:
                raise DataError(f"{url} cannot be read to its end: {error}") from error
            warnings.warn(f"{url} is left at a read error ({error}); its last sample is dropped", stacklevel=2)
            if name:  # webdataset drops a sample that carries this mark
                yield {"fname": f"{base_plus_ext(name)[0]}.__bad__", "data": b"1", "__url__": url}
        yield {}


def _refuse_member(url: str, key: str, extension: str, have: set[str], size: int) -> None:
    if extension in have:
        raise DataError(f"{url}: key '{key}' has two .{extension} members: every key must occur once per shard")
    if size > MAX_FILE:
        raise DataError(f"{url}: {key}.{extension} has {size:,} bytes, more than the limit of {MAX_FILE:,}")


class Stream(IterableDataset):
    """An endless stream of `Raw` samples; one pass over all shards is an epoch, in an order of (seed, epoch).

    patterns: local paths (also .tar.gz, .tar.bz2, .tar.xz) with braces or globs, or http(s) addresses with braces.
    rank, world: this process and their number. shuffle: samples held back for shuffling (0: none).
    skip_broken: leave a damaged shard with a warning instead of raising. `bad` lists samples that were left out.
    """

    def __init__(
        self,
        patterns: str | Sequence[str],
        *,
        labels: str = "auto",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: int = 1000,
        epochs: int | None = None,
        skip_broken: bool = False,
    ):
        names = split_patterns(patterns)
        remote = [re.match(r"[a-z][a-z0-9+.-]+://", name) for name in names]
        for name, other in zip(names, remote):
            if other and not name.startswith(("http://", "https://", "file://")):
                raise DataError(f"{name}: only http, https and local files can be streamed")
        local = [name for name in names if not name.startswith("http")]
        found = iter(expand(local)) if len(local) == len(names) else None
        if found is None and local:
            raise DataError("data.mode=stream takes either addresses or local files, not both")
        self.urls = list(found) if found else names
        self.labels, self.seed, self.rank, self.world, self.shuffle = labels, seed, rank, world, shuffle
        self.epochs, self.skip_broken = epochs, skip_broken
        self.bad: list[SampleError] = []
        self.classes, self.labelled, self.has_objects = None, labels != "none", False  # unknown before reading
        self.describe = f"stream {self.urls[0]} … ({len(self.urls):,} files), not exactly resumable"

    def __iter__(self) -> Iterator[Raw]:
        worker = get_worker_info()
        parts = self.world * (worker.num_workers if worker else 1)
        part = self.rank * (worker.num_workers if worker else 1) + (worker.id if worker else 0)
        if len(self.urls) < parts:
            raise DataError(self._too_few(parts))
        epoch = 0
        while self.epochs is None or epoch < self.epochs:
            urls = list(self.urls)
            random.Random(hash_ints(self.seed, epoch)).shuffle(urls)
            empty = True
            for raw in self._shuffled(urls[part::parts], random.Random(hash_ints(self.seed, epoch, part))):
                empty = False
                yield raw
            if empty:
                why = f", e.g. {self.bad[0]}" if self.bad else ""
                raise DataError(f"{self.urls[0]} … ({len(self.urls):,} files) hold no usable sample{why}")
            epoch += 1

    def _too_few(self, readers: int) -> str:
        n = len(self.urls)
        if n < self.world:
            return f"{n:,} streamed files cannot feed {self.world} processes: use {n:,} or fewer, or more files"
        return (
            f"{n:,} streamed files cannot feed {readers} readers (processes times workers): "
            f"use num_workers={n // self.world}, or more and smaller files"
        )

    def _shuffled(self, urls: list[str], rng: random.Random) -> Iterator[Raw]:
        held: list[Raw] = []
        for raw in self._samples(urls):
            held.append(raw)
            if len(held) > self.shuffle:
                at = rng.randrange(len(held))
                held[at], held[-1] = held[-1], held[at]
                yield held.pop()
        rng.shuffle(held)
        yield from held

    def _samples(self, urls: list[str]) -> Iterator[Raw]:
        for sample in group_by_keys(_members(urls, self.skip_broken)):
            where = f"{sample['__url__']}, key {sample['__key__']}"
            try:
                yield _raw(sample, where, self.labels)
            except SampleError as error:
                self.bad.append(error)


def _raw(sample: dict[str, Any], where: str, labels: str) -> Raw:
    image = next((sample[extension] for extension in IMAGES if sample.get(extension)), None)
    if image is None:
        raise SampleError(where, "no image among its members")
    label, text = NO_LABEL, sample.get("cls", b"").strip()
    if labels != "none" and text:
        if not re.fullmatch(rb"\d{1,9}|-1", text):
            raise SampleError(where, "its .cls is not a whole number (data.labels=none ignores it)")
        label = int(text)
    elif labels != "none" and "json" in sample:
        label = json_label(sample["json"], where)
    extra = {field: sample.get(extension) for extension, field in FIELDS.items() if field in Raw._fields}
    return Raw(key=sample["__key__"], image=image, label=label, where=where, **extra)
