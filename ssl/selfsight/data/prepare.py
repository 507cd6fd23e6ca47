"""`selfsight prepare`: turn a folder, a list of paths, other shards, or the built-in scenes into well-formed shards.

Every image is decoded once, so a shard that is written holds nothing that a run would have to skip; what is broken
is listed in `<out>/report.json`. Shards are plain tars in webdataset's layout, written with its `ShardWriter` (mtime
0, no owner), appear under their name only when complete, and are the same bytes for the same input and settings,
whatever the number of workers.

`write_shards` takes any `Source`, so a recipe for a public data set is a class with `read` and a call.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from .rng import key_of
from .source import DataError, Raw, SampleError, Source

MAX_BYTES = 1_000_000_000  # per shard: large enough for the storage, small enough to copy
_CHUNK = 16  # samples per task of a worker
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif", b"P6": "ppm"}


class Written(NamedTuple):
    """One sample ready to be stored, or the reason why it cannot be: fields maps extensions to bytes."""

    id: int
    fields: dict[str, bytes] | None
    where: str = ""
    why: str = ""


def extension_of(image: bytes) -> str | None:
    """The file extension for image bytes, by their first bytes; None for formats that shards do not hold."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((name for magic, name in _MAGIC.items() if image.startswith(magic)), None)


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _resize_ids(mask: bytes, size: tuple[int, int], before: tuple[int, int], where: str) -> bytes:
    """A PNG of ids at a new (height, width), nearest neighbour, values kept (also palette and 16-bit images)."""
    from PIL import Image

    with Image.open(io.BytesIO(mask)) as image:
        if (image.height, image.width) != before:
            have, want = f"{image.height}x{image.width}", f"{before[0]}x{before[1]}"
            raise SampleError(where, f"the mask has {have} pixels, the image {want}")
        buffer = io.BytesIO()
        image.resize((size[1], size[0]), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def convert(raw: Raw, size: int | None, quality: int) -> dict[str, bytes]:
    """Check one sample by decoding it, shrink its shorter side to `size` pixels if it is larger, and name its fields.

    Raises SampleError for what cannot be decoded. Bytes stay as they are when nothing has to change.
    """
    from PIL import Image

    from .decode import decode

    pixels, _ = decode(raw.image, raw.where)
    height, width = pixels.shape[:2]
    image, masks = raw.image, {"mask.png": raw.mask, "objects.png": raw.objects}
    extension = extension_of(image)
    if size is not None and min(height, width) > size:
        scale = size / min(height, width)
        new = max(size, round(height * scale)), max(size, round(width * scale))
        small = Image.fromarray(pixels).resize((new[1], new[0]), Image.Resampling.BICUBIC)
        image, extension = _jpeg(np.asarray(small), quality), "jpg"
        masks = {k: _resize_ids(m, new, (height, width), raw.where) for k, m in masks.items() if m}
    elif extension is None:
        image, extension = _jpeg(pixels, quality), "jpg"
    fields = {extension: image} | {name: data for name, data in masks.items() if data}
    if raw.boxes:
        fields["boxes.json"] = raw.boxes  # its "size" says in which pixels the boxes are
    if raw.label >= 0:
        fields["cls"] = str(raw.label).encode()
    return fields


def clean_key(key: str) -> str:
    """A key that webdataset's naming rule gives back unchanged: no suffix, no dots after the last slash."""
    folder, name = os.path.split(key.replace(os.sep, "/").strip("/"))
    stem, suffix = os.path.splitext(name)  # noqa: PTH122
    name = stem if suffix[1:].isalpha() and len(suffix) <= 5 else name
    parts = [part for part in folder.split("/") if part not in ("", ".", "..")]
    key = "/".join([*parts, name.replace(".", "_") or "_"])
    return re.sub(r"^__|[\0\n]", "_", key)


def _keys(source: Any) -> list[str]:
    """One key per sample, each of them once: those that would collide get a hash of where they come from."""
    keys = [clean_key(source.key(id)) for id in range(len(source))]
    count = Counter(keys)
    for id, key in enumerate(keys):
        if count[key] > 1:
            keys[id] = f"{key}-{hashlib.sha256(source.where(id).encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    if len(set(keys)) < len(keys):
        twice = next(key for key, n in Counter(keys).items() if n > 1)
        raise DataError(f"{twice} is listed twice: list every image once")
    return keys


def in_val(key: str, val_fraction: float) -> bool:
    """Whether a sample is for validation: by a hash of its key, so that adding images moves none of the others."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2**64


# ---- workers -------------------------------------------------------------------------------------------------

_work: Callable[[int], Written]


def _start_worker(work: Callable[[int], Written]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _work = work


def _run_chunk(ids: list[int]) -> list[Written]:
    return [_work(id) for id in ids]


def _one(source: Source, size: int | None, quality: int, id: int) -> Written:
    try:
        return Written(id, convert(source.read(id), size, quality))
    except SampleError as error:
        return Written(id, None, error.where, error.why)


def _converted(work: Callable[[int], Written], ids: Sequence[int], workers: int) -> Iterator[Written]:
    """Results in the order of the ids; a few chunks per worker are under way at a time, so memory stays small."""
    if workers == 0:
        yield from map(work, ids)
        return
    chunks = iter([list(ids[i : i + _CHUNK]) for i in range(0, len(ids), _CHUNK)])
    context = get_context("spawn")  # forking a process that has threads (torch) may deadlock
    with ProcessPoolExecutor(workers, context, _start_worker, (work,)) as pool:
        try:
            waiting = deque(pool.submit(_run_chunk, chunk) for chunk in islice(chunks, 4 * workers))
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(pool.submit(_run_chunk, chunk) for chunk in islice(chunks, 1))
                yield from done
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---- writing -------------------------------------------------------------------------------------------------


class _Split:
    """The shards of one split: `train-000000.tar`, …, each complete before it gets its name."""

    def __init__(self, out: Path, name: str, samples_per_shard: int, max_bytes: float):
        self.out, self.name, self.limits = out, name, (samples_per_shard, max_bytes)
        self.samples, self.paths, self.writer = 0, [], None
        self.file: IO[bytes] | None = None
        self.keep = True

    def _open(self, name: str) -> IO[bytes]:
        self.file = (self.out / f"{name}.partial").open("wb")
        return self.file

    def _finished(self, name: str) -> None:
        self.file.close()
        if not self.keep:
            (self.out / f"{name}.partial").unlink()
            return
        (self.out / f"{name}.partial").replace(self.out / name)
        self.paths.append(self.out / name)

    def write(self, key: str, fields: dict[str, bytes]) -> None:
        from webdataset import ShardWriter

        if self.writer is None:  # no empty shard for a split that gets nothing
            per_shard, max_bytes = self.limits
            self.writer = ShardWriter(
                f"{self.name}-%06d.tar", per_shard, max_bytes, post=self._finished, verbose=0, opener=self._open,
                encoder=False, mtime=0, user="", group="", mode=0o644,
            )  # fmt: skip
        self.writer.write({"__key__": key, **fields})
        self.samples += 1

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def abandon(self) -> None:
        """After an error: remove the shard that is not complete."""
        self.keep = False
        if self.file is not None and not self.file.closed:
            self.close()


def _new_folder(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if old := sorted(p.name for p in out.glob("*.tar")):
        raise DataError(f"out={out} already holds shards ({old[0]} …): remove them, or choose another folder")


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_shards(
    source: Any,
    out: str | os.PathLike,
    *,
    split: str | None = None,
    size: int | None = None,
    quality: int = 90,
    val_fraction: float = 0.0,
    samples_per_shard: int = 10_000,
    max_bytes: float = MAX_BYTES,
    workers: int | None = None,
    seed: int | None = 0,
) -> dict[str, Any]:
    """Write all samples of a source as shards; returns the report {written, shards, broken, …}.

    source: a `Source` that also has `key(id)` and `where(id)`. split: the name of all shards ("train", "val"); None:
    train and val by a hash of the key. size: shorter side in pixels. workers: processes (None: all processors, 0:
    none). seed: order of the samples (None: as they come). Raises DataError when `source` as a whole cannot be read;
    single broken samples are listed in the report.
    """
    from tqdm import tqdm

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    keys = _keys(source)
    ids = np.arange(len(keys)) if seed is None else np.argsort(key_of(seed, np.arange(len(keys))), kind="stable")
    workers = min(_processors() if workers is None else workers, -(-len(keys) // _CHUNK))
    names = [split] if split else ["train", "val"]
    splits = {name: _Split(out, name, samples_per_shard, max_bytes) for name in names}
    broken: list[dict[str, str]] = []
    results = _converted(partial(_one, source, size, quality), ids.tolist(), workers)
    try:
        for done in tqdm(results, "preparing", len(keys), unit="img", leave=False, disable=None):
            if done.fields is None:
                broken.append({"where": done.where, "why": done.why})
                continue
            name = split or ("val" if in_val(keys[done.id], val_fraction) else "train")
            splits[name].write(keys[done.id], done.fields)
        for part in splits.values():
            part.close()
    except BaseException:
        for part in splits.values():
            part.abandon()
        raise
    return {
        "written": {name: part.samples for name, part in splits.items() if part.samples},
        "shards": {name: [path.name for path in part.paths] for name, part in splits.items() if part.paths},
        "broken_count": len(broken),
        "broken": sorted(broken, key=lambda entry: entry["where"]),
    }


def write_classes(out: str | os.PathLike, classes: Sequence[str] | None, **more: Any) -> None:
    """Put class names beside the shards (`more`: task="segmentation", ignore_index=255)."""
    if classes:
        content = {"classes": list(classes), **more}
        (Path(out) / "classes.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def write_report(out: str | os.PathLike, report: dict[str, Any]) -> None:
    """Write `<out>/report.json` and say in a few lines what was written, what was broken, and how to train on it."""
    out = Path(out)
    (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    written = ", ".join(f"{n:,} {split}" for split, n in report["written"].items())
    print(f"wrote {written} samples in {sum(map(len, report['shards'].values())):,} shards to {out}")
    if report["broken_count"]:
        print(f"left out {report['broken_count']:,} broken files, listed in {out / 'report.json'}:")
        for entry in report["broken"][:3]:
            print(f"  {entry['where']}: {entry['why']}")
    print(f"train on it: {report['command']}")


def write_splits(out: str | os.PathLike, sources: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """For recipes: `write_shards` for each split of a public data set, class names (of the first) and one report."""
    _new_folder(Path(out))
    total: dict[str, Any] = {"written": {}, "shards": {}, "broken_count": 0, "broken": []}
    for split, source in sources.items():
        report = write_shards(source, out, split=split, **settings)
        for key in ("written", "shards"):
            total[key] |= report[key]
        for key in ("broken_count", "broken"):
            total[key] += report[key]
    first = next(iter(sources.values()))
    write_classes(out, first.classes, **getattr(first, "classes_note", {}))
    total["command"] = train_command(out, total["shards"])
    write_report(out, total)
    return total


def train_command(out: str | os.PathLike, shards: dict[str, list[str]]) -> str:
    """The command that trains on these shards."""
    words = []
    for split, names in shards.items():
        many = f"{split}-{{000000..{len(names) - 1:06d}}}.tar" if len(names) > 1 else names[0]
        words.append(f"data.{split}='{Path(out).absolute() / many}'")
    return f"selfsight train data=shards {' '.join(words)}"


# ---- the command ---------------------------------------------------------------------------------------------


def _open(kind: str, source: Any, labels: str) -> Source:
    from .folder import Folder
    from .manifest import Shards

    if kind == "shards":
        patterns = source if isinstance(source, str) else [str(pattern) for pattern in source]
        return Shards(patterns, labels=labels)
    path = Path(str(source)).expanduser()
    if kind == "folder" and path.is_file():
        raise DataError(f"source={source} is a file: use kind=list for a text file of paths, kind=shards for tars")
    if kind == "list" and path.is_dir():
        raise DataError(f"source={source} is a folder: use kind=folder")
    return Folder(path, labels=labels)


def _copy_scenes(out: Path, count: int, size: int, val_fraction: float, seed: int) -> dict[str, Any]:
    """Make the built-in scenes in the cache folder (or find them there) and copy them."""
    from .manifest import expand, open_index
    from .scenes import ensure

    written, shards = {}, {}
    val = round(count * val_fraction)
    for split, number in {"train": count - val, "val": val}.items():
        if not number:
            continue
        paths = expand(ensure(split, size=size, count=number, seed=seed))
        shards[split] = [f"{split}-{i:06d}.tar" for i in range(len(paths))]
        written[split] = sum(open_index(path, None)[0]["n"] for path in paths)
        for path, name in zip(paths, shards[split]):
            shutil.copyfile(path, out / name)
        if (classes := Path(paths[0]).parent / "classes.json").is_file():
            shutil.copyfile(classes, out / "classes.json")
    return {"written": written, "shards": shards, "broken_count": 0, "broken": []}


def prepare(cfg: Any) -> dict[str, Any]:
    """Run `selfsight prepare`: shards, classes.json and report.json in `cfg.out`; returns the report.

    cfg: attributes kind (folder | list | shards | scenes), source, out, size, quality, val_fraction,
    samples_per_shard, max_bytes, workers, labels, seed; for scenes count and image_size. Missing ones take defaults.
    Raises DataError naming the key when source or out cannot be used, or when no image of the source can.
    """

    def value(key: str, default: Any) -> Any:
        given = getattr(cfg, key, None)
        return default if given is None else given

    kind, out = cfg.kind, Path(cfg.out).expanduser()
    val_fraction, seed = float(value("val_fraction", 0.0)), int(value("seed", 0))
    if kind == "scenes":
        _new_folder(out)
        report = _copy_scenes(out, value("count", 5000), value("image_size", 64), val_fraction, seed)
    else:
        source = _open(kind, cfg.source, value("labels", "auto"))
        _new_folder(out)
        print(f"reading {source.describe}")
        report = write_shards(
            source, out, size=value("size", None), quality=value("quality", 90), val_fraction=val_fraction,
            samples_per_shard=value("samples_per_shard", 10_000), max_bytes=value("max_bytes", MAX_BYTES),
            workers=value("workers", None), seed=seed,
        )  # fmt: skip
        if not report["written"]:
            first = report["broken"][0]
            raise DataError(f"no image of {cfg.source} can be used, the first is {first['where']}: {first['why']}")
        write_classes(out, source.classes)
    settings = {key: value(key, None) for key in ("kind", "source", "size", "quality", "labels")}
    settings["source"] = str(settings["source"]) if settings["source"] is not None else None
    report |= {"settings": settings | {"val_fraction": val_fraction, "seed": seed}}
    report["command"] = train_command(out, report["shards"])
    write_report(out, report)
    return report
