"""The command line: `selfsight <command> [key=value …]`, and `python train.py [key=value …]`, which says the same.

What a command needs is imported only when it runs, so that `--help` and a config error answer in about a second.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from textwrap import wrap
from typing import Any

COMMANDS = {
    "train": "selfsight.training.run:train",
    "probe": "selfsight.probes.run:probe",
    "table": "selfsight.probes.table:table",
    "export": "selfsight.interop.export:export",
    "import": "selfsight.interop.convert:convert",
    "prepare": "selfsight.data.prepare:prepare",
    "proposals": "selfsight.proposals:proposals",
    "index": "selfsight.data.manifest:index",
    "replay": "selfsight.training.replay:replay",
    "bench": "selfsight.bench:bench",
    "show": "selfsight.show:show",
    "show analysis": "selfsight.analysis.run:analyse",
    "doctor": "selfsight.doctor:doctor",
}

OVERVIEW = """\
usage: selfsight <command> [key=value …]        selfsight <command> --help

  train      pretrain a backbone on images                    selfsight train objective=mae backbone=vit_s
  probe      accuracy or mIoU of a frozen backbone            selfsight probe checkpoint=runs/my-run
  table      many probes of several backbones side by side    selfsight table checkpoint=[runs/a,runs/b]
  export     a folder that timm opens                         selfsight export checkpoint=runs/my-run out=my-model
  import     official weights to a folder that timm opens     selfsight import source=/d/dino.pth out=my-model
  prepare    images to well-formed shards                     selfsight prepare folder source=/d/images out=/d/shards
  proposals  object masks from a backbone's own features      selfsight proposals checkpoint=runs/my-run out=/d/objects
  replay     repeat a step that was not finite               selfsight replay batch=runs/my-run/nonfinite-….safetensors
  index      index shards ahead of time                       selfsight index data.train='/d/train-{000..099}.tar'
  bench      speed of model, data, and both                   selfsight bench backbone=vit_s
  show       summaries of run folders                         selfsight show runs/*
  show analysis  attention, rank, CKA … of a backbone         selfsight show analysis checkpoint=runs/my-run
  doctor     what works on this machine                       selfsight doctor

  --help  --version  --cfg job (print the whole config and stop)
"""

TRAIN_KEYS = """\
what         objective=   {objective}
             backbone=    vit_nano vit_ti vit_s vit_b vit_l vit_h   shvit_s1 … shvit_s4
                          convnext_tiny … convnext_large   convnextv2_atto … convnextv2_huge
                          convnext_nano_lite convnextv2_nano_lite shvit_nano_lite
                          timm backbone.name=<any timm model>
             backbone.patch_size= .embed_dim= .depth= .num_heads=   image_size=
adapt        adapt=       {adapt}   (all else is frozen)
data         data=        {data}
             data.train= data.val=   shard patterns        data.root= data.root_val=   folder, or text file of paths
             data.mean= data.std=    numbers, or auto      num_workers=
start        init_from=   official checkpoint (MAE, DINO, iBOT, DINOv2, I-JEPA …), run folder, timm folder or name
how long     max_steps=  or  max_epochs=  or  max_images=  batch_size= (over all processes)   seed=
optimizer    optim.base_lr= (lr = base_lr * batch_size / 256)  optim.lr=  optim.weight_decay=
             optim.warmup= (100 | 5% | 40ep)   optim.clip=
machine      trainer.devices= trainer.num_nodes= trainer.accelerator= trainer.precision= trainer.strategy=
             trainer.compile= trainer.max_batch_per_device=   deterministic= (data | exact)
run folder   run_dir=   checkpoint.every_n_steps=   checkpoint.keep_last=   allow_change=
             log_every_n_steps=   knn.every_n_steps= (0 = off)   logger= {logger}
on the way   eval.<name>.every_n_steps= | .at=[1000,5000]   eval.<name>.probe=   .how= process | inline | slurm
"""

HELP = {
    "train": """\
Pretrain a backbone. The same command on the same run folder resumes.

  {call}                                                  a few minutes on built-in images
  {call} objective=mae backbone=vit_s data=folder data.root=/d/images
  {call} backbone=vit_b data=shards data.train='/d/train-{{000000..000099}}.tar' trainer.devices=8
  {call} experiment=mae_vit_b data.train='/d/train-{{000000..000099}}.tar'

"""
    + TRAIN_KEYS
    + """\
as a job     launcher=slurm launcher.nodes= .gpus_per_node= .partition= .minutes= .dry_run=     an array: -m seed=0,1,2
recipes      experiment=  {experiment}

Everything else of a method is under objective.   --cfg job prints the whole config.
""",
    "bench": """\
Images per second of the model alone, the data alone, and both; says which binds.

  {call} backbone=vit_s batch_size=256
  {call} data=folder data.root=/d/images seconds=20

seconds=5    how long each part is measured; all keys of a training run apply:
"""
    + TRAIN_KEYS,
    "probe": """\
Accuracy (segmentation: mIoU) of a frozen backbone, or of a fine-tuned one; writes <out>/<probe>.json.

  {call} checkpoint=runs/my-run step=best
  {call} checkpoint=runs/my-run probe=linear data=folder data.root=/d/train data.root_val=/d/val
  {call} checkpoint=vit_small_patch16_224.dino data=shards data.train='/d/train-{{000..099}}.tar' out=probes

what         checkpoint=  run folder, export folder, or the name of a timm model
             step= last | best | <number>   which checkpoint of a run folder          which= student | teacher
how          probe=       {probe}
             probe.k=[10,20]   probe.masks=   probe.lrs=[0.1,0.3]   probe.epochs=   probe.protocol=
             fine-tuning: probe.layer_decays=   probe.mixup=   probe.max_batch=   probe.save=
data         data=        {data}   (left out: what the run was trained on)
             data.train= data.val= data.root= data.root_val=
             image_size=  batch_size=  num_workers=  seed=  device=
features     bank.folder= bank.max_gb= bank.dtype= bank.precision=   stored once, used by every probe
result       out=         folder for the JSON
as a job     launcher=slurm launcher.partition= .minutes= .dry_run=     an array: -m step=1000,2000 probe=knn,linear
""",
    "table": """\
Many probes of one or several frozen backbones: one pass over the images for all, one table.

  {call} checkpoint=runs/my-run
  {call} checkpoint=[runs/mae,runs/dino] data=shards data.train='/d/train-*.tar' data.val='/d/val-*.tar'
  {call} checkpoint=runs/my-run probes=[knn,segmentation] masks.train='/d/train-*.tar' masks.val='/d/val-*.tar'

what         checkpoint=  run folders, export folders or timm models: one, or [several]
             step= last | best | <number>           which= student | teacher
rows         probes=      knn linear layerwise lowshot retrieval rotation segmentation finetune, and poolings
             set='<row>.<key>=<value> …'   keys of single rows      seeds=      images=
data         data=        {data}   (left out: what each run was trained on; keys as for probe)
             masks.train= masks.val=     shards with mask.png for the row segmentation
             image_size=  batch_size=  num_workers=  seed=  device=
features     bank.folder= bank.max_gb= bank.dtype= bank.precision=
result       out=         folder of table.md, table.json, layers.svg and the JSON of every row
""",
    "export": """\
Write a folder that timm.create_model('local-dir:<out>', pretrained=True) opens.

  {call} checkpoint=runs/my-run out=my-model
  {call} checkpoint=runs/my-run out=my-model.onnx format=onnx

checkpoint=  run folder (format=onnx: also an export folder or a timm model)
             step= last | best | <number>      which= student | teacher
out=         new folder or .onnx file      overwrite=true replaces an old one
format=      timm | onnx (pooled feature and patch tokens; needs the extra [onnx])
""",
    "import": """\
Official weights to a folder that timm.create_model('local-dir:<out>', pretrained=True) opens.

  {call} source=/d/dino_deitsmall16_pretrain.pth out=my-model
  {call} source=ijepa:student:/d/IN1K-vit.h.14-300e.pth.tar out=my-model
  {call} source=/d/tiny.pth backbone=vit_s backbone.embed_dim=96 backbone.num_heads=3 out=my-model

source=      [layout:][student:|teacher:]<file>, a folder that timm opens, or [timm:]<name of a timm model>
             layouts, told from the keys: mae dino ibot selfpatch dinov2 udi odis ijepa cim convnext fcmae spark shvit
             left out: the teacher (or average) of a file that has one
out=         new folder; overwrite=true replaces an old one
backbone=    what the weights are of (left out: told from the file)     backbone.pos_resize= timm | official
image_size=  other than that of the file's positions                    mean= std= that the weights have seen
""",
    "prepare": """\
Turn images into well-formed shards; broken files are listed in <out>/report.json.

  {call} folder source=/d/images out=/d/shards val_fraction=0.02 size=256
  {call} list source=/d/paths.txt out=/d/shards
  {call} shards source='/d/in-{{000..099}}.tar' out=/d/shards
  {call} scenes out=/d/scenes count=5000 image_size=64

input        kind= folder | list | shards | scenes (or the bare word)      source=      labels= auto | none
output       out=   samples_per_shard=10000   val_fraction=0   seed=   workers=
images       size= (shorter side; null keeps the bytes)   quality=90 (JPEG)
scenes       count=5000   image_size=64
""",
    "proposals": """\
Object masks from the features of a ViT, as side-cars of the data: <key>.objects.png under the same names.

  {call} checkpoint=runs/my-run
  {call} checkpoint=vit_small_patch16_224.dino center=false image_size=480 out=/d/objects

what         checkpoint=  run folder, export folder, or the name of a timm model
             step= last | best | <number>   which checkpoint of a run folder          which= student | teacher
data         data=        {data}   (left out: what the run was trained on; keys as for probe)
             split= train | val      image_size=  batch_size=  num_workers=  device=
how          objects=3 (at most)   tau=0.15   features= keys | tokens   center=true   min_area=0.01
result       out=         folder of the side-cars (left out: objects/ beside the shards)      map_size=256
             the same command continues; report.json and overlays.png say what came of it
""",
    "replay": """\
Repeat a step whose loss or gradient was not finite, and say where it first appears.

  {call} batch=runs/my-run/nonfinite-step-000000123-rank-0.safetensors

device=      cpu (float32), or gpu
""",
    "index": """\
Build the index side-cars of shards ahead of time.

  {call} data.train='/d/train-{{000000..000099}}.tar' data.val='/d/val-{{000000..000009}}.tar'

data.train= data.val=   shard patterns
data.index_dir=         where the side-cars go when the data folder is read-only
""",
    "show": """\
Print the summaries of run folders side by side, and what probes have found; curves go to show.svg (out=).

  {call} runs/*
  {call} runs/a/probes/knn.json runs/b/probes/knn.json
  {call} analysis --help                                  what goes on inside one backbone
""",
    "show analysis": """\
Attention, frequencies, rank, high-norm tokens and CKA of a frozen backbone, block by block: a page, and JSON.

  {call} checkpoint=runs/my-run
  {call} checkpoint=runs/my-mae against=runs/my-dino images=1000 out=mae-or-dino
  {call} checkpoint=vit_small_patch16_224.dino data=folder data.root=/d/images

what         checkpoint=  run folder, export folder, or the name of a timm model
             step= last | best | <number>   which checkpoint of a run folder          which= student | teacher
             against=     a second one to compare with            against_step=   against_which=
data         data=        {data}   (left out: what the run was trained on; keys as for probe)
             images=512 (fixed ones)   image_size=  batch_size=64  num_workers=  device=
result       out=         folder of analysis.html, analysis.json and the pictures (left out: <run folder>/analysis)
             blocks=[5,-1]   layers to draw
""",
    "doctor": """\
Check versions, devices, precision, data speed and disk space; exit code 1 when something would fail.

  {call}
  {call} data=shards data.train='/d/train-{{000000..000099}}.tar' run_dir=/scratch/runs

data=        {data}, with data.train= or data.root= : also read some samples
run_dir=     where runs will be written      num_workers=
""",
}


def main(command: str | None = None, argv: Sequence[str] | None = None) -> int:
    """Run one command. command: fixed by a script such as train.py, else the first argument. Returns the exit code:
    0, 2 for anything the user can mend (one sentence on stderr), or the command's own."""
    args = list(sys.argv[1:] if argv is None else argv)
    call = f"python {command}.py" if command else "selfsight"
    try:
        if "--version" in args:
            print(_version())
            return 0
        if command is None:
            if not args or args[0] in ("--help", "-h", "help"):
                print(OVERVIEW, end="")
                return 0
            command, args = _command(args[0]), args[1:]
            if command == "show" and args[:1] == ["analysis"]:  # a run folder of that name is ./analysis
                command, args = "show analysis", args[1:]
            call = f"selfsight {command}"
        if "--help" in args or "-h" in args:
            print(_help(command, call), end="")
            return 0
        return _run(command, args)
    except ValueError as error:
        if not _is_ours(error):
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # a run that ended early says why, and with which exit status
        if not (_is_ours(error) and hasattr(error, "code")):
            raise
        print(f"stopped: {error}", file=sys.stderr)
        return error.code


def _run(command: str, args: list[str]) -> int:
    args, print_only = _flags(args)
    rows = _rows(command, args)
    if print_only:
        from omegaconf import OmegaConf

        print("---\n".join(OmegaConf.to_yaml(cfg) for _, cfg in rows), end="")
        return 0
    cfg = rows[0][1]
    if "launcher" in cfg and cfg.launcher.name == "slurm":
        from .launch import submit

        return submit(command, rows)
    module, function = COMMANDS[command].split(":")
    result = getattr(import_module(module), function)(cfg)
    return result if isinstance(result, int) else 0


def _rows(command: str, args: list[str]) -> list[tuple[list[str], Any]]:
    """(words, config) of what was asked for; with -m of every combination of values."""
    if not {"-m", "--multirun"} & set(args):
        return [(args, _config(command, args))]
    from .config import ConfigError
    from .launch import sweep

    rows = [(words, _config(command, words)) for words in sweep(args)]
    if command not in ("train", "probe") or rows[0][1].launcher.name != "slurm":
        raise ConfigError(
            "multirun (-m) makes a job array of train or probe with launcher=slurm; without, start one command per "
            "run, for example from a shell loop"
        )
    return rows


def _sentence(error: Exception) -> str:
    """One line; of an error that comes out of a loader worker only the last line of the traceback it carries."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def _is_ours(error: BaseException) -> bool:
    """An error class of this package: a sentence for the user. Told by its module, so that nothing is imported."""
    return any(cls.__module__.partition(".")[0] == "selfsight" for cls in type(error).__mro__)


def _version() -> str:
    from . import __version__

    return f"selfsight {__version__}"


def _command(word: str) -> str:
    from .config import ConfigError, did_you_mean

    if word in COMMANDS:
        return word
    hint = "a command comes before key=value; " if "=" in word else ""
    raise ConfigError(
        f"unknown command {word!r}{did_you_mean(word, list(COMMANDS))} ({hint}valid: {', '.join(COMMANDS)})"
    )


def _help(command: str, call: str) -> str:
    from .config import options

    column, groups = "\n" + " " * 26, ("objective", "adapt", "data", "probe", "logger")
    words = {g: column.join(wrap(" | ".join(options(g)), 92)) for g in groups}
    recipes = options("experiment")
    rows = ["  ".join(recipes[i : i + 4]) for i in range(0, len(recipes), 4)]
    return HELP[command].format(call=call, experiment=column.join(rows), **words)


def _flags(args: list[str]) -> tuple[list[str], bool]:
    """Split off `--cfg job` (also `-c job`, `--cfg=job`)."""
    from .config import ConfigError

    rest, print_only, words = [], False, iter(args)
    for word in words:
        if word in ("--cfg", "-c", "--cfg=job"):
            value = "job" if "=" in word else next(words, None)
            if value != "job":
                raise ConfigError(f"--cfg {value or ''} is not known: write --cfg job to print the whole config")
            print_only = True
        elif word.startswith("-") and word not in ("-m", "--multirun"):
            raise ConfigError(f"unknown option {word}: there are --help, --version and --cfg job; keys are key=value")
        else:
            rest.append(word)
    return rest, print_only


def _config(command: str, args: list[str]) -> Any:
    from . import config

    if command == "show":
        return _runs(args)
    if command == "prepare" and args and args[0] in ("folder", "list", "shards", "scenes"):
        args = [f"kind={args[0]}", *args[1:]]
    return config.load(command.rpartition(" ")[2], args)


def _runs(args: list[str]) -> Any:
    from omegaconf import OmegaConf

    from .config import ConfigError

    if not args:
        raise ConfigError("show needs run folders, for example: selfsight show runs/*")
    out = next((word.removeprefix("out=") for word in args if word.startswith("out=")), None)
    runs = [word for word in args if not word.startswith("out=")]
    for word in runs:
        if "=" in word:
            raise ConfigError(f"show takes run folders and out=, not {word!r}, for example: selfsight show runs/*")
    return OmegaConf.create({"runs": runs, "out": out})
