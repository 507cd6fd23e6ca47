"""ImageNet-1k (ILSVRC 2012) to shards, straight from the official tars; nothing is unpacked to disk.

    python data/imagenet.py ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar LOC_val_solution.csv /d/imagenet --size 256

The third file says which class each validation image has, one line per image: a file name, then a WordNet id
("ILSVRC2012_val_00000001 n01751748", separated by spaces or a comma; what follows is ignored). Kaggle's copy of the
challenge has it as LOC_val_solution.csv. Classes are the sorted WordNet ids, the usual 0..999.
`--size 256` shrinks the shorter side (about 20 GB); without it the bytes stay as they are (about 145 GB).
For train/ and val/ class folders: `selfsight prepare folder source=/d/imagenet/train out=…`, once for each.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np

from selfsight.data.prepare import write_splits
from selfsight.data.source import DataError, Raw
from selfsight.data.tar import Reader, scan, stamp


class Members:
    """Images inside a tar by number: names, places int64 [n, 2] (offset, bytes), labels int64 [n]."""

    def __init__(self, path: str, names: list[str], places: np.ndarray, labels: np.ndarray, classes: list[str]):
        self.path, self.names, self.places, self.labels, self.classes = path, names, places, labels, classes
        self.reader = Reader([path], [stamp(path)])

    def __len__(self) -> int:
        return len(self.names)

    def key(self, id: int) -> str:
        return self.names[id]

    def where(self, id: int) -> str:
        return f"{self.path}, {self.names[id]}"

    def read(self, id: int) -> Raw:
        offset, size = map(int, self.places[id])
        return Raw(self.key(id), self.reader.read(0, offset, size), int(self.labels[id]), self.where(id))


def train_source(path: str) -> Members:
    """The training tar, which holds one tar per class."""
    inner = sorted(member for member in scan(path) if re.fullmatch(r"n\d{8}\.tar", member.name))
    if not inner:
        raise DataError(f"{path} holds no tars named by WordNet id: expected ILSVRC2012_img_train.tar")
    classes = [member.name.removesuffix(".tar") for member in inner]
    names, places, labels = [], [], []
    for label, outer in enumerate(inner):
        for image in scan(path, outer.offset, outer.size):
            names.append(image.name)
            places.append((image.offset, image.size))
            labels.append(label)
    return Members(path, names, np.array(places, np.int64), np.array(labels, np.int64), classes)


def val_source(path: str, labels: str, classes: list[str]) -> Members:
    """The validation tar and its label file."""
    pairs = [re.split(r"[\s,]+", line.strip()) for line in Path(labels).read_text().splitlines()]
    wnid = {Path(pair[0]).stem: pair[1] for pair in pairs if len(pair) > 1 and re.fullmatch(r"n\d{8}", pair[1])}
    number = {name: i for i, name in enumerate(classes)}
    members = [member for member in scan(path) if member.name.endswith((".JPEG", ".jpg"))]
    for member in members:
        if wnid.get(Path(member.name).stem) not in number:
            raise DataError(f"{labels} names no class of {Path(path).name} for {member.name}")
    found = np.array([number[wnid[Path(member.name).stem]] for member in members], np.int64)
    places = np.array([(member.offset, member.size) for member in members], np.int64)
    return Members(path, [member.name for member in members], places, found, classes)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="ImageNet-1k (official tars) to shards")
    for name in ("train_tar", "val_tar", "val_labels", "out"):
        parser.add_argument(name)
    parser.add_argument("--size", type=int)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--workers", type=int)
    args = parser.parse_args(argv)
    train = train_source(args.train_tar)
    sources = {"train": train, "val": val_source(args.val_tar, args.val_labels, train.classes)}
    return write_splits(args.out, sources, size=args.size, quality=args.quality, workers=args.workers)


if __name__ == "__main__":
    main()
