"""A tiny ViT and noise images for tests of feature banks."""

import io
import time
from collections.abc import Collection

import numpy as np
import timm
import torch
from PIL import Image

from selfsight.data.source import Raw


def backbone(seed: int = 0) -> torch.nn.Module:
    """A timm ViT of 2 blocks, 16 tokens of width 128."""
    torch.manual_seed(seed)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 128, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **options).eval()


class Noise:
    """PNGs of noise with labels 0, 1, 2; those in `bad` are no images, and each takes `seconds` to read."""

    classes, describe, labelled, has_objects, fingerprint = None, "noise", True, False, "noise"
    shift = turned = 0

    def __init__(self, n: int, bad: Collection[int] = (), seconds: float = 0.0):
        self.n, self.lengths, self.bad, self.seconds = n, [n], bad, seconds

    def __len__(self):
        return self.n

    def label(self, id: int) -> int:
        return (id + self.turned) % 3

    def read(self, id: int) -> Raw:
        time.sleep(self.seconds)
        out = io.BytesIO()
        pixels = np.random.default_rng(id + 1000 * self.shift).integers(0, 255, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(out, "PNG")
        return Raw(f"{id:03d}", b"no image" if id in self.bad else out.getvalue(), self.label(id), f"noise {id}")
