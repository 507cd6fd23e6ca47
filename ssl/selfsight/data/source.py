"""The one interface behind shards, folders and scenes: samples by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

MAX_FILE = 1 << 30  # bytes of one image or mask that are read at all


class DataError(ValueError):
    """The data set as a whole cannot be used; one sentence names the file or key and what would work."""


class SampleError(ValueError):
    """One sample cannot be used (undecodable, no image, bad label). `where` names file and key."""

    def __init__(self, where: str, why: str = ""):  # one argument: rebuilt from its message by a loader worker
        super().__init__(f"{where}: {why}" if why else where)
        self.where, self.why = where, why

    def __reduce__(self):
        return type(self), (self.where, self.why)


class Raw(NamedTuple):
    """One undecoded sample."""

    key: str
    image: bytes
    label: int  # -1: none
    where: str  # file and key, for messages
    mask: bytes | None = None  # mask.png: semantic class ids
    objects: bytes | None = None  # objects.png: object ids
    boxes: bytes | None = None  # boxes.json
    side: str = ""  # file and key of objects and boxes where they lie in a side-car


@runtime_checkable
class Source(Protocol):
    """Samples by number. Picklable or fork-safe: workers read with their own file descriptors."""

    lengths: Sequence[int]  # samples per shard; sum = number of samples
    classes: Sequence[str] | None  # class names where known
    labelled: bool  # at least the first samples carry labels
    has_objects: bool
    fingerprint: str  # changes when the samples or their order do
    describe: str  # a few words for the first screen, e.g. "shards /d/train-000000.tar … (1,282 files)"

    def read(self, id: int) -> Raw:
        """The undecoded sample; SampleError if it is broken."""
        ...

    def __len__(self) -> int: ...
