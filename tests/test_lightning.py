"""The trainer: devices and precisions that this machine does not have are refused in one sentence."""

import warnings

import pytest
import torch

from selfsight import config
from selfsight.config import ConfigError
from selfsight.training.lightning import make_trainer


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("trainer.accelerator=gpu",), r"1 GPU\(s\) are asked for and 0 can be seen: use trainer.accelerator=cpu"),
        (("trainer.accelerator=gpu", "trainer.devices=2"), r"2 GPU\(s\) are asked for and 0 can be seen"),
        (("trainer.precision=16-mixed",), r"16-mixed needs a GPU: use bf16-mixed or 32 on a CPU"),
        (("trainer.precision=16-mixed", "trainer.accelerator=cpu"), r"16-mixed needs a GPU"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(no_gpu, words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make_trainer(config.load("train", list(words)), [])


def test_more_gpus_than_there_are_names_their_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ConfigError, match=r"4 GPU\(s\) are asked for and 3 can be seen: use trainer.devices=3"):
        make_trainer(config.load("train", ["trainer.accelerator=gpu", "trainer.devices=4"]), [])


def test_a_machine_with_slurm_is_no_job(tmp_path, monkeypatch):
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        make_trainer(config.load("train", ["trainer.accelerator=cpu"]), [])
    assert not [w for w in said if "srun" in str(w.message)]
