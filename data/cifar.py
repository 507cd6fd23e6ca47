"""CIFAR-10 and CIFAR-100 to shards (lossless PNG), from the *binary* archives.

    python data/cifar.py cifar-10-binary.tar.gz  /d/cifar10
    python data/cifar.py cifar-100-binary.tar.gz /d/cifar100

The archives are at https://www.cs.toronto.edu/~kriz/cifar.html ("binary version, suitable for C programs"). The
"python version" is pickled, and opening a pickle runs whatever it says; the binary files hold the same pixels.
A record is one label byte (CIFAR-100: coarse, then fine) and 3 x 32 x 32 bytes, channels first.
"""

from __future__ import annotations

import argparse
import io
import tarfile

import numpy as np
from PIL import Image

from selfsight.data.prepare import write_splits
from selfsight.data.source import DataError, Raw


class Cifar:
    """Records of one split: labels uint8 [n], pixels uint8 [n, 3, 32, 32]."""

    def __init__(self, records: bytes, skip: int, classes: list[str], split: str):
        rows = np.frombuffer(records, np.uint8).reshape(-1, skip + 1 + 3072)
        self.labels, self.pixels = rows[:, skip], rows[:, skip + 1 :].reshape(-1, 3, 32, 32)
        self.classes, self.split = classes, split

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, id: int) -> str:
        return f"{self.split}_{id:05d}"

    def where(self, id: int) -> str:
        return self.key(id)

    def read(self, id: int) -> Raw:
        buffer = io.BytesIO()
        Image.fromarray(self.pixels[id].transpose(1, 2, 0)).save(buffer, "PNG")
        return Raw(self.key(id), buffer.getvalue(), int(self.labels[id]), self.key(id))


def load(archive: str) -> dict[str, Cifar]:
    """Train and val (the official test set) of a binary archive."""
    files = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isreg():
                files[member.name.rsplit("/", 1)[-1]] = tar.extractfile(member).read()
    if "data_batch_1.bin" in files:
        train, test, names, skip = [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", "batches.meta.txt", 0
    elif "train.bin" in files:
        train, test, names, skip = ["train.bin"], "test.bin", "fine_label_names.txt", 1
    else:
        raise DataError(f"{archive} is not a binary CIFAR archive (cifar-10-binary.tar.gz or cifar-100-binary.tar.gz)")
    classes = files[names].decode().split()
    return {
        "train": Cifar(b"".join(files[name] for name in train), skip, classes, "train"),
        "val": Cifar(files[test], skip, classes, "test"),
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="CIFAR-10/100 (binary archives) to shards")
    parser.add_argument("archive")
    parser.add_argument("out")
    parser.add_argument("--workers", type=int)
    args = parser.parse_args(argv)
    return write_splits(args.out, load(args.archive), workers=args.workers)


if __name__ == "__main__":
    main()
