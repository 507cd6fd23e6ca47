"""DINO against its reference: forward, loss, centre, gradients, clipping, a training trace, positions, schedules."""

import pytest
import torch
from torch import nn

import official
from golden_cases import assert_close, cases, load, part
from selfsight.backbones.tokens import Needs
from selfsight.objectives.dino import DINO
from selfsight.probes.knn import knn
from selfsight.training.optim import clip_per_tensor, param_groups
from selfsight.training.schedules import stairs, warmup_cosine

KNOWN = ("fwd_", "train_", "pos_interp_", "schedules_knn", "keys_")


def build(config: dict, per_epoch: int = 1) -> DINO:
    backbone = official.vit(config, DINO.needs)
    student = nn.ModuleDict({"backbone": backbone, "head": official.head(config, config["embed_dim"])})
    return DINO(student, official.NO_VIEWS, official.pace(config, per_epoch)).train()


def test_every_case_of_the_folder_is_known():
    assert not [n for n in cases("dino", ("",)) if not n.startswith(KNOWN)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", cases("dino", ("fwd_",)))
def test_loss_logits_centre_and_gradients(case, dtype):
    info, t = load("dino", case)
    config, exact = info["config"], dtype == torch.float64
    objective = build(config).to(dtype)
    official.load(objective.student, part(t, "state_student.", dtype))
    official.load(objective.teacher, part(t, "state_teacher.", dtype))
    objective.center.center.copy_(t["input.center"][0])
    batch = official.views_of([t[f"input.crop{i}"].to(dtype) for i in range(2 + config["n_local"])])
    epoch = int(t["input.epoch"])

    def near(mine, key):
        noise = info["fp32_run_error"].get(key, {"max_abs": 1e-6})["max_abs"]
        assert_close(mine, t[key], f"{case} {key}", atol=1e-9 if exact else max(10 * noise, 1e-7))

    logits = {}
    for name, net in (("student", objective.student), ("teacher", objective.teacher)):
        tokens = [objective.encode(net, v).pooled for k, v in batch["images"].items()]
        logits[name] = net["head"](torch.cat(tokens if name == "student" else tokens[:1]))
        near(logits[name], f"output.{name}_logits")
    near(objective.encode(objective.teacher, batch["images"]["global"][:1]).pooled, "output.teacher_cls_global0")
    if config["n_local"]:
        near(objective.encode(objective.student, batch["images"]["local"][:1]).pooled, "output.student_cls_local0")
    assert objective.pace.temp(epoch) == pytest.approx(t["output.teacher_temp"].item(), abs=1e-12)
    loss, _ = objective.loss(batch, epoch)
    near(loss, "output.loss")
    assert_close(objective.loss(batch, epoch)[0], loss, "the same batch again", atol=0)
    loss.backward()
    grads = {official.official_name(n): p.grad for n, p in objective.student.named_parameters() if p.grad is not None}
    relative = 0 if exact else 1e-5
    for key in [k for k in t if k.startswith("output.grad.")]:
        assert_close(grads[key.removeprefix("output.grad.")], t[key], key, atol=1e-9, of_largest=relative)
    norms = torch.stack([grads[name].norm() for name in info["clip_order"]])
    near(norms, "output.clip_norms_before")
    clip_per_tensor(objective.student.parameters(), config["clip_grad"])
    for key in [k for k in t if k.startswith("output.grad_clipped.")]:
        assert_close(grads[key.removeprefix("output.grad_clipped.")], t[key], key, atol=1e-9, of_largest=relative)
    objective.center.apply_(0.9)  # two losses of the same batch were pending: the mean is the same
    near(objective.center.center[None], "output.center_new")


@pytest.mark.parametrize("case", cases("dino", ("train_",)))
def test_training_trace(case):
    """The official loop: schedules, per-tensor clipping, a frozen last layer, centre and teacher; final states."""
    info, t = load("dino", case)
    config = info["config"]
    per_epoch = config["iters_per_epoch"]
    objective = build(config, per_epoch).double()
    groups = param_groups(objective, config["weight_decay"], rule="official")
    for group, expected in zip(groups, info["param_groups"], strict=True):
        assert sorted(map(official.official_name, group["names"])) == sorted(expected["names"])
    losses = []
    for step, loss, _ in official.trace(objective, config, t):
        losses.append(loss)
        if (step + 1) % per_epoch == 0:
            epoch = step // per_epoch
            assert_close(objective.center.center[None], t[f"output.center_after_epoch{epoch}"], "centre", atol=1e-9)
            if epoch == 0:
                for name, value in part(t, "output.student_after_epoch0.").items():
                    mine = dict(objective.student.named_parameters())[name]
                    assert_close(mine, value, name, atol=1e-9)
    temps = [objective.pace.temp(e * per_epoch) for e in range(config["epochs"])]
    assert_close(torch.tensor(temps, dtype=torch.float64), t["output.schedule_teacher_temp"], "temp", atol=1e-12)
    assert_close(torch.stack(losses), t["output.losses"], "losses", atol=1e-9)
    for which, net in (("student", objective.student), ("teacher", objective.teacher)):
        state = {official.official_name(n): v for n, v in net.named_parameters()}
        final = part(t, f"output.{which}_final.")
        assert state.keys() == final.keys()
        for name, value in final.items():
            mine, theirs = (official.without_key_bias(name, x.detach()) for x in (state[name], value))
            assert_close(mine, theirs, f"{which} {name}", atol=1e-6)


@pytest.mark.parametrize("case", cases("dino", ("pos_interp_",)))
def test_positions_at_other_sizes_layers_and_attention(case):
    info, t = load("dino", case)
    backbone = official.vit(info["config"], Needs()).double().eval()
    backbone.timm.load_state_dict(part(t, "state.", torch.float64))
    for size in sorted({k.rsplit(".", 1)[1] for k in t if k.startswith("output.pos.")}):
        height, width = map(int, size.split("x"))
        grid = height // 8, width // 8
        images = t[f"input.images.{size}"].double()
        with torch.no_grad():
            assert_close(backbone.positions(grid), t[f"output.pos.{size}"], f"positions {size}", atol=1e-9)
            tokens = backbone(images, layers=(-2, -1), attention=True)
            both = [backbone.timm.norm(m.flatten(2).transpose(1, 2)) for m in tokens.maps]
        assert_close(tokens.pooled, t[f"output.cls.{size}"], f"class token {size}", atol=1e-9)
        for mine, key in zip(both, ("inter_m2", "inter_m1")):
            assert_close(mine, t[f"output.{key}.{size}"][:, 1:], f"{key} {size}", atol=1e-6)  # stored as float32
        assert_close(tokens.attention, t[f"output.attn.{size}"][:, :, 0, 1:], f"attention {size}", atol=1e-6)


def test_schedules_and_knn():
    _, t = load("dino", "schedules_knn")
    lr = warmup_cosine(0.002, 100, 20, 1e-6, inclusive=True)
    curves = {
        "lr_vits_300": lr, "wd": warmup_cosine(0.04, 100, 0, 0.4), "momentum": warmup_cosine(0.996, 100, 0, 1.0),
        "teacher_temp": stairs(0.04, 0.07, 6, 1), "teacher_temp_nowarmup": stairs(0.04, 0.04, 0, 1),
    }  # fmt: skip
    for name, curve in curves.items():
        expected = t[f"output.{name}"]
        mine = torch.tensor([curve(i) for i in range(len(expected))], dtype=torch.float64)
        assert_close(mine, expected, name, atol=1e-12)
    features = t["input.knn_train_features"], t["input.knn_train_labels"]
    queries = t["input.knn_test_features"], t["input.knn_test_labels"]
    for top1, top5, k in t["output.knn"].tolist():
        result = knn(*features, *queries, (int(k),), (0.07,), center=False)[int(k), 0.07]
        assert result.top1 == pytest.approx(top1, abs=1e-4)
        if k >= 5:  # the reference looks at min(5, k) classes
            assert result.top5 == pytest.approx(top5, abs=1e-4)


@pytest.mark.parametrize("case", cases("dino", ("keys_",)))
def test_names_and_shapes_of_the_published_model(case):
    info, _ = load("dino", case)
    with torch.device("meta"):
        backbone = official.vit(
            {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}, DINO.needs
        )
        head = official.PrototypeHead(384, 65536)
    mine = {official.official_name(f"backbone.{n}"): list(p.shape) for n, p in backbone.named_parameters()}
    mine |= {f"head.{n}": list(p.shape) for n, p in head.named_parameters()}
    assert mine == {name: shape for name, (shape, _) in info["keys"].items()}
