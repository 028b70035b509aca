"""Trains a classifier with any backbone on class folders, and resumes.

    python scripts/train.py --data-dir data/sample/ILSVRC/Data/CLS-LOC --recipe quick
    torchrun --nproc-per-node 8 scripts/train.py --data-dir ILSVRC/Data/CLS-LOC \\
        --recipe imagenet --output-dir runs/imagenet

With --dry-run it tells what it would do, takes two steps, estimates the time of the whole run, and
writes nothing.

The folder holds train/ and val/, each with one folder per class; scripts/imagenet.py sorts
ImageNet's flat val/. Shards are scripts/make_shards.py's, on a disk or behind a command:

    --data-dir "shards/{train-{000000..001281},val-{000000..000049}}.tar"
    --data-dir "pipe:aws s3 cp s3://bucket/{train-{000000..001281},val-{000000..000049}}.tar -"

Stopped at any moment, the same command with the same --output-dir goes on and
ends in the same weights.

SIGINT or SIGTERM saves and stops; the same signal again, or one before the training, ends it at
once.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import Parser, exit_code, int_at_least

# isort: split
import torch

from backbones import create_classifier
from backbones.deploy import keep_freed_memory, optimize
from utils import distributed, recipe
from utils.data import open_data
from utils.records import command_line
from utils.training import loop, rehearsal


def parse(argv: list[str] | None) -> argparse.Namespace:
    preset = Parser(None, add_help=False)
    preset.add_argument(
        "--recipe", default="imagenet", choices=recipe.RECIPES, help="preset to start from"
    )
    chosen = preset.parse_known_args(argv)[0].recipe
    parser = Parser(__doc__, parents=[preset])
    add = parser.add_argument
    add("--data-dir", required=True, help="folder with train/ and val/, or shards: a brace pattern")
    add("--output-dir", type=Path, help="the run's folder (default: a new one in runs/)")
    add("--backbone", default="cspdarknet19", help="a name of backbones.list_models()")
    add(
        "--seed",
        type=int_at_least(0),
        default=0,
        help="of weights, order and augmentation (default: 0)",
    )
    add(
        "--workers",
        type=int_at_least(0),
        default=default_workers(),
        help="decoding processes; 0: threads of the run itself (%(default)s)",
    )
    add("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    add("--skip-corrupt", action="store_true", help="leave out and list unreadable images")
    add("--compile", action="store_true", help="torch.compile: slow to start, for long runs")
    add("--sync-batchnorm", action="store_true", help="BatchNorm over the images of all GPUs")
    add(
        "--checkpoint-steps",
        type=int_at_least(1),
        default=0,
        metavar="N",
        help="also save every N steps (default: at the ends of epochs)",
    )
    add(
        "--keep-every",
        type=int_at_least(1),
        default=0,
        metavar="N",
        help="keep every N-th epoch's checkpoint, beside last and best",
    )
    add(
        "--timeout-s",
        type=int_at_least(1),
        default=600,
        metavar="S",
        help="end after so long a wait for a process, seconds (default: %(default)s)",
    )
    add("--tensorboard", action="store_true", help="also log for TensorBoard")
    add("--dry-run", action="store_true", help="two steps and an estimate; nothing is written")
    recipe.add_arguments(parser, chosen)
    args = parser.parse_args(argv)
    if args.output_dir is None:
        # Every process, and every restart, must mean the same one.
        if distributed.launched() and not args.dry_run:
            parser.error("--output-dir is needed with torchrun")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        args.output_dir = Path("runs") / f"{stamp}-{args.backbone}-{args.recipe}"
    return args


def default_workers() -> int:
    """Enough to feed a GPU. Beside a CPU, whose cores train: one, or none where it would be in
    their way (two cores: evaluation 15 % slower with one).
    """
    cores = os.cpu_count() or 1
    if torch.cuda.is_available():
        return min(8, cores)
    return int(cores > 2)


def train(args: argparse.Namespace) -> None:
    chosen = recipe.from_arguments(args, args.recipe)
    options = chosen.backbone_options
    device = distributed.pick_device(args.device)
    data = open_data(args.data_dir, chosen, args.seed)
    torch.manual_seed(args.seed)
    model = create_classifier(args.backbone, len(data.classes), **options)
    keep_freed_memory()  # every step allocates the same
    how = {
        "seed": args.seed,
        "workers": args.workers,
        "device": device,
        "skip_corrupt": args.skip_corrupt,
        "compile": args.compile,
        "sync_batchnorm": args.sync_batchnorm,
        "optimize": optimize,
        "timeout_s": args.timeout_s,
    }
    with distributed.process_group(device, args.timeout_s):
        if args.dry_run:
            rehearsal.rehearse(model, data, chosen, name=args.backbone, **how)
            return
        trainer = loop.fit(
            model,
            data,
            chosen,
            args.output_dir,
            config={
                "backbone": args.backbone,
                "options": options,
                "command": command_line(),
                "data_dir": args.data_dir,
            },
            checkpoint_steps=args.checkpoint_steps,
            keep_every=args.keep_every,
            tensorboard=args.tensorboard,
            **how,
        )
        if distributed.rank() == 0:
            report(trainer, args.output_dir)


def report(trainer: loop.Trainer, run_dir: Path) -> None:
    for message in trainer.skipped:
        print(f"skipped: {message}")
    if trainer.skip_corrupt:
        print(f"{len(trainer.skipped)} unreadable images were skipped")
    row, figure = trainer.metrics[-1], run_dir / "curves.png"
    print(f"validation top-1: raw {row['val_top1_pct']:.2f} %, EMA {row['ema_val_top1_pct']:.2f} %")
    from utils import plotting  # a second's work, which a run's start is spared

    plotting.save(plotting.plot_curves(trainer.metrics), figure)
    print(f"run: {run_dir}   curves: {figure}")


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: train(parse(argv)), loop.SMALLER)


if __name__ == "__main__":
    sys.exit(main())
