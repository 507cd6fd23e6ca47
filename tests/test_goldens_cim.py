"""CIM against its reference: encoders, maps, both losses, gradients, batch norms, EMA, exemplars, export."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

import official
from golden_cases import FOLDER, assert_close, cases, load, part
from selfsight.data.rng import key_of
from selfsight.interop.layouts import recognise, split
from selfsight.nn.correlation import CorrelationDecoder, enlarge, map_loss
from selfsight.nn.heads import batch_norm_mlp
from selfsight.objectives.cim import CIM, resize
from selfsight.training.schedules import cosine
from selfsight.training.teacher import Ema
from selfsight.views.exemplars import Turned, cut, exemplar_boxes, footprint
from selfsight.views.spec import Crop

KNOWN = ("corr_", "ema", "exemplar_geometry", "exemplar_stats", "export_timm")


def build(config: dict, t: dict) -> CIM:
    """Our CIM with the official state of both networks, loaded through the checkpoint layout."""
    state = part(t, "state.") | part(t, "state_target.")
    assert recognise(state)[0] == "cim"
    parts = split(state, "cim")
    assert not parts["left"] and not parts["mask_token"]
    contrast = config["sigma_cont"] > 0
    backbone = official.vit(config, CIM.needs._replace(pooled=contrast))
    student, predictor = nn.ModuleDict({"backbone": backbone}), None
    if contrast:
        hidden, out = parts["heads"]["projector.3.weight"].shape[0], parts["heads"]["projector.6.weight"].shape[0]
        student["projector"] = batch_norm_mlp([config["embed_dim"], hidden, hidden, out])
        predictor = batch_norm_mlp([out, hidden, out])
    size, grid = config["context_size"], config["context_size"] // config["patch_size"]
    decoder = CorrelationDecoder(
        config["embed_dim"], (grid, grid), width=config["decoder_embed_dim"], heads=config["decoder_num_heads"]
    )
    exemplar = Crop("exemplar", config["exemplars"], config["template_size"], (0.05, 0.48))
    objective = CIM(
        student, decoder, cosine(0.99, 1.0, 10), search=Crop("search", 1, config["img_size"], (0.5, 1.0)),
        exemplar=exemplar, context_size=size, predictor=predictor, sigma_corr=config["sigma_corr"],
        sigma_cont=config["sigma_cont"], temperature=config["T"],
    )  # fmt: skip
    table = decoder.pos_embed.clone()
    decoder.load_state_dict(parts["decoder"])
    assert_close(table, decoder.pos_embed, "the decoder's positions", atol=1e-6)
    objective.teacher["backbone"].timm.load_state_dict(parts["teacher"])
    backbone.freeze_patches()  # not before: recorded with another random projection in either network
    backbone.timm.load_state_dict(parts["backbone"])
    heads = nn.ModuleDict({"predictor": predictor, "projector": student["projector"]} if contrast else {})
    if contrast:
        heads["teacher_projector"] = objective.teacher["projector"]
    heads.load_state_dict(parts["heads"])
    return objective.train()


def official_name(name: str) -> str:
    """Our parameter name to the reference's."""
    pairs = (
        ("student.backbone.timm.", ""), ("student.projector.", "decoder_g_embed."),
        ("predictor.", "decoder_predictor."), ("decoder.block.", "decoder_corr_block.block."),
        ("decoder.pred.", "decoder_pred_mask.0."), ("decoder.", "decoder_"),
    )  # fmt: skip
    return next((new + name.removeprefix(old) for old, new in pairs if name.startswith(old)), name)


def test_every_case_of_the_folder_is_known():
    assert not [n for n in cases("cim", ("",)) if not n.startswith(KNOWN)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", cases("cim", ("corr_",)))
def test_features_maps_losses_gradients_and_batch_norms(case, dtype):
    info, t = load("cim", case)
    config = info["config"]
    objective = build(config, t).to(dtype)
    context, exemplars = t["input.context"].to(dtype), t["input.exemplars"].to(dtype)
    batch = {"context": context, "exemplars": exemplars, "label": t["input.masks"].bool()}

    def near(mine, key, of_largest=0.0):
        assert_close(mine, t[f"output.{key}"], f"{case} {key}", atol=1e-5, of_largest=of_largest)

    logits, whole, parts = objective.correlate(context, exemplars)
    shape = exemplars.shape[:2]
    near(logits.unflatten(0, shape), "logits_lowres")
    near(enlarge(logits.flatten(0, 1), config["context_size"]).unflatten(0, (*shape, 2)), "logits")
    for which, net, images in (("context", objective.teacher, context), ("exemplar", objective.student, exemplars)):
        tokens = net["backbone"](images.flatten(0, -4))
        sequence = torch.cat([tokens.prefix, tokens.patches], 1).unflatten(0, images.shape[:-3])
        near(sequence, f"{which}_feat")
        grid = images.shape[-1] // config["patch_size"]
        near(net["backbone"].positions((grid, grid)), f"pos_{which}")
    near(map_loss(logits, batch["label"].flatten(0, 1)).unflatten(0, shape).mean(1), "loss_corr_per_exemplar")
    loss, _ = objective.loss(batch, 0)
    near(loss, "loss")
    after = {k: v.clone() for k, v in objective.state_dict().items()}
    loss.backward()
    grads = {official_name(n): p.grad for n, p in objective.named_parameters() if p.requires_grad}
    for name, grad in part(t, "output.grad.").items():
        assert_close(grads[name], grad, name, atol=0, of_largest=1e-4)
    assert not set(grads) & set(info["params_without_grad"])
    assert all(grad is not None for grad in grads.values())
    for name, value in part(t, "output.bn_after.").items():
        assert_close(after[our_name(name)], value, name, atol=1e-5)
    if config["sigma_cont"]:
        near(objective.contrast(whole, parts), "loss_cont_per_exemplar")
        keys = objective.teacher["projector"](whole)
        queries = [objective.predictor(objective.student["projector"](part)) for part in parts]
        near(keys, "cont_target", of_largest=1e-4)  # batch norms of four rows enlarge float32's rounding
        near(torch.stack(queries), "cont_pred", of_largest=1e-4)


def our_name(name: str) -> str:
    """The reference's name of a head's buffer to ours."""
    pairs = (("decoder_g_embed_c.", "teacher.projector."), ("decoder_g_embed.", "student.projector."))
    return next((new + name.removeprefix(old) for old, new in pairs if name.startswith(old)), name[8:])


@pytest.mark.parametrize("case", cases("cim", ("ema",)))
def test_the_teacher_follows_as_in_the_reference(case):
    """Once per two micro-batches, with the momentum of the number of micro-batches before it."""
    info, t = load("cim", case)
    config = info["config"]
    online, target = part(t, "state.", torch.float64), part(t, "state_target.", torch.float64)
    teacher = nn.ParameterList(target[k] for k in target)
    student = nn.ParameterList(online[k.replace("_c.", ".")] for k in target)
    ema, total = Ema(teacher, student), config["epochs"] * config["iter_per_epoch"]
    momentum = cosine(config["base_momentum"], config["end_momentum"], total)
    for i, recorded in enumerate(t["output.momentum"].tolist()):
        if (i + 1) % config["accum_iter"] == 0:
            assert momentum(i) == pytest.approx(recorded, abs=1e-12)
            ema.update_(momentum(i))
        for name, value in zip(target, teacher):
            assert_close(value, t[f"output.it{i}.{name}"], f"{name} after {i}", atol=1e-6)


@pytest.mark.parametrize("case", cases("cim", ("exemplar_geometry",)))
def test_exemplars_and_labels_from_recorded_rectangles(case):
    """The reference turns a canvas of whole pixels; rectangles are given on it, with both ends inside."""
    info, t = load("cim", case)
    side, context, size = (info["config"][k] for k in ("image", "context_size", "template_size"))
    image = t["input.image"].permute(2, 0, 1)[None].float() / 255
    for n, row in enumerate(info["cases"]):
        angle, half = math.radians(row["degree"]), side / 2
        extent = half * (abs(math.cos(angle)) + abs(math.sin(angle)))
        canvas = math.ceil(half + extent) - math.floor(half - extent)
        y0, x0, y1, x1 = row["revised_rect"]
        box = (torch.tensor([y0, x0, y1 + 1, x1 + 1]) - canvas / 2) / side
        where = Turned(torch.tensor([[angle]]), box[None, None])
        label, theirs = footprint(where, context)[0, 0], t[f"output.{n}.mask"].bool()
        assert (label & theirs).sum() / (label | theirs).sum() >= 0.95, (n, row)
        shown, theirs = cut(image, where, size)[0, 0], t[f"output.{n}.exemplar"].float() / 255
        assert (shown - theirs).abs().mean() < 0.015, (n, row)
        assert torch.corrcoef(torch.stack([shown.flatten(), theirs.flatten()]))[0, 1] > 0.997, (n, row)
    small = (resize(image, context)[0] * 255).round()
    assert (small - t["output.context"].float()).abs().max() <= 1


@pytest.mark.parametrize("case", cases("cim", ("exemplar_stats",)))
def test_exemplars_are_as_large_as_the_references(case):
    """The file gives moments, quantiles and ends over 360 exemplars, so that is what is compared; ours are drawn in
    at the image's border by another rule. Four standard errors, and 0.02 for the rule."""
    info, _ = load("cim", case)
    where = exemplar_boxes(torch.from_numpy(key_of(0, np.arange(500))), 6)
    share = footprint(where, 40).float().mean((-2, -1)).flatten()
    theirs, error = info["pos_frac"], info["pos_frac"]["std"] / math.sqrt(info["samples"])
    assert share.mean().item() == pytest.approx(theirs["mean"], abs=4 * error)
    assert share.std().item() == pytest.approx(theirs["std"], abs=4 * error)
    for name, q in (("q10", 0.1), ("q50", 0.5), ("q90", 0.9)):
        assert share.quantile(q).item() == pytest.approx(theirs[name], abs=0.02 + 4 * error), name
    assert theirs["min"] - 0.02 < share.min() and share.max() < theirs["max"] + 0.1
    sides = where.box[..., 2:] - where.box[..., :2]
    area = sides.prod(-1).flatten()
    assert area.mean().item() == pytest.approx(info["exemplar_area"]["mean"], abs=4 * error)


@pytest.mark.parametrize("case", cases("cim", ("export_timm",)))
def test_export_opens_in_timm(case):
    """Strictly, from the layout; tokens are compared where the state that they are of is in the folder."""
    info, t = load("cim", case)
    name = info["config"]["state"].split(".")[0]
    found = (FOLDER / "cim" / f"{name}.safetensors").exists()
    states = load("cim", name if found else cases("cim", ("corr_",))[0])
    parts = split(part(states[1], "state.") | part(states[1], "state_target."), "cim")
    model = timm.models.VisionTransformer(**info["config"]["timm_args"]).eval()
    for encoder in ("teacher", "backbone"):
        model.load_state_dict(parts[encoder])
        tokens = model.forward_features(t["input.images"])
        assert tokens.shape == t["output.tokens"].shape
        ours = build(states[0]["config"], states[1])
        net = (ours.teacher if encoder == "teacher" else ours.student)["backbone"](t["input.images"])
        assert_close(torch.cat([net.prefix, net.patches], 1), tokens, encoder, atol=1e-5)
    if found:
        assert_close(tokens, t["output.tokens"], "tokens", atol=1e-5)
