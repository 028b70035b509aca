"""Measures this project against others, side by side on this machine.

    python scripts/benchmark.py --data-dir data/sample/ILSVRC/Data/CLS-LOC --train-crop-px 64
    taskset -c 0,1 python scripts/benchmark.py --data-dir ... --output results/benchmark_2cores.csv

`--task train`: images per second of scripts/train.py's loop and of the steps of torchvision's
reference script, from JPEG files to updated weights, by turns in one process on the CPU. Both train
the same network from the same weights, on the same files, at the same sizes and augmentations.
"""

import argparse
import copy
import dataclasses
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from backbones.classifier import create_classifier
from utils import measure, peers, recipe, runs, training
from utils.data import TrainBatches, make_loader, open_folders

PEER = "torchvision references/classification (float32, NCHW)"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", default="train", choices=("train",), help="what to measure (default: train)")
    add("--data-dir", type=Path, required=True, help="folder with train/ and val/")
    add("--backbone", default="cspdarknet19", help="a name of backbones.list_models()")
    add("--recipe", default="small", choices=recipe.RECIPES, help="preset (default: small)")
    add("--train-crop-px", type=int, help="side of the crops, pixels (default: the preset's)")
    add("--batch-size", type=int, default=32, help="images per step (default: 32)")
    add("--steps", type=int, default=12, help="timed steps per round and side (default: 12)")
    add("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    add("--workers", type=int, default=1, help="decoding processes of each side (default: 1)")
    add("--threads", type=int, default=2, help="of the training process (default: 2)")
    add("--output", type=Path, help="CSV file to write the result to (default: none)")
    return parser.parse_args(argv)


def benchmark_training(args: argparse.Namespace) -> tuple[measure.Throughputs, dict[str, object]]:
    """The rounds, and the row of results with all that it was measured on."""
    chosen = dataclasses.replace(recipe.RECIPES[args.recipe], batch_size=args.batch_size)
    if args.train_crop_px is not None:
        chosen = dataclasses.replace(chosen, train_crop_px=args.train_crop_px)
    data = open_folders(args.data_dir, chosen)
    batches = TrainBatches(len(data.train), chosen.batch_size, seed=0)
    torch.manual_seed(0)
    model = create_classifier(args.backbone, len(data.classes), **chosen.backbone_options)
    theirs = peers.TorchvisionTrainer(copy.deepcopy(model), chosen)
    ours = training.Trainer(model, chosen, len(batches), len(data.classes))
    our_loader = make_loader(data.train, batches, args.workers)
    their_loader = peers.torchvision_loader(data.train.folder, chosen, args.workers)
    found = measure.compare_throughput(
        measure.by_steps(partial(training.train_one_epoch, ours), our_loader),
        measure.by_steps(theirs.train_one_epoch, their_loader),
        chosen.batch_size,
        steps=args.steps,
        rounds=args.rounds,
        settle_steps=2 * args.workers + 1,  # a loader prefetches two batches per worker
    )
    machine = runs.describe_machine()
    return found, {
        "task": args.task,
        "backbone": args.backbone,
        "crop_px": chosen.train_crop_px,
        "batch_size": chosen.batch_size,
        "workers": args.workers,
        "threads": args.threads,
        "peer": PEER,
        **found.summary(),
        "rounds": args.rounds,
        "steps": args.steps,
        "autocast": str(ours.dtype or torch.float32).removeprefix("torch."),
        "torch": machine["versions"]["torch"],
        "hardware": machine["hardware"]["cpu"],
        "commit": machine["commit"],
        "command": runs.command_line(),
    }


def report(found: measure.Throughputs, row: dict[str, object]) -> None:
    print("round  ours images/s  peer images/s  ratio")
    rounds = zip(found.ours_images_per_s, found.peer_images_per_s, found.ratios, strict=True)
    for k, (ours, peer, ratio) in enumerate(rounds, start=1):
        print(f"{k:5d}  {ours:13.1f}  {peer:13.1f}  {ratio:5.2f}")
    print(
        "median {ours_images_per_s:13.1f}  {peer_images_per_s:13.1f}  {ratio_median:5.2f}  "
        "({ratio_min:.2f} to {ratio_max:.2f})\n"
        "ours: scripts/train.py's loop, {autocast}; peer: {peer}\n"
        "{backbone}, crop {crop_px} px, batch {batch_size}, {workers} workers and {threads} "
        "threads each, {rounds} rounds of {steps} steps\n"
        "{hardware}, torch {torch}".format(**row)
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.threads < 1:
            raise ValueError(f"threads={args.threads} must be at least 1")
        torch.set_num_threads(args.threads)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
        found, row = benchmark_training(args)
    except (ValueError, ArithmeticError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report(found, row)
    if args.output:
        pd.DataFrame([row]).to_csv(args.output, index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
