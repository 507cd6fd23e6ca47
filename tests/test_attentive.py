"""Probe heads on cached tokens: many train as each would alone, and what is reported chose nothing."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfsight.nn.pooling import POOLINGS
from selfsight.probes import ProbeError
from selfsight.probes.attentive import Memory, Recipe, Setting, accuracy, attentive, build_groups, fit
from selfsight.probes.heads import Stack, build_head
from selfsight.probes.linear import held_out
from selfsight.probes.optimizers import AdamW, build_optimizer
from selfsight.training.schedules import warmup_cosine

OPTIONS = {"ep": {"num_queries": 4}, "aim": {"num_heads": 4}, "jepa": {"num_heads": 4}, "capi": {"num_heads": 4},
           "vjepa2": {"num_heads": 4, "depth": 2}, "coca": {"num_queries": 3}}  # fmt: skip
RECIPE = Recipe("lars", 3, 1, 32)


def data(n=240, tokens=9, dim=24, classes=4, seed=0):
    """Tokens of which a few, at a random place, show the class: means see little of it."""
    g = torch.Generator().manual_seed(seed)
    marks = 3 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % classes
    x = torch.randn(n, tokens, dim, generator=g)
    place = torch.randint(tokens, (n,), generator=g)
    x[torch.arange(n), place] += marks[labels]
    return x, labels


def run(train=None, test=None, **changes):
    train, test = train or data(), test or data(120, seed=1)
    options = {"num_queries": (4,), "lrs": (1.0, 10.0), "seeds": (0, 1), "recipe": RECIPE} | changes
    select = options.pop("select", held_out(np.arange(len(train[1])), 0.25))
    wrap = [x if isinstance(x, dict) else Memory(x) for x in (train[0], test[0])]
    return attentive(wrap[0], train[1], wrap[1], test[1], select=select, **options)


@pytest.mark.parametrize("name", POOLINGS)
def test_stacked_heads_compute_what_each_computes_alone(name):
    x, labels = data(5, tokens=16, classes=3)
    x = x.double()
    heads = [build_head(name, 24, 3, seed=s, num_tokens=16, **OPTIONS.get(name, {})).double() for s in range(3)]
    heads = [head.train() for head in heads]
    stack = Stack(heads).train()
    logits = stack(x)
    F.cross_entropy(logits.flatten(0, 1), labels.repeat(3), reduction="sum").backward()
    for i, head in enumerate(heads):
        alone = head(x)
        torch.testing.assert_close(logits[i], alone, rtol=0, atol=1e-10)
        F.cross_entropy(alone, labels, reduction="sum").backward()
        for key, parameter in head.named_parameters():
            mine, theirs = (
                torch.zeros(1).double() if g is None else g for g in (stack.stacked()[key].grad, parameter.grad)
            )
            mine = mine[i] if mine.ndim > theirs.ndim else mine
            # CaiT's LayerScale of 1e-5 magnifies rounding.
            torch.testing.assert_close(mine, theirs.expand_as(mine), rtol=0, atol=1e-8 if name == "cait" else 1e-10)
        ours, theirs = stack.head(i).state_dict(), head.state_dict()
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(stack.eval()(x), torch.stack([h.eval()(x) for h in heads]), rtol=0, atol=1e-10)


class Counting(Memory):
    """Remembers the largest number of samples that were asked for at once."""

    most = 0

    def tokens(self, rows):
        self.most = max(self.most, len(rows))
        return super().tokens(rows).double()


@pytest.mark.parametrize("name", ["ep", "siglip", "clip", "abmilp", "gap"])
def test_batches_in_pieces_train_the_same_heads(name):
    x, labels = data(70)
    trained = []
    for pieces in (None, 13):
        recipe = Recipe("adamw", 2, 0, 32, max_batch=pieces)
        settings = [Setting("last", None, lr, 0.01, 0) for lr in (0.01, 0.1)]
        source = Counting(x)
        groups = build_groups(settings, {"last": source}, name, 4, recipe, **OPTIONS.get(name, {}))
        groups[0].stack.double()
        losses = fit(groups, {"last": source}, labels, torch.arange(64), recipe)
        trained.append((losses, groups[0].stack.state_dict()))
        assert source.most == (pieces or 32)
    torch.testing.assert_close(trained[0][0], trained[1][0], rtol=0, atol=1e-6)
    for key, value in trained[0][1].items():
        torch.testing.assert_close(trained[1][1][key], value, rtol=0, atol=1e-9, msg=key)


def test_batches_are_not_split_where_tokens_have_batch_statistics():
    recipe = Recipe("sgd", 1, 0, 32, max_batch=8)
    with pytest.raises(ProbeError, match="max_batch=8 cannot split a batch of 32: this pooling has batch statistics"):
        run(pooling="aim", num_queries=(None,), num_heads=4, recipe=recipe)


class Double(Memory):
    def tokens(self, rows):
        return super().tokens(rows).double()


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("ep, single precision", o) for o in ("lars", "sgd", "adamw")]
    + [("jepa", "adamw"), ("dolg", "lars"), ("gap", "sgd")],
)
def test_heads_trained_together_end_where_each_ends_alone(name, optimizer):
    """In double precision: the bias in front of a batch norm has a true gradient of zero, and AdamW makes steps of its
    rounding. EP, which has none, in single precision as well."""
    x, labels = data(96)
    single, name = "single" in name, name.split(",")[0]
    rates = {"lars": (5.0, 40.0), "sgd": (0.1, 0.5), "adamw": (0.005, 0.02)}[optimizer]
    settings = [Setting("last", None, lr, wd, seed) for lr in rates for wd in (0.0, 0.1) for seed in (0, 1)]
    recipe, rows = RECIPE._replace(optimizer=optimizer, epochs=3), torch.arange(96)
    sources = {"last": Memory(x) if single else Double(x)}

    def trained(settings):
        (group,) = build_groups(settings, sources, name, 4, recipe, **OPTIONS.get(name, {}))
        if not single:
            group.stack.double()
        return group.stack, fit([group], sources, labels, rows, recipe)

    stack, losses = trained(settings)
    for i in (3, 6):
        alone, one = trained([settings[i]])
        torch.testing.assert_close(losses[:, i], one[:, 0], rtol=0, atol=1e-5)
        for key, value in alone.head(0).state_dict().items():
            torch.testing.assert_close(stack.head(i).state_dict()[key], value, rtol=0, atol=1e-5 if single else 1e-8)
    assert len({round(v, 4) for v in losses[-1].tolist()}) >= 4  # they are different heads


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizers_step_as_torchs(name):
    """Two probes with their own rate and decay; the bias is not decayed."""
    torch.manual_seed(0)
    rates, decays = torch.tensor([0.1, 0.02]), torch.tensor([0.3, 0.05])
    start = {"weight": torch.randn(2, 3, 4), "bias": torch.randn(2, 3)}
    grads = [{n: torch.randn_like(p) for n, p in start.items()} for _ in range(4)]
    params = {n: p.clone() for n, p in start.items()}
    optimizer = build_optimizer(name, params, decays)
    for step, grad in enumerate(grads):
        optimizer.step(grad, rates * (step + 1))
    cls = {"sgd": lambda g: torch.optim.SGD(g, momentum=0.9), "adamw": torch.optim.AdamW}[name]
    for i in range(2):
        own = {n: p[i].clone().requires_grad_() for n, p in start.items()}
        groups = [{"params": [own["weight"]], "weight_decay": decays[i].item()},
                  {"params": [own["bias"]], "weight_decay": 0.0}]  # fmt: skip
        torchs = cls(groups)
        for step, grad in enumerate(grads):
            for group in torchs.param_groups:
                group["lr"] = rates[i].item() * (step + 1)
            for n, p in own.items():
                p.grad = grad[n][i]
            torchs.step()
        for n, p in own.items():
            torch.testing.assert_close(params[n][i], p.detach(), rtol=0, atol=1e-6)


def test_a_head_that_diverges_harms_no_other():
    x, labels = data(96)
    sources, recipe = {"last": Memory(x)}, RECIPE._replace(optimizer="sgd")
    runs = []
    for rates in ((0.1, 1e30), (0.1,)):
        groups = build_groups([Setting("last", 4, lr, 0.0, 0) for lr in rates], sources, "ep", 4, recipe)
        fit(groups, sources, labels, torch.arange(96), recipe)
        runs.append(groups[0].stack)
    assert not runs[0].head(1).linear.weight.isfinite().all()
    torch.testing.assert_close(runs[0].head(0).linear.weight, runs[1].head(0).linear.weight, rtol=0, atol=1e-5)
    (good, bad), _ = accuracy(runs[0], sources["last"], labels, torch.arange(96))
    assert good > bad == 0


def test_the_grid_is_chosen_on_held_out_rows_and_reported_over_seeds():
    result = run(lrs=(1e-6, 20.0), seeds=(0, 1, 2), recipe=RECIPE._replace(epochs=12))
    best = result.best
    assert best.lr == 20.0 and len(result.grid) == 6 and len(best.top1_per_seed) == len(best.heads) == 3
    assert best.top1 > 60
    assert best.top1 == pytest.approx(np.mean(best.top1_per_seed))
    assert best.spread == pytest.approx(np.std(best.top1_per_seed, ddof=1))
    chosen = [row["select_top1"] for row in result.grid if row["lr"] == 20.0]
    assert best.select_top1 == pytest.approx(np.mean(chosen))
    json.dumps(result.grid)


def test_nothing_of_the_choice_depends_on_the_test_split():
    one, other = run(), run(test=(data(120, seed=1)[0], data(120)[1].flip(0)))
    assert one.grid == other.grid and one.best[:6] == other.best[:6] and one.best.top1 != other.best.top1


def test_every_layer_has_its_own_choice_and_queries_are_part_of_it():
    x, labels = data()
    t, test_labels = data(120, seed=1)
    layers = [{"first": Memory(0.1 * torch.randn_like(v)), "last": Memory(v)} for v in (x, t)]
    result = run((layers[0], labels), (layers[1], test_labels), num_queries=(2, 4), lrs=(20.0,),
                 recipe=RECIPE._replace(epochs=8))  # fmt: skip
    assert list(result.layers) == ["first", "last"] and result.best.layer == "last"
    assert len(result.grid) == 2 * 2 * 2
    assert result.layers["first"].top1 < result.layers["last"].top1


def test_tokens_may_be_a_memory_map_in_half_precision(tmp_path):
    x, labels = data()
    np.save(tmp_path / "tokens.npy", x.half().numpy())
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    result = run((x.half().float(), labels)), run((mapped, labels))
    assert result[0].grid == result[1].grid and result[0].best[:9] == result[1].best[:9]


def test_features_without_a_token_axis_are_one_token():
    x, labels = data()
    result = run((x.mean(1), labels), (data(120, seed=1)[0].mean(1), data(120, seed=1)[1]), pooling="cls",
                 num_queries=(None,))  # fmt: skip
    assert result.best.num_queries is None


def test_rows_that_are_held_out_teach_nothing():
    x, labels = data()
    select = held_out(np.arange(240), 0.25)
    other = x.clone()
    other[torch.from_numpy(select)] = 1e4
    heads = [run((v, labels), select=select, lrs=(5.0,)).best.heads[0] for v in (x, other)]
    assert torch.equal(heads[0].linear.weight, heads[1].linear.weight)


def test_warm_up_starts_at_zero():
    x, labels = data(96)
    sources = {"last": Memory(x)}
    groups = build_groups([Setting("last", 4, 5.0, 0.0, 0)], sources, "ep", 4, RECIPE)
    before = groups[0].stack.head(0).linear.weight.clone()
    fit(groups, sources, labels, torch.arange(32), RECIPE._replace(epochs=1, warmup_epochs=1))
    assert torch.equal(before, groups[0].stack.head(0).linear.weight)
    assert warmup_cosine(1.0, 9, 3)(3) == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"test": (data(120)[0], torch.full((120,), -1))}, "120 of 120 test samples have no label"),
        ({"select": np.zeros(240, bool)}, "0 of 240 training samples are held out"),
        ({"num_queries": (5,)}, "num_queries=5 does not divide the pooled width 24; use one of 1, 2, 3, 4"),
        ({"train": (data()[0], data(200)[1])}, "240 train samples of layer last and 200 labels"),
        ({"recipe": RECIPE._replace(optimizer="adam")}, "use one of lars, sgd, adamw"),
        ({"recipe": RECIPE._replace(batch_size=1)}, "batches of 1"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(changes, sentence):
    with pytest.raises(ProbeError, match=sentence):
        run(**changes)


def test_heads_of_different_shapes_are_no_stack():
    with pytest.raises(ProbeError, match="heads of one shape"):
        Stack([build_head("ep", 24, 3, num_queries=m) for m in (2, 4)])


def test_adamw_takes_betas():
    assert AdamW({}, torch.zeros(1), betas=(0.9, 0.95)).betas == (0.9, 0.95)
