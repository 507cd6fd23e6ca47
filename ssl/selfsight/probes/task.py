"""What a probe is given: its settings, and banks of the training and the test split that have been looked over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf

from ..data import cache_dir, open_source
from ..data.rng import key_of, uniform
from ..data.source import Source
from . import ProbeError
from .bank import extract, frozen, subset
from .cuts import Cut
from .identity import How, labels_of
from .load import Loaded, choose_workers
from .masks import need_objects
from .passes import look_over, place_of
from .readout import Want, layout, norm_acts, plain, resolve
from .select import at_the_end, held_out
from .store import Bank, Place, check_sizes, make, plan

NO_LABEL = -1
LOOKED_AT = 1000  # samples of a split whose labels are looked at first
TEST_SHARE = 0.2  # of train, where there is no validation split
MANY_CLASSES = 1000  # a head of more classes than this needs at least a training sample per ten of them


class Outcome(NamedTuple):
    """What a probe found: numbers for its JSON (with `top1` or `miou`, in percent), the protocol in words, and how many
    parameters were trained. written: called once the JSON stands."""

    numbers: dict[str, Any]
    protocol: str
    parameters: int = 0
    written: Callable[[], None] | None = None


class Splits(NamedTuple):
    """Sources and sample ids, and words for where test came from."""

    train: tuple[Source, np.ndarray]
    test: tuple[Source, np.ndarray]
    words: str


class Task:
    """One run of one probe.

    settings: the config of the probe; seeds: those that it runs over; warnings: sentences for the user and the JSON.
    classes: of the head, once banks with labels were asked for. `train` and `test` are the banks asked for last.
    """

    def __init__(self, cfg: Any, loaded: Loaded, device: torch.device, said: set[str] | None = None):
        self.cfg, self.settings, self.loaded, self.device = cfg, cfg.probe, loaded, device
        self.splits = open_splits(cfg, loaded.image_size)
        self.seeds = tuple(range(cfg.seed, cfg.seed + (cfg.probe.get("seeds") or 1)))
        self.warnings: list[str] = []
        self.classes = 0
        self._labels: tuple[np.ndarray, ...] = ()
        self.train: Bank | None = None
        self.test: Bank | None = None
        self.made: set[Path] = set()  # what was put on disk for this probe
        self.said: set[str] = set() if said is None else said  # warnings that the user has seen

    def warn(self, sentence: str) -> None:
        """Say it now and keep it with the number."""
        self.warnings.append(sentence)
        if sentence not in self.said:
            print(f"warning: {sentence}", flush=True)
        self.said.add(sentence)

    def warn_of_end(self, grid: Sequence[Mapping[str, Any]], score: str) -> None:
        """Say it where a grid of learning rates may be too narrow; those of a protocol are as published."""
        if not self.settings.get("protocol") and (sentence := at_the_end(grid, score)):
            self.warn(f"probe={self.settings.name}: {sentence}")

    def banks(
        self, *wants: Want, kind: str = "center", stride: int = 0, labelled: bool = True, masks: str = "none"
    ) -> tuple[Bank, Bank]:
        """(train, test) with these arrays; kind, stride: how images are cut (`Cut`).

        labelled: every sample needs a label, and the labels are checked. masks: features of one object per image;
        those are kept in memory only.
        """
        loaded = self.loaded
        if labelled:
            self.check_labels()
        cut = Cut(kind, loaded.image_size, loaded.crop_pct, len(loaded.mean), stride)
        if masks == "none":
            self.train, self.test = self._stored(wants, cut)
        else:
            self.train, self.test = self._masked(masks)
        self._look_over(labelled)
        return self.train, self.test

    def samples(self) -> tuple[Bank, Bank]:
        """(train, test) without features, for a probe that trains the backbone; labels are checked as for `banks`."""
        self.check_labels()
        out = []
        for source, ids in self.splits[:2]:
            columns, bad = look_over(source, np.asarray(ids), choose_workers(self.cfg.num_workers))
            if len(bad) > (limit := max(8, len(ids) // 100)) or not len(columns["ids"]):
                raise ProbeError(f"{len(bad)} of {len(ids):,} samples of {source.describe} are unusable (limit "
                                 f"{limit}), e.g. {bad[-1][1] if bad else 'it is empty'}")  # fmt: skip
            out.append(Bank(columns, {}, bad=bad, describe=source.describe))
        self.train, self.test = out
        self._look_over(labelled=True)
        return self.train, self.test

    def labels(self) -> tuple[np.ndarray, ...]:
        """Of the samples of (train, test), as `labels_of` says them before an image is read."""
        if not self._labels:
            self._labels = tuple(labels_of(source, ids) for source, ids in self.splits[:2])
        return self._labels

    def check_labels(self) -> None:
        """ProbeError, before anything is extracted, for a sample without a label or with one outside the head."""
        name = self.settings.name
        for source, ids in self.splits[:2]:  # a split without any is told from its first ones
            need_labels(Labels(source, ids[:LOOKED_AT], labels_of(source, ids[:LOOKED_AT])), name)
        both = [Labels(source, ids, labels) for (source, ids), labels in zip(self.splits[:2], self.labels())]
        for split in both:
            need_labels(split, name)
        count_classes(*both)

    def _look_over(self, labelled: bool) -> None:
        """Labels, classes, and samples that both splits share."""
        if labelled:
            pairs = zip(self.splits[:2], (self.train, self.test))
            both = [Labels(source, bank.ids, bank.labels.numpy(), kept=True) for (source, _), bank in pairs]
            for split in both:
                need_labels(split, self.settings.name)
            self.classes = count_classes(*both)
            self._warn_empty()
        if shared := overlap(self.train, self.test):
            keys, same = shared
            if same or self.cfg.data.name != "scenes":  # the built-in scenes number each split from zero
                self.warn(_overlap_words(keys, same, len(np.unique(self.test.ids))))

    def store(self, wants: Iterable[Want]) -> None:
        """Put arrays of both splits on disk for probes that will ask for them, in one pass."""
        loaded = self.loaded
        self._stored(tuple(wants), Cut("center", loaded.image_size, loaded.crop_pct, len(loaded.mean)))

    def need_held_out(self, at_least: int = 1) -> None:
        """ProbeError, before anything is extracted, where the training split is too small to choose settings on a part
        of it and to fit on the rest, of `at_least` so many images."""
        ids = self.splits.train[1]
        held = int(held_out(ids).sum()) if len(ids) else 0
        if not held or len(ids) - held < at_least:
            raise ProbeError(
                f"probe={self.settings.name} chooses its settings on a held-out tenth of the training images and fits "
                f"on at least {at_least}; of {len(ids):,} images {len(ids) - held:,} are left to fit on: use more"
            )

    def shapes(self, *wants: Want) -> list[tuple[int, ...]]:
        """Of one row of each array, before it is extracted; ProbeError where there is no such layer or token."""
        loaded = self.loaded
        with frozen(plain(loaded.model, loaded.image_size)) as model:
            found = layout(model, wants, loaded.image_size, len(loaded.mean))
        return [found.shapes[resolve(want, found.depth).name] for want in wants]

    def where(self, want: Want) -> str:
        """Of which layer an array is, in words, and whether the final norm was applied."""
        layer = "the output" if self.settings.get("layer") is None else f"layer {want.layer}"
        return f"{layer} ({self.norm_words([want])})"

    def norm_words(self, wants: Iterable[Want]) -> str:
        """Whether the final norm was applied to these arrays, as far as this backbone has one for them."""
        wants, loaded = list(wants), self.loaded
        if not all(want.norm for want in wants):
            return "without the final norm"
        with frozen(plain(loaded.model, loaded.image_size)) as model:
            try:
                acts = [norm_acts(model, want, loaded.image_size, len(loaded.mean)) for want in wants]
            except ProbeError:  # a model whose layers cannot be read
                return "as the model gives it"
        if all(acts):
            return "with the final norm"
        return "with the final norm where there is one" if any(acts) else "this backbone has no final norm for it"

    def depth(self) -> int:
        """Blocks (ViT) or stages (others) whose tokens can be had."""
        loaded = self.loaded
        with frozen(plain(loaded.model, loaded.image_size)) as model:
            return layout(model, [Want("patches", -1)], loaded.image_size, len(loaded.mean)).depth

    def _stored(self, wants: tuple[Want, ...], cut: Cut) -> tuple[Bank, ...]:
        bank, loaded = self.cfg.get("bank") or {}, self.loaded
        how = How(
            tuple(loaded.mean), tuple(loaded.std), self.cfg.batch_size, self.device,
            choose_workers(self.cfg.num_workers), bank.get("precision") or "32-true",
            bool(bank.get("channels_last")), bank.get("dtype") or "float32",
        )  # fmt: skip
        root = Path(bank["folder"]).expanduser() if bank.get("folder") else cache_dir() / "banks"
        name = str(loaded.facts["backbone"]).replace("/", "-")
        place = Place(root, bank.get("max_gb") or Place._field_defaults["max_gb"], name)
        with frozen(plain(loaded.model, cut.size)) as model:
            plans = [plan(model, *split, wants, cut=cut, how=how, place=place, labels=labels)
                     for split, labels in zip(self.splits[:2], self.labels())]  # fmt: skip
            check_sizes(plans)
            banks = []
            for asked in plans:
                banks.append(make(asked))
                self.made.update(banks[-1].made)
        return tuple(banks)

    def _masked(self, masks: str) -> tuple[Bank, ...]:
        loaded, cfg = self.loaded, self.cfg
        need_objects(masks, self.splits.train[0], self.splits.test[0])
        options = {
            "size": loaded.image_size, "crop_pct": loaded.crop_pct, "mean": loaded.mean, "std": loaded.std,
            "batch_size": cfg.batch_size, "device": self.device, "workers": choose_workers(cfg.num_workers),
            "masks": masks,
        }  # fmt: skip
        out = []
        for source, ids in self.splits[:2]:
            found = extract(loaded.model, source, ids, **options)
            columns, gone = look_over(source, found.ids, options["workers"])
            if gone:
                raise ProbeError(f"a sample could be read only once: {gone[0][1]}")
            arrays = {"pooled": found.pooled.numpy()}
            out.append(Bank(columns, arrays, bad=found.bad, describe=source.describe, shown=found.shown))
        return tuple(out)

    def _warn_empty(self) -> None:
        """Of classes that nothing can teach."""
        train, test, names = self.train.labels, self.test.labels, self.splits.train[0].classes
        classes = self.classes
        seen = torch.bincount(train, minlength=classes) > 0
        asked = torch.bincount(test, minlength=classes)
        empty = [c for c in torch.nonzero(~seen).flatten().tolist() if names or asked[c]]
        if empty:
            named = ", ".join(f"{c} ({names[c]})" if names and c < len(names) else str(c) for c in empty[:5])
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            self.warn(f"no training sample of class {named}{more}: {int(asked[empty].sum()):,} test samples can only "
                      "be taken for other classes")  # fmt: skip


def open_splits(cfg: Any, image_size: int) -> Splits:
    """The training and test samples of `cfg.data`; without validation data a fifth of train is held out by a hash."""
    data = cfg.data
    if data.get("mode") == "stream":
        raise ProbeError("data.mode=stream cannot be read by number; a probe needs data=… with data.mode=exact")
    if data.name == "scenes" and data.get("size") is None:
        data = OmegaConf.merge(data, {"size": image_size})
    train, val = (open_source(data, split) for split in ("train", "val"))
    if train is None or not len(train):
        raise ProbeError(f"data={data.name} has no training images to build a bank from")
    ids = np.arange(len(train))
    if val is not None and len(val):
        test, words = _part_of(np.arange(len(val)), cfg.probe.test, "the validation split")
        return Splits((train, subset(len(train), cfg.probe.bank)), (val, test), words)
    in_test = uniform(key_of(0, ids), "probe/test", 1)[:, 0] < TEST_SHARE
    bank = ids[~in_test]
    words = f"a held-out fifth of the training split ({in_test.sum():,} images), as there is no validation split"
    test, words = _part_of(ids[in_test], cfg.probe.test, words)
    return Splits((train, bank[subset(len(bank), cfg.probe.bank)]), (train, test), words)


def _part_of(ids: np.ndarray, count: int | None, words: str) -> tuple[np.ndarray, str]:
    """A fixed part of a split if `probe.test` asks for one, and the words for it."""
    if count is None or count >= len(ids):
        return ids, words
    return ids[subset(len(ids), count)], f"a fixed part of {count:,} of the {len(ids):,} images of {words}"


class Labels(NamedTuple):
    """Of samples `ids` of a source, int64 [n]; -1: none, `UNUSABLE`: the sample will be left out. kept: these samples
    stay, so that no broken image excuses its label."""

    source: Source
    ids: np.ndarray
    labels: np.ndarray
    kept: bool = False

    def first(self, chosen: np.ndarray) -> tuple[int, str] | None:
        """Label, and file and key, of the first sample of a mask that is no broken image (those are left out, whatever
        their label). None: there is none, or the first `LOOKED_AT` are all broken, which the extraction will say."""
        for row in np.flatnonzero(chosen)[:LOOKED_AT].tolist():
            if (where := place_of(self.source, int(self.ids[row]), decoded=not self.kept)) is not None:
                return int(self.labels[row]), where
        return None


def need_labels(split: Labels, name: str) -> None:
    """ProbeError if a sample has no label."""
    missing = split.labels == NO_LABEL
    if missing.any() and (found := split.first(missing)):
        raise ProbeError(
            f"probe={name} needs labels, and {missing.sum():,} of {len(missing):,} samples of {split.source.describe} "
            f"have none, e.g. {found[1]}; label them (.cls files or class folders), or use probe=rotation or the "
            "RankMe of the run's report"
        )


def count_classes(train: Labels, test: Labels) -> int:
    """Classes of the head; ProbeError for labels outside it."""
    known = train.labels[train.labels >= 0]
    classes = max(len(train.source.classes or ()), int(known.max(initial=-1)) + 1)
    outside = test.labels >= classes
    if len(known) and outside.any() and (found := test.first(outside)):
        raise ProbeError(
            f"{outside.sum():,} of {len(outside):,} test labels are outside the head of {classes:,} classes (0 to "
            f"{classes - 1:,}, as in the training split), e.g. {found[0]} of {found[1]}; both splits must number the "
            "same classes from 0"
        )
    if classes > (limit := max(MANY_CLASSES, 10 * len(train.labels))):
        large = train.labels >= limit
        found = train.first(train.labels == classes - 1) or train.first(large)
        if found or not large.any():  # else the names in classes.json are so many
            named = f", e.g. {found[0]:,} of {found[1]}" if found else ""
            raise ProbeError(f"labels go up to {classes - 1:,} with {len(train.labels):,} training samples{named}; "
                             "number the classes from 0 without gaps")  # fmt: skip
    return classes


def overlap(train: Bank, test: Bank) -> tuple[int, int] | None:
    """How many test samples have the key of a training sample, and how many are the same image; None if none do."""
    if not len(train.key):
        return None
    one = test.part == 0  # every sample once
    keys = int(np.isin(test.key[one], train.key).sum())
    same = int(np.isin(test.content[one], train.content).sum())
    return (keys, same) if keys or same else None


def _overlap_words(keys: int, same: int, samples: int) -> str:
    images = "none of them shows the same image, which is fine if keys merely number the samples"
    if same:
        images = f"{same:,} of {samples:,} test images are also training images, byte for byte: the number is too good"
    return f"{keys:,} of {samples:,} test samples have the key of a training sample; {images}"
