"""The entries of `eval` in a training config: eval.<name>.<key>=value, where the keys are those of conf/eval.yaml.

Each entry is a config of its own, composed and checked as one of the probe command is, so that a wrong key is a
sentence before anything is trained. `probe_words` gives the words to type for the same probe of a checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from . import config
from .schema import ConfigError

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
OWN = ("every_n_steps", "at", "how", "device", "threads", "max_running", "sbatch", "bank.folder")  # not in the probe


def compose_entries(written: DictConfig, values: dict[str, str | None]) -> dict[str, DictConfig]:
    """name -> checked entry, from what an experiment wrote and from the command line's values.

    Words that begin with `eval.` are taken out of values. ConfigError in one sentence.
    """
    entries = {str(name): _words_of(name, node) for name, node in OmegaConf.to_container(written).items() if node}
    for key in [k for k in values if k.split(".")[0] == "eval"]:
        text, (name, _, inner) = values.pop(key), key.partition(".")[2].partition(".")
        if inner:
            entries.setdefault(name, {})[inner] = "null" if text is None else text
        else:
            _drop(entries, key, name, text)
    return {name: _entry(name, words) for name, words in entries.items()}


def _drop(entries: dict[str, dict[str, str]], key: str, name: str, text: str | None) -> None:
    """eval.<name>=null leaves out an entry of an experiment; anything else without a key is a mistake."""
    if name and text in (None, "null"):
        if entries.pop(name, None) is None:
            raise ConfigError(
                f"{key}: there is no such evaluation to leave out{config.did_you_mean(name, list(entries))}"
            )
        return
    word = name if name in _keys() else "every_n_steps"
    raise ConfigError(f"{key}={text}: an evaluation has a name and keys: write eval.linear.{word}="
                      f"{text if word == name else 1000}")  # fmt: skip


def _keys() -> list[str]:
    return list(config.load("eval", []))


def _words_of(name: Any, node: Any) -> dict[str, str]:
    """The keys that an experiment gives to an entry, as they would be typed."""
    if not isinstance(node, Mapping):
        raise ConfigError(f"eval.{name}: {node!r} holds no keys, for example every_n_steps: 1000")
    flat = dict(config._flatten(dict(node)))
    return {key.removesuffix(".name"): text_of(value) for key, value in flat.items()}


def _entry(name: str, words: dict[str, str]) -> DictConfig:
    if not NAME.fullmatch(name):
        raise ConfigError(f"eval.{name}: a name is made of letters, digits, _ and -, and begins with a letter")
    probes = config.options("probe")
    if "probe" not in words:
        if name not in probes:
            raise ConfigError(f"eval.{name} needs eval.{name}.probe={'|'.join(probes)}, unless it is named after one"
                              f"{config.did_you_mean(name, probes)}")  # fmt: skip
        words = {"probe": name} | words
    try:
        return config.load("eval", [f"{key}={text}" for key, text in words.items()])
    except ConfigError as error:
        raise ConfigError(f"eval.{name}: {error}") from None


def text_of(value: Any) -> str:
    """A value as it is typed after key=."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, (list, tuple)):
        return json.dumps(list(value))
    text = str(value)
    plain = not isinstance(value, str) or not (text in ("", "null", "???") or text[0] in "'\"[")
    return text if plain else f"'{text}'"


def probe_words(entry: DictConfig) -> list[str]:
    """`probe=… key=value …` for the probe command: the choice of groups, and every key that is not as usual."""
    words = [f"probe={entry.probe.name}"] + ([f"data={entry.data.name}"] if entry.data is not None else [])
    usual = dict(config._flatten(OmegaConf.to_container(config.load("probe", ["checkpoint=-", *_bare(words, entry)]))))
    for key, value in config._flatten(OmegaConf.to_container(entry)):
        if key not in OWN and key not in ("probe.name", "data.name", "data") and usual[key] != value:
            words.append(f"{key}={text_of(value)}")
    return words


def _bare(words: list[str], entry: DictConfig) -> list[str]:
    """The same with the one key without which a data group cannot be composed."""
    needed = {"folder": "root", "shards": "train"}.get(entry.data.name) if entry.data is not None else None
    return [*words, f"data.{needed}=-"] if needed else words
