"""What README and docs say is true: commands parse, files and tests that are named exist, the grid is the code's."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from selfsight import cli, config, objectives, schema
from selfsight.backbones import NAMES
from selfsight.backbones.tokens import BackboneError
from selfsight.nn.decoders import DECODERS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "slurm/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
START = re.compile(r"python (?P<script>train|probe|export)\.py|(?<![\w-])selfsight(?= )|\S*torchrun .*?train\.py")
FENCE = re.compile(r"^```(?:bash|console)\n(.*?)^```", re.M | re.S)

# Row of the grid -> (a small member and its image size, which names belong to it).
ROWS = {
    "ViT": ("vit_nano", 64, lambda family, timm_name: family == "vit"),
    "ConvNeXt V1": ("convnext_nano_lite", 64, lambda family, timm_name: timm_name.startswith("convnext_")),
    "ConvNeXt V2": ("convnextv2_nano_lite", 64, lambda family, timm_name: timm_name.startswith("convnextv2_")),
    "SHViT": ("shvit_nano_lite", 128, lambda family, timm_name: family == "shvit"),
}


def commands(page: Path) -> list[str]:
    """Lines of the shell blocks of a page that call this project, from the call on, continuation lines joined."""
    lines = "\n".join(FENCE.findall(page.read_text())).replace("\\\n", " ").splitlines()
    return [line[found.start() :] for line in lines if not line.startswith("#") and (found := START.search(line))]


def words_of(line: str) -> tuple[str | None, list[str]]:
    """(script name or None, arguments) of a command line, without comments and what follows an && or a pipe."""
    script = START.match(line)["script"] or ("train" if "torchrun" in line else None)
    rest = shlex.split(line[START.match(line).end() :], comments=True)
    end = next((i for i, word in enumerate(rest) if word in ("&&", "|", ";", "&") or word.startswith(">")), len(rest))
    return script, rest[:end]


ALL = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page)]


def test_there_are_commands_to_check():
    assert len(ALL) > 20


@pytest.mark.parametrize(("page", "line"), ALL)
def test_a_command_parses(page, line, capsys):
    script, words = words_of(line)
    if "--help" not in words:
        words.append("--cfg=job")
    assert cli.main(script, words) == 0, f"{page}: {line}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_tests_that_are_named_exist(page):
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", page.read_text())
    missing = [f"{f}::{t}" for f, t in named if f"\ndef {t}(" not in (ROOT / "tests" / f).read_text()]
    assert not missing
    assert named or page.name != "README.md" or page.parent != ROOT


def says(cfg, backbone, size: int) -> tuple[str, str]:
    """What the code says to an objective on a backbone: its cell of the grid, and the sentence if it is a refusal."""
    cfg.backbone, cfg.image_size = backbone, size
    if cfg.views["global"].size:
        cfg.views["global"].size, cfg.views.local.size = size, max(64, size // 2)
    if "exemplar_size" in cfg.objective:
        cfg.objective.context_size, cfg.objective.exemplar_size = size, max(64, size // 2)
    try:
        with torch.device("meta"):  # as a run does, before it touches data
            objective = objectives.build_objective(cfg, total_steps=1, steps_per_epoch=1)
    except BackboneError as error:
        return "refused", str(error)
    if cfg.objective.name == "mae":
        return f"trains (`{DECODERS[objective.exports()['student'].family][0]}`)", ""
    return ("trains (read-out)" if "readout" in objective.student else "trains"), ""


def grid() -> list[str]:
    """The table of README: every backbone by family, and what the code says to each objective on it."""
    cfgs = {name: config.load("train", [f"objective={name}"]) for name in objectives.NAMES}
    rows = [f"| backbone | names | {' | '.join(f'`{n}`' for n in cfgs)} |", "|---|---|" + "---|" * len(cfgs)]
    for label, (small, size, member) in ROWS.items():
        members = " ".join(f"`{n}`" for n, (family, timm_name, _) in NAMES.items() if member(family, timm_name))
        backbone = config.load("train", [f"backbone={small}"]).backbone
        rows.append(f"| {label} | {members} | {' | '.join(says(c, backbone, size)[0] for c in cfgs.values())} |")
    backbone = config.load("train", ["backbone=timm", "backbone.name=resnet18"]).backbone
    answers = {name: says(cfg, backbone, 64) for name, cfg in cfgs.items()}
    cells = " | ".join(cell for cell, _ in answers.values())
    rows += [f"| any other timm model | `timm backbone.name=resnet18` | {cells} |", ""]
    for sentence in dict.fromkeys(sentence for _, sentence in answers.values() if sentence):
        who = ", ".join(f"`{n}`" for n, (_, other) in answers.items() if other == sentence)
        rows.append(f"- refused, {who}: {sentence}")
    return rows


def test_the_grid_is_what_the_code_accepts():
    found = re.search(r"<!-- grid -->\n(.*?)\n<!-- /grid -->", (ROOT / "README.md").read_text(), re.S)
    assert found, "README.md has no <!-- grid --> … <!-- /grid -->"
    assert found[1].splitlines() == grid()


def test_the_grid_holds_every_name():
    in_grid = {name for _, _, member in ROWS.values() for name, (f, t, _) in NAMES.items() if member(f, t)}
    assert in_grid | {"timm"} == set(config.options("backbone"))
    assert sorted(objectives.NAMES) == config.options("objective")


def bases(name: str) -> list[str]:
    """The objectives whose keys this one takes over (odis: ibot, dino): their pages explain those."""
    schemas = schema.SCHEMAS["objective"]
    return [n for n in objectives.NAMES if issubclass(schemas[name], schemas[n])]


@pytest.mark.parametrize("name", objectives.NAMES)
def test_the_pages_name_every_key_of_the_objective(name):
    text = "".join((ROOT / f"docs/{n}.md").read_text() for n in bases(name))
    keys = [k for k in config.load("train", [f"objective={name}"]).objective if k not in ("name", "recipe")]
    assert [k for k in keys if f"`{k}`" not in text] == []


@pytest.mark.parametrize("name", objectives.NAMES)
def test_an_objectives_page_has_its_experiments_and_the_readme_has_the_page(name):
    text = (ROOT / f"docs/{name}.md").read_text()
    files = {e: (ROOT / f"conf/experiment/{e}.yaml").read_text() for e in config.options("experiment")}
    own = [e for e, content in files.items() if f"override /objective: {name}\n" in content]
    assert own and [e for e in own if f"`{e}`" not in text] == []
    assert f"(docs/{name}.md)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", ["trust", "contracts", "checkpointing"])
def test_a_table_that_is_measured_is_what_was_measured(benchmarks, script):
    module = importlib.import_module(script)
    from page import shown

    results = json.loads((ROOT / f"benchmarks/results/{script}.json").read_text())
    assert shown(module.PAGE, script) == module.table(results), f"write the page again: benchmarks/{script}.py"


def test_the_guards_cost_at_most_a_hundredth_of_a_step():
    """As measured by benchmarks/guards.py."""
    measured = json.loads((ROOT / "benchmarks/results/guards.json").read_text())
    assert {"vit_s", "vit_b"} <= set(measured["steps"])
    for step in measured["steps"].values():
        assert max(step["shares"]["one process"], step["shares"]["two processes"]) <= 0.01


def test_the_page_of_trust_is_not_written_when_a_count_is_missing(benchmarks, monkeypatch, tmp_path):
    import trust

    counts = json.loads(trust.RESULTS.read_text())["counts"]
    del counts["requeues by Slurm"]  # its tests were skipped
    for name in ("RESULTS", "PAGE"):
        monkeypatch.setattr(trust, name, tmp_path / name)
    monkeypatch.setattr(trust, "measure", lambda: {"counts": counts, "seconds": 1})
    monkeypatch.setattr("sys.argv", ["trust.py"])
    with pytest.raises(SystemExit, match="no test has counted requeues by Slurm: nothing is written"):
        trust.main()
    assert list(tmp_path.iterdir()) == []


def test_every_test_that_the_page_of_trust_names_must_have_run(benchmarks):
    import trust

    assert {f"tests/{test.partition('::')[0]}" for test in trust.proofs()} == set(trust.files())
    case = '<testcase classname="tests.{}" name="{}">{}</testcase>'
    cases = (("test_a", "test_b[1]", ""), ("test_a", "test_b[2]", "<skipped/>"), ("test_c", "test_d", ""))
    report = f"<testsuites>{''.join(case.format(*c) for c in cases)}</testsuites>"
    assert trust.passed(report) == {"test_c.py::test_d"}


def test_cells_that_were_not_measured_again_keep_their_date(benchmarks):
    import contracts

    ok, wrong = {"processes": {"ok": True, "note": "0"}}, {"processes": {"ok": False, "note": "1"}}
    known = {"cells": {"a": ok, "b": ok, "gone": ok}, "variants": {"v": ok}, "minutes": 46,
             "measured": dict.fromkeys(("a", "b", "gone", "v"), "then")}  # fmt: skip
    found = contracts.merged(known, {"b": wrong, "new": ok, "v": wrong},
                             {"cells": ["a", "b", "new"], "variants": ["v"]}, "now")  # fmt: skip
    assert found["measured"] == {"a": "then", "b": "now", "v": "now", "new": "now"} and found["minutes"] == 46
    assert list(found["cells"]) == ["a", "b", "new"]
    assert contracts.broken(found) == [("b", "processes"), ("v", "processes")]
