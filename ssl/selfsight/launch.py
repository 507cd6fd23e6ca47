"""launcher=slurm: the command that was typed, as a Slurm job of its own; with -m one job array over lists of values.

The script is `slurm/train.sbatch` or `slurm/probe.sbatch` with its options and the words filled in: it can be read
(`launcher.dry_run=true`, and beside the logs), and what it says is what runs. The job starts `selfsight <command>` with
the same words; a training gets its run folder by name, so it continues there after a requeue. Nothing here imports
torch.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import config
from .eval_entries import text_of
from .results import result_path
from .schema import ConfigError
from .training.jobs import batch_script, in_queue, slurm_env, source_dir

MULTIRUN = ("-m", "--multirun")
PAIRS = {"[": "]", "{": "}", "(": ")", "'": "'", '"': '"'}


class Sizes(NamedTuple):
    """Of a job: nodes, and GPUs and processes of each."""

    nodes: int
    gpus: int
    tasks: int


class Plan(NamedTuple):
    """What a job is made of: options of sbatch, lines before the template's own, and where logs and script go."""

    options: dict[str, str]
    lines: list[str]
    folder: Path


def sweep(args: Sequence[str]) -> list[list[str]]:
    """Every combination of `key=a,b,…`, the last key fastest; commas within brackets and quotes do not count."""
    words = [word for word in args if word not in MULTIRUN]
    choices = []
    for word in words:
        key, equals, text = word.partition("=")
        choices.append([key + equals + value for value in _values(text)] if equals else [word])
    return [list(row) for row in itertools.product(*choices)]


def _values(text: str) -> list[str]:
    found, closing = [""], []
    for letter in text:
        if closing and letter == closing[-1]:
            closing.pop()
        elif letter in PAIRS and not (closing and closing[-1] in "'\""):
            closing.append(PAIRS[letter])
        if letter == "," and not closing:
            found.append("")
        else:
            found[-1] += letter
    return found


def submit(command: str, rows: Sequence[tuple[list[str], Any]]) -> int:
    """Submit (words, config) of one job, or of every task of an array; returns the exit code 0.

    ConfigError, in one sentence, when it cannot work, or with what Slurm said.
    """
    launcher = rows[0][1].launcher
    if command not in ("train", "probe"):
        raise ConfigError(f"launcher=slurm is for train and probe: submit `selfsight {command} …` with sbatch --wrap")
    if any(cfg.launcher != launcher for _, cfg in rows):
        raise ConfigError("launcher.* is for all tasks of an array: it takes no lists")
    if len({_sizes(cfg) for _, cfg in rows}) > 1:
        key = "trainer.devices, .num_nodes and .accelerator are" if command == "train" else "device is"
        raise ConfigError(f"{key} for all tasks of an array, which have equal nodes: give one value")
    _check(command, [cfg for _, cfg in rows])
    plan = _plan(command, rows)
    script = _script(batch_script(command), plan)
    if launcher.dry_run:
        print(script, end="")
        return 0
    if not shutil.which("sbatch"):
        raise ConfigError(
            "launcher=slurm needs sbatch, which is not on the path here: submit on a machine of the cluster, or print "
            "the script with launcher.dry_run=true"
        )
    if command == "train":
        _refuse_second_job([Path(cfg.run_dir) for _, cfg in rows])
    plan.folder.mkdir(parents=True, exist_ok=True)
    path = plan.folder / f"{command}.sbatch"
    path.write_text(script)
    number = _sbatch(path, launcher.partition, _sizes(rows[0][1]).gpus)
    if command == "train":
        for task, (_, cfg) in enumerate(rows):
            _job_file(Path(cfg.run_dir)).write_text(number if len(rows) == 1 else f"{number}_{task}")
    what = f"{len(rows)} tasks, " if len(rows) > 1 else ""
    log = plan.folder / (f"{number}_<task>.log" if len(rows) > 1 else f"{number}.log")
    print(f"submitted job {number}: {what}log {log}\n  squeue --jobs={number}    scancel {number}", flush=True)
    return 0


# --- what would not work -------------------------------------------------------------------------------------------


def _check(command: str, cfgs: list[Any]) -> None:
    launcher, number = cfgs[0].launcher, os.environ.get("SLURM_STEP_ID", "")
    if number.isdigit() and int(number) < 1 << 31:  # larger ones: the shell of salloc, from which one may submit
        raise ConfigError("launcher=slurm was given to the processes of srun, and each would submit: leave it out")
    _check_minutes(command, launcher)
    if command == "probe":
        for key in ("nodes", "tasks_per_node", "gpus_per_node"):
            if (launcher[key] or 0) > 1:
                raise ConfigError(f"launcher.{key}={launcher[key]}: a probe is one process on at most one GPU; leave "
                                  "it out, and use -m for many probes")  # fmt: skip
    for cfg in cfgs:
        if command == "train":
            _check_training(cfg)
    where = Counter(str(_place(command, cfg)) for cfg in cfgs)
    if twice := [place for place, count in where.items() if count > 1]:
        key = "run_dir" if command == "train" else "out"
        raise ConfigError(f"several tasks would write {twice[0]}: give {key}= with as many values, or start them alone")


def _check_minutes(command: str, launcher: Any) -> None:
    """A job that is told to stop when it starts would go through the queue for nothing, again and again."""
    default = _options(batch_script(command).read_text().splitlines())["signal"] or ""
    seconds = launcher.signal_seconds or int(default.partition("@")[2])
    early = seconds + 60  # Slurm may send it up to a minute before
    if launcher.minutes and 60 * launcher.minutes <= early:
        raise ConfigError(
            f"launcher.minutes={launcher.minutes} leaves no time to work: the signal to save comes {seconds} s before "
            f"the end (launcher.signal_seconds), or up to a minute earlier; give launcher.minutes={early // 60 + 1} or "
            "more"
        )


def _check_training(cfg: Any) -> None:
    trainer, (nodes, gpus, tasks) = cfg.trainer, _sizes(cfg)
    if gpus and trainer.accelerator == "cpu":
        raise ConfigError(f"trainer.accelerator=cpu and launcher.gpus_per_node={gpus} disagree: leave one of them out")
    if not gpus and trainer.accelerator == "gpu":
        raise ConfigError("trainer.accelerator=gpu and launcher.gpus_per_node=0 disagree: leave one of them out")
    if gpus and tasks != gpus:
        raise ConfigError(
            f"launcher.tasks_per_node={tasks} and launcher.gpus_per_node={gpus}: every GPU has one process; leave "
            "launcher.tasks_per_node out"
        )
    for key, said, here, other in (
        ("devices", trainer.devices, tasks, "gpus_per_node" if gpus else "tasks_per_node"),
        ("num_nodes", trainer.num_nodes, nodes, "nodes"),
    ):
        if said not in ("auto", 1, here):
            raise ConfigError(f"trainer.{key}={said} and launcher.{other}={here} disagree: leave one of them out")
    if cfg.batch_size % (world := nodes * tasks):
        raise ConfigError(f"batch_size={cfg.batch_size} does not divide by the {world} processes of the job")
    config.changes(cfg)


def _refuse_second_job(run_dirs: list[Path]) -> None:
    """Two jobs in one run folder would write over each other."""
    for run_dir in run_dirs:
        file = _job_file(run_dir)
        if file.exists() and in_queue(number := file.read_text().strip()):
            raise ConfigError(f"job {number} in Slurm's queue is for {run_dir}: wait for it, or end it with scancel "
                              f"{number}")  # fmt: skip


def _job_file(run_dir: Path) -> Path:
    path = run_dir / "slurm" / "job"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _sbatch(path: Path, partition: str | None, gpus: int) -> str:
    """The number of the job; Slurm's refusal as a ConfigError."""
    done = subprocess.run(
        ["sbatch", "--parsable", str(path)], env=slurm_env(), capture_output=True, text=True, check=False
    )
    number = done.stdout.strip().split(";")[0]
    if done.returncode or not number.isdigit():
        said = [re.sub(r"^sbatch: (error: )?", "", line) for line in done.stderr.splitlines() if line.strip()]
        where = f" (launcher.partition={partition})" if partition else ""
        what = "; ".join(said) or "sbatch said nothing"
        if gpus and re.search("gres|node configuration", what):  # its words where nodes have no GPUs, or fewer
            what += f" (it asks for {gpus} GPU{'s' * (gpus > 1)} per node; launcher.gpus_per_node=0 asks for none)"
        raise ConfigError(f"Slurm does not take the job{where}: {what}")
    return number


# --- the script ----------------------------------------------------------------------------------------------------


def _sizes(cfg: Any) -> Sizes:
    """What launcher says, and where it is silent trainer, so that a command that starts its processes itself is
    submitted by one more word."""
    launcher, devices, nodes = cfg.launcher, 1, 1
    if "trainer" in cfg:
        devices, nodes = 1 if cfg.trainer.devices == "auto" else cfg.trainer.devices, cfg.trainer.num_nodes
    gpus = launcher.gpus_per_node
    if gpus is None:
        gpus = 0 if _on_cpu(cfg) else devices
    return Sizes(launcher.nodes or nodes, gpus, launcher.tasks_per_node or gpus or devices)


def _on_cpu(cfg: Any) -> bool:
    return cfg.trainer.accelerator == "cpu" if "trainer" in cfg else str(cfg.device) == "cpu"


def _place(command: str, cfg: Any) -> Path:
    """What a task writes: its run folder, or the JSON of a probe."""
    return Path(cfg.run_dir) if command == "train" else result_path(cfg)


def _plan(command: str, rows: Sequence[tuple[list[str], Any]]) -> Plan:
    cfg = rows[0][1]
    launcher, (nodes, gpus, tasks), place = cfg.launcher, _sizes(cfg), _place(command, cfg).absolute()
    folder = (place if command == "train" else place.parent) / "slurm"
    log = str(folder / ("%A_%a.log" if len(rows) > 1 else "%j.log"))
    if found := re.search(r"[%\\'\"#\n]", str(folder)):  # Slurm's signs in names of logs, and in lines of options
        raise ConfigError(
            f"{folder}: Slurm cannot write logs to a folder with {found[0]} in its name; give "
            f"{'run_dir' if command == 'train' else 'out'}= without any of % \\ ' \" #"
        )
    options = {
        "job-name": f"selfsight-{re.sub(r'[^A-Za-z0-9_.-]+', '_', place.name) if command == 'train' else 'probe'}",
        "nodes": str(nodes),
        "gpus-per-node": str(gpus or ""),
        "ntasks-per-node": str(tasks),
        "cpus-per-task": str(launcher.cpus_per_task),
        "partition": launcher.partition or "",
        "output": log,
    }
    if launcher.minutes:
        options["time"] = str(launcher.minutes)
    if launcher.signal_seconds:
        options["signal"] = f"USR1@{launcher.signal_seconds}"
    if len(rows) > 1:
        options["array"] = f"0-{len(rows) - 1}" + (f"%{launcher.max_running}" if launcher.max_running else "")
    for option in launcher.sbatch:
        name, equals, value = option.removeprefix("--").partition("=")
        whole = not option.startswith("--")  # -C gpu=a100: a short one, whose value may have a sign of its own
        options[option if whole else name] = value if equals and not whole else None
    lines = [
        f"export SELFSIGHT_PYTHON={shlex.quote(sys.executable)}",
        f"export PYTHONPATH={shlex.quote(str(source_dir()))}${{PYTHONPATH:+:$PYTHONPATH}}",
        *([f"export SELFSIGHT_MAX_REQUEUES={launcher.max_requeues}"] if launcher.max_requeues is not None else []),
        *launcher.setup,
    ]
    jobs = [_set(command, words, cfg) for words, cfg in rows]
    if len(jobs) > 1:
        cases = [f"  {task}) {words} ;;" for task, words in enumerate(jobs)]
        jobs = ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]
    return Plan(options, [*lines, *jobs], folder)


def _set(command: str, words: list[str], cfg: Any) -> str:
    """The line of shell that gives the template its words."""
    ours = ["launcher", *(("run_dir", "trainer.devices", "trainer.num_nodes") if command == "train" else ())]
    kept = [word for word in words if not _is_of(word, ours)]
    kept.append("launcher=local")  # whatever an experiment says
    if command == "train":
        kept.append(f"run_dir={text_of(str(Path(cfg.run_dir).absolute()))}")
    if device := _device(command, words, cfg):
        kept.append(device)
    return f"set -- {shlex.join(kept)}"


def _device(command: str, words: Sequence[str], cfg: Any) -> str:
    """The word for where it runs, unless that was given: left to itself, a job whose GPUs torch cannot see would work
    on the cores for days."""
    key, gpus = "trainer.accelerator" if command == "train" else "device", _sizes(cfg).gpus
    if command == "train" and not gpus:
        return f"{key}=cpu"
    said = cfg.trainer.accelerator if command == "train" else cfg.device
    return f"{key}=gpu" if gpus and said == "auto" and not any(_is_of(word, [key]) for word in words) else ""


def _is_of(word: str, keys: Sequence[str]) -> bool:
    key = word.partition("=")[0].strip().lstrip("+~")
    return any(key == k or key.startswith(f"{k}.") for k in keys)


def _script(template: Path, plan: Plan) -> str:
    """The template with the plan's options (empty: taken out; None: one without a value) and lines before its own."""
    lines = template.read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH --"))
    options = _options(lines) | plan.options
    made = [f"#SBATCH {name if name.startswith('-') else f'--{name}'}" + ("" if value is None else f"={_quote(value)}")
            for name, value in options.items() if value != ""]  # fmt: skip
    head = [lines[0], f"# slurm/{template.name}, filled in by launcher=slurm"]
    return "\n".join([*head, *made, *plan.lines, *lines[last + 1 :]]) + "\n"


def _options(lines: Sequence[str]) -> dict[str, str | None]:
    """What a template asks of sbatch; None: an option without a value."""
    found = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH --")]
    return {name: value if equals else None for name, equals, value in found}


def _quote(value: str) -> str:
    """For a line of #SBATCH, which has quotes but is no shell."""
    return f'"{value}"' if re.search(r"\s", value) else value
