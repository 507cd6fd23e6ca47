"""What a run says at its start and at its end."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..backbones.tokens import Backbone
from ..objectives.objective import Objective
from .log import Metrics, count, duration


def first_screen(
    cfg: Any,
    objective: Objective,
    backbone: Backbone,
    *,
    num_samples: int | None,
    labelled: bool,
    describe: str,
    left_out: str,
    objects: str,
    steps: int,
    world: int,
    micro_batches: int,
    workers: int,
    device: str,
    precision: str,
    resuming: str | None,
) -> str:
    """What is trained, on how many images from where, batch, steps, parameters, and where the output goes."""
    o = cfg.optim
    whole, part = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (objective, backbone))
    micro = f" in {micro_batches} micro-batches" if micro_batches > 1 else ""
    rule = f" = {o.base_lr:g} x {cfg.batch_size} / 256" if o.base_lr is not None else ""
    images = steps * cfg.batch_size
    known = f"{count(num_samples)} images, {'with labels' if labelled else 'no labels'}: " if num_samples else ""
    epochs = f", {images / num_samples:.4g} epochs" if num_samples else ""
    others = [f"  left out    {left_out}"] if left_out else []
    others += [f"  objects     {objects}"] if objects else []
    end = f" to {o.weight_decay_end:g}" if o.weight_decay_end != o.weight_decay else ""
    groups = [f"  statistics  {line}" for line in compared(objective.compared(), cfg.batch_size, world, micro_batches)]
    lines = [
        f"{cfg.objective.name} on {cfg.backbone.name} ({backbone.architecture}, {cfg.image_size} px)",
        f"  data        {known}{describe}",
        *others,
        f"  batch       {cfg.batch_size} over {_many(world, 'process', 'es')}{micro}, "
        f"{_many(workers, 'loader worker', 's')} each",
        *groups,
        f"  length      {steps:,} steps = {count(images)} images{epochs}",
        f"  parameters  {part:.2f} M in the backbone, {whole:.2f} M in all",
        *adapted(cfg, objective),
        f"  optimizer   {o.name}, lr {o.lr:.3g}{rule}, weight decay {o.weight_decay:g}{end}, "
        f"warm-up {_warmup(o.warmup)}",
        f"  device      {device}, precision {precision}",
        f"  output      {cfg.run_dir}",
    ]
    return "\n".join(lines + ([f"  resuming    {resuming}"] if resuming else []))


def adapted(cfg: Any, objective: Objective) -> list[str]:
    """What trains of a backbone with `adapt=`, and whether what is frozen was ever trained."""
    if cfg.adapt.name == "none":
        return []
    student = objective.exports()["student"]  # a teacher's parameters never require a gradient
    beside = list(student.adapters.parameters())
    whose = "the adapters'" if beside else "the backbone's own"
    of_it, whole = _trained(student.parameters()), _trained(objective.parameters())
    own = _trained([*student.timm.parameters(), *beside])
    lines = [
        f"  adapt       {cfg.adapt.name}: {of_it:,} parameters of the backbone train, the others are frozen",
        f"  trained     {whole:,} parameters, {own:,} of them {whose}, {whole - own:,} in heads and the like",
    ]
    if cfg.init_from is not None:
        return lines
    return [*lines, f"  warning     adapt={cfg.adapt.name} freezes random weights; give init_from="]


def _trained(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad)


def compared(parts: dict[str, str], batch_size: int, world: int, micro_batches: int) -> list[str]:
    """What does not see the whole batch, a line for each number of images that it sees (see `Objective.compared`)."""
    micro = " (a micro-batch)" if micro_batches > 1 else ""
    lines = []
    for scope, images, where in (
        ("global", batch_size // micro_batches, f"all processes together{micro}"),
        ("rank", batch_size // micro_batches // world, f"each process for itself{micro}"),
    ):
        names = [name for name, over in parts.items() if over == scope]
        if names and images < batch_size:
            lines.append(f"{' and '.join(names)} over {images} of {batch_size} images: {where}")
    return lines


def _many(n: int, word: str, plural: str) -> str:
    return f"{n} {word}{'' if n == 1 else plural}"


def _warmup(value: int | str) -> str:
    return f"{value} steps" if isinstance(value, int) else str(value).replace("ep", " epochs")


def summarise(metrics: Metrics, total_steps: int) -> dict:
    """The numbers of summary.json that follow from metrics.csv."""

    def ends(column: str) -> tuple[float | None, float | None]:
        values = [v for _, v in metrics.numbers(column)]
        return (values[0], values[-1]) if values else (None, None)

    speeds = sorted(v for _, v in metrics.numbers("images_per_second"))
    first, last = ends("loss")
    knn = dict(metrics.numbers("knn"))
    return {
        "loss_first": first,
        "loss_last": last,
        "knn_untrained": knn.get(0),
        "knn_raw_pixels": ends("knn_raw_pixels")[0],
        "knn": knn.get(total_steps),
        "knn_best": max((v for s, v in knn.items() if s > 0), default=None),
        "rankme": ends("rankme")[1],
        "feature_std": ends("feature_std")[1],
        "images_per_second": speeds[len(speeds) // 2] if speeds else None,
        "bad_samples": int(ends("bad_samples")[1] or 0),
    }


def closing_table(summary: dict, run_dir: Path) -> str:
    """What a run achieved, and what to type next."""

    def show(key: str, form: str) -> str:
        value = summary.get(key)
        return "-" if value is None else form.format(value)

    first = "at the start" if summary.get("init") else "untrained backbone"
    rows = [
        ("loss, start", show("loss_first", "{:.4f}")),
        ("loss, end", show("loss_last", "{:.4f}")),
        (f"k-NN, {first}", show("knn_untrained", "{:.1f} %")),
        ("k-NN, raw pixels", show("knn_raw_pixels", "{:.1f} %")),
        ("k-NN, trained backbone", show("knn", "{:.1f} %")),
        ("RankMe", show("rankme", "{:.1f}")),
        ("images seen", show("images_seen", "{:,}")),
        ("images per second", show("images_per_second", "{:,.0f}")),
        ("time", duration(summary.get("seconds") or 0)),
    ]
    for name, found in (summary.get("evals") or {}).items():
        if "last" in found:
            rows.append((f"{name} ({found['metric']} at step {found['last_step']})", f"{found['last']:.1f} %"))
        if failed := found.get("failed"):
            rows.append((f"{name}, failed (see evals/)", f"{len(failed)}"))
    if summary.get("bad_samples"):
        rows.append(("bad samples skipped", show("bad_samples", "{:,}")))
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"  {name:<{width}}  {value:>12}" for name, value in rows)
    script = "python {}.py" if Path("train.py").exists() else "selfsight {}"
    folder = shlex.quote(str(run_dir))
    opens, kind = f"timm; timm.create_model('local-dir:{run_dir}/export', pretrained=True)", "opens with timm"
    if (run_dir / "export" / "adapter.json").exists():  # timm alone would open the frozen model
        opens = f"selfsight.interop.adapted as a; a.load_adapted('{run_dir}/export')"
        kind = "a frozen timm model and its adapters"
    probe = f"  {script.format('probe')} checkpoint={folder} probe=linear\n"
    probe = probe if summary.get("knn") is not None else ""  # a linear probe needs labels
    return (
        f"{table}\n\n  everything is in {run_dir}: report.html, export/ ({kind}), pictures/, metrics.csv\n\n"
        f"next:\n{probe}"
        f"  {script.format('export')} checkpoint={folder} out=my_backbone\n"
        f'  python -c "import {opens}"'
    )
