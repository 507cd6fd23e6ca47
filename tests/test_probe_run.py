"""`probe` and `export` of a run folder: the run's own data, and the checkpoint that was asked for."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import runs
from selfsight import config
from selfsight.interop.export import ExportError, export, find_checkpoint, read_card
from selfsight.probes import ProbeError, task
from selfsight.probes import run as probes
from selfsight.probes.run import Loaded, load_backbone, probe
from selfsight.training import checkpoint, judge


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 4 steps on a folder with two classes; steps 2, 3 and 4 are kept, 3 is marked best."""
    root = tmp_path_factory.mktemp("probed")
    for i in range(40):
        path = root / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    data = ("data=folder", f"data.root={root / 'images'}")
    often = ("checkpoint.every_n_steps=1", "checkpoint.keep_last=3", "knn.every_n_steps=4", "optim.base_lr=0.1")
    runs.run_here(root / "run", "max_steps=4", *data, *often, without=("data.num_train", "data.num_val"))
    (root / "run" / "checkpoints" / "best").write_text("step-000000003\n")
    return root / "run"


def settings(run, *words):
    return config.load("probe", [f"checkpoint={run}", "num_workers=0", "device=cpu", *words])


def test_a_run_is_probed_on_its_own_data_unless_told_otherwise(run, capsys):
    result = probe(settings(run))
    assert str(run.parent / "images") in result["data"]["train"] and result["step"] == 4
    assert result["settings"]["data"]["root"] == str(run.parent / "images")
    assert "as in training" in capsys.readouterr().out
    other = probe(settings(run, "data=scenes", "data.num_train=40", "data.num_val=10"))
    assert "scenes" in other["data"]["train"]


def test_the_best_checkpoint_is_probed_and_written_beside_the_last(run):
    result = probe(settings(run, "step=best"))
    assert "the checkpoint chosen by k-NN on the validation images of its run" in result["protocol"]
    assert any("best k-NN on the run's own validation images" in warning for warning in result["warnings"])
    assert result["step"] == 3
    assert json.loads((run / "probes" / "best" / "knn.json").read_text())["step"] == 3


def test_a_step_is_exported_with_its_weights(run, tmp_path):
    for step, number in (("best", 3), ("2", 2), ("last", 4)):
        out = tmp_path / step
        assert export(config.load("export", [f"checkpoint={run}", f"out={out}", f"step={step}"]))["step"] == number
        kept = load_file(run / "checkpoints" / f"step-{number:09d}" / "model.safetensors")
        assert torch.equal(load_file(out / "model.safetensors")["cls_token"], kept["student.timm.cls_token"])
        assert read_card(out)["steps"] == number


def test_a_step_that_is_not_kept_names_those_that_are(run, tmp_path):
    with pytest.raises(ExportError, match=r"no checkpoint step=1; it keeps 2, 3, 4, and step=last"):
        probe(settings(run, "step=1"))
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "checkpoints" / "best").unlink()
    with pytest.raises(ExportError, match=r"no checkpoint step=best: k-NN was not measured, or checkpoint\.keep_best"):
        probe(settings(tmp_path / "copy", "step=best"))
    file = tmp_path / "copy" / "checkpoints" / "step-000000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ExportError, match=r"step-000000002 is damaged .*choose another step=3, 4$"):
        probe(settings(tmp_path / "copy", "step=2"))


@pytest.mark.filterwarnings("ignore:.* is damaged")
def test_a_damaged_checkpoint_without_another_is_a_sentence_on_what_to_do(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    for number in (2, 3):
        shutil.rmtree(tmp_path / "copy" / "checkpoints" / f"step-{number:09d}")
    file = tmp_path / "copy" / "checkpoints" / "step-000000004" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    ways = [rf"use {tmp_path}/copy/export, the model of step 4, or bring", "bring back a copy of it, or train again in"]
    for way in ways:
        for step in (4, "last"):
            with pytest.raises(ExportError, match=rf"step-000000004 is damaged .*; no other is left: {way}"):
                find_checkpoint(tmp_path / "copy", step)
        shutil.rmtree(tmp_path / "copy" / "export", ignore_errors=True)


def test_a_timm_model_has_no_steps_and_no_data_of_its_own(run):
    with pytest.raises(ProbeError, match="step=best chooses a checkpoint of a run folder, and resnet18 is none"):
        load_backbone("resnet18", step="best")
    unknown = Loaded(torch.nn.Identity(), (0.5,) * 3, (0.25,) * 3, 32, 1.0, {})
    assert probes.choose_data(settings("resnet18"), unknown).name == "scenes"


@pytest.mark.parametrize(("words", "workers"), [(("num_workers=0",), 0), (("num_workers=3",), 3)])
def test_the_number_of_workers_is_taken_as_given(run, monkeypatch, words, workers):
    class Seen(Exception):
        pass

    def plan(*_, how, **__):
        raise Seen(how.workers)

    monkeypatch.setattr(task, "plan", plan)
    with pytest.raises(Seen, match=f"^{workers}$"):
        probe(settings(run, *words))


def test_the_newest_usable_checkpoint_is_the_last_one(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "export")
    newest = checkpoint.newest(tmp_path / "copy" / "checkpoints")
    (newest / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged"):
        assert load_backbone(str(tmp_path / "copy")).facts["step"] == 3


def test_an_interrupted_run_with_batch_norm_exports_statistics_of_unmasked_images(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "BATCHNORM_IMAGES", 16)
    words = ("backbone=shvit_nano_lite", "image_size=128", "batch_size=4", "max_steps=2", "data.num_train=16")
    folder = tmp_path / "run"
    runs.run_here(folder, *words, "knn.every_n_steps=0", without=("image_size", "batch_size", "data.num_train"))
    finished = load_file(folder / "export" / "model.safetensors")
    for name in ("export", "summary.json", "report.html"):  # as if it had been ended before its export
        shutil.rmtree(folder / name) if name == "export" else (folder / name).unlink()
    export(config.load("export", [f"checkpoint={folder}", f"out={tmp_path / 'out'}"]))
    late = load_file(tmp_path / "out" / "model.safetensors")
    runs.assert_identical(finished, late)
    kept = load_file(checkpoint.newest(folder / "checkpoints") / "model.safetensors")
    moved = {k for k in late if not torch.equal(late[k], kept[f"student.timm.{k}"])}
    assert moved and all(k.endswith(("running_mean", "running_var", "num_batches_tracked")) for k in moved)
