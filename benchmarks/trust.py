"""What is promised, and how often the opposite was tried: runs the tests that break things and sums what they count.

    python benchmarks/trust.py             a quarter of an hour; writes results/trust.json and docs/trust.md
    python benchmarks/trust.py --table     only writes the table again, from results/trust.json

Every file that the page names runs whole. Nothing is written unless all tests pass, none that it names is skipped, and
every count of it was noted. What the guards cost is measured by guards.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import machine
from page import show

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/trust.json", ROOT / "docs/trust.md"
GUARDS = ROOT / "benchmarks/results/guards.json"


class Promise(NamedTuple):
    """A sentence, the tests that would fail if it were untrue, and which counts say how often it was tried."""

    text: str
    tests: tuple[str, ...]
    counts: tuple[str, ...] = ()


PROMISES = (
    Promise(
        "A run that is killed at any moment and started again by the same command ends with the weights, optimizer "
        "state, log and files of a run that was left alone, bit for bit (CPU, float32), and leaves nothing behind.",
        ("test_faults.py::test_kills_in_one_process", "test_faults.py::test_kills_of_the_script_that_a_user_starts",
         "test_resume.py::test_sigkill_and_continue_is_bit_identical"),
        ("kills of training", "kills of the script that a user starts"),
    ),
    Promise(
        "The same for a run of two processes, whichever of them is killed.",
        ("test_faults.py::test_kills_of_one_of_two_processes_or_both",),
        ("kills of training in two processes",),
    ),
    Promise(
        "When one process is gone, the others end with a sentence instead of waiting.",
        ("test_faults.py::test_a_process_that_is_gone_ends_the_other_with_a_sentence",
         "test_two_processes.py::test_a_port_that_is_taken_is_said_and_leaves_no_process_that_waits"),
        ("processes that outlived their partner",),
    ),
    Promise(
        "A process that stands still or never comes is named, with what it did, and the run ends.",
        ("test_watchdog.py::test_of_two_processes_the_one_that_stands_still_is_named",
         "test_watchdog.py::test_a_process_that_never_comes_is_not_waited_for_for_ever",
         "test_watchdog.py::test_a_run_whose_loader_hangs_ends_and_continues"),
        ("hangs of one of two processes",),
    ),
    Promise(
        "A job on two nodes that Slurm preempts, and that reaches its time limit, goes on by itself in the same run "
        "folder and W&B run, and ends with the bits of one that was left alone.",
        ("test_slurm.py::test_it_ends_with_the_bits_of_one_that_was_left_alone",
         "test_slurm.py::test_it_stays_one_folder_and_one_run_of_wandb"),
        ("requeues by Slurm",),
    ),
    Promise(
        "Shards on a server are the shards, in the same order, whatever the server does: it stalls, cuts, answers 429 "
        "or 5xx, or serves another file.",
        ("test_remote.py::test_passing_failures_are_tried_again",
         "test_remote.py::test_what_lasts_is_one_sentence_and_leaves_no_shard",
         "test_remote.py::test_a_run_on_remote_shards_ends_with_the_bits_of_a_local_one"),
        ("failures of servers",),
    ),
    Promise(
        "An index or a bank of features whose making is killed is made again or continued, byte for byte the same.",
        ("test_faults.py::test_kills_while_an_index_is_built", "test_faults.py::test_kills_while_a_bank_is_built"),
        ("kills of building an index", "kills of building a bank of features"),
    ),
    Promise(
        "No completed checkpoint is lost: a damaged one is named and the one before it taken.",
        ("test_faults.py::test_a_damaged_checkpoint_is_left_for_the_one_before",
         "test_checkpoint.py::test_damage_falls_back_to_the_one_before"),
        ("checkpoints damaged",),
    ),
    Promise(
        "A full disk costs nothing that was written before; the run continues when there is room.",
        ("test_faults.py::test_a_disk_that_is_full_stops_a_run_which_continues_when_there_is_room",
         "test_bank_store.py::test_a_full_disk_leaves_nothing_and_says_one_sentence"),
        ("writes that failed",),
    ),
    Promise(
        "A signal to any one process saves a checkpoint and stops all of them at the same step.",
        ("test_faults.py::test_a_signal_to_one_process_saves_and_stops_both",
         "test_two_processes.py::test_a_signal_to_one_process_stops_both_after_a_checkpoint"),
        ("signals to one of two processes",),
    ),
    Promise(
        "A loss that is not finite, even in one process only, never reaches the weights, which stay equal everywhere.",
        ("test_faults.py::test_what_is_not_finite_in_one_process_stops_both_with_equal_weights",
         "test_trouble.py::test_a_gradient_that_is_not_finite_never_reaches_the_weights"),
        ("losses that were not finite",),
    ),
    Promise(
        "Damaged data never crash or hang a run, and no sample is dropped without a word: what is listed is read or "
        "counted as bad, and everything else is refused by a sentence that names the file.",
        ("test_fuzz.py::test_hundreds_of_damages_never_crash_hang_or_get_lost",
         "test_loader.py::test_a_run_skips_bad_samples_counts_and_lists_them"),
        ("corruptions tried", "corrupt data sets refused by a sentence", "samples of corrupt data sets read",
         "samples of corrupt data sets counted as bad"),
    ),
    Promise(
        "Neither memory nor open files nor threads grow with the steps, in no process.",
        ("test_soak.py::test_what_a_run_holds_does_not_grow",),
        ("steps without growth",),
    ),
    Promise(
        "No file runs code, wherever it is opened: checkpoints, exports, weights of others, shards, side-cars, "
        "indexes, banks, configs, saved steps.",
        ("test_security.py::test_no_file_is_run",
         "test_security.py::test_no_line_of_the_package_runs_what_it_reads"),
        ("places given a file that would run a command",),
    ),
    Promise(
        "No command in place of an address is run, no config names foreign code, and no name in an archive is written "
        "to.",
        ("test_security.py::test_commands_in_place_of_addresses_are_not_run",
         "test_config.py::test_foreign_targets_are_refused",
         "test_security.py::test_names_that_lead_elsewhere_are_never_written_to"),
    ),
)  # fmt: skip


def proofs() -> set[str]:
    """The tests that the page names."""
    return {test for promise in PROMISES for test in promise.tests}


def files() -> list[str]:
    """Where they are."""
    return sorted({f"tests/{test.partition('::')[0]}" for test in proofs()})


def measure() -> dict[str, Any]:
    """Run the tests; returns {"counts", "seconds"}. SystemExit if one of them fails, or is skipped and named."""
    with tempfile.TemporaryDirectory() as folder:
        log, report = Path(folder) / "counts.jsonl", Path(folder) / "report.xml"
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-n", "2", "-m", "slow or slurm or not slow", f"--junitxml={report}"]
        code = subprocess.run([*command, *files()], cwd=ROOT, env=os.environ | {"SELFSIGHT_TRUST": str(log)}).returncode
        if code:
            raise SystemExit(f"a test failed (exit code {code}): nothing is written")
        if missing := proofs() - passed(report.read_text()):
            raise SystemExit(f"skipped, or not there: {', '.join(sorted(missing))}; nothing is written")
        sums: Counter = Counter()
        for line in log.read_text().splitlines():
            sums.update(json.loads(line))
    return {"counts": dict(sorted(sums.items())), "seconds": round(time.monotonic() - began)}


def passed(report: str) -> set[str]:
    """file::test of the tests of a report of pytest that ran, in all of their cases."""
    ran: dict[str, bool] = {}
    for case in ET.fromstring(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}.py::{case.get('name', '').partition('[')[0]}"
        ran[name] = ran.get(name, True) and case.find("skipped") is None
    return {name for name, whole in ran.items() if whole}


def guards() -> str:
    """The row of what the guards cost."""
    found = json.loads(GUARDS.read_text())
    about = found["machine"]
    shares = [
        f"{name}: {s['shares']['one process']:.2%} in one process, {s['shares']['two processes']:.2%} in two; the norm "
        f"{s['shares']['norm']:.2%}" for name, s in found["steps"].items()
    ]  # fmt: skip
    return (
        "| What watches every step (is it finite, the batch kept, the watchdog's notes, what processes agree on) costs "
        "at most 1 % of it. Where nothing clips the gradients their norm comes on top, whatever the batch. | "
        "[test_docs.py::test_the_guards_cost_at_most_a_hundredth_of_a_step](../tests/test_docs.py) | "
        f"measured with MAE, batch {found['batch']}, one thread of a CPU at a load of {about['load']} "
        f"({about['date']}); not on a GPU<br>"
        f"{'<br>'.join(shares)} |"
    )


def table(results: dict[str, Any]) -> str:
    """The lines between the markers of docs/trust.md; SystemExit where a count is missing."""
    about, counts = results["machine"], results["counts"]
    kinds = ("kills at named points", "kills at random moments", "processes compared")
    if missing := {*kinds, *(what for promise in PROMISES for what in promise.counts)} - counts.keys():
        raise SystemExit(f"no test has counted {', '.join(sorted(missing))}: nothing is written")
    lines = [
        f"Counted on {about['date']} by `python benchmarks/trust.py`: selfsight {about['selfsight']}, Python "
        f"{about['python']}, torch {about['torch']}, {about['cores']} cores. "
        f"{counts[kinds[0]] + counts[kinds[1]]} kills in all, {counts[kinds[0]]} of them at named "
        f"points and {counts[kinds[1]]} at random moments; {counts['processes compared']} processes compared "
        "with ones that were left alone. What holds for every objective on every family is in "
        "[contracts.md](contracts.md).",
        "", "| promise | tests | tried |", "|---|---|---|",
    ]  # fmt: skip
    for promise in PROMISES:
        tests = "<br>".join(f"[{t}](../tests/{t.partition('::')[0]})" for t in promise.tests)
        tried = "<br>".join(f"{what}: {counts[what]:,}" for what in promise.counts)
        lines.append(f"| {promise.text} | {tests} | {tried or 'each case in the test'} |")
    return "\n".join([*lines, guards()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="only write the table again")
    if parser.parse_args().table:
        text = table(json.loads(RESULTS.read_text()))
    else:
        found = measure()
        text = table({"machine": machine.describe()} | found)  # before anything is written
        machine.save(RESULTS, "trust.py", found)
    show(PAGE, "trust", text)


if __name__ == "__main__":
    main()
