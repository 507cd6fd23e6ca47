"""ODIS against a derivative of its code base and the authors' description: attention, loss, centres, proposals."""

import pytest
import torch
from torch import nn

import golden_maskcut
import official
from golden_cases import assert_close, cases, load, part
from golden_odis_rows import check_patch_row
from selfsight.backbones.tokens import Replace
from selfsight.backbones.vit import attend
from selfsight.objectives.ibot import Masking
from selfsight.objectives.odis import ODIS
from test_goldens_ibot import NEAR, Given

KNOWN = ("loss_", "masked_attention_", "patch_row_", "timm_cls_as_obj", "vit_cls_obj")
NEEDS = ODIS.needs._replace(focus=True)


def test_every_case_of_the_folder_is_known():
    assert not [n for n in cases("odis", ("",)) if not n.startswith(KNOWN)]


@pytest.mark.parametrize("case", golden_maskcut.names())
def test_proposals(case):
    golden_maskcut.run(case)


@pytest.mark.parametrize("case", cases("odis", ("patch_row_",)))
def test_rows_of_patches(case):
    check_patch_row(*load("odis", case))


@pytest.mark.parametrize("case", cases("odis", ("masked_attention_",)))
def test_the_object_tokens_attention(case):
    _, t = load("odis", case)
    swapped = torch.tensor([1, 0, *range(2, 11)])  # our object token is the first, the class token comes behind it
    block = official.vit(
        {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3}, NEEDS
    ).timm.blocks[0]
    block.attn.load_state_dict(part(t, "state."))
    x = t["input.x"].clone().requires_grad_()
    row = t["input.attn_mask"].bool()[:, 0, swapped]
    y, weights = attend(block.attn, x[:, swapped], row, want_row=True)
    assert_close(y[:, swapped], t["output.y"], "output", **NEAR)
    assert_close(weights, t["output.attn"][:, :, 1, swapped], "weights", **NEAR)
    plain, _ = attend(block.attn, x[:, swapped])
    assert_close(plain[:, swapped], t["output.y_unmasked"], "without a mask", **NEAR)
    (y[:, swapped] * t["input.w"]).sum().backward()
    assert_close(x.grad, t["output.grad.x"], "gradient", **NEAR)
    assert_close(block.attn.qkv.weight.grad, t["output.grad.qkv.weight"], "gradient of the weights", **NEAR)


@pytest.mark.parametrize("case", cases("odis", ("timm_cls_as_obj",)))
def test_class_token_as_object_token(case):
    info, t = load("odis", case)
    backbone = official.vit(info["config"], NEEDS)
    backbone.timm.load_state_dict(part(t, "state."))
    tokens = backbone(t["input.x"], focus=t["input.object_patches"].bool())
    both = torch.cat([tokens.prefix, tokens.patches], 1)
    assert_close(both, t["output.tokens"], "tokens", **NEAR)
    plain = backbone(t["input.x"])
    assert_close(torch.cat([plain.prefix, plain.patches], 1), t["output.tokens_unmasked"], "unmasked", **NEAR)
    (both * t["input.w"]).sum().backward()
    assert_close(backbone.timm.cls_token.grad, t["output.grad.cls_token"], "class token", **NEAR)
    qkv = backbone.timm.blocks[0].attn.qkv.weight.grad
    assert_close(qkv, t["output.grad.blocks.0.attn.qkv.weight"], "qkv", **NEAR)


@pytest.mark.parametrize("case", cases("odis", ("vit_cls_obj",)))
def test_class_and_object_token(case):
    info, t = load("odis", case)
    backbone = official.vit(info["config"], NEEDS, reg_tokens=1, no_embed_class=True)
    backbone.registers_in_focus = True  # in this layout the object token sees the class token
    official.load(nn.ModuleDict({"backbone": backbone}), part(t, "state."))
    focus = t["input.obj_attn_mask"].bool()[:, 0, 2:]
    mask = t["input.mim_mask"].bool().flatten(1)

    def ordered(tokens):
        return torch.cat([tokens.prefix.flip(1), tokens.patches], 1)

    images = t["input.x"]
    assert_close(ordered(backbone(images)), t["output.tokens_clean_nomask"], "no mask", **NEAR)
    assert_close(ordered(backbone(images, focus=focus)), t["output.tokens_clean_objmask"], "object mask", **NEAR)
    assert_close(ordered(backbone(t["input.local"])), t["output.tokens_local_nomask"], "local view", **NEAR)
    hidden = ordered(backbone(images, Replace(mask), focus=focus))
    assert_close(hidden, t["output.tokens_masked_image"], "hidden patches and an object", **NEAR)
    (hidden * t["input.w"]).sum().backward()
    timm = backbone.timm
    rows = torch.cat([timm.reg_token.grad, timm.cls_token.grad, timm.pos_embed.grad], 1)
    assert_close(timm.cls_token.grad, t["output.grad.obj_token"], "object token", **NEAR)
    assert_close(rows, t["output.grad.pos_embed"], "positions", **NEAR)
    assert_close(backbone.mask_token.grad[0], t["output.grad.masked_embed"], "mask token", **NEAR)


@pytest.mark.parametrize("case", cases("odis", ("loss_",)))
def test_loss_centres_and_gradients(case):
    info, t = load("odis", case)
    config, b, k = info["config"], info["config"]["B"], info["config"]["K"]
    if config["lambda_cls"]:
        pytest.skip("the loss on a class token beside the object token is not offered")
    leaves = {
        "student_obj": t["input.student_obj"][:, 0], "student_patch": t["input.student_patch"],
        "local_obj": t["input.local_obj"][:, 0],
    }  # fmt: skip
    leaves = {n: v.clone().requires_grad_() for n, v in leaves.items()}
    student = nn.ModuleDict({"backbone": Given(*leaves.values(), k), "head": Given(None, None, None, k)})
    side = round(config["P"] ** 0.5)
    pace = official.pace(
        {"warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 3, "epochs": 10}
    )
    masking = Masking((side, side), b, ratio=(0.1, 1.0))
    objective = ODIS(student, official.NO_VIEWS, pace, masking, exact_mean=False).train()
    teacher = objective.teacher["backbone"]
    teacher.pooled, teacher.patches = t["input.teacher_obj"][:, 0], t["input.teacher_patch"]
    objective.center.center.copy_(t["state.center_obj"].flatten())
    objective.center2.center.copy_(t["state.center_patch"].flatten())
    views = {"global": torch.zeros(2, b, 3, 8, 8), "local": torch.zeros(config["L"], b, 3, 4, 4)}
    seen = (t["input.obj_labels"][..., 0] > 0).float()
    batch = {
        "images": views,
        "drop": dict.fromkeys(views),
        "mask": t["input.mim_masks"].bool().flatten(2),
        "seen": seen,
    }
    loss, logs = objective.loss(batch, config["epoch"])
    loss.backward()
    assert_close(loss, t["output.loss"], "loss", **NEAR)
    assert_close(logs["pooled"], t["output.loss_obj"], "object loss", **NEAR)
    assert_close(logs["patch"], t["output.loss_patch"], "patch loss", **NEAR)
    for name, leaf in leaves.items():
        expected = t[f"output.grad.{name}"]
        assert_close(leaf.grad.reshape(expected.shape), expected, name, **NEAR)
    objective.after_step(0)
    assert_close(objective.center.center, t["output.center_obj"].flatten(), "object centre", **NEAR)
    assert_close(objective.center2.center, t["output.center_patch"].flatten(), "patch centre", **NEAR)
