"""Training images of fine-tuning: which sample, crop, flip and RandAugment by (seed, position), erasing and mixing by
(seed, step). timm's operations draw from the global generators of Python, numpy and torch; each is set from the hash of
its place before it draws, so that neither workers, nor micro-batches, nor a restart change what is drawn.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset

from ..data.loader import Samples
from ..data.order import Order
from ..data.rng import step_key, uniform
from ..data.source import Raw, Source
from ..views.spec import Crop, Views
from . import ProbeError
from .bank import normalise

SWITCH = 0.5  # of the mixed batches that are cut where both are on (timm, MAE)


class Subset:
    """Some samples of a source as a source of their own, numbered from zero."""

    def __init__(self, source: Source, ids: np.ndarray):
        self.source, self.ids, self.lengths = source, np.asarray(ids), [len(ids)]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, id: int) -> Raw:
        """The undecoded sample."""
        return self.source.read(int(self.ids[id]))


class Repeated(NamedTuple):
    """An order in which every sample stands `times` times in a row, with a key each time (Hoffer et al., 2020)."""

    order: Order
    times: int

    def __call__(self, position: np.ndarray) -> np.ndarray:
        """Sample ids int64 [B] at positions int64 [B]."""
        return self.order(position // self.times)

    def substitute(self, position: int, attempt: int) -> int:
        """The id to read instead of a bad sample."""
        return self.order.substitute(position // self.times, attempt)


@contextlib.contextmanager
def seeded(key: int) -> Iterator[None]:
    """Python's, numpy's and torch's (CPU) generators set from a key inside, and as they were afterwards."""
    states = random.getstate(), np.random.get_state()
    bits = key & (1 << 64) - 1
    with torch.random.fork_rng(devices=[]):
        random.seed(bits)
        np.random.seed([bits >> 32, bits & 0xFFFFFFFF])
        torch.default_generator.manual_seed(bits)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class Augmented(Dataset):
    """A map-style data set over ranges of positions: crops, flips and RandAugment of one batch, uint8.

    settings: of the probe (scale, flip, augment, repeats). size: pixels. mean: what RandAugment fills with.
    """

    def __init__(self, source: Source, ids: np.ndarray, settings: Any, seed: int, size: int, mean: Sequence[float]):
        order = Repeated(Order(seed, [len(ids)]), settings.repeats)
        views = Views((Crop("image", 1, size, tuple(settings.scale)),))
        self.samples = Samples(Subset(source, ids), order, views, seed, len(mean))
        self.flip, self.policy = settings.flip, make_policy(settings.augment, size, mean)

    def __getitem__(self, positions: range) -> dict[str, Any]:
        """pixels uint8 [B, c, s, s], label int64 [B], bad: [(id, sentence)]; a pure function of (seed, positions)."""
        batch = self.samples[positions]
        pixels, key = batch["crops"]["image"][0], batch["key"].numpy()
        flipped = torch.from_numpy(uniform(key, "finetune/flip", 1)[:, 0] < self.flip)
        pixels[flipped] = pixels[flipped].flip(-1)
        if self.policy is not None:
            for image, one in zip(pixels, key.tolist()):
                with seeded(one):
                    image.copy_(self.policy(image))
        ids = self.samples.source.ids
        bad = [(int(ids[event.id]), f"{event.where}: {event.why}") for event in batch["events"]]
        return {
            "pixels": pixels,
            "label": batch["label"],
            "bad": bad,
        }


class _OnPixels(NamedTuple):
    """A policy for Pillow images on uint8 [3, h, w]."""

    policy: Any

    def __call__(self, image: Tensor) -> Tensor:
        done = self.policy(Image.fromarray(image.permute(1, 2, 0).numpy()))
        return torch.from_numpy(np.array(done)).permute(2, 0, 1)


def make_policy(word: str | None, size: int, mean: Sequence[float]) -> Any:
    """uint8 [3, h, w] -> the same: timm's RandAugment with its usual options, TrivialAugment ("trivial"), or None."""
    if word is None:
        return None
    if len(mean) != 3:
        raise ProbeError(f"probe.augment={word} needs three channels, and these images have {len(mean)}; use "
                         "probe.augment=null")  # fmt: skip
    if word == "trivial":
        from torchvision.transforms import InterpolationMode, TrivialAugmentWide

        return _OnPixels(TrivialAugmentWide(interpolation=InterpolationMode.BICUBIC))  # tensors have no bicubic there
    options = {"translate_const": int(size * 0.45), "img_mean": tuple(min(255, round(255 * m)) for m in mean),
               "interpolation": Image.Resampling.BICUBIC}  # fmt: skip
    return _OnPixels(rand_augment_transform(word, options))


class Mixer:
    """From uint8 pixels to what the model sees: normalised, erased, mixed, with soft targets; by (seed, step)."""

    def __init__(self, settings: Any, classes: int, mean: Sequence[float], std: Sequence[float], device: torch.device):
        self.classes, self.mean, self.std, self.device, self.smoothing = classes, mean, std, device, settings.smoothing
        self.erase = RandomErasing(settings.erase, mode="pixel", device=device) if settings.erase else None
        self.mix = None
        if mixes(settings):
            self.mix = Mixup(settings.mixup, settings.cutmix, switch_prob=SWITCH, label_smoothing=settings.smoothing,
                             num_classes=classes)  # fmt: skip

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, c, s, s] and int64 [B] -> float32 [B, c, s, s] and targets [B, classes]. Call inside `seeded`."""
        x, labels = normalise(pixels, self.mean, self.std, self.device), labels.to(self.device)
        if self.erase is not None:
            x = self.erase(x)
        if self.mix is not None:
            return self.mix(x, labels)
        return x, mixup_target(labels, self.classes, 1.0, self.smoothing)


def mixes(settings: Any) -> bool:
    """Whether images are mixed in pairs, which takes batches of even length."""
    return settings.mixup > 0 or settings.cutmix > 0


def seed_of_step(seed: int, step: int) -> int:
    """The key of everything that a batch draws as a whole."""
    return step_key(seed, step)
