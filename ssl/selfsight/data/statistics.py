"""Mean and standard deviation of a data set's pixels, measured once and cached."""

from __future__ import annotations

import json

import numpy as np

from . import cache_dir
from .decode import decode
from .order import fixed_subset
from .source import DataError, SampleError, Source

SAMPLES = 2000


def mean_std(source: Source, channels: int = 3, samples: int = SAMPLES) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation in 0..1 over a fixed subset of whole images, each counted equally."""
    path = cache_dir() / "statistics" / f"{source.fingerprint[:32]}-{channels}-{samples}.json"
    if path.exists():
        found = json.loads(path.read_text())
        return found["mean"], found["std"]
    sums, squares, n = np.zeros(channels), np.zeros(channels), 0
    for id in fixed_subset(0, sum(source.lengths), samples):
        try:
            raw = source.read(int(id))
            image, _ = decode(raw.image, raw.where, at_least=(64, 64), channels=channels)
        except SampleError:
            continue
        x = image.reshape(-1, channels).astype(np.float64) / 255
        sums, squares, n = sums + x.mean(0), squares + (x**2).mean(0), n + 1
    if n == 0:
        raise DataError(f"data.mean=auto: none of {samples} samples of {source.describe} could be decoded")
    mean = sums / n
    std = np.sqrt(np.maximum(squares / n - mean**2, 1e-6))
    result = {"mean": [round(float(v), 4) for v in mean], "std": [round(float(v), 4) for v in std]}
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(result))
    tmp.replace(path)
    return result["mean"], result["std"]
