"""Trains a classifier with any backbone on class folders or shards, and resumes.

    python scripts/train.py --data-dir data/sample/ILSVRC/Data/CLS-LOC --recipe quick
    torchrun --nproc-per-node 8 scripts/train.py --data-dir ILSVRC/Data/CLS-LOC \\
        --recipe imagenet --output-dir runs/imagenet

Fine-tuning starts from published or own weights, with a new head for the classes of the folder:

    python scripts/train.py --data-dir photos --val-share 0.2 --recipe finetune \\
        --backbone mobilenet_v2 --weights IMAGENET1K_V2

With --dry-run it prints what it would do, takes a few steps, estimates the time of the complete run
and writes nothing.

The folder holds train/ and val/, each with one folder per class, or with --val-share the folders of
the classes alone. scripts/imagenet.py sorts ImageNet's flat val/. Shards come from
scripts/make_shards.py, on a disk or through a command:

    --data-dir "shards/{train-{000000..001281},val-{000000..000049}}.tar"
    --data-dir "pipe:aws s3 cp s3://bucket/{train-{000000..001281},val-{000000..000049}}.tar -"

A run that was stopped at any moment resumes with the same command and --output-dir. On class
folders it ends in the same weights as without the stop.

SIGINT or SIGTERM saves and stops; the same signal again interrupts at once.
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import DataError, Parser, backbone_option, exit_code, int_at_least, share, summarize

# isort: split
import torch

from backbones import create, list_options
from backbones.base import Backbone
from backbones.classifier import Classifier
from backbones.deploy import keep_freed_memory
from utils import distributed, recipe
from utils.data import open_data
from utils.data.folders import Splits
from utils.records import command_line, file_digest
from utils.training import loop
from utils.training.checkpoint import Trained, load_trained

# Arguments that `fit` and `dry_run` take, and those of `fit` alone.
SHARED = ("seed", "workers", "skip_corrupt", "compile", "sync_batchnorm", "eval_every", "timeout_s")
FIT_ONLY = ("checkpoint_steps", "keep_every", "tensorboard")


def parse(argv: list[str] | None) -> argparse.Namespace:
    preset = Parser(None, add_help=False)
    preset.add_argument("--recipe", default="imagenet", choices=recipe.RECIPES,
        help="the preset (default: %(default)s)")  # fmt: skip
    chosen = preset.parse_known_args(argv)[0].recipe
    parser = Parser(__doc__, parents=[preset])
    add, count = parser.add_argument, int_at_least(1)
    add("--data-dir", required=True, help="folder with train/ and val/, or with a folder "
        "per class for --val-share, or shards: a brace pattern")  # fmt: skip
    add("--val-share", type=share, default=0.0, metavar="SHARE", help="hold out this share of each "
        "class for validation, where there is no val/: 0.2 takes every fifth by name")  # fmt: skip
    add("--output-dir", type=Path, help="folder of the run (default: a new one in runs/)")
    add("--backbone", help="a name of backbones.list_models() (default: cspdarknet19)")
    add("--weights", help="start from these weights of the backbone: a file, such as a run's "
        "last.pt, or a name of backbones.list_weights(); the head is new")  # fmt: skip
    add("--init-from", type=Path, metavar="RUN", help="start a new run, by --recipe, from the EMA "
        "weights of a run on the same classes, its backbone and head")  # fmt: skip
    add("--option", action="append", default=[], type=backbone_option, metavar="KEY=VALUE",
        help="an option of the backbone, such as act=mish; repeatable")  # fmt: skip
    add("--seed", type=int_at_least(0), default=0, help="random seed (default: 0)")
    add("--workers", type=int_at_least(0), default=default_workers(), help="processes that decode "
        "images; 0 decodes in threads (default: %(default)s)")  # fmt: skip
    add("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    add("--skip-corrupt", action="store_true", help="skip and list unreadable images")
    add("--compile", action="store_true", help="torch.compile: slow to start, for long runs")
    add("--sync-batchnorm", action="store_true", help="BatchNorm over the images of all GPUs")
    add("--eval-every", type=int_at_least(0), default=1, metavar="N", help="evaluate after every N "
        "epochs and after the last; 0: after the last alone (default: 1)")  # fmt: skip
    add("--checkpoint-steps", type=count, default=0, metavar="N", help="also save every N steps "
        "(default: at the ends of epochs)")  # fmt: skip
    add("--keep-every", type=count, default=0, metavar="N", help="keep the checkpoint of every N-th"
        " epoch beside the last and the best")  # fmt: skip
    add("--timeout-s", type=count, default=600, metavar="S", help="timeout in seconds for "
        "workers and other processes (default: %(default)s)")  # fmt: skip
    add("--tensorboard", action="store_true", help="also log for TensorBoard")
    add("--dry-run", action="store_true", help="a few steps and an estimate; nothing is written")
    recipe.add_arguments(parser, chosen)
    args = parser.parse_args(argv)
    args.option = dict(args.option)
    if args.init_from and (args.backbone or args.weights or args.option or args.width):
        parser.error("--init-from takes backbone, options and weights from the run: omit them")
    if args.width and "width" in args.option:
        parser.error("--width and --option width=... are the same: give one")
    args.width = args.option.pop("width", args.width)
    args.backbone = args.backbone or (None if args.init_from else "cspdarknet19")
    if args.output_dir is None:
        # All processes, and all restarts, must use the same folder.
        if distributed.launched() and not args.dry_run:
            parser.error("--output-dir is needed with torchrun")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = args.backbone or args.init_from.name
        args.output_dir = Path("runs") / f"{stamp}-{name}-{args.recipe}"
    return args


def default_workers() -> int:
    """Up to 8 for a GPU. On a CPU training needs the cores: 1, or 0 where there are only two."""
    cores = os.cpu_count() or 1
    return min(8, cores) if torch.cuda.is_available() else int(cores > 2)


def choose_recipe(args: argparse.Namespace) -> recipe.Recipe:
    takes_width = args.backbone and "width" in list_options(args.backbone)
    if args.width is None and (args.weights or not takes_width):
        args.width = 1.0  # the preset's width is for families that take one, without weights
    chosen = recipe.from_arguments(args, args.recipe)
    if chosen.freeze >= 0 and not (args.weights or args.init_from):
        raise ValueError(f"--freeze {chosen.freeze} would keep random weights: give --weights")
    return chosen


def open_backbone(
    args: argparse.Namespace, chosen: recipe.Recipe, device: torch.device
) -> tuple[Backbone, Trained | None, dict[str, Any]]:
    """The backbone, the run that training starts from, if any, and what the config records."""
    if not args.init_from:
        options = {**chosen.backbone_options, **args.option}
        config = {"backbone": args.backbone, "options": options, "weights": args.weights}
        return create(args.backbone, weights=args.weights, **options), None, config
    path = args.init_from / "last.pt" if args.init_from.is_dir() else args.init_from
    source = load_trained(path, device)
    config = {"backbone": source.backbone, "options": source.options}
    config |= {"init_from": str(args.init_from), "init_from_sha256": file_digest(path)}
    return source.ema.backbone, source, config


def add_head(
    args: argparse.Namespace, backbone: Backbone, source: Trained | None, data: Splits
) -> Classifier:
    """A new head for the classes of the images, or that of the run that training starts from."""
    if source is None:
        return Classifier(backbone, len(data.classes))
    if differing := set(data.classes) ^ set(source.classes):
        raise DataError(
            f"{args.data_dir}: other classes than the run's: {summarize(sorted(differing))}; "
            "--weights with its last.pt starts with a new head"
        )
    if args.val_share:
        source.warn_of_other_images(args.data_dir, data.val.digest())
    return source.ema


def train(args: argparse.Namespace) -> None:
    chosen, device = choose_recipe(args), distributed.pick_device(args.device)
    torch.manual_seed(args.seed)
    backbone, source, config = open_backbone(args, chosen, device)
    for field in ("mean", "std") if backbone.preprocessing else ():
        if getattr(args, field) is None:
            value = getattr(backbone.preprocessing, field)
            chosen = dataclasses.replace(chosen, **{field: value})
    data = open_data(args.data_dir, chosen, args.seed, args.val_share)
    model = add_head(args, backbone, source, data)
    keep_freed_memory()  # every step allocates the same
    names = SHARED if args.dry_run else (*SHARED, *FIT_ONLY)
    settings = {"device": device, **{name: getattr(args, name) for name in names}}
    with distributed.process_group(device, args.timeout_s):
        if args.dry_run:
            loop.dry_run(model, data, chosen, name=config["backbone"], **settings)
            return
        if distributed.rank() == 0:
            print(data.describe(chosen.batch_size))
        config |= {"val_share": args.val_share or None, "data_dir": args.data_dir}
        config["command"] = command_line()
        trainer = loop.fit(model, data, chosen, args.output_dir, config=config, **settings)
        if distributed.rank() == 0:
            report(trainer, args.output_dir)


def report(trainer: loop.Trainer, run_dir: Path) -> None:
    from utils import plotting  # matplotlib takes a second to import

    for message in trainer.skipped:
        print(f"skipped: {message}")
    if trainer.skip_corrupt:
        print(f"{len(trainer.skipped)} unreadable images were skipped")
    row, figure = trainer.metrics[-1], run_dir / "curves.png"
    print(f"validation top-1: raw {row['val_top1_pct']:.2f} %, EMA {row['ema_val_top1_pct']:.2f} %")
    plotting.save(plotting.plot_curves(trainer.metrics), figure)
    print(f"run: {run_dir}   curves: {figure}")


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: train(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
