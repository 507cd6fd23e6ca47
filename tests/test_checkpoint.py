"""Checkpoints: durable, verified, pruned; aliased tensors once; damage falls back to the one before."""

import copy
import json

import pytest
import torch
from torch import nn

from selfsight.training import checkpoint


def save(folder, step, value=None, **kwargs):
    tensors = {"w": torch.full((3,), float(step if value is None else value))}
    return checkpoint.save(folder, step, {"model": tensors, "optim": {}}, {"note": "x"}, **kwargs)


def test_round_trip(tmp_path):
    path = save(tmp_path, 5)
    tensors, meta = checkpoint.load(path)
    assert torch.equal(tensors["w"], torch.full((3,), 5.0))
    assert (meta["step"], meta["note"]) == (5, "x")
    assert (tmp_path / "latest").read_text().strip() == "step-000000005"


def test_only_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep_last=2, best=step == 2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-{s:09d}" for s in (2, 4, 5)]
    assert checkpoint.best(tmp_path).name == "step-000000002"


def test_protected_steps_are_kept_until_they_are_not(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep_last=1, protect={2, 3})
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-{s:09d}" for s in (2, 3, 5)]
    checkpoint.prune(tmp_path, 1, {3})
    assert checkpoint.at_step(tmp_path, 3) and not checkpoint.at_step(tmp_path, 2)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest", "unfinished"])
def test_damage_falls_back_to_the_one_before(tmp_path, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(data[:-4])
    elif damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        (path / "MANIFEST.json").write_text("{")
    else:
        (path / "MANIFEST.json").unlink()
    if damage == "unfinished":
        found = checkpoint.newest(tmp_path)
    else:
        with pytest.warns(UserWarning, match="is damaged .* falling back"):
            found = checkpoint.newest(tmp_path)
    assert found.name == "step-000000001"


def spoil(path):
    (path / "model.safetensors").write_bytes(b"")


def test_a_damaged_checkpoint_never_takes_the_place_of_a_good_one(tmp_path):
    save(tmp_path, 4)
    spoil(save(tmp_path, 10))
    with pytest.warns(UserWarning, match=r"step-000000010 is damaged .* falling back to the one before it"):
        assert checkpoint.newest(tmp_path).name == "step-000000004"
    (said,) = checkpoint.set_aside(tmp_path, 4)
    assert "step-000000010 is damaged (model.safetensors has 0 bytes" in said and "damaged-step-000000010" in said
    save(tmp_path, 6, keep_last=1)
    assert {p.name for p in tmp_path.glob("*step-*")} == {"step-000000006", "damaged-step-000000010"}
    assert checkpoint.newest(tmp_path).name == "step-000000006"
    save(tmp_path, 10, keep_last=1)  # now it is there again
    assert {p.name for p in tmp_path.glob("*step-*")} == {"step-000000010"}


def test_a_good_checkpoint_is_never_set_aside(tmp_path):
    for step in (4, 10):
        save(tmp_path, step)
    assert not checkpoint.set_aside(tmp_path, 4) and checkpoint.newest(tmp_path).name == "step-000000010"


def test_a_run_does_not_begin_anew_when_all_checkpoints_are_damaged(tmp_path):
    for step in (1, 2):
        spoil(save(tmp_path, step))
    both = r"step-000000002 is damaged \(.*step-000000001 is damaged \(.*or here after removing them"
    with pytest.raises(checkpoint.CheckpointError, match=both):
        checkpoint.newest(tmp_path, refuse=True)
    with pytest.warns(UserWarning, match="no other can be used"):
        assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "nothing", refuse=True) is None


def test_a_failed_write_leaves_the_earlier_one_and_no_rubbish(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert checkpoint.newest(tmp_path).name == "step-000000001"


def test_what_a_killed_writer_left_is_cleaned(tmp_path):
    (tmp_path / ".tmp-step-000000003-1").mkdir()
    (tmp_path / ".trash-step-000000001-1").mkdir()
    (tmp_path / ".tmp-latest-1").write_text("step-00")
    save(tmp_path, 2)
    checkpoint.clean(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"step-000000002", "latest"}


@pytest.mark.parametrize(
    ("marked", "scores", "best"),
    [
        (None, {1: 20.0, 2: 30.0, 3: 30.0}, 2),  # the first of the best
        (1, {1: 20.0, 2: 30.0}, 2),
        (2, {1: 30.0, 2: 30.0}, 2),
        (3, {1: 20.0, 2: 30.0}, 3),  # its row was not written
        (2, {2: 20.0, 9: 30.0}, 2),  # the better one is gone
        (9, {1: 10.0, 2: 20.0, 9: 30.0}, 2),
        (1, {1: 10.0, 2: 20.0, 9: 30.0}, 2),
        (None, {}, None),
    ],
)
def test_the_newest_and_the_best_are_named_again(tmp_path, marked, scores, best):
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=3)
    if marked:
        checkpoint.mark_best(tmp_path, marked)
    (tmp_path / "latest").write_text("step-000000002")
    checkpoint.settle(tmp_path, 3, scores)
    assert (tmp_path / "latest").read_text() == "step-000000003\n"
    assert checkpoint.best(tmp_path) == (best and tmp_path / f"step-{best:09d}")


def test_shared_tensors_are_stored_once_and_come_back(tmp_path):
    student = nn.Linear(2, 2)
    pair = nn.ModuleDict({"student": student, "teacher": nn.Linear(2, 2)})
    pair["teacher"].weight = student.weight
    state = checkpoint.unique_state(pair)
    assert set(state) == {"student.weight", "student.bias", "teacher.bias"}
    other = copy.deepcopy(pair)
    with torch.no_grad():
        for p in pair.parameters():
            p.add_(1)
    checkpoint.save(tmp_path, 1, {"model": state}, {})
    checkpoint.load_unique_state(other, checkpoint.load(checkpoint.newest(tmp_path))[0])
    assert torch.equal(other["teacher"].weight, pair["student"].weight)


def test_a_checkpoint_of_another_model_is_refused_with_names():
    with pytest.raises(checkpoint.CheckpointError, match=r"1 missing \['bias'\].*1 left over \['extra'\]"):
        checkpoint.load_unique_state(nn.Linear(2, 2), {"weight": torch.zeros(2, 2), "extra": torch.zeros(1)})


def test_another_format_is_refused(tmp_path):
    path = save(tmp_path, 1)
    meta = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(checkpoint.CheckpointError, match="format 99"):
        checkpoint.load(path)
