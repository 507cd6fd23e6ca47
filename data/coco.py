"""COCO 2017 to shards, with the instance masks as `objects.png` (0 = background, 1 … = objects).

    python data/coco.py /d/coco-shards --train train2017 annotations/instances_train2017.json \\
                                       --val   val2017   annotations/instances_val2017.json

Polygons are drawn with Pillow, run-length codes (also the compressed ones) are expanded with numpy. Large objects are
painted first, so that small ones in front of them stay; crowds are left out. The 254 largest objects
fit: 255 means ignore.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from selfsight.data.prepare import write_splits
from selfsight.data.source import Raw, SampleError


def run_lengths(text: str) -> list[int]:
    """COCO's compressed run lengths: 5-bit digits, low first; from the fourth number on, differences to two before."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:  # more digits follow
            continue
        if digit & 16:  # negative
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def mask_of(segmentation: dict | list, height: int, width: int) -> np.ndarray:
    """bool [height, width] of one annotation: polygons, or run lengths over columns that start with a run of zeros."""
    if isinstance(segmentation, list):
        image = Image.new("1", (width, height))
        for polygon in segmentation:
            if len(polygon) >= 6:
                ImageDraw.Draw(image).polygon(list(zip(polygon[::2], polygon[1::2])), fill=1)
        return np.asarray(image)
    counts = segmentation["counts"]
    counts = run_lengths(counts) if isinstance(counts, str) else counts
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


MOST = 254  # ids of one byte without 0, no object, and 255, ignore


class Coco:
    """One split: a folder of images and its instances json."""

    classes = None  # pictures have no class of their own

    def __init__(self, folder: str, annotations: str):
        content = json.loads(Path(annotations).read_text())
        self.folder, self.images = Path(folder), content["images"]
        self.objects: dict[int, list[dict]] = defaultdict(list)
        for note in content["annotations"]:
            if not note.get("iscrowd"):
                self.objects[note["image_id"]].append({"segmentation": note["segmentation"], "area": note["area"]})

    def __len__(self) -> int:
        return len(self.images)

    def key(self, id: int) -> str:
        return self.images[id]["file_name"]

    def where(self, id: int) -> str:
        return str(self.folder / self.key(id))

    def read(self, id: int) -> Raw:
        entry = self.images[id]
        height, width = entry["height"], entry["width"]
        ids = np.zeros((height, width), np.uint8)
        notes = sorted(self.objects.get(entry["id"], []), key=lambda note: -note["area"])[:MOST]
        try:
            for number, note in enumerate(notes, 1):
                ids[mask_of(note["segmentation"], height, width)] = number
            data = Path(self.where(id)).read_bytes()
        except FileNotFoundError:
            raise SampleError(self.where(id), "the file does not exist") from None
        except (ValueError, IndexError) as error:
            raise SampleError(self.where(id), f"an instance mask cannot be drawn ({error})") from None
        buffer = io.BytesIO()
        Image.fromarray(ids).save(buffer, "PNG")
        return Raw(self.key(id), data, -1, self.where(id), objects=buffer.getvalue())


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="COCO with instance masks to shards")
    parser.add_argument("out")
    parser.add_argument("--train", nargs=2, metavar=("FOLDER", "JSON"), required=True)
    parser.add_argument("--val", nargs=2, metavar=("FOLDER", "JSON"))
    parser.add_argument("--size", type=int)
    parser.add_argument("--workers", type=int)
    args = parser.parse_args(argv)
    sources = {split: Coco(*given) for split, given in (("train", args.train), ("val", args.val)) if given}
    return write_splits(args.out, sources, size=args.size, workers=args.workers)


if __name__ == "__main__":
    main()
