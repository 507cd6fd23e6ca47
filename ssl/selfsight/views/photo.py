"""Everything about a view that does not decide which pixels are read: batched, on the device where the model is.

`prepare` draws each image's parameters from its own key (`data.rng`), so the same image looks the same in any batch.
The operations follow torchvision's for float images (values in 0..1), but take one parameter per image; no operation
asks the device for a value, and CPU and GPU run the same code. Images are float [N, 3, H, W], parameters [N].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.rng import uniform
from .spec import Batch, Crop, Photo, Views

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)


@torch.no_grad()
def prepare(batch: Batch, views: Views, mean: Tensor, std: Tensor) -> Batch:
    """Add batch["images"]: uint8 crops to float32 [n, B, c, s, s], flipped, photometry applied, normalised; and
    batch["mean"], batch["std"], for objectives that cut further views out of the images and alter their colours.

    mean, std: [c], in units where white is 1. Order as in DINO: flip, jitter, grayscale, blur, solarize, normalise.
    Flipped crops have their boxes turned (x0 > x1) and their `cells` mirrored. The given batch is not changed.
    """
    images, boxes, cells = {}, dict(batch.get("boxes", {})), dict(batch.get("cells", {}))
    for crop in views.crops:
        x = batch["crops"][crop.name]
        flips = draw_flips(batch["key"], crop)
        if flips is not None:
            x = flip(x, flips)
            if crop.name in boxes:
                turned = boxes[crop.name][..., [0, 3, 2, 1]]
                boxes[crop.name] = torch.where(flips[..., None], turned, boxes[crop.name])
            if crop.name in cells:
                cells[crop.name] = flip(cells[crop.name], flips)
        x = photometric(x.float().div_(255), batch["key"], crop)
        images[crop.name] = x.sub_(mean[:, None, None]).div_(std[:, None, None])  # x is ours: no further copies
    added: Batch = {"images": images, "mean": mean, "std": std}
    if boxes:
        added["boxes"] = boxes
    if cells:
        added["cells"] = cells
    return {**batch, **added}


def denormalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Undo the normalisation for pictures: float [..., c, H, W] -> float in 0..1."""
    return (images * std[:, None, None] + mean[:, None, None]).clamp(0, 1)


def draw_flips(key: Tensor, crop: Crop) -> Tensor | None:
    """Which crops are mirrored: bool [count, B] from the keys int64 [B]; None where the crop never is."""
    return _draw(key, f"flip/{crop.name}", crop.count) < crop.flip_p if crop.flip_p > 0 else None


def photometric(images: Tensor, key: Tensor, crop: Crop) -> Tensor:
    """The photometric operations of one kind of crop: float [count, B, 3, s, s] in 0..1, keys int64 [B] -> the same.

    Crop v of the kind takes column v of every draw, and `crop.photo[v]` (or the only entry).
    """
    photos = crop.photo * crop.count if len(crop.photo) == 1 else crop.photo
    if len(photos) != crop.count:
        raise ValueError(
            f"views.{crop.name}: {len(photos)} photo settings for {crop.count} crops; give one, or one each"
        )
    if all(photo is None for photo in photos):
        return images
    done, start = [], 0
    while start < crop.count:  # neighbours with equal settings go through together
        stop = start + 1
        while stop < crop.count and photos[stop] == photos[start]:
            stop += 1
        done.append(_apply(images[start:stop], key, crop, photos[start], slice(start, stop)))
        start = stop
    return torch.cat(done) if len(done) > 1 else done[0]


def _apply(images: Tensor, key: Tensor, crop: Crop, photo: Photo | None, columns: slice) -> Tensor:
    """One setting, applied to [k, B, 3, s, s]. What no image would get is skipped without drawing."""
    if photo is None:
        return images
    if images.shape[-3] != 3 and (photo.jitter_p > 0 or photo.gray_p > 0):
        raise ValueError(
            f"views.{crop.name}: jitter and grayscale need 3 channels, the images have {images.shape[-3]}; "
            "set jitter_p=0 and gray_p=0"
        )

    def draw(purpose: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        u = _draw(key, f"{purpose}/{crop.name}", crop.count)[columns]
        return (low + (high - low) * u).flatten()

    x = images.flatten(0, 1)
    if photo.jitter_p > 0 and any(photo.jitter):
        x = _draw_jitter(x, key, crop, photo, columns, draw)
    if photo.gray_p > 0:
        x = torch.where(_each(draw("gray") < photo.gray_p), to_gray(x), x)
    if photo.blur_p > 0:
        sigma = draw("sigma", *photo.sigma)
        x = blur(x, torch.where(draw("blur") < photo.blur_p, sigma, 0.0), kernel_size(x.shape[-1]))
    if photo.solarize_p > 0:
        x = torch.where(_each(draw("solarize") < photo.solarize_p), solarize(x), x)
    return x.unflatten(0, images.shape[:2])


def _draw_jitter(x: Tensor, key: Tensor, crop: Crop, photo: Photo, columns: slice, draw) -> Tensor:
    brightness, contrast, saturation = (
        draw(name, max(0.0, 1 - strength), 1 + strength)
        for name, strength in zip(("brightness", "contrast", "saturation"), photo.jitter)
    )
    hue = draw("hue", -photo.jitter[_HUE], photo.jitter[_HUE]) if photo.jitter[_HUE] > 0 else None
    scores = uniform(key, f"order/{crop.name}", 4 * crop.count).unflatten(1, (crop.count, 4))
    order = scores.transpose(0, 1)[columns].flatten(0, 1).argsort(dim=-1)
    jittered = color_jitter(x, order, brightness, contrast, saturation, hue)
    return torch.where(_each(draw("jitter") < photo.jitter_p), jittered, x)


def _draw(key: Tensor, purpose: str, count: int) -> Tensor:
    """Uniform float32 [count, B]."""
    return uniform(key, purpose, count).transpose(0, 1)


def _each(values: Tensor) -> Tensor:
    """[N] -> [N, 1, 1, 1]."""
    return values[:, None, None, None]


def flip(images: Tensor, flags: Tensor) -> Tensor:
    """Mirror left-right where flags is true: [*, c, h, w] with bool [*], or [*, h, w] (any dtype)."""
    flags = flags.reshape(*flags.shape, *[1] * (images.ndim - flags.ndim))
    return torch.where(flags, images.flip(-1), images)


def to_gray(images: Tensor) -> Tensor:
    """Luma, repeated over (a view of) three channels."""
    return _luma(images).expand_as(images)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """factor >= 0: 0 is black, 1 the image itself."""
    return (images * _each(factor)).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """factor >= 0: 0 is the image's mean grey, 1 the image itself."""
    return _blend(images, _mean(_luma(images)), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """factor >= 0: 0 is gray, 1 the image itself."""
    return _blend(images, _luma(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by shift (-0.5..0.5 of the colour circle), through HSV as torchvision does.

    Back from HSV by the formula with one clamp per channel: value - chroma * clamp(min(k, 4 - k), 0, 1), with
    k = (n + 6 hue) mod 6 and n = 5, 3, 1 for red, green, blue; no table of six cases.
    """
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    red, green, blue = images.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = torch.where(value == red, (green - blue) / safe, hue) + 6 * shift[:, None, None]
    offsets = 5.0 - 2.0 * torch.arange(3, device=images.device)  # made on the device: a copy would wait for it
    k = (hue[:, None] + offsets[:, None, None]).remainder(6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def color_jitter(
    images: Tensor, order: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor | None
) -> Tensor:
    """Brightness, contrast, saturation (0, 1, 2) and hue (3) in each image's own order: int64 [N, 4], a permutation.

    Sorting images by their order would need their number on the host. Instead, the first three are one formula, a
    blend with black, mean gray or gray, and images whose turn it is not blend with weight 1 (exactly the image). Hue,
    the costly one, is computed once: three blends before it and three behind it hold every order. None: no hue.
    """
    factors = torch.stack([brightness, contrast, saturation, torch.ones_like(brightness)], dim=1)
    turn = (order == _HUE).long().argmax(dim=1)
    x = images
    for position in range(4 if hue is None else 3):
        x = _turn(x, order[:, position], factors, turn > position if hue is not None else turn >= 0)
    if hue is not None:
        x = adjust_hue(x, hue)
        for position in range(1, 4):
            x = _turn(x, order[:, position], factors, turn < position)
    return x


def _turn(images: Tensor, operation: Tensor, factors: Tensor, active: Tensor) -> Tensor:
    factor = torch.where(active, factors.gather(1, operation[:, None])[:, 0], 1.0)
    luma = _luma(images)
    other = luma * _each(operation == _SATURATION) + _mean(luma) * _each(operation == _CONTRAST)
    return _blend(images, other, factor)


def _luma(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N, 1, H, W]."""
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]


def _mean(luma: Tensor) -> Tensor:
    return luma.flatten(1).mean(dim=1)[:, None, None, None]


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other.expand_as(images), images, _each(factor)).clamp_(0, 1)


def kernel_size(size: int) -> int:
    """Odd width of the blur kernel for images of this side, pixels.

    A tenth of the side (SimCLR, BYOL: 23 at 224), at least DINOv2's 9, and at most what the reflected border allows.
    DINO's Pillow blur has no fixed kernel; at its largest sigma, 2, a width of 9 leaves out 2 % of the weight.
    """
    return max(1, min(max(9, size // 10 | 1), 2 * size - 1))


def blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Gaussian blur with one sigma (pixels) per image, odd kernel width, reflected border; sigma 0 changes nothing.

    Shifted sums instead of a grouped convolution: as fast on CPU, never TF32, and bitwise independent of the batch.
    """
    half = kernel // 2
    offsets = torch.arange(half + 1, device=images.device)
    weights = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)  # below 1e-3: exactly a one and zeros
    weights = weights / (2 * weights.sum(dim=1, keepdim=True) - weights[:, :1])
    for axis, border in ((-1, (half, half, 0, 0)), (-2, (0, 0, half, half))):
        padded, length = F.pad(images, border, mode="reflect"), images.shape[axis]
        images = padded.narrow(axis, half, length) * _each(weights[:, 0])
        for i in range(1, half + 1):
            pair = padded.narrow(axis, half - i, length) + padded.narrow(axis, half + i, length)
            images.addcmul_(pair, _each(weights[:, i]))
    return images


def solarize(images: Tensor, threshold: float = 0.5) -> Tensor:
    """Invert values at or above the threshold."""
    return torch.where(images >= threshold, 1 - images, images)
