"""Features during training: the fixed bank and queries, rank, deviation; pictures; extraction for probes."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import Needs
from selfsight.data.source import Raw, SampleError
from selfsight.probes import ProbeError
from selfsight.probes.bank import encode, extract, images, subset
from selfsight.training.online import Online, feature_std, rankme
from selfsight.training.pictures import grid, pca_rgb, write

NORM = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


class Colours:
    """n images of one colour per class and some noise; ids in `broken` raise, ids in `unlabelled` have no label."""

    has_objects, classes, fingerprint, describe = False, None, "colours", "coloured squares"

    def __init__(self, n=60, labelled=True, broken=(), unlabelled=(), noise=40):
        self.lengths, self.labelled, self.broken, self.unlabelled, self.noise = [n], labelled, broken, unlabelled, noise

    def __len__(self):
        return self.lengths[0]

    def read(self, id):
        if id in self.broken:
            raise SampleError(f"colours {id}", "made to be broken")
        rng = np.random.default_rng(id)
        colour = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220]])[id % 3]
        pixels = np.clip(colour + rng.normal(0, self.noise, (24, 32, 3)), 0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        label = id % 3 if self.labelled and id not in self.unlabelled else -1
        return Raw(str(id), out.getvalue(), label, f"colours {id}")


def cfg(bank=30, queries=12):
    knn = SimpleNamespace(bank=bank, queries=queries, k=5, temperature=0.07)
    return SimpleNamespace(knn=knn, image_size=16, num_workers=0, data=SimpleNamespace(channels=3))


@pytest.fixture(scope="module")
def vit():
    return build_backbone("vit_nano", Needs(), image_sizes=(16,), depth=1, patch_size=4)


def evaluate(online, backbone):
    return online.evaluate(backbone, NORM["mean"], NORM["std"], "cpu")


def test_a_labelled_run_reports_knn_in_percent_rank_and_deviation(vit):
    numbers = evaluate(Online(cfg(), Colours(), Colours(30)), vit)
    assert numbers.keys() == {"knn", "rankme", "feature_std"}
    assert numbers["knn"] > 60 and 1 <= numbers["rankme"] <= 30 and numbers["feature_std"] > 0


def test_raw_pixels_separate_plain_colours():
    assert Online(cfg(), Colours(), Colours(30)).raw_pixels() == 100


def test_bank_and_queries_are_the_same_every_time():
    one, other = (Online(cfg(), Colours(), None) for _ in range(2))
    assert np.array_equal(one.bank.ids, other.bank.ids) and torch.equal(one.queries.pixels, other.queries.pixels)


@pytest.mark.parametrize(("train", "val"), [(True, None), (True, False), (False, True)])
def test_queries_never_stand_in_the_bank_when_one_split_serves_both(train, val):
    online = Online(cfg(), Colours(labelled=train), None if val is None else Colours(labelled=val))
    assert len(online.bank.ids) == 30 and len(online.queries.ids) == 12
    assert not set(online.bank.ids) & set(online.queries.ids)


def test_without_labels_there_is_no_knn(vit):
    online = Online(cfg(), Colours(labelled=False), None)
    assert evaluate(online, vit).keys() == {"rankme", "feature_std"}
    with pytest.raises(ValueError, match="needs labels"):
        online.raw_pixels()


def test_unlabelled_and_broken_samples_are_left_out_and_counted():
    online = Online(cfg(), Colours(30, broken=(4,), unlabelled=(5, 6)), Colours(12))
    assert len(online.bank.ids) == 27 and "3 left out" in online.describe


def test_evaluation_leaves_modes_statistics_and_generator_alone():
    backbone = build_backbone("shvit_nano_lite", Needs(), image_sizes=(64,))
    backbone.train()
    frozen_norm = next(m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    before, state = {k: v.clone() for k, v in backbone.state_dict().items()}, torch.get_rng_state()
    settings = cfg(bank=6, queries=2)
    settings.image_size = 64
    evaluate(Online(settings, Colours(20), Colours(10)), backbone)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert backbone.training and not frozen_norm.training and torch.equal(torch.get_rng_state(), state)


def test_rankme_counts_equal_directions():
    q, _ = torch.linalg.qr(torch.randn(64, 64))
    assert rankme(q[:, :8] @ torch.eye(8, 32)) == pytest.approx(8, rel=1e-3)
    assert rankme(torch.ones(50, 16)) == pytest.approx(1, rel=1e-3)


def test_feature_std_tells_collapse_from_spread():
    assert feature_std(torch.ones(50, 16)) == pytest.approx(0, abs=1e-6)
    assert feature_std(torch.randn(5000, 16)) == pytest.approx(1 / 4, rel=0.02)


def test_subsets_are_fixed_distinct_and_extend():
    small, large = subset(1000, 10), subset(1000, 50)
    assert np.array_equal(large[:10], small) and len(set(large.tolist())) == 50
    assert np.array_equal(subset(5, None), np.arange(5))


def test_threads_decode_the_same_images():
    alone, threads = (images(Colours(), range(8), 16, 1.0, workers=w) for w in (0, 2))
    assert torch.equal(alone.pixels, threads.pixels) and alone.pixels.shape == (8, 3, 16, 16)


def test_extraction_in_batches_equals_one_batch_and_lists_what_is_bad(vit):
    source = Colours(20, broken=(3,))
    options = {"size": 16, "crop_pct": 1.0, "want": ("pooled", "patches")} | NORM
    parts = extract(vit, source, range(20), batch_size=6, **options)
    whole = extract(vit, source, range(20), batch_size=20, **options)
    torch.testing.assert_close(parts.pooled, whole.pooled)
    assert parts.patches.shape == (19, 16, 128) and 3 not in parts.ids
    assert parts.bad == [(3, "colours 3: made to be broken")]


def test_too_many_bad_samples_stop_the_extraction(vit):
    with pytest.raises(ProbeError, match=r"limit 8.*made to be broken"):
        extract(vit, Colours(20, broken=range(9)), range(20), size=16, crop_pct=1.0, **NORM)


def test_a_backbone_and_its_timm_model_encode_alike(vit):
    x = torch.randn(2, 3, 16, 16)
    for mine, theirs in zip(encode(vit.eval(), x, patches=True), encode(vit.timm.eval(), x, patches=True)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_pca_gives_equal_features_equal_colours_in_every_image():
    kinds = torch.randn(4, 32)  # four points span three components
    assignment = torch.randint(0, 4, (4, 16))
    colours = pca_rgb(kinds[assignment] + 0.001 * torch.randn(4, 16, 32), (4, 4)).flatten(2).transpose(1, 2)
    for kind in range(4):
        assert colours[assignment == kind].std(0).max() < 0.05
    assert (colours[assignment == 0].mean(0) - colours[assignment == 1].mean(0)).abs().max() > 0.3


def test_pca_survives_collapsed_features_and_few_dimensions():
    assert torch.isfinite(pca_rgb(torch.ones(2, 4, 8), (2, 2), size=8)).all()
    assert pca_rgb(torch.randn(2, 4, 2), (2, 2)).shape == (2, 3, 2, 2)


def test_the_grid_shows_each_picture_in_its_place():
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(2, 3, 112, 112)
    sheet = grid({"red": red, "beyond white": torch.full((2, 3, 112, 112), 2.0)})
    assert sheet.getpixel((sheet.width - 20, 50)) == (255, 0, 0)
    assert sheet.getpixel((sheet.width - 20, 180)) == (255, 255, 255)


def test_rows_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="row 'b'"):
        grid({"a": torch.zeros(2, 3, 8, 8), "b": torch.zeros(2, 3, 4, 4)})


def test_pictures_are_written_with_the_step_in_their_names(vit, tmp_path):
    class Fake(torch.nn.Module):
        pictures_show = "reconstruction"

        def pictures(self, batch):
            return {"original": batch["images"]["image"][0]}

    batch = {"images": {"image": torch.randn(1, 3, 3, 16, 16)}}
    paths = write(Fake(), vit, batch, tmp_path / "pictures", 12, **NORM)
    assert [p.name for p in paths] == ["reconstruction-0000012.png", "pca-0000012.png"]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width > 100
