"""The doctor: a line per check, a remedy with every warning, exit code 1 when something would fail."""

import io
import sys
import types
from collections import namedtuple
from pathlib import Path

import pytest

from selfsight import config, doctor
from selfsight.data.source import DataError, Raw

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def home(monkeypatch, tmp_path):
    """No login and a cache of its own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return tmp_path


class Source:
    labelled, classes, describe = True, ["cat", "dog"], "two classes"

    def __init__(self, image=None):
        from PIL import Image

        buffer = io.BytesIO()
        Image.new("RGB", (20, 10)).save(buffer, "JPEG")
        self.image = buffer.getvalue() if image is None else image

    def __len__(self):
        return 100

    def read(self, i):
        return Raw(key=str(i), image=self.image, label=0, where=f"sample {i}")


def look(monkeypatch, opened):
    monkeypatch.setattr("selfsight.data.open_source", opened)
    return list(doctor.check_data(types.SimpleNamespace(name="folder")))


def test_a_healthy_machine_exits_with_0(home, capsys):
    assert doctor.doctor(config.load("doctor", [f"run_dir={home}/runs"])) == 0
    out = capsys.readouterr().out
    for what in ("python", "packages", "device", "precision", "cores", "decode", "run folder", "cache", "wandb"):
        assert f"  {what}  " in out
    assert "0 would fail" in out
    assert not (home / "runs").exists()


def test_something_that_would_fail_exits_with_1(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "checks", lambda cfg: iter([doctor.Check("ok", "a", "x"), doctor.Check("fail", "b", "y")])
    )
    assert doctor.doctor(None) == 1
    assert "fail  b" in capsys.readouterr().out


def test_an_unsupported_python_fails(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    assert next(doctor.check_versions()).level == "fail"


def test_a_missing_package_fails(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no-such-package"))
    last = list(doctor.check_versions())[-1]
    assert (last.level, "no-such-package" in last.found) == ("fail", True)


def test_more_workers_than_cores_is_a_warning():
    (check,) = doctor.check_cores(10_000)
    assert check.level == "warn"
    assert "use num_workers=" in check.found


def test_data_that_opens(monkeypatch):
    train, _ = look(monkeypatch, lambda data, split: Source())
    assert train.level == "ok"
    assert all(words in train.found for words in ("100 images", "labels in 2 classes", "20x10", "two classes"))


def test_a_split_that_is_not_there_is_left_out(monkeypatch):
    found = look(monkeypatch, lambda data, split: Source() if split == "train" else None)
    assert [check.what for check in found] == ["data train"]


def test_data_that_does_not_open_fails_with_its_sentence(monkeypatch):
    def opened(data, split):
        raise DataError("/d/x does not exist")

    assert look(monkeypatch, opened)[0] == ("fail", "data train", "/d/x does not exist")


def test_an_image_that_does_not_decode_fails(monkeypatch):
    assert look(monkeypatch, lambda data, split: Source(b"no image"))[0].level == "fail"


@pytest.mark.parametrize(("free", "level"), [(0.1, "fail"), (2, "warn"), (100, "ok")])
def test_room_for_runs(home, monkeypatch, free, level):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(1, 0, free * doctor.GB))
    assert [check.level for check in doctor.check_disks(home / "a" / "b")] == [level, level]


def test_a_folder_that_cannot_be_written_fails(home, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    first = next(doctor.check_disks(home))
    assert first.level == "fail"
    assert "run_dir=" in first.found


def test_small_shared_memory_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 0))
    (check,) = doctor.check_shared_memory(tmp_path)
    assert check.level == "warn"
    assert "--shm-size" in check.found
    assert list(doctor.check_shared_memory(Path("/no/such/folder"))) == []


def test_wandb_login_is_seen(home, monkeypatch):
    assert "no login" in next(doctor.check_wandb()).found
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert next(doctor.check_wandb()).found == "logged in"
