"""SelfPatch against its reference: neighbours, head, losses, both centres, gradients, a training trace, names."""

import pytest
import torch
from torch import nn

import official
from golden_cases import assert_close, cases, load, part
from selfsight.nn.class_attention import ClassAttention
from selfsight.nn.heads import PrototypeHead
from selfsight.nn.neighbours import top_neighbours
from selfsight.objectives.selfpatch import SelfPatch

KNOWN = ("fwd_", "head_neighbours_topk", "keys_", "train_")


def pooling(backbone) -> ClassAttention:
    return ClassAttention.on(backbone, norm=backbone.final_norm())


def build(config: dict, per_epoch: int = 1) -> SelfPatch:
    backbone, dim = official.vit(config, SelfPatch.needs), config["embed_dim"]
    student = {
        "backbone": backbone, "ca_head": pooling(backbone), "c_head": official.head(config, dim),
        "p_head": official.head({**config, "out_dim": config["out_dim_selfpatch"]}, dim),
    }  # fmt: skip
    pace = official.pace(config, per_epoch)
    views = nn.ModuleDict(student), official.NO_VIEWS
    return SelfPatch(*views, pace, neighbours=config["k_num"], border="wrap").train()


def official_name(name: str) -> str:
    return official.official_name(name).replace("backbone.norm.", "ca_head.norm.")


def test_every_case_of_the_folder_is_known():
    assert not [n for n in cases("selfpatch", ("",)) if not n.startswith(KNOWN)]


@pytest.mark.parametrize("case", cases("selfpatch", ("head_neighbours_topk",)))
def test_neighbours_and_head(case):
    info, t = load("selfpatch", case)
    config = info["config"]
    head = ClassAttention(config["embed_dim"], config["num_heads"])
    head.load_state_dict(part(t, "state."))
    for crop, grid in (("g", (14, 14)), ("l", (6, 6))):
        tokens = t[f"input.tokens_{crop}"]
        ids, valid = top_neighbours(tokens, grid, config["k_num"], border="wrap")
        assert valid.all()
        table = t[f"output.neighbour_index_{grid[0]}x{grid[1]}"]
        expected = table[torch.arange(len(table))[:, None], t[f"output.{crop}.topk"]]
        assert torch.equal(ids, expected)
        projected = head.project(tokens)
        pooled, patches = head.pool(projected), head.aggregate(projected, ids, None)
        loc = head.normed(torch.cat([pooled[:, None], patches], 1))
        noloc = head.normed(torch.cat([pooled[:, None], tokens], 1))
        assert_close(loc, t[f"output.{crop}.head_loc"], "teacher's head", atol=1e-5)
        assert_close(noloc, t[f"output.{crop}.head_noloc"], "student's head", atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", cases("selfpatch", ("fwd_",)))
def test_losses_logits_centres_and_gradients(case, dtype):
    info, t = load("selfpatch", case)
    config, exact, epoch = info["config"], dtype == torch.float64, int(t["input.epoch"])
    objective = build(config).to(dtype)
    official.load(objective.student, part(t, "state_student.", dtype))
    official.load(objective.teacher, part(t, "state_teacher.", dtype))
    objective.center.center.copy_(t["input.center"].flatten())
    objective.patch_center.center.copy_(t["input.patch_center"][0])
    batch = official.views_of([t[f"input.crop{i}"].to(dtype) for i in range(2 + config["n_local"])])

    def near(mine, key):
        noise = info["fp32_run_error"].get(key, {"max_abs": 1e-6})["max_abs"]
        stored = 1e-6 if t[key].dtype == torch.float32 else 1e-9
        assert_close(mine, t[key], f"{case} {key}", atol=stored if exact else max(10 * noise, 1e-6))

    for kind, views in batch["images"].items():
        for name, (pooled, patches) in (
            ("student", objective.student_view(views, None)), ("teacher", objective.teacher_view(views))
        ):  # fmt: skip
            net = objective.student if name == "student" else objective.teacher
            near(net["c_head"](pooled)[:, None], f"output.{name}_cls_{kind}")
            near(net["p_head"](patches), f"output.{name}_patch_{kind}")
    loss, logs = objective.loss(batch, epoch)
    for mine, key in ((loss, "loss"), (logs["pooled"], "loss_cls"), (logs["patch"], "loss_patch")):
        near(mine, f"output.{key}")
    loss.backward()
    grads = {official_name(n): p.grad for n, p in objective.student.named_parameters()}
    for name, grad in part(t, "output.grad.").items():
        assert_close(grads[name], grad, name, atol=1e-9, of_largest=0 if exact else 1e-4)
    objective.after_step(epoch)
    near(objective.center.center[None, None], "output.center_new")
    near(objective.patch_center.center[None], "output.patch_center_new")


@pytest.mark.parametrize("case", cases("selfpatch", ("train_",)))
def test_training_trace(case):
    info, t = load("selfpatch", case)
    config = info["config"]
    objective = build(config, config["iters_per_epoch"]).double()
    trace = official.trace(objective, config, t)
    rows = torch.stack([torch.stack([loss, logs["pooled"], logs["patch"]]) for _, loss, logs in trace])
    assert_close(rows[:, 0], t["output.losses"][:, 0], "losses", atol=1e-9)
    assert_close(rows, t["output.losses"], "parts, which the reference logs in float32", atol=5e-7)
    assert_close(objective.center.center[None, None], t["output.center"], "centre", atol=1e-9)
    assert_close(objective.patch_center.center[None], t["output.patch_center"], "patch centre", atol=1e-9)
    for which, net in (("student", objective.student), ("teacher", objective.teacher)):
        mine = {official_name(n): p.detach() for n, p in net.named_parameters()}
        final = part(t, f"output.{which}_final.")
        assert mine.keys() == final.keys()
        for name, value in final.items():
            if not name.endswith("attn.k.bias"):  # as in `without_key_bias`
                pair = (official.without_key_bias(name, x) for x in (mine[name], value))
                assert_close(*pair, f"{which} {name}", atol=1e-6)


@pytest.mark.parametrize("case", cases("selfpatch", ("keys_",)))
def test_names_and_shapes_of_the_published_model(case):
    info, _ = load("selfpatch", case)
    with torch.device("meta"):
        config = {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
        backbone = official.vit(config, SelfPatch.needs)
        net = {
            "backbone": backbone, "ca_head": pooling(backbone), "c_head": PrototypeHead(384, 65536),
            "p_head": PrototypeHead(384, 4096),
        }  # fmt: skip
    mine = {official_name(n): list(p.shape) for n, p in nn.ModuleDict(net).named_parameters()}
    assert mine == {name: shape for name, (shape, _) in info["keys"].items()}


def test_clipped_neighbours_against_a_loop():
    tokens, (rows, columns) = torch.randn(2, 12, 5, dtype=torch.float64), (3, 4)
    ids, valid = top_neighbours(tokens, (rows, columns), 4)
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    for b in range(2):
        for i in range(12):
            r, c = divmod(i, columns)
            around = [
                y * columns + x
                for y in range(max(0, r - 1), min(rows, r + 2))
                for x in range(max(0, c - 1), min(columns, c + 2))
                if (y, x) != (r, c)
            ]
            best = sorted(around, key=lambda j: -float(unit[b, i] @ unit[b, j]))[:4]
            assert ids[b, i][valid[b, i]].tolist() == best
            assert valid[b, i].sum() == min(4, len(around))
