"""`selfsight show`: runs side by side, finished or not, and their curves."""

import json
import os
import xml.etree.ElementTree as ET

import pytest
from omegaconf import OmegaConf

from selfsight import config, show
from selfsight.cli import main

ROWS = """step,images,epoch,loss,lr,images_per_second,data_wait,mfu,knn,rankme
0,0,0,,0,,,,11.5,9.25
10,1280,0.25,1.25,0.001,400,0.01,,,
20,2560,0.5,1.125,0.001,410,0.01,,,
30,3840,0.75,0.875,0.001,420,0.01,,20.5,14.5
"""


def make_run(folder, rows=ROWS, summary=None, keys=("max_steps=40",)):
    folder.mkdir(parents=True)
    config.save(config.load("train", list(keys)), folder / "config.yaml")
    (folder / "metrics.csv").write_text(rows)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def finished(folder):
    return make_run(
        folder,
        summary={
            "loss_first": 1.25, "loss_last": 0.5, "knn_untrained": 11.5, "knn": 31.25, "rankme": 20.5,
            "images_per_second": 415.0, "images_seen": 5120, "steps": 40, "seconds": 90.0, "objective": "mae",
            "backbone": "vit_nano",
        },
    )  # fmt: skip


def shown(folder, *runs, **more):
    return show.show(OmegaConf.create({"runs": [str(run) for run in runs], "out": str(folder / "c.svg"), **more}))


def test_finished_run_shows_its_summary(tmp_path, capsys):
    shown(tmp_path, finished(tmp_path / "a"))
    line = capsys.readouterr().out.splitlines()[1]
    for words in (
        "mae",
        "vit_nano",
        "scenes",
        "5,120",
        "1.2500 -> 0.5000",
        "11.5 -> 31.2",
        "20.5",
        "415",
        "1.5",
        "done",
    ):
        assert words in line


def test_unfinished_run_is_told_from_its_log(tmp_path):
    (found,) = shown(tmp_path, make_run(tmp_path / "a"))
    assert found["status"] == "running at step 30 of 40"
    assert (found["loss_first"], found["loss_last"]) == (1.25, 0.875)
    assert (found["knn_untrained"], found["knn"], found["rankme"]) == (11.5, 20.5, 14.5)
    assert found["images_seen"] == 3840


def test_run_that_has_not_logged_for_long_is_stopped(tmp_path):
    run = make_run(tmp_path / "a")
    os.utime(run / "metrics.csv", (0, 0))
    assert shown(tmp_path, run)[0]["status"] == "stopped at step 30 of 40"


def test_run_that_has_not_started_has_dashes(tmp_path, capsys):
    shown(tmp_path, make_run(tmp_path / "a", rows="step,images\n"))
    assert "running at step 0" in capsys.readouterr().out
    assert not (tmp_path / "c.svg").exists()


def test_curves_are_an_svg_with_a_line_per_run_and_panel(tmp_path):
    shown(tmp_path, finished(tmp_path / "a"), make_run(tmp_path / "b"))
    root = ET.parse(tmp_path / "c.svg").getroot()
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 4 and len(lines[1].get("points").split()) == 2


def test_points_stay_inside_the_axes(tmp_path):
    shown(tmp_path, make_run(tmp_path / "a"))
    root = ET.parse(tmp_path / "c.svg").getroot()
    width, height = float(root.get("width")), float(root.get("height"))
    for line in root.findall("{http://www.w3.org/2000/svg}polyline"):
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 < x < width and show._TOP <= y < height


def probed(path, top1, protocol="by k-NN", test="scenes", settings=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"probe": "knn", "top1": top1, "standard_error": 1.25, "step": 40, "protocol": protocol, "image_size": 64,
             "n_bank": 10, "n_query": 5, "data": {"train": "scenes", "test": test}, "settings": settings}  # fmt: skip
    path.write_text(json.dumps(facts))
    return path


def test_numbers_of_probes_stand_in_a_second_table_with_their_errors(tmp_path, capsys):
    for name, top1 in (("a", 50.0), ("b", 60.0)):
        probed(finished(tmp_path / name) / "probes" / "knn.json", top1)
    probed(tmp_path / "b" / "probes" / "best" / "knn.json", 61.0)
    found = shown(tmp_path, tmp_path / "a", tmp_path / "b")
    text = capsys.readouterr().out.split("probe, %")[1]
    assert text.splitlines()[0].split() == ["best/knn", "knn"]
    rows = [line.split()[1:] for line in text.splitlines()[1:3]]
    assert rows == [["-", "50.0", "±1.2", "@40"], ["61.0", "±1.2", "@40", "60.0", "±1.2", "@40"]]
    assert "not comparable" not in text
    assert found[1]["probes"]["knn"] == {"top1": 60.0, "standard_error": 1.25}


@pytest.mark.parametrize("other", [{"protocol": "by a vote"}, {"test": "photographs"}])
def test_numbers_that_were_measured_differently_carry_letters(tmp_path, capsys, other):
    probed(finished(tmp_path / "a") / "probes" / "knn.json", 50.0)
    probed(finished(tmp_path / "b") / "probes" / "knn.json", 60.0, **other)
    probed(finished(tmp_path / "c") / "probes" / "knn.json", 70.0)
    shown(tmp_path, *(tmp_path / name for name in "abc"))
    text = capsys.readouterr().out.split("probe, %")[1]
    assert [line.split()[-1] for line in text.splitlines()[1:4]] == ["a", "b", "a"]
    notes = text.split("not comparable across letters")[1]
    assert "(knn)" in notes and next(iter(other.values())) in notes.split("\n  b  ")[1]


def test_settings_that_no_words_name_make_other_numbers(tmp_path, capsys):
    words = ["checkpoint=-", "probe=lowshot"]
    all_sizes, one, half = (OmegaConf.to_container(config.load("probe", [*words, *more])) for more in (
        (), ("probe.shots=[1]", "probe.test=100"), ("bank.precision=bf16-mixed",)))  # fmt: skip
    for name, settings in (("a", all_sizes), ("b", one), ("c", half)):
        probed(finished(tmp_path / name) / "probes" / "lowshot.json", 50.0, settings=settings)
    shown(tmp_path, *(tmp_path / name for name in "abc"))
    text = capsys.readouterr().out
    assert [line.split()[-1] for line in text.split("probe, %")[1].splitlines()[1:4]] == ["a", "b", "c"]
    notes = " ".join(text.split())
    assert "Not as usual: shots=[1]." in notes and "Not as usual: bank.precision=bf16-mixed." in notes


def test_json_files_of_probes_are_compared_like_runs(tmp_path, capsys):
    one, two = (probed(tmp_path / name / "knn.json", 50.0, words) for name, words in (("x", "by k-NN"), ("y", "else")))
    found = shown(tmp_path, one, two)
    assert [row["probes"]["knn"]["top1"] for row in found] == [50.0, 50.0]
    text = capsys.readouterr().out
    assert "not comparable across letters" in text and not (tmp_path / "c.svg").exists()


def test_evaluations_during_training_have_a_panel_each(tmp_path):
    for name in "ab":
        run = make_run(tmp_path / name)
        (run / "evals").mkdir()
        (run / "evals" / "linear.csv").write_text("step,images,top1,standard_error\n10,80,20.0,1\n20,160,30.0,1\n")
    shown(tmp_path, tmp_path / "a", tmp_path / "b")
    text = (tmp_path / "c.svg").read_text()
    assert text.count("<polyline") == 6 and "linear, top-1 % over images seen" in text


def test_default_picture_is_in_the_current_folder(tmp_path, monkeypatch, capsys):
    run = finished(tmp_path / "runs" / "a")
    monkeypatch.chdir(tmp_path)
    assert main(None, ["show", str(run)]) == 0
    assert (tmp_path / "show.svg").exists() and "show.svg" in capsys.readouterr().out


def test_missing_folder_names_the_nearest_run(tmp_path):
    make_run(tmp_path / "mae-small")
    make_run(tmp_path / "other")
    with pytest.raises(show.ShowError, match=r"mae-smal does not exist; the nearest run folder is .*mae-small$"):
        shown(tmp_path, tmp_path / "mae-smal")


def test_a_folder_of_runs_names_a_run_in_it(tmp_path):
    make_run(tmp_path / "runs" / "mae")
    with pytest.raises(show.ShowError, match=r"is no run folder.*nearest run folder is .*mae$"):
        shown(tmp_path, tmp_path / "runs")


def test_other_entries_of_a_pattern_are_left_out_and_named(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    assert len(shown(tmp_path, make_run(tmp_path / "a"), tmp_path / "notes.txt")) == 1
    assert "notes.txt" in capsys.readouterr().out.split("left out")[1]


def test_broken_summary_is_named(tmp_path):
    run = make_run(tmp_path / "a")
    (run / "summary.json").write_text("{")
    with pytest.raises(show.ShowError, match=r"summary\.json is no JSON"):
        shown(tmp_path, run)


def test_other_formats_of_the_picture_are_refused(tmp_path):
    with pytest.raises(show.ShowError, match=r"\.svg"):
        shown(tmp_path, make_run(tmp_path / "a"), out="curves.png")


@pytest.mark.parametrize("low, high", [(0, 76800), (11.5, 31.25), (0.871, 0.873), (2.0, 2.0), (0, 0)])
def test_ticks_cover_the_range_with_few_round_numbers(low, high):
    found = show.ticks(low, high)
    assert found[0] <= low and found[-1] >= high
    assert 2 <= len(found) <= 8 and found == sorted(set(found))
