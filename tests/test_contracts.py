"""Every objective on every family keeps what docs/contracts.md says: `promises.py` holds what is measured."""

import importlib.util
import json
from pathlib import Path

import pytest

import promises

ROOT = Path(__file__).parents[1]
SAMPLE = ("mae ViT", "glare ViT")  # of the default run, with all contracts
PAIRS = (  # 1 = 2 processes alone, in the same four processes
    "mae ConvNeXt V1", "mae SHViT", "dino ViT drop path", "dino ViT sinkhorn", "ibot ViT", "selfpatch ViT",
    "odis ViT skip", "ijepa ViT", "dmt_jepa ViT", "cim ViT contrast", "dino ViT uniadapter", "dino ViT adaptformer",
    "dino ViT lora", "dino ViT apla", "dino ViT bitfit",
)  # fmt: skip


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return promises.measure(tmp_path_factory.mktemp("sample"), SAMPLE, pairs=PAIRS)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    rest = [name for name in promises.CELLS if name not in SAMPLE]
    return promises.measure(tmp_path_factory.mktemp("all"), rest, promises.VARIANTS)


def broken(found):
    return {contract: result["note"] for contract, result in found.items() if not result["ok"]}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_cells_keeps_every_contract(sample, name):
    assert set(sample[name]) == set(promises.CONTRACTS) and not broken(sample[name])


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_compute_what_one_does(sample, name):
    assert not broken(sample[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in promises.CELLS if n not in SAMPLE])
def test_every_cell_keeps_every_contract(everything, name):
    assert set(everything[name]) == set(promises.CONTRACTS) and not broken(everything[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", promises.VARIANTS)
def test_other_ways_through_the_objectives_do_not_depend_on_processes(everything, name):
    assert not broken(everything[name])


def test_processes_that_see_different_checkpoints_are_told(sample):
    same, different = sample["start"]
    assert same == "" and "process 0 would continue from step 9 and process 1 from step 4" in different
    assert "on a disk that all of them share" in different


def test_the_page_shows_what_was_measured():
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks/contracts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    measured = json.loads((ROOT / "benchmarks/results/contracts.json").read_text())
    assert list(measured["cells"]) == list(promises.CELLS), "run benchmarks/contracts.py again"
    assert module.shown((ROOT / "docs/contracts.md").read_text()) == module.table(measured)
