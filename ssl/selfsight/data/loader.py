"""From global positions to batches of uint8 crops: stateless workers, no iterator state, nothing lost silently."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..views.place import independent
from ..views.spec import Batch, Views
from .decode import crop_reduction, cut, decode, size_of, snap
from .order import Order
from .rng import key_of, uniform
from .source import Raw, SampleError, Source

MAX_SUBSTITUTES = 16


class Event(NamedTuple):
    """A bad sample that another one stands in for."""

    position: int
    id: int
    where: str
    why: str


class Samples(Dataset):
    """A map-style data set over ranges of global positions: `samples[range(a, b)]` is one collated micro-batch."""

    def __init__(self, source: Source, order: Order, views: Views, seed: int, channels: int = 3):
        self.source, self.order, self.views, self.seed, self.channels = source, order, views, seed, channels

    def __getitem__(self, positions: range) -> Batch:
        """Batch of the samples at these positions; a pure function of (seed, positions) and the data."""
        where = np.arange(positions.start, positions.stop, dtype=np.int64)
        keys, ids = key_of(self.seed, where), self.order(where)
        b = len(where)
        crops = {
            c.name: torch.empty(c.count, b, self.channels, c.size, c.size, dtype=torch.uint8) for c in self.views.crops
        }
        boxes = {c.name: np.empty((c.count, b, 4), np.float32) for c in self.views.crops}
        labels, sizes, events = np.empty(b, np.int64), np.empty((b, 2), np.int64), []
        for i in range(b):
            key = keys[i : i + 1]
            for attempt in range(MAX_SUBSTITUTES + 1):
                try:
                    raw = self.source.read(int(ids[i]))
                    sizes[i] = self._fill(raw, key, i, crops, boxes)
                    labels[i] = raw.label
                    break
                except SampleError as bad:
                    events.append(Event(int(where[i]), int(ids[i]), bad.where, bad.why))
                    if attempt == MAX_SUBSTITUTES:
                        raise
                    ids[i] = self.order.substitute(int(where[i]), attempt)
        return Batch(
            key=torch.from_numpy(keys), id=torch.from_numpy(ids), position=torch.from_numpy(where),
            label=torch.from_numpy(labels), crops=crops, sizes=torch.from_numpy(sizes),
            boxes={k: torch.from_numpy(v) for k, v in boxes.items()}, events=events,
        )  # fmt: skip

    def _fill(self, raw: Raw, key: np.ndarray, i: int, crops: dict, boxes: dict) -> tuple[int, int]:
        """Decode once and cut every crop of one sample into row i of the batch."""
        height, width = size_of(raw.image, raw.where)
        place = self.views.place or independent
        placed = place(lambda purpose, n: uniform(key, purpose, n)[0], self.views.crops, height, width, raw)
        every = np.concatenate([placed[c.name] for c in self.views.crops])
        outputs = np.repeat([c.size for c in self.views.crops], [c.count for c in self.views.crops])
        at_least = crop_reduction(every, outputs, height, width)
        image, factor = decode(raw.image, raw.where, at_least=at_least, channels=self.channels)
        for crop in self.views.crops:
            snapped = snap(placed[crop.name], factor, height, width)
            boxes[crop.name][:, i] = snapped
            for v, box in enumerate(snapped):
                cell = tuple(round(float(x) / factor) for x in box)
                crops[crop.name][v, i] = cut(image, cell, crop.size, crop.interpolation)
        return height, width


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


def make_loader(samples: Samples, positions: Positions, num_workers: int, pin_memory: bool) -> DataLoader:
    """A DataLoader over position ranges; batches come in order whatever the number of workers."""
    return DataLoader(
        samples, sampler=positions, batch_size=None, collate_fn=_as_is, num_workers=num_workers,
        pin_memory=pin_memory, worker_init_fn=ignore_signals, prefetch_factor=4 if num_workers else None,
    )  # fmt: skip
