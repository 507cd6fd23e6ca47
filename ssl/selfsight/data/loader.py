"""From global positions to batches of uint8 crops: stateless workers, no iterator state, nothing lost silently."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from ..views.objects import Region, patches
from ..views.place import independent
from ..views.spec import Batch, Views
from .decode import crop_reduction, cut, decode, size_of, snap
from .order import Order
from .rng import key_of, uniform
from .source import Raw, SampleError, Source
from .stream import Stream

MAX_SUBSTITUTES = 16


class Event(NamedTuple):
    """A bad sample that another one stands in for."""

    position: int
    id: int
    where: str
    why: str


class Cutter:
    """Decodes samples and cuts their crops into the rows of a batch; what both kinds of reading share."""

    def __init__(self, views: Views, channels: int = 3):
        self.views, self.channels = views, channels
        self.outputs = np.repeat([c.size for c in views.crops], [c.count for c in views.crops])
        self.counts = {c.name: c.count for c in views.crops}
        for cells in views.cells:
            if cells.name not in self.counts or cells.shape not in ("exact", "box") or views.place is None:
                raise ValueError(
                    f"{cells}: the name must be one of {', '.join(self.counts)}, the shape exact or box, and "
                    "views.place must choose an object (views.place.AroundObject)"
                )

    def empty(self, b: int) -> Batch:
        """A batch of b rows to fill."""
        crops, boxes = {}, {}
        for c in self.views.crops:
            crops[c.name] = torch.empty(c.count, b, self.channels, c.size, c.size, dtype=torch.uint8)
            boxes[c.name] = torch.empty(c.count, b, 4)
        long = {k: torch.empty(b, dtype=torch.int64) for k in ("key", "id", "position", "label")}
        batch = Batch(crops=crops, boxes=boxes, sizes=torch.empty(b, 2, dtype=torch.int64), events=[], **long)
        if self.views.cells:
            shapes = {cells.name: (self.counts[cells.name], b, *cells.grid) for cells in self.views.cells}
            batch["cells"] = {name: torch.empty(shape, dtype=torch.uint8) for name, shape in shapes.items()}
            batch["has_object"] = torch.empty(b, dtype=torch.bool)
        return batch

    def fill(self, batch: Batch, i: int, raw: Raw, key: np.ndarray) -> None:
        """Decode once at the smallest sufficient size and cut every crop of one sample into row i."""
        height, width = size_of(raw.image, raw.where)
        place = self.views.place or independent
        placed = place(lambda purpose, n: uniform(key, purpose, n)[0], self.views.crops, height, width, raw)
        every = np.concatenate([placed[c.name] for c in self.views.crops])
        at_least = crop_reduction(every, self.outputs, height, width)
        image, factor = decode(raw.image, raw.where, at_least=at_least, channels=self.channels)
        for crop in self.views.crops:
            snapped = snap(placed[crop.name], factor, height, width)
            batch["boxes"][crop.name][:, i] = torch.from_numpy(snapped)
            for v, box in enumerate(snapped):
                reduced = tuple(round(float(x) / factor) for x in box)
                batch["crops"][crop.name][v, i] = cut(image, reduced, crop.size, crop.interpolation)
        if self.views.cells:
            self._fill_cells(batch, i, getattr(placed, "region", None), height, width)
        batch["label"][i] = raw.label
        batch["sizes"][i, 0], batch["sizes"][i, 1] = height, width

    def _fill_cells(self, batch: Batch, i: int, region: Region | None, height: int, width: int) -> None:
        """Which patches show the chosen object, for row i, from the boxes as they were cut."""
        batch["has_object"][i] = region is not None
        for cells in self.views.cells:
            rows = batch["cells"][cells.name][:, i]
            if region is None:
                rows.zero_()
                continue
            for v, box in enumerate(batch["boxes"][cells.name][:, i].numpy()):
                rows[v] = torch.from_numpy(patches(region, box, height, width, cells))


class Samples(Dataset):
    """A map-style data set over ranges of global positions: `samples[range(a, b)]` is one collated micro-batch."""

    def __init__(self, source: Source, order: Order, views: Views, seed: int, channels: int = 3):
        self.source, self.order, self.seed, self.cutter = source, order, seed, Cutter(views, channels)
        self.fetch_ahead = getattr(source, "fetch_ahead", None)  # of shards that may lie elsewhere
        if check := getattr(source, "check_order", None):
            check(order)

    def __getitem__(self, positions: range) -> Batch:
        """Batch of the samples at these positions; a pure function of (seed, positions) and the data."""
        where = np.arange(positions.start, positions.stop, dtype=np.int64)
        keys, ids = key_of(self.seed, where), self.order(where)
        if self.fetch_ahead:
            self.fetch_ahead(self.order, positions.stop)
        batch = self.cutter.empty(len(where))
        for i, position in enumerate(where.tolist()):
            for attempt in range(MAX_SUBSTITUTES + 1):
                try:
                    self.cutter.fill(batch, i, self.source.read(int(ids[i])), keys[i : i + 1])
                    break
                except SampleError as bad:
                    batch["events"].append(Event(position, int(ids[i]), bad.where, bad.why))
                    if attempt == MAX_SUBSTITUTES:
                        raise
                    ids[i] = self.order.substitute(position, attempt)
        batch["key"], batch["id"], batch["position"] = map(torch.from_numpy, (keys, ids, where))
        return batch


class StreamBatches(IterableDataset):
    """Batches of a stream that can only be read from front to back: not exactly resumable.

    A sample's key comes from its number within its reader, so that no two samples share one; `start` moves the keys
    on when a run is continued.
    """

    def __init__(self, stream: Stream, views: Views, seed: int, batch_size: int, start: int, channels: int = 3):
        self.stream, self.seed, self.batch_size, self.start = stream, seed, batch_size, start
        self.cutter = Cutter(views, channels)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        readers = self.stream.world * (worker.num_workers if worker else 1)
        reader = self.stream.rank * (worker.num_workers if worker else 1) + (worker.id if worker else 0)
        raws, number, listed = iter(self.stream), self.start, 0
        while True:
            batch, i = self.cutter.empty(self.batch_size), 0
            while i < self.batch_size:
                position = number * readers + reader
                key = key_of(self.seed, np.array([position]))
                number += 1
                raw = next(raws)
                while self.stream.bad:  # left out by the reader
                    bad, listed = self.stream.bad.pop(0), listed + 1
                    batch["events"].append(Event(position, -(listed * readers + reader + 1), bad.where, bad.why))
                try:
                    self.cutter.fill(batch, i, raw, key)
                except SampleError as bad:
                    batch["events"].append(Event(position, position, bad.where, bad.why))
                    continue
                batch["key"][i], batch["id"][i], batch["position"][i] = int(key[0]), position, position
                i += 1
            yield batch


class Positions(Sampler[range]):
    """This process's slices of the global batches of steps [start, stop), micro-batch by micro-batch.

    Micro-batch m of step t is the m-th part of positions [t B, (t + 1) B); rank r takes the r-th part of that.
    """

    def __init__(self, start: int, stop: int, batch_size: int, micro_batches: int, rank: int, world: int):
        if batch_size % (micro_batches * world):
            raise ValueError(
                f"batch_size={batch_size} does not divide into {micro_batches} micro-batches on {world} processes"
            )
        self.start, self.stop, self.batch_size, self.micro_batches = start, stop, batch_size, micro_batches
        self.rank, self.world, self.local = rank, world, batch_size // (micro_batches * world)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.micro_batches

    def __iter__(self) -> Iterator[range]:
        for step in range(self.start, self.stop):
            for micro in range(self.micro_batches):
                first = step * self.batch_size + (micro * self.world + self.rank) * self.local
                yield range(first, first + self.local)


def ignore_signals(worker: int) -> None:
    """Workers outlive the signals that ask the run to stop; the main process ends them after it has saved."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _as_is(batch: Batch) -> Batch:
    return batch


def make_loader(
    samples: Samples | StreamBatches, positions: Positions | None, num_workers: int, pin_memory: bool
) -> DataLoader:
    """A DataLoader over position ranges; batches come in order whatever the number of workers."""
    return DataLoader(
        samples, sampler=positions, batch_size=None, collate_fn=_as_is, num_workers=num_workers,
        pin_memory=pin_memory, worker_init_fn=ignore_signals, prefetch_factor=4 if num_workers else None,
    )  # fmt: skip
