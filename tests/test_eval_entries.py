"""eval= entries: the grammar, one sentence per mistake, and the words that the probe command is given."""

import pytest

from selfsight import config
from selfsight.config import ConfigError
from selfsight.eval_entries import probe_words


def entries(*words):
    return config.load("train", list(words)).eval


def sentence(*words):
    with pytest.raises(ConfigError) as caught:
        entries(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_entry_is_named_after_its_probe_or_says_it():
    found = entries(
        "eval.linear.every_n_steps=100", "eval.near.probe=knn", "eval.near.at=[5,50]", "eval.near.how=inline"
    )
    assert (found.linear.probe.name, found.linear.every_n_steps, found.linear.how) == ("linear", 100, "process")
    assert (found.near.probe.name, list(found.near.at), found.near.how) == ("knn", [5, 50], "inline")
    assert "eval.far needs eval.far.probe=" in sentence("eval.far.at=5")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("eval.linear.probe.lr=[0.1]", "eval.linear: unknown key 'probe.lr': did you mean 'probe.lrs'?"),
        ("eval.linear.evry_n_steps=5", "did you mean 'every_n_steps'?"),
        ("eval.linar.at=5", "did you mean 'linear'?"),
        ("eval.linear.probe=liner", "unknown probe 'liner': did you mean 'linear'?"),
        ("eval.linear.at=0", "at=0: expected one or several whole numbers of at least 1"),
        ("eval.linear.how=slrm", "how=slrm: expected one of"),
        ("eval.linear.device=cuda:x", "expected one of auto, cpu, gpu, cuda, cuda:<number>, mps"),
        ("eval.linear.data=folder", "eval.linear: data=folder needs data.root="),
        ("eval.linear.sbatch=[--time=1]", "sbatch is for how=slurm, and this is how=process"),
        ("eval.every_n_steps=100", "write eval.linear.every_n_steps=100"),
        ("eval=linear", "an evaluation has a name and keys: write eval.linear.every_n_steps=1000"),
        ("eval.a b.probe=knn", "a name is made of letters"),
        ("~eval.linear", "there is no such evaluation"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_nearest_word(word, says):
    assert says in sentence(word)


def test_an_inline_entry_takes_no_device_and_no_masks():
    assert "device is for how=process" in sentence("eval.knn.how=inline", "eval.knn.device=cpu")
    assert "use how=process" in sentence("eval.knn.how=inline", "eval.knn.probe.masks=largest")
    assert "trains a model of its own" in sentence("eval.finetune.how=inline")


def test_the_words_of_the_probe_command_give_the_same_probe():
    given = ("probe.lrs=[0.00001,0.1]", "probe.protocol=null", "seed=3", "data=folder", "data.root='[odd] name'",
             "which=teacher", "image_size=48", "bank.dtype=float16")  # fmt: skip
    (entry,) = entries("eval.linear.every_n_steps=5", *(f"eval.linear.{word}" for word in given)).values()
    words = probe_words(entry)
    assert "probe.lrs=[1e-05, 0.1]" in words and not any("every_n_steps" in word for word in words)
    probe = config.load("probe", ["checkpoint=-", *words])
    for key in ("probe", "data", "seed", "which", "image_size", "bank", "batch_size", "num_workers"):
        assert probe[key] == entry[key], key


def test_a_protocol_of_an_entry_is_complete_and_is_typed_for_its_probe():
    with pytest.raises(
        ConfigError, match=r"eval\.knn: probe\.protocol=dino_knn fixes probe\.k=.* and \[20\] was given"
    ):
        entries("eval.knn.probe.protocol=dino_knn", "eval.knn.probe.k=20")
    (entry,) = entries("eval.knn.probe.protocol=dino_knn").values()
    assert config.load("probe", ["checkpoint=-", *probe_words(entry)]).probe == entry.probe
    assert list(entry.probe.k) == [10, 20, 100, 200]


def test_entries_leave_the_name_of_the_run_and_its_resuming_alone():
    plain, more = (config.load("train", list(words)) for words in ((), ("eval.linear.every_n_steps=5",)))
    assert plain.run_dir == more.run_dir and config.diff(plain, more) == []


def test_an_experiment_has_entries_and_the_command_line_the_last_word(tmp_path, monkeypatch):
    conf = tmp_path / "conf"
    conf.symlink_to(config.conf_dir())
    own = tmp_path / "own"
    own.mkdir()
    for path in conf.iterdir():
        (own / path.name).symlink_to(path.resolve())
    (own / "experiment").unlink()
    (own / "experiment").mkdir()
    text = "# @package _global_\neval:\n  a: {probe: knn, every_n_steps: 7}\n  b: {probe: {name: linear, epochs: 3}}\n"
    (own / "experiment" / "mine.yaml").write_text(text)
    monkeypatch.setattr(config, "conf_dir", lambda: own)
    config._compose.cache_clear()
    found = entries("experiment=mine")
    assert (found.a.every_n_steps, found.b.probe.name, found.b.probe.epochs) == (7, "linear", 3)
    found = entries("experiment=mine", "eval.a.every_n_steps=9", "~eval.b", "eval.linear.at=4")
    assert set(found) == {"a", "linear"} and found.a.every_n_steps == 9
    config._compose.cache_clear()
