"""What may be said in a config: the keys of every group, their types and ranges. Nothing here imports torch.

A new objective is one YAML file in `conf/objective` and one dataclass in `SCHEMAS`.
"""

# ruff: noqa: RUF009  (the calls in dataclass defaults return dataclasses.field)

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class ConfigError(ValueError):
    """A key, group or value is wrong; the message is one sentence that says what would work."""


class Duration(NamedTuple):
    """A stretch of training: amount in `unit` (steps | percent of the run | epochs)."""

    amount: float
    unit: str

    def steps(self, total_steps: int, steps_per_epoch: float) -> int:
        """Length in optimizer steps of a run of total_steps."""
        per = {"steps": 1.0, "percent": total_steps / 100, "epochs": steps_per_epoch}[self.unit]
        return round(self.amount * per)


def duration(value: int | str) -> Duration:
    """Parse 100 (steps), "5%" (of the run) or "40ep" (epochs); ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%|ep)?", str(value).strip())
    unit = match and {None: "steps", "%": "percent", "ep": "epochs"}[match[2]]
    amount = float(match[1]) if match else 0.0
    if not unit or (unit == "steps" and amount % 1) or (unit == "percent" and amount > 100):
        raise ConfigError(f"{value!r} is no duration: write steps (100), a share of the run (5%) or epochs (40ep)")
    return Duration(amount, unit)


# --- rules: what a value may be; carried in the metadata of a dataclass field -------------------------------------


class Rule(NamedTuple):
    """`parse` returns the value in its final form or raises ValueError; `expects` finishes "expected …"."""

    expects: str
    parse: Callable[[Any], Any]


def _field(default: Any, expects: str, parse: Callable[[Any], Any]) -> Any:
    metadata = {"rule": Rule(expects, parse)}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _require(ok: bool, value: Any) -> Any:
    if not ok:
        raise ValueError
    return value


def one_of(default: str | None, *choices: str) -> Any:
    """A word from a list."""
    return _field(default, "one of " + ", ".join(choices), lambda v: _require(v in choices, v))


def _bounds(noun: str, low: float | None, high: float | None) -> Rule:
    span = {
        (True, True): f" from {low} to {high}",
        (True, False): f" of at least {low}",
        (False, True): f" of at most {high}",
        (False, False): "",
    }[low is not None, high is not None]

    def parse(v: float) -> float:
        inside = (low is None or low <= v) and (high is None or v <= high)
        return _require(math.isfinite(v) and inside, v)

    return Rule(noun + span, parse)


def integer(default: int | None, low: int | None = 1, high: int | None = None) -> Any:
    """A whole number in [low, high]."""
    return _field(default, *_bounds("a whole number", low, high))


def number(default: float | None, low: float | None = 0.0, high: float | None = None) -> Any:
    """A finite number in [low, high]."""
    return _field(default, *_bounds("a number", low, high))


def numbers(default: list[float] | None, count: int | None, low: float, high: float, rising: bool = False) -> Any:
    """A list of numbers in [low, high], `count` of them, in rising order where asked."""

    def parse(values: Any) -> list[float]:
        found = [float(v) for v in values]
        ordered = not rising or found == sorted(found)
        length = len(found) == count if count else len(found) > 0
        return _require(length and ordered and all(low <= v <= high for v in found), found)

    example = "[0.2, 1.0]" if rising else {2: "[0.9, 0.95]", 3: "[1.0, 0.1, 0.5]"}.get(count, "[0.1, 0.3]")
    return _field(
        default, f"{count or 'some'} {'rising ' * rising}numbers from {low:g} to {high:g} such as {example}", parse
    )


def counts(default: list[int] | None, low: int = 1) -> Any:
    """Whole numbers of at least `low`; one alone may stand without brackets."""

    def parse(values: Any) -> list[int]:
        found = [int(v) for v in _listed(values)]
        return _require(found and min(found) >= low and len(set(found)) == len(found), found)

    return _field(default, f"one or several whole numbers of at least {low} such as {default or [1000, 5000]}", parse)


def some(default: list[float], low: float) -> Any:
    """Numbers of at least `low`; one alone may stand without brackets."""

    def parse(values: Any) -> list[float]:
        found = [float(v) for v in _listed(values)]
        return _require(found and all(math.isfinite(v) and v >= low for v in found), found)

    return _field(default, f"one or several numbers of at least {low:g} such as {default}", parse)


def words(default: list[str] | None, *choices: str) -> Any:
    """Words from a list; one alone may stand without brackets."""

    def parse(values: Any) -> list[str]:
        found = _listed(values)
        return _require(found and all(v in choices for v in found), found)

    return _field(default, "one or several of " + ", ".join(choices), parse)


def policy(default: str | None) -> Any:
    """A policy of random operations: "trivial", or timm's words for RandAugment."""
    words = re.compile(r"trivial|rand(-(m\d+|n[1-9]\d*|p(0?\.\d+|1)|mstd(\d+(\.\d+)?|inf)|mmax\d+|inc[01]))*")
    return _field(default, "trivial or rand-… in timm's words such as rand-m9-mstd0.5-inc1",
                  lambda v: _require(words.fullmatch(str(v)), v))  # fmt: skip


def layers(default: Any) -> Any:
    """Numbers of blocks or stages, negative ones from the end; "all"; null: the output."""

    def parse(values: Any) -> Any:
        return values if values in ("all", None) else [int(v) for v in _listed(values)]

    return _field(default, "all, null, or numbers of blocks or stages such as [3, -1]", parse)


def _listed(values: Any) -> list[Any]:
    return [values] if isinstance(values, (str, int, float)) else list(values)


def _auto_or_count(v: Any) -> Any:
    return v if v == "auto" else _require(int(v) >= 1, int(v))


def _full_or_count(v: Any) -> Any:
    return v if v == "full" else _require(int(v) >= 1, int(v))


def _auto_or_bool(v: Any) -> Any:
    word = str(v).lower()
    return _require(word in ("auto", "true", "false"), word if word == "auto" else word == "true")


def _auto_or_floats(v: Any) -> Any:
    if isinstance(v, str):
        return _require(v == "auto", v)
    return _require(len(v) > 0 and all(math.isfinite(float(x)) for x in v), [float(x) for x in v])


def _patterns(v: Any) -> Any:
    words = [v] if isinstance(v, str) else list(v)
    if any(str(word).strip().startswith("pipe:") for word in words):
        raise ConfigError(f"{v!r} would run a shell command; give paths or https addresses of tar files")
    return _require(len(words) > 0 and all(isinstance(word, str) and word for word in words), v)


def _warmup(v: Any) -> Any:
    parsed = duration(v)
    return int(parsed.amount) if parsed.unit == "steps" else str(v).strip()


def _step(v: Any) -> Any:
    return v if v in ("last", "best") else _require(int(v) >= 0, int(v))


def kept_step() -> Any:
    """Which checkpoint of a run folder."""
    return _field("last", "last, best or the number of a kept step", _step)


def device(default: str | None) -> Any:
    """A device of this machine."""

    def parse(v: Any) -> Any:
        return _require(bool(re.fullmatch(r"auto|cpu|gpu|cuda(:\d+)?|mps", str(v))), v)

    return _field(default, "one of auto, cpu, gpu, cuda, cuda:<number>, mps", parse)


def lines() -> Any:
    """Lines of shell."""

    def parse(values: Any) -> list[str]:
        return [_require(isinstance(v, str) and "\n" not in v, v) for v in _listed(values)]

    return _field([], "lines of shell such as ['module load cuda']", parse)


def dashed() -> Any:
    """Options of another command, each with its dashes."""

    def parse(values: Any) -> list[str]:
        return [_require(str(v).startswith("-"), str(v)) for v in _listed(values)]

    return _field([], "options such as [--partition=gpu, --time=1:00:00]", parse)


# --- schema ------------------------------------------------------------------------------------------------------


def span(default: Any) -> Any:
    """A length of time within a run."""
    return _field(default, "steps (100), a share of the run (5%) or epochs (40ep)", _warmup)


@dataclasses.dataclass
class Fallback:
    """Keys of the objective and of `views` that a recipe fills where they are null; the others stay as they are."""

    num_prototypes: int | None = integer(None, 2)
    num_patch_prototypes: int | None = integer(None, 2)
    head_hidden: int | None = integer(None)
    head_bottleneck: int | None = integer(None)
    momentum: float | None = number(None, 0, 1)
    teacher_temp: float | None = number(None, 1e-4)
    teacher_temp_start: float | None = number(None, 1e-4)
    freeze_last_layer: Any = span(None)
    head_warmup: Any = span(None)
    centering: str | None = one_of(None, "center", "sinkhorn")
    koleo: float | None = number(None)
    blur_p: list[float] | None = numbers(None, 3, 0, 1)
    global_scale: list[float] | None = numbers(None, 2, 0.01, 1, rising=True)
    local_scale: list[float] | None = numbers(None, 2, 0.01, 1, rising=True)
    local_n: int | None = integer(None, 0)
    drop_path: float | None = number(None, 0, 0.95)
    decoder_dim: int | None = integer(None)
    decoder_heads: int | None = integer(None)


@dataclasses.dataclass
class Quick(Fallback):
    """What null keys fall back to on data=scenes when no duration is given (a few minutes on two cores)."""

    batch_size: int | None = integer(None)
    max_steps: int = integer(600)
    base_lr: float | None = number(None)
    weight_decay: float | None = number(None)
    warmup: Any = span(None)


@dataclasses.dataclass
class Recipe(Fallback):
    """What null keys fall back to: the published recipe of the objective."""

    batch_size: int = integer(4096)
    max_epochs: int = integer(800)
    base_lr: float = number(1.5e-4)
    weight_decay: float = number(0.05)
    weight_decay_end: float | None = number(None)
    betas: list[float] = numbers([0.9, 0.95], 2, 0, 1)
    warmup_epochs: float = number(40)
    temp_warmup_epochs: float = number(0)
    min_lr: float = number(0.0)
    clip: float | None = number(None)
    clip_mode: str = one_of("global", "global", "per_tensor")
    warmup_start: float = number(0.0, 0, 1)
    quick: Quick = dataclasses.field(default_factory=Quick)


@dataclasses.dataclass
class MAE:
    name: str = one_of("mae", "mae")
    mask_ratio: float | None = number(None, 0.05, 0.95)
    norm_pixels: bool = True
    mask_unit: int | None = integer(None)
    decoder: str = one_of("auto", "auto", "transformer", "block", "unet", "fused")
    decoder_dim: int | None = integer(None)
    decoder_depth: int | None = integer(None)
    decoder_heads: int | None = integer(None)
    crop_scale: list[float] = numbers([0.2, 1.0], 2, 0.01, 1, rising=True)
    flip: float = number(0.5, 0, 1)
    recipe: Recipe = dataclasses.field(default_factory=Recipe)


@dataclasses.dataclass
class DINO:
    """Keys that all self-distillation objectives share."""

    name: str = one_of("dino", "dino")
    num_prototypes: int | None = integer(None, 2)
    head_hidden: int | None = integer(None)
    head_bottleneck: int | None = integer(None)
    head_layers: int = integer(3)
    head_batch_norm: bool = False
    weight_norm: bool = True
    norm_last_layer: bool = True
    centering: str | None = one_of(None, "center", "sinkhorn")
    center_momentum: float = number(0.9, 0, 1)
    student_temp: float = number(0.1, 1e-4)
    teacher_temp: float | None = number(None, 1e-4)
    teacher_temp_start: float | None = number(None, 1e-4)
    teacher_temp_warmup: Any = span(None)
    teacher_temp_schedule: str = one_of("step", "step", "epoch")
    momentum: float | None = number(None, 0, 1)
    momentum_end: float = number(1.0, 0, 1)
    freeze_last_layer: Any = span(None)
    koleo: float | None = number(None)
    blur_p: list[float] | None = numbers(None, 3, 0, 1)
    color: float = number(1.0, 0, 2)
    scope: str = one_of("global", "global", "rank")
    recipe: Recipe = dataclasses.field(default_factory=Recipe)


@dataclasses.dataclass
class IBOT(DINO):
    name: str = one_of("ibot", "ibot")
    num_patch_prototypes: int | None = integer(None, 2)
    patch_head: str = one_of("shared", "shared", "prototypes", "separate")
    patch_loss: float = number(1.0)
    pooled_loss: float = number(1.0)
    patch_center: str = one_of("all", "all", "masked")
    center_mean: str = one_of("exact", "exact", "official")
    masking: str = one_of("stratified", "stratified", "official")
    mask_shape: str = one_of("block", "block", "random")
    mask_ratio: list[float] = numbers([0.1, 0.5], 2, 0, 0.95, rising=True)
    mask_share: float = number(0.5, 0, 1)
    mask_start: Any = span(0)


@dataclasses.dataclass
class SelfPatch(DINO):
    name: str = one_of("selfpatch", "selfpatch")
    num_patch_prototypes: int | None = integer(None, 2)
    neighbours: int = integer(4, 1, 8)
    border: str = one_of("clip", "clip", "wrap")
    patch_loss: float = number(0.1)
    patch_crops: str = one_of("all", "all", "global")


@dataclasses.dataclass
class ODIS(IBOT):
    name: str = one_of("odis", "odis")
    no_mask: str = one_of("full", "full", "skip", "error")
    object_pool: str = one_of("attention", "attention", "mean", "none")
    object_crops: str = one_of("analytic", "analytic", "official", "none")
    object_choice: str = one_of("sqrt_area", "sqrt_area", "uniform", "largest")
    object_locals: bool = False
    object_shape: str = one_of("exact", "exact", "box")
    object_margin: int = integer(0, 0, 4)
    min_area: float = number(0.04, 0, 1)
    min_visible: float = number(0.25, 0, 1)
    exact_mean: bool = True


@dataclasses.dataclass
class GLARE(DINO):
    name: str = one_of("glare", "glare")
    patch_aug: str = one_of("blur", "blur", "noise", "gray", "shuffle", "mask")
    patch_ratio: float = number(0.3, 0.01, 0.9)
    regions: str = one_of("attention", "attention", "grid")
    num_regions: int = integer(8, 1, 64)
    random_regions: float = number(0.25, 0, 1)
    window: int | None = integer(None, 1)
    region_attention: str = one_of("plain", "plain", "srs")
    points: int = integer(64)
    weights: list[float] = numbers([1.0, 1.0, 1.0], 3, 0, 100)
    head_warmup: Any = span(None)


@dataclasses.dataclass
class IJEPA:
    name: str = one_of("ijepa", "ijepa")
    masking: str = one_of("unbiased", "unbiased", "official")
    targets: int = integer(4, 1, 16)
    target_scale: list[float] = numbers([0.15, 0.2], 2, 0.01, 1, rising=True)
    target_aspect: list[float] = numbers([0.75, 1.5], 2, 0.1, 10, rising=True)
    context_scale: list[float] = numbers([0.85, 1.0], 2, 0.1, 1, rising=True)
    context_ratio: float = number(0.3, 0.01, 1)
    random_share: float = number(0.0, 0, 1)
    min_keep: int = integer(10, 0)
    predictor_dim: int | None = integer(None)
    predictor_depth: int | None = integer(None)
    predictor_heads: int | None = integer(None)
    momentum: float | None = number(None, 0, 1)
    momentum_end: float = number(1.0, 0, 1)
    init_depth_rescale: bool = False
    crop_scale: list[float] = numbers([0.3, 1.0], 2, 0.01, 1, rising=True)
    flip: float = number(0.0, 0, 1)
    recipe: Recipe = dataclasses.field(default_factory=Recipe)


@dataclasses.dataclass
class DMTJEPA(IJEPA):
    name: str = one_of("dmt_jepa", "dmt_jepa")
    neighbours: int = integer(4)
    window: int = _field(3, "3, 5 or 7", lambda v: _require(v in (3, 5, 7), v))
    border: str = one_of("clip", "clip", "wrap")
    query: str = one_of("same_image", "same_image", "permuted", "patch")
    include_self: bool = False
    context_attn: str = one_of("cross-attn", "cross-attn", "self-attn")
    target_attn: str = one_of("cross-attn", "cross-attn", "self-attn")
    target_final_ln: bool = False
    target_warmup: Any = span(0)
    head_dim: int | None = integer(None)
    head_blocks: int = integer(2)
    head_mlp_ratio: float = number(4.0, 0.25)


@dataclasses.dataclass
class CIM:
    name: str = one_of("cim", "cim")
    exemplars: int = integer(6, 1, 32)
    context_size: int | None = integer(None, 8)
    exemplar_size: int | None = integer(None, 8)
    search_scale: list[float] = numbers([0.5, 1.0], 2, 0.01, 1, rising=True)
    exemplar_scale: list[float] = numbers([0.05, 0.48], 2, 0.01, 1, rising=True)
    exemplar_ratio: float = number(3.0, 1, 10)
    rotation: int = integer(45, 0, 180)
    flip: float = number(0.5, 0, 1)
    jitter_p: float = number(0.8, 0, 1)
    gray_p: float = number(0.2, 0, 1)
    blur_p: float = number(0.5, 0, 1)
    solarize_p: float = number(0.2, 0, 1)
    decoder_dim: int | None = integer(None)
    decoder_heads: int | None = integer(None)
    pred_init: str = one_of("small", "small", "official")
    freeze_patch_embed: bool = True
    momentum: float | None = number(None, 0, 1)
    momentum_end: float = number(1.0, 0, 1)
    sigma_corr: float = number(1.0)
    sigma_cont: float = number(0.0)
    temperature: float = number(0.2, 1e-4)
    projector_hidden: int = integer(4096)
    projector_dim: int = integer(256)
    recipe: Recipe = dataclasses.field(default_factory=Recipe)


@dataclasses.dataclass
class Decoder:
    dim: int | None = integer(None)
    depth: int | None = integer(None)
    heads: int | None = integer(None)


@dataclasses.dataclass
class BackboneConfig:
    name: str | None = None
    family: str | None = one_of(None, "vit", "convnext", "shvit", "timm")
    patch_size: int | None = integer(None)
    embed_dim: int | None = integer(None)
    depth: int | None = integer(None)
    num_heads: int | None = integer(None)
    drop_path: float | None = number(None, 0, 0.95)
    registers: int | None = integer(None, 0)
    pos_resize: str | None = one_of("timm", "timm", "official")
    image_size: int = integer(224, 8)
    local_size: int = integer(96, 8)
    context_size: int = integer(224, 8)
    exemplar_size: int = integer(96, 8)
    decoder: Decoder = dataclasses.field(default_factory=Decoder)


@dataclasses.dataclass
class Data:
    name: str = one_of("shards", "shards", "folder", "scenes")
    train: Any = _field(None, "a shard pattern such as /d/train-{000000..000099}.tar or a list of them", _patterns)
    val: Any = _field(None, "a shard pattern such as /d/val-{000000..000009}.tar or a list of them", _patterns)
    root: str | None = None
    root_val: str | None = None
    mode: str = one_of("exact", "exact", "stream")
    labels: str = one_of("auto", "auto", "none")
    objects: Any = _field(None, "a pattern of side-car tars such as /d/objects/train-{000000..000099}.tar", _patterns)
    index_dir: str | None = None
    cache: str | None = None
    cache_gb: float = number(100.0, 1e-9)
    retries: int = integer(5, 0)
    timeout: float = number(60.0, 1e-3)
    mean: Any = _field([0.485, 0.456, 0.406], "auto or one number per channel, [0.5, 0.5, 0.5]", _auto_or_floats)
    std: Any = _field([0.229, 0.224, 0.225], "auto or one number per channel, [0.25, 0.25, 0.25]", _auto_or_floats)
    channels: int = integer(3)
    chunk: int = integer(1)
    window: int = integer(128)
    max_bad_fraction: float = number(0.01, 0, 1)


@dataclasses.dataclass
class Scenes(Data):
    size: int | None = integer(None, 16)
    num_train: int = integer(5000)
    num_val: int = integer(1000, 0)
    seed: int = integer(0, 0)


@dataclasses.dataclass
class AdamW:
    name: str = one_of("adamw", "adamw")
    base_lr: float | None = number(None)
    lr: float | None = number(None)
    weight_decay: float | None = number(None)
    betas: list[float] | None = numbers(None, 2, 0, 1)
    eps: float = number(1e-8)
    weight_decay_end: float | None = number(None)
    warmup: Any = span(None)
    min_lr: float | None = number(None)
    clip: float | None = number(None)
    clip_mode: str | None = one_of(None, "global", "per_tensor")
    decay_rule: str = one_of("default", "default", "official")
    schedule: str = one_of("cosine", "cosine", "official")
    warmup_start: float | None = number(None, 0, 1)
    ipe_scale: float = number(1.0, 1)


@dataclasses.dataclass
class Trainer:
    devices: Any = _field("auto", "auto or a whole number of at least 1", _auto_or_count)
    num_nodes: int = integer(1)
    accelerator: str = one_of("auto", "auto", "cpu", "gpu")
    precision: str = one_of("auto", "auto", "32", "bf16-mixed", "16-mixed")
    strategy: str = one_of("auto", "auto", "ddp", "fsdp")
    checkpointing: bool = False
    compile: Any = _field(False, "auto, true or false", _auto_or_bool)
    max_batch_per_device: int | None = integer(None)
    hang_minutes: float = number(30.0)


@dataclasses.dataclass
class NoAdapter:
    name: str = one_of("none", "none")


@dataclasses.dataclass
class UniAdapter:
    name: str = one_of("uniadapter", "uniadapter")
    rank: int = integer(64)
    scale: float = number(0.1)
    learn_scale: bool = False
    norm: bool = False
    placement: str = one_of("after_attn", "after_attn", "parallel_mlp")


@dataclasses.dataclass
class AdaptFormer(UniAdapter):
    name: str = one_of("adaptformer", "adaptformer")
    placement: str = one_of("parallel_mlp", "after_attn", "parallel_mlp")


@dataclasses.dataclass
class LoRA:
    name: str = one_of("lora", "lora")
    rank: int = integer(8)
    alpha: float = number(16.0)
    targets: Any = words(None, "q", "k", "v", "proj", "fc1", "fc2")


@dataclasses.dataclass
class APLA:
    name: str = one_of("apla", "apla")
    rank: Any = _field("full", "full or a whole number of at least 1", _full_or_count)


@dataclasses.dataclass
class BitFit:
    name: str = one_of("bitfit", "bitfit")
    biases: bool = True
    norms: bool = True


@dataclasses.dataclass
class Logger:
    name: str = one_of("csv", "csv", "wandb")
    project: str = "selfsight"
    mode: str = one_of("auto", "online", "offline", "auto")
    entity: str | None = None
    tags: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Local:
    name: str = one_of("local", "local")


@dataclasses.dataclass
class Slurm:
    name: str = one_of("slurm", "slurm")
    nodes: int | None = integer(None)
    gpus_per_node: int | None = integer(None, 0)
    tasks_per_node: int | None = integer(None)
    cpus_per_task: int = integer(8)
    minutes: int | None = integer(None)
    partition: str | None = None
    sbatch: Any = dashed()
    setup: Any = lines()
    signal_seconds: int | None = integer(None)
    max_requeues: int | None = integer(None, 0)
    max_running: int | None = integer(None)
    dry_run: bool = False


@dataclasses.dataclass
class KNNProbe:
    name: str = one_of("knn", "knn")
    protocol: str | None = one_of(None, "dino_knn")
    k: Any = counts([20])
    temperature: Any = some([0.07], 1e-4)
    layer: int | None = integer(None, None)
    norm: bool = True
    center: bool = True
    bank: int | None = integer(None)
    test: int | None = integer(None)
    masks: str = one_of("none", "none", "largest", "first")


@dataclasses.dataclass
class LinearProbe:
    name: str = one_of("linear", "linear")
    protocol: str | None = one_of(None, "mae_linear", "dinov2_linear")
    inputs: Any = words(["pooled"], "pooled", "mean", "class1", "class1+mean", "class4", "class4+mean")
    layer: int | None = integer(None, None)
    norm: bool = True
    batch_norm: bool = True
    optimizer: str = one_of("sgd", "sgd", "lars", "adamw")
    lrs: list[float] = numbers([0.1], None, 1e-8, 1e4)
    weight_decays: list[float] = numbers([0.0], None, 0, 10)
    epochs: int = integer(50)
    steps: int | None = integer(None)
    warmup_epochs: float = number(0.0)
    batch_size: int = integer(1024)
    seeds: int = integer(3)
    bank: int | None = integer(None)
    test: int | None = integer(None)


POOLINGS = ("ep", "cls", "gap", "gem", "aim", "capi", "jepa", "vjepa2", "siglip", "cae", "cait", "coca", "clip",
            "abmilp", "simpool", "esimpool", "dinovit", "dolg", "cbam")  # fmt: skip
# With the class token in front of the patch tokens; cbam needs a square of them.
ALL_POOLINGS = (*POOLINGS, *(f"{name}_all" for name in POOLINGS if name not in ("cls", "cbam")))


@dataclasses.dataclass
class LayerwiseProbe:
    name: str = one_of("layerwise", "layerwise")
    pooling: str = one_of("gap", *ALL_POOLINGS)
    queries: Any = counts([32])
    num_heads: int | None = integer(None)
    layers: Any = layers(None)
    norm: bool = True
    optimizer: str = one_of("adamw", "adamw", "lars", "sgd")
    lrs: list[float] = numbers([0.001], None, 1e-8, 1e4)
    weight_decays: list[float] = numbers([0.0], None, 0, 10)
    epochs: int = integer(30)
    warmup_epochs: float = number(3.0)
    batch_size: int = integer(512)
    max_batch: int | None = integer(None)
    seeds: int = integer(3)
    bank: int | None = integer(None)
    test: int | None = integer(None)


@dataclasses.dataclass
class AttentiveProbe(LayerwiseProbe):
    name: str = one_of("attentive", "attentive")
    protocol: str | None = one_of(None, "ep_lars")


@dataclasses.dataclass
class FinetuneProbe:
    name: str = one_of("finetune", "finetune")
    protocol: str | None = one_of(None, "mae_finetune", "convnextv2_finetune", "spark_finetune")
    pool: str | None = one_of(None, "avg", "token")
    lrs: list[float] = numbers([0.001], None, 1e-8, 1e4)
    layer_decays: list[float] | None = numbers(None, None, 0.01, 1)
    grouping: str = one_of("single", "single", "group")
    weight_decay: float = number(0.05)
    epochs: int = integer(20)
    warmup_epochs: float = number(2.0)
    warmup_start: float = number(0.0, 0, 1)
    min_lr: float = number(1e-6)
    batch_size: int = integer(128, 2)
    max_batch: int | None = integer(None)
    drop_path: float | None = number(None, 0, 0.95)
    scale: list[float] = numbers([0.25, 1.0], 2, 0.01, 1, rising=True)
    flip: float = number(0.5, 0, 1)
    augment: str | None = policy(None)
    erase: float = number(0.0, 0, 1)
    mixup: float = number(0.0)
    cutmix: float = number(0.0)
    smoothing: float = number(0.1, 0, 0.9)
    repeats: int = integer(1)
    ema: float | None = number(None, 0, 0.999999)
    clip: float | None = number(None, 1e-6)
    curve: int = integer(1, 0)
    seeds: int = integer(3)
    save: bool = False
    bank: int | None = integer(None, 2)
    test: int | None = integer(None)


@dataclasses.dataclass
class LowShotProbe:
    name: str = one_of("lowshot", "lowshot")
    layer: int | None = integer(None, None)
    norm: bool = True
    shots: Any = counts([1, 2, 5, 10])
    percent: list[float] | None = numbers(None, None, 0.001, 100)
    classifiers: Any = words(["logistic", "knn"], "logistic", "knn")
    costs: list[float] = numbers([0.1, 1, 10], None, 1e-8, 1e8)
    folds: int = integer(5, 2)
    temperature: float = number(0.07, 1e-4)
    seeds: int = integer(5)
    bank: int | None = integer(None)
    test: int | None = integer(None)


@dataclasses.dataclass
class RetrievalProbe:
    name: str = one_of("retrieval", "retrieval")
    layer: int | None = integer(None, None)
    norm: bool = True
    gallery: str = one_of("train", "train", "test")
    center: bool = True
    bank: int | None = integer(None)
    test: int | None = integer(None)


@dataclasses.dataclass
class RotationProbe:
    name: str = one_of("rotation", "rotation")
    lrs: list[float] = numbers([0.1], None, 1e-8, 1e4)
    epochs: int = integer(20)
    batch_size: int = integer(1024)
    seeds: int = integer(3)
    bank: int | None = integer(None)
    test: int | None = integer(None)


@dataclasses.dataclass
class SegmentationProbe:
    name: str = one_of("segmentation", "segmentation")
    mode: str = one_of("sliding", "sliding", "whole")
    head: str = one_of("linear", "linear", "attentive")
    num_heads: int | None = integer(None)
    layer: int | None = integer(None, None)
    norm: bool = True
    batch_norm: bool = True
    lrs: list[float] | None = numbers(None, None, 1e-8, 1e4)
    weight_decay: float = number(0.0)
    epochs: int = integer(20)
    batch_size: int = integer(16)
    ignore: int = integer(255, 0, 65535)
    seeds: int = integer(3)
    bank: int | None = integer(None)
    test: int | None = integer(None)


@dataclasses.dataclass
class BankConfig:
    folder: str | None = None
    max_gb: float = number(50.0, 1e-9)
    dtype: str = one_of("float32", "float32", "float16")
    precision: str = one_of("32-true", "32-true", "bf16-mixed", "16-mixed")
    channels_last: bool = False
    keep: bool = True


@dataclasses.dataclass
class ViewKind:
    n: int | None = integer(None, 0, 32)
    size: int | None = integer(None, 8)
    scale: list[float] | None = numbers(None, 2, 0.01, 1, rising=True)


@dataclasses.dataclass
class CheckpointConfig:
    every_n_steps: int | None = integer(None)
    every_n_minutes: float | None = number(10, 0)
    keep_last: int = integer(2)
    keep_best: bool = True


@dataclasses.dataclass
class OnlineKNN:
    every_n_steps: int | None = integer(None, 0)
    bank: int = integer(2000)
    queries: int = integer(1000)
    k: int = integer(20)
    temperature: float = number(0.07, 1e-4)


@dataclasses.dataclass
class Pictures:
    every_n_steps: int | None = integer(None, 0)


@dataclasses.dataclass
class Train:
    objective: Any = None
    backbone: Any = None
    data: Any = None
    adapt: Any = None
    optim: Any = None
    trainer: Any = None
    logger: Any = None
    launcher: Any = None
    run_dir: str | None = None
    seed: int = integer(0, 0)
    batch_size: int | None = integer(None)
    max_steps: int | None = integer(None)
    max_epochs: float | None = number(None, 1e-6)
    max_images: int | None = integer(None)
    image_size: int | None = integer(None, 8)
    num_workers: int | None = integer(None, 0)
    init_from: str | None = None
    deterministic: str = one_of("data", "data", "exact")
    allow_change: bool = False
    log_every_n_steps: int | None = integer(None)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    knn: OnlineKNN = dataclasses.field(default_factory=OnlineKNN)
    pictures: Pictures = dataclasses.field(default_factory=Pictures)
    eval: dict[str, Any] = dataclasses.field(default_factory=dict)
    views: dict[str, ViewKind] = dataclasses.field(default_factory=lambda: {"global": ViewKind(), "local": ViewKind()})


@dataclasses.dataclass
class Bench(Train):
    seconds: float = number(5, 0.1)


@dataclasses.dataclass
class Judged:
    """What the probe command and an entry of `eval` have in common: how a frozen backbone is judged."""

    probe: Any = None
    data: Any = None
    which: str | None = one_of(None, "student", "teacher")
    image_size: int | None = integer(None, 8)
    batch_size: int = integer(256)
    num_workers: int | None = integer(None, 0)
    seed: int = integer(0, 0)
    bank: BankConfig = dataclasses.field(default_factory=BankConfig)


@dataclasses.dataclass
class MaskShards:
    train: Any = _field(None, "a shard pattern such as /d/train-{000000..000099}.tar or a list of them", _patterns)
    val: Any = _field(None, "a shard pattern such as /d/val-{000000..000009}.tar or a list of them", _patterns)


PROBES = ("knn", "linear", "layerwise", "lowshot", "retrieval", "rotation", "segmentation", "finetune")


@dataclasses.dataclass
class Table:
    data: Any = None
    checkpoint: Any = None
    probes: Any = words(["knn", "linear", "ep"], *PROBES, *ALL_POOLINGS)
    set: str | None = None
    masks: MaskShards = dataclasses.field(default_factory=MaskShards)
    seeds: int | None = integer(None)
    images: int | None = integer(None)
    test_images: int | None = integer(None)
    step: Any = kept_step()
    which: str | None = one_of(None, "student", "teacher")
    image_size: int | None = integer(None, 8)
    batch_size: int = integer(256)
    num_workers: int | None = integer(None, 0)
    seed: int = integer(0, 0)
    out: str | None = None
    device: str = device("auto")
    bank: BankConfig = dataclasses.field(default_factory=BankConfig)


@dataclasses.dataclass
class Probe(Judged):
    adapt: Any = None
    launcher: Any = None
    checkpoint: str | None = None
    step: Any = kept_step()
    out: str | None = None
    device: str = device("auto")


@dataclasses.dataclass
class Eval(Judged):
    """One entry of `eval` in a training: when and how as well."""

    every_n_steps: int | None = integer(None)
    at: Any = counts(None)
    how: str = one_of("process", "inline", "process", "slurm")
    device: str | None = device(None)
    threads: int | None = integer(None)
    max_running: int = integer(1)
    sbatch: Any = dashed()


@dataclasses.dataclass
class Export:
    checkpoint: str | None = None
    step: Any = kept_step()
    which: str | None = one_of(None, "student", "teacher")
    out: str | None = None
    format: str = one_of("timm", "timm", "onnx")
    overwrite: bool = False


@dataclasses.dataclass
class Import:
    backbone: Any = None
    source: str | None = None
    out: str | None = None
    image_size: int | None = integer(None, 8)
    mean: list[float] | None = numbers(None, None, -1e4, 1e4)
    std: list[float] | None = numbers(None, None, 1e-6, 1e4)
    overwrite: bool = False


@dataclasses.dataclass
class Prepare:
    kind: str | None = one_of(None, "folder", "list", "shards", "scenes")
    source: Any = _field(None, "a folder, a text file of paths, or a shard pattern", _patterns)
    out: str | None = None
    size: int | None = integer(None, 8)
    quality: int = integer(90, 1, 100)
    val_fraction: float = number(0.0, 0, 0.9)
    samples_per_shard: int = integer(10000)
    workers: int | None = integer(None, 0)
    labels: str = one_of("auto", "auto", "none")
    seed: int = integer(0, 0)
    count: int = integer(5000)
    image_size: int = integer(64, 16)


@dataclasses.dataclass
class Proposals:
    data: Any = None
    checkpoint: str | None = None
    step: Any = kept_step()
    which: str | None = one_of(None, "student", "teacher")
    image_size: int | None = integer(None, 8)
    features: str = one_of("keys", "keys", "tokens")
    center: bool = True
    tau: float = number(0.15, -1, 1)
    objects: int = integer(3, 1, 254)
    min_area: float = number(0.01, 0, 0.9)
    map_size: int = integer(256, 8)
    split: str = one_of("train", "train", "val")
    batch_size: int = integer(64)
    num_workers: int | None = integer(None, 0)
    device: str = one_of("auto", "auto", "cpu", "gpu", "cuda", "mps")
    out: str | None = None


@dataclasses.dataclass
class Analysis:
    data: Any = None
    checkpoint: str | None = None
    step: Any = kept_step()
    which: str | None = one_of(None, "student", "teacher")
    against: str | None = None
    against_step: Any = kept_step()
    against_which: str | None = one_of(None, "student", "teacher")
    images: int = integer(512, 4)
    image_size: int | None = integer(None, 8)
    blocks: list[float] | None = numbers(None, None, -1000, 1000)
    batch_size: int = integer(64, 4)
    num_workers: int | None = integer(None, 0)
    device: str = one_of("auto", "auto", "cpu", "gpu", "cuda", "mps")
    out: str | None = None


@dataclasses.dataclass
class Index:
    data: Any = None


@dataclasses.dataclass
class Doctor:
    data: Any = None
    run_dir: str | None = None
    num_workers: int | None = integer(None, 0)


@dataclasses.dataclass
class Replay:
    batch: str | None = None
    device: str = device("cpu")


COMMANDS = {
    "train": Train,
    "bench": Bench,
    "probe": Probe,
    "table": Table,
    "eval": Eval,
    "export": Export,
    "import": Import,
    "prepare": Prepare,
    "proposals": Proposals,
    "analysis": Analysis,
    "index": Index,
    "replay": Replay,
    "doctor": Doctor,
}
# The schema of a group's option; a single class where all options share it.
SCHEMAS: dict[str, Any] = {
    "objective": {
        "mae": MAE,
        "dino": DINO,
        "ibot": IBOT,
        "selfpatch": SelfPatch,
        "odis": ODIS,
        "ijepa": IJEPA,
        "dmt_jepa": DMTJEPA,
        "cim": CIM,
        "glare": GLARE,
    },
    "backbone": BackboneConfig,
    "data": {"shards": Data, "folder": Data, "scenes": Scenes},
    "adapt": {
        "none": NoAdapter,
        "uniadapter": UniAdapter,
        "adaptformer": AdaptFormer,
        "lora": LoRA,
        "apla": APLA,
        "bitfit": BitFit,
    },
    "optim": AdamW,
    "trainer": Trainer,
    "logger": Logger,
    "launcher": {"local": Local, "slurm": Slurm},
    "probe": {
        "knn": KNNProbe,
        "linear": LinearProbe,
        "attentive": AttentiveProbe,
        "layerwise": LayerwiseProbe,
        "finetune": FinetuneProbe,
        "lowshot": LowShotProbe,
        "retrieval": RetrievalProbe,
        "rotation": RotationProbe,
        "segmentation": SegmentationProbe,
    },
}
DURATIONS = ("max_steps", "max_epochs", "max_images")
# Last words of keys that may differ between the processes of a run: places (what is there is compared), and what is
# decided by each process or by the first one.
PER_PROCESS = (
    *("run_dir", "train", "val", "root", "root_val", "objects", "index_dir", "cache", "cache_gb", "retries", "timeout"),
    *("allow_change", "num_workers", "devices", "compile", "hang_minutes", "logger", "launcher"),
)
# Where it runs, how fast, what it writes: may differ on resume and leaves the name of the run folder alone.
# The recipe and the backbone's decoder are defaults: what they led to stands in the keys that they filled.
NOT_IN_RESULT = (
    *("run_dir", "allow_change", "num_workers", "log_every_n_steps", "trainer", "logger", "launcher"),
    *("checkpoint", "knn", "pictures", "eval", "objective.recipe", "backbone.decoder", "backbone.local_size"),
    *("backbone.context_size", "backbone.exemplar_size"),
    *("data.max_bad_fraction", "data.index_dir", "data.cache", "data.cache_gb", "data.retries", "data.timeout"),
)
