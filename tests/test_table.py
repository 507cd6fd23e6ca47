"""`selfsight table`: every row is what its probe gives alone, the backbone runs once, and what is missing is said."""

import json

import pytest

import runs
from selfsight import config
from selfsight.config import ConfigError
from selfsight.probes import ProbeError, passes
from selfsight.probes import run as probes
from selfsight.probes.table import build_rows, names, table
from test_finetune import squares

SMALL = ("num_workers=0", "device=cpu", "data=scenes", "data.num_train=60", "data.num_val=30", "seeds=2")
BRIEF = "set=linear.epochs=2 ep.epochs=1 ep.warmup_epochs=0 ep.queries=[4] layerwise.epochs=1"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two runs of two steps with other weights."""
    root = tmp_path_factory.mktemp("table")
    for seed in (0, 1):
        runs.run_here(root / f"seed{seed}", "max_steps=2", f"seed={seed}", "knn.every_n_steps=0")
    return root


def filled(pair, out, *words):
    cfg = config.load("table", [f"checkpoint=[{pair / 'seed0'},{pair / 'seed1'}]", f"out={out}", *SMALL, *words])
    return table(cfg)


def test_rows_are_what_their_probes_give_and_the_backbone_runs_once(pair, tmp_path, monkeypatch, capsys):
    seen = []
    encode = passes.encode_samples

    def counted(model, source, ids, *rest):
        seen.append(len(ids))
        return encode(model, source, ids, *rest)

    monkeypatch.setattr("selfsight.probes.store.encode_samples", counted)
    assert filled(pair, tmp_path / "t", "probes=[knn,linear,ep,layerwise]", BRIEF) == 0
    assert sorted(seen) == [30, 30, 60, 60]  # both splits of both runs, once
    rows = json.loads((tmp_path / "t" / "table.json").read_text())["rows"]
    assert [(r["checkpoint"], r["row"]) for r in rows] == [
        (run, row) for run in ("seed0", "seed1") for row in ("knn", "linear", "ep", "layerwise")
    ]
    alone = probes.probe(config.load("probe", [f"checkpoint={pair / 'seed1'}", f"out={tmp_path}", *SMALL[:-1]]))
    assert rows[4]["result"]["top1"] == alone["top1"]
    written = json.loads((tmp_path / "t" / "seed1" / "ep" / "attentive-ep.json").read_text())
    assert written["top1"] == rows[6]["result"]["top1"] and written["settings"]["probe"]["epochs"] == 1
    text = (tmp_path / "t" / "table.md").read_text()
    assert f"{alone['top1']:.2f} ({alone['standard_error']:.2f})" in text
    assert "| layerwise, layer 0" in text and "± " in text and "Pooling ep" in text
    assert text.count("\n- knn (seed0, seed1): Weighted") == 1  # what two checkpoints have alike is said once
    assert text.partition("\nProtocols")[0] in capsys.readouterr().out + "\n"
    assert (tmp_path / "t" / "layers.svg").read_text().count("<polyline") == 2


def test_banks_that_are_not_kept_serve_all_rows_and_go(pair, tmp_path, monkeypatch, capsys):
    seen = []
    encode = passes.encode_samples
    monkeypatch.setattr("selfsight.probes.store.encode_samples", lambda *a: seen.append(len(a[2])) or encode(*a))
    words = ("bank.keep=false", f"bank.folder={tmp_path / 'banks'}", "probes=[knn,linear]", "set=linear.epochs=2")
    assert filled(pair, tmp_path / "t", *words) == 0
    assert sorted(seen) == [30, 30, 60, 60] and not (tmp_path / "banks").exists()


def test_a_warning_of_several_rows_is_said_once(tmp_path, pair, capsys):
    root = squares(tmp_path, "train", 24)
    words = ("data=folder", f"data.root={root}", f"data.root_val={root}", f"checkpoint={pair / 'seed0'}",
             f"out={tmp_path / 't'}", "num_workers=0", "device=cpu", "probes=[knn,linear]", "seeds=1")  # fmt: skip
    assert table(config.load("table", [*words, "set=linear.epochs=1"])) == 0
    assert capsys.readouterr().out.count("warning: ") == 1
    rows = json.loads((tmp_path / "t" / "table.json").read_text())["rows"]
    assert all(any("byte for byte" in w for w in row["result"]["warnings"]) for row in rows)
    assert (tmp_path / "t" / "table.md").read_text().count("byte for byte") == 1


def test_a_row_that_cannot_be_had_says_why_and_the_rest_goes_on(pair, tmp_path):
    words = (f"checkpoint={pair / 'seed0'}", f"out={tmp_path}", "probes=[lowshot,knn]", "set=lowshot.shots=60")
    assert table(config.load("table", [*SMALL, *words])) == 1
    text = (tmp_path / "table.md").read_text()
    assert "- seed0, lowshot: no number, probe.shots=60 images per class" in text and "| knn" in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "a table needs checkpoint="),
        (["checkpoint=x", "set=ep.epochs"], "write <row>.<key>=<value>"),
        (["checkpoint=x", "set=eq.epochs=3"], "no row is called 'eq'"),
        (["checkpoint=x", "set=linear.epoch=3"], "did you mean 'probe.epochs'"),
        (["checkpoint=x", "masks.val=/d/val.tar", "probes=segmentation"], "masks.val is given without masks.train"),
        (["checkpoint=[runs/a,runs/a]"], "given twice"),
        (["checkpoint=x", "probes=[knn,eq]"], "expected one or several of knn"),
    ],
)
def test_wrong_words_are_refused_before_anything_runs(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        table(config.load("table", words))


def test_a_checkpoint_that_is_none_is_refused_before_the_others_are_probed(pair, tmp_path):
    with pytest.raises(ProbeError, match="neither a run folder"):
        table(config.load("table", [f"checkpoint=[{pair / 'seed0'},/no/run]", f"out={tmp_path / 't'}", *SMALL]))
    assert not (tmp_path / "t").exists()


def test_names_are_short_and_distinct(tmp_path):
    for place in ("a/run", "b/run"):
        (tmp_path / place).mkdir(parents=True)
    given = [str(tmp_path / "a/run"), str(tmp_path / "b/run"), "vit_small_patch16_224.dino"]
    assert list(names(given)) == ["run", "b-run", "vit_small_patch16_224.dino"]


def test_segmentation_has_its_own_shards_and_seeds_reach_only_rows_that_have_them():
    cfg = config.load("table", ["probes=[knn,segmentation,ep]", "masks.train=/d/t.tar", "seeds=5", "data=scenes"])
    knn, segmentation, ep = build_rows(cfg)
    assert segmentation.cfg.data.train == "/d/t.tar" and knn.cfg.data.name == "scenes"
    assert segmentation.cfg.probe.seeds == ep.cfg.probe.seeds == 5 and ep.cfg.probe.pooling == "ep"
