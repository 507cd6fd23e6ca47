"""k-NN with masks at inference: the pooled feature of one object per image, by the geometry of the evaluation crop."""

import io
import json

import numpy as np
import pytest
import torch
import webdataset
from omegaconf import OmegaConf
from PIL import Image

from drawn import disc, png, two_discs
from selfsight import config
from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import Needs
from selfsight.data.source import Raw
from selfsight.objectives import build_objective
from selfsight.probes import ProbeError
from selfsight.probes.bank import extract, frozen, images, normalise
from selfsight.probes.masks import ObjectRows, object_rows
from selfsight.probes.run import load_backbone, probe
from selfsight.training import checkpoint

NORM = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
CASES = {
    "vit_nano": (32, {"patch_size": 8, "depth": 2}, Needs(focus=True)),
    "convnext_nano_lite": (32, {"patch_size": 1}, Needs(focus=True)),
    "shvit_nano_lite": (128, {}, Needs(focus=True, stride=16)),
}


def encoded(pixels, format="PNG", **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format, **options)
    return out.getvalue()


class Drawn:
    """Noise with given id maps (None: no map at all); PNG, 48 x 64."""

    classes, fingerprint, describe, labelled = None, "drawn", "drawn images", True

    def __init__(self, maps):
        self.maps, self.lengths, self.has_objects = maps, [len(maps)], any(ids is not None for ids in maps)

    def __len__(self):
        return len(self.maps)

    def read(self, id):
        pixels = np.random.default_rng(id).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        ids = self.maps[id]
        objects = png(ids) if isinstance(ids, np.ndarray) else ids
        return Raw(f"{id:03d}", encoded(pixels), id % 2, f"drawn {id}", objects=objects)


def mirrored(ids):
    return np.ascontiguousarray(ids[:, ::-1])


def by_hand(ids, number, grid):
    """Patches of the centred 48 x 48 of a 48 x 64 map by counting its pixels; the one with most if all are poor."""
    side = 48 // grid
    parts = (ids == number)[:, 8:56].reshape(grid, side, grid, side).mean((1, 3))
    on = parts >= 0.25
    return torch.from_numpy(on if on.any() else parts == parts.max()).flatten()


@pytest.fixture(scope="module", params=CASES)
def family(request):
    size, options, needs = CASES[request.param]
    torch.manual_seed(0)
    return build_backbone(request.param, needs, image_sizes=(size,), **options).eval(), size


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return build_backbone("vit_nano", Needs(focus=True), image_sizes=(32,), patch_size=8, depth=2).eval()


def test_features_are_those_of_the_focused_backbone(family):
    backbone, size = family
    ids = two_discs()
    source = Drawn([ids, mirrored(ids), None])
    found = extract(backbone, source, range(3), size=size, crop_pct=1.0, masks="largest", **NORM)
    plain = extract(backbone, source, range(3), size=size, crop_pct=1.0, **NORM)
    x = normalise(images(source, range(3), size, 1.0).pixels, **NORM, device="cpu")
    grid = backbone.grid(size)[0]
    rows = torch.stack([by_hand(ids, 1, grid), by_hand(mirrored(ids), 1, grid), torch.ones(grid**2, dtype=torch.bool)])
    with torch.no_grad():
        want = backbone(x, focus=rows).pooled
    assert torch.equal(found.pooled, want) and found.shown.tolist() == [True, True, False]
    apart = (found.pooled - plain.pooled).abs().amax(1) / plain.pooled.std()
    assert apart[:2].min() > 0.02 and apart[2] < 1e-4  # without an object the whole image is looked at


def test_without_masks_features_are_bit_for_bit_the_backbones_own(vit):
    source = Drawn([two_discs()] * 3)
    found = extract(vit, source, range(3), size=32, crop_pct=1.0, masks="none", **NORM)
    seen = images(source, range(3), 32, 1.0)
    with torch.no_grad():
        assert torch.equal(found.pooled, vit(normalise(seen.pixels, **NORM, device="cpu")).pooled)
    assert (found.shown, seen.focus, seen.shown) == (None, None, None)


def test_rows_and_pixels_stay_together_over_batches_and_workers(vit):
    maps = [two_discs(), None, mirrored(two_discs()), np.zeros((4, 4), np.uint8), two_discs((96, 128))]
    options = {"size": 32, "crop_pct": 1.0, "masks": "first", **NORM}
    whole = extract(vit, Drawn(maps), range(5), **options)
    parts = extract(vit, Drawn(maps), range(5), batch_size=2, workers=2, **options)
    torch.testing.assert_close(parts.pooled, whole.pooled)
    assert parts.shown.tolist() == whole.shown.tolist() == [True, False, True, False, True]


def test_patches_are_counted_in_the_crop_of_evaluation():
    ids = two_discs()
    for map_, number in ((ids, 1), (mirrored(ids), 1), (np.where(ids == 1, 0, ids), 2)):
        found = images(Drawn([map_]), [0], 32, 1.0, rows=ObjectRows("largest", (4, 4)))
        assert torch.equal(found.focus[0], by_hand(map_, number, 4))


@pytest.mark.parametrize("shape", [(227, 301), (300, 211), (64, 64)])
def test_patches_show_what_the_pixels_show(shape):
    """An object as white on black, in a JPEG that is decoded at a fraction of its size, with a map of another size."""
    white = disc(shape, 0.55 * shape[0], 0.4 * shape[1], 0.27 * shape[1])
    coarse = disc((120, 160), 0.55 * 120, 0.4 * 160, 0)  # empty, to be filled at the same places
    y, x = (np.arange(120) * shape[0] // 120), (np.arange(160) * shape[1] // 160)
    coarse = white[y][:, x].astype(np.uint8) * 7 + coarse

    class One(Drawn):
        def read(self, id):
            pixels = np.repeat(white[..., None] * np.uint8(255), 3, axis=2)
            return Raw("k", encoded(pixels, "JPEG", quality=95), 0, "here", objects=png(coarse))

    found = images(One([coarse]), [0], 32, 0.875, rows=ObjectRows("largest", (8, 8)))
    share = found.pixels[0].float().mean(0).reshape(8, 4, 8, 4).mean((1, 3)) / 255
    clear = (share - 0.25).abs() > 0.08
    assert clear.sum() > 50 and 5 < found.focus.sum() < 50
    assert torch.equal(found.focus[0].view(8, 8)[clear], (share >= 0.25)[clear])


def test_the_object_is_chosen_by_what_the_crop_shows():
    ids = np.zeros((48, 64), np.uint8)
    ids[:, :6] = 1  # left of the centred square
    ids[:, 56:] = 9
    ids[0:24, 8:32] = 5
    ids[24:36, 8:20] = 3
    ids[:, 54:56] = 2  # the smallest id that the crop shows, on no patch by more than a sixth
    box = np.array([0, 8, 48, 56], np.float32)
    rows = {choice: ObjectRows(choice, (4, 4)) for choice in ("largest", "first")}
    raw = Drawn([ids]).read(0)
    assert torch.equal(rows["largest"](raw, box, 48, 64), by_hand(ids, 5, 4))
    column = torch.zeros(4, 4, dtype=torch.bool)
    column[0, 3] = True  # at least one patch: the first of those that show most
    assert torch.equal(rows["first"](raw, box, 48, 64), column.flatten())


def test_a_map_that_cannot_be_read_is_a_bad_sample(vit):
    found = extract(vit, Drawn([two_discs(), b"no png"]), range(2), size=32, crop_pct=1.0, masks="first", **NORM)
    assert found.ids.tolist() == [0] and "objects.png is no PNG" in found.bad[0][1]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "needs", "size", "words"),
    [
        ("vit_nano", {"patch_size": 8, "depth": 1}, Needs(pooled=False), 32, "the mean of its patch tokens"),
        ("vit_nano", {"patch_size": 8, "depth": 1}, Needs(class_token=False), 32, "the mean of its patch tokens"),
        ("resnet18", {}, Needs(), 32, "as a generic timm model cannot"),
        ("vit_nano", {"patch_size": 8, "depth": 1}, Needs(), 36, "cells of 8 px fill, and 36 is .* use image_size=32"),
    ],
)
def test_a_backbone_that_cannot_look_at_a_part_is_refused(name, options, needs, size, words):
    backbone = build_backbone(name, needs, image_sizes=(32,), **options)
    with frozen(backbone) as model, pytest.raises(ProbeError, match=rf"probe\.masks=first .*{words}"):
        object_rows(model, "first", size)


def test_a_plain_timm_model_is_refused_and_needs_nothing_without_masks(vit):
    with pytest.raises(ProbeError, match="checkpoint of a run folder"):
        object_rows(vit.timm, "largest", 32)
    assert object_rows(vit.timm, "none", 33) is None


def test_only_a_run_folder_can_be_probed_with_masks(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ProbeError, match=r"probe\.masks=first needs the checkpoint of a run .* is an export folder"):
        load_backbone(str(tmp_path), masks="first")
    with pytest.raises(ProbeError, match=r"resnet18 is no run folder: use checkpoint=<run folder>"):
        load_backbone("resnet18", masks="largest")


# --- the command -----------------------------------------------------------------------------------------------------


def shard(path, maps):
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for id, ids in enumerate(maps):
            raw = Drawn(maps).read(id)
            sample = {"__key__": raw.key, "png": raw.image, "cls": str(raw.label).encode()}
            writer.write(sample | ({} if ids is None else {"objects.png": raw.objects}))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of an untrained DINO, and shards: 14 to train on, 2 of them without objects, 5 to validate on."""
    root = tmp_path_factory.mktemp("masked")
    ids = two_discs()
    train = shard(root / "train.tar", [ids, mirrored(ids)] * 6 + [None, np.zeros((3, 3), np.uint8)])
    val = shard(root / "val.tar", [ids, mirrored(ids)] * 2 + [None])
    shard(root / "bare.tar", [None] * 6)
    words = ("image_size=32", "backbone=vit_nano", "backbone.patch_size=8", "backbone.depth=2", "max_steps=4")
    heads = ("objective.num_prototypes=8", "objective.head_hidden=8", "objective.head_bottleneck=4")
    data = ("data=shards", f"data.train={train}", f"data.val={val}")
    cfg = config.load("train", ["objective=dino", *words, *heads, *data, f"run_dir={root / 'run'}"])
    torch.manual_seed(0)
    objective = build_objective(cfg, total_steps=4, steps_per_epoch=1.0)
    meta = {"total_steps": 4, "mean": [0.5] * 3, "std": [0.25] * 3}
    checkpoint.save(root / "run" / "checkpoints", 4, {"model": checkpoint.unique_state(objective)}, meta)
    OmegaConf.save(cfg, root / "run" / "config.yaml")
    return root / "run"


def settings(run, *words):
    return config.load("probe", [f"checkpoint={run}", "num_workers=0", "device=cpu", "probe.k=3", *words])


def test_a_read_out_is_judged_where_one_was_trained(tmp_path):
    words = ("image_size=32", "backbone=convnextv2_nano_lite", "backbone.patch_size=1", "max_steps=4", "data=scenes",
             "objective.num_prototypes=8", "objective.head_hidden=8", "objective.head_bottleneck=4")  # fmt: skip
    cfg = config.load("train", ["objective=odis", *words, f"run_dir={tmp_path}"])
    torch.manual_seed(0)
    objective = build_objective(cfg, total_steps=4, steps_per_epoch=1.0).eval()
    meta = {"total_steps": 4, "mean": [0.5] * 3, "std": [0.25] * 3}
    checkpoint.save(tmp_path / "checkpoints", 4, {"model": checkpoint.unique_state(objective)}, meta)
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    model = load_backbone(str(tmp_path), masks="first").model
    rows = object_rows(model, "first", 32)
    images, focus = torch.randn(2, 3, 32, 32), torch.zeros(2, rows.grid[0] * rows.grid[1], dtype=torch.bool)
    focus[:, 3:7] = True
    with torch.no_grad():
        tokens = objective.teacher["backbone"](images)
        expected = objective.pool(objective.teacher, tokens, focus)
        torch.testing.assert_close(model(images, focus=focus).pooled, expected)
        torch.testing.assert_close(model(images).pooled, tokens.pooled)  # without masks: what is exported


def test_images_without_an_object_are_counted_and_said(run, capsys):
    plain, masked = probe(settings(run)), probe(settings(run, "probe.masks=largest"))
    assert masked["masked"] == {"bank": 12, "query": 4} and masked["without_object"] == {"bank": 2, "query": 1}
    assert "the largest in the crop" in masked["protocol"]
    assert "2 of 14 bank and 1 of 5 query images show no object" in masked["protocol"]
    assert "3 images without an object" in capsys.readouterr().out
    assert "masked" not in plain and "object" not in plain["protocol"]
    assert json.loads((run / "probes" / "masks-largest" / "knn.json").read_text())["masked"] == masked["masked"]
    assert json.loads((run / "probes" / "knn.json").read_text())["settings"]["probe"]["masks"] == "none"


def test_data_without_masks_is_refused_in_one_sentence(run):
    train, val, bare = (run.parent / f"{name}.tar" for name in ("train", "val", "bare"))
    masks = "probe.masks=first"
    with pytest.raises(ProbeError, match=rf"{masks} needs object masks, and shards {bare} has none: .*objects\.png"):
        probe(settings(run, masks, "data=shards", f"data.train={bare}", f"data.val={val}"))
    with pytest.raises(ProbeError, match=rf"shards {bare} has none: .* without data\.val a fifth of data\.train"):
        probe(settings(run, masks, "data=shards", f"data.train={train}", f"data.val={bare}"))


def test_side_cars_hold_the_masks_of_shards_without(run):
    bare, side = run.parent / "bare.tar", run.parent / "objects"
    side.mkdir()
    with webdataset.TarWriter(str(side / "bare.tar"), encoder=False) as writer:
        for id in range(5):
            writer.write({"__key__": f"{id:03d}", "objects.png": png(two_discs())})
    words = ("data=shards", f"data.train={bare}", f"data.objects={side / 'bare.tar'}", "probe.k=1")
    result = probe(settings(run, "probe.masks=first", *words, f"out={run.parent / 'out'}"))
    counts = [sum(result[key].values()) for key in ("masked", "without_object")]
    assert counts == [5, 1] and (run.parent / "out" / "knn.json").is_file()


def test_only_knn_takes_masks(run):
    with pytest.raises(config.ConfigError, match=r"unknown key 'probe\.masks'"):
        config.load("probe", ["checkpoint=x", "probe=linear", "probe.masks=first"])
    with pytest.raises(config.ConfigError, match=r"probe\.masks=some: expected one of none, largest, first"):
        settings(run, "probe.masks=some")
