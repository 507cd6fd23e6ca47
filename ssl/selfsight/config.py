"""The configuration: what may be said, what it means, and one sentence for everything else.

Hydra composes the groups of `conf/`; the dataclasses of `schema` say which keys exist, their types and ranges;
`resolve` fills what is null: command line, then experiment, then the objective's recipe, then the backbone. Nothing
here imports torch.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .schema import COMMANDS, DURATIONS, NOT_IN_RESULT, PER_PROCESS, SCHEMAS, ConfigError, Fallback
from .schema import duration as duration

# --- composing ----------------------------------------------------------------------------------------------------

HOME = ("run_dir", "out", "checkpoint")  # where ~ is the home of the user: a shell leaves that of key=~/x as it is


def conf_dir() -> Path:
    """The folder of YAML files: inside an installed package, or at the root of a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def options(group: str) -> list[str]:
    """The names that may follow `group=`."""
    return sorted(p.stem for p in (conf_dir() / group).glob("*.yaml") if not p.stem.startswith("_"))


@cache
def groups(command: str) -> tuple[str, ...]:
    """The groups of a command, from its defaults list."""
    if not (path := conf_dir() / f"{command}.yaml").is_file():
        raise ConfigError(f"the configuration folder {conf_dir()} has no {command}.yaml: reinstall selfsight")
    found: list[str] = []
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults", []):
        if isinstance(entry, dict):
            found += entry
        elif entry != "_self_":
            found += groups(entry)
    return tuple(found)


def load(command: str, overrides: list[str]) -> DictConfig:
    """The resolved, type-checked config of a command with `key=value` overrides; ConfigError in one sentence."""
    known = groups(command)
    choices, values = _split(command, overrides, known)
    chosen = tuple(f"{group}={name}" for group, name in choices.items() if name != "null")
    cfg = copy.deepcopy(_compose(command, chosen))
    entries = {}
    if "eval" in cfg:
        from .eval_entries import compose_entries  # which loads each entry by this function

        entries, cfg.eval = compose_entries(cfg.eval, values), {}
    if given := [k for k in DURATIONS if k in cfg and values.get(k) not in (None, "null")]:
        _one_duration(given)
        for k in DURATIONS:  # the command line's duration replaces the experiment's, whatever its unit
            cfg[k] = None
    if {"optim.lr", "optim.base_lr"} <= values.keys():
        raise ConfigError("optim.lr and optim.base_lr are both given: keep one (lr = base_lr * batch_size / 256)")
    for key, text in values.items():
        _assign(cfg, key, _parse(text, key), known)
    _check_interpolations(cfg)
    try:
        _apply_rules(cfg)
        _check(command, cfg)
        if "probe" in known and cfg.get("probe") is not None:
            from .probes.protocols import apply_protocol

            apply_protocol(cfg.probe, {key.removeprefix("probe.") for key in values})
        if entries:
            cfg.eval = entries
        cfg = resolve(cfg) if command in ("train", "bench") else cfg
        OmegaConf.resolve(cfg)  # last, so that ${image_size} means the value that was filled in
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"an interpolation does not resolve: {_first_line(error)}") from None
    for key in HOME:
        if isinstance(path := cfg.get(key) if key in cfg else None, str):
            cfg[key] = os.path.expanduser(path)  # noqa: PTH111  (which keeps ./ and a name that is no user's)
    return cfg


def _split(command: str, overrides: list[str], known: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str | None]]:
    """Overrides as (group -> option, key -> text); `~key` is key -> null, `+key` and `++key` are plain key."""
    choices: dict[str, str] = {}
    values: dict[str, str | None] = {}
    for override in overrides:
        if override in ("-m", "--multirun"):
            raise ConfigError("multirun (-m) is for train and probe with launcher=slurm: start one command per run")
        key, equals, text = override.partition("=")
        remove, key = key.startswith("~"), key.strip().lstrip("+~")
        for target in re.findall(r"_target_\W+([\w.]+)", override):
            _check_targets({"_target_": target}, override)
        if not equals and not remove:
            raise ConfigError(f"{override!r} has no '=': write key=value, for example {_example(key, command, known)}")
        if equals and not key:
            raise ConfigError(f"{override!r} has no key: write key=value, for example {_example(key, command, known)}")
        if equals and not text:
            raise ConfigError(f"{key}= has no value: write {key}=null to leave it to the defaults")
        if key in known:
            choices[key] = _option(key, "null" if remove else text.strip("'\""))
        else:
            values[key] = None if remove else text
    return choices, values


def _example(key: str, command: str, known: tuple[str, ...]) -> str:
    if key in known:
        return f"{key}={options(key)[0]}"
    return {"export": "out=exported", "prepare": "out=/d/shards"}.get(command, "data=folder")


def _option(group: str, name: str) -> str:
    names = options(group)
    if name in names or (name == "null" and group == "experiment"):
        return name
    hint = did_you_mean(name, names)
    if group == "backbone" and not hint:
        hint = f": any timm model is backbone=timm backbone.name={name}"
    raise ConfigError(f"unknown {group} {name!r}{hint} (valid: {', '.join(names)})")


@lru_cache(maxsize=64)  # a tenth of a second each
def _compose(command: str, chosen: tuple[str, ...]) -> DictConfig:
    """Hydra's groups and experiments, poured into the typed schema; not to be modified."""
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        raw = OmegaConf.to_container(compose(command, list(chosen)), resolve=False)
    _check_targets(raw, str(conf_dir()))
    known = groups(command)
    parts = {}
    for group in known:
        if group in raw and raw[group] is not None:
            schema = SCHEMAS[group]
            parts[group] = schema[raw[group]["name"]]() if isinstance(schema, dict) else schema()
    cfg = OmegaConf.structured(COMMANDS[command](**parts))
    OmegaConf.set_struct(cfg, True)
    if "eval" in cfg:
        cfg.eval = raw.pop("eval")  # plain, until `load` has the words of the command line as well
    for key, value in _flatten(raw):
        _assign(cfg, key, value, known)
    if sum(cfg.get(k) is not None for k in DURATIONS if k in cfg) > 1:
        _one_duration([k for k in DURATIONS if cfg[k] is not None])
    return cfg


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _parse(text: str | None, key: str) -> Any:
    """The value of `key=text`: null, a [list], or the text itself, which the type of the key converts."""
    if text is None or text == "null":
        return None
    if text == "???":  # OmegaConf's word for a missing value
        raise ConfigError(f"{key}=??? is no value: write {key}=null to leave it to the defaults")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.startswith("[") and text.endswith("]"):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{key}={text} is no list: write {key}=[a,b], with quotes round odd characters") from None
        _check_targets(value, key)
        return value
    return text


def _assign(cfg: DictConfig, key: str, value: Any, known: tuple[str, ...]) -> None:
    """Set one key in the typed config; ConfigError for an unknown key or a value of the wrong type."""
    *path, name = key.split(".")
    node: Any = cfg
    for depth, part in enumerate(path):
        inner = node._get_node(part) if isinstance(node, DictConfig) and part in node.keys() else None  # noqa: SIM118
        if not isinstance(inner, DictConfig) or inner._is_none():
            raise _unknown(cfg, key, ".".join(path[: depth + 1]) if inner is None else key, known)
        node = inner
    if name not in node.keys():  # noqa: SIM118  (`in node` is false for values that are missing)
        raise _unknown(cfg, key, key, known)
    if isinstance(node._get_node(name), DictConfig):
        inside = ", ".join(f"{key}.{k}" for k in node._get_node(name).keys())  # noqa: SIM118
        raise ConfigError(f"{key} holds several keys: set one of {inside}" if inside else f"{key} takes no value yet")
    try:
        node[name] = value
    except OmegaConfBaseException:
        raise _wrong(node, name, key, value) from None


def _wrong(node: DictConfig, name: str, key: str, value: Any) -> ConfigError:
    fields = {f.name: f for f in dataclasses.fields(OmegaConf.get_type(node))}
    rule = fields[name].metadata.get("rule")
    expects = rule.expects if rule else "true or false" if fields[name].type.startswith("bool") else "text"
    return ConfigError(f"{key}={_show(value)}: expected {expects}")


def _show(value: Any) -> str:
    value = OmegaConf.to_container(value) if isinstance(value, ListConfig) else value
    return "null" if value is None else str(value)


def _keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for name in cfg:
        node = cfg._get_node(name)
        found.append(f"{prefix}{name}")
        if isinstance(node, DictConfig) and not node._is_none():
            found += _keys(node, f"{prefix}{name}.")
    return found


def _unknown(cfg: DictConfig, key: str, wrong: str, known: tuple[str, ...]) -> ConfigError:
    """The sentence for a key that does not exist: the nearest key, and what is valid beside it."""
    group, _, inner = key.partition(".")
    if group in ("data", "adapt") and inner and group in cfg and cfg[group] is None:
        with_it = [
            o for o in options(group) if inner in {field.name for field in dataclasses.fields(SCHEMAS[group][o])}
        ]
        return ConfigError(f"{key} needs its group: add {group}={f' or {group}='.join(with_it or options(group))}")
    if key in (f"launcher.{field.name}" for field in dataclasses.fields(SCHEMAS["launcher"]["slurm"])):
        return ConfigError(f"{key} is for jobs: add launcher=slurm, or leave it out")
    keys = list(dict.fromkeys(_keys(cfg) + list(known)))
    parent, _, last = wrong.rpartition(".")
    siblings = sorted(k for k in keys if k.rpartition(".")[0] == parent)
    if not siblings:
        return ConfigError(f"unknown key {key!r}: {parent} takes no keys yet")
    if parent:
        near = difflib.get_close_matches(last, [k.rpartition(".")[2] for k in siblings], 1, 0.5)
        hint = f": did you mean {key.replace(wrong, f'{parent}.{near[0]}', 1)!r}?" if near else ""
    else:
        same_end = [k for k in keys if k.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f": did you mean {same_end[0]!r}?" if same_end else did_you_mean(key, keys)
    return ConfigError(f"unknown key {key!r}{hint} (valid{' there' if parent else ''}: {', '.join(siblings)})")


def did_you_mean(word: str, words: list[str]) -> str:
    """ ": did you mean 'nearest'?", or nothing when no word is near."""
    near = difflib.get_close_matches(word, words, 1, 0.6)
    return f": did you mean {near[0]!r}?" if near else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


# --- checks -------------------------------------------------------------------------------------------------------


def _check_targets(tree: Any, where: str) -> None:
    """Refuse every `_target_` outside this package, at any depth: a config is data, never code."""
    if isinstance(tree, dict):
        target = tree.get("_target_")
        if target is not None and not str(target).startswith("selfsight."):
            raise ConfigError(f"{where}: _target_ may only name something in selfsight, not {target!r}")
        tree = list(tree.values())
    if isinstance(tree, list):
        for item in tree:
            _check_targets(item, where)


def _check_interpolations(cfg: DictConfig) -> None:
    for key, value in _flatten(OmegaConf.to_container(cfg, resolve=False)):
        for item in value if isinstance(value, list) else [value]:
            rest = re.sub(r"\$\{[A-Za-z_]\w*(\.\w+)*\}", "", item) if isinstance(item, str) else ""
            if "${" in rest:
                raise ConfigError(f"{key}={item}: only plain interpolations such as ${{image_size}} are allowed")


def _apply_rules(cfg: DictConfig, prefix: str = "") -> None:
    """Check ranges and choices, and bring values into their final form."""
    schema = OmegaConf.get_type(cfg)
    for field in dataclasses.fields(schema) if dataclasses.is_dataclass(schema) else ():
        value, rule = cfg[field.name], field.metadata.get("rule")
        if rule and value is not None:
            try:
                cfg[field.name] = rule.parse(value)
            except ConfigError as error:
                raise ConfigError(f"{prefix}{field.name}: {error}") from None
            except (ValueError, TypeError):
                raise _wrong(cfg, field.name, prefix + field.name, value) from None
    for name in cfg:
        if isinstance(cfg[name], DictConfig):
            _apply_rules(cfg[name], f"{prefix}{name}.")


def _one_duration(given: list[str]) -> None:
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are both given: a run has one duration, keep one of them")


def _check(command: str, cfg: DictConfig) -> None:
    """What must be there, and keys that must agree."""
    if command in ("probe", "export", "analysis") and not cfg.checkpoint:
        raise ConfigError(f"{command} needs checkpoint=, for example checkpoint=runs/mae-vit_nano-scenes-1a2b3c4d")
    if command in ("export", "prepare") and not cfg.out:
        raise ConfigError(f"{command} needs out=, the folder to write, for example out=my-{command}")
    if command == "prepare":
        _check_prepare(cfg)
    if command == "eval":
        _check_eval(cfg)
    if "data" in cfg and cfg.data is not None:
        _check_data(cfg.data)
    if command == "doctor" and cfg.data is not None and cfg.data.name == "scenes":
        _fill(cfg.data, "size", 64)
    if command == "import" and not (cfg.source and cfg.out):
        raise ConfigError("import needs source= and out=, for example source=/d/dino.pth out=my-model")
    if "backbone" in cfg and cfg.backbone is not None:
        _check_backbone(cfg.backbone)
    if "objective" in cfg:
        _check_not_yet(cfg)
        _check_epochs(cfg)


def _check_epochs(cfg: DictConfig) -> None:
    """A stream does not say how many images it has."""
    if cfg.data.mode != "stream":
        return
    own = ("teacher_temp_warmup", "freeze_last_layer", "head_warmup", "mask_start", "target_warmup")
    for group, key in [("optim", "warmup"), *(("objective", k) for k in own)]:
        if str(value := cfg[group].get(key)).endswith("ep"):
            raise ConfigError(
                f"{group}.{key}={value}: a stream has no epochs; give steps (100) or a share of the run (5%)"
            )
    if cfg.objective.get("teacher_temp_schedule") == "epoch":
        raise ConfigError("objective.teacher_temp_schedule=epoch: a stream has no epochs; use step")


def _check_not_yet(cfg: DictConfig) -> None:
    """Keys whose meaning belongs to objectives that are not here: refused, never silently ignored."""
    given = [f"views.{kind}.{k}" for kind in ("global", "local") for k, v in cfg.views[kind].items() if v is not None]
    if cfg.views["global"].n not in (None, 2) and "teacher_temp" in cfg.objective:
        raise ConfigError(f"views.global.n={cfg.views['global'].n}: self-distillation compares two global views; use 2")
    if given and "teacher_temp" not in cfg.objective:
        name = cfg.objective.name
        own = "search_scale and exemplar_scale" if name == "cim" else "crop_scale"
        raise ConfigError(f"{given[0]} is for multi-crop objectives: objective={name} has objective.{own} instead")
    if cfg.data.channels != 3:
        raise ConfigError(
            f"data.channels={cfg.data.channels}: backbones take 3 channels in this version; grayscale is read as RGB"
        )


def _check_prepare(cfg: DictConfig) -> None:
    if not cfg.kind:
        raise ConfigError("prepare needs a kind: folder, list, shards or scenes, for example kind=folder")
    if cfg.kind != "scenes" and not cfg.source:
        example = {"folder": "/d/images", "list": "/d/paths.txt", "shards": "'/d/in-{000..099}.tar'"}[cfg.kind]
        raise ConfigError(f"prepare kind={cfg.kind} needs source=, for example source={example}")


def _check_eval(entry: DictConfig) -> None:
    if entry.how == "inline":
        if given := [k for k in ("device", "threads") if entry[k] is not None]:
            raise ConfigError(
                f"{given[0]} is for how=process, and how=inline runs where the training does: leave it out"
            )
        if entry.probe.get("masks", "none") != "none":
            raise ConfigError("probe.masks needs a checkpoint to look through: use how=process")
        if entry.probe.name == "finetune":
            raise ConfigError("finetune trains a model of its own, how=inline is for frozen ones: use how=process")
    if entry.sbatch and entry.how != "slurm":
        raise ConfigError(f"sbatch is for how=slurm, and this is how={entry.how}: leave it out")


def _check_data(data: DictConfig) -> None:
    needs = {"shards": ("train", "'/d/train-{000000..000099}.tar'"), "folder": ("root", "/d/images"), "scenes": None}
    if (need := needs[data.name]) and not data[need[0]]:
        raise ConfigError(f"data={data.name} needs data.{need[0]}=, for example data.{need[0]}={need[1]}")
    for key, home in {"train": "shards", "val": "shards", "root": "folder", "root_val": "folder"}.items():
        if data[key] and data.name != home:
            raise ConfigError(f"data.{key} is not used by data={data.name}: add data={home}, or leave data.{key} out")
    if data.mode == "stream" and data.name != "shards":
        raise ConfigError(f"data.mode=stream reads shards only: use data=shards, or data.mode=exact with {data.name}")
    for key in ("mean", "std"):
        if data[key] != "auto" and len(data[key]) != data.channels:
            found = _show(data[key])
            raise ConfigError(f"data.{key}={found}: expected auto or {data.channels} numbers, one per channel")
    if data.std != "auto" and min(data.std) <= 0:
        raise ConfigError(f"data.std={_show(data.std)}: expected numbers above 0")


def _check_backbone(backbone: DictConfig) -> None:
    if not backbone.name:
        raise ConfigError("backbone=timm needs backbone.name=, for example backbone.name=resnet18")
    if backbone.family != "timm" and backbone.name not in options("backbone"):
        raise ConfigError(f"backbone.name={backbone.name} goes with backbone=timm: add backbone=timm, or leave it out")
    dim, heads = backbone.embed_dim, backbone.num_heads
    if dim and heads and dim % heads:
        raise ConfigError(f"backbone.embed_dim={dim} is not divisible by backbone.num_heads={heads}")


# --- resolving ----------------------------------------------------------------------------------------------------


def resolve(cfg: DictConfig) -> DictConfig:
    """A copy in which every null that has a default is filled: from the quick recipe (data=scenes; its length only
    when no duration is given), then the objective's recipe, then the backbone. Resolving twice changes nothing."""
    cfg = OmegaConf.create(cfg)
    _fill(cfg, "image_size", cfg.backbone.image_size)
    if cfg.data.name == "scenes":
        _fill(cfg.data, "size", min(cfg.image_size, 128))  # larger ones take minutes to render and show no more
    _fill_recipe(cfg, cfg.objective.recipe, quick=cfg.data.name == "scenes")
    if "teacher_temp" in cfg.objective:
        _fill_views(cfg)
    if "exemplar_size" in cfg.objective:
        for key in ("context_size", "exemplar_size"):
            _fill(cfg.objective, key, _in_proportion(cfg.backbone, cfg.backbone[key], cfg.image_size))
    for key in ("dim", "depth", "heads"):
        if f"decoder_{key}" in cfg.objective:
            _fill(cfg.objective, f"decoder_{key}", cfg.backbone.decoder[key])
    if cfg.run_dir is None:
        words = "-".join((cfg.objective.name, cfg.backbone.name, cfg.data.name))
        cfg.run_dir = f"runs/{re.sub(r'[^A-Za-z0-9_.-]+', '_', words)}-{result_hash(cfg)}"
    return cfg


def _fill(node: DictConfig, key: str, value: Any) -> None:
    if node[key] is None:
        node[key] = value


def _fill_views(cfg: DictConfig) -> None:
    """Sizes of multi-crop views: local ones keep the backbone's proportion, in whole patches or strides."""
    backbone, views = cfg.backbone, cfg.views
    _fill(views["global"], "n", 2)
    _fill(views["global"], "size", cfg.image_size)
    _fill(views.local, "size", _in_proportion(backbone, backbone.local_size, views["global"].size))


def _in_proportion(backbone: DictConfig, size: int, image_size: int) -> int:
    """A size that goes with the backbone's own image size, for another one, in whole patches or strides."""
    unit = {"vit": backbone.patch_size or 16, "shvit": 64}.get(backbone.family, 8 * min(4, backbone.patch_size or 4))
    return max(unit, round(image_size * size / backbone.image_size / unit) * unit)


def _fill_fallbacks(cfg: DictConfig, source: DictConfig) -> None:
    """Null keys of the objective, of the views and of stochastic depth, from a recipe."""
    homes = {
        "global_scale": (cfg.views["global"], "scale"), "local_scale": (cfg.views.local, "scale"),
        "local_n": (cfg.views.local, "n"), "drop_path": (cfg.backbone, "drop_path"),
    }  # fmt: skip
    for field in dataclasses.fields(Fallback):
        node, key = homes.get(field.name, (cfg.objective, field.name))
        if key in node and source[field.name] is not None:
            _fill(node, key, source[field.name])


def _fill_recipe(cfg: DictConfig, recipe: DictConfig, quick: bool) -> None:
    optim, fast = cfg.optim, recipe.quick
    if cfg.backbone.family == "timm" or cfg.adapt.name != "none":
        _fill(cfg.backbone, "drop_path", 0.0)  # many models have none; frozen ones were trained with theirs
    if quick:
        _fill_fallbacks(cfg, fast)
        if all(cfg[k] is None for k in DURATIONS):
            cfg.max_steps = fast.max_steps
        _fill(cfg, "batch_size", fast.batch_size)
        if optim.lr is None:
            _fill(optim, "base_lr", fast.base_lr)
        _fill(optim, "weight_decay", fast.weight_decay)
        _fill(optim, "warmup", fast.warmup)
    if cfg.data.mode == "stream" and "freeze_last_layer" in cfg.objective:
        amount = duration(recipe.freeze_last_layer).amount  # epochs
        _fill(cfg.objective, "freeze_last_layer", f"{100 * amount / recipe.max_epochs:g}%")
    _fill_fallbacks(cfg, recipe)
    _fill(cfg.backbone, "drop_path", 0.0)
    # A shorter or longer run than the recipe's keeps the recipe's share of warm-up, not its length.
    whole = all(cfg[k] is None for k in DURATIONS)
    for node, key, epochs in (
        (optim, "warmup", recipe.warmup_epochs), (cfg.objective, "teacher_temp_warmup", recipe.temp_warmup_epochs),
    ):  # fmt: skip
        if key in node:
            _fill(node, key, f"{epochs:g}ep" if whole else f"{100 * epochs / recipe.max_epochs:g}%")
    if whole:
        cfg.max_epochs = recipe.max_epochs
    _fill(cfg, "batch_size", recipe.batch_size)
    if optim.weight_decay is None:  # an explicit decay is constant unless its end is given, too
        _fill(optim, "weight_decay_end", recipe.weight_decay_end)
    for key in ("weight_decay", "betas", "min_lr", "clip", "clip_mode", "warmup_start"):
        _fill(optim, key, recipe[key])
    _fill(optim, "weight_decay_end", optim.weight_decay)
    if optim.lr is None:
        _fill(optim, "base_lr", recipe.base_lr)
        optim.lr = optim.base_lr * cfg.batch_size / 256
    elif optim.base_lr is not None and optim.lr != optim.base_lr * cfg.batch_size / 256:
        optim.base_lr = None  # an absolute rate was given: the rule does not apply and must not be printed


# --- identity, files ----------------------------------------------------------------------------------------------


def _result(cfg: DictConfig) -> dict[str, Any]:
    """Key -> value of everything that changes what is computed."""
    pairs = _flatten(OmegaConf.to_container(cfg, resolve=True))
    kept = {k: v for k, v in pairs if not any(k == skip or k.startswith(f"{skip}.") for skip in NOT_IN_RESULT)}
    if isinstance(targets := kept.get("adapt.targets"), list):  # their order means nothing
        kept["adapt.targets"] = sorted(set(targets))
    # As it was before it became a group: folders of runs without adapters keep their names.
    return {"adapt" if k == "adapt.name" else k: v for k, v in kept.items()}


def result_hash(cfg: DictConfig) -> str:
    """Eight hex digits that change when, and only when, a key changes that changes the result."""
    text = json.dumps(_result(cfg), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def in_common(cfg: DictConfig) -> dict[str, Any]:
    """Key -> value of everything that the processes of one run must have in common."""
    pairs = _flatten(OmegaConf.to_container(cfg, resolve=True))
    return {k: v for k, v in pairs if not {k.split(".")[0], k.split(".")[-1]} & set(PER_PROCESS)}


def diff(old: DictConfig, new: DictConfig) -> list[str]:
    """One line "key: old -> new" for every result-changing key that differs; empty when a run may resume."""
    a, b = _result(old), _result(new)
    absent = "absent"
    changed = [k for k in sorted({*a, *b}) if a.get(k, absent) != b.get(k, absent)]
    return [f"{k}: {_show(a.get(k, absent))} -> {_show(b.get(k, absent))}" for k in changed]


def changes(cfg: DictConfig) -> list[str]:
    """What differs from the run that stands in cfg.run_dir, if one does; ConfigError unless allow_change is given."""
    known = Path(cfg.run_dir) / "config.yaml"
    changed = diff(read(known), cfg) if known.exists() else []
    if changed and not cfg.allow_change:
        raise ConfigError(
            f"{Path(cfg.run_dir)} holds a run with other settings ({'; '.join(changed)}): use another run_dir, or "
            "allow_change=true to continue it with the new ones"
        )
    return changed


def save(cfg: DictConfig, path: Path | str) -> None:
    """Write the config as YAML, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(OmegaConf.to_yaml(cfg), encoding="utf-8")
    partial.replace(path)


def read(path: Path | str) -> DictConfig:
    """Read a saved config as plain data; ConfigError when it is missing, broken, or names foreign code."""
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: expected the config.yaml of a run folder") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {_first_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no keys: expected the config.yaml of a run folder")
    _check_targets(tree, str(path))
    _complete(tree)
    try:
        cfg = OmegaConf.create(tree)
        _check_interpolations(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path} is no valid config: {_first_line(error)}") from None
    OmegaConf.set_struct(cfg, True)
    return cfg


def _complete(tree: dict[str, Any]) -> None:
    """Keys of groups that the run of an earlier version does not know get their defaults."""
    if isinstance(tree.get("adapt"), str):
        tree["adapt"] = {"name": tree["adapt"]}
    for group, schema in SCHEMAS.items():
        node = tree.get(group)
        if not isinstance(node, dict):
            continue
        cls = schema.get(node.get("name")) if isinstance(schema, dict) else schema
        for field in dataclasses.fields(cls) if cls else ():
            if field.name not in node:
                known = field.default is not dataclasses.MISSING
                value = field.default if known else field.default_factory()
                node[field.name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
