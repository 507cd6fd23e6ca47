"""I-JEPA against its reference: masks, positions, schedules, forward, gradients, a training trace, timm."""

import pytest
import timm
import torch

import official_jepa
from golden_cases import assert_close, cases, load, part
from official_jepa import BOTH, NEAR
from selfsight.interop.export import export_backbone
from selfsight.nn.positions import sincos_2d
from selfsight.objectives.ijepa import IJEPA
from selfsight.training.optim import build_adamw, param_groups
from selfsight.training.schedules import cosine, linear_then_constant, warmup_cosine
from selfsight.views.masks import official_multiblock, official_shapes

KNOWN = (
    "base_", "multi_context_", "single_", "train3_", "schedules", "sincos", "mask_block_sizes", "mask_exact_",
    "mask_stats", "export_timm",
)  # fmt: skip


def test_every_case_of_the_folder_is_known():
    assert not [n for n in cases("ijepa", ("",)) if not n.startswith(KNOWN)]


def sampler(common: dict, config: dict) -> tuple[tuple[int, int], tuple, int]:
    """Grid, spans and min_keep of a case's masks."""
    side = config["input_size"] // config["patch_size"]
    spans = tuple(tuple(common[k]) for k in ("pred_mask_scale", "aspect_ratio", "enc_mask_scale"))
    return (side, side), spans, config["min_keep"]


@pytest.mark.parametrize("case", cases("ijepa", ("mask_block_sizes",)))
def test_official_block_sizes(case):
    info, t = load("ijepa", case)
    for name, config in info["config"].items():
        if name == "common":
            continue
        grid, spans, _ = sampler(info["config"]["common"], config)
        mine = torch.tensor([official_shapes(step, grid, *spans) for step in range(len(t[f"output.{name}.pred_hw"]))])
        assert torch.equal(mine[:, 0], t[f"output.{name}.pred_hw"].long())
        assert torch.equal(mine[:, 1], t[f"output.{name}.enc_hw"].long())


@pytest.mark.parametrize("case", cases("ijepa", ("mask_exact_",)))
def test_official_masks_bit_for_bit(case):
    info, t = load("ijepa", case)
    config, common = info["config"], info["config"]["common"]
    for name in sorted({key.split(".")[1] for key in t}):
        grid, spans, min_keep = sampler(common, config[name])
        generator = torch.Generator().manual_seed(config["torch_manual_seed"])
        for step in range(config["iterations"]):
            shapes = official_shapes(step, grid, *spans)
            context, targets = official_multiblock(config["batch"], grid, shapes, generator, min_keep=min_keep)
            assert torch.equal(context, t[f"output.{name}.it{step}.enc.0"].long())
            for i in range(common["npred"]):
                assert torch.equal(targets[:, i], t[f"output.{name}.it{step}.pred.{i}"].long())


def statistics() -> list:
    """Each recorded statistic; those of many images are slow."""
    found = [(c, n) for c in cases("ijepa", ("mask_stats",)) for n in load("ijepa", c)[0]["stats"]]
    fast = ("448_p16_bs16",)
    return [pytest.param(*f, marks=() if f[1] in fast else pytest.mark.slow, id=f[1]) for f in found]


@pytest.mark.parametrize(("case", "name"), statistics())
def test_official_statistics(case, name):
    info, t = load("ijepa", case)
    stats, config, batch = info["stats"][name], info["config"], int(name.rsplit("bs", 1)[1])
    grid, spans, min_keep = sampler(config["common"], config["configs"][name.rsplit("_", 1)[0]])
    generator = torch.Generator().manual_seed(config["torch_manual_seed"])
    cells = grid[0] * grid[1]
    seen, asked, sizes = torch.zeros(cells), torch.zeros(cells), []
    for step in range(stats["iters"]):
        shapes = official_shapes(step, grid, *spans)
        context, targets = official_multiblock(batch, grid, shapes, generator, min_keep=min_keep)
        seen += torch.bincount(context.flatten(), minlength=cells)
        asked += torch.bincount(targets.flatten(), minlength=cells) / targets.shape[1]
        sizes.append(context.shape[1])
    images = batch * stats["iters"]
    assert sum(sizes) / len(sizes) == pytest.approx(stats["ctx_keep_mean"])
    assert_close((seen / images).view(grid), t[f"output.{name}.ctx_heat"], "context", atol=1e-6)
    assert_close((asked / images).view(grid), t[f"output.{name}.pred_heat"], "targets", atol=1e-6)
    assert not seen.view(grid)[-1].any() and not asked.view(grid)[:, -1].any()  # what `unbiased` is for


@pytest.mark.parametrize("case", cases("ijepa", ("sincos",)))
def test_positions(case):
    _, t = load("ijepa", case)
    for key, table in t.items():
        dim, side = map(int, key.removeprefix("output.sincos.").split("x"))
        assert_close(sincos_2d(dim, side, side), table, key, atol=1e-7)


def schedules(config: dict, ipe: int, epochs: int, warmup: int, ipe_scale: float) -> dict:
    """lr, wd and momentum of iteration i; the reference steps the first two before the forward."""
    total = int(ipe_scale * epochs * ipe)
    start, peak, final = config["start_lr"], config["lr"], config["final_lr"]
    lr = warmup_cosine(peak, total, int(warmup * ipe), final, start)
    wd = cosine(config["wd"], config["final_wd"], total)
    momentum = linear_then_constant(*config["ema"], ipe * epochs * ipe_scale)
    return {"lr": lambda i: lr(i + 1), "wd": lambda i: wd(i + 1), "momentum": momentum}


@pytest.mark.parametrize("case", cases("ijepa", ("schedules",)))
def test_schedules(case):
    info, t = load("ijepa", case)
    for name in ("a", "b"):
        for which, curve in schedules(info["config"], **info["config"][name]).items():
            expected = t[f"output.{name}.{which}"]
            mine = torch.tensor([curve(i) for i in range(len(expected))], dtype=torch.float64)
            assert_close(mine, expected, f"{name} {which}", atol=1e-12)


@BOTH
@pytest.mark.parametrize("case", cases("ijepa", ("base_", "multi_context_", "single_")))
def test_forward_loss_gradients_and_teacher(case, dtype):
    info, t = load("ijepa", case)
    objective = official_jepa.build(IJEPA, info["config"])
    official_jepa.load(objective, part(t, "state.", dtype), part(t, "state_target.", dtype))
    given = official_jepa.batches(t, "input.", dtype)
    images = given[0]["images"]["image"][0]
    features = objective.seen_by_teacher(images)
    assert_close(features, t["output.target_full"], "targets", **NEAR)
    asked = given[0]["target"]
    rows = objective.targets(features, asked.flatten(1)).unflatten(1, asked.shape[1:])
    assert_close(official_jepa.in_loss_order([rows] * len(given)), t["output.target_masked"], "gathered", **NEAR)
    context = torch.cat([objective.encode(images, b["context"]) for b in given])
    assert_close(context, t["output.context"], "context", **NEAR)
    official_jepa.assert_step(objective, t, given, "encoder.")


@pytest.mark.parametrize("case", cases("ijepa", ("train3_",)))
def test_training_trace(case):
    """Three steps of the official loop: its schedules, groups (the mask token is decayed), AdamW, teacher."""
    info, t = load("ijepa", case)
    config = info["config"]
    objective = official_jepa.build(IJEPA, config | {"ema_momentum": None})
    state = part(t, "state.", torch.float64)
    official_jepa.load(objective, state, {k.removeprefix("encoder."): v for k, v in state.items() if "encoder" in k})
    curves = schedules(config, config["ipe"], config["epochs"], config["warmup_epochs"], 1.0)
    objective.momentum = curves["momentum"]
    optimizer = build_adamw(param_groups(objective, config["wd"], rule="official"), config["lr"], (0.9, 0.999), 1e-8)
    decayed = optimizer.param_groups[0]["names"]
    assert "predictor.mask_token" in decayed and not any(name.endswith("bias") for name in decayed)
    for step in range(len(t["output.loss"])):
        for name, curve in curves.items():
            assert curve(step) == pytest.approx(t[f"output.{name}"][step].item(), abs=1e-12)
        for group in optimizer.param_groups:
            group["lr"] = curves["lr"](step)
            group["weight_decay"] = curves["wd"](step) if group["decayed"] else 0.0
        (batch,) = official_jepa.batches(t, f"input.step{step}.", torch.float64)
        loss, _ = objective.loss(batch, step)
        assert_close(loss, t["output.loss"][step], f"loss {step}", **NEAR)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        objective.after_step(step)
    mine = {official_jepa.official_name(n): p for n, p in objective.named_parameters() if not n.startswith("teacher.")}
    mine |= {
        official_jepa.official_name(n).replace("encoder.", "target."): p
        for n, p in objective.teacher.named_parameters()
    }
    for name, value in part(t, "output.final.").items():
        assert_close(mine[name], value, name, **NEAR)


@pytest.mark.parametrize("case", cases("ijepa", ("export_timm",)))
def test_export_opens_with_timm(case, tmp_path):
    info, t = load("ijepa", case)
    other, state = load("ijepa", info["config"]["state"].split(".")[0])
    objective = official_jepa.build(IJEPA, other["config"])
    official_jepa.load(objective, part(state, "state."), part(state, "state_target."))
    backbone = next(iter(objective.exports().values()))
    export_backbone(backbone, tmp_path / "out", mean=(0.5,) * 3, std=(0.5,) * 3, image_size=48, card={})
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        assert_close(model.forward_features(t["input.images"]), t["output.tokens"], "tokens", **NEAR)
        assert_close(model(t["input.images"]), t["output.pooled"], "pooled", **NEAR)
