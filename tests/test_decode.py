"""Pixels in, the right pixels out: every format and mode against Pillow, and one clear sentence for every bad file."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from selfsight.data import decode as module
from selfsight.data.decode import center_box, crop_reduction, cut, cut_mask, decode, size_of, snap
from selfsight.data.source import SampleError

BICUBIC = Image.Resampling.BICUBIC


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A photograph-like image: 1/f noise in colour, with an edge."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = np.stack(
        [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency, (height, width))] * 3, -1
    )
    noise += rng.normal(size=3) * noise.std() / 2
    noise[height // 3 : height // 2, width // 4 :] += noise.std()
    scaled = (noise - noise.min()) / (noise.max() - noise.min()) * 255
    return Image.fromarray(scaled.astype(np.uint8))


def encode(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **({"quality": 92} if format == "JPEG" else {}) | options)
    return file.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean()
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def pillow_crop(image: Image.Image, box, size: int, resample=BICUBIC) -> np.ndarray:
    y0, x0, y1, x1 = (int(v) for v in box)
    return np.asarray(image.crop((x0, y0, x1, y1)).resize((size, size), resample))


def same(data: bytes, tolerance: int = 1) -> None:
    """`decode` agrees with Pillow's RGB conversion."""
    pixels, denominator = decode(data, "here")
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
    assert denominator == 1 and pixels.dtype == np.uint8 and pixels.flags.writeable
    assert pixels.shape == expected.shape == (*size_of(data, "here"), 3)
    assert np.abs(pixels - expected).max() <= tolerance


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2}])
def test_jpeg_agrees_with_pillow(options):
    same(encode(picture(75, 101), **options))


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_other_formats_agree_with_pillow(format):
    same(encode(picture(33, 47), format))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LAB"])
def test_modes_agree_with_pillow(mode):
    same(encode(picture(33, 47).convert(mode), "TIFF" if mode not in ("L", "1", "P") else "PNG"))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpeg_become_rgb(mode):
    same(encode(picture(40, 31).convert(mode)))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(picture(24, 40), format, exif=exif, **options)
    same(data)
    assert size_of(data, "here") == ((24, 40) if orientation < 5 else (40, 24))


@pytest.mark.parametrize("denominator", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_snapped_crops_of_a_reduced_jpeg_match_full_size_crops(denominator, orientation):
    image = picture(480, 640)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, exif=exif)
    height, width = size_of(data, "here")
    size = 32
    side = size * denominator + 0.7 * denominator
    box = np.array([[101.3, 50.6, 101.3 + side, 50.6 + side]])
    pixels, got = decode(data, "here", at_least=crop_reduction(box, [size], height, width))
    snapped = snap(box, got, height, width)[0]
    full = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    mine = cut(pixels, snapped / got, size).permute(1, 2, 0).numpy()
    assert got == denominator and pixels.shape == (-(-height // got), -(-width // got), 3)
    assert psnr(mine, pillow_crop(full, snapped, size)) > (55 if denominator == 1 else 38)


def test_without_snapping_a_reduced_crop_is_visibly_shifted():
    """The check above can fail: the same crop, half a reduced pixel off, is worse by several decibels."""
    image = picture(480, 640)
    pixels, d = decode(encode(image), "here", at_least=(60, 80))
    right = cut(pixels, (10, 10, 42, 42), 32).permute(1, 2, 0).numpy()
    full = Image.open(io.BytesIO(encode(image)))
    assert d == 8
    assert (
        psnr(right, pillow_crop(full, (80, 80, 336, 336), 32))
        > psnr(right, pillow_crop(full, (84, 84, 340, 340), 32)) + 6
    )


def test_a_turned_image_is_only_reduced_where_reduced_pixels_stay_aligned():
    exif = Image.Exif()
    exif[0x0112] = 3
    assert decode(encode(picture(100, 102), exif=exif), "here", at_least=(10, 10))[1] == 2
    assert decode(encode(picture(100, 102)), "here", at_least=(10, 10))[1] == 8


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "box, size", [((0, 0, 90, 120), 32), ((10, 20, 70, 50), 48), ((5, 5, 20, 20), 64), ((1, 2, 2, 3), 4)]
)
def test_cut_equals_pillow(box, size, resample):
    image = picture(90, 120)
    mine = cut(np.array(image), box, size, resample)
    expected = pillow_crop(image, box, size, Image.Resampling[resample.upper()])
    assert mine.dtype == torch.uint8 and mine.shape == (3, size, size)
    difference = np.abs(mine.permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= 2 and psnr(mine.permute(1, 2, 0).numpy(), expected) > 53


def test_cut_mask_keeps_ids():
    mask = np.zeros((10, 12), dtype=np.uint8)
    mask[5:, 6:] = 7
    assert cut_mask(mask, (0, 0, 10, 12), 4).tolist() == [[0, 0, 0, 0]] * 2 + [[0, 0, 7, 7]] * 2
    assert cut_mask(mask, (5, 6, 10, 12), 3).unique().tolist() == [7]


def test_snap_stays_inside_and_keeps_sizes():
    rng = np.random.default_rng(0)
    for d in (1, 2, 4, 8):
        start = rng.uniform(0, 80, (200, 2))
        boxes = np.concatenate([start, np.minimum(start + rng.uniform(d, 90, (200, 2)), (101, 93))], 1)
        snapped = snap(boxes, d, 101, 93)
        assert snapped.dtype == np.float32 and (snapped % d == 0).all()
        assert snapped.min() >= 0 and (snapped[:, 2:] <= (101, 93)).all() and (snapped[:, 2:] > snapped[:, :2]).all()
        extent = boxes[:, 2:] - boxes[:, :2]
        assert (np.abs(snapped[:, 2:] - snapped[:, :2] - extent) <= d / 2 + (np.array([101, 93]) % d)).all()


def test_crop_reduction_never_enlarges_a_crop():
    rng = np.random.default_rng(1)
    for _ in range(200):
        height, width = rng.integers(200, 2000, 2)
        size = int(rng.integers(16, 100))
        start = rng.uniform(0, 90, (3, 2))
        boxes = np.concatenate([start, start + rng.uniform(size, 110, (3, 2))], 1)
        rows, columns = crop_reduction(boxes, [size] * 3, int(height), int(width))
        for d in (2, 4, 8):
            if height >= d * rows and width >= d * columns:
                snapped = snap(boxes, d, int(height), int(width)) / d
                assert (snapped[:, 2:] - snapped[:, :2] >= size).all()


def test_center_box_is_a_centred_square():
    assert center_box(100, 200, 0.5).tolist() == [25, 75, 75, 125]
    assert center_box(3, 5).tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(channels):
    values = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    pixels, _ = decode(encode(Image.fromarray(values), "PNG"), "here", channels=channels)
    assert pixels.shape == (32, 64, channels)
    assert np.abs(pixels[..., 0] - values / 257).max() <= 0.51


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.array([[0.0, 0.5], [0.25, 1.0]], dtype=np.float32), [[0, 128], [64, 255]]),
        (np.array([[-100.0, 100.0], [0.0, 300.0]], dtype=np.float32), [[0, 127.5], [64, 255]]),
        (np.array([[0, 65535], [257 * 7, 257]], dtype=np.int32), [[0, 255], [7, 1]]),
        (np.array([[0, 1 << 20], [1 << 19, 1 << 18]], dtype=np.int32), [[0, 255], [128, 64]]),
        (np.full((2, 2), 3.5, dtype=np.float32), [[0, 0], [0, 0]]),
    ],
)
def test_float_and_integer_tiff_are_scaled(values, expected):
    pixels, _ = decode(encode(Image.fromarray(values), "TIFF"), "here")
    assert np.abs(pixels[..., 1] - np.array(expected)).max() <= 0.5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_lie_on_white(mode):
    image = Image.new("RGBA", (4, 4), (200, 200, 200, 255))
    image.paste((10, 10, 10, 0), (0, 0, 2, 4))
    if mode == "P":
        palette = Image.new("P", (4, 4), 1)
        palette.putpalette([10, 10, 10, 200, 200, 200])
        palette.paste(0, (0, 0, 2, 4))
        data = encode(palette, "PNG", transparency=0)
    else:
        data = encode(image.convert(mode), "PNG")
    pixels, _ = decode(data, "here")
    assert (pixels[:, :2] == 255).all() and (pixels[:, 2:] == 200).all()


def test_one_channel_is_luma():
    data = encode(picture(20, 30))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(int)
    pixels, _ = decode(data, "here", channels=1)
    assert pixels.shape == (20, 30, 1) and np.abs(pixels[..., 0] - expected).max() <= 1
    assert cut(pixels, (0, 0, 20, 30), 8).shape == (1, 8, 8)


def test_four_channels_are_the_stored_bands():
    bands = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    assert (decode(encode(Image.fromarray(bands), "PNG"), "here", channels=4)[0] == bands).all()
    with pytest.raises(SampleError, match="four bands"):
        decode(encode(picture(6, 5)), "here", channels=4)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_files_are_refused(format, share):
    data = encode(picture(80, 80), format)
    with pytest.raises(SampleError, match=r"^shard-3\.tar key 7: "):
        decode(data[: int(len(data) * share)], "shard-3.tar key 7")


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"no image", bytes(2000), b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
@pytest.mark.parametrize("function", [size_of, decode])
def test_garbage_is_refused(function, data):
    with pytest.raises(SampleError, match=r"^here: .+"):
        function(data, "here")


def test_random_damage_never_escapes_as_another_error():
    rng = np.random.default_rng(0)
    whole = [encode(picture(24, 24), format) for format in ("JPEG", "PNG", "TIFF", "GIF")]
    for index in range(200):
        data = bytearray(whole[index % 4])
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(0, 256)
        try:
            pixels, _ = decode(bytes(data), "here")
        except SampleError:
            continue
        assert pixels.ndim == 3 and pixels.dtype == np.uint8


def test_recoverable_jpeg_damage_still_gives_pixels():
    data = encode(picture(40, 40))
    cut_at = data.index(b"\xff\xdb")
    noisy = data[:cut_at] + b"\x00\x00" + data[cut_at:]  # stray bytes between two segments
    assert size_of(noisy, "here") == (40, 40)
    pixels, denominator = decode(noisy, "here", at_least=(4, 4))
    assert pixels.shape == (-(-40 // denominator), -(-40 // denominator), 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP"])
def test_images_over_the_pixel_limit_are_refused_from_the_header(monkeypatch, format):
    monkeypatch.setattr(module, "MAX_PIXELS", 99)
    with pytest.raises(SampleError, match="limit of 99"):
        size_of(encode(picture(10, 10), format), "here")


def test_a_bomb_header_is_refused_without_decoding():
    data = bytearray(encode(picture(8, 8)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(SampleError, match="65535 x 65535"):
        decode(bytes(data), "here")
    png = bytearray(encode(picture(8, 8), "PNG"))
    png[16:24] = (1 << 20).to_bytes(4) * 2
    with pytest.raises(SampleError, match=r"limit|format"):
        decode(bytes(png), "here")


def test_sample_errors_cross_process_borders():
    with pytest.raises(SampleError) as caught:
        decode(b"x", "here")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
