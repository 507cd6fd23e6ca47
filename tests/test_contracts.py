"""Every objective on every family keeps what docs/contracts.md says: `promises.py` holds what is measured."""

import json
from pathlib import Path

import pytest

import promises

ROOT = Path(__file__).parents[1]
SAMPLE = ("mae ViT",)  # of the default run, with all contracts
MORE = ("dino ViT lora", "ijepa ConvNeXt V1", "glare SHViT")  # of the slow run
WAYS = ("ibot ViT dinov2", "glare ConvNeXt V1 mask")
PAIRS = (  # 1 = 2 processes alone, in the same four processes
    "mae ConvNeXt V1", "mae SHViT", "dino ViT drop path", "dino ViT sinkhorn", "ibot ViT", "selfpatch ViT",
    "odis ViT skip", "ijepa ViT", "dmt_jepa ViT", "cim ViT contrast", "glare ViT",
    "dino ViT uniadapter", "dino ViT lora",
)  # fmt: skip


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return promises.measure(tmp_path_factory.mktemp("sample"), SAMPLE, pairs=PAIRS)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return promises.measure(tmp_path_factory.mktemp("more"), MORE, WAYS)


def broken(found):
    return {contract: result["note"] for contract, result in found.items() if not result["ok"]}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_cells_keeps_every_contract(sample, name):
    assert set(sample[name]) == set(promises.CONTRACTS) and not broken(sample[name])


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_compute_what_one_does(sample, name):
    assert not broken(sample[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_a_larger_sample_keeps_every_contract(more, name):
    assert set(more[name]) == set(promises.CONTRACTS) and not broken(more[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_other_ways_through_the_objectives_do_not_depend_on_processes(more, name):
    assert not broken(more[name])


def test_processes_that_see_different_checkpoints_are_told(sample):
    same, different = sample["start"]
    assert same == "" and "process 0 would continue from step 9 and process 1 from step 4" in different
    assert "on a disk that all of them share" in different


def test_all_cells_have_been_measured_and_none_is_broken():
    measured = json.loads((ROOT / "benchmarks/results/contracts.json").read_text())
    assert list(measured["cells"]) == list(promises.CELLS), "run benchmarks/contracts.py again"
    assert list(measured["variants"]) == list(promises.VARIANTS), "run benchmarks/contracts.py again"
    assert not [name for cells in (measured["cells"], measured["variants"]) for name in cells if broken(cells[name])]
