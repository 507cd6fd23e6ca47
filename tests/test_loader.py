"""Batches by position: independent of workers, ranks and micro-batches; bad samples are replaced, counted, limited."""

import io
import json

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

import runs
from drawn import png
from selfsight.data.folder import Folder
from selfsight.data.loader import Positions, Samples, StreamBatches, make_loader
from selfsight.data.manifest import Shards
from selfsight.data.order import Order
from selfsight.data.source import DataError, SampleError
from selfsight.data.stream import Stream
from selfsight.training.loop import RunStopped
from selfsight.views.objects import Region, patches
from selfsight.views.photo import prepare
from selfsight.views.place import AroundObject
from selfsight.views.spec import Cells, Crop, Views

VIEWS = Views((Crop("global", 2, 16, (0.3, 1.0)), Crop("local", 3, 8, (0.05, 0.3))))


def jpeg(i: int, size=(40, 30)) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def shard(path, n=30, bad=()):
    with wds.TarWriter(str(path)) as writer:
        for i in range(n):
            data = b"\xff\xd8 broken" if i in bad else jpeg(i)
            writer.write({"__key__": f"s{i:04d}", "jpg": data, "cls": str(i % 3)})
    return str(path)


@pytest.fixture
def samples(tmp_path):
    source = Shards(shard(tmp_path / "a.tar"))
    return Samples(source, Order(0, source.lengths), VIEWS, seed=0)


def flat(batch):
    return {
        **{k: batch[k] for k in ("key", "id", "position", "label", "sizes")},
        **{f"crops/{k}": v for k, v in batch["crops"].items()},
        **{f"boxes/{k}": v for k, v in batch["boxes"].items()},
    }


def joined(batches):
    """Batches side by side along the sample axis."""
    parts = [flat(b) for b in batches]
    return {k: torch.cat([p[k] for p in parts], dim=1 if "/" in k else 0) for k in parts[0]}


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def test_shapes_and_boxes(samples):
    batch = samples[range(4)]
    assert batch["crops"]["global"].shape == (2, 4, 3, 16, 16)
    assert batch["crops"]["local"].shape == (3, 4, 3, 8, 8)
    boxes = batch["boxes"]["local"]
    assert (boxes[..., 2] > boxes[..., 0]).all()
    assert (boxes[..., 2] <= 40).all()
    assert batch["label"].tolist() == [int(i) % 3 for i in batch["id"]]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_stream_does_not_depend_on_workers(samples, workers):
    whole = joined([samples[range(0, 24)]])
    loader = make_loader(samples, Positions(0, 3, 8, 1, 0, 1), workers, pin_memory=False)
    assert same(whole, joined(list(loader)))


@pytest.mark.parametrize(("world", "micro"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_take_slices_of_the_same_global_batch(samples, world, micro):
    whole = samples[range(8, 16)]
    parts = [list(Positions(1, 2, 8, micro, rank, world)) for rank in range(world)]
    order = [parts[rank][m] for m in range(micro) for rank in range(world)]
    assert same(flat(whole), joined([samples[r] for r in order]))


def test_an_uneven_batch_is_refused():
    with pytest.raises(ValueError, match="batch_size=8 does not divide into 1 micro-batches on 3 processes"):
        Positions(0, 1, 8, 1, 0, 3)


def test_a_bad_sample_is_replaced_by_a_pure_function_and_reported(tmp_path):
    source = Shards(shard(tmp_path / "a.tar", bad=(5, 11)))
    samples = Samples(source, Order(0, source.lengths), VIEWS, seed=0)
    batch = samples[range(30)]
    assert {e.id for e in batch["events"]} >= {5, 11}
    assert "a.tar" in batch["events"][0].where
    assert not set(batch["id"].tolist()) & {5, 11}
    again = [samples[range(i, i + 5)] for i in range(0, 30, 5)]
    assert same(flat(batch), joined(again))


def test_a_source_of_nothing_but_bad_samples_raises_with_the_name(tmp_path):
    source = Shards(shard(tmp_path / "a.tar", n=4, bad=range(4)))
    with pytest.raises(SampleError, match=r"a\.tar.*s000"):
        Samples(source, Order(0, source.lengths), VIEWS, seed=0)[range(2)]


def test_a_run_skips_bad_samples_counts_and_lists_them(tmp_path):
    pattern = shard(tmp_path / "a.tar", n=40, bad=(3,))
    summary = runs.run_here(
        tmp_path / "r", "data=shards", f"data.train={pattern}", "max_steps=6", "knn.every_n_steps=0",
        without=("data.num_train", "data.num_val"),
    )  # fmt: skip
    assert summary["bad_samples"] == 1
    lines = [json.loads(x) for x in (tmp_path / "r" / "skipped.jsonl").read_text().splitlines()]
    assert [x["id"] for x in lines] == [3]
    assert "s0003" in lines[0]["where"]


def test_a_run_stops_when_too_many_samples_are_bad(tmp_path):
    pattern = shard(tmp_path / "a.tar", n=64, bad=range(0, 64, 2))
    with pytest.raises(RunStopped, match=r"more than the limit of 8 .*skipped\.jsonl") as stopped:
        runs.run_here(
            tmp_path / "r", "data=shards", f"data.train={pattern}", "max_steps=20", "knn.every_n_steps=0",
            without=("data.num_train", "data.num_val"),
        )  # fmt: skip
    assert stopped.value.code == 3


def test_fewer_samples_than_a_batch_names_the_numbers(tmp_path):
    pattern = shard(tmp_path / "a.tar", n=5)
    with pytest.raises(DataError, match=r"5 samples, fewer than one batch of 8; use batch_size=4 or less"):
        runs.run_here(
            tmp_path / "r", "data=shards", f"data.train={pattern}", "max_steps=2",
            without=("data.num_train", "data.num_val"),
        )  # fmt: skip
    assert not (tmp_path / "r").exists()


def test_unlabelled_images_in_a_folder_train_and_export(tmp_path, capsys):
    (tmp_path / "pile" / "deep").mkdir(parents=True)
    for i in range(12):
        Image.open(io.BytesIO(jpeg(i))).save(tmp_path / "pile" / ("deep" if i % 2 else "") / f"{i}.png")
    for name in ("a.raw", "b.raw", ".c"):
        (tmp_path / "pile" / name).touch()
    assert not Folder(str(tmp_path / "pile")).labelled
    summary = runs.run_here(
        tmp_path / "r", "data=folder", f"data.root={tmp_path / 'pile'}", "max_steps=2", "knn.every_n_steps=2",
        without=("data.num_train", "data.num_val"),
    )  # fmt: skip
    assert "left out    3 other files are not read, e.g. 2 .raw" in capsys.readouterr().out
    assert summary["knn"] is None
    assert summary["rankme"] > 0
    assert (tmp_path / "r" / "export" / "model.safetensors").exists()


def test_a_stream_fills_batches_with_distinct_keys(tmp_path):
    stream = Stream(shard(tmp_path / "a.tar", bad=(4,)), shuffle=5)
    reader = iter(StreamBatches(stream, VIEWS, 0, 8, start=0))
    batches = [next(reader) for _ in range(4)]
    keys = torch.cat([b["key"] for b in batches])
    assert len(keys.unique()) == 32
    assert sum(len(b["events"]) for b in batches) >= 1
    assert batches[0]["crops"]["global"].shape == (2, 8, 3, 16, 16)


def test_a_stream_trains_and_says_that_it_is_not_exactly_resumable(tmp_path, capsys):
    pattern = shard(tmp_path / "a.tar")
    summary = runs.run_here(
        tmp_path / "r", "data=shards", "data.mode=stream", f"data.train={pattern}", "max_steps=2",
        without=("data.num_train", "data.num_val"),
    )  # fmt: skip
    assert "not exactly resumable" in capsys.readouterr().out
    assert summary["steps"] == 2
    assert summary["knn"] is None


# --- crops around an object ------------------------------------------------------------------------------------------

AROUND = Views(VIEWS.crops, AroundObject(), (Cells("global", (4, 4)),))


def ids_of(i: int, size=(40, 30)) -> np.ndarray:
    """One object: a third of the image, on even pixels, so that a mask of half the size is exact."""
    ids, (y, x) = np.zeros(size, np.uint8), (4 + 2 * (i % 5), 2 + 2 * (i % 4))
    ids[y : y + 20, x : x + 18] = 1 + i % 3
    return ids


def shard_with_objects(path, n=24, without=(), bad=(), size=(40, 30)) -> Shards:
    """Images that are white where their object is; every mask is half as large as its image."""
    with wds.TarWriter(str(path)) as writer:
        for i in range(n):
            ids = ids_of(i, size)
            member = {"__key__": f"s{i:04d}", "jpg": png(np.repeat((ids[..., None] > 0) * np.uint8(255), 3, 2))}
            if i not in without:
                member["objects.png"] = b"broken" if i in bad else png(ids[::2, ::2])
            writer.write(member)
    return Shards(str(path))


def with_cells(batch):
    return flat(batch) | {"has_object": batch["has_object"], "cells/global": batch["cells"]["global"]}


def test_patches_of_the_object_are_where_the_pixels_say_flips_included(tmp_path):
    source = shard_with_objects(tmp_path / "a.tar", without=(2, 7))
    batch = Samples(source, Order(0, source.lengths), AROUND, seed=0)[range(24)]
    assert batch["has_object"].tolist() == [id not in (2, 7) for id in batch["id"].tolist()]
    done = prepare(batch, AROUND, torch.zeros(3), torch.ones(3))
    shares = torch.nn.functional.avg_pool2d(done["images"]["global"][:, :, 0], 4)
    cells, has = done["cells"]["global"], batch["has_object"]
    assert cells.dtype == torch.uint8 and cells.shape == (2, 24, 4, 4) and not cells[:, ~has].any()
    clear = (shares - 0.25).abs() > 0.15  # the resize blurs edges
    assert clear[:, has].float().mean() > 0.7
    assert torch.equal(cells[:, has].bool()[clear[:, has]], (shares[:, has] > 0.25)[clear[:, has]])
    assert not torch.equal(cells, batch["cells"]["global"])  # some were mirrored


def test_patches_follow_the_boxes_that_were_cut_after_a_reduced_decoding(tmp_path):
    path, size = tmp_path / "a.tar", (443, 331)
    ids = np.zeros((64, 48), np.uint8)
    ids[11:41, 9:33] = 1
    with wds.TarWriter(str(path)) as writer:
        for i in range(12):
            writer.write({"__key__": f"s{i:04d}", "jpg": jpeg(i, size), "objects.png": png(ids)})
    source = Shards(str(path))
    batch = Samples(source, Order(0, source.lengths), AROUND, seed=0)[range(12)]
    boxes = batch["boxes"]["global"].numpy()
    assert (boxes % 8 == 0).all()  # moved onto pixels of an image of an eighth of the size
    for v, b in np.ndindex(2, 12):
        mine = patches(Region(ids, 1), boxes[v, b], *size, AROUND.cells[0])
        assert mine.tolist() == batch["cells"]["global"][v, b].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_objects_do_not_depend_on_workers(tmp_path, workers):
    source = shard_with_objects(tmp_path / "a.tar", without=(3,), bad=(5,))
    samples = Samples(source, Order(0, source.lengths), AROUND, seed=0)
    loader = make_loader(samples, Positions(0, 3, 8, 1, 0, 1), workers, pin_memory=False)
    parts = [with_cells(b) for b in loader]
    whole = with_cells(samples[range(24)])
    assert same(whole, {k: torch.cat([p[k] for p in parts], dim=1 if "/" in k else 0) for k in whole})


def test_a_malformed_mask_is_a_bad_sample_of_objectives_that_need_it(tmp_path):
    source = shard_with_objects(tmp_path / "a.tar", bad=(5,))
    order = Order(0, source.lengths)
    batch = Samples(source, order, AROUND, seed=0)[range(24)]
    assert [(e.id, e.why) for e in batch["events"]] == [(5, "objects.png is no PNG image")]
    assert "a.tar, key s0005" in batch["events"][0].where and 5 not in batch["id"].tolist()
    plain = Samples(source, order, VIEWS, seed=0)[range(24)]
    assert not plain["events"] and "cells" not in plain and "has_object" not in plain


def test_another_number_of_processes_continues_with_the_samples_that_are_left():
    """1 process, then 3, then 2: each position is met once, in the step that it belongs to."""
    for first, stop, world, micro in ((0, 2, 1, 2), (2, 4, 3, 2), (4, 5, 2, 1)):
        ranks = [list(Positions(first, stop, 12, micro, rank, world)) for rank in range(world)]
        for step in range(first, stop):
            parts = [r[(step - first) * micro : (step - first + 1) * micro] for r in ranks]
            assert sorted(p for mine in parts for part in mine for p in part) == list(range(12 * step, 12 * step + 12))
