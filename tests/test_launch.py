"""launcher=slurm: the script that is submitted, arrays, and what is refused. sbatch is a stand-in; see test_slurm."""

import os
import re
import shlex
import stat
import subprocess

import pytest

import runs
from selfsight import cli, config, launch
from selfsight.training import lightning

SLURM = ("launcher=slurm",)


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Stand-ins: sbatch keeps the script and prints a number, or fails with `refuse`; squeue says `queue` of it."""
    texts = {
        "sbatch": 'cp "$2" "$STAND_IN/script"; echo >> "$STAND_IN/calls"\n'
        'test -e "$STAND_IN/refuse" && { cat "$STAND_IN/refuse" >&2; exit 1; }\necho "41;here"\n',
        "squeue": 'case " $* " in *" --jobs=41 "*) cat "$STAND_IN/queue";; esac\n',
    }
    for name, text in texts.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    return tmp_path


def dry(capsys, command, *words) -> str:
    """The script of a command."""
    assert cli.main(command, [*words, *SLURM, "launcher.dry_run=true"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def options(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.M))


def job_words(script: str) -> list[list[str]]:
    """The words of every task."""
    ours = script.partition("set -uo pipefail")[0]  # before the template's own lines
    return [shlex.split(line)[2:] for line in re.findall(r"(set -- .*?)(?: ;;)?$", ours, re.M)]


def test_the_script_asks_for_what_was_said_and_says_the_same_words(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = dry(capsys, "train", "backbone=vit_s", "max_steps=5", "launcher.nodes=2", "launcher.gpus_per_node=8",
                 "launcher.partition=gpu", "launcher.minutes=90", "launcher.signal_seconds=300", "batch_size=64",
                 "launcher.sbatch=[--account=vision, --exclusive]", "launcher.setup=['module load cuda']")  # fmt: skip
    said, cfg = options(script), config.load("train", ["backbone=vit_s", "max_steps=5", "batch_size=64"])
    asked = {"nodes": "2", "gpus-per-node": "8", "ntasks-per-node": "8", "partition": "gpu", "time": "90",
             "signal": "USR1@300", "account": "vision", "exclusive": "", "requeue": "", "open-mode": "append",
             "output": f"{tmp_path / cfg.run_dir}/slurm/%j.log"}  # fmt: skip
    assert said | asked == said
    run_dir = f"run_dir={tmp_path / cfg.run_dir}"  # that of the same command without launcher=slurm
    assert job_words(script) == [["backbone=vit_s", "max_steps=5", "batch_size=64", "launcher=local", run_dir,
                                  "trainer.accelerator=gpu"]]  # fmt: skip
    assert "\nmodule load cuda\n" in script and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "probe"])
def test_the_script_is_the_template_and_valid_shell(capsys, command):
    words = {"train": (), "probe": ("checkpoint=runs/a",)}[command]
    script = dry(capsys, command, *words)
    template = launch.batch_script(command).read_text()
    assert script.endswith(template[template.index("set -uo pipefail") :])
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_options_of_sbatch_are_taken_as_they_are(capsys):
    said = "launcher.sbatch=['-C gpu=a100', '--constraint=a=b', '-x n1', --exclusive]"
    lines = dry(capsys, "train", said).splitlines()
    for line in ("-C gpu=a100", "--constraint=a=b", "-x n1", "--exclusive"):
        assert f"#SBATCH {line}" in lines


def test_without_gpus_there_is_one_process_per_node(capsys):
    said = options(script := dry(capsys, "train", "trainer.accelerator=cpu", "launcher.nodes=3", "batch_size=30"))
    assert "gpus-per-node" not in said and (said["nodes"], said["ntasks-per-node"]) == ("3", "1")
    assert "trainer.accelerator=cpu" in job_words(script)[0]
    assert "gpus-per-node" not in options(dry(capsys, "train", "launcher.gpus_per_node=0"))


@pytest.mark.parametrize(("command", "key"), [("train", "trainer.accelerator"), ("probe", "device")])
def test_a_job_with_gpus_does_not_fall_back_to_the_cores(capsys, batch, command, key):
    words = ["checkpoint=a"] if command == "probe" else []
    said = lambda script: [word for word in job_words(script)[0] if word.startswith(key)]  # noqa: E731
    assert said(dry(capsys, command, *words)) == [f"{key}=gpu"]
    assert said(dry(capsys, command, *words, f"{key}=auto")) == [f"{key}=auto"]
    done, _ = batch(f"{command}.sbatch", "a=b", SLURM_GPUS_ON_NODE="1")  # by hand; of two words the later counts
    assert f"<{command}><{key}=gpu><a=b>" in done.stdout
    done, _ = batch(f"{command}.sbatch", "a=b", SLURM_GPUS_ON_NODE="0")
    assert f"<{command}><a=b>" in done.stdout


def test_a_command_that_names_devices_and_nodes_is_submitted_as_it_is(capsys):
    script = dry(capsys, "train", "trainer.devices=8", "trainer.num_nodes=4", "batch_size=64")
    said = options(script)
    assert (said["nodes"], said["gpus-per-node"], said["ntasks-per-node"]) == ("4", "8", "8")
    assert not any(word.startswith(("trainer.devices", "trainer.num_nodes")) for word in job_words(script)[0])
    said = options(dry(capsys, "train", "trainer.devices=3", "trainer.accelerator=cpu", "batch_size=30"))
    assert "gpus-per-node" not in said and said["ntasks-per-node"] == "3"
    said = options(dry(capsys, "train", "trainer.devices=1", "launcher.gpus_per_node=4", "launcher.nodes=2"))
    assert (said["nodes"], said["gpus-per-node"]) == ("2", "4")


def test_words_survive_the_shell(capsys, tmp_path):
    odd = "data.train='/d/a b/{0..1}.tar,$HOME'"
    script = dry(capsys, "train", "data=shards", odd, f"run_dir={tmp_path}/a $HOME run")
    assert odd in job_words(script)[0] and f"run_dir={tmp_path}/a $HOME run" in job_words(script)[0]
    assert options(script)["output"] == f'"{tmp_path}/a $HOME run/slurm/%j.log"'


def test_a_job_is_named_after_its_run_folder_in_letters_that_slurm_takes(capsys):
    for folder, name in (("vit_lr0.001", "vit_lr0.001"), ("größe (2) & more", "gr_e_2_more")):
        assert options(dry(capsys, "train", f"run_dir=/tmp/{folder}"))["job-name"] == f"selfsight-{name}"


def test_multirun_is_an_array(capsys):
    words = ("-m", "checkpoint=runs/a", "step=10,20", "probe=knn,linear", "launcher.max_running=2")
    script = dry(capsys, "probe", *words)
    tasks = [[w for w in task if w.startswith(("step", "probe"))] for task in job_words(script)]
    assert tasks == [[f"step={s}", f"probe={p}"] for s in (10, 20) for p in ("knn", "linear")]
    assert options(script)["array"] == "0-3%2" and options(script)["output"].endswith("/%A_%a.log")


def test_trainings_of_an_array_have_folders_of_their_own(capsys):
    tasks = job_words(dry(capsys, "train", "-m", "seed=0,1,2"))
    assert len({word for task in tasks for word in task if word.startswith("run_dir=")}) == 3


def test_commas_within_brackets_and_quotes_are_no_list():
    assert launch.sweep(["-m", "a=[1,2]", "b='x,y'", "c={1,2}.tar", "d=1,2"]) == [
        ["a=[1,2]", "b='x,y'", "c={1,2}.tar", "d=1"], ["a=[1,2]", "b='x,y'", "c={1,2}.tar", "d=2"],
    ]  # fmt: skip


def test_a_job_is_submitted_once(sbatch, capsys):
    words = [*SLURM, "max_steps=3", f"run_dir={sbatch}/run"]
    assert cli.main("train", words) == 0
    assert capsys.readouterr().out.startswith(f"submitted job 41: log {sbatch}/run/slurm/41.log\n")
    kept = (sbatch / "run" / "slurm" / "train.sbatch").read_text()
    assert kept == (sbatch / "script").read_text() and "max_steps=3" in kept
    (sbatch / "queue").write_text("PENDING\n")
    assert cli.main("train", words) == 2
    assert f"job 41 in Slurm's queue is for {sbatch}/run" in capsys.readouterr().err
    (sbatch / "queue").write_text("")
    assert cli.main("train", words) == 0
    assert (sbatch / "calls").read_text() == "\n\n"


def test_a_run_folder_at_home_is_one_folder(sbatch, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(sbatch / "home"))
    monkeypatch.chdir(sbatch)
    assert cli.main("train", [*SLURM, "run_dir=~/run"]) == 0
    assert f"run_dir={sbatch}/home/run" in job_words((sbatch / "script").read_text())[0]
    assert (sbatch / "home" / "run" / "slurm" / "job").exists() and not (sbatch / "~").exists()


def test_slurms_refusal_is_one_sentence(sbatch, capsys):
    (sbatch / "refuse").write_text("sbatch: error: invalid partition specified: x\nsbatch: error: Batch job failed\n")
    assert cli.main("train", [*SLURM, "launcher.partition=x", f"run_dir={sbatch}/run"]) == 2
    said = "Slurm does not take the job (launcher.partition=x): invalid partition specified: x; Batch job failed"
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not (sbatch / "run" / "slurm" / "job").exists()


@pytest.mark.parametrize("said", ["Invalid generic resource (gres) specification",
                                  "Requested node configuration is not available"])  # fmt: skip
def test_where_nodes_have_no_such_gpus_the_key_is_named(sbatch, capsys, said):
    (sbatch / "refuse").write_text(f"sbatch: error: Batch job submission failed: {said}\n")
    words, hint = [*SLURM, f"run_dir={sbatch}/run"], "launcher.gpus_per_node=0 asks for none"
    assert cli.main("train", [*words, "trainer.devices=2"]) == 2
    assert f"{said} (it asks for 2 GPUs per node; {hint})\n" in capsys.readouterr().err
    assert cli.main("train", [*words, "launcher.gpus_per_node=0"]) == 2
    assert hint not in capsys.readouterr().err


REFUSED = (
    ("train", ("trainer.devices=4", "launcher.gpus_per_node=8"), "devices=4 and launcher.gpus_per_node=8 disagree"),
    ("train", ("trainer.num_nodes=3", "launcher.nodes=2"), "trainer.num_nodes=3 and launcher.nodes=2 disagree"),
    ("train", ("-m", "trainer.devices=1,2"), "trainer.devices, .* are for all tasks of an array"),
    ("probe", ("-m", "checkpoint=a", "device=cpu,gpu"), "device is for all tasks of an array"),
    ("train", ("batch_size=10", "launcher.gpus_per_node=4"), "batch_size=10 does not divide by the 4 processes"),
    ("train", ("trainer.accelerator=cpu", "launcher.gpus_per_node=4"), "disagree"),
    ("train", ("trainer.accelerator=gpu", "launcher.gpus_per_node=0"), "disagree"),
    ("train", ("launcher.gpus_per_node=4", "launcher.tasks_per_node=2"), "every GPU has one process"),
    ("train", ("launcher.minutes=4",), "minutes=4 leaves no time .* comes 180 s .* give launcher.minutes=5 or more"),
    ("train", ("launcher.minutes=6", "launcher.signal_seconds=300"), "launcher.minutes=7 or more"),
    ("probe", ("checkpoint=a", "launcher.minutes=2"), "comes 60 s before .* give launcher.minutes=3 or more"),
    ("train", ("launcher.sbatch=[account=x]",), r"launcher.sbatch=.*: expected options such as"),
    ("train", ("run_dir=a%b",), r"a%b/slurm: Slurm cannot write logs to a folder with % in its name; give run_dir="),
    ("train", ("run_dir=it's",), "with ' in its name"),
    ("train", ('run_dir=an "odd" one',), 'with " in its name'),
    ("train", ("run_dir=run #1",), "with # in its name"),
    ("probe", ("checkpoint=a", "out=run#1"), "with # in its name; give out= without"),
    ("train", ("-m", "run_dir=a", "seed=0,1"), "several tasks would write a: give run_dir= with as many values"),
    ("train", ("-m", "launcher.nodes=1,2"), "it takes no lists"),
    ("probe", ("checkpoint=a", "launcher.nodes=2"), "a probe is one process"),
    ("probe", ("-m", "checkpoint=a", "seed=0,1"), "several tasks would write probes/knn.json: give out="),
    ("bench", (), "launcher=slurm is for train and probe"),
)


def test_the_shortest_jobs_have_time_before_they_are_told_to_stop(capsys):
    assert options(dry(capsys, "train", "launcher.minutes=5"))["time"] == "5"
    assert options(dry(capsys, "probe", "checkpoint=a", "launcher.minutes=3"))["time"] == "3"


@pytest.mark.parametrize(("command", "words", "sentence"), REFUSED)
def test_what_cannot_work_is_refused_before_it_is_submitted(sbatch, capsys, command, words, sentence):
    assert cli.main(command, [*words, *SLURM]) == 2
    err = capsys.readouterr().err
    assert re.search(sentence, err) and err.count("\n") == 1
    assert not (sbatch / "calls").exists()


def test_a_run_with_other_settings_is_refused_before_it_is_submitted(sbatch, capsys):
    config.save(config.load("train", [f"run_dir={sbatch}/run"]), sbatch / "run" / "config.yaml")
    assert cli.main("train", [*SLURM, "seed=1", f"run_dir={sbatch}/run"]) == 2
    assert "seed: 0 -> 1" in capsys.readouterr().err


def test_without_sbatch_it_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main("train", [*SLURM, f"run_dir={tmp_path}/run"]) == 2
    assert "launcher=slurm needs sbatch, which is not on the path here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_processes_of_srun_do_not_submit(sbatch, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert cli.main("train", list(SLURM)) == 2
    assert "was given to the processes of srun" in capsys.readouterr().err


def test_keys_of_jobs_name_their_launcher(capsys):
    assert cli.main("train", ["launcher.nodes=2"]) == 2
    assert "launcher.nodes is for jobs: add launcher=slurm" in capsys.readouterr().err


# --- what a batch file does when its processes have ended ----------------------------------------------------------

# What Slurm is asked is noted; SIGNAL is what the batch file itself is sent while its processes run.
SRUN = """#!/bin/sh
printf "<%s>" "$@"
echo " threads=$OMP_NUM_THREADS cpus=$SRUN_CPUS_PER_TASK address=$MASTER_ADDR port=$MASTER_PORT"
test -z "$SIGNAL" || kill -s "$SIGNAL" "$PPID"
exit "$CODE"
"""
SQUEUE = """#!/bin/sh
echo "squeue $*" >> "$STAND_IN/calls"
test -n "$STATE" && echo "$STATE"
"""
SCONTROL = """#!/bin/sh
test "$1" = show && { printf "n1\\nn2\\n"; exit; }
echo "scontrol $*" >> "$STAND_IN/calls"
"""
IN_JOB = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2",
          "SLURM_CPUS_PER_TASK": "3", "SELFSIGHT_PYTHON": "python", "SLURM_SUBMIT_DIR": str(runs.ROOT)}  # fmt: skip


@pytest.fixture
def batch(tmp_path):
    """Runs a batch file with stand-ins: srun ends with a code, squeue knows a state; returns what ended, and the calls
    of squeue and scontrol."""
    for name, text in {"srun": SRUN, "squeue": SQUEUE, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(file, *words, code=0, state="RUNNING", **env):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_", "SELFSIGHT_"))}
        own = {"PATH": f"{tmp_path}:{kept['PATH']}", "STAND_IN": str(tmp_path), "CODE": str(code), "STATE": state}
        argv = ["bash", str(runs.ROOT / "slurm" / file), *words]
        done = subprocess.run(argv, env=kept | own | IN_JOB | env, capture_output=True, text=True, check=False)
        calls = tmp_path / "calls"
        told = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return done, told

    return run


FILES = ("train.sbatch", "train_cpu.sbatch", "probe.sbatch")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("code", "state", "env", "requeued"),
    [
        (138, "RUNNING", {}, "20007"),  # before the time limit
        (143, "RUNNING", {}, "20007"),  # preempted
        (143, "RUNNING", {"SLURM_ARRAY_JOB_ID": "20005", "SLURM_ARRAY_TASK_ID": "2"}, "20005_2"),
        (143, "COMPLETING", {}, ""),  # scancel
        (143, "", {}, ""),  # Slurm does not answer
        (138, "RUNNING", {"SLURM_RESTART_COUNT": "3", "SELFSIGHT_MAX_REQUEUES": "3"}, ""),
        (138, "RUNNING", {"SLURM_RESTART_COUNT": "2", "SELFSIGHT_MAX_REQUEUES": "3"}, "20007"),
        (138, "RUNNING", {"SELFSIGHT_MAX_REQUEUES": "0"}, ""),  # at its first start a job has no count
        (0, "RUNNING", {}, ""),
        (1, "RUNNING", {}, ""),
        (137, "RUNNING", {}, ""),
    ],
)
def test_a_job_goes_back_into_the_queue_when_it_was_told_to_stop_and_not_cancelled(
    batch, file, code, state, env, requeued
):
    done, calls = batch(file, "checkpoint=a", code=code, state=state, **env)
    assert done.returncode == code, done.stderr
    number = "20005_2" if "SLURM_ARRAY_JOB_ID" in env else "20007"
    asked = [f"squeue --noheader --jobs={number} --format=%T"] if code in (138, 143) else []
    assert calls == asked + ([f"scontrol requeue {requeued}"] if requeued else []), done
    assert ("requeued" in done.stdout) == (code in (138, 143) and not requeued) and not done.stderr


@pytest.mark.parametrize("file", FILES)
def test_the_shell_of_a_job_outlives_the_signal_that_its_processes_get(batch, file):
    done, calls = batch(file, "checkpoint=a", code=143, SIGNAL="TERM")
    assert done.returncode == 143 and calls[-1:] == ["scontrol requeue 20007"], done


def test_a_batch_file_asks_for_a_signal_in_time_and_to_be_put_back():
    train, cpu, probe = (options((runs.ROOT / "slurm" / file).read_text()) for file in FILES)
    assert train == {
        "job-name": "selfsight", "nodes": "1", "gpus-per-node": "1", "ntasks-per-node": "1", "cpus-per-task": "8",
        "time": "24:00:00", "signal": "USR1@180", "requeue": "", "open-mode": "append", "output": "selfsight-%j.log",
    }  # fmt: skip
    assert cpu == {name: value for name, value in train.items() if name != "gpus-per-node"}
    own = {"job-name": "selfsight-probe", "time": "04:00:00", "signal": "USR1@60", "output": "selfsight-probe-%j.log"}
    assert probe == train | own


def test_the_processes_of_a_training_know_their_number_and_where_to_meet(batch):
    done, _ = batch("train.sbatch", "a=b c", SLURM_GPUS_ON_NODE="4")
    # One that has saved and ended is no reason to kill the others.
    words = "<--kill-on-bad-exit=0><--wait=0><python><-P><-m><selfsight><train><trainer.accelerator=gpu><a=b c>"
    words += "<trainer.devices=4><trainer.num_nodes=2>"
    assert re.fullmatch(re.escape(words) + r" threads=1 cpus=3 address=n1 port=1000\d\n", done.stdout), done
    done, _ = batch("train_cpu.sbatch", "a=b c", MASTER_ADDR="10.0.0.1")
    assert "<train><trainer.accelerator=cpu><a=b c>" in done.stdout
    assert " threads=3 cpus=3 address=10.0.0.1 port=1000" in done.stdout
    del_tasks, _ = batch("train.sbatch", SLURM_NTASKS_PER_NODE="")
    assert del_tasks.returncode and "give --ntasks-per-node, not --ntasks" in del_tasks.stderr


# --- who is a process of srun --------------------------------------------------------------------------------------

TASK = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "2"}
CASES = {
    "nothing": ({}, 0, None),
    "srun": (TASK, 1, "SLURMEnvironment"),
    "a batch script": ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "LOCAL_RANK": "1"}, 1, "LightningEnvironment"),
    "salloc": ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"}, 0, "LightningEnvironment"),
    "srun --pty bash": (TASK | {"SLURM_JOB_NAME": "bash", "SLURM_PROCID": "0"}, 0, "LightningEnvironment"),
}


@pytest.mark.parametrize("case", CASES)
def test_only_tasks_of_srun_are_processes_of_one_run(monkeypatch, case):
    for name in [k for k in os.environ if k.startswith("SLURM_") or k in ("RANK", "LOCAL_RANK")]:
        monkeypatch.delenv(name)
    env, rank, expected = CASES[case]
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = lightning._environment()
    assert lightning.process_rank() == rank
    assert (type(found).__name__ if found else None) == expected
