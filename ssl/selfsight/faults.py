"""Faults on purpose, for tests: what a run does when it is killed, or its disk is full, at a named point.

    SELFSIGHT_FAULTS=point:action[@number][%rank]        several with commas between

point: one of `POINTS`. action: kill (SIGKILL to itself), term (SIGTERM to itself), full (no space left on the device),
hang (for ever). @number: only at this step (training, checkpoint) or after this many samples (bank). %rank: only in
this process of several. Without the variable a point costs a look into the environment, and nothing ever happens.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time

from .schema import ConfigError

VARIABLE = "SELFSIGHT_FAULTS"
POINTS = (
    "step.forward",  # between the loss and its gradient
    "step.update",  # between the optimizer and what follows it (teacher, centres)
    "step.end",  # before logging, evaluation and checkpoint
    "checkpoint.file",  # one file of several is written
    "checkpoint.written",  # all files, no manifest
    "checkpoint.manifest",  # complete, under its temporary name
    "checkpoint.renamed",  # under its own name; `latest` names the one before
    "checkpoint.latest",  # before old ones are removed
    "checkpoint.trash",  # an old one has left its name, its files are there
    "index.half",  # half of an index is written
    "index.written",  # complete, under its temporary name
    "bank.rows",  # rows are written and not noted
    "bank.noted",
    "bank.finished",  # complete, under its temporary name
    "bank.renamed",
    "export.written",  # complete, under its temporary name
    "summary",  # exported, nothing said
)
_SPEC = re.compile(r"(?P<point>[a-z.]+):(?P<action>kill|term|full|hang)(@(?P<number>\d+))?(%(?P<rank>\d+))?")


def fault(point: str, number: int | None = None) -> None:
    """A point where a fault may be asked for. number: what an @number is compared with."""
    if VARIABLE in os.environ:
        _meet(point, number)


def _meet(point: str, number: int | None) -> None:
    for spec in os.environ[VARIABLE].split(","):
        found = _SPEC.fullmatch(spec.strip())
        if not found or found["point"] not in POINTS:
            raise ConfigError(f"{VARIABLE}={spec}: expected point:action[@number][%rank], the points are "
                              f"{', '.join(POINTS)}, the actions kill, term, full and hang")  # fmt: skip
        at, who = found["number"], found["rank"]
        if found["point"] == point and at in (None, str(number)) and who in (None, _rank()):
            _act(found["action"])


def _rank() -> str:
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))


def _act(action: str) -> None:
    if action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if action == "hang":
        while True:
            time.sleep(60)
    os.kill(os.getpid(), signal.SIGTERM if action == "term" else signal.SIGKILL)
