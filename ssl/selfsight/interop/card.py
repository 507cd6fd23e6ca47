"""The model card of an exported backbone: how it was made, and how to load it in four lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

# Facts that get a row, in this order. The whole of them stands in config.json under "selfsight".
ROWS = {
    "objective": "Objective",
    "backbone": "Backbone",
    "which": "Weights",
    "source": "Imported from",
    "adapted": "Adapted",
    "data": "Data",
    "steps": "Steps",
    "epochs": "Epochs",
    "images_seen": "Images seen",
    "image_size": "Image size",
    "batch_size": "Batch size",
    "loss_last": "Loss at the end",
    "knn": "k-NN (%)",
    "knn_untrained": "k-NN, at the start (%)",
    "knn_raw_pixels": "k-NN, raw pixels (%)",
    "rankme": "RankMe",
    "note": "Note",
    "time": "Finished",
    "device": "Device",
    "versions": "Versions",
    "git": "Git",
    "command": "Command",
}

TEMPLATE = """---
library_name: timm
tags:
- image-feature-extraction
- self-supervised-learning
- timm
# license: add one before you publish; it depends on your data as well as on you
---
# {title}

{kind}

{load}
## How it was made

| | |
|---|---|
{rows}
{recipe}
Images are expected as RGB in 0..1, then normalised with mean {mean} and standard deviation {std}.
"""

LOAD = """## Load it in four lines

```python
import timm

model = timm.create_model("local-dir:{out}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{output} = model(transform(image).unsqueeze(0))  # image: PIL, RGB -> [1, {width}]
```

`pretrained=True` matters: without it timm builds the architecture with random weights and does not say so.
`num_classes={other}` {head}, `features_only=True` returns feature maps{resize}.
`model.forward_features(x)` returns the tokens or the last map.
"""

LOAD_ADAPTED = """## Load it in four lines

`model.safetensors` is the **frozen** model that was adapted, and timm alone opens that. What was learnt is in
`adapter.safetensors`; it cannot be merged, so the adapted model needs a loader:

```python
import timm
from selfsight.interop.adapted import load_adapted

model = load_adapted("{out}")
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(transform(image).unsqueeze(0))  # image: PIL, RGB -> [1, {width}]
```

`num_classes=10` adds a fresh classifier{resize}.
`model.forward_features(x)` returns the tokens or the last map.
"""

_FEATURES = {
    "kind": "A `{architecture}` backbone, pretrained without labels by selfsight.\n"
            "It has no classifier: it turns images into features.",
    "output": "features", "other": 10, "head": "adds a fresh classifier",
}  # fmt: skip
_CLASSIFIER = {"kind": "A `{architecture}` classifier, fine-tuned with labels by selfsight.", "output": "logits",
               "other": 0, "head": "leaves the classifier out"}  # fmt: skip


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_cell(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(card: Mapping[str, Any]) -> str:
    """The known facts as rows of a Markdown table; what is unknown has no row."""
    facts = dict(card.get("provenance") or {}) | dict(card)
    quoted = {"command": "`{}`"}
    kept = [(k, facts[k]) for k in ROWS if facts.get(k) is not None]
    return "\n".join(f"| {ROWS[k]} | {quoted.get(k, '{}').format(_cell(v))} |" for k, v in kept)


def _recipe(card: Mapping[str, Any]) -> str:
    """The resolved configuration, folded away; nothing if the facts do not hold it."""
    if not card.get("config"):
        return ""
    text = yaml.safe_dump(card["config"], sort_keys=False, default_flow_style=None, width=110)
    return f"\n<details><summary>The whole configuration</summary>\n\n```yaml\n{text}```\n\n</details>\n"


def write_card(config: Mapping[str, Any], card: Mapping[str, Any], out: str) -> str:
    """README.md of an export folder at `out`, from its config.json and the facts of the run."""
    pretrained = config["pretrained_cfg"]
    title = " · ".join(str(card[k]) for k in ("objective", "backbone") if card.get(k)) or config["architecture"]
    classes = config["num_classes"]
    resize = ", `img_size=…` another input size" if pretrained["fixed_input_size"] else ""
    words = _CLASSIFIER if classes else _FEATURES
    load = LOAD_ADAPTED if "adapter.safetensors" in str(card.get("adapted")) else LOAD
    width = classes or config["num_features"]
    return TEMPLATE.format(
        title=title,
        kind=words["kind"].format(architecture=config["architecture"]),
        load=load.format(out=out, width=width, resize=resize, **{k: words[k] for k in ("output", "other", "head")}),
        rows=table(card),
        recipe=_recipe(card),
        mean=[round(m, 4) for m in pretrained["mean"]],
        std=[round(s, 4) for s in pretrained["std"]],
    )
