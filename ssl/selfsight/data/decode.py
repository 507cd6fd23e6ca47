"""Bytes to pixels: decode once, at the smallest size that still serves every crop, then cut crops from the result.

JPEG goes through simplejpeg (libjpeg-turbo), which can decode at 1/2, 1/4 or 1/8 of the size inside the inverse DCT;
everything else, and JPEG that simplejpeg refuses (CMYK, recoverable errors), goes through Pillow. Crops are cut with
torch's antialiased uint8 resize, which agrees with Pillow's to a level or two at twice its speed.

Boxes are y0, x0, y1, x1 in pixels, the end not included; images are uint8 [h, w, channels].
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from .source import SampleError

# Larger images are refused before any pixel is decoded. Formats other than JPEG also obey Pillow's own limit, which
# happens to be the same number.
MAX_PIXELS = 178_956_970
# No EPS or PDF: Pillow would start an external program for them.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
DENOMINATORS = (8, 4, 2)
_ORIENTATION = 0x0112  # EXIF tag
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG SOF markers
_NO_LENGTH = frozenset(range(0xD0, 0xD9)) | {0x01}  # JPEG markers without a body


class _Header(NamedTuple):
    """Size as stored (before the orientation is applied)."""

    height: int
    width: int
    components: int
    orientation: int
    jpeg: bool


def size_of(data: bytes, where: str) -> tuple[int, int]:
    """Height and width after EXIF orientation, from the header alone.

    Raises SampleError (with `where`) if this is no image, or one larger than `MAX_PIXELS`.
    """
    header = _header(data, where)
    swapped = header.orientation >= 5
    return (header.width, header.height) if swapped else (header.height, header.width)


def decode(
    data: bytes, where: str, *, at_least: tuple[int, int] | None = None, channels: int = 3
) -> tuple[np.ndarray, int]:
    """Decode an image: uint8 [h, w, channels], EXIF orientation applied, and the denominator of its reduction.

    `at_least`: height and width of the whole image (oriented) that are still enough; a JPEG is then decoded at 1/2,
    1/4 or 1/8 where that suffices, and `h = ceil(height / denominator)`. None: full size.
    `channels`: 3 (grey is repeated, palettes are looked up, transparent pixels lie on white), 1 (luma) or 4 (the four
    bands as stored, e.g. red, green, blue, infrared in an RGBA file). 16-bit and float images are scaled, not clipped.

    Raises SampleError if the bytes are truncated or cannot be decoded.
    """
    if channels not in (1, 3, 4):
        raise ValueError(f"data.channels={channels}: 1, 3 or 4 are supported")
    header = _header(data, where)
    if header.jpeg and header.components in (1, 3) and channels != 4:
        denominator = _denominator(header, at_least)
        pixels = _decode_jpeg(data, header, denominator, channels)
        if pixels is not None:
            return _orient(pixels, header.orientation), denominator
    return _orient(_decode_pillow(data, where, channels), header.orientation), 1


def crop_reduction(boxes: np.ndarray, sizes: Sequence[int], height: int, width: int) -> tuple[int, int]:
    """The smallest height and width of the whole image at which no crop has to be enlarged.

    boxes: [n, 4] in a height x width image; sizes: n output sizes in pixels. At most (height, width).
    """
    extent = np.maximum(boxes[:, 2:] - boxes[:, :2], 1.0)
    rows, columns = (np.asarray(sizes, dtype=np.float64)[:, None] / extent).max(axis=0)
    # The small number undoes rounding in a ratio that should be exactly 1/2, 1/4 or 1/8.
    need = math.ceil(rows * height - 1e-6), math.ceil(columns * width - 1e-6)
    return min(need[0], height), min(need[1], width)


def snap(boxes: np.ndarray, denominator: int, height: int, width: int) -> np.ndarray:
    """Move boxes [n, 4] onto whole pixels of the image reduced by `denominator`; float32 [n, 4] in full-size pixels.

    A crop at a fraction of a reduced pixel would show the content shifted. Boxes keep their rounded extent, hence at
    least their output size (`crop_reduction`), and stay inside the part of the image that whole reduced pixels cover.
    """
    boxes = np.asarray(boxes, dtype=np.float64) / denominator
    limit = np.array([max(height // denominator, 1), max(width // denominator, 1)])
    extent = np.minimum(np.maximum(np.rint(boxes[:, 2:] - boxes[:, :2]), 1), limit)
    start = np.minimum(np.maximum(np.rint(boxes[:, :2]), 0), limit - extent)
    return (np.concatenate([start, start + extent], axis=1) * denominator).astype(np.float32)


def cut(image: np.ndarray, box: Sequence[float], size: int, interpolation: str = "bicubic") -> Tensor:
    """Crop and resize with antialiasing: uint8 [h, w, c] and whole pixels of *this* image -> uint8 [c, size, size].

    The same filter as Pillow's `image.crop(box).resize(size)`. interpolation: "bicubic" or "bilinear".
    """
    y0, x0, y1, x1 = (int(v) for v in box)
    view = torch.from_numpy(image[y0:y1, x0:x1]).permute(2, 0, 1)[None]
    # Densely packed channels-last input takes the vectorised kernel; copying the crop is cheaper than missing it.
    view = view.contiguous(memory_format=torch.channels_last)
    return torch.nn.functional.interpolate(view, (size, size), mode=interpolation, antialias=True)[0]


def cut_mask(mask: np.ndarray, box: Sequence[float], size: int) -> Tensor:
    """Crop and resize ids without mixing them (nearest): [h, w] and pixels of this mask -> [size, size]."""
    y0, x0, y1, x1 = box
    steps = (np.arange(size) + 0.5) / size
    rows = np.clip((y0 + steps * (y1 - y0)).astype(np.int64), 0, mask.shape[0] - 1)
    columns = np.clip((x0 + steps * (x1 - x0)).astype(np.int64), 0, mask.shape[1] - 1)
    return torch.from_numpy(mask[rows[:, None], columns])


def center_box(height: int, width: int, crop_pct: float = 1.0) -> np.ndarray:
    """The centred square whose side is `crop_pct` of the shorter side, for evaluation: float32 [4], whole pixels."""
    side = max(1, round(min(height, width) * crop_pct))
    y0, x0 = (height - side) // 2, (width - side) // 2
    return np.array([y0, x0, y0 + side, x0 + side], dtype=np.float32)


def _header(data: bytes, where: str) -> _Header:
    if not data:
        raise SampleError(where, "the image is empty (0 bytes)")
    header = _jpeg_header(data, where) if data[:2] == b"\xff\xd8" else _pillow_header(data, where)
    if header.height < 1 or header.width < 1:
        raise SampleError(where, f"the header gives a size of {header.width} x {header.height}")
    if header.height * header.width > MAX_PIXELS:
        size = f"{header.width} x {header.height}"
        raise SampleError(where, f"the header says {size} pixels, more than the limit of {MAX_PIXELS:,}")
    if not 1 <= header.components <= 4:
        raise SampleError(where, f"the image has {header.components} components; 1 to 4 are supported")
    return header


def _jpeg_header(data: bytes, where: str) -> _Header:
    """Walk the marker segments up to the frame header; a few microseconds, against decoding just to learn a size."""
    at, orientation = 2, 1
    while at + 10 <= len(data):
        if data[at] != 0xFF:
            at = data.find(b"\xff", at)  # garbage between segments: libjpeg skips it too
            if at < 0:
                break
            continue
        marker = data[at + 1]
        if marker == 0xFF or marker in _NO_LENGTH:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in _FRAME_HEADERS:
            height, width = int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
            return _Header(height, width, data[at + 9], orientation, True)
        length = int.from_bytes(data[at + 2 : at + 4])
        if marker in (0xD9, 0xDA) or length < 2:  # image data before its frame header
            break
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[at + 10 : at + 2 + length])
        at += 2 + length
    raise SampleError(where, "the JPEG is truncated or damaged: no frame header")


def _exif_orientation(tiff: bytes) -> int:
    """Orientation 1..8 from an EXIF block; 1 if it has none or is damaged (a bad tag must not cost the image)."""
    order = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None:
        return 1
    start = int.from_bytes(tiff[4:8], order)
    for entry in range(int.from_bytes(tiff[start : start + 2], order)):
        at = start + 2 + 12 * entry
        if at + 12 > len(tiff):
            break
        if int.from_bytes(tiff[at : at + 2], order) == _ORIENTATION:
            value = int.from_bytes(tiff[at + 8 : at + 10], order)
            return value if 1 <= value <= 8 else 1
    return 1


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(data: bytes, where: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides
            return Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError:
        raise SampleError(where, f"the header says more pixels than the limit of {MAX_PIXELS:,}") from None
    except Exception as error:  # Pillow's plug-ins raise whatever the bytes lead them to
        kinds = "JPEG, PNG, WebP, BMP, TIFF, GIF, PPM, JPEG 2000, AVIF"
        raise SampleError(where, f"no image in a format that can be read ({kinds})") from error


def _pillow_header(data: bytes, where: str) -> _Header:
    with _open(data, where) as image:
        try:
            # Pillow turns TIFF itself while loading and reports the turned size.
            orientation = 1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1)
        except Exception:  # damaged EXIF must not cost the image
            orientation = 1
        valid = orientation if orientation in range(1, 9) else 1
        return _Header(image.height, image.width, len(image.getbands()), valid, False)


def _denominator(header: _Header, at_least: tuple[int, int] | None) -> int:
    """The strongest reduction that leaves `at_least` (oriented)."""
    if at_least is None:
        return 1
    rows, columns = at_least if header.orientation < 5 else at_least[::-1]
    for denominator in DENOMINATORS:
        # A partly filled last reduced pixel would come first in a flipped image, and shift everything after it.
        whole = header.orientation == 1 or (header.height % denominator == 0 and header.width % denominator == 0)
        if whole and header.height >= denominator * rows and header.width >= denominator * columns:
            return denominator
    return 1


def _decode_jpeg(data: bytes, header: _Header, denominator: int, channels: int) -> np.ndarray | None:
    """Pixels [h, w, channels], or None if simplejpeg refuses (also for errors that Pillow can recover from)."""
    shape = -(-header.height // denominator), -(-header.width // denominator), channels
    try:
        pixels = simplejpeg.decode_jpeg(
            data, colorspace="RGB" if channels == 3 else "GRAY", min_height=shape[0], min_width=shape[1]
        )
    except ValueError:
        return None
    return pixels if pixels.shape == shape else None


def _decode_pillow(data: bytes, where: str, channels: int) -> np.ndarray:
    with _open(data, where) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # remarks on odd metadata: the pixels decide
                image.load()
            pixels = _bands(image, where, channels)
        except SampleError:
            raise
        except Exception as error:
            raise SampleError(where, f"the {image.format} image is truncated or damaged ({error})") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _bands(image: Image.Image, where: str, channels: int) -> np.ndarray:
    """A loaded Pillow image of any mode to a writable uint8 [h, w, channels] ([h, w] for one)."""
    if channels == 4:
        if len(image.getbands()) != 4:
            raise SampleError(where, f"data.channels=4 needs four bands; this image has mode {image.mode}")
        return np.array(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white.convert("RGB")
    return np.array(image.convert("RGB" if channels == 3 else "L"))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of any range to uint8: 0..65535 as 16 bits, floats 0..1 as shares, anything else stretched."""
    finite = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = finite.min(), finite.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif values.dtype.kind != "f" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    return np.rint((finite - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


def _orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation (1..8) to [h, w, c]; contiguous, because torch takes no negative strides."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(pixels[::rows, ::columns])
