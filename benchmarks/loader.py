"""Our loader against webdataset + Pillow + torchvision transforms, on the same JPEG shards, side by side.

    python benchmarks/loader.py --shards '/d/train-{000000..000003}.tar' --out benchmarks/results/loader.json

Reading: bytes of a sample (image and label), nothing decoded. End to end: random resized crop to 224 (scale 0.2..1,
bicubic), flip and collate, with one loader process and one thread; theirs are normalised float batches, ours uint8
(normalised and flipped where the model is), and ours with flip and normalisation included.

The unit is processor time, of the loader process and the main one together, so that other programs on the machine
disturb little. Every repeat runs all variants one after the other; ratios are medians of the ratios inside a repeat.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torchvision import transforms

from selfsight.data.loader import Positions, Samples, make_loader
from selfsight.data.manifest import Shards, expand
from selfsight.data.order import Order
from selfsight.views.photo import prepare
from selfsight.views.spec import Crop, Views

SIZE, SCALE, BATCH = 224, (0.2, 1.0), 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEWS = Views((Crop("image", 1, SIZE, SCALE),))


def spent() -> float:
    """Processor seconds of this process and its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def synthetic(folder: Path, count: int = 384, height: int = 375, width: int = 500) -> list[str]:
    """A shard of JPEGs with the spectrum of natural images (amplitude 1 / frequency), quality 90."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / width)
    path = folder / "synthetic-000000.tar"
    with wds.TarWriter(str(path)) as writer:
        for i in range(count):
            phase = np.exp(2j * np.pi * rng.random((3, *frequency.shape)))
            waves = np.fft.irfft2(amplitude * phase, (height, width))
            waves = waves / waves.std() * 50 + 127
            pixels = np.clip(waves, 0, 255).astype(np.uint8).transpose(1, 2, 0)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
            writer.write({"__key__": f"{i:06d}", "jpg": buffer.getvalue(), "cls": str(i % 10).encode()})
    return [str(path)]


# ---- reading -------------------------------------------------------------------------------------------------


def read_webdataset(paths: list[str], source: Shards) -> int:
    pipeline = wds.WebDataset(paths, shardshuffle=False)
    return sum(1 for sample in pipeline if sample["jpg"] and sample["cls"])


def read_ours(source: Shards, ids: np.ndarray) -> int:
    return sum(1 for i in ids.tolist() if source.read(i).image)


# ---- end to end ----------------------------------------------------------------------------------------------


def batches_webdataset(paths: list[str], images: int) -> Iterator[Any]:
    """The usual pipeline: Pillow, torchvision transforms, float32 batches."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    pipeline = wds.WebDataset(paths, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    pipeline = pipeline.map_tuple(lambda image: transform(image.convert("RGB")), int).batched(BATCH, partial=False)
    yield from wds.WebLoader(pipeline, batch_size=None, num_workers=1)


def batches_ours(source: Shards, images: int) -> Iterator[Any]:
    samples = Samples(source, Order(0, source.lengths), VIEWS, 0)
    yield from make_loader(samples, Positions(0, images // BATCH, BATCH, 1, 0, 1), 1, pin_memory=False)


def batches_ours_normalised(source: Shards, images: int) -> Iterator[Any]:
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    for batch in batches_ours(source, images):
        yield prepare(batch, VIEWS, mean, std)


# ---- measuring -----------------------------------------------------------------------------------------------


def compare(variants: dict[str, Callable[[], int]], repeats: int) -> dict[str, dict[str, float]]:
    """Run every variant in every repeat; images per processor second and per second, and ratios to the first one."""
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, run in variants.items():
            cpu, wall = spent(), time.perf_counter()
            images = run()
            if repeat:  # the first round fills the page cache and every lazy import
                costs[name].append(((spent() - cpu) / images, (time.perf_counter() - wall) / images))
    base = costs[next(iter(variants))]
    results = {}
    for name, own in costs.items():
        ratios = [b[0] / o[0] for b, o in zip(base, own)]
        results[name] = {
            "microseconds_per_image": round(1e6 * statistics.median(c for c, _ in own), 1),
            "images_per_cpu_second": round(1 / statistics.median(c for c, _ in own), 1),
            "images_per_second": round(1 / statistics.median(w for _, w in own), 1),
            "ratio": round(statistics.median(ratios), 2),
            "ratio_lowest": round(min(ratios), 2),
            "ratio_highest": round(max(ratios), 2),
        }
    return results


def counted(batches: Iterator[Any]) -> int:
    return sum(len(batch[1] if isinstance(batch, list | tuple) else batch["label"]) for batch in batches)


def report(title: str, results: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}\n  {'':34} us CPU/image  images/CPU s   ratio (lowest .. highest of the repeats)")
    for name, r in results.items():
        spread = f"{r['ratio_lowest']:.2f} .. {r['ratio_highest']:.2f}"
        print(
            f"  {name:34} {r['microseconds_per_image']:12,.1f}  {r['images_per_cpu_second']:12,.1f}  "
            f"{r['ratio']:6.2f} ({spread})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="JPEG shards (.jpg and .cls); default: a synthetic one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--what", default="synthetic JPEGs of 500 x 375", help="words for the result file")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    folder = Path(tempfile.mkdtemp(prefix="selfsight-benchmark-"))
    try:
        paths = expand(args.shards) if args.shards else synthetic(folder)
        source = Shards(paths, folder / "index")
        n = len(source)
        images = n // BATCH * BATCH
        shuffled = Order(0, source.lengths)(np.arange(n))
        size = sum(len(source.read(i).image) for i in range(min(n, 200))) / min(n, 200) / 1000
        print(f"{n:,} images, {size:.0f} kB on average, {args.repeats} repeats, load {os.getloadavg()[0]:.1f}")
        reading = {
            "webdataset": lambda: read_webdataset(paths, source),
            "ours, in file order": lambda: read_ours(source, np.arange(n)),
            "ours, random access": lambda: read_ours(source, shuffled),
        }
        whole = {
            "webdataset, Pillow, torchvision": lambda: counted(batches_webdataset(paths, images)),
            "ours, uint8 batches": lambda: counted(batches_ours(source, images)),
            "ours, flipped and normalised": lambda: counted(batches_ours_normalised(source, images)),
        }
        results = {"data": args.what, "images": n, "kilobytes_per_image": round(size, 1), "repeats": args.repeats}
        results["reading"] = compare(reading, args.repeats)
        report("reading", results["reading"])
        results["end_to_end"] = compare(whole, args.repeats)
        report("end to end, crops of 224", results["end_to_end"])
        machine.save(args.out, "loader.py", results)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
