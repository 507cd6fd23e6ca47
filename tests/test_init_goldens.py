"""Official training files, put into an objective by `initialise` alone, give the recorded losses."""

import pytest
import torch
from torch import nn

import official
import official_jepa
import test_goldens_cim
import test_goldens_dino
import test_goldens_ibot
import test_goldens_mae
import test_goldens_selfpatch
from golden_cases import assert_close, cases, load, part
from selfsight.interop.initialise import initialise, taken_from
from selfsight.interop.load import open_weights
from selfsight.nn.pixel_conv import BlockDecoder, UNetDecoder
from selfsight.objectives.ijepa import IJEPA
from test_import import jepa_tree


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def scrambled(objective: nn.Module) -> nn.Module:
    """Every tensor away from what it is to be; the fixed tables of decoders stay."""
    for name, value in objective.state_dict().items():
        if value.is_floating_point() and not (name.endswith("pos_embed") and "timm" not in name):
            value.normal_()
    return objective


def begun(objective: nn.Module, path, tree: dict):
    torch.save(tree, path / "training.pth")
    report = initialise(scrambled(objective), open_weights(str(path / "training.pth")))
    assert not report.fresh
    return report


@pytest.mark.parametrize("case", cases("mae", ("fwd_",)))
def test_mae_with_its_decoder(case, tmp_path):
    info, t = load("mae", case)
    state = part(t, "state.")
    objective = test_goldens_mae.official(info["config"], state)
    report = begun(objective, tmp_path, {"model": state})
    assert report.matched["decoder"] and not report.left
    loss, _ = objective.loss(test_goldens_mae.batch_of(t["input.images"], t["input.noise"], objective), 0)
    assert_close(loss, t["output.loss"], "loss", atol=1e-5)


@pytest.mark.parametrize("case", cases("dino", ("fwd_",)))
def test_dino_with_its_head_and_centre(case, tmp_path):
    info, t = load("dino", case)
    objective, config = test_goldens_dino.build(info["config"]), info["config"]
    tree = {"student": part(t, "state_student."), "teacher": part(t, "state_teacher.")}
    report = begun(objective, tmp_path, tree | {"dino_loss": {"center": t["input.center"].float()}})
    assert report.matched["center"] == 1 and not report.left
    batch = official.views_of([t[f"input.crop{i}"].float() for i in range(2 + config["n_local"])])
    loss, _ = objective.loss(batch, int(t["input.epoch"]))
    assert_close(loss, t["output.loss"], "loss", atol=1e-5)


@pytest.mark.parametrize("case", cases("selfpatch", ("fwd_",)))
def test_selfpatch_with_its_heads(case, tmp_path):
    info, t = load("selfpatch", case)
    objective, config = test_goldens_selfpatch.build(info["config"]), info["config"]
    centers = {"center": t["input.center"].float(), "patch_center": t["input.patch_center"].float()}
    tree = {"student": part(t, "state_student."), "teacher": part(t, "state_teacher."), "dino_loss": centers}
    begun(objective, tmp_path, tree)
    batch = official.views_of([t[f"input.crop{i}"].float() for i in range(2 + config["n_local"])])
    loss, _ = objective.loss(batch, int(t["input.epoch"]))
    assert_close(loss, t["output.loss"], "loss", atol=1e-4)


@pytest.mark.parametrize("case", cases("ibot", ("vit_full_step",)))
def test_ibot_with_its_shared_head(case, tmp_path):
    info, t = load("ibot", case)
    objective, batch = test_goldens_ibot.ibot_of(info, t)
    tree = {w: part(t, f"state.{w}.") for w in ("student", "teacher")}
    report = begun(
        objective, tmp_path, tree | {"ibot_loss": {"center": torch.zeros(1, 24), "center2": torch.zeros(24)}}
    )
    assert report.left == {"head.last_layer2": 2}  # the same layer by another name
    assert_close(objective.loss(batch, 0)[0], t["output.loss"], "loss", atol=1e-4)


@pytest.mark.parametrize("case", cases("ijepa", ("train3_", "base_")))
def test_ijepa_with_its_predictor(case, tmp_path):
    info, t = load("ijepa", case)
    objective = official_jepa.build(IJEPA, {"ema_momentum": 0.9} | info["config"])
    state, target = part(t, "state."), part(t, "state_target.")
    begun(objective, tmp_path, jepa_tree(state, target or part(state, "encoder.")))
    given = official_jepa.batches(t, "input." if target else "input.step0.", torch.float32)
    loss = sum(objective.loss(b, 0)[0] for b in given) / len(given)
    assert_close(loss, t["output.loss"] if target else t["output.loss"][0], "loss", atol=1e-5)


@pytest.mark.parametrize("case", cases("cim", ("corr_",)))
def test_cim_with_both_networks_and_heads(case, tmp_path):
    info, t = load("cim", case)
    objective = test_goldens_cim.build(info["config"], t)
    report = begun(objective, tmp_path, {"model": part(t, "state.") | part(t, "state_target.")})
    assert report.networks == "its student and its teacher to ours"
    batch = {"context": t["input.context"], "exemplars": t["input.exemplars"], "label": t["input.masks"].bool()}
    assert_close(objective.loss(batch, 0)[0], t["output.loss"], "loss", atol=1e-4)


@pytest.mark.parametrize(("layout", "prefix"), [("fcmae", "fcmae"), ("spark", "spark_convnext")])
def test_convolutional_decoders_come_along(layout, prefix, tmp_path):
    for case in cases("probing", (prefix,)):
        info, t = load("probing", case)
        config = info["config"]
        torch.save(part(t, "state."), tmp_path / "w.pth")
        if layout == "fcmae":
            size = {"width": config["decoder_embed_dim"], "depth": config["decoder_depth"]}
            decoder: nn.Module = BlockDecoder(config["dims"][-1], config["patch_size"], **size)
        else:
            width = config.get("decoder_width", config.get("dec_width"))
            decoder = UNetDecoder(config["dims"], (4, 8, 16, 32), width=width)
        weights = open_weights(str(tmp_path / "w.pth"))
        assert weights.layout == layout
        assert taken_from(weights.chosen, {"decoder": decoder})["decoder"].keys() == decoder.state_dict().keys()


@pytest.mark.parametrize("case", cases("dinov2", ("meta_step_",)))
def test_both_networks_heads_and_centres_give_the_recorded_loss(case, tmp_path):
    """The file of a training, put into the objective by `initialise` alone."""
    info, t = load("dinov2", case)
    objective, batch = test_goldens_ibot.dinov2_of(info, t)
    torch.save({"model": part(t, "state.")}, tmp_path / "training.pth")
    report = initialise(objective, open_weights(str(tmp_path / "training.pth")))
    assert report.networks == "its student and its teacher to ours" and not report.fresh
    loss, _ = objective.loss(batch, 0)
    assert_close(loss, t["output.total_loss"], "loss", atol=1e-5, of_largest=1e-4)
