"""Data damaged in hundreds of ways: never a crash, never a hang, and nothing is lost without a word (see `fuzz`)."""

import pytest

import fuzz
from kill_driver import count
from selfsight.data.folder import Folder
from selfsight.data.manifest import Shards
from selfsight.data.source import DataError, SampleError

FEW, MANY = 3 * len(fuzz.WAYS), 60 * len(fuzz.WAYS)


def cases(first, last, tmp_path):
    """Run the cases of these seeds and return the sums; all that fail are told together."""
    found, failed = [], []
    for seed in range(first, last):
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            found.append(fuzz.run(seed, folder))
        except Exception as error:
            failed.append(
                f"seed {seed}, {fuzz.WAYS[seed % len(fuzz.WAYS)]}: {type(error).__name__}: {str(error)[:300]}"
            )
    assert not failed, f"{len(failed)} of {last - first}:\n" + "\n".join(failed[:40])
    sums = fuzz.totals(found)
    assert sums["samples listed"] == sums["read"] + sums["counted as bad"]
    assert all(sums.values()), sums  # refusals, good and bad samples: all of them happen
    count("corruptions tried", sums["cases"])
    count("corrupt data sets refused by a sentence", sums["refused"])
    count("samples of corrupt data sets read", sums["read"])
    count("samples of corrupt data sets counted as bad", sums["counted as bad"])
    return sums


def test_damaged_data_never_crash_hang_or_get_lost(tmp_path):
    assert cases(0, FEW, tmp_path)["cases"] == FEW


@pytest.mark.slow
def test_hundreds_of_damages_never_crash_hang_or_get_lost(tmp_path):
    assert cases(FEW, MANY, tmp_path)["cases"] == MANY - FEW


def test_a_pipe_in_place_of_a_shard_is_refused_at_once(tmp_path):
    import os

    os.mkfifo(tmp_path / "a.tar")
    for path in (tmp_path / "a.tar", "/dev/zero"):
        with fuzz.limited(), pytest.raises(DataError, match=f"{path} is no regular file"):
            Shards(str(path), tmp_path / "index")


def test_a_file_beyond_the_limit_is_a_bad_sample_and_not_read(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate((1 << 30) + 1)  # a hole: no disk is used
    with fuzz.limited(), pytest.raises(SampleError, match=r"a\.jpg: the file has 1,073,741,825 bytes, more than"):
        Folder(tmp_path, tmp_path / "index").read(0)
