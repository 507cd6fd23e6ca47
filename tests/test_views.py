"""Crops lie where torchvision would put them; photometry matches torchvision image by image; batches do not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from selfsight.data.rng import key_of, uniform
from selfsight.views import photo as ops
from selfsight.views.photo import denormalise, prepare
from selfsight.views.place import independent
from selfsight.views.spec import Cells, Crop, Photo, Views

DINO = Photo(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5, solarize_p=0.3)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def random_images(n: int = 6, size: int = 20, seed: int = 0) -> torch.Tensor:
    """Noise, with gray, black, white and saturated areas in it."""
    images = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
    images[:, :, :4, :4] = images[:, :1, :4, :4]
    images[:, :, 4:6] = 0
    images[:, :, 6:8] = 1
    images[:, 1:, 8:10] = 0
    return images


def bound(position: int):
    key = key_of(0, np.array([position]))
    return lambda purpose, n: uniform(key, purpose, n)[0]


def make_batch(views: Views, n: int = 8) -> dict:
    generator = torch.Generator().manual_seed(1)
    crops = {}
    for crop in views.crops:
        shape = (crop.count, n, 3, crop.size, crop.size)
        crops[crop.name] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    boxes = {crop.name: torch.tensor([1.0, 2.0, 5.0, 9.0]).expand(crop.count, n, 4) for crop in views.crops}
    return {"key": torch.from_numpy(key_of(3, np.arange(n))), "crops": crops, "boxes": boxes}


# --- where crops lie -------------------------------------------------------------------------------------------------


def test_boxes_are_whole_pixels_inside_the_image():
    crops = (Crop("global", 2, 32, (0.3, 1.0)), Crop("local", 6, 16, (0.05, 0.3)))
    for position, (height, width) in enumerate([(30, 40), (200, 31), (5, 500), (1, 1), (64, 64)] * 10):
        boxes = independent(bound(position), crops, height, width)
        assert [(name, box.shape, box.dtype) for name, box in boxes.items()] == [
            ("global", (2, 4), np.float32),
            ("local", (6, 4), np.float32),
        ]
        every = np.concatenate(list(boxes.values()))
        assert (every == np.rint(every)).all() and every.min() >= 0
        assert (every[:, 2:] <= (height, width)).all() and (every[:, 2:] > every[:, :2]).all()


def test_boxes_follow_the_distribution_of_torchvision():
    crop = Crop("image", 4, 32, (0.2, 1.0))
    mine = np.concatenate([independent(bound(p), (crop,), 90, 160)["image"] for p in range(500)]).astype(np.float64)
    torch.manual_seed(0)
    image = torch.zeros(1, 90, 160)
    tries = [v2.RandomResizedCrop(32, crop.scale, crop.ratio).make_params([image]) for _ in range(2000)]
    theirs = np.array([[p["top"], p["left"], p["top"] + p["height"], p["left"] + p["width"]] for p in tries], float)

    def facts(b):
        rows, columns = b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]
        return np.stack([rows * columns / 90 / 160, np.log(columns / rows), b[:, 0] + rows / 2, b[:, 1] + columns / 2])

    a, b = facts(mine), facts(theirs)
    error = np.sqrt((a.var(1) + b.var(1)) / 2000)
    assert (np.abs(a.mean(1) - b.mean(1)) < 4 * error).all()
    assert np.allclose(a.std(1), b.std(1), rtol=0.1)
    for quantile in (0.1, 0.5, 0.9):
        assert np.allclose(np.quantile(a[0], quantile), np.quantile(b[0], quantile), atol=0.03)


@pytest.mark.parametrize("height, width, expected", [(300, 10, (143, 0, 156, 10)), (10, 300, (0, 143, 10, 156))])
def test_what_never_fits_gets_the_largest_centred_box(height, width, expected):
    boxes = independent(bound(0), (Crop("image", 2, 8, (0.9, 1.0)),), height, width)["image"]
    assert np.abs(boxes - np.array(expected)).max() <= 1


def test_boxes_are_a_function_of_the_key():
    crops = (Crop("global", 2, 32, (0.3, 1.0)),)
    first, again, other = (independent(bound(p), crops, 50, 60)["global"] for p in (1, 1, 2))
    assert (first == again).all() and (first != other).any() and (first[0] != first[1]).any()


def test_boxes_are_pinned():
    boxes = independent(bound(7), (Crop("a", 2, 32, (0.3, 1.0)), Crop("b", 1, 16, (0.05, 0.3))), 375, 500)
    assert {name: box.astype(int).tolist() for name, box in boxes.items()} == PINNED_BOXES


PINNED_BOXES = {"a": [[118, 136, 355, 424], [9, 188, 277, 458]], "b": [[0, 262, 157, 426]]}


# --- single operations -----------------------------------------------------------------------------------------------


def each(function, images, *values):
    return torch.stack([function(image, *(float(v[i]) for v in values)) for i, image in enumerate(images)])


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_blends_equal_torchvision(name):
    images, factor = random_images(), torch.tensor([0.0, 0.3, 0.9, 1.0, 1.4, 2.0])
    mine = getattr(ops, f"adjust_{name}")(images, factor)
    torch.testing.assert_close(mine, each(getattr(tv, f"adjust_{name}"), images, factor), atol=1e-5, rtol=0)


def test_hue_equals_torchvision():
    images, shift = random_images(), torch.tensor([-0.5, -0.2, 0.0, 0.07, 0.3, 0.5])
    torch.testing.assert_close(ops.adjust_hue(images, shift), each(tv.adjust_hue, images, shift), atol=1e-5, rtol=0)


def test_gray_equals_torchvision():
    images = random_images()
    torch.testing.assert_close(ops.to_gray(images), tv.rgb_to_grayscale(images, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size, kernel", [(20, 9), (33, 23), (6, 5)])
def test_blur_equals_torchvision(size, kernel):
    images, sigma = random_images(size=size), torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0, 3.0])
    expected = each(lambda image, s: tv.gaussian_blur(image, [kernel, kernel], [s, s]), images, sigma)
    torch.testing.assert_close(ops.blur(images, sigma, kernel), expected, atol=1e-5, rtol=0)


def test_blur_with_sigma_zero_changes_nothing():
    images = random_images()
    assert torch.equal(ops.blur(images, torch.zeros(6), 9), images)


def test_kernel_sizes():
    assert [ops.kernel_size(s) for s in (224, 96, 64, 4, 1)] == [23, 9, 9, 7, 1]
    assert ops.blur(random_images(1, 10), torch.ones(1), ops.kernel_size(10)).shape == (1, 3, 10, 10)


def test_solarize_equals_torchvision():
    images = random_images()
    torch.testing.assert_close(ops.solarize(images), tv.solarize(images, 0.5), atol=0, rtol=0)


def test_flip_takes_flags_per_image():
    images = random_images(2)
    mine = ops.flip(images, torch.tensor([True, False]))
    assert torch.equal(mine[0], tv.horizontal_flip(images[0])) and torch.equal(mine[1], images[1])


@pytest.mark.parametrize("with_hue", [True, False])
def test_jitter_applies_each_images_own_order(with_hue):
    orders = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(24)])
    images = random_images(24, 12)
    u = torch.rand(4, 24, generator=torch.Generator().manual_seed(0))
    factors = [0.6 + 0.8 * u[0], 0.6 + 0.8 * u[1], 0.6 + 0.8 * u[2], 0.2 * u[3] - 0.1]
    functions = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    expected = []
    for i, image in enumerate(images):
        for operation in orders[i].tolist():
            if with_hue or operation != 3:
                image = functions[operation](image, float(factors[operation][i]))
        expected.append(image)
    mine = ops.color_jitter(images, orders, *factors[:3], factors[3] if with_hue else None)
    torch.testing.assert_close(mine, torch.stack(expected), atol=2e-5, rtol=0)


# --- prepare ---------------------------------------------------------------------------------------------------------

VIEWS = Views(
    (
        Crop("global", 2, 20, (0.3, 1.0), photo=(DINO._replace(blur_p=1.0), DINO)),
        Crop("local", 3, 12, (0.05, 0.3), photo=(DINO,)),
    )
)


def test_prepare_without_photometry_is_a_flip_and_a_normalisation():
    views = Views((Crop("image", 1, 16, (0.2, 1.0)),))
    batch = make_batch(views)
    images = prepare(batch, views, MEAN, STD)["images"]["image"]
    flips = uniform(batch["key"], "flip/image", 1)[:, 0] < 0.5
    assert 0 < flips.sum() < len(flips) and images.dtype == torch.float32
    for b, flipped in enumerate(flips.tolist()):
        image = batch["crops"]["image"][0, b].float() / 255
        image = tv.normalize(image.flip(-1) if flipped else image, MEAN.tolist(), STD.tolist())
        torch.testing.assert_close(images[0, b], image, atol=1e-5, rtol=0)


FACTORS = ("brightness", "contrast", "saturation")


def test_prepare_equals_torchvision_with_the_parameters_of_the_key():
    views = Views((Crop("view", 3, 16, (0.2, 1.0), photo=(DINO,)),))
    batch = make_batch(views)
    images = prepare(batch, views, MEAN, STD)["images"]["view"]
    draws = {
        name: uniform(batch["key"], f"{name}/view", 3)
        for name in [
            "flip",
            "jitter",
            "brightness",
            "contrast",
            "saturation",
            "hue",
            "gray",
            "blur",
            "sigma",
            "solarize",
        ]
    }
    orders = uniform(batch["key"], "order/view", 12).reshape(-1, 3, 4).argsort(-1)
    functions = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    for v in range(3):
        for b in range(8):
            d = {name: float(u[b, v]) for name, u in draws.items()}
            image = batch["crops"]["view"][v, b].float() / 255
            image = image.flip(-1) if d["flip"] < 0.5 else image
            factors = [0.6 + 0.8 * d["brightness"], 0.6 + 0.8 * d["contrast"], 0.8 + 0.4 * d["saturation"]]
            factors.append(0.2 * d["hue"] - 0.1)
            if d["jitter"] < DINO.jitter_p:
                for operation in orders[b, v].tolist():
                    image = functions[operation](image, factors[operation])
            image = tv.rgb_to_grayscale(image, 3) if d["gray"] < DINO.gray_p else image
            if d["blur"] < DINO.blur_p:
                image = tv.gaussian_blur(image, [9, 9], [0.1 + 1.9 * d["sigma"]] * 2)
            image = tv.solarize(image, 0.5) if d["solarize"] < DINO.solarize_p else image
            image = tv.normalize(image, MEAN.tolist(), STD.tolist())
            away = (images[v, b] - image).abs() > 2e-4
            # A value on the solarisation threshold may fall on either side of it.
            assert away.float().mean() < (0.005 if d["solarize"] < DINO.solarize_p else 1e-9)


def test_the_batch_an_image_is_in_does_not_matter():
    batch = make_batch(VIEWS)
    whole = prepare(batch, VIEWS, MEAN, STD)
    for half in (slice(0, 4), slice(4, 8)):
        part = {"key": batch["key"][half]}
        part |= {name: {k: v[:, half] for k, v in batch[name].items()} for name in ("crops", "boxes")}
        mine = prepare(part, VIEWS, MEAN, STD)
        for name in ("images", "boxes"):
            for kind, tensor in mine[name].items():
                assert torch.equal(tensor, whole[name][kind][:, half])


def test_crops_of_a_kind_and_kinds_draw_their_own_parameters():
    batch = make_batch(VIEWS)
    batch["crops"]["local"] = batch["crops"]["local"][:1].expand(3, -1, -1, -1, -1)
    images = prepare(batch, VIEWS, MEAN, STD)["images"]["local"]
    assert not torch.allclose(images[0], images[1]) and not torch.allclose(images[1], images[2])


def test_flips_turn_boxes_and_cells():
    views = Views((Crop("global", 2, 8, (0.2, 1.0)),), cells=(Cells("global", (4, 4)),))
    batch = make_batch(views)
    batch["cells"] = {"global": torch.arange(4, dtype=torch.uint8).expand(2, 8, 4, 4)}
    done = prepare(batch, views, MEAN, STD)
    flips = (uniform(batch["key"], "flip/global", 2) < 0.5).T
    for v, b in np.ndindex(2, 8):
        flipped = bool(flips[v, b])
        assert done["boxes"]["global"][v, b].tolist() == ([1, 9, 5, 2] if flipped else [1, 2, 5, 9])
        assert done["cells"]["global"][v, b, 0].tolist() == ([3, 2, 1, 0] if flipped else [0, 1, 2, 3])
        assert torch.equal(batch["cells"]["global"][v, b, 0], torch.arange(4, dtype=torch.uint8))  # the input stays


def test_cells_of_crops_that_are_never_mirrored_stay():
    views = Views((Crop("global", 2, 8, (0.2, 1.0), flip_p=0.0),), cells=(Cells("global", (4, 4)),))
    batch = make_batch(views)
    batch["cells"] = {"global": torch.arange(4, dtype=torch.uint8).expand(2, 8, 4, 4)}
    assert torch.equal(prepare(batch, views, MEAN, STD)["cells"]["global"], batch["cells"]["global"])


def test_prepare_leaves_its_input_alone():
    batch = make_batch(VIEWS)
    before = {k: v.clone() for k, v in batch["crops"].items()}
    prepare(batch, VIEWS, MEAN, STD)
    assert "images" not in batch and batch["boxes"]["global"][0, 0].tolist() == [1, 2, 5, 9]
    assert all(torch.equal(batch["crops"][k], v) for k, v in before.items())


def test_one_channel_images_can_be_prepared():
    crop = Crop("image", 1, 12, (0.2, 1.0), photo=(Photo(blur_p=1.0, solarize_p=0.5),))
    batch = {"key": torch.arange(3), "crops": {"image": torch.zeros(1, 3, 1, 12, 12, dtype=torch.uint8)}}
    assert prepare(batch, Views((crop,)), MEAN[:1], STD[:1])["images"]["image"].shape == (1, 3, 1, 12, 12)
    with pytest.raises(ValueError, match="need 3 channels"):
        prepare(batch, Views((crop._replace(photo=(DINO,)),)), MEAN[:1], STD[:1])


def test_a_wrong_number_of_photo_settings_is_named():
    views = Views((Crop("global", 3, 8, (0.2, 1.0), photo=(None, None)),))
    with pytest.raises(ValueError, match=r"views\.global: 2 photo settings for 3 crops"):
        prepare(make_batch(views), views, MEAN, STD)


def test_denormalise_inverts_the_normalisation():
    images = random_images()
    normal = (images - MEAN[:, None, None]) / STD[:, None, None]
    torch.testing.assert_close(denormalise(normal, MEAN, STD), images, atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cpu_and_gpu_agree_without_host_synchronisation():
    batch = make_batch(VIEWS)
    expected = prepare(batch, VIEWS, MEAN, STD)["images"]
    moved = {"key": batch["key"].cuda()}
    moved |= {name: {k: v.cuda() for k, v in batch[name].items()} for name in ("crops", "boxes")}
    mean, std = MEAN.cuda(), STD.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = prepare(moved, VIEWS, mean, std)["images"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for kind, tensor in images.items():
        far = (tensor.cpu() - expected[kind]).abs() > 1e-4
        assert far.float().mean() < 1e-3  # but for values on the solarisation threshold
