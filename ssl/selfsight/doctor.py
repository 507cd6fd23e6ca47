"""`selfsight doctor`: what works on this machine, what would fail, and the remedy. A line each; no network."""

from __future__ import annotations

import importlib.metadata
import io
import itertools
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

GB = 1 << 30
PACKAGES = (
    *("torch", "torchvision", "timm", "lightning", "hydra-core", "omegaconf", "webdataset", "safetensors"),
    *("simplejpeg", "pillow", "numpy", "wandb"),
)


class Check(NamedTuple):
    """One line: level (ok | warn | fail), what was looked at, what was found and, unless ok, the remedy."""

    level: str
    what: str
    found: str


def doctor(cfg: Any) -> int:
    """Print every check. cfg: run_dir, num_workers, data (or None). Exit code 1 when something would fail."""
    levels = {"ok": 0, "warn": 0, "fail": 0}
    for check in checks(cfg):
        levels[check.level] += 1
        print(f"{check.level:4}  {check.what:12}  {check.found}", flush=True)
    print(f"\n{levels['ok']} ok, {levels['warn']} to look at, {levels['fail']} would fail")
    return int(levels["fail"] > 0)


def checks(cfg: Any) -> Iterator[Check]:
    """All checks, in the order of a run: software, device, reading, writing."""
    run_dir = Path(cfg.run_dir or "runs")
    groups: list[Callable[[], Iterator[Check]]] = [
        check_versions,
        check_devices,
        check_precision,
        lambda: check_cores(cfg.num_workers),
        check_decode,
        lambda: check_data(cfg.data),
        lambda: check_disks(run_dir),
        check_shared_memory,
        lambda: check_temporary(run_dir),
        check_wandb,
    ]
    for group in groups:
        yield from group()


def check_versions() -> Iterator[Check]:
    """Python and every package that a run imports."""
    inside = (3, 11) <= sys.version_info[:2] <= (3, 13)
    remedy = "" if inside else ": use Python 3.11, 3.12 or 3.13"
    yield Check("ok" if inside else "fail", "python", f"{platform.python_version()} on {platform.platform()}{remedy}")
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield Check("ok", "packages", ", ".join(found))
    if missing:
        yield Check("fail", "packages", f"missing: {', '.join(missing)}; install them, or selfsight again")


def check_devices() -> Iterator[Check]:
    """The devices that torch sees."""
    import torch

    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        yield Check("ok", "device", f"cuda:{i} {gpu.name}, {gpu.total_memory / GB:.0f} GB, CUDA {torch.version.cuda}")
    if torch.cuda.device_count():
        return
    if shutil.which("nvidia-smi"):
        yield Check("warn", "device", f"an NVIDIA driver is here, but torch {torch.__version__} sees no GPU: install a "
                    "torch build for this driver's CUDA version, and look at CUDA_VISIBLE_DEVICES")  # fmt: skip
    else:
        yield Check("ok", "device", "CPU only: good for the small backbones (vit_nano, *_nano_lite); others take long")


def check_precision() -> Iterator[Check]:
    """Which trainer.precision pays: matrix products are timed where it is not known beforehand."""
    import torch

    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        advice = (
            "bf16-mixed and 16-mixed" if bf16 else "16-mixed (no native bf16: trainer.precision=bf16-mixed is slow)"
        )
        yield Check("ok" if bf16 else "warn", "precision", advice)
        return
    flags = sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_fp16"} & _cpu_flags())
    speed = {d: _matmul_seconds(d) for d in (torch.float32, torch.bfloat16, torch.float16)}
    bf16, fp16 = (speed[torch.float32] / speed[d] for d in (torch.bfloat16, torch.float16))
    best = "bf16-mixed" if bf16 > 1.2 else "32"
    text = f"CPU ({' '.join(flags) or platform.machine()}): bf16 {bf16:.1f}x, fp16 {fp16:.1f}x the speed of 32 bits"
    yield Check("ok", "precision", f"{text}; best here: trainer.precision={best}")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _matmul_seconds(dtype: Any, side: int = 384, repeats: int = 3) -> float:
    import torch

    a = torch.ones(side, side, dtype=dtype)
    a @ a
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return min(times)


def check_cores(num_workers: int | None) -> Iterator[Check]:
    """Processor cores that this process may use, against the loader's processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers is not None and num_workers > cores:
        yield Check("warn", "cores", f"{cores} usable, fewer than num_workers={num_workers}: use num_workers={cores}")
    else:
        yield Check("ok", "cores", f"{cores} usable" + (f", num_workers={num_workers}" if num_workers else ""))


def check_decode(count: int = 200) -> Iterator[Check]:
    """Speed of decoding synthetic JPEGs of 500 x 375 pixels on one core."""
    import numpy as np
    from PIL import Image

    from .data.decode import decode

    rows, columns = np.mgrid[0:375, 0:500]
    waves = np.stack([rows * 0.1, columns * 0.13, (rows + columns) * 0.07], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray((127 + 80 * np.sin(waves)).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    start = time.perf_counter()
    for _ in range(count):
        decode(buffer.getvalue(), "synthetic JPEG")
    rate = count / (time.perf_counter() - start)
    slow = rate < 100
    remedy = ": expected several hundred; is the machine busy, or simplejpeg missing?" if slow else ""
    yield Check("warn" if slow else "ok", "decode", f"{rate:,.0f} images/s per core (JPEG, 500 x 375){remedy}")


def check_data(data: Any) -> Iterator[Check]:
    """Open each split that is named, read and decode three samples, say whether there are labels."""
    if data is None:
        yield Check("ok", "data", "not asked for: add data=folder data.root=… or data=shards data.train=… to try it")
        return
    for split in ("train", "val"):
        try:
            found = _read_some(data, split)
        except ValueError as error:  # DataError, SampleError: the sentence names file and remedy
            yield Check("fail", f"data {split}", " ".join(str(error).split()))
        else:
            if found:
                yield Check("ok", f"data {split}", found)


def _read_some(data: Any, split: str) -> str | None:
    from .data import open_source
    from .data.decode import decode

    start = time.perf_counter()
    source = open_source(data, split)
    if source is None:
        return None
    opened = time.perf_counter() - start
    if hasattr(source, "read"):
        count = f"{len(source):,} images"
        samples = [source.read(i) for i in sorted({0, len(source) // 2, len(source) - 1})]
    else:  # data.mode=stream has no numbers, only an order
        count, samples = "a stream of images", list(itertools.islice(source, 3))
    shapes = [decode(raw.image, raw.where)[0].shape for raw in samples]
    sizes = ", ".join(f"{width}x{height}" for height, width, _ in shapes)
    labels = f"labels in {len(source.classes)} classes" if source.labelled and source.classes else "labels"
    labels = labels if source.labelled else "no labels"
    return f"{source.describe}: {count}, {labels}; read {sizes}; opened in {opened:.1f} s"


def check_disks(run_dir: Path) -> Iterator[Check]:
    """Room, and the right to write, for run folders and for the cache."""
    from .data import cache_dir

    for what, folder in (("run folder", run_dir), ("cache", cache_dir())):
        there = _nearest(folder)
        free = shutil.disk_usage(there).free / GB
        text = f"{folder}: {free:,.1f} GB free"
        if not os.access(there, os.W_OK):
            remedy = "run_dir=" if what == "run folder" else "SELFSIGHT_CACHE="
            yield Check("fail", what, f"{there} cannot be written: choose another with {remedy}")
        elif free < 5:
            yield Check("fail" if free < 0.5 else "warn", what, f"{text}: a checkpoint of vit_b takes about 1.4 GB")
        else:
            yield Check("ok", what, text)


def _nearest(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Check]:
    """Loader processes hand batches over through shared memory; containers often have 64 MB of it."""
    if not folder.is_dir():
        return
    size = shutil.disk_usage(folder).total / GB
    if size < 1:
        yield Check("warn", "/dev/shm", f"{size:.2f} GB: too small for loader processes; start the container with "
                    "--shm-size=8g or --ipc=host, or use num_workers=0")  # fmt: skip
    else:
        yield Check("ok", "/dev/shm", f"{size:.1f} GB")


def check_temporary(run_dir: Path) -> Iterator[Check]:
    """Temporary files: their room, and whether moving them to the run folder would be a copy."""
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free / GB
    other = folder.stat().st_dev != _nearest(run_dir).stat().st_dev
    where = f"{folder}: {free:,.1f} GB free"
    if other:
        where += ", another file system than the run folder (checkpoints are written beside their final place)"
    if free < 1:
        yield Check("warn", "TMPDIR", f"{where}: set TMPDIR to a folder with more room")
    else:
        yield Check("ok", "TMPDIR", where)


def check_wandb() -> Iterator[Check]:
    """Whether logger=wandb would log online; looked up locally, never sent."""
    from .training.wandb_sink import logged_in

    text = "logged in" if logged_in() else "no login: logger=wandb logs offline; `wandb login` changes that"
    yield Check("ok", "wandb", text)
