"""Object proposals: the cut against a textbook one, and the command from images to side-cars."""

import io
import json
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import golden_maskcut
from selfsight import cli, config
from selfsight import proposals as command
from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import Needs
from selfsight.data.decode import decode
from selfsight.data.folder import Folder
from selfsight.data.manifest import Shards
from selfsight.data.objects import object_map
from selfsight.data.proposals import agreement, component, label_map, maskcut, object_side, second_vector
from selfsight.data.scenes import write as write_scenes
from selfsight.data.sidecar_writer import FIELD, WHY, members, plan
from selfsight.data.source import DataError
from selfsight.interop.export import export_backbone
from selfsight.probes.run import Loaded
from selfsight.proposals import Finder, ProposalError, proposals
from selfsight.schema import ConfigError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")
SETTINGS = {"objects": 3, "tau": 0.15, "min_area": 0.01}


@pytest.mark.parametrize("case", golden_maskcut.names())
def test_the_references_numbers(case):
    golden_maskcut.run(case)


def test_there_is_a_golden_case():
    assert golden_maskcut.names()


# ---- the cut -------------------------------------------------------------------------------------------------


def planted(grid, boxes, seed=0, noise=0.1, width=16):
    """Features [1, h * w, width] of a background and of rectangles (y0, x0, y1, x1), and the labels [h, w]."""
    labels = np.zeros(grid, np.int64)
    for number, (y0, x0, y1, x1) in enumerate(boxes, 1):
        labels[y0:y1, x0:x1] = number
    random = np.random.default_rng(seed)
    kinds = np.linalg.qr(random.normal(size=(width, width)))[0][: len(boxes) + 1]
    features = kinds[labels.ravel()] + noise * random.normal(size=(labels.size, width))
    return torch.from_numpy(features)[None], labels


def textbook(features, grid, objects, tau):
    """MaskCut as it is told: numpy, one image, the eigenproblem of D^-1 (D - A)."""
    found = []
    for _ in range(objects):
        x = features * ~np.any(found, axis=0).ravel()[:, None] if found else features
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        a = np.where(x @ x.T > tau, 1.0, 1e-5)
        d = a.sum(1)
        values, vectors = np.linalg.eig((np.diag(d) - a) / d[:, None])
        v = vectors[:, values.real.argsort()[1]].real
        v = v * np.sign(v[abs(v).argmax()])
        side = (v > v.mean()).reshape(grid)
        if side[[0, 0, -1, -1], [0, -1, 0, -1]].sum() >= 3:
            v, side = -v, ~side
        part, waiting = np.zeros(grid, bool), [np.unravel_index(v.argmax(), grid)]
        while waiting:
            y, x = waiting.pop()
            if 0 <= y < grid[0] and 0 <= x < grid[1] and side[y, x] and not part[y, x]:
                part[y, x] = True
                waiting += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        again = [(part & old).sum() / (part | old).sum() > 0.5 for old in found]
        new = part & ~np.any(found, axis=0) if found else part
        if any(again) or new.mean() <= 0.01:
            break
        found.append(new)
    return found + [np.zeros(grid, bool)] * (objects - len(found))


@pytest.mark.parametrize("noise", [0.05, 0.15, 0.25])
def test_a_batch_is_cut_as_the_textbook_cuts_each_image(noise):
    boxes = [[(1, 1, 4, 5)], [(0, 0, 3, 3), (5, 4, 8, 9)], [(2, 6, 6, 9), (6, 1, 8, 4), (1, 1, 3, 3)]]
    batch = torch.cat([planted((8, 10), some, seed, noise)[0] for seed, some in enumerate(boxes)])
    masks = maskcut(batch, (8, 10), objects=4, tau=0.2).masks
    for features, mine in zip(batch, masks):
        assert np.array_equal(mine.numpy(), np.stack(textbook(features.numpy(), (8, 10), 4, 0.2)))
    assert masks.flatten(2).any(2).sum() >= 6


@pytest.mark.parametrize("seed", [2, 5, 10, 12])
def test_an_earlier_object_with_a_rim_is_no_new_object(seed):
    """Noise for which the second or third cut is an earlier object and some patches around it."""
    features, _ = planted((8, 10), [(1, 1, 4, 5), (5, 4, 8, 9)], seed, noise=0.45)
    mine = maskcut(features, (8, 10), objects=4, tau=0.2).masks[0]
    assert np.array_equal(mine.numpy(), np.stack(textbook(features[0].numpy(), (8, 10), 4, 0.2)))


def test_planted_objects_are_found_on_a_grid_that_is_not_square():
    features, labels = planted((6, 20), [(1, 2, 5, 8), (2, 12, 4, 17)])
    found = maskcut(features, (6, 20), objects=3, tau=0.3)
    assert np.array_equal(label_map(found.masks)[0].numpy(), labels)
    assert found.masks.sum(1).max() == 1


def test_float32_features_give_the_same_masks():
    features, _ = planted((8, 8), [(1, 1, 4, 4), (5, 4, 8, 7)])
    assert torch.equal(maskcut(features.float(), (8, 8)).masks, maskcut(features, (8, 8)).masks)


def test_the_vector_solves_the_generalised_problem():
    graph = torch.rand(2, 12, 12, dtype=torch.float64)
    graph = graph + graph.mT
    vector, _ = second_vector(graph)
    degree = graph.sum(-1)
    left, right = degree * vector - (graph @ vector[..., None])[..., 0], degree * vector
    value = (vector * left).sum(-1) / (vector * right).sum(-1)
    assert torch.allclose(left, value[:, None] * right, atol=1e-12)
    assert torch.allclose((vector * right).sum(-1), torch.ones(2, dtype=torch.float64))
    assert (right.sum(-1).abs() < 1e-10).all()  # apart from the trivial first one


def test_what_surrounds_an_object_is_no_object_and_the_sign_plays_no_part():
    vector = torch.full((4, 4), -1.0)
    vector[1:3, 1:3] = 0.5
    vector[0, 0] = -2.0  # the strongest entry lies outside
    for v in (vector, -vector):
        side, seed = object_side(v.reshape(1, 16), (4, 4))
        assert side.view(4, 4).nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
        assert side[0, seed[0]]


def test_between_two_equal_sides_the_stronger_is_the_object():
    vector = torch.tensor([[2.0, 1.5, -1.0, -1.2]]).repeat_interleave(4, 0).view(1, 16)
    for v in (vector, -vector):
        side, seed = object_side(v, (4, 4))
        assert side.view(4, 4).all(0).tolist() == [True, True, False, False] and seed % 4 == 0


def test_components_are_joined_by_edges_alone():
    side = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1], [1, 0, 1, 0]]).bool()
    parts = component(side.expand(3, -1, -1).clone(), torch.tensor([0, 14, 12]))
    assert parts.flatten(1).sum(1).tolist() == [3, 4, 1]
    assert not (parts[0] & parts[1]).any()


@pytest.mark.parametrize("features", [torch.ones(2, 16, 4), torch.zeros(2, 16, 4), torch.ones(2, 1, 4)])
def test_where_all_patches_are_alike_nothing_is_found(features):
    side = int(features.shape[1] ** 0.5)
    found = maskcut(features, (side, side))
    assert found.masks.shape == (2, 3, side, side) and not found.masks.any()


def test_small_finds_are_dropped():
    features, _ = planted((8, 8), [(2, 2, 4, 4)], noise=0.02)
    assert maskcut(features, (8, 8), min_area=0.05).masks.sum() == 4
    assert maskcut(features, (8, 8), min_area=0.0625).masks.sum() == 0


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="12 patches do not fill a grid of 4 x 4"):
        maskcut(torch.ones(1, 12, 4), (4, 4))
    with pytest.raises(ValueError, match="not finite"):
        maskcut(torch.full((1, 16, 4), torch.nan), (4, 4))


def test_agreement_with_known_objects():
    truth = np.zeros((8, 8), np.uint8)
    truth[:4, :4], truth[6:, 6:] = 7, 9
    labels = np.array([[2, 0], [0, 1]], np.uint8)  # half the size: the first one covers sixteen pixels, four known
    found = agreement(labels, truth)
    assert (found.first, found.best) == (0.25, 1.0)
    assert agreement(labels * 0, truth)[:2] == (0.0, 0.0)
    assert agreement(labels, truth * 0) is None


# ---- features ------------------------------------------------------------------------------------------------


def loaded(model, size, name="vit_nano"):
    return Loaded(model, MEAN, STD, size, 1.0, {"backbone": name})


def noise_images(n, size):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


def test_keys_are_those_of_the_last_block_without_class_token_and_registers():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0,
        reg_tokens=2,
    ).eval()  # fmt: skip
    finder = Finder(loaded(model, 32), "keys", True, CPU, **SETTINGS)
    pixels = noise_images(2, 32)
    keys = finder.features(pixels)
    with torch.no_grad():
        x = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        x = model.blocks[0](model.norm_pre(model._pos_embed(model.patch_embed(x))))
        expected = (model.blocks[1].norm1(x) @ model.blocks[1].attn.qkv.weight[24:48].T)[:, 3:]
        expected = expected + model.blocks[1].attn.qkv.bias[24:48]
    assert keys.shape == (2, 16, 24)
    assert torch.allclose(keys, expected, atol=1e-5)


def test_a_run_in_memory_and_timm_give_the_same_keys():
    backbone = build_backbone("vit_nano", Needs(), image_sizes=(32,), depth=2, embed_dim=32, num_heads=2).eval()
    pixels = noise_images(3, 32)
    ours, timms = (Finder(loaded(m, 32), "keys", True, CPU, **SETTINGS) for m in (backbone, backbone.timm))
    assert torch.allclose(ours.features(pixels), timms.features(pixels), atol=1e-5)
    assert not backbone.timm.blocks[-1].attn.qkv._forward_hooks


@pytest.mark.parametrize("fused", [False, True])
def test_separate_projections_are_read_and_hidden_ones_explained(fused):
    eva = timm.create_model(
        "eva02_tiny_patch14_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=2, num_classes=0,
        qkv_fused=fused,
    ).eval()  # fmt: skip
    assert Finder(loaded(eva, 32), "tokens", True, CPU, **SETTINGS).features(noise_images(1, 32)).shape == (1, 16, 48)
    if fused:  # timm multiplies with these weights without calling the layer
        with pytest.raises(ProposalError, match="keys of vit_nano cannot be read; use features=tokens"):
            Finder(loaded(eva, 32), "keys", True, CPU, **SETTINGS)
    else:
        keys = Finder(loaded(eva, 32), "keys", True, CPU, **SETTINGS).features(noise_images(1, 32))
        assert keys.shape == (1, 16, 48)


@pytest.mark.parametrize("kind", ["keys", "tokens"])
def test_patches_need_not_be_square(kind):
    wide = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=(4, 8), depth=1, num_classes=0).eval()
    finder = Finder(loaded(wide, 32), kind, True, CPU, **SETTINGS)
    assert finder.grid == (8, 4) and finder(noise_images(2, 32)).shape == (2, 8, 4)


def test_a_blank_image_has_no_objects():
    backbone = build_backbone("vit_nano", Needs(), image_sizes=(32,), patch_size=4)
    pixels = noise_images(2, 32)
    pixels[0] = torch.tensor([10, 200, 30])[:, None, None]
    labels = Finder(loaded(backbone, 32), "keys", True, CPU, **SETTINGS)(pixels)
    assert labels[0].max() == 0 and labels[1].max() > 0


@pytest.mark.parametrize("name", ["convnext_nano_lite", "resnet18"])
def test_a_convolutional_backbone_is_refused(name):
    model = build_backbone(name, Needs(), image_sizes=(64,))
    with pytest.raises(ProposalError, match=rf"^{name} is no vision transformer .*use a ViT"):
        Finder(loaded(model, 64, name), "keys", True, CPU, **SETTINGS)


def test_sizes_and_numbers_that_do_not_work_are_explained():
    model = timm.create_model("vit_tiny_patch16_224", patch_size=8, img_size=64, depth=1, dynamic_img_size=True)
    with pytest.raises(ProposalError, match="image_size=60 is not a multiple of the patch size 8 of vit_nano; use 64"):
        Finder(loaded(model, 60), "keys", True, CPU, **SETTINGS)
    model.blocks[0].attn.qkv.weight.data.fill_(torch.nan)
    with pytest.raises(ProposalError, match="not finite"):
        Finder(loaded(model, 64), "keys", True, CPU, **SETTINGS)(noise_images(1, 64))


# ---- the command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """An untrained ViT with 8 x 8 patches of 32 px images, as an export folder."""
    torch.manual_seed(0)
    backbone = build_backbone(
        "vit_nano", Needs(), image_sizes=(32,), patch_size=4, embed_dim=32, depth=2, num_heads=2
    ).eval()
    folder = tmp_path_factory.mktemp("model") / "export"
    return export_backbone(backbone, folder, mean=MEAN, std=STD, image_size=32, card={"backbone": "vit_nano"})


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Two shards of five scenes each."""
    monkeypatch.setattr("selfsight.data.scenes.PER_SHARD", 5)
    return write_scenes(tmp_path / "data", "train", size=32, count=10, workers=1)


def run(export, *overrides):
    words = [f"checkpoint={export}", "num_workers=0", "batch_size=4", "device=cpu", *overrides]
    return proposals(config.load("proposals", words))


def on(pattern, out):
    return ["data=shards", f"data.train={pattern}", f"out={out}"]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def maps(path):
    """Key -> ids of a side-car, in order."""
    with tarfile.open(path) as tar:
        pngs = {m.name: tar.extractfile(m).read() for m in tar if m.name.endswith(FIELD)}
    return {name.removesuffix(f".{FIELD}"): Image.open(io.BytesIO(data)) for name, data in pngs.items()}


def test_side_cars_have_the_names_and_keys_of_the_data(export, shards, tmp_path):
    report = run(export, *on(shards, tmp_path / "out"))
    source = Shards(shards)
    for path, start in zip(source.paths, (0, 5)):
        found = maps(tmp_path / "out" / path.rpartition("/")[2])
        assert list(found) == [source.key(id) for id in range(start, start + 5)]
        assert {(image.mode, image.size) for image in found.values()} == {("L", (32, 32))}
        assert max(np.asarray(image).max() for image in found.values()) in (1, 2, 3)
    assert (report["written"], report["judged_on"], report["unusable_count"]) == (10, 10, 0)
    assert report["against_objects"]["images"] == 10 and 0 < report["objects_per_image"] <= 3
    assert json.loads((tmp_path / "out/report.json").read_text())["complete"] is True
    with Image.open(tmp_path / "out/overlays.png") as picture:
        assert picture.width > 8 * 112


def test_training_reads_them_in_place_of_the_shards_own(export, shards, tmp_path):
    run(export, *on(shards, tmp_path / "out"))
    source = Shards(shards, objects=str(tmp_path / "out/*.tar"))
    written = maps(tmp_path / "out/train-000001.tar")
    for id in range(5, 10):
        assert np.array_equal(object_map(source.read(id)), np.asarray(written[source.key(id)]))


def test_the_same_command_does_nothing_again(export, shards, tmp_path, monkeypatch):
    first = run(export, *on(shards, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    monkeypatch.setattr(command, "write", None)
    again = run(export, *on(shards, tmp_path / "out"))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again["written"] == 0 and again["against_objects"] == first["against_objects"]


def test_a_stopped_run_goes_on_and_ends_with_the_same_files(export, shards, tmp_path, monkeypatch):
    run(export, *on(shards, tmp_path / "whole"))
    find, calls = Finder.__call__, []

    def stop_in_the_second_shard(self, pixels):
        calls.append(len(pixels))
        if len(calls) > 3:
            raise KeyboardInterrupt
        return find(self, pixels)

    monkeypatch.setattr(Finder, "__call__", stop_in_the_second_shard)
    with pytest.raises(KeyboardInterrupt):
        run(export, *on(shards, tmp_path / "out"))
    assert sorted(contents(tmp_path / "out")) == ["train-000000.tar"]
    assert not list((tmp_path / "out").glob("*.partial"))
    monkeypatch.setattr(Finder, "__call__", find)
    (tmp_path / "out/train-000001.tar.partial").write_bytes(b"\0" * 700)  # as kill -9 leaves it
    assert run(export, *on(shards, tmp_path / "out"))["written"] == 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list((tmp_path / "out").glob("*.partial"))


def test_threads_change_nothing(export, shards, tmp_path):
    run(export, *on(shards, tmp_path / "a"))
    run(export, *on(shards, tmp_path / "b"), "num_workers=3")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_other_settings_are_not_mixed_in(export, shards, tmp_path):
    run(export, *on(shards, tmp_path / "out"))
    with pytest.raises(DataError, match=r"made with tau=0\.15, now it is 0\.3: choose another out="):
        run(export, *on(shards, tmp_path / "out"), "tau=0.3")


def test_other_files_are_not_touched(export, shards, tmp_path):
    with pytest.raises(DataError, match="holds the data itself"):
        run(export, *on(shards, tmp_path / "data"))
    run(export, *on(shards, tmp_path / "out"))
    (tmp_path / "out/train-000001.tar").write_bytes((tmp_path / "out/train-000000.tar").read_bytes())
    with pytest.raises(DataError, match=r"train-000001\.tar has other keys than the data: remove it"):
        run(export, *on(shards, tmp_path / "out"))
    (tmp_path / "out/train-000001.tar").write_bytes((tmp_path / "data/train-000001.tar").read_bytes())
    with pytest.raises(DataError, match="no side-car of object ids"):
        run(export, *on(shards, tmp_path / "out"))


def test_without_out_they_lie_beside_the_shards(export, shards, tmp_path):
    run(export, "data=shards", f"data.train={shards}")
    assert sorted(contents(tmp_path / "data/objects")) == ["train-000000.tar", "train-000001.tar"]


def test_shards_of_one_name_cannot_share_a_folder(tmp_path):
    for name in ("a", "b"):
        write_scenes(tmp_path / name, "train", size=16, count=1, workers=1)
    source = Shards([str(tmp_path / name / "train-000000.tar") for name in ("a", "b")])
    with pytest.raises(DataError, match="equal names in different folders"):
        plan(source, tmp_path / "out")
    assert [car.path.parent.parent.name for car in plan(source, None)] == ["a", "b"]


def picture(path, width, height, pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(width)
    pixels = random.integers(0, 255, (height, width, 3), np.uint8) if pixels is None else pixels
    Image.fromarray(pixels).save(path)


def test_a_folder_with_blank_broken_and_wide_images(export, tmp_path, capsys):
    picture(tmp_path / "in/a/wide.v2.png", 600, 300)
    picture(tmp_path / "in/a/blank.png", 40, 40, np.full((40, 40, 3), 130, np.uint8))
    (tmp_path / "in/a/broken.jpg").write_bytes(b"no image")
    report = run(export, "data=folder", f"data.root={tmp_path / 'in'}", f"out={tmp_path / 'out'}")
    path = tmp_path / "out/objects-000000.tar"
    found = maps(path)
    assert list(found) == ["a/blank", "a/broken", "a/wide_v2"]
    assert np.asarray(found["a/blank"]).max() == 0 and np.asarray(found["a/broken"]).max() == 0
    assert found["a/wide_v2"].size == (256, 128)
    assert set(members(path)["a/broken"]) == {FIELD, WHY}
    assert report["unusable_count"] == 1 and "broken.jpg" in report["unusable"][0]
    assert "1 images could not be used" in capsys.readouterr().out
    assert run(export, "data=folder", f"data.root={tmp_path / 'in'}", f"out={tmp_path / 'out'}")["unusable_count"] == 1


def test_a_place_in_the_map_is_the_place_in_the_image(export, tmp_path, monkeypatch):
    """A Finder that marks bright patches: the map shows where they are in the whole, uncropped image."""
    pixels = np.zeros((80, 240, 3), np.uint8)
    pixels[40:, 180:] = 255
    picture(tmp_path / "in/x.png", 240, 80, pixels)
    bright = torch.nn.AvgPool2d(4)
    monkeypatch.setattr(Finder, "__call__", lambda self, p: (bright(p.float()).mean(1) > 128).byte().numpy())
    run(export, "data=folder", f"data.root={tmp_path / 'in'}", f"out={tmp_path / 'out'}")
    ids = np.asarray(maps(tmp_path / "out/objects-000000.tar")["x"])
    assert np.array_equal(ids, (pixels[..., 0] > 128).astype(np.uint8))


def test_nothing_usable_is_an_error(export, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"no image of .* can be used, the first: .*a\.jpg"):
        run(export, "data=folder", f"data.root={tmp_path / 'in'}", f"out={tmp_path / 'out'}")


def test_what_is_missing_is_said_in_one_sentence(export, tmp_path, capsys):
    assert cli.main(None, ["proposals"]) == 2
    assert "proposals needs checkpoint=" in capsys.readouterr().err
    picture(tmp_path / "in/a.png", 20, 20)
    with pytest.raises(DataError, match="side-cars of a folder need out="):
        run(export, "data=folder", f"data.root={tmp_path / 'in'}")
    with pytest.raises(DataError, match=r"data\.mode=stream cannot be read by number"):
        run(export, "data=shards", "data.train=x.tar", "data.mode=stream")
    with pytest.raises(ConfigError, match=r"tau=2.0: expected a number from -1 to 1"):
        config.load("proposals", ["tau=2"])


def test_a_folders_keys_are_those_that_prepare_gives(tmp_path):
    for name in ("a/1.png", "a/1.jpg"):
        picture(tmp_path / "in" / name, 16, 16)
    source = Folder(tmp_path / "in")
    keys = command._keys(source)
    assert len(set(keys)) == 2 and all(key.startswith("a/1-") for key in keys)


def test_overlays_tint_objects_and_leave_the_rest(export):
    pixels = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    drawn = command.overlay(pixels, np.array([[0, 1], [0, 0]], np.uint8))
    assert torch.allclose(drawn[:, 4:], torch.tensor(100 / 255))
    assert torch.allclose(drawn[:, 2, 4], torch.tensor(command.COLOURS[0]) / 255)  # the border has the full colour
    assert not torch.allclose(drawn[:, 1, 6], drawn[:, 2, 4])


def test_images_that_become_smaller_keep_every_patch():
    data = command.png_of(np.arange(64, dtype=np.uint8).reshape(8, 8), (5, 4000), 256)
    pixels, _ = decode(data, "x", channels=1)
    assert pixels.shape[:2] == (8, 256) and len(np.unique(pixels)) == 64
