"""Labels that a probe cannot work with: refused by the index, before the backbone runs, and always with a sample."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import runs
import tars
from selfsight import config
from selfsight.probes import ProbeError, passes, task
from selfsight.probes.run import probe


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return runs.exported_vit(tmp_path_factory.mktemp("probed") / "export", depth=1)


def png(i):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def shard(path, labels, broken=(), field="cls", how="header"):
    """A sample per label (None: without one); those whose number is in `broken` are no images, or only in their
    header (how="body")."""
    members = []
    for i, label in enumerate(labels):
        image = png(i)
        members.append((f"s{i:03d}.png", {"header": b"no image", "body": image[:300]}[how] if i in broken else image))
        if label is not None:
            data = str(label) if field == "cls" else json.dumps({"label": label})
            members.append((f"s{i:03d}.{field}", data.encode()))
    return tars.write(path, members)


@pytest.fixture
def run(exported, tmp_path, monkeypatch):
    """Probe two splits of shards; `run.batches` are the batches that went through the backbone."""
    batches, own = [], passes._encode
    monkeypatch.setattr(passes, "_encode", lambda *a, **k: (batches.append(1), own(*a, **k))[1])

    def call(train, test, *words, broken=(), test_broken=(), **kwargs):
        paths = (shard(tmp_path / "train" / "a.tar", train, broken, **kwargs),
                 shard(tmp_path / "val" / "a.tar", test, test_broken, **kwargs))  # fmt: skip
        here = [f"out={tmp_path / 'out'}", "num_workers=0", "device=cpu", f"bank.folder={tmp_path / 'banks'}"]
        data = ["data=shards", f"data.train={paths[0]}", f"data.val={paths[1]}", f"data.index_dir={tmp_path / 'index'}"]
        return probe(config.load("probe", [f"checkpoint={exported}", *data, *here, *words]))

    call.batches = batches
    return call


TRAIN, TEST = [0, 1, 2] * 6, [0, 1, 2] * 2
SMALL = ("probe=lowshot", "probe.shots=[1,6]", "probe.classifiers=[knn]", "probe.seeds=2")


@pytest.mark.parametrize("field", ["cls", "json"])
@pytest.mark.parametrize(("train", "test", "words", "says"), [
    (TRAIN, TEST, ("probe=lowshot", "probe.shots=[1,7]"), r"probe\.shots=7 images per class, and class 0 has 6 in the "
     "training split; leave larger numbers out"),
    ([*TRAIN, 3, 3], TEST, SMALL, r"probe\.shots=6 images per class, and class 3 has 2 in the training split;"),
    ([*TRAIN, None], TEST, ("probe=knn", "probe.k=3"), r"probe=knn needs labels, and 1 of 19 samples of .* have "
     r"none, e\.g\. .*train/a\.tar, key s018; label them"),
    (TRAIN, [*TEST, None], SMALL, r"probe=lowshot needs labels, and 1 of 7 .*, e\.g\. .*val/a\.tar, key s006;"),
    (TRAIN, [0, 5, *TEST, 5], ("probe=linear",), r"2 of 9 test labels are outside the head of 3 classes \(0 to 2, as "
     r"in the training split\), e\.g\. 5 of .*val/a\.tar, key s001; both splits must number"),
    ([*TRAIN, 100000], TEST, ("probe=retrieval",), r"labels go up to 100,000 with 19 training samples, e\.g\. "
     r"100,000 of .*a\.tar, key s018; number the classes from 0"),
])  # fmt: skip
def test_what_the_index_tells_is_said_before_the_backbone_runs(run, tmp_path, train, test, words, says, field):
    with pytest.raises(ProbeError, match=says):
        run(train, test, *words, field=field)
    assert not run.batches and not (tmp_path / "banks").exists()


def test_a_sample_far_behind_is_seen_as_well(run, monkeypatch):
    monkeypatch.setattr(task, "LOOKED_AT", 4)
    with pytest.raises(ProbeError, match=r"1 of 19 samples of .* have none, e\.g\. .*key s018"):
        run([*TRAIN, None], TEST, "probe=knn", "probe.k=3")
    assert not run.batches


def test_a_sentence_gives_the_label_of_the_sample_that_it_names(run):
    """Broken ones stand in front with other labels."""
    with pytest.raises(ProbeError, match=r"e\.g\. 7 of .*key s001;"):
        run(TRAIN, [5, 7, *TEST], "probe=knn", "probe.k=3", test_broken={0})
    with pytest.raises(ProbeError, match=r"labels go up to 100,000 .*e\.g\. 70,000 of .*key s019;"):
        run([*TRAIN, 100000, 70000], TEST, "probe=knn", "probe.k=3", broken={18})


@pytest.mark.parametrize(("label", "says"), [
    (None, r"probe=finetune needs labels, and 1 of 19 .*key s018;"),
    (70000, r"labels go up to 70,000 with 19 training samples, e\.g\. 70,000 of .*key s018;"),
])  # fmt: skip
def test_an_image_whose_end_is_missing_excuses_no_label_where_it_stays(run, label, says):
    """Fine-tuning looks at headers alone before it trains."""
    with pytest.raises(ProbeError, match=says):
        run([*TRAIN, label], TEST, "probe=finetune", "probe.epochs=1", broken={18}, how="body")


def test_queries_that_fine_tuning_cannot_decode_are_not_counted(run):
    words = ("probe=finetune", "probe.epochs=1", "probe.seeds=1", "probe.lrs=[0.001]")
    result = run(TRAIN, [*TEST, 1], *words, test_broken={6}, how="body")
    assert result["n_query"] == result["queries"] == 6 and len(result["bad_samples"]) == 1
    assert "1 epoch," in result["protocol"] and "1 seed " in result["protocol"]


@pytest.mark.parametrize("how", ["header", "body"])
@pytest.mark.parametrize(("train", "broken"), [
    ([*TRAIN, None], {18}),  # no label
    ([*TRAIN, 3, 3], {18, 19}),  # a class of its own, too small
    ([*TRAIN, 70000], {18}),  # a number that no head can have
])  # fmt: skip
def test_broken_images_are_left_out_whatever_their_label(run, train, broken, how):
    result = run(train, TEST, *SMALL, broken=broken, how=how)
    assert len(result["bad_samples"]) == len(broken) and result["n_bank"] == 18
    assert [row["samples"] for row in result["rows"]] == [3, 18]


def test_a_class_that_broken_images_leave_too_small_is_said_with_one_of_them(run):
    says = (
        r"shots=6 images per class, and class 1 has 5 .* \(1 of its samples cannot be read, e\.g\. .*a\.tar, key s004: "
    )
    with pytest.raises(ProbeError, match=says):
        run([*TRAIN, 0], TEST, *SMALL, broken={0, 4})  # a class that can spare one
    assert run.batches  # only reading told


def test_a_label_that_only_reading_tells_names_the_sample(run, monkeypatch):
    from selfsight.data.manifest import Shards

    own = Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, id: own(self, id)._replace(label=-1 if id == 3 else 0))
    with pytest.raises(ProbeError, match=r"probe=knn needs labels, and 1 of 18 .*, e\.g\. .*train/a\.tar, key s003;"):
        run(TRAIN, TEST, "probe=knn", "probe.k=3")
    assert run.batches
