"""Long runs: neither memory nor open files nor threads grow with the steps, in no process."""

import multiprocessing
import os
from pathlib import Path

import pytest

import runs
from kill_driver import count
from selfsight.training.loop import AfterStep

FIRST, LAST = 100, 300
MEGABYTES = 3.0  # a batch that is kept in every step would be 5 in 200 steps, as bytes
FILES, THREADS = 50, 5  # what is under way differs


def held() -> list[tuple[float, int, int]]:
    """MB of memory, open files and threads of this process and of its loader processes."""
    page = os.sysconf("SC_PAGE_SIZE") / 1e6
    found = []
    for pid in (os.getpid(), *sorted(p.pid for p in multiprocessing.active_children())):
        process = Path(f"/proc/{pid}")
        resident = int((process / "statm").read_text().split()[1])
        found.append((page * resident, len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see what a process holds")
@pytest.mark.parametrize("mode", ["exact", "stream"])
def test_what_a_run_holds_does_not_grow(tmp_path, monkeypatch, mode):
    ended, seen = AfterStep.on_train_batch_end, {}

    def noting(self, trainer, module, *rest):
        ended(self, trainer, module, *rest)
        if module.step in (FIRST, LAST):
            seen[module.step] = held()

    monkeypatch.setattr(AfterStep, "on_train_batch_end", noting)
    for name in ("a.tar", "b.tar"):
        runs.shard(tmp_path / name, 200, bad=(7,))
    words = ("data=shards", f"data.train={tmp_path}/*.tar", f"data.val={tmp_path}/a.tar", f"data.mode={mode}",
             f"max_steps={LAST + 20}", "num_workers=2", "checkpoint.every_n_steps=40", "knn.every_n_steps=50",
             "pictures.every_n_steps=100", "log_every_n_steps=10", "backbone.depth=1")  # fmt: skip
    runs.run_here(tmp_path / "r", *words, without=(*runs.SCENES, "num_workers"))
    first, last = seen[FIRST], seen[LAST]
    assert len(first) == len(last) == 3
    for before, after in zip(first, last):
        more = [now - then for now, then in zip(after, before)]
        assert more[0] < MEGABYTES and more[1] < FILES and more[2] < THREADS, (first, last)
    count("steps without growth", LAST - FIRST)
