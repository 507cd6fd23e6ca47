"""Probe heads against their reference implementations: every pooling, LARS, an EP training trace, DINOv2's grid."""

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from golden_cases import assert_close, cases, load, part
from selfsight import config
from selfsight.nn.pooling import build_pooling
from selfsight.probes import linear
from selfsight.probes.attentive import EP_LARS, Memory, Setting, build_groups, fit, head_losses
from selfsight.probes.heads import ProbeHead, Stack, build_head
from selfsight.probes.optimizers import LARS
from selfsight.probes.protocols import PROTOCOLS
from selfsight.probes.store import Bank
from selfsight.training.schedules import warmup_cosine

# The others of the folder: test_knn.py, test_goldens_conv.py, test_layer_decay.py.
KNOWN = (
    "pool_",
    "train_trace_ep",
    "lars_mae",
    "dinov2_linear_grid",
    "knn_",
    "schedules_",
    "fcmae_",
    "shvit_",
    "spark_",
)
# The references' names to ours: enclosing blocks are left out, and a learned query has one name.
RENAMED = (
    (r"(blocks_token_only\.0|cross_attention_block)\.", ""),
    (r"dino_block\.", "block."),
    (r"spatial\.conv\.", "spatial."),
    (r"\b(cls_token|query_tokens?)\b", "queries"),
)


def our_name(name: str) -> str:
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name


def our_head(info: dict, state: dict) -> ProbeHead:
    """Our head with the official state (a Sequential of pooling, norm, linear; without pooling one place earlier)."""
    config, dims = info["config"], info["dims"]
    name = info["pooling"]
    options = {}
    if name == "ep":
        options = {"num_queries": config["ep_queries"], "d_out": config["d_out"]}
    if name == "abmilp":
        options = {"self_attention": config["abmilp_sa"], "act": config["abmilp_act"], "depth": config["abmilp_depth"]}
    if name in ("aim", "jepa"):
        options = {"num_heads": config["num_heads"]}
    pooling = build_pooling(name, dims["D"], num_tokens=dims["N"], **options)
    head = ProbeHead(pooling, dims["C"])
    head.load_state_dict(head_state(state, name))
    return head


def head_state(state: dict, pooling: str = "ep") -> dict:
    """The official Sequential's names to ours; without a pooling the norm comes first."""
    places = ("bn.", "linear.") if pooling == "cls" else ("pooling.", "bn.", "linear.")
    parts, found = {str(i): place for i, place in enumerate(places)}, {}
    for key, value in state.items():
        place, name = key.split(".", 1)
        found[parts[place] + (our_name(name) if parts[place] == "pooling." else name)] = value
    return found


def gradients(head: ProbeHead, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    F.cross_entropy(head.train()(tokens), labels).backward()
    return {f"grad.{k}": torch.zeros_like(p) if p.grad is None else p.grad for k, p in head.named_parameters()}


def test_every_case_of_the_folder_is_known():
    unknown = [n for n in cases("probing", ("",)) if not n.startswith(KNOWN)]
    assert not unknown


@pytest.mark.parametrize("case", cases("probing", ("pool_",)))
def test_a_head_trains_and_predicts_as_the_reference(case):
    info, t = load("probing", case)
    head = our_head(info, part(t, "state."))
    tokens, labels = t["input.tokens"].requires_grad_(), t["input.labels"]
    given = tokens if tokens.ndim == 3 else tokens[:, None]
    assert sum(p.numel() for p in head.parameters()) == info["n_params"]
    seen = SimpleNamespace()
    head.pooling.register_forward_hook(lambda m, i, out: setattr(seen, "pooled", out[0]))
    head.bn.register_forward_hook(lambda m, i, out: setattr(seen, "bn", out))
    exact = gradients(copy.deepcopy(head).double(), given.detach().double(), labels)
    head.train()
    logits = head(given)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    for key, mine in (("pooled", seen.pooled), ("bn", seen.bn), ("logits", logits), ("loss", loss)):
        assert_close(mine, t[f"output.{key}"], f"{case} {key}", atol=1e-5)
    grads = {f"grad.{k}": p.grad for k, p in head.named_parameters()}
    official = {k: g for k, g in part(t, "grad.").items() if k != "input.tokens"}
    recorded = {f"grad.{k}": g for k, g in head_state(official, info["pooling"]).items()}
    assert_close(tokens.grad, t["grad.input.tokens"], f"{case} grad of tokens", atol=1e-5)
    for key, theirs in recorded.items():
        mine = grads[key] if grads[key] is not None else torch.zeros_like(theirs)  # a key bias: truly zero
        # Two single-precision runs differ by no more than both errors together. It matters for CaiT alone: LayerScale
        # starts its block at 1e-5, so what differs between images drowns in rounding before the norms magnify it.
        error = (mine - exact[key]).abs().max().item()
        assert error < (1e-3 if info["pooling"] == "cait" else 3e-6), f"{case} {key}: rounding {error:.1e}"
        assert_close(mine, theirs, f"{case} {key}", atol=max(1e-5, 2 * error))
    assert {k for k, g in grads.items() if g is not None} <= set(recorded)
    state = head.state_dict()
    for key, value in head_state(part(t, "state_after."), info["pooling"]).items():
        assert_close(state[key].double(), value.double(), f"{case} {key} after", atol=1e-5)
    head.eval()
    with torch.no_grad():
        assert_close(head(given), t["output.logits_eval"], f"{case} logits, eval", atol=1e-5)
    assert_close(seen.pooled, t["output.pooled_eval"], f"{case} pooled, eval", atol=1e-5)


def test_an_ep_head_trains_as_the_reference():
    """32 steps of LARS with warm-up and cosine; once alone, and once as the second of three stacked heads."""
    info, t = load("probing", "train_trace_ep")
    cfg = info["config"]
    base = cfg["lr"] * 256 / cfg["batch"]
    lengths = {"epochs": cfg["epochs"], "warmup_epochs": cfg["warmup_epochs"], "batch_size": cfg["batch"]}
    recipe = EP_LARS._replace(**lengths)
    for rates in ([base], [base / 2, base, base * 3]):
        settings = [Setting("last", cfg["M"], lr, cfg["wd"], 0) for lr in rates]
        sources = {"last": Memory(t["input.tokens"])}
        (group,) = build_groups(settings, sources, "ep", cfg["C"], recipe)
        heads = [group.stack.head(i) for i in range(len(rates))]
        for head in heads:
            head.load_state_dict(head_state(part(t, "state.")))
        group = group._replace(stack=Stack(heads))
        rows = torch.arange(len(t["input.labels"]))
        losses = fit([group], sources, t["input.labels"], rows, recipe, shuffle=False)
        which = len(rates) // 2
        assert_close(losses[:, which], torch.tensor(info["losses"]), "losses", atol=1e-5)
        head = group.stack.head(which).eval()
        for key, value in head_state(part(t, "state_after.")).items():
            assert_close(head.state_dict()[key].double(), value.double(), key, atol=1e-5)
        with torch.no_grad():
            assert_close(head(t["input.tokens"]), t["output.logits_eval_after"], "logits", atol=1e-5)
    pace = warmup_cosine(cfg["lr"], 32, 8)
    assert [pace(i) for i in range(32)] == pytest.approx(info["lrs"], rel=1e-12)


def test_lars_with_maes_linear_probe():
    """Losses of six steps, which see each step's weights, and the last weights: the record has these under the names of
    all six steps (its tensors were not copied)."""
    info, t = load("probing", "lars_mae")
    cfg, lrs = info["config"], info["lrs"]
    pace = warmup_cosine(cfg["lr"], cfg["epochs"], cfg["warmup_epochs"])
    assert [pace(i + 0.5) for i in range(6)] == pytest.approx(lrs, rel=1e-12)
    head = build_head("cls", 12, 5)
    head.linear.load_state_dict({"weight": t["state.weight0"], "bias": t["state.bias0"]})
    stack = Stack([head]).train()
    params = stack.stacked()
    optimizer = LARS(params, torch.zeros(1), momentum=cfg["momentum"], trust=cfg["trust"])
    for i, lr in enumerate(lrs):
        loss = head_losses(stack(t["input.x"][i][:, None]), t["input.y"][i])
        assert_close(loss[0], torch.tensor(info["losses"][i]), f"loss {i}", atol=1e-6)
        grads = torch.autograd.grad(loss.sum(), list(params.values()))
        optimizer.step(dict(zip(params, grads)), torch.tensor([lr]))
    for key in ("weight", "bias"):
        assert_close(params[f"linear.{key}"][0], t[f"output.{key}6"], key, atol=1e-6)
    state = stack.head(0).bn.state_dict()
    for key in ("running_mean", "running_var"):
        assert_close(state[key], t[f"output.{key}"], key, atol=1e-6)


def test_lars_with_decay_and_without_a_norm():
    """The same gradient twice at rate 0.3, decay 0.1; a weight or a gradient of zero is not scaled."""
    _, t = load("probing", "lars_mae")
    params = {n: t[f"wd.{n}0"][None].clone() for n in "pqb"}
    optimizer = LARS(params, torch.tensor([0.1]))
    for _ in range(2):
        optimizer.step({n: t[f"wd.g{n}"][None] for n in "pqb"}, torch.tensor([0.3]))
    for n in "pqb":
        assert_close(params[n][0], t[f"wd.{n}2"], n, atol=1e-6)


def dinov2_settings():
    """Of `probe=linear probe.protocol=dinov2_linear`."""
    settings = config.load("probe", ["checkpoint=-", "probe=linear"]).probe
    settings.update(PROTOCOLS["linear"]["dinov2_linear"])
    return settings


def test_dinov2s_grid_of_linear_heads():
    """Inputs of all four kinds as the command reads them from a bank, three SGD steps of two rates each."""
    _, t = load("probing", "dinov2_linear_grid")
    cls = [t[f"input.block{i}.cls"].numpy() for i in range(4)]
    mean = t["input.block3.patch"].mean(1).numpy()
    arrays = {f"class-{i}-norm": x for i, x in enumerate(cls)} | {"class": cls[3], "mean": mean, "mean-3-norm": mean}
    columns = {key: np.arange(5) for key in ("ids", "part", "key", "content", "labels")}
    bank = Bank(columns, arrays, depth=4)
    official = {"class1": "n1_avg0", "class1+mean": "n1_avg1", "class4": "n4_avg0", "class4+mean": "n4_avg1"}
    rates = {"lr0_001": 0.001, "lr0_1": 0.1}
    settings = dinov2_settings()
    settings.update({"lrs": [lr * 256 / 5 for lr in rates.values()], "steps": 3, "batch_size": 5})
    assert set(settings.inputs) == set(official)
    how = linear.recipe_of(settings)

    def recorded(when, theirs, part):
        return torch.stack([t[f"{when}.classifiers_dict.{theirs}_{rate}.linear.{part}"] for rate in rates])

    assert not how.batch_norm
    for name in settings.inputs:
        theirs = official[name]
        x = linear.join(bank, linear.inputs_of(name, settings.layer, settings.norm))
        assert_close(x, t[f"output.input_{theirs}"], theirs, atol=0)
        weight, bias = (recorded("state", theirs, part).requires_grad_() for part in ("weight", "bias"))
        linear.train_heads(weight, bias, x, t["input.labels"], how, None)
        assert_close(weight, recorded("state_after3", theirs, "weight"), "weight", atol=1e-5)
        assert_close(bias, recorded("state_after3", theirs, "bias"), "bias", atol=1e-5)
        logits = linear._logits(x, weight, bias)
        for i, rate in enumerate(rates):
            assert_close(logits[i], t[f"output.logits_after3.{theirs}_{rate}"], "logits", atol=1e-5)


def test_the_published_grid_has_52_heads():
    settings = dinov2_settings()
    how = linear.recipe_of(settings)
    assert len(how.heads) * len(settings.inputs) == 52 and len(set(how.heads)) == 13
