"""ADE20K (SceneParse150, ADEChallengeData2016.zip) to shards, with the semantic masks as `mask.png`.

    python data/ade20k.py ADEChallengeData2016 /d/ade20k

The release counts classes from 1 and has 0 for "other"; here they are 0..149, and 255 is ignored.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from selfsight.data.prepare import write_splits
from selfsight.data.source import DataError, Raw, SampleError


class Ade20k:
    """One split of the unpacked release."""

    classes_note: ClassVar[dict] = {"task": "segmentation", "ignore_index": 255}

    def __init__(self, root: str, split: str):
        self.images = sorted((Path(root) / "images" / split).glob("*.jpg"))
        if not self.images:
            raise DataError(f"{root}/images/{split} has no .jpg files: expected the unpacked ADEChallengeData2016")
        lines = (Path(root) / "objectInfo150.txt").read_text().splitlines()[1:]
        self.classes = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]

    def __len__(self) -> int:
        return len(self.images)

    def key(self, id: int) -> str:
        return self.images[id].stem

    def where(self, id: int) -> str:
        return str(self.images[id])

    def read(self, id: int) -> Raw:
        path = self.images[id]
        annotation = path.parents[2] / "annotations" / path.parent.name / f"{path.stem}.png"
        if not annotation.is_file():
            raise SampleError(str(path), f"no annotation {annotation}")
        with Image.open(annotation) as image:
            ids = np.asarray(image)
        buffer = io.BytesIO()
        Image.fromarray(ids - np.uint8(1)).save(buffer, "PNG")  # 0 wraps to 255
        return Raw(self.key(id), path.read_bytes(), -1, str(path), mask=buffer.getvalue())


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="ADE20K with semantic masks to shards")
    parser.add_argument("root")
    parser.add_argument("out")
    parser.add_argument("--size", type=int)
    parser.add_argument("--workers", type=int)
    args = parser.parse_args(argv)
    sources = {"train": Ade20k(args.root, "training"), "val": Ade20k(args.root, "validation")}
    return write_splits(args.out, sources, size=args.size, workers=args.workers)


if __name__ == "__main__":
    main()
