"""`selfsight proposals`: object masks for a pile of images, made once from a backbone's own features.

    checkpoint=<run folder | export folder | timm model>  data=...  out=<folder>

For each shard `X.tar` of the data it writes a side-car `X.tar` that holds `<key>.objects.png` for the same keys in the
same order: an 8-bit map of object ids (0 = none, 1 = found first), in the shape of the image, `map_size` pixels at
most. A side-car appears under its name only when complete, so the same command continues where it was stopped.
`report.json` says what is in them, `overlays.png` shows sixteen images.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from .backbones.tokens import Backbone
from .data import open_source
from .data.decode import crop_reduction, cut, decode, size_of
from .data.manifest import Shards
from .data.objects import object_map
from .data.prepare import _keys
from .data.proposals import agreement, label_map, maskcut, resize_ids
from .data.sidecar_writer import Labelled, SideCar, is_complete, plan, read_back, write
from .data.source import DataError, SampleError, Source
from .probes.bank import encode, normalise, subset
from .probes.readout import plain
from .probes.run import Loaded, choose_data, choose_device, choose_workers, load_backbone
from .schema import ConfigError
from .training.pictures import grid as sheet
from .training.pictures import save_png

BLANK = 4  # an image whose channels span fewer of the 256 levels shows nothing
NODES = 1 << 24  # entries of the graphs that are solved at once, 128 MB each
JUDGED, SHOWN = 2000, 16  # images of the report's numbers and of the picture
COLOURS = ((230, 60, 60), (60, 150, 240), (60, 190, 90), (240, 180, 40), (170, 90, 220), (40, 200, 200))


class ProposalError(ValueError):
    """Proposals cannot be made with this backbone; one sentence says what would work."""


# ---- from pixels to object ids -------------------------------------------------------------------------------


class Finder:
    """Object ids of images by one backbone and one set of settings.

    kind: "keys" of the last attention block, as MaskCut takes from DINO, or the final patch "tokens". center: take
    the image's mean feature away first. Raises ProposalError for a model without patch tokens and attention.
    """

    def __init__(self, loaded: Loaded, kind: str, center: bool, device: torch.device, **settings: Any):
        model = loaded.model
        if isinstance(model, Backbone) and model.adapters is not None:
            model = plain(model, loaded.image_size)  # a hook on timm's layer does not see what stands beside it
        self.model, self.kind, self.center, self.device = model.to(device).eval(), kind, center, device
        self.mean, self.std, self.size, self.settings = loaded.mean, loaded.std, loaded.image_size, settings
        self.name = loaded.facts["backbone"]
        self.layer, self.fused = self._key_layer()
        self.grid = self._grid()
        found = self.features(torch.zeros(1, len(self.mean), self.size, self.size, dtype=torch.uint8)).shape[1]
        if found != self.grid[0] * self.grid[1]:
            raise ProposalError(f"{self.name} has {found} patch tokens at image_size={self.size}, which is no grid of "
                                f"{self.grid[0]} x {self.grid[1]}; use a plain ViT")  # fmt: skip

    def _key_layer(self) -> tuple[nn.Module, bool]:
        """The projection to keys of the last block, and whether queries and values come out of it as well."""
        model = self.model.timm if isinstance(self.model, Backbone) else self.model
        blocks = getattr(model, "blocks", None)
        attention = getattr(blocks[-1], "attn", None) if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else None
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
        for name, fused in (("qkv", True), ("k_proj", False)):
            if isinstance(layer := getattr(attention, name, None), nn.Module) and patch is not None:
                return layer, fused
        raise ProposalError(f"{self.name} is no vision transformer (blocks of attention over patch tokens), which "
                            "proposals need; use a ViT, e.g. checkpoint=vit_small_patch16_224.dino")  # fmt: skip

    def _grid(self) -> tuple[int, int]:
        """Rows and columns of patches; a patch need not be square."""
        model = self.model.timm if isinstance(self.model, Backbone) else self.model
        patch = model.patch_embed.patch_size
        rows, columns = patch if isinstance(patch, (tuple, list)) else (patch, patch)
        if self.size % rows or self.size % columns:
            both = math.lcm(rows, columns)
            raise ProposalError(f"image_size={self.size} is not a multiple of the patch size {both} of {self.name}; "
                                f"use {max(1, round(self.size / both)) * both}")  # fmt: skip
        return self.size // rows, self.size // columns

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """uint8 [B, c, s, s] -> float32 [B, N, D] on the device."""
        kept: list[Tensor] = []
        hook = self.layer.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        try:
            _, patches = encode(self.model, normalise(pixels, self.mean, self.std, self.device), patches=True)
        finally:
            hook.remove()
        if self.kind == "tokens":
            return patches
        if not kept or len(kept[-1]) != len(pixels) or kept[-1].shape[1] < patches.shape[1]:  # hidden, or in windows
            raise ProposalError(f"the attention keys of {self.name} cannot be read; use features=tokens")
        keys = kept[-1].chunk(3, dim=-1)[1] if self.fused else kept[-1]
        return keys[:, keys.shape[1] - patches.shape[1] :]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> np.ndarray:
        """uint8 [B, c, s, s] -> uint8 [B, h, w]: 0 = none, 1.. in the order they were found."""
        features = self.features(pixels)
        if not features.isfinite().all():
            raise ProposalError(f"{self.name} gives features that are not finite: the checkpoint is broken")
        if self.center:
            features = features - features.mean(1, keepdim=True)
        if features.device.type == "mps":  # has no float64
            features = features.cpu()
        parts = features.split(max(1, NODES // features.shape[1] ** 2))
        labels = torch.cat([label_map(maskcut(part, self.grid, **self.settings).masks) for part in parts]).cpu()
        low, high = (pixels.flatten(2).int().aminmax(dim=2)[i] for i in (0, 1))
        # What a backbone still sees in a blank image is its own positions.
        labels[(high - low).amax(1) < BLANK] = 0
        return labels.numpy()


class Seen(NamedTuple):
    """One image, whole, squeezed to a square: uint8 [c, s, s] and its own (height, width); or why there is none."""

    pixels: Tensor | None
    size: tuple[int, int]
    why: str = ""


def look(source: Source, size: int, channels: int, id: int) -> Seen:
    """Read one sample. Not cropped: a proposal's place is relative to the whole image."""
    try:
        raw = source.read(id)
        height, width = size_of(raw.image, raw.where)
        enough = crop_reduction(np.array([[0, 0, height, width]]), [size], height, width)
        image, _ = decode(raw.image, raw.where, at_least=enough, channels=channels)
    except SampleError as error:
        return Seen(None, (1, 1), str(error))
    return Seen(cut(image, (0, 0, *image.shape[:2]), size), (height, width))


def looks(source: Source, ids: Sequence[int], finder: Finder, batch: int, workers: int) -> Iterator[list[Seen]]:
    """Batches of images in order, decoded by threads while the one before is worked on."""
    read = partial(look, source, finder.size, len(finder.mean))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting: deque = deque()
        for start in range(0, len(ids), batch):
            waiting.append(pool.map(read, ids[start : start + batch]))
            if len(waiting) > 1:
                yield list(waiting.popleft())
        while waiting:
            yield list(waiting.popleft())


def png_of(labels: np.ndarray, size: tuple[int, int], limit: int) -> bytes:
    """Ids [h, w] as PNG in the shape of an image of this (height, width), `limit` pixels at most, no patch lost."""
    scale = min(1.0, limit / max(size))
    shape = tuple(max(round(side * scale), patches) for side, patches in zip(size, labels.shape))
    buffer = io.BytesIO()
    Image.fromarray(resize_ids(labels, shape)).save(buffer, "PNG", compress_level=3)  # hundreds of bytes either way
    return buffer.getvalue()


def samples(
    ids: Sequence[int], key: Callable[[int], str], batches: Iterator[list[Seen]], finder: Finder, limit: int
) -> Iterator[Labelled]:
    """What a side-car holds, in order; an image that cannot be used has no objects, and the reason."""
    waiting = iter(ids)
    for batch in batches:
        pixels = [seen.pixels for seen in batch if seen.pixels is not None]
        labels = iter(finder(torch.stack(pixels)) if pixels else ())
        for seen, id in zip(batch, waiting):
            found = np.zeros((1, 1), np.uint8) if seen.pixels is None else next(labels)
            yield Labelled(key(id), png_of(found, seen.size, limit), seen.why)


# ---- what came of it -----------------------------------------------------------------------------------------


def read_ids(png: bytes) -> np.ndarray:
    """The object ids [h, w] of a PNG, as they are stored."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


def known_objects(source: Source, id: int) -> np.ndarray | None:
    """The object ids that the data itself has for a sample; None if there are none that can be read."""
    try:
        return object_map(source.read(id))
    except SampleError:
        return None


def judge(source: Source, maps: dict[int, np.ndarray]) -> dict[str, Any]:
    """Objects per image, and, where the data has objects of its own, how well proposals match them."""
    counts = np.array([labels.max() for labels in maps.values()])
    numbers: dict[str, Any] = {
        "judged_on": len(maps),
        "objects_per_image": round(float(counts.mean()), 3),
        "without_object": round(float((counts == 0).mean()), 4),
        "against_objects": None,
    }
    if source.has_objects:
        pairs = [(labels, known_objects(source, id)) for id, labels in maps.items()]
        found = [agreement(labels, truth) for labels, truth in pairs if truth is not None]
        found = [one for one in found if one is not None]
        if found:
            first, best, centre = (np.array(column) for column in zip(*found))
            numbers["against_objects"] = {
                "images": len(found),
                "first_above_half": round(float((first > 0.5).mean()), 4),
                "any_above_half": round(float((best > 0.5).mean()), 4),
                "mean_best_iou": round(float(best.mean()), 4),
                "centre_square_above_half": round(float((centre > 0.5).mean()), 4),
            }
    return numbers


def overlay(pixels: Tensor, labels: np.ndarray) -> Tensor:
    """uint8 [3, s, s] and ids [h, w] -> float [3, s, s]: tinted inside, a line of full colour at the border."""
    size = pixels.shape[-1]
    ids = torch.from_numpy(resize_ids(labels, (size, size)).astype(np.int64))
    colour = torch.tensor(COLOURS).float()[(ids - 1) % len(COLOURS)].permute(2, 0, 1) / 255
    padded = torch.nn.functional.pad(ids[None].float(), (1, 1, 1, 1), mode="replicate")[0]
    around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    border = torch.stack([side != ids for side in around]).any(0)
    strength = torch.where(border, 1.0, 0.4) * (ids > 0)
    return pixels.float() / 255 * (1 - strength) + colour * strength


def draw(source: Source, maps: dict[int, np.ndarray], path: Path, size: int, channels: int) -> None:
    """A picture of sixteen images above their proposals."""
    seen = [(look(source, size, channels, id).pixels, labels) for id, labels in list(maps.items())[:SHOWN]]
    pairs = [(p if len(p) == 3 else p[:1].expand(3, -1, -1), labels) for p, labels in seen if p is not None]
    rows = {}
    for start in range(0, len(pairs), SHOWN // 2):
        part = pairs[start : start + SHOWN // 2]
        missing = min(len(pairs), SHOWN // 2) - len(part)  # a row of pictures is filled up with white ones
        part = part + [(torch.full_like(part[0][0], 255), np.zeros((1, 1), np.uint8))] * missing
        rows[f"images {start + 1}-{start + len(part)}"] = torch.stack([p.float() / 255 for p, _ in part])
        rows[f"objects {start + 1}-{start + len(part)}"] = torch.stack([overlay(p, labels) for p, labels in part])
    if rows:
        save_png(sheet(rows), path)


# ---- the command ---------------------------------------------------------------------------------------------


def proposals(cfg: Any) -> dict[str, Any]:
    """Run `selfsight proposals` by a resolved config; returns what `report.json` holds.

    ProposalError or ProbeError for a backbone that cannot be used, DataError for data or an `out` that cannot.
    """
    started = time.monotonic()
    if not cfg.checkpoint:
        raise ConfigError("proposals needs checkpoint=, for example checkpoint=vit_small_patch16_224.dino")
    loaded = load_backbone(cfg.checkpoint, which=cfg.which, image_size=cfg.image_size, step=cfg.step)
    finder = Finder(loaded, cfg.features, cfg.center, choose_device(cfg.device),
                    objects=cfg.objects, tau=cfg.tau, min_area=cfg.min_area)  # fmt: skip
    cfg.data = choose_data(cfg, loaded)
    source = _source(cfg, loaded.image_size)
    cars = plan(source, Path(cfg.out).expanduser() if cfg.out else None)
    folder, settings = cars[0].path.parent, _settings(cfg, loaded)
    key = source.key if isinstance(source, Shards) else _keys(source).__getitem__
    todo = _missing(cars, key, folder, settings)
    print(f"{source.describe}: {len(source):,} images, {finder.grid[0]} x {finder.grid[1]} patches of {finder.name}; "
          f"{len(cars) - len(todo):,} of {len(cars):,} side-cars are there", flush=True)  # fmt: skip
    _save(folder, {"settings": settings, "complete": False})
    begun = time.monotonic()
    written = _write_all(source, todo, key, finder, cfg)
    took = time.monotonic() - begun
    pngs, unusable = read_back(cars, subset(len(source), JUDGED).tolist())
    maps = {id: read_ids(png) for id, png in pngs.items()}
    if not maps:
        raise DataError(f"no image of {source.describe} can be used, the first: {unusable[0]}")
    draw(source, maps, folder / "overlays.png", max(loaded.image_size, 128), len(loaded.mean))
    result = {
        "settings": settings, "complete": True, "data": source.describe, "images": len(source),
        "sidecars": [str(car.path) for car in cars], **judge(source, maps),
        "unusable_count": len(unusable), "unusable": unusable,
        "written": written, "images_per_second": round(written / took, 2) if written else None,
        "seconds": round(time.monotonic() - started, 2), "device": str(finder.device),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "config": OmegaConf.to_container(cfg, resolve=True),
    }  # fmt: skip
    _save(folder, result)
    _say(result, folder)
    return result


def _source(cfg: Any, image_size: int) -> Source:
    data = cfg.data
    if data.get("mode") == "stream":
        raise DataError("data.mode=stream cannot be read by number; proposals need data=… with data.mode=exact")
    given = {"labels": "none"}  # a broken label is no reason to go without an object
    if "objects" in data:  # masks of an earlier round are no truth to compare with
        given["objects"] = None
    if data.name == "scenes" and data.get("size") is None:
        given["size"] = min(image_size, 128)
    source = open_source(OmegaConf.merge(data, given), cfg.split)
    if source is None or not len(source):
        raise DataError(f"data={data.name} has no images in its {cfg.split} split")
    return source


def _settings(cfg: Any, loaded: Loaded) -> dict[str, Any]:
    """Everything that decides what stands in a side-car, beside the image itself."""
    facts = {name: loaded.facts[name] for name in ("backbone", "objective", "which", "checkpoint", "step")}
    own = ("features", "center", "tau", "objects", "min_area", "map_size")
    return facts | {"image_size": loaded.image_size} | {name: cfg[name] for name in own}


def _missing(cars: Sequence[SideCar], key: Callable[[int], str], folder: Path, settings: dict) -> list[SideCar]:
    """The side-cars still to write. DataError if others in the folder were made with other settings."""
    todo = [car for car in cars if not is_complete(car, key)]
    old = _settings_before(folder) if any(folder.glob("*.tar")) else {}
    for name, value in settings.items():
        if name in old and old[name] != value:
            raise DataError(f"the side-cars in {folder} were made with {name}={old[name]}, now it is {value}: "
                            "choose another out=, or remove them")  # fmt: skip
    return todo


def _settings_before(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "report.json").read_text("utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # the report is gone; the side-cars are still good


def _write_all(source: Source, todo: Sequence[SideCar], key: Callable[[int], str], finder: Finder, cfg: Any) -> int:
    workers = choose_workers(cfg.num_workers)
    total = sum(len(car.ids) for car in todo)
    with tqdm(None, "proposals", total, unit="img", leave=False, disable=None) as bar:
        for car in todo:
            batches = looks(source, car.ids, finder, cfg.batch_size, workers)
            write(car.path, _counted(samples(car.ids, key, batches, finder, cfg.map_size), bar))
    return total


def _counted(items: Iterator[Labelled], bar: tqdm) -> Iterator[Labelled]:
    for item in items:
        yield item
        bar.update()


def _save(folder: Path, content: dict[str, Any]) -> None:
    """`report.json`, complete or not at all."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tmp = folder / f".report.json-{os.getpid()}"
        tmp.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
        tmp.replace(folder / "report.json")
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror}): name another folder with out=") from error


def _say(result: dict[str, Any], folder: Path) -> None:
    speed = f", {result['images_per_second']:.0f} images/s" if result["written"] else ""
    print(f"{result['written']:,} images written{speed}; {result['objects_per_image']:.2f} objects per image, "
          f"{100 * result['without_object']:.0f} % of the images without one")  # fmt: skip
    if match := result["against_objects"]:
        print(f"the first proposal matches an object (IoU > 0.5) in {100 * match['first_above_half']:.0f} % of "
              f"{match['images']:,} images, any proposal in {100 * match['any_above_half']:.0f} %; "
              f"the centred square in {100 * match['centre_square_above_half']:.0f} %")  # fmt: skip
    if result["without_object"] > 0.5:
        print("most images have no object: with this backbone almost all patches look alike, or none do; "
              "try center=true, another tau, or features=tokens")  # fmt: skip
    if result["unusable_count"]:
        print(f"{result['unusable_count']:,} images could not be used, listed in {folder / 'report.json'}: "
              f"{result['unusable'][0]}")  # fmt: skip
    cars = result["sidecars"]
    pattern = cars[0] if len(cars) == 1 else f"{folder}/*.tar"
    print(f"look at {folder / 'overlays.png'}; train with data.objects='{pattern}'")
