"""`train.py` whose processes note, beside the run folder, what they held and computed in the first step."""

import json
from collections import Counter
from unittest import mock

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from selfsight.backbones.watch import blocks_of
from selfsight.cli import main
from selfsight.training.loop import AfterStep
from selfsight.training.teacher import local

own, calls = AfterStep._after_step, Counter()


def after_step(self, trainer, module):
    if module.step == 1:
        parameters = list(module.objective.parameters())
        blocks = blocks_of(module.objective.student["backbone"].timm)
        noted = {
            "strategy": type(trainer.strategy).__name__, "sharded": module.sharded,
            "local": sum(local(p).numel() for p in parameters), "whole": sum(p.numel() for p in parameters),
            "passes": calls[module.objective.student["backbone"]],
            "block_calls": {name: calls[block.norm1] for name, block in blocks.items()},
        }  # fmt: skip
        (self.plan.run_dir.parent / f"noted-{trainer.global_rank}.json").write_text(json.dumps(noted))
    own(self, trainer, module)


register_module_forward_pre_hook(lambda module, _: calls.update([module] * torch.is_grad_enabled()))
with mock.patch.object(AfterStep, "_after_step", after_step):
    raise SystemExit(main("train"))
