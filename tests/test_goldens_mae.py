"""MAE against its reference implementation: forward, gradients, an 8-step training trace, tables, key names."""

import pytest
import torch

from golden_cases import assert_close, cases, load, part
from selfsight.backbones.tokens import Drop, Needs, patchify, pick
from selfsight.backbones.vit import ViT
from selfsight.interop.layouts import recognise, split
from selfsight.nn.decoders import PixelTransformer
from selfsight.nn.losses import standardise
from selfsight.nn.positions import sincos_2d
from selfsight.objectives.mae import MAE
from selfsight.training.optim import build_adamw, param_groups
from selfsight.training.schedules import warmup_cosine
from selfsight.views.masks import split_by_noise

KNOWN = ("fwd_", "train_", "tables", "keys_", "spark_")  # spark_: test_goldens_conv.py


def official(config: dict, state: dict) -> MAE:
    """Our MAE with the official state loaded through the checkpoint layout."""
    backbone = ViT(
        "vit_base_patch16_224", needs=MAE.needs, image_sizes=(config["img_size"],), patch_size=config["patch_size"],
        embed_dim=config["embed_dim"], depth=config["depth"], num_heads=config["num_heads"],
    )  # fmt: skip
    decoder = PixelTransformer(
        config["embed_dim"], backbone.cells(config["img_size"]), config["patch_size"], prefix=1,
        width=config["decoder_embed_dim"], depth=config["decoder_depth"], heads=config["decoder_num_heads"],
    )  # fmt: skip
    objective = MAE(
        backbone, decoder, image_size=config["img_size"], mask_ratio=config["mask_ratio"],
        norm_pixels=config["norm_pix_loss"],
    )  # fmt: skip
    assert recognise(state) == ["mae"]
    parts = split(state, "mae")
    assert not parts["left"]
    backbone.timm.load_state_dict(parts["backbone"])
    decoder.load_state_dict(parts["decoder"])
    return objective.to(next(iter(state.values())).dtype)


def batch_of(images: torch.Tensor, noise: torch.Tensor, objective: MAE) -> dict:
    keep, hidden = split_by_noise(noise, objective.keep)
    return {"images": {"image": images[None]}, "keep": keep, "hidden": hidden}


def official_name(name: str) -> str:
    """Our parameter name to the reference's."""
    name = name.removeprefix("student.timm.")
    if name.startswith("decoder."):
        name = name.removeprefix("decoder.")
        return name if name == "mask_token" else f"decoder_{name}"
    return name


def test_every_case_of_the_folder_is_known():
    unknown = [n for n in cases("mae", ("",)) if not n.startswith(KNOWN)]
    assert not unknown


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", cases("mae", ("fwd_",)))
def test_forward_loss_and_gradients(case, dtype):
    info, t = load("mae", case)
    objective = official(info["config"], part(t, "state.", dtype))
    batch = batch_of(t["input.images"].to(dtype), t["input.noise"], objective)
    images = batch["images"]["image"][0]
    exact = dtype == torch.float64

    def near(mine, key):
        noise = info["fp32_run_error"].get(key, {"max_abs": 1e-6})["max_abs"]
        # Some of the reference's tensors are stored as float32.
        atol = (1e-6 if t[key].dtype == torch.float32 else 1e-9) if exact else max(10 * noise, 1e-7)
        assert_close(mine, t[key], f"{case} {key}", atol=atol)

    tokens = objective.student(images, Drop(batch["keep"]))
    near(torch.cat([tokens.prefix, tokens.patches], dim=1), "output.latent")
    mask = torch.ones_like(t["output.mask"], dtype=torch.bool).scatter(1, batch["keep"], False)
    assert torch.equal(mask, t["output.mask"].bool())
    restore = torch.cat([batch["keep"], batch["hidden"]], 1).argsort(1)
    assert torch.equal(restore, t["output.ids_restore"].long())
    pred = objective.predict(images, batch["keep"], batch["hidden"])
    assert_close(
        pred, pick(t["output.pred"], batch["hidden"]), "pred",
        atol=1e-9 if exact else 10 * info["fp32_run_error"]["output.pred"]["max_abs"],
    )  # fmt: skip
    target = patchify(images, objective.student.cell)
    near(standardise(target) if objective.norm_pixels else target, "output.target")
    loss, _ = objective.loss(batch, 0)
    near(loss, "output.loss")
    loss.backward()
    checked = 0
    for name, parameter in objective.named_parameters():
        key = f"output.grad.{official_name(name)}"
        if key in t:
            assert_close(parameter.grad, t[key], key, atol=1e-9 if exact else 0, of_largest=0 if exact else 1e-5)
            checked += 1
    assert checked == sum(k.startswith("output.grad.") for k in t)


@pytest.mark.parametrize("case", cases("mae", ("train_",)))
def test_training_trace(case):
    """Eight optimizer steps with accumulation and warm-up, official decay groups; final weights agree."""
    info, t = load("mae", case)
    config = info["config"]
    objective = official(config, part(t, "state.", torch.float64)).double()
    accum, per_epoch = config["accum_iter"], config["iters_per_epoch"]
    groups = param_groups(objective, config["weight_decay"], rule="official")
    for group in groups:
        expected = next(g for g in info["param_groups"] if (g["weight_decay"] > 0) is group["decayed"])
        assert sorted(map(official_name, group["names"])) == sorted(expected["names"])
    optimizer = build_adamw(groups, config["absolute_lr"], config["betas"], 1e-8)
    steps = config["epochs"] * per_epoch // accum
    schedule = warmup_cosine(config["absolute_lr"], steps, config["warmup_epochs"] * per_epoch // accum)
    losses, lrs = [], []
    for i in range(config["epochs"] * per_epoch):
        batch = batch_of(t["input.images"][i % per_epoch].double(), t["input.noise"][i], objective)
        loss, _ = objective.loss(batch, i // accum)
        losses.append(loss.detach())
        (loss / accum).backward()
        if (i + 1) % accum == 0:
            lrs.append(schedule(i // accum))
            for group in optimizer.param_groups:
                group["lr"] = lrs[-1]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert_close(torch.tensor(lrs), t["output.lrs"], "learning rates", atol=1e-8)
    assert_close(torch.stack(losses), t["output.losses"], "losses", atol=1e-9)
    for name, parameter in objective.named_parameters():
        key = f"output.state_final.{official_name(name)}"
        mine, theirs = parameter.detach(), t[key]
        if name.endswith("attn.qkv.bias"):  # the key bias has a true gradient of zero, which AdamW turns into steps
            width = len(theirs) // 3
            keep = torch.cat([torch.arange(width), torch.arange(2 * width, 3 * width)])
            mine, theirs = mine[keep], theirs[keep]
        assert_close(mine, theirs, key, atol=1e-6)


def test_position_tables_schedule_and_kept_counts():
    info, t = load("mae", "tables")
    for key in [k for k in t if k.startswith("output.pos_")]:
        dim, side = map(int, key.removeprefix("output.pos_").split("_"))
        table = sincos_2d(dim, side, side, prefix=1)[: len(t[key])]
        assert_close(table, t[key], key, atol=1e-7)
    config = info["config"]
    schedule = warmup_cosine(config["lr"], config["epochs"], config["warmup_epochs"], config["min_lr"])
    lrs = torch.tensor([schedule(e) for e in t["input.sched_epochs"].tolist()], dtype=torch.float64)
    assert_close(lrs, t["output.sched_lr"], "lr", atol=1e-15)
    for cells, kept, ratio in t["output.len_keep"].tolist():
        assert PixelTransformer.keep(cells, ratio / 1000) == kept


@pytest.mark.parametrize("case", cases("mae", ("keys_",)))
def test_full_size_key_names_and_shapes(case):
    info, _ = load("mae", case)
    config = {
        "img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "decoder_embed_dim": 512,
        "decoder_depth": 8, "decoder_num_heads": 16, "mask_ratio": 0.75, "norm_pix_loss": True,
    }  # fmt: skip
    with torch.device("meta"):
        state = {k: torch.empty(shape) for k, (shape, _) in info["keys"].items()}
    parts = split(state, "mae")
    assert not parts["left"]
    backbone = ViT("vit_base_patch16_224", needs=Needs(), image_sizes=(config["img_size"],))
    mine = {k: tuple(v.shape) for k, v in backbone.timm.state_dict().items()}
    assert mine == {k: tuple(v.shape) for k, v in parts["backbone"].items()}
    decoder = PixelTransformer(768, (14, 14), 16, width=512, depth=8, heads=16, prefix=1)
    assert {k: tuple(v.shape) for k, v in decoder.state_dict().items()} == {
        k: tuple(v.shape) for k, v in parts["decoder"].items()
    }
