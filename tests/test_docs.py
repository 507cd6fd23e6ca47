"""What README and docs say is true: commands parse, files and tests that are named exist, the grid is the code's."""

import re
import shlex
from pathlib import Path

import pytest

from selfsight import cli, config
from selfsight.backbones import NAMES, build_backbone
from selfsight.backbones.tokens import BackboneError
from selfsight.nn.decoders import DECODERS
from selfsight.objectives.mae import MAE

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


def grid() -> list[str]:
    """The table of README: every backbone by family, and what the code says to MAE on it."""
    rows = ["| backbone | names | `objective=mae` |", "|---|---|---|"]
    for label, (small, size, member) in ROWS.items():
        names = [name for name, (family, timm_name, _) in NAMES.items() if member(family, timm_name)]
        backbone = build_backbone(small, MAE.needs, image_sizes=(size,))
        decoder = DECODERS[backbone.family][0]
        rows.append(f"| {label} | {' '.join(f'`{n}`' for n in names)} | trains (`{decoder}`) |")
    with pytest.raises(BackboneError) as refusal:
        build_backbone("resnet18", MAE.needs, image_sizes=(224,))
    rows.append(f"| any other timm model | `timm backbone.name=resnet18` | refused: {refusal.value} |")
    return rows


def test_the_grid_is_what_the_code_accepts():
    found = re.search(r"<!-- grid -->\n(.*?)\n<!-- /grid -->", (ROOT / "README.md").read_text(), re.S)
    assert found, "README.md has no <!-- grid --> … <!-- /grid -->"
    assert found[1].splitlines() == grid()


def test_the_grid_holds_every_name():
    in_grid = {name for _, _, member in ROWS.values() for name, (f, t, _) in NAMES.items() if member(f, t)}
    assert in_grid | {"timm"} == set(config.options("backbone"))
    assert config.options("objective") == ["mae"]  # another objective is another column


def test_the_page_of_mae_names_every_key_of_the_objective():
    text = (ROOT / "docs/mae.md").read_text()
    keys = [k for k in config.load("train", []).objective if k not in ("name", "recipe")]
    assert [k for k in keys if f"`{k}`" not in text] == []


def test_every_experiment_stands_in_the_docs():
    text = (ROOT / "docs/mae.md").read_text()
    assert [name for name in config.options("experiment") if f"`{name}`" not in text] == []
