"""Files and words from strangers never become code: every place that loads something is given a file that would run a
command if it were unpickled, and the command is never run."""

import ast
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import runs
import tars
from kill_driver import count
from selfsight import cli
from selfsight.data import decode
from selfsight.data.manifest import Shards
from selfsight.data.source import DataError, SampleError

ROOT = Path(__file__).parents[1]
TINY = ("backbone.embed_dim=32", "backbone.depth=1", "backbone.num_heads=2", "objective.decoder_dim=32",
        "objective.decoder_depth=1", "objective.decoder_heads=2")  # fmt: skip
STEP = "nonfinite-step-000000001-rank-0.safetensors"


class Trap:
    """Unpickled by somebody who trusts it, this makes a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


def pickled(canary):
    return pickle.dumps(Trap(canary), protocol=2)


def saved(canary, legacy=False):
    out = io.BytesIO()
    torch.save({"model": {"w": torch.zeros(2)}, "x": Trap(canary)}, out, _use_new_zipfile_serialization=not legacy)
    return out.getvalue()


def array(canary):
    out = io.BytesIO()
    np.save(out, np.array([Trap(canary)], dtype=object), allow_pickle=True)
    return out.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on a shard, with a feature bank; and one that has adapters beside its backbone."""
    root = tmp_path_factory.mktemp("trained")
    shard = runs.shard(root / "a.tar", 40)
    words = (*TINY, "data=shards", f"data.train={shard}", "max_steps=1", "knn.every_n_steps=0")
    runs.run_here(root / "run", *words, without=runs.SCENES)
    runs.run_here(root / "adapted", *words, "adapt=adaptformer", without=runs.SCENES)
    assert cli.main("probe", probing(root / "run", root)) == 0
    return root


def probing(checkpoint, root):
    return [f"checkpoint={checkpoint}", "probe=knn", f"out={root}/out", f"bank.folder={root}/banks", "device=cpu",
            "num_workers=0", "data=shards", f"data.train={root}/a.tar"]  # fmt: skip


def again(root):
    """The command that continues the run for a step."""
    words = [w for w in runs.TINY if w.split("=")[0] not in runs.SCENES]
    return ["train", *words, *TINY, "data=shards", f"data.train={root}/a.tar", "max_steps=2", "knn.every_n_steps=0",
            f"run_dir={root}/run", "allow_change=true"]  # fmt: skip


def swap(folder, file, data):
    """Put data in place of a file of the newest checkpoint, and make its manifest fit."""
    (step,) = (folder / "checkpoints").glob("step-*")
    (step / file).write_bytes(data)
    manifest = json.loads((step / "MANIFEST.json").read_text())
    manifest[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (step / "MANIFEST.json").write_text(json.dumps(manifest))


# --- the places -------------------------------------------------------------------------------------------------------
# Each takes (a copy of the folder above, the canary) and returns the command that would fall into the trap.


def imported(name, legacy=False):
    def place(root, canary):
        (root / name).write_bytes(saved(canary, legacy))
        return ["import", f"source={root / name}", f"out={root}/model"]

    return place


def import_folder(root, canary):
    (root / "run/export/model.safetensors").unlink()
    (root / "run/export/pytorch_model.bin").write_bytes(saved(canary))
    return ["import", f"source={root}/run/export", f"out={root}/model"]


def init_from_file(root, canary):
    (root / "w.ckpt").write_bytes(saved(canary))
    shutil.rmtree(root / "run")
    return [*again(root), f"init_from={root}/w.ckpt"]


def init_from_run(root, canary):
    swap(root / "adapted", "model.safetensors", saved(canary))
    shutil.rmtree(root / "run")
    return [*again(root), f"init_from={root}/adapted"]


def resumed(file):
    def place(root, canary):
        swap(root / "run", file, saved(canary))
        return again(root)

    return place


def best_mark(root, canary):
    """`best` names a folder outside the run."""
    shutil.copytree(root / "run/checkpoints/step-000000001", root / "elsewhere")
    (root / "elsewhere/model.safetensors").write_bytes(saved(canary))
    (root / "run/checkpoints/best").write_text("../../elsewhere")
    shutil.rmtree(root / "run/export")
    return ["probe", *probing(root / "run", root), "step=best"]


def probe_run(root, canary):
    swap(root / "run", "model.safetensors", saved(canary))
    shutil.rmtree(root / "run/export")
    return ["probe", *probing(root / "run", root)]


def probe_export(root, canary):
    (root / "run/export/model.safetensors").write_bytes(saved(canary))
    return ["probe", *probing(root / "run/export", root)]


def probe_export_bin(root, canary):
    (root / "run/export/model.safetensors").rename(root / "aside")
    (root / "run/export/pytorch_model.bin").write_bytes(saved(canary))
    return ["probe", *probing(root / "run/export", root)]


def probe_adapter(root, canary):
    (root / "adapted/export/adapter.safetensors").write_bytes(saved(canary))
    return ["probe", *probing(root / "adapted/export", root)]


def probe_file(root, canary):
    (root / "w.pth").write_bytes(saved(canary))
    return ["probe", *probing(root / "w.pth", root)]


def exported(root, canary):
    swap(root / "run", "model.safetensors", saved(canary))
    shutil.rmtree(root / "run/export")
    return ["export", f"checkpoint={root}/run", f"out={root}/model"]


def analysed(root, canary):
    swap(root / "run", "model.safetensors", saved(canary))
    shutil.rmtree(root / "run/export")
    return ["show", "analysis", f"checkpoint={root}/run", f"out={root}/page"]


def shown(name):
    def place(root, canary):
        (root / "run" / name).write_bytes(pickled(canary))
        return ["show", f"{root}/run"]

    return place


def config_yaml(root, canary):
    shutil.rmtree(root / "run/export")  # or it would be copied, and no config opened
    (root / "run/config.yaml").write_text(f"a: !!python/object/apply:os.system ['touch {canary}']\n")
    return ["export", f"checkpoint={root}/run", f"out={root}/model"]


def config_target(root, canary):
    shutil.rmtree(root / "run/export")
    path = root / "run/config.yaml"
    path.write_text(path.read_text() + f"extra: {{_target_: os.system, command: 'touch {canary}'}}\n")
    return ["export", f"checkpoint={root}/run", f"out={root}/model"]


def replayed(file):
    def place(root, canary):
        facts = json.dumps({"total_steps": 1, "steps_per_epoch": 1.0, "mean": [0.0] * 3, "std": [1.0] * 3})
        save_file({"key": torch.zeros(1)}, root / "run" / STEP, {"facts": facts})
        (root / "run" / file).write_bytes(saved(canary))
        return ["replay", f"batch={root}/run/{STEP}"]

    return place


def bank(pattern):
    def place(root, canary):
        for path in root.glob(f"banks/*/*/{pattern}"):
            path.write_bytes(array(canary) if path.suffix == ".npy" else pickled(canary))
        return ["probe", *probing(root / "run", root)]

    return place


def index(root, canary):
    (root / "a.tar.idx").write_bytes(pickled(canary))
    return ["index", f"data.train={root}/a.tar"]


def classes(root, canary):
    (root / "classes.json").write_bytes(pickled(canary))
    return ["index", f"data.train={root}/a.tar"]


def first_image(root):
    with tarfile.open(root / "a.tar") as archive:
        return archive.extractfile("s0000.jpg").read()


def members(root, canary, shard="b.tar"):
    """A shard with a pickle of every kind that webdataset's own decoders would open, and one in place of an image."""
    image = first_image(root)
    evil = [(f"e{i}.{kind}", pickled(canary)) for i, kind in enumerate(("pyd", "pkl", "pickle", "pth", "jpg", "cls"))]
    evil += [("n.npy", array(canary)), ("n.npz", array(canary)), ("o.jpg", image), ("o.objects.png", pickled(canary)),
             ("o.mask.png", pickled(canary)), ("o.boxes.json", pickled(canary)), ("p.jpg", image),
             ("p.json", pickled(canary))]  # fmt: skip
    return tars.write(root / shard, [(f"g{i}.jpg", image) for i in range(8)] + evil)


def trained_on(mode):
    def place(root, canary):
        shutil.rmtree(root / "run")
        return [*again(root), f"data.train={members(root, canary)}", f"data.mode={mode}"]

    return place


def side_cars(root, canary):
    (root / "side").mkdir()
    tars.write(root / "side/a.tar", [("s0000.objects.png", pickled(canary)), ("s0001.pyd", pickled(canary))])
    shutil.rmtree(root / "run")
    return [*again(root), "objective=odis", f"data.objects={root}/side/a.tar"]


def proposed(root, canary):
    (root / "side").mkdir()
    tars.write(root / "side/a.tar", [("s0000.pyd", pickled(canary)), ("s0001.objects.png", pickled(canary))])
    return ["proposals", f"checkpoint={root}/run", f"out={root}/side", "device=cpu"]


def prepared(root, canary):
    return ["prepare", "shards", f"source={members(root, canary)}", f"out={root}/shards", "workers=1"]


PLACES = {
    **{f"import {n}": imported(n) for n in ("w.pth", "w.ckpt", "w.pt", "w.bin", "w.pth.tar", "w.safetensors")},
    "import legacy": imported("w.pth", legacy=True), "import folder": import_folder,
    "init_from file": init_from_file, "init_from run": init_from_run,
    "resume, model": resumed("model.safetensors"), "resume, optimizer": resumed("optim.safetensors"),
    "resume, state": resumed("state.json"), "best": best_mark,
    "probe run": probe_run, "probe export": probe_export, "probe export .bin": probe_export_bin,
    "probe adapter": probe_adapter, "probe file": probe_file, "export": exported, "analysis": analysed,
    **{f"show {n}": shown(n) for n in ("summary.json", "metrics.csv", "config.yaml")},
    "config.yaml": config_yaml, "config.yaml _target_": config_target,
    "replay batch": replayed(STEP), "replay weights": replayed(STEP.replace("-rank-0", "")),
    "bank arrays": bank("*.npy"), "bank note": bank("bank.json"), "index": index, "classes.json": classes,
    "shards": trained_on("exact"), "stream": trained_on("stream"), "side-cars": side_cars, "proposals": proposed,
    "prepare": prepared,
}  # fmt: skip
# What is pickled there is ignored, and the command does its work all the same.
FINE = ("show metrics.csv", "bank arrays", "bank note", "index", "shards", "stream", "prepare")


@pytest.mark.parametrize("place", PLACES)
def test_no_file_is_run(trained, tmp_path, capfd, place):
    root, canary = tmp_path / "copy", tmp_path / "canary"
    shutil.copytree(trained, root)
    command, *words = PLACES[place](root, canary)
    code = runs.with_handlers_put_back(lambda: cli.main(None, [command, *words]))
    said = capfd.readouterr()
    assert not canary.exists()
    assert code == (0 if place in FINE else 2), said.out[-1000:] + said.err[-2000:]
    assert place in FINE or (said.err.startswith("error: ") and said.err.strip().count("\n") == 0), said.err
    count("places given a file that would run a command")


@pytest.mark.parametrize("make", [pickled, saved, array])
def test_the_traps_work(tmp_path, make):
    data = io.BytesIO(make(tmp_path / "canary"))
    if make is array:
        np.load(data, allow_pickle=True)
    else:
        torch.load(data, weights_only=False) if make is saved else pickle.load(data)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("key", ["data.train", "data.val", "data.root", "data.root_val", "data.objects", "source"])
@pytest.mark.parametrize("prefix", ["", "/d/a.tar::", "{a,b}::"])
def test_commands_in_place_of_addresses_are_not_run(tmp_path, capsys, key, prefix, monkeypatch):
    shard = runs.shard(tmp_path / "a.tar", 16)
    monkeypatch.setenv("GOPEN_REWRITE", f"/=pipe:touch {tmp_path}/canary #")  # webdataset's way to the same
    value = f"{prefix}pipe:touch {tmp_path}/canary; cat {shard}"
    words = (
        ["data=folder", f"data.root={tmp_path}"] if key == "data.root_val" else ["data=shards", f"data.train={shard}"]
    )
    words = ["data=folder"] if key == "data.root" else words
    command = (
        ["prepare", "shards", f"out={tmp_path}/o"] if key == "source" else ["train", *words, f"run_dir={tmp_path}/r"]
    )
    assert runs.with_handlers_put_back(lambda: cli.main(None, [*command, f"{key}={value}"])) == 2
    assert not (tmp_path / "canary").exists() and "error: " in capsys.readouterr().err


LEAD_ELSEWHERE = ("../out", "../../out", "{abs}/out", "a/../../out")


@pytest.mark.parametrize("names", [LEAD_ELSEWHERE, ("..\\out",)], ids=["slashes", "backslashes"])
def test_names_that_lead_elsewhere_are_never_written_to(tmp_path, trained, names):
    here = tmp_path / "a/b"
    here.mkdir(parents=True)
    image = first_image(trained)
    named = [f"{name.format(abs=tmp_path / 'abs')}{i}.jpg" for name in names for i in range(3)]
    shard = tars.write(here / "x.tar", [(name, image) for name in named])
    code = cli.main(None, ["prepare", "shards", f"source={shard}", f"out={here}/shards", "workers=1"])
    assert code == (0 if names is LEAD_ELSEWHERE else 2)  # there the first dot ends the key: nothing is an image
    if code == 0:
        assert len(Shards(str(next((here / "shards").glob("*.tar"))), here / "index")) == len(named)
    found = {p.relative_to(tmp_path).parts[:3] for p in tmp_path.rglob("*") if p.is_file()}
    assert all(parts[:2] == ("a", "b") for parts in found), found


def test_a_decompression_bomb_is_refused_before_a_pixel_is_decoded(tmp_path, monkeypatch):
    out = io.BytesIO()
    from PIL import Image

    Image.new("1", (20_000, 20_000)).save(out, "PNG")
    assert len(out.getvalue()) < 100_000
    shard = tars.write(tmp_path / "a.tar", [("a.png", out.getvalue())])
    decode._formats()  # a plug-in draws something when it is imported
    monkeypatch.setattr(decode.Image.Image, "load", lambda *_: pytest.fail("pixels were decoded"))
    raw = Shards(shard, tmp_path / "index").read(0)
    with pytest.raises(SampleError, match=r"20000 x 20000 pixels|more pixels than the limit"):
        decode.decode(raw.image, raw.where)


def test_remote_schemes_that_nobody_asked_for_are_refused(tmp_path):
    for address in ("ftp://x/a.tar", "gs://x/a.tar", "file+x://a.tar", "hdfs://a.tar"):
        with pytest.raises(DataError):
            Shards(address, tmp_path)


# --- the source itself ------------------------------------------------------------------------------------------------

FORBIDDEN = {  # call -> what must be said beside it, None: never
    "eval": None, "exec": None, "compile": None, "__import__": None, "os.system": None, "os.popen": None,
    "pickle.load": None, "pickle.loads": None, "pickle.Unpickler": None, "marshal.loads": None, "shelve.open": None,
    "yaml.load": None, "yaml.unsafe_load": None, "yaml.full_load": None, "joblib.load": None, "instantiate": None,
    "hydra.utils.instantiate": None, "OmegaConf.register_new_resolver": None, "torch.hub.load": None,
    "torch.load": ("weights_only", True), "tarfile.extractall": None,
}  # fmt: skip


def calls(source):
    """(dotted name by what was imported, keywords, line) of every call in a source text."""
    nodes, names = list(ast.walk(ast.parse(source))), {}
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            name = (names.get(first, first) + dot + rest).removeprefix("builtins.")
            yield name, {k.arg: ast.unparse(k.value) for k in node.keywords}, node.lineno


def unsafe_calls(source):
    """(name, line) of the calls that may run what they read."""
    for name, keywords, line in calls(source):
        rule = FORBIDDEN.get(name, False)
        unsafe = rule is None or (rule and keywords.get(rule[0]) != str(rule[1]))
        extract = re.search(r"\.(extractall|extract)$", name) and "tar" in name
        if unsafe or extract or keywords.get("shell") == "True" or keywords.get("allow_pickle") == "True":
            yield name, line


@pytest.mark.parametrize("source", [
    "import pickle\npickle.load(f)", "import pickle as p\np.load(f)", "from pickle import load\nload(f)",
    "from pickle import loads as read\nread(b)", "def f():\n    from os import system\n    system(x)",
    "import torch as t\nt.load(f)", "from torch import load\nload(f, weights_only=False)", "eval(x)",
    "from builtins import exec as e\ne(x)", "import numpy as np\nnp.load(f, allow_pickle=True)",
    "from hydra.utils import instantiate as make\nmake(c)", "from subprocess import run\nrun(x, shell=True)",
])  # fmt: skip
def test_unsafe_calls_are_found_by_any_name(source):
    assert len(list(unsafe_calls(source))) == 1
    assert not list(unsafe_calls("from torch import load\nload(f, weights_only=True)\nfrom json import load\nload(f)"))


def test_no_line_of_the_package_runs_what_it_reads():
    found, seen = [], 0
    for path in [*ROOT.glob("*.py"), *ROOT.glob("ssl/**/*.py"), *ROOT.glob("data/*.py")]:
        source = path.read_text()
        seen += len(list(calls(source)))
        found += [f"{path.relative_to(ROOT)}:{line}: {name}" for name, line in unsafe_calls(source)]
    assert seen > 1000 and not found, found
