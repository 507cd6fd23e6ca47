"""GLARE: UDI's correspondences and attention of regions by official code; regions' and patches' losses as derived."""

import pytest
import torch
from torch import nn

from golden_cases import cases, load, part
from selfsight.nn.losses import cross_entropy
from selfsight.nn.region_attention import CrossAttention, SampledAttention
from selfsight.objectives.distill import Pace
from selfsight.objectives.glare import GLARE, altered_mean
from selfsight.views.correspond import Match, correspond, sample
from selfsight.views.spec import Crop, Views

KNOWN = ("derived_region_local", "udi_backtrack_map", "udi_srs_attention")


def test_every_case_is_known():
    assert [c for c in cases("glare", ("",)) if not c.startswith(KNOWN)] == []
    assert {prefix for prefix in KNOWN if cases("glare", (prefix,))} == set(KNOWN)


def close(mine, theirs, what):
    """The goldens' own tolerance, for float32."""
    torch.testing.assert_close(mine.float(), theirs, rtol=1e-4, atol=1e-5, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("case", cases("glare", ("udi_backtrack_map",)))
def test_where_patches_lie_in_the_other_view(case):
    info, t = load("glare", case)
    n = info["config"]["feature_size"]
    across = correspond(t["input.coord_src"], t["input.coord_tgt"], (n, n), corners=True)
    ids = (t["input.sampling_mask"].bool() & across.valid).nonzero().flatten()
    assert torch.equal(ids, t["output.src_map"][: len(ids)].argmax(1))
    assert t["output.src_map"][len(ids) :].abs().sum() == 0
    picked = Match(across.at[None, ids], across.valid[None, ids])
    weights = sample(torch.eye(n * n)[None], picked, (n, n), corners=True)[0]  # of every patch of the target
    close(weights, t["output.tgt_map"][: len(ids)], "bilinear weights")


@pytest.mark.parametrize("case", cases("glare", ("udi_srs_attention",)))
def test_attention_of_sampled_regions(case):
    info, t = load("glare", case)
    module = SampledAttention(info["config"]["dim"], info["config"]["heads"]).double()
    module.attn.load_state_dict(part(t, "state."))
    x, share = t["input.x"].double().requires_grad_(), t["input.map"][0].double()
    y = module(x, share @ x)
    # Rows without any patch are dropped later; the reference lets them look everywhere alike.
    attn, dim = module.attn, x.shape[-1]
    values = (x @ attn["qkv"].weight[2 * dim :].T + attn["qkv"].bias[2 * dim :]).mean(1, keepdim=True)
    y = torch.where(share.sum(-1, keepdim=True) > 0, y, attn["norm"](attn["proj"](values)))
    close(y, t["output.y"][0], "contexts")
    (y * t["input.w"][0]).sum().backward()
    close(x.grad, t["output.grad.x"], "gradient")
    close(attn["qkv"].weight.grad, t["output.grad.qkv.weight"], "gradient of the weights")


class Matrix(nn.Module):
    """The golden's head: one matrix."""

    def __init__(self, matrix):
        super().__init__()
        self.num_prototypes = matrix.shape[1]
        self.matrix = nn.Parameter(matrix.clone())

    def forward(self, x):
        return x @ self.matrix


@pytest.mark.parametrize("case", cases("glare", ("derived_region_local",)))
def test_losses_of_regions_and_altered_patches(case):
    info, t = load("glare", case)
    config = info["config"]
    student = nn.ModuleDict({"head": Matrix(t["input.head_student"]), "ca": CrossAttention(config["D"])})
    pace = Pace(lambda step: 1.0, lambda step: config["teacher_temp"])
    views = Views((Crop("global", 2, 16, (0.25, 1.0)),))
    objective = GLARE(student, views, pace, student_temp=config["student_temp"]).train()
    put(objective.student["ca"], part(t, "state.ca."))
    put(objective.teacher["ca"], part(t, "state.ca_teacher."))
    objective.teacher["head"].matrix.data.copy_(t["input.head_teacher"])
    for center in (objective.region_center, objective.local_center):
        center.center.copy_(t["input.center"])
    tokens, theirs = t["input.student_tokens"].clone().requires_grad_(), t["input.teacher_tokens"]
    valid = t["input.region_valid"].float()
    own = t["input.region_pool_student"] @ tokens
    other = t["input.region_pool_teacher"] @ theirs
    close(objective.student["ca"](tokens, own), t["output.region_context_student"], "student's contexts")
    close(objective.teacher["ca"](theirs, other), t["output.region_context_teacher"], "teacher's contexts")
    target = objective.region_targets(theirs, other, valid, 0)
    close(target, t["output.region_probs_teacher"], "targets of regions")
    regional = objective.region_loss(tokens, own, target, valid)
    close(regional, t["output.L_reg"], "regional loss")
    weight = t["input.patch_augmented"].float()
    target = objective.targets(objective.teacher["head"](theirs), objective.local_center, 0, weight)
    each = cross_entropy(target, objective.student["head"](tokens), objective.student_temp)
    altered = altered_mean(each, weight)
    close(altered, t["output.L_loc1"], "loss of altered patches")
    (regional + altered).backward()
    close(tokens.grad, t["output.grad.student_tokens"], "gradient of the tokens")
    ca = objective.student["ca"]
    close(ca.q.weight.grad.T, t["output.grad.ca.q"], "gradient of the queries")
    close(ca.v.weight.grad.T, t["output.grad.ca.v"], "gradient of the values")


def put(ca, state):
    """The golden multiplies from the left: x W."""
    ca.load_state_dict({f"{name}.weight": matrix.T for name, matrix in state.items()})
