"""iBOT and DINOv2 against their references: heads, losses, centres, Sinkhorn, KoLeo, masked ViTs, whole steps."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import official
from golden_cases import assert_close, cases, load, part
from selfsight.backbones.tokens import Drop, Replace, Tokens
from selfsight.nn.heads import PrototypeHead
from selfsight.nn.losses import cross_entropy, cross_view, koleo
from selfsight.nn.targets import Center, sinkhorn
from selfsight.objectives.distill import Pace
from selfsight.objectives.ibot import IBOT, Masking
from selfsight.training.optim import clip_per_tensor, decays
from selfsight.training.schedules import warmup_cosine
from selfsight.views.masks import block_mask, stratified_counts

IBOT_CASES = ("head_", "loss_", "vit_full_step", "schedules_and_clip")
DINOV2_CASES = (
    "dino_loss_softmax_center", "dino_sinkhorn", "dist2_", "head", "ibot_patch_", "koleo", "meta_step_",
    "schedules_groups_masks", "vit_registers_masks",
)  # fmt: skip
NEAR = {"atol": 1e-5, "of_largest": 1e-4}  # the goldens' own tolerance: they are float32 throughout


class Given(nn.Module):
    """Stands for backbone and heads where a golden starts at the logits."""

    depth, drop_path_rate = 1, 0.0

    def __init__(self, pooled, patches, local, prototypes):
        super().__init__()
        self.pooled, self.patches, self.local, self.num_prototypes = pooled, patches, local, prototypes
        self.num_patch_prototypes = prototypes
        self.weight = nn.Parameter(torch.zeros(()))

    def __deepcopy__(self, memo):
        return Given(self.pooled, self.patches, self.local, self.num_prototypes)

    def forward(self, x, hide=None, patch=False, **_):
        if x.ndim < 4:
            return x  # as a head: these are logits already
        first = x.shape[-1] == 8
        pooled = self.pooled if first else self.local
        return Tokens(pooled, self.patches if first else pooled[:, None], pooled[:, None])

    def embed(self, x):
        return x

    def score(self, z, patch=False):
        return z

    def to_tokens(self, ids, size):
        return ids


def ibot_of_logits(config: dict, t: dict, prefix: str) -> tuple[IBOT, dict, dict]:
    """An objective whose networks return the golden's logits; the batch; and the leaves that get gradients."""
    get = {k: t[f"input.{prefix}{k}"] for k in ("student_cls", "student_patch", "student_local_cls")}
    leaves = {k: v.clone().requires_grad_() for k, v in get.items()}
    b, patches = config["B"], config["patch_out_dim"]
    student = nn.ModuleDict(
        {
            "backbone": Given(*(leaves[f"student_{k}"] for k in ("cls", "patch", "local_cls")), config["out_dim"]),
            "head": Given(None, None, None, config["out_dim"]),
            "patch_head": Given(None, None, None, patches),
        }
    )
    side = config["P_side"]
    objective = IBOT(
        student, official.NO_VIEWS, official.pace({**config, "epochs": config["nepochs"]}),
        Masking((side, side), b, ratio=(0.1, 1.0)), pooled_loss=config["lambda1"], patch_loss=config["lambda2"],
    ).train()  # fmt: skip
    teacher = objective.teacher["backbone"]
    teacher.pooled, teacher.patches = t[f"input.{prefix}teacher_cls"], t[f"input.{prefix}teacher_patch"]
    views = {"global": torch.zeros(2, b, 3, 8, 8), "local": torch.zeros(config["nlcrops"], b, 3, 4, 4)}
    mask = t[f"input.{prefix}student_mask"].bool().flatten(2)
    return objective, {"images": views, "drop": dict.fromkeys(views), "mask": mask}, leaves


def test_every_case_of_the_folders_is_known():
    assert not [n for n in cases("ibot", ("",)) if not n.startswith(IBOT_CASES)]
    assert not [n for n in cases("dinov2", ("",)) if not n.startswith(DINOV2_CASES)]


@pytest.mark.parametrize("case", cases("ibot", ("loss_",)))
def test_ibot_loss_centres_and_gradients(case):
    info, t = load("ibot", case)
    config, center, center2 = info["config"], t["state.center"][0], t["state.center2"].flatten()
    for prefix in ("step0.", "step1.") if "output.step0.loss" in t else ("",):
        objective, batch, leaves = ibot_of_logits(config, t, prefix)
        objective.center.center.copy_(center)
        objective.center2.center.copy_(center2)
        if config["mim_start_epoch"] == 0:
            assert objective.pace.temp(config["epoch"]) == pytest.approx(config["temp"])
        loss, logs = objective.loss(batch, config["epoch"])
        loss.backward()
        assert_close(loss, t[f"output.{prefix}loss"], f"{case} {prefix}loss", **NEAR)
        for mine, theirs, weight in (("pooled", "loss_cls", "lambda1"), ("patch", "loss_patch", "lambda2")):
            assert_close(logs[mine] * config[weight], t[f"output.{prefix}{theirs}"], f"{case} {theirs}", **NEAR)
        for name, leaf in leaves.items():
            assert_close(leaf.grad, t[f"output.{prefix}grad.{name}"], f"{case} {prefix}grad {name}", **NEAR)
        objective.after_step(0)
        center, center2 = objective.center.center, objective.center2.center
        assert_close(center[None], t[f"output.{prefix}center"], "centre", **NEAR)
        assert_close(center2[None, None], t[f"output.{prefix}center2"], "patch centre", **NEAR)


@pytest.mark.parametrize(("method", "case"), [("ibot", c) for c in cases("ibot", ("head_",))] + [("dinov2", "head")])
def test_heads(method, case):
    info, t = load(method, case)
    config = info["config"]
    unshared = config.get("shared_head") is False
    head = PrototypeHead(
        config["in_dim"], config["out_dim"], hidden=config["hidden_dim"], bottleneck=config["bottleneck_dim"],
        learn_scale=not config.get("norm_last_layer", False),
        patch_prototypes=config["patch_out_dim"] if unshared else None,
    )  # fmt: skip
    state = part(t, "state.")
    head.load_state_dict({k: v for k, v in state.items() if unshared or "last_layer2" not in k})
    x = t["input.x"].clone().requires_grad_()
    if method == "dinov2":
        logits = head(x)
        assert_close(logits, t["output.logits"], "logits", **NEAR)
        (logits * t["input.w"]).sum().backward()
    else:
        pooled, patches = head(x[:, 0]), head(x[:, 1:], patch=True)
        assert_close(pooled, t["output.cls_logits"], "class logits", **NEAR)
        assert_close(patches, t["output.patch_logits"], "patch logits", **NEAR)
        ((pooled * t["input.w_cls"]).sum() + (patches * t["input.w_patch"]).sum()).backward()
    assert_close(x.grad, t["output.grad.x"], "grad x", **NEAR)
    named = dict(head.named_parameters())
    for name, grad in part(t, "output.grad.").items():
        if name != "x":
            assert_close(named[name].grad, grad, name, **NEAR)


def ibot_of(info: dict, t: dict) -> tuple[IBOT, dict]:
    """The objective and the batch of a recorded step."""
    config = info["config"]
    backbone = official.vit(config["vit"], IBOT.needs)
    student = nn.ModuleDict({"backbone": backbone, "head": official.head(config["head"], 16)})
    pace = Pace(lambda step: config["ema_momentum"], lambda step: 0.055)
    objective = IBOT(student, official.NO_VIEWS, pace, Masking((4, 4), config["B"], ratio=(0.1, 1.0))).train()
    batch = official.views_of([t[f"input.crop{i}"] for i in range(4)])
    batch["mask"] = t["input.masks"].bool().flatten(2)
    return objective, batch


@pytest.mark.parametrize("case", cases("ibot", ("vit_full_step",)))
def test_ibot_whole_step(case):
    info, t = load("ibot", case)
    config = info["config"]
    objective, batch = ibot_of(info, t)
    official.load(objective.student, part(t, "state.student."))
    official.load(objective.teacher, part(t, "state.teacher."))
    hidden = objective.encode(objective.student, batch["images"]["global"], Replace(batch["mask"].flatten(0, 1)))
    assert_close(objective.student["head"](hidden.pooled), t["output.student_cls"], "student", **NEAR)
    assert_close(objective.student["head"](hidden.patches), t["output.student_patch"], "student patches", **NEAR)
    seen = objective.encode(objective.teacher, batch["images"]["global"])
    assert_close(objective.teacher["head"](seen.patches), t["output.teacher_patch"], "teacher patches", **NEAR)
    loss, logs = objective.loss(batch, 0)
    assert_close(loss, t["output.loss"], "loss", **NEAR)
    assert_close(logs["patch"], t["output.loss_patch"], "patch loss", **NEAR)
    loss.backward()
    clip_per_tensor(objective.student.parameters(), config["clip"])
    grads = {official.official_name(n): p.grad for n, p in objective.student.named_parameters()}
    checked = part(t, "output.grad_clipped.")
    for name, grad in checked.items():
        assert_close(grads[name].reshape(grad.shape), grad, name, atol=0, of_largest=1e-4)
    objective.after_step(0)
    teacher = {official.official_name(n): p for n, p in objective.teacher.named_parameters()}
    for name, value in part(t, "output.teacher_after_ema.").items():
        assert_close(teacher[name], value, name, **NEAR)
    assert_close(objective.center.center[None], t["output.center"], "centre", **NEAR)
    assert_close(objective.center2.center[None, None], t["output.center2"], "patch centre", **NEAR)


@pytest.mark.parametrize("case", cases("ibot", ("schedules_and_clip",)))
def test_ibot_schedules_and_clipping(case):
    info, t = load("ibot", case)
    curves = {
        "lr": warmup_cosine(1e-3, 20, 8, 1e-6, inclusive=True), "wd": warmup_cosine(0.04, 20, 0, 0.4),
        "momentum": warmup_cosine(0.996, 20, 0, 1.0),
    }  # fmt: skip
    for name, curve in curves.items():
        mine = torch.tensor([curve(i) for i in range(20)], dtype=torch.float64)
        assert_close(mine, t[f"output.{name}"], name, atol=1e-12)
    for name in ("a", "b"):
        p = nn.Parameter(torch.zeros_like(t[f"input.grad_{name}"]))
        p.grad = t[f"input.grad_{name}"].clone()
        clip_per_tensor([p], info["config"]["clip"])
        assert_close(p.grad, t[f"output.grad_{name}_clipped"], name, atol=1e-7)


def test_dinov2_class_loss_with_lazy_centre():
    info, t = load("dinov2", "dino_loss_softmax_center")
    config = info["config"]
    center = Center(config["out_dim"]).train()
    center.center.copy_(t["state.center"][0])
    for step in ("step0", "step1"):
        assert_close(center.center[None], t[f"output.{step}.center_used"], "centre", **NEAR)
        target = center(t[f"input.{step}.teacher"], config["teacher_temp"])
        assert_close(target, t[f"output.{step}.teacher_probs"], "targets", **NEAR)
        student = t[f"input.{step}.student"].clone().requires_grad_()
        loss = cross_view(target.unflatten(0, (2, -1)), student, config["student_temp"]).mean(2).sum()
        loss.backward()
        assert_close(loss, t[f"output.{step}.loss"], "loss", **NEAR)
        assert_close(student.grad, t[f"output.{step}.grad.student"], "gradient", **NEAR)
        center.apply_(config["center_momentum"])
    assert_close(center.center[None], t["output.center_after_final_apply"], "final centre", **NEAR)


def test_dinov2_sinkhorn():
    _, t = load("dinov2", "dino_sinkhorn")
    for key in [k for k in t if k.startswith("output.")]:
        iterations, temp = key.removeprefix("output.Q_iters").split("_temp")
        q = sinkhorn(t["input.logits"], float(temp), iterations=int(iterations))
        assert_close(q, t[key], key, **NEAR)
        padded = torch.cat([t["input.logits"], torch.full((2, 10), 1e4)])
        weight = torch.tensor([1.0] * 6 + [0.0] * 2)
        assert_close(sinkhorn(padded, float(temp), weight, int(iterations))[:6], t[key], "padded", **NEAR)


def test_dinov2_patch_loss_with_sinkhorn():
    info, t = load("dinov2", "ibot_patch_sinkhorn_forward_masked")
    config, m = info["config"], info["config"]["n_masked"]
    q = sinkhorn(t["input.teacher_logits"], config["teacher_temp"])
    assert_close(q, t["output.Q"], "Q", **NEAR)
    student = t["input.student_logits"].clone().requires_grad_()
    each = cross_entropy(q, student[:m], config["student_temp"])
    loss = (each * t["input.masks_weight"]).sum() / config["n_images"]
    loss.backward()
    assert_close(loss, t["output.loss"], "loss", **NEAR)
    assert_close(student.grad, t["output.grad.student_logits"], "gradient", **NEAR)


def test_dinov2_koleo():
    _, t = load("dinov2", "koleo")
    x = t["input.x"].clone().requires_grad_()
    loss = koleo(x)
    loss.backward()
    assert_close(loss, t["output.loss"], "loss", **NEAR)
    assert_close(x.grad, t["output.grad.x"], "gradient", **NEAR)
    assert_close(koleo(t["input.duplicates"]), t["output.loss_duplicates"], "duplicates", **NEAR)


def dinov2_vit(config: dict, registers: int):
    vit = {k: config[k] for k in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    backbone = official.vit(
        vit, IBOT.needs, reg_tokens=registers, no_embed_class=True, init_values=config["init_values"]
    )
    if config.get("interpolate_offset") == 0.0:
        backbone.pos_resize = "timm"  # DINOv2's models with registers: antialiased, no offset
    return backbone


def test_dinov2_vit_with_registers_and_masks():
    info, t = load("dinov2", "vit_registers_masks")
    backbone = dinov2_vit(info["config"], info["config"]["num_register_tokens"])
    net = nn.ModuleDict({"backbone": backbone})
    official.load(net, {f"backbone.{k}": v for k, v in part(t, "state.").items()})
    mask = t["input.masks"].bool()
    tokens = backbone(t["input.x"], Replace(mask))
    for mine, key in ((tokens.pooled, "cls"), (tokens.patches, "patch"), (tokens.prefix[:, 1:], "reg")):
        assert_close(mine, t[f"output.masked.{key}"], key, **NEAR)
    plain = backbone(t["input.x"])
    assert_close(plain.pooled, t["output.unmasked.cls"], "unmasked class token", **NEAR)
    assert_close(plain.patches, t["output.unmasked.patch"], "unmasked patches", **NEAR)
    tall = backbone(t["input.x_24x16"])
    assert_close(tall.pooled, t["output.24x16.cls"], "class token of 24x16", **NEAR)
    assert_close(tall.patches, t["output.24x16.patch"], "patches of 24x16", **NEAR)
    # The scalar is not in the golden's notes; these two terms explain its three gradients to 4e-7.
    ((tokens.pooled * t["input.w"]).sum() + tokens.patches.square().mean()).backward()
    assert_close(backbone.mask_token.grad[0], t["output.grad.mask_token"], "mask token", **NEAR)
    assert_close(backbone.timm.reg_token.grad, t["output.grad.register_tokens"], "registers", **NEAR)
    gamma = backbone.timm.blocks[0].ls1.gamma.grad
    assert_close(gamma, t["output.grad.blocks.0.ls1.gamma"], "layer scale", **NEAR)
    dropped = backbone(t["input.x"], Drop(torch.arange(16).expand(2, -1)))
    assert_close(dropped.pooled, plain.pooled, "all cells kept", atol=1e-5)


def dinov2_of(info: dict, t: dict) -> tuple[IBOT, dict]:
    """The objective and the batch of a recorded step."""
    config, cfg = info["config"], info["config"]["cfg"]
    separate, b = config["separate_head"], config["B"]

    def head(of: dict) -> PrototypeHead:
        return PrototypeHead(
            16, of["head_n_prototypes"], hidden=of["head_hidden_dim"], bottleneck=of["head_bottleneck_dim"],
            learn_scale=True,
        )  # fmt: skip

    backbone = dinov2_vit(config["vit"], config["vit"]["num_register_tokens"])
    student = nn.ModuleDict({"backbone": backbone, "head": head(cfg["dino"])})
    if separate:
        student["patch_head"] = head(cfg["ibot"])
    objective = IBOT(
        student, official.NO_VIEWS, Pace(lambda step: 0.9, lambda step: config["teacher_temp"]),
        Masking((4, 4), b, ratio=(0.1, 1.0)), koleo=config["koleo_loss_weight"], patch_center="masked",
        centering="sinkhorn" if "sinkhorn" in config["centering"] else "center",
    ).train()  # fmt: skip
    views = {
        "global": t["input.global_crops"].unflatten(0, (2, b)),
        "local": t["input.local_crops"].unflatten(0, (-1, b)),
    }
    batch = {"images": views, "drop": dict.fromkeys(views), "mask": t["input.masks"].bool().unflatten(0, (2, b))}
    return objective, batch


@pytest.mark.parametrize("case", cases("dinov2", ("meta_step_",)))
def test_dinov2_whole_step(case):
    info, t = load("dinov2", case)
    config = info["config"]
    objective, batch = dinov2_of(info, t)
    official.load(objective.student, part(t, "state.student."))
    official.load(objective.teacher, part(t, "state.teacher."))
    objective.center.center.copy_(t["state.dino_loss.center"][0])
    objective.center2.center.copy_(t["state.ibot_patch_loss.center"].flatten())
    loss, logs = objective.loss(batch, 0)
    loss.backward()
    assert_close(loss, t["output.total_loss"], "total", **NEAR)
    parts = part(t, "output.loss_dict.")
    both = parts["dino_global_crops_loss"] + parts["dino_local_crops_loss"]
    assert_close(logs["pooled"], both, "class loss", **NEAR)
    assert_close(logs["koleo"] * config["koleo_loss_weight"], 2 * parts["koleo_loss"], "koleo", **NEAR)
    assert_close(logs["patch"], 2 * parts["ibot_loss"], "patch loss", **NEAR)
    named = dict(objective.student.named_parameters())
    for name, grad in part(t, "output.grad.").items():
        mine = name.replace("dino_head", "head").replace("ibot_head", "patch_head")
        mine = mine if mine == "backbone.mask_token" else mine.replace("backbone.", "backbone.timm.")
        assert_close(named[mine].grad.reshape(grad.shape), grad, name, atol=1e-6, of_largest=1e-4)
    objective.after_step(0)
    for mine, key in ((objective.center, "dino_center_next"), (objective.center2, "ibot_center_next")):
        if f"output.{key}" in t:
            assert_close(mine.center, t[f"output.{key}"].flatten(), key, **NEAR)


def test_dinov2_schedules_decay_and_mask_counts():
    info, t = load("dinov2", "schedules_groups_masks")
    lr = warmup_cosine(1e-3, 20, 5, 1e-6, inclusive=True)
    mine = torch.tensor([lr(i) for i in range(24)], dtype=torch.float64)
    assert_close(mine, t["output.lr"], "lr", atol=1e-12)
    temp = warmup_cosine(0.07, 8, 8, 0.07, start=0.04, inclusive=True)
    mine = torch.tensor([temp(i) for i in range(12)], dtype=torch.float64)
    assert_close(mine, t["output.teacher_temp"], "temperature", atol=1e-12)
    for group in info["config"]["param_groups_backbone"]:
        name = group["name"]
        shape = torch.zeros(()) if name.endswith(("bias", "gamma")) or "norm" in name else torch.zeros(1, 1, 1)
        decayed = decays(name, shape.reshape(1) if shape.ndim == 0 else shape, (), "official")
        assert decayed is (group["wd_multiplier"] > 0), name
    key = torch.arange(50, dtype=torch.int64) * 7919
    for target in (20, 60, 98):  # the examples need NumPy's and Python's generators; their counts do not
        exact = int(t[f"output.example_mask_v3_target{target}_seed7"].sum())
        assert (block_mask(key, (14, 14), torch.full((50,), exact)).sum(1) == target).all()
        assert exact == target
    counts = stratified_counts(3, torch.arange(8), 8, 196, 0.5, (0.1, 0.5))
    assert sorted(counts.tolist()) == [0, 0, 0, 0, 39, 58, 78, 98]  # 196 * linspace(0.1, 0.5, 5)[1:], rounded down


def two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    _, t = load("dinov2", "dist2_centers_sinkhorn")
    t = part(t, f"input.rank{rank}.")
    out = {"sk.Q": sinkhorn(t["sk"], 0.05), "sk_ibot.Q": sinkhorn(t["sk_ibot"], 0.05)}
    for name, key, official_mean in (
        ("center.out", "center", False), ("ibot_center.out", "ibot_center", True), ("exact", "ibot_center", False)
    ):  # fmt: skip
        center = Center(8, official_mean=official_mean).train()
        center(t[key], 0.05)
        center.apply_(0.9)
        out[name] = center.center
    x = F.normalize(torch.arange(24.0).reshape(6, 4).sin())[rank * 3 :][:3].requires_grad_()
    loss = koleo(x)
    loss.backward()
    out |= {"koleo": loss.detach(), "koleo_grad": x.grad}
    torch.save(out, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_dinov2_two_processes(tmp_path):
    """Centres and Sinkhorn of two processes are the reference's; KoLeo's loss and gradient those of one process."""
    _, t = load("dinov2", "dist2_centers_sinkhorn")
    mp.start_processes(two, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    found = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    for rank, out in enumerate(found):
        for name in ("sk.Q", "sk_ibot.Q"):
            assert_close(out[name], t[f"output.rank{rank}.{name}"], name, **NEAR)
        for name in ("center.out", "ibot_center.out"):
            assert_close(out[name], t[f"output.rank{rank}.{name}"].flatten(), name, **NEAR)
        rows = torch.cat([t["input.rank0.ibot_center"], t["input.rank1.ibot_center"]], 1)[0]
        assert_close(out["exact"], 0.1 * rows.mean(0), "mean of all rows", **NEAR)
    x = F.normalize(torch.arange(24.0).reshape(6, 4).sin()).requires_grad_()
    loss = koleo(x)
    loss.backward()
    assert_close((found[0]["koleo"] + found[1]["koleo"]) / 2, loss, "koleo", atol=1e-6)
    grads = torch.cat([found[0]["koleo_grad"], found[1]["koleo_grad"]]) / 2  # DDP averages
    assert_close(grads, x.grad, "gradient", atol=1e-6)
