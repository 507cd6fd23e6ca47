"""Every objective on every family keeps what docs/contracts.md says: `promises.py` holds what is measured."""

import json
from pathlib import Path

import pytest

import promises

ROOT = Path(__file__).parents[1]
CELLS = ("mae ViT", "dino ViT lora", "ijepa ConvNeXt V1", "glare SHViT")  # with all contracts
WAYS = ("ibot ViT dinov2", "glare ConvNeXt V1 mask")
PAIRS = (  # 1 = 2 processes alone; of the default run
    "mae ViT", "mae ConvNeXt V1", "mae SHViT", "dino ViT drop path", "dino ViT sinkhorn", "ibot ViT", "selfpatch ViT",
    "odis ViT skip", "ijepa ViT", "dmt_jepa ViT", "cim ViT contrast", "glare ViT",
    "dino ViT uniadapter", "dino ViT lora",
)  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return promises.measure(tmp_path_factory.mktemp("pairs"), (), pairs=PAIRS)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return promises.measure(tmp_path_factory.mktemp("cells"), CELLS, WAYS)


def broken(found):
    return {contract: result["note"] for contract, result in found.items() if not result["ok"]}


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_compute_what_one_does(pairs, name):
    assert not broken(pairs[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_a_sample_of_cells_keeps_every_contract(cells, name):
    assert set(cells[name]) == set(promises.CONTRACTS) and not broken(cells[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_other_ways_through_the_objectives_do_not_depend_on_processes(cells, name):
    assert not broken(cells[name])


def test_processes_that_see_different_checkpoints_are_told(pairs):
    same, different = pairs["start"]
    assert same == "" and "process 0 would continue from step 9 and processes 1, 2, 3 from step 4" in different
    assert "on a disk that all of them share" in different


def test_all_cells_have_been_measured_and_none_is_broken():
    measured = json.loads((ROOT / "benchmarks/results/contracts.json").read_text())
    assert list(measured["cells"]) == list(promises.CELLS), "run benchmarks/contracts.py again"
    assert list(measured["variants"]) == list(promises.VARIANTS), "run benchmarks/contracts.py again"
    assert not [name for cells in (measured["cells"], measured["variants"]) for name in cells if broken(cells[name])]
