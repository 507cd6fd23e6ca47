"""The segmentation probe: windows, patch targets, metric and protocol against plain versions of the same."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from selfsight import config
from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import Needs
from selfsight.interop.export import export_backbone
from selfsight.probes import ProbeError
from selfsight.probes.cuts import Cut, windows
from selfsight.probes.run import probe
from selfsight.probes.segmentation import SUB, _confusion, _shares, iou, merge


def encoded(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def shard(path, n, first=0, masks=True):
    """Images 24 x 40: blue left of an edge, red right of it, a frame of two pixels that is not labelled."""
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for i in range(first, first + n):
            rng = np.random.default_rng(i)
            right = np.broadcast_to(np.arange(40) >= rng.integers(12, 28), (24, 40))
            colour = np.where(right[..., None], (200, 40, 40), (40, 40, 200))
            pixels = np.clip(colour + rng.normal(0, 15, (24, 40, 3)), 0, 255).astype(np.uint8)
            mask = right.astype(np.uint8)
            mask[:2] = 255
            sample = {"__key__": f"{i:04d}", "png": encoded(pixels)}
            writer.write(sample | ({"mask.png": encoded(mask)} if masks else {}))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("segmented")
    torch.manual_seed(0)
    backbone = build_backbone("vit_nano", Needs(), image_sizes=(24,), depth=1, patch_size=4)
    card = {"objective": "mae", "backbone": "vit_nano", "which": "student", "steps": 7}
    export = export_backbone(backbone, root / "export", mean=(0.5,) * 3, std=(0.25,) * 3, image_size=24, card=card)
    shard(root / "train.tar", 24), shard(root / "val.tar", 6, 100), shard(root / "bare.tar", 4, 200, masks=False)

    def call(*words, val="val.tar"):
        data = ["data=shards", f"data.train={root / 'train.tar'}", f"data.val={root / val}", f"out={root / 'out'}"]
        here = ["num_workers=0", "device=cpu", f"bank.folder={root / 'banks'}", "image_size=24", "probe.batch_size=8"]
        return probe(config.load("probe", [f"checkpoint={export}", "probe=segmentation", *data, *here, *words]))

    return call


@pytest.mark.parametrize("mode", ["sliding", "whole"])
def test_two_colours_are_told_apart_at_the_pixels_of_the_mask(run, mode):
    result = run(f"probe.mode={mode}", "probe.epochs=15", "probe.lrs=[0.01,0.03]", "probe.seeds=2")
    assert result["miou"] > 85 and len(result["miou_seeds"]) == 2 and result["classes"] == 2
    assert result["lr"] == max(result["grid"], key=lambda row: row["select_miou"])["lr"]
    assert result["standard_error"] < 5 and result["parameters"] == 2 * 129
    words = "shorter side 24, windows of 24 with stride 12" if mode == "sliding" else "squashed to 24 x 24"
    assert words in result["protocol"] and "without id 255" in result["protocol"]


def test_data_without_masks_is_refused(run):
    with pytest.raises(ProbeError, match=r"needs semantic masks, and .*bare\.tar.* has none: .*mask\.png"):
        run(val="bare.tar")


def test_windows_cover_the_image_and_end_at_its_border():
    cut = Cut("windows", 224, stride=112)
    boxes = windows(cut, 360, 480)
    assert boxes[:, 1].tolist() == pytest.approx([0, 120], abs=1) and (boxes[:, 3] - boxes[:, 1] == 360).all()
    assert len(windows(cut, 224, 224)) == 1 and len(windows(cut, 1000, 224)) == 8
    tall = windows(cut, 500, 200)
    assert tall[-1, 2] == 500 and (tall[:, 1] == 0).all() and (tall[:, 3] == 200).all()


def test_constant_logits_stay_constant_when_windows_are_merged():
    boxes = windows(Cut("windows", 24, stride=12), 30, 70)
    logits = torch.ones(len(boxes), 3, 6, 6) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    merged = merge(logits, boxes, (30, 70), (60, 140), 24)
    assert merged.shape == (3, 60, 140)
    torch.testing.assert_close(merged, torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1).expand(3, 60, 140))


def test_the_loss_on_shares_is_that_of_the_pixels():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, (2, 5, SUB * SUB), generator=g)
    ids[0, 0] = 255
    ids[1, 2, :4] = 255
    logits = torch.randn(2, 5, 3, generator=g)
    share, known = _shares(ids, 3, 255)
    mine = (-(share * logits.log_softmax(-1)).sum(-1) * known).sum() / known.sum()
    pixels = logits[:, :, None].expand(2, 5, SUB * SUB, 3)
    torch.testing.assert_close(mine, F.cross_entropy(pixels.reshape(-1, 3), ids.flatten(), ignore_index=255))


def test_miou_is_that_of_torchmetrics_over_the_data_set():
    g = torch.Generator().manual_seed(0)
    guess, truth = (torch.randint(4, (3, 20, 20), generator=g) for _ in range(2))
    truth[0, :5] = 255
    confusion = sum(_confusion(a, b, 6, 255) for a, b in zip(guess, truth))  # classes 4 and 5 never occur
    whole = MulticlassJaccardIndex(6, average="none", ignore_index=255)(guess, truth) * 100
    found = iou(confusion)
    torch.testing.assert_close(found[:4].float(), whole[:4])
    assert found[4:].isnan().all()
