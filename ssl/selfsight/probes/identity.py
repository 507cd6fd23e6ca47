"""What a stored bank was made of: a hash of weights, architecture, data and transform. Another hash is another bank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..data.source import SampleError, Source
from .cuts import Cut

VERSION = 1  # of the files and of everything that decides a feature
UNUSABLE = -2  # a label that cannot be read
LOOKED_AT = 32  # samples whose bytes are part of the hash
_PLAIN = (str, int, float, bool, type(None))


class How(NamedTuple):
    """How features are computed. precision: Lightning's words; dtype: of stored patch tokens (the rest is float32)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int = 256
    device: torch.device | str = "cpu"
    workers: int = 0
    precision: str = "32-true"
    channels_last: bool = False
    dtype: str = "float32"


def digest(*parts: bytes) -> str:
    """32 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """Of every parameter and buffer: name, type, shape and bits."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def architecture_hash(model: nn.Module) -> str:
    """Of every module's class and plain attributes (pooling, heads, eps …), which weights alone do not tell."""
    lines = []
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k != "training" and _is_plain(v)}
        lines.append(f"{name} {type(module).__qualname__} {sorted(own.items())}")
    return digest("\n".join(lines).encode())


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(v, _PLAIN) for v in value))


def data_facts(source: Source, ids: np.ndarray, labels: np.ndarray | None = None) -> dict[str, Any]:
    """The source and the samples taken from it. Names and sizes alone would take two folders with the same file names
    for one, so the place and the bytes of a few samples count as well. labels: `labels_of`, where they are known."""
    looked = [_bytes(source, int(i)) for i in np.unique(ids[np.linspace(0, len(ids) - 1, LOOKED_AT).astype(int)])]
    return {
        "fingerprint": source.fingerprint,
        "describe": source.describe,
        "labels": [
            bool(source.labelled),
            digest(json.dumps(list(source.classes or [])).encode()),
            digest((labels_of(source, ids) if labels is None else labels).tobytes()),  # a bank keeps them all
        ],
        "ids": digest(np.ascontiguousarray(ids, dtype=np.int64).tobytes()),
        "samples": len(ids),
        "bytes": digest(*looked),
    }


def labels_of(source: Source, ids: np.ndarray) -> np.ndarray:
    """int64 [n], without reading an image; -1: none, `UNUSABLE`: the sample will be left out for it."""
    return np.array([_label(source, i) for i in ids.tolist()], dtype=np.int64)


def _label(source: Source, id: int) -> int:
    try:
        return source.label(id)
    except SampleError:
        return UNUSABLE


def _bytes(source: Source, id: int) -> bytes:
    try:
        raw = source.read(id)
    except SampleError:
        return b""
    return f"{raw.key} {raw.label} ".encode() + raw.image


def identity(
    model: nn.Module, source: Source, ids: Sequence[int], cut: Cut, how: How, labels: np.ndarray | None = None
) -> dict[str, Any]:
    """All that decides a bank's numbers, as JSON would say it; batch, device and threads change only rounding."""
    return {
        "version": VERSION,
        "weights": weights_hash(model),
        "architecture": architecture_hash(model),
        "data": data_facts(source, np.asarray(ids), labels),
        "transform": [*cut],
        "mean": [float(v) for v in how.mean],
        "std": [float(v) for v in how.std],
        "precision": how.precision,
        "channels_last": how.channels_last,
        "dtype": how.dtype,
    }
