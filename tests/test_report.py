"""The report of a run: complete, self-contained, and honest about blanks."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from selfsight.training.pictures import grid, save_png
from selfsight.training.report import Series, _thin, chart, ticks, write_report

HEAD = "step,images,epoch,loss,lr,images_per_second,data_wait,mfu,knn,rankme,knn_raw_pixels,grad_norm\n"
ROWS = [
    "0,0,0,,0.0,,,,12.5,3.2,20.1,",
    "10,640,0.1,0.91,1e-3,410.5,0.04,,,,,1.5",
    "20,1280,0.2,0.72,9e-4,432.0,0.03,,31.0,14.9,,1.2",
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.csv").write_text(HEAD + "\n".join(ROWS) + "\n")
    (tmp_path / "config.yaml").write_text("objective:\n  name: mae # <b>not bold</b>\n")
    summary = {"objective": "mae", "backbone": "vit_nano", "knn": 31.0, "knn_untrained": 12.5, "knn_raw_pixels": 20.1,
               "steps": 20, "seconds": 75.0, "loss_last": 0.72, "mfu": None,
               "provenance": {"command": "train.py", "versions": {"torch": "2"}}}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    for step in (0, 10, 20):
        save_png(grid({"image": torch.rand(2, 3, 8, 8)}), tmp_path / "pictures" / f"pca-{step:07d}.png")
    return tmp_path


class Tags(HTMLParser):
    """Opened tags with attributes; fails on tags that close out of order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(run):
    text = write_report(run).read_text()
    return text, Tags(text).tags


def test_the_page_needs_no_other_file_and_no_script(run):
    text, tags = page(run)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in tags}
    assert all(a["src"].startswith("data:image/png;base64,") for tag, a in tags if tag == "img")
    assert "http" not in text and "url(" not in text


def test_every_measured_column_has_a_curve_and_blank_ones_have_none(run):
    text, tags = page(run)
    labels = [a["aria-label"].split(":")[0] for tag, a in tags if tag == "svg"]
    assert labels == ["Loss", "k-NN accuracy", "RankMe", "Learning rate", "Speed", "Data wait", "grad norm"]
    assert "Loss: 0.91 at first, 0.72 at last" in text


def test_shares_are_shown_in_percent(run):
    assert "Data wait: 4 at first, 3 at last" in page(run)[0]


def test_knn_is_compared_with_raw_pixels_and_the_untrained_backbone(run):
    text, _ = page(run)
    assert "raw pixels 20.1" in text and "untrained 12.5" in text


def test_summary_config_and_command_are_there_and_escaped(run):
    text, _ = page(run)
    assert "<h1>mae on vit_nano</h1>" in text and "31.0 %" in text and "1 min 15 s" in text
    assert "<td>command</td><td>train.py</td>" in text
    assert "&lt;b&gt;not bold&lt;/b&gt;" in text and "<b>not bold" not in text


def test_first_and_last_pictures_are_embedded_and_the_rest_counted(run):
    text, tags = page(run)
    assert sum(tag == "img" for tag, _ in tags) == 2
    assert "step 20" in text and "step 0 (1 more in pictures/)" in text


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    text, _ = page(tmp_path)
    assert "still running" in text and "seed: 0" in text


def test_numbers_that_are_not_finite_do_not_break_a_curve(run):
    with (run / "metrics.csv").open("a") as f:
        f.write("30,1920,0.3,nan,8e-4,inf,0.02,,,,,\n")
    text, _ = page(run)
    assert "nan" not in re.sub(r"base64,[^']*", "", text).lower().replace("vit_nano", "")


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.713, 0.914), (3, 3), (0, 0), (-5, 12), (1e-5, 9e-4), (0, 312_000)]
)
def test_ticks_are_round_and_span_the_values(low, high):
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
    step = found[1] - found[0]
    assert f"{step:e}"[0] in "125" and float(f"{step:.0e}") == pytest.approx(step)


def test_all_points_lie_inside_the_drawing():
    svg = chart(Series([(s, (-1) ** s * 7.3 * s) for s in range(40)], {"far": 900.0}), "x")
    (path,) = re.findall(r"points='([^']*)'", svg)
    for pair in path.split():
        x, y = map(float, pair.split(","))
        assert 58 <= x <= 506 and 12 <= y <= 206


def test_long_curves_are_thinned_but_keep_their_spikes_and_end():
    points = [(float(s), 100.0 if s == 4321 else 1.0) for s in range(20_000)]
    kept = _thin(points)
    assert len(kept) < 1300 and (4321.0, 100.0) in kept and kept[-1] == points[-1] and kept == sorted(kept)
