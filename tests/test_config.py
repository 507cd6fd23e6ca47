"""The configuration: strict keys, one sentence per error, and what fills the nulls."""

import dataclasses
import math
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsight import config, schema
from selfsight.config import ConfigError
from selfsight.objectives import build_objective

STREAM = ("data=shards", "data.train=x.tar", "data.mode=stream")


def train(*overrides):
    return config.load("train", list(overrides))


def sentence(*overrides, command="train"):
    with pytest.raises(ConfigError) as caught:
        config.load(command, list(overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_are_the_quick_recipe():
    cfg = train()
    assert (cfg.objective.name, cfg.backbone.name, cfg.data.name) == ("mae", "vit_nano", "scenes")
    quick = cfg.objective.recipe.quick
    assert (cfg.max_steps, cfg.batch_size, cfg.optim.base_lr) == (quick.max_steps, quick.batch_size, quick.base_lr)
    assert cfg.image_size == cfg.data.size == 64


def test_own_data_follows_the_published_recipe():
    cfg = train("data=folder", "data.root=/d", "backbone=vit_b")
    assert (cfg.batch_size, cfg.max_epochs, cfg.max_steps, cfg.optim.warmup) == (4096, 800, None, "40ep")
    assert cfg.optim.lr == pytest.approx(2.4e-3)
    assert (cfg.objective.decoder_dim, cfg.objective.decoder_depth, cfg.objective.decoder_heads) == (512, 8, 16)


def test_another_duration_keeps_the_share_of_warmup():
    assert train("data=folder", "data.root=/d", "max_epochs=100").optim.warmup == "5%"


def test_a_duration_on_scenes_keeps_the_rest_of_the_quick_recipe():
    cfg = train("max_steps=1")
    assert (cfg.max_steps, cfg.batch_size, cfg.optim.base_lr) == (1, 64, 8e-3)
    assert train("max_steps=1", "batch_size=4", "optim.base_lr=1e-4").optim.base_lr == 1e-4


def test_command_line_beats_experiment_beats_recipe():
    cfg = train("experiment=spark_convnext_small", "data.train=x.tar", "optim.weight_decay=0.1")
    assert (cfg.optim.weight_decay, cfg.optim.base_lr, cfg.optim.eps) == (0.1, 2e-4, 1e-8)


def test_a_duration_replaces_the_experiments_in_another_unit():
    cfg = train("experiment=mae_vit_b", "data.train=x.tar", "max_steps=7")
    assert (cfg.max_steps, cfg.max_epochs) == (7, None)


def test_a_group_given_by_hand_beats_the_experiments():
    assert train("experiment=mae_cifar10", "data=scenes", "backbone=vit_ti").backbone.name == "vit_ti"


def test_absolute_learning_rate_wins():
    optim = train("experiment=mae_cifar10", "data.train=x", "optim.lr=0.01", "batch_size=512").optim
    assert (optim.lr, optim.base_lr) == (0.01, None)  # the experiment's base rate would be printed as the rule


def test_two_learning_rates_contradict_each_other():
    assert "optim.lr and optim.base_lr are both given: keep one" in sentence("optim.lr=0.1", "optim.base_lr=0.1")


@pytest.mark.parametrize("name", config.options("backbone"))
def test_every_backbone_composes(name):
    cfg = train(f"backbone={name}", *(["backbone.name=resnet18"] if name == "timm" else []))
    assert cfg.backbone.name == ("resnet18" if name == "timm" else name)
    small = {"vit_nano": 64, "convnext_nano_lite": 64, "convnextv2_nano_lite": 64, "shvit_nano_lite": 128}
    assert cfg.image_size == small.get(name, 256 if name.startswith("shvit") else 224)


@pytest.mark.parametrize("command", config.COMMANDS)
def test_yaml_and_schema_have_the_same_keys(command):
    """A key in the schema alone would be invisible in conf/, where users look."""
    import yaml

    tree = yaml.safe_load((config.conf_dir() / f"{command}.yaml").read_text())
    known = {f.name for f in dataclasses.fields(config.COMMANDS[command])} - set(config.groups(command))
    base = {f.name for f in dataclasses.fields(schema.Train)} if command == "bench" else set()
    assert {k for k in tree if k != "defaults"} == known - base


@pytest.mark.parametrize("kind", config.options("adapt"))
def test_every_adapter_composes_with_its_options(kind):
    assert train(f"adapt={kind}").adapt.name == kind
    assert train("adapt=lora", "adapt.rank=16", "adapt.targets=q").adapt.targets == ["q"]
    assert train("adapt=apla", "adapt.rank=16").adapt.rank == 16
    assert "adapt.rank=some: expected full or" in sentence("adapt=apla", "adapt.rank=some")
    assert "adapt.targets=x: expected one or several of q, k, v" in sentence("adapt=lora", "adapt.targets=x")
    probe = ("checkpoint=-", "probe=finetune", "adapt.rank=4")
    said = sentence(*probe, command="probe")
    assert "adapt.rank needs its group: add adapt=adaptformer or adapt=apla or adapt=lora or adapt=uniadapter" in said


def test_adapters_change_the_run_and_none_of_them_keeps_its_folder(tmp_path):
    assert train("adapt=lora").run_dir != train("adapt=lora", "adapt.rank=4").run_dir != train().run_dir
    one, other = (train("adapt=lora", f"adapt.targets={targets}") for targets in ("[q,v]", "[v,q]"))
    assert one.run_dir == other.run_dir != train("adapt=lora", "adapt.targets=[q,k]").run_dir
    assert config.diff(one, other) == []
    config.save(train(), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("adapt:\n  name: none\n", "adapt: none\n"))  # as it once was
    old = config.read(tmp_path / "config.yaml")
    assert old.adapt.name == "none" and config.diff(old, train()) == []
    assert config.diff(old, train("adapt=bitfit")) == [
        "adapt: none -> bitfit", "adapt.biases: absent -> True", "adapt.norms: absent -> True",
    ]  # fmt: skip


def test_stochastic_depth_is_off_in_front_of_frozen_weights():
    words = ("data=folder", "data.root=/d", "objective=dino")
    assert train(*words).backbone.drop_path > 0
    assert train(*words, "adapt=lora").backbone.drop_path == 0
    assert train(*words, "adapt=lora", "backbone.drop_path=0.2").backbone.drop_path == 0.2


def test_shard_patterns_pass_as_typed():
    pattern = "/d/train-{000000..000099}.tar"
    assert train("data=shards", f"data.train={pattern}").data.train == pattern
    assert train("data=shards", "data.train=[a.tar, b.tar]").data.train == ["a.tar", "b.tar"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("bach_size=3", ["'bach_size'", "'batch_size'", "max_steps"]),
        ("lr=1", ["'lr'", "'optim.lr'"]),
        ("optim.lrr=1", ["'optim.lrr'", "'optim.lr'", "optim.warmup"]),
        ("views.globl.n=1", ["'views.global.n'"]),
        ("data.rot=x", ["'data.root'"]),
        ("hydra.run.dir=x", ["'hydra.run.dir'"]),
        ("+batchsize=3", ["'batch_size'"]),
        ("~nothing", ["'nothing'"]),
        ("eval.x=1", ["eval.linear.every_n_steps"]),
        ("objective=mea", ["'mea'", "'mae'"]),
        ("backbone=vit_bb", ["'vit_b'", "convnext_tiny"]),
        ("backbone=resnet50", ["backbone=timm backbone.name=resnet50"]),
        ("experiment=mae_vitb", ["'mae_vit_b'"]),
        ("optim=sgd", ["valid: adamw"]),
        ("adapt=lorra", ["did you mean 'lora'", "bitfit"]),
        ("adapt.rank=4", ["'adapt.rank'", "name"]),
    ],
)
def test_unknown_words_name_the_nearest(override, words):
    text = sentence(override)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    "override",
    [
        *("batch_size=0", "batch_size=abc", "batch_size=1.5", "batch_size=true", "max_steps=-1", "max_epochs=0"),
        *("objective.mask_ratio=1.5", "objective.mask_ratio=nan", "objective.norm_pixels=maybe", "seed=null"),
        *("trainer.precision=foo", "trainer.devices=0", "trainer.compile=perhaps", "optim.warmup=5x"),
        *("optim.betas=[0.9]", "optim.betas=0.9", "optim.betas=[0.9,", "objective.crop_scale=[1.0,0.2]"),
        *("data.mean=[0.5]", "data.std=[0,1,1]", "checkpoint.every_n_minutes=inf", "seed=1,2", "knn=5", "eval=x"),
    ],
)
def test_wrong_values_are_named_with_what_is_expected(override):
    text = sentence(override)
    assert override.partition("=")[0] in text
    assert "expected" in text or "write" in text or "takes" in text or "set one of" in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["max_steps=1", "max_epochs=2"], "max_steps and max_epochs"),
        (["data=shards"], "data.train='/d/train-{000000..000099}.tar'"),
        (["data=folder"], "data.root=/d/images"),
        (["data.root=/d"], "add data=folder"),
        (["data.train=x.tar"], "add data=shards"),
        (["data.mode=stream"], "data=shards"),
        ([*STREAM, "optim.warmup=2ep"], "optim.warmup=2ep: a stream has no epochs"),
        ([*STREAM, "objective=dino", "objective.freeze_last_layer=1ep"], "objective.freeze_last_layer=1ep: a stream"),
        ([*STREAM, "objective=ibot", "objective.mask_start=1ep"], "objective.mask_start=1ep: a stream"),
        ([*STREAM, "objective=dmt_jepa", "objective.target_warmup=1ep"], "objective.target_warmup=1ep: a stream"),
        ([*STREAM, "objective=dino", "objective.teacher_temp_schedule=epoch"], "teacher_temp_schedule=epoch: a stream"),
        (["data=shards", "data.train=pipe:ls"], "shell command"),
        (["backbone=timm"], "backbone.name=resnet18"),
        (["backbone.name=resnet18"], "backbone=timm"),
        (["backbone.embed_dim=100", "backbone.num_heads=3"], "not divisible"),
        (["batch_size"], "no '='"),
        (["batch_size="], "batch_size=null"),
        (["batch_size=???"], "batch_size=null"),
        (["data.mean.0=1"], "data.mean takes no keys"),
        (["=3"], "no key"),
        (["-m", "seed=1"], "multirun"),
    ],
)
def test_keys_that_do_not_fit_together(overrides, words):
    assert words in sentence(*overrides)


def test_the_config_of_an_earlier_version_gets_defaults_for_newer_keys(tmp_path):
    cfg = train("objective=dino", "objective.momentum=0.5")
    config.save(cfg, tmp_path / "config.yaml")
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del tree["objective"]["color"], tree["optim"]["clip_mode"], tree["objective"]["recipe"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    old = config.read(tmp_path / "config.yaml")
    assert (old.objective.color, old.objective.momentum, old.optim.clip_mode) == (1.0, 0.5, schema.AdamW().clip_mode)
    assert config.diff(old, cfg) == ["optim.clip_mode: null -> per_tensor"]


@pytest.mark.parametrize("objective", ["mae", "dino", "ibot", "selfpatch", "odis", "ijepa", "dmt_jepa", "cim", "glare"])
def test_a_stream_gets_shares_where_the_recipe_counts_epochs(objective):
    cfg = config.load("train", [f"objective={objective}", *STREAM, "max_steps=1000"])
    assert cfg.optim.warmup.endswith("%")
    for key in ("freeze_last_layer", "teacher_temp_warmup", "mask_start", "head_warmup"):
        assert not str(cfg.objective.get(key)).endswith("ep")
    if objective == "dino":
        assert cfg.objective.freeze_last_layer == "1%"  # one of a hundred epochs
    small = {"num_prototypes": 8, "head_hidden": 8, "head_bottleneck": 8}
    cfg.objective.update({k: v for k, v in small.items() if k in cfg.objective})
    build_objective(cfg, total_steps=1000, steps_per_epoch=math.inf)


@pytest.mark.parametrize(
    "override",
    [
        "objective._target_=os.system",
        "objective={_target_: os.system}",
        "data.train=[{_target_: os.system}]",
        "+x={a: {_target_: subprocess.run}}",
    ],
)
def test_foreign_targets_are_refused(override):
    assert "_target_" in sentence(override)


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${eval:1}", "x${now:%Y}", "${a", "${nothing}", "${run_dir}"])
def test_only_plain_interpolations(value):
    assert "run_dir" in sentence(f"run_dir={value}") or "interpolation" in sentence(f"run_dir={value}")


def test_plain_interpolations_resolve():
    assert train("run_dir=runs/${backbone.name}-${image_size}").run_dir == "runs/vit_nano-64"


def test_plus_and_tilde_touch_existing_keys_only():
    cfg = train("experiment=spark_convnext_small", "data.train=x.tar", "~optim.clip", "+seed=3")
    assert (cfg.optim.clip, cfg.seed) == (None, 3)


@settings(max_examples=25, deadline=None)
@given(st.text(min_size=1, max_size=30))
def test_any_text_is_a_config_or_a_sentence(text):
    try:
        train(text)
    except ConfigError as error:
        assert "\n" not in str(error).strip("\n") or "\n" in text


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["batch_size", "optim.warmup", "data.mean", "trainer.devices", "views.local.scale"]), st.text())
def test_any_value_is_a_config_or_a_sentence(key, text):
    try:
        train(f"{key}={text}")
    except ConfigError as error:
        assert key.partition(".")[0] in str(error)


def test_durations():
    assert config.duration("40ep").steps(1000, 2.5) == 100
    assert config.duration("5%").steps(1000, 2.5) == 50
    assert config.duration(7).steps(1000, 2.5) == 7
    for wrong in ("x", "-1", "5 epochs", "101%", 1.5, ""):
        with pytest.raises(ConfigError, match="is no duration"):
            config.duration(wrong)


def test_a_tilde_is_home_for_every_command(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    assert train("run_dir=~/runs/a").run_dir == "/h/runs/a"
    assert config.load("doctor", ["run_dir=~/runs"]).run_dir == "/h/runs"
    probe = config.load("probe", ["checkpoint=~/runs/a", "out=~/found"])
    assert (probe.checkpoint, probe.out) == ("/h/runs/a", "/h/found")
    assert train("run_dir=./a~").run_dir == "./a~"


def test_resolving_twice_changes_nothing():
    cfg = train()
    assert config.resolve(cfg) == cfg


def test_the_run_folder_is_named_by_what_changes_the_result():
    here = train("trainer.devices=1", "num_workers=0", "knn.every_n_steps=0", "logger=wandb", "checkpoint.keep_last=9")
    assert train().run_dir == here.run_dir
    assert train("seed=1").run_dir != here.run_dir
    assert train("backbone=timm", "backbone.name=hf-hub:a/b").run_dir.startswith("runs/mae-hf-hub_a_b-scenes-")


def test_diff_lists_what_forbids_resuming():
    old, new = train(), train("seed=1", "optim.lr=0.5", "trainer.precision=32", "run_dir=x", "allow_change=true")
    assert config.diff(old, old) == []
    assert config.diff(old, new) == ["optim.base_lr: 0.008 -> null", "optim.lr: 0.002 -> 0.5", "seed: 0 -> 1"]


def test_a_saved_config_reads_back(tmp_path):
    cfg = train("backbone=shvit_s1")
    config.save(cfg, tmp_path / "run" / "config.yaml")
    again = config.read(tmp_path / "run" / "config.yaml")
    assert config.diff(cfg, again) == []
    assert config.result_hash(again) == config.result_hash(cfg)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: {_target_: os.system}", "_target_"),
        ("a: [{b: {_target_: torch.load}}]", "_target_"),
        ("a: !!python/object/apply:os.system [ls]", "cannot be read"),
        ("a: ${oc.env:HOME}", "plain interpolations"),
        ("- 1", "no keys"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_hostile_or_broken_saved_config_is_refused(tmp_path, text, words):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        config.read(tmp_path / "config.yaml")


def test_a_missing_saved_config(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        config.read(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("command", "overrides", "words"),
    [
        ("probe", [], "checkpoint="),
        ("probe", ["checkpoint=x", "probe=lin"], "'linear'"),
        ("probe", ["checkpoint=x", "probe.lrs=[0.1,-1]"], "probe.lrs"),
        ("export", ["checkpoint=x"], "out="),
        ("export", ["checkpoint=x", "out=y", "max_steps=1"], "unknown key 'max_steps'"),
        ("import", ["out=y"], "source="),
        ("import", ["source=x", "out=y", "mean=[a]"], "mean"),
        ("prepare", ["out=x"], "kind=folder"),
        ("prepare", ["out=x", "kind=folder"], "source=/d/images"),
        ("prepare", ["out=x", "kind=tar"], "one of folder, list, shards, scenes"),
        ("prepare", ["out=x", "kind=scenes", "quality=101"], "from 1 to 100"),
        ("index", [], "data.train="),
        ("doctor", ["data.train=x"], "data=shards"),
        ("bench", ["seconds=0"], "at least 0.1"),
    ],
)
def test_the_other_commands_say_what_they_need(command, overrides, words):
    assert words in sentence(*overrides, command=command)


def test_the_other_commands_compose():
    assert config.load("probe", ["checkpoint=x", "probe=linear"]).probe.name == "linear"
    assert config.load("bench", ["seconds=1"]).batch_size == 64
    assert config.load("prepare", ["kind=scenes", "out=x"]).count == 5000
    assert config.load("doctor", []).data is None
    assert config.load("doctor", ["data=scenes"]).data.size == 64


def test_loading_imports_no_torch():
    code = (
        "import sys, selfsight.config as c; c.load('train', []); "
        "print(sorted({'torch', 'timm', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
