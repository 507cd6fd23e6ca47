"""DINOv3's pieces that are offered here: the plain head, means over pairs, KoLeo over processes, ConvNeXt's tokens.

Not offered, and not checked: Gram anchoring, RoPE ViTs with storage tokens (timm has them as Eva), KoLeo with more than
one neighbour, its learning-rate schedule.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from golden_cases import assert_close, cases, load, part
from selfsight.backbones.convnext import ConvNeXt
from selfsight.backbones.tokens import Needs
from selfsight.interop.layouts import fit, split
from selfsight.nn.heads import PrototypeHead
from selfsight.nn.losses import cross_view, koleo
from test_goldens_ibot import NEAR

CHECKED = ("convnext_pool_cls", "dino_loss_ignore_diagonal", "dist2_koleo", "head", "koleo_topk_single")
NOT_OFFERED = ("gram_loss", "schedules", "vit_rope_storage_masks")


def test_every_case_of_the_folder_is_known():
    assert not [n for n in cases("dinov3", ("",)) if not n.startswith(CHECKED + NOT_OFFERED)]


@pytest.mark.parametrize("case", cases("dinov3", ("convnext_pool_cls",)))
def test_convnext_pooled_and_patches(case):
    info, t = load("dinov3", case)
    backbone = ConvNeXt(
        "convnext_atto", needs=Needs(), image_sizes=(64,), depths=info["config"]["depths"], dims=info["config"]["dims"],
        conv_mlp=False, ls_init_value=1e-6,
    )  # fmt: skip
    state = {k: v for k, v in part(t, "state.").items() if not k.startswith("norms.")}
    backbone.timm.load_state_dict(fit(split(state, "convnext")["backbone"], backbone.timm))
    tokens = backbone(t["input.x"])
    assert_close(tokens.pooled, t["output.cls"], "pooled", **NEAR)
    assert_close(tokens.patches, t["output.patch"], "patches", **NEAR)


@pytest.mark.parametrize("case", cases("dinov3", ("dino_loss_ignore_diagonal",)))
def test_means_over_pairs(case):
    _, t = load("dinov3", case)
    students = {k: t[f"input.student_{k}"].clone().requires_grad_() for k in ("global", "local")}
    pairs = {k: cross_view(t["input.teacher_probs"], s, 0.1).mean(2) for k, s in students.items()}
    off = ~torch.eye(2, dtype=torch.bool)
    assert_close(pairs["global"][off].mean(), t["output.loss_global_ignore_diagonal"], "other views", **NEAR)
    assert_close(pairs["global"].mean(), t["output.loss_global_with_diagonal"], "all views", **NEAR)
    assert_close(pairs["local"].mean(), t["output.loss_local"], "local views", **NEAR)


@pytest.mark.parametrize("case", cases("dinov3", ("head",)))
def test_plain_head(case):
    info, t = load("dinov3", case)
    config = info["config"]
    head = PrototypeHead(
        config["in_dim"], config["out_dim"], hidden=config["hidden_dim"], bottleneck=config["bottleneck_dim"],
        weight_norm=False,
    )  # fmt: skip
    head.load_state_dict(part(t, "state."))
    x = t["input.x"].clone().requires_grad_()
    assert_close(head.embed(x), t["output.bottleneck"], "bottleneck", **NEAR)
    logits = head(x)
    assert_close(logits, t["output.logits"], "logits", **NEAR)
    (logits * t["input.w"]).sum().backward()
    assert_close(x.grad, t["output.grad.x"], "gradient", **NEAR)
    assert_close(head.last_layer.weight.grad, t["output.grad.last_layer.weight"], "prototypes", **NEAR)


@pytest.mark.parametrize("case", cases("dinov3", ("koleo_topk_single",)))
def test_koleo_of_one_process(case):
    _, t = load("dinov3", case)
    x = t["input.x"].clone().requires_grad_()
    loss = koleo(x)
    loss.backward()
    assert_close(loss, t["output.topk1.loss"], "loss", **NEAR)
    assert_close(x.grad, t["output.topk1.grad.x"], "gradient", **NEAR)


def two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    _, t = load("dinov3", "dist2_koleo")
    out = {}
    for name, scope in (("top1", "global"), ("group4", "rank")):
        x = t[f"input.rank{rank}.x"].clone().requires_grad_()
        loss = koleo(x, scope)
        loss.backward()
        out |= {f"{name}.loss": loss.detach(), f"{name}.grad": x.grad}
    torch.save(out, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not cases("dinov3", ("dist2_koleo",)), reason="the case is not in the folder")
def test_koleo_of_two_processes(tmp_path):
    _, t = load("dinov3", "dist2_koleo")
    mp.start_processes(two, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            assert_close(value, t[f"output.rank{rank}.{name}"], f"rank {rank} {name}", **NEAR)
