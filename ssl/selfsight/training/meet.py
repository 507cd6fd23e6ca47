"""What processes compare when they meet: each composes its own config and opens its own data, and nothing later would
tell them that these are not the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import ConfigError

STEP, DATA = "step", "data"  # facts that have a sentence of their own; all others are keys of the config


def same_start(facts: Mapping[str, Any], data: str, device: torch.device) -> None:
    """ConfigError on every process when their facts (JSON-able) are not the same. data: words for what is trained on.

    One gather of two numbers where they are the same, a second one of everything where they are not.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    text = json.dumps([facts, data], sort_keys=True, default=str).encode()
    same = json.dumps(facts, sort_keys=True, default=str).encode()
    digest = int.from_bytes(hashlib.sha256(same).digest()[:8], "big", signed=True)
    found = _gather(torch.tensor([digest, len(text)], device=device))
    if (found[:, 0] == digest).all():  # for all processes, or for none
        return
    padded = text.ljust(int(found[:, 1].max()))
    rows = _gather(torch.tensor(list(padded), dtype=torch.uint8, device=device))
    every = [json.loads(bytes(row.tolist())) for row in rows]
    raise ConfigError(difference([facts for facts, _ in every], [words for _, words in every]))


def difference(facts: Sequence[Mapping[str, Any]], data: Sequence[str]) -> str:
    """The sentence about the first fact that some processes do not share with process 0."""
    keys = (STEP, DATA, *sorted({key for one in facts for key in one} - {STEP, DATA}))
    others = {key: [r for r, one in enumerate(facts) if one.get(key) != facts[0].get(key)] for key in keys}
    key = next(key for key in keys if others[key])
    ranks = others[key]
    ours, theirs = facts[0].get(key), facts[ranks[0]].get(key)
    who = f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}{' …' if len(ranks) > 8 else ''}"
    if key == STEP:
        return (
            f"process 0 would continue from step {ours} and {who} from step {theirs}: they do not see the same "
            "checkpoints; put run_dir on a disk that all of them share"
        )
    if key == DATA:
        return (
            f"process 0 would train on {data[0]}, {who} on {data[ranks[0]]}, and these are not the same samples: "
            "data.* must lead to the same files everywhere"
        )
    return (
        f"{key} is {_value(ours)} in process 0 and {_value(theirs)} in {who}: start all processes of a run by the same "
        "command"
    )


def _gather(mine: Tensor) -> Tensor:
    """The rows of all processes."""
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return torch.stack(rows).cpu()


def _value(value: Any) -> str:
    return "null" if value is None else str(value)
