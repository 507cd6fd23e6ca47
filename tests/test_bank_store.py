"""Banks on disk: found again, continued after a kill, never taken for another; a full disk and damage in a sentence."""

import concurrent.futures
import contextlib
import errno
import fcntl
import json
import multiprocessing
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from drawn_bank import Noise, backbone
from selfsight.probes import ProbeError, store
from selfsight.probes import passes as pass_module
from selfsight.probes.bank import extract
from selfsight.probes.cuts import Cut
from selfsight.probes.identity import How
from selfsight.probes.part import Part
from selfsight.probes.readout import Want, layout, norm_acts
from selfsight.probes.store import Place, stored

NORM = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
WANTS = (Want("pooled"), Want("patches"), Want("class", -2, False))


@pytest.fixture(scope="module")
def vit():
    return backbone()


def bank(model, root, source=None, wants=WANTS, n=None, max_gb=1.0, cut=None, **how):
    source = source or Noise(20)
    cut = cut or Cut("center", 16)
    how = How(**{**NORM, "batch_size": 6, **how})
    return stored(model, source, range(n or len(source)), wants, cut=cut, how=how, place=Place(root, max_gb, "vit"))


def complete(root):
    return sorted(p.parent for p in root.glob("*/*/bank.json"))


@pytest.fixture
def passes(monkeypatch):
    """How many batches went through the backbone."""
    seen = []
    own = pass_module._encode
    monkeypatch.setattr(pass_module, "_encode", lambda *a, **k: (seen.append(1), own(*a, **k))[1])
    return seen


def test_features_are_those_of_the_backbone(vit, tmp_path):
    source = Noise(20)
    found = bank(vit, tmp_path, source)
    plain = extract(vit, source, range(20), size=16, crop_pct=1.0, batch_size=6, want=("pooled", "patches"), **NORM)
    assert torch.equal(found.vectors(), plain.pooled) and torch.equal(found.tokens(rows=range(20)), plain.patches)
    assert torch.equal(found.labels, plain.labels) and np.array_equal(found.ids, plain.ids)
    assert isinstance(found.arrays["patches"], np.memmap)


def test_layers_are_timms_with_and_without_the_final_norm(vit, tmp_path):
    wants = [Want(k, i, norm) for k in ("class", "mean", "patches") for i in (0, -1) for norm in (True, False)]
    found = bank(vit, tmp_path, wants=[*wants, Want("pooled")], n=4)
    x = (pass_module.crops(Noise(4).read(2), Cut("center", 16)).float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        for norm in (True, False):
            for i in (0, -1):
                ((_, prefix),) = vit.forward_intermediates(
                    x, indices=[i], norm=norm, return_prefix_tokens=True, intermediates_only=True
                )
                torch.testing.assert_close(found.vectors("class", i, [2], norm), prefix[:, 0], rtol=1e-4, atol=1e-5)
                tokens = found.tokens(i, [2], norm)
                torch.testing.assert_close(found.vectors("mean", i, [2], norm), tokens.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.tokens(-1, [2]), vit.forward_features(x)[:, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18"])
def test_stages_of_other_families(name, tmp_path):
    model = timm.create_model(name, num_classes=0).eval()
    found = bank(model, tmp_path, Noise(3), [Want("patches", 1), Want("pooled"), Want("mean")], cut=Cut("center", 32))
    with torch.no_grad():
        maps = model.forward_intermediates(torch.zeros(1, 3, 32, 32), intermediates_only=True)[1]
    assert found.tokens(1, [0, 2]).shape == (2, maps.shape[2] * maps.shape[3], maps.shape[1])
    assert found.vectors().shape == (3, model.num_features)
    with pytest.raises(ProbeError, match="no class token"):
        bank(model, tmp_path, Noise(3), [Want("class")], cut=Cut("center", 32))


def test_a_layer_is_pooled_as_the_output_is(tmp_path):
    common = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    x = (pass_module.crops(Noise(4).read(2), Cut("center", 16)).float() / 255 - 0.5) / 0.25
    wants = [Want("pooled", 1, True), Want("pooled", 1, False), Want("pooled", -1, True), Want("pooled", -1, False)]
    for pool in ("token", "avg"):
        torch.manual_seed(0)
        model = timm.models.VisionTransformer(**common, global_pool=pool, fc_norm=pool == "avg").eval()
        with torch.no_grad():  # a norm that does something
            (model.fc_norm if pool == "avg" else model.norm).weight.normal_()
            found = bank(model, tmp_path / pool, Noise(4), wants)
            out = model(x)
            torch.testing.assert_close(found.vectors("pooled", 2, [2]), out, rtol=1e-4, atol=1e-5)
            for norm in (True, False):
                ((maps, prefix),) = model.forward_intermediates(
                    x, indices=[1], norm=norm, return_prefix_tokens=True, intermediates_only=True
                )
                mine = prefix[:, 0] if pool == "token" else maps.mean((2, 3))
                mine = model.fc_norm(mine) if norm else mine
                torch.testing.assert_close(found.vectors("pooled", 1, [2], norm), mine, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(found.vectors("pooled", -1, [2], False), out, atol=0.1)
        assert norm_acts(model, Want("pooled", 1), 16) and norm_acts(model, Want("pooled", -1), 16)
    model.global_pool = "max"
    with pytest.raises(ProbeError, match=r"pools its output by 'max', which cannot be done to a single layer; use"):
        layout(model, wants, 16)


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18"])
def test_a_stage_is_the_mean_of_its_map_and_an_early_one_has_no_norm(name, tmp_path):
    model = timm.create_model(name, num_classes=0).eval()
    x = (pass_module.crops(Noise(4).read(2), Cut("center", 32)).float() / 255 - 0.5) / 0.25
    found = bank(model, tmp_path, Noise(4), [Want("pooled", 1), Want("pooled", -1)], cut=Cut("center", 32))
    with torch.no_grad():
        maps = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
        torch.testing.assert_close(found.vectors("pooled", 1, [2]), maps.mean((2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.vectors("pooled", -1, [2]), model(x), rtol=1e-4, atol=1e-5)
    assert not norm_acts(model, Want("pooled", 1), 32) and norm_acts(model, Want("pooled", -1), 32) == (name[0] == "c")


def test_shuffled_rows_come_in_the_order_asked_for(vit, tmp_path):
    found = bank(vit, tmp_path)
    rows = [7, 3, 19, 3]
    assert torch.equal(found.tokens(rows=rows), found.tokens(rows=range(20))[rows])


def test_a_second_call_and_one_with_fewer_wants_reuse_it(vit, tmp_path, passes):
    first = bank(vit, tmp_path)
    count = len(passes)
    again, fewer = bank(vit, tmp_path), bank(vit, tmp_path, wants=WANTS[:1])
    assert len(passes) == count and torch.equal(again.vectors(), first.vectors())
    assert torch.equal(fewer.vectors(), first.vectors()) and len(complete(tmp_path)) == 1
    more = bank(vit, tmp_path, wants=(*WANTS, Want("mean")))  # only what is missing is extracted
    assert sorted(p.name for p in complete(tmp_path)[-1].parent.glob("*/mean.npy")) == ["mean.npy"]
    assert len(list(tmp_path.glob("*/*/patches.npy"))) == 1 and more.vectors("mean").shape == (20, 128)


def test_other_weights_data_or_transform_are_other_banks(vit, tmp_path):
    other = backbone(seed=1)
    bank(vit, tmp_path)
    changed = Noise(20)
    changed.shift = 1  # the same names, other pixels
    for model, options in ((other, {}), (vit, {"source": changed}), (vit, {"cut": Cut("center", 16, 0.875)}),
                           (vit, {"mean": (0.4,) * 3}), (vit, {"dtype": "float16"}), (vit, {"n": 19})):  # fmt: skip
        before = len(list(tmp_path.iterdir()))
        bank(model, tmp_path, **options)
        assert len(list(tmp_path.iterdir())) == before + 1


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_interrupted_extraction_continues_bit_for_bit(vit, tmp_path, monkeypatch, capsys, passes, at):
    whole = bank(vit, tmp_path / "whole")
    own, calls = Part.append, []

    def dies(self, columns, arrays, samples, bad):
        if len(calls) == at:
            with self._file("patches").open("ab") as file:  # killed between two files
                file.write(b"half a row")
            raise KeyboardInterrupt
        calls.append(1)
        own(self, columns, arrays, samples, bad)

    monkeypatch.setattr(Part, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        bank(vit, tmp_path / "cut")
    assert not complete(tmp_path / "cut")
    monkeypatch.setattr(Part, "append", own)
    passes.clear()
    bank(vit, tmp_path / "cut")
    assert len(passes) == 4 - at and ("continuing at" in capsys.readouterr().out) == bool(at)
    for file in complete(tmp_path / "whole")[0].glob("*.npy"):
        assert file.read_bytes() == (complete(tmp_path / "cut")[0] / file.name).read_bytes()
    assert len(whole) == 20


def test_samples_that_cannot_be_read_are_left_out_and_listed(vit, tmp_path):
    found = bank(vit, tmp_path, Noise(20, bad={3, 8}))
    assert [i for i, _ in found.bad] == [3, 8] and 3 not in found.ids and len(found) == 18
    assert found.array("pooled").shape == (18, 128)
    with pytest.raises(ProbeError, match=r"unusable \(limit 8\)"):
        bank(vit, tmp_path / "many", Noise(20, bad=set(range(1, 12))))
    assert not list((tmp_path / "many").glob("*/.part*"))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda p: (p / "pooled.npy").write_bytes((p / "pooled.npy").read_bytes()[:-4]), "its size"),
        (lambda p: (p / "pooled.npy").write_bytes((p / "pooled.npy").read_bytes()[:-4] + b"abcd"), "its checksum"),
        (lambda p: (p / "bank.json").write_text("{"), r"bank\.json cannot be read"),
        (lambda p: edit(p, weights="of another model"), "made of other weights"),
    ],
)
def test_a_damaged_bank_or_one_of_other_weights_is_made_again(vit, tmp_path, capsys, harm, words):
    first = bank(vit, tmp_path).vectors()
    harm(complete(tmp_path)[0])
    assert torch.equal(bank(vit, tmp_path).vectors(), first)
    assert "is not used" in (out := capsys.readouterr().out) and words.replace("\\", "") in out


def edit(path, **changes):
    meta = json.loads((path / "bank.json").read_text())
    meta["identity"] |= changes
    (path / "bank.json").write_text(json.dumps(meta))


def test_a_bank_that_would_not_fit_says_what_would(vit, tmp_path):
    with pytest.raises(ProbeError, match=r"takes 0\.2 MB, and bank\.max_gb=0\.0001 allows 0\.1 MB: bank\.dtype=float16 "
                                         r"would take 0\.1 MB, 10 images would fit \(probe\.bank"):  # fmt: skip
        bank(vit, tmp_path, max_gb=1e-4)
    assert not complete(tmp_path) and not list(tmp_path.glob("*/.part*/patches.npy"))


def test_what_is_said_to_fit_fits_and_one_image_more_does_not(vit, tmp_path):
    """Small rows, of which ids and labels are a twelfth."""
    small = {"wants": (Want("pooled"),), "max_gb": 1e-5}
    with pytest.raises(ProbeError, match=r"takes 11\.0 kB, and .* allows 10\.0 kB: 18 images would fit"):
        bank(vit, tmp_path, **small)
    with pytest.raises(ProbeError, match="18 images would fit"):
        bank(vit, tmp_path, n=19, **small)
    assert len(bank(vit, tmp_path, n=18, **small)) == 18


def test_the_limit_counts_what_the_bank_already_has(vit, tmp_path):
    """Two arrays of 0.16 MB, one after the other: each fits alone."""
    first = bank(vit, tmp_path, wants=(Want("patches"),), max_gb=2e-4).made[0]
    with pytest.raises(ProbeError, match=rf"takes 0\.3 MB \(0\.2 MB in {first.parent} and 0\.2 MB to come\), and "
                                         r"bank\.max_gb=0\.0002 allows 0\.2 MB: once that folder is removed, what "
                                         r"this probe reads would take 0\.2 MB$"):  # fmt: skip
        bank(vit, tmp_path, wants=(Want("patches", 0),), max_gb=2e-4)
    with pytest.raises(ProbeError, match=r"and bank\.max_gb=0\.0002 allows 0\.2 MB: bank\.dtype=float16 would take "
                                         r"0\.2 MB, 12 images would fit"):  # fmt: skip
        bank(vit, tmp_path, wants=(Want("patches"), Want("patches", 0)), max_gb=2e-4)
    assert complete(tmp_path) == [first] and not list(tmp_path.glob("*/.part*/*"))
    assert not bank(vit, tmp_path, wants=(Want("patches"),), max_gb=1e-6).made  # nothing is written: nothing to bound
    unfinished = first.parent / ".part-of-another"
    unfinished.mkdir()
    (unfinished / "mean.npy").write_bytes(bytes(100_000))
    with pytest.raises(ProbeError, match=r"takes 0\.4 MB \(0\.3 MB in"):
        bank(vit, tmp_path, wants=(Want("patches", 0),), max_gb=4e-4)


def test_a_full_disk_leaves_nothing_and_says_one_sentence(vit, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # as a quota would: writing fails half-way
    try:
        with pytest.raises(ProbeError, match="is full: the unfinished bank was removed; free some space"):
            bank(vit, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not complete(tmp_path) and not list(tmp_path.glob("*/.part*"))
    assert len(bank(vit, tmp_path)) == 20


def test_half_precision_holds_the_tokens_only(vit, tmp_path):
    half, full = bank(vit, tmp_path, dtype="float16"), bank(vit, tmp_path)
    assert half.array("patches").dtype == np.float16 and half.array("pooled").dtype == np.float32
    torch.testing.assert_close(half.tokens(rows=[1]), full.tokens(rows=[1]), rtol=1e-3, atol=1e-3)
    low = bank(vit, tmp_path, precision="bf16-mixed", channels_last=True)
    torch.testing.assert_close(low.vectors(), full.vectors(), rtol=0.1, atol=0.1)


def test_a_layer_that_does_not_exist_is_refused(vit, tmp_path):
    with pytest.raises(ProbeError, match="layer 2 of a backbone with 2: choose 0 to 1"):
        bank(vit, tmp_path, wants=[Want("class", 2)])


# --- processes -------------------------------------------------------------------------------------------------------


def extract_slowly(root, seconds):
    torch.set_num_threads(1)
    bank(backbone(), Path(root), Noise(40, seconds=seconds), wants=WANTS)


def process(*args):
    started = multiprocessing.get_context("spawn").Process(target=extract_slowly, args=args)
    started.start()
    return started


@pytest.mark.slow
def test_two_processes_that_want_the_same_bank_make_one(tmp_path):
    both = [process(str(tmp_path), 0.02) for _ in range(2)]
    for one in both:
        one.join()
    assert [one.exitcode for one in both] == [0, 0] and len(complete(tmp_path)) == 1
    assert not list(tmp_path.glob("*/.part*"))


def held(path):
    """Whether somebody has the lock of a file that is there."""
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize("another", [False, True])
def test_a_lock_that_was_removed_while_it_was_waited_for_is_none(tmp_path, capfd, another):
    """Who had the lock removes it with the folder. another: a third one has made both anew, and is waited for."""
    folder, order = tmp_path / "bank", []

    def wait():
        with store._alone(folder) as alone:
            order.append(("in", alone, held(folder / store.LOCK)))

    with contextlib.ExitStack() as third, concurrent.futures.ThreadPoolExecutor(1) as pool:
        with store._alone(folder):
            waiting = pool.submit(wait)
            until(lambda: "waiting for it" in capfd.readouterr().out)
            shutil.rmtree(folder)
            if another:
                third.enter_context(store._alone(folder))
        if another:
            until(lambda: "waiting for it" in capfd.readouterr().out)
            order.append("third is done")
            third.close()
        waiting.result(60)
    assert order == ["third is done"] * another + [("in", True, True)]


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("locks", [True, False])
def test_no_two_write_into_one_unfinished_folder(vit, tmp_path, monkeypatch, locks):
    """Several that want the same bank at once: with locks one writes; without, each under a name of its own."""
    used, own = [], Part.__init__

    def begins(self, folder, *args):
        used.append(folder.name)
        own(self, folder, *args)

    def nobody(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(Part, "__init__", begins)
    if not locks:
        monkeypatch.setattr(store.fcntl, "flock", nobody)
        pids = iter([11, 12, 13])  # threads stand in for processes
        monkeypatch.setattr(store, "_own_name", lambda: f"host-{next(pids)}")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = [pool.submit(bank, vit, tmp_path, Noise(20, seconds=0.01)) for _ in range(3)]
        same = [f.result(120).vectors() for f in found]
    assert all(torch.equal(one, same[0]) for one in same) and len(complete(tmp_path)) == 1
    assert len(used) == len(set(used)) and (len(used) == 1) >= locks
    assert not list(tmp_path.glob("*/.part*"))


def test_relabelled_samples_are_not_taken_from_a_bank(vit, tmp_path):
    first = bank(vit, tmp_path)
    turned = Noise(20)
    turned.turned = 1  # the same images, every label another
    assert torch.equal(bank(vit, tmp_path, turned).labels, (first.labels + 1) % 3)
    assert len(complete(tmp_path)) == 2


def test_only_what_was_made_is_removed(vit, tmp_path):
    kept = bank(vit, tmp_path, wants=(Want("pooled"),))
    again = bank(vit, tmp_path, wants=(Want("pooled"), Want("patches")))
    assert len(kept.made) == len(again.made) == 1 and bank(vit, tmp_path).made != again.made
    store.remove(again.made)
    assert complete(tmp_path)[0] == kept.made[0] or kept.made[0] in complete(tmp_path)
    assert not again.made[0].exists()
    store.remove(complete(tmp_path))
    assert not tmp_path.exists() or not list(tmp_path.iterdir())  # nothing else was there, so the folders go as well


def test_features_that_are_not_finite_are_refused_and_not_kept(vit, tmp_path):
    broken = backbone()
    with torch.no_grad():
        broken.blocks[1].mlp.fc2.bias[3] = float("nan")
    with pytest.raises(ProbeError, match=r"features \(pooled\) contain NaN or infinity; the backbone has diverged"):
        bank(broken, tmp_path / "banks")
    assert not (tmp_path / "banks").exists()


def test_room_for_both_splits_is_looked_at_before_the_first_is_begun(vit, tmp_path, monkeypatch):
    cut, how = Cut("center", 16), How(**{**NORM, "batch_size": 6})
    plans = [store.plan(vit, Noise(n), range(n), WANTS, cut=cut, how=how, place=Place(tmp_path / "b", 1.0, "vit"))
             for n in (20, 30)]  # fmt: skip
    whole = sum(store.need(asked).whole for asked in plans)
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((whole * 0.7, False), (whole * 1.1, True)):
        monkeypatch.setattr(store.shutil, "disk_usage", lambda _, free=free: usage._replace(
            total=0, free=int(free)))  # fmt: skip
        if fits:
            store.check_sizes(plans)
            continue
        with pytest.raises(ProbeError, match=r"a bank of 50 images takes 0\.5 MB, and .* has room for 0\.3 MB: .*"
                                             r"3\d images would fit \(probe\.bank .*probe\.test"):  # fmt: skip
            store.check_sizes(plans)
    assert not (tmp_path / "b").exists()
