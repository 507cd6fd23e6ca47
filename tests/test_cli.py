"""The command line: one grammar, short help, one sentence and exit code 2 for what the user can mend."""

import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import yaml

from selfsight import __version__, cli, config
from selfsight.data.source import DataError

ROOT = Path(__file__).parents[1]


def run(*args, command=None):
    return cli.main(command, list(args))


@pytest.fixture
def train_stub(monkeypatch):
    """A stand-in for the module that trains; holds the config that it was given."""
    module = types.ModuleType("selfsight.training.run")
    module.train = lambda cfg: module.__dict__.update(cfg=cfg)
    monkeypatch.setitem(sys.modules, "selfsight.training.run", module)
    return module


def test_a_command_gets_its_resolved_config(train_stub):
    assert run("train", "seed=7") == 0
    assert (train_stub.cfg.seed, train_stub.cfg.batch_size) == (7, 64)


def test_a_script_says_the_same_without_the_command(train_stub):
    assert run("seed=8", command="train") == 0
    assert train_stub.cfg.seed == 8


def test_an_error_is_one_sentence_and_exit_code_2(capsys):
    assert run("train", "bach_size=3") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: unknown key 'bach_size': did you mean 'batch_size'?")
    assert err.count("\n") == 1


def test_data_errors_are_sentences_too(train_stub, capsys):
    def train(cfg):
        raise DataError("/d/train.tar does not exist:\n  give another pattern")

    train_stub.train = train
    assert run("train") == 2
    assert capsys.readouterr().err == "error: /d/train.tar does not exist: give another pattern\n"


def test_other_errors_keep_their_traceback(train_stub):
    def train(cfg):
        raise ValueError("a bug")

    train_stub.train = train
    with pytest.raises(ValueError, match="a bug"):
        run("train")


def test_a_command_returns_its_own_exit_code(train_stub):
    train_stub.train = lambda cfg: 1
    assert run("train") == 1


@pytest.mark.parametrize("word", ["trian", "objective=mae", "frobnicate"])
def test_an_unknown_command(word, capsys):
    assert run(word) == 2
    assert "valid: train, probe" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--foo", "-x", "--cfg"])
def test_an_unknown_option(flag, capsys):
    assert run("train", flag) == 2
    assert "--cfg job" in capsys.readouterr().err


def test_multirun_is_refused(capsys):
    assert run("train", "-m", "seed=1,2") == 2
    assert "multirun" in capsys.readouterr().err


def test_cfg_job_prints_the_whole_config(capsys):
    assert run("train", "--cfg", "job", "seed=3") == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["seed"], tree["optim"]["name"], tree["max_steps"]) == (3, "adamw", 1200)


def test_prepare_takes_its_kind_as_a_bare_word(capsys):
    assert run("prepare", "scenes", "out=x", "--cfg", "job") == 0
    assert yaml.safe_load(capsys.readouterr().out)["kind"] == "scenes"


def test_show_takes_run_folders(monkeypatch, capsys):
    module = types.ModuleType("selfsight.show")
    module.show = lambda cfg: print(*cfg.runs)
    monkeypatch.setitem(sys.modules, "selfsight.show", module)
    assert run("show", "runs/a", "runs/b") == 0
    assert capsys.readouterr().out == "runs/a runs/b\n"
    assert run("show") == 2
    assert run("show", "seed=1") == 2


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_lists_every_command(args, capsys):
    assert run(*args) == 0
    out = capsys.readouterr().out
    assert all(f"  {command}  " in out for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_short_and_names_only_keys_that_exist(command, capsys):
    assert run(command, "--help") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 120
    if command == "show":
        return
    needed = {"index": "data.train=x", "prepare": "kind=scenes out=x", "doctor": "data=folder data.root=x"}
    needed |= {
        "probe": "checkpoint=x data=folder data.root=x",
        "table": "checkpoint=x data=folder data.root=x",
        "export": "checkpoint=x out=x",
        "import": "source=x out=x backbone=vit_s",
    }
    needed |= {"proposals": "data=folder data.root=x"}
    needed |= {"show analysis": "checkpoint=x data=folder data.root=x"}
    name = command.rpartition(" ")[2]
    cfg = config.load(name, needed.get(command, "").split())
    known = {*config._keys(cfg), *config.groups(name)}
    for probe in config.options("probe") if command == "probe" else ():
        known |= {f"probe.{key}" for key in config.load("probe", ["checkpoint=x", f"probe={probe}"]).probe}
    if command in ("train", "probe"):
        slurm = config.load(name, [*needed.get(command, "").split(), "launcher=slurm"]).launcher
        known |= {f"launcher.{key}" for key in slurm}
    out = re.sub(r"timm\.create_model\(.*\)|python \w+\.py", "", out)
    named = set(re.findall(r"(?<![\w.\])/:])([a-z_]+(?:\.[a-z_]+)*)=", out))
    assert named <= known, named - known


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"selfsight {__version__}\n"


@pytest.mark.parametrize("start", [["-m", "selfsight", "train"], ["train.py"]])
def test_help_and_errors_answer_without_torch(start, tmp_path):
    """Also: the script works from any folder, and Hydra neither changes it nor leaves anything in it."""
    start = [str(ROOT / part) if part.endswith(".py") else part for part in start]
    command = [sys.executable, "-X", "importtime", *start, "bach_size=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "error: unknown key 'bach_size'" in done.stderr
    assert not re.search(r"\| +(torch|timm|lightning)$", done.stderr, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["train", "probe", "export"])
def test_scripts_speak_of_themselves(script):
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", "--help"], capture_output=True, text=True, check=True)
    assert f"python {script}.py" in done.stdout


def test_the_wheel_works_outside_the_checkout(tmp_path):
    import shutil

    if not (uv := shutil.which("uv")):
        pytest.skip("building a wheel needs uv")
    subprocess.run([uv, "build", "-q", "--wheel", "-o", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    inside = {p.relative_to(tmp_path / "site/selfsight/conf") for p in (tmp_path / "site").rglob("conf/**/*.yaml")}
    assert inside == {p.relative_to(ROOT / "conf") for p in (ROOT / "conf").rglob("*.yaml")}
    code = "import sys; sys.path.insert(0, 'site'); from selfsight import cli, config; print(config.conf_dir()); "
    code += "sys.exit(cli.main('train', ['--cfg', 'job']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.startswith("site") or str(tmp_path) in done.stdout.splitlines()[0]
