"""Measures this project against others, side by side on this machine.

    python scripts/benchmark.py --data-dir data/sample/ILSVRC/Data/CLS-LOC --train-crop-px 64
    taskset -c 0,1 python scripts/benchmark.py --data-dir ... --output results/benchmark_2cores.csv
    python scripts/benchmark.py --task networks --train-crop-px 224 --batch-size 8 --width 1

`--task train`: images per second of scripts/train.py's loop and of the steps of torchvision's
reference script, from JPEG files to updated weights, by turns in one process on the CPU. Both train
the same network from the same weights, on the same files, at the same sizes and augmentations.

`--task networks`: latency, inference, training step and peak memory of every network that the
studies of scripts/ablate.py train, by turns in one process, on random pixels.
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
from utils import costs, evaluation, measure, peers, recipe, runs, studies, training
from utils.data import TrainBatches, make_loader, open_folders

PEER = "torchvision references/classification (float32, NCHW)"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", default="train", choices=TASKS, help="what to measure (default: train)")
    add("--recipe", default="small", choices=recipe.RECIPES, help="preset (default: small)")
    add("--train-crop-px", type=int, help="side of the crops, pixels (default: the preset's)")
    add("--batch-size", type=int, default=32, help="images per step (default: 32)")
    add("--width", type=float, help="factor on the channels (default: the preset's)")
    add("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    add("--threads", type=int, default=2, help="of the training process (default: 2)")
    add("--output", type=Path, help="CSV file to write the result to (default: none)")
    add = parser.add_argument_group("of --task train").add_argument
    add("--data-dir", type=Path, help="folder with train/ and val/")
    add("--backbone", default="cspdarknet19", help="a name of backbones.list_models()")
    add("--steps", type=int, default=12, help="timed steps per round and side (default: 12)")
    add("--workers", type=int, default=1, help="decoding processes of each side (default: 1)")
    args = parser.parse_args(argv)
    if args.task == "train" and args.data_dir is None:
        parser.error("--task train needs --data-dir, a folder with train/ and val/")
    return args


def chosen_recipe(args: argparse.Namespace) -> recipe.Recipe:
    """The preset, with the sizes that were given."""
    sizes = {name: getattr(args, name) for name in ("batch_size", "train_crop_px", "width")}
    given = {name: size for name, size in sizes.items() if size is not None}
    return dataclasses.replace(recipe.RECIPES[args.recipe], **given)


def machine(chosen: recipe.Recipe) -> dict[str, object]:
    """The columns that say what a row was measured on, and how."""
    described = runs.describe_machine()
    dtype = evaluation.autocast_dtype(torch.device("cpu"), chosen.precision)
    return {
        "autocast": str(dtype or torch.float32).removeprefix("torch."),
        "torch": described["versions"]["torch"],
        "hardware": described["hardware"]["cpu"],
        "commit": described["commit"],
        "command": runs.command_line(),
    }


def benchmark_training(args: argparse.Namespace) -> pd.DataFrame:
    """Prints the rounds; one row with all that it was measured on."""
    chosen = chosen_recipe(args)
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
    row = {
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
        **machine(chosen),
    }
    report(found, row)
    return pd.DataFrame([row])


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


def benchmark_networks(args: argparse.Namespace) -> pd.DataFrame:
    """Prints the medians; a row per network, quantity and round."""
    chosen = chosen_recipe(args)
    networks = {
        name: partial(
            create_classifier, arm.backbone, costs.NUM_CLASSES, width=chosen.width, **arm.options
        )
        for name, arm in studies.networks().items()
    }
    rows = costs.measure_networks(networks, chosen, args.rounds)
    sizes = {"width": chosen.width, "crop_px": chosen.train_crop_px}
    sizes |= {"batch_size": chosen.batch_size, "threads": args.threads}
    table = pd.DataFrame(rows).assign(**sizes, **machine(chosen))
    medians = table.pivot_table("value", "network", ["quantity", "unit"], "median", sort=False)
    print(medians.round(2).to_string())
    return table


TASKS = {"train": benchmark_training, "networks": benchmark_networks}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.threads < 1:
            raise ValueError(f"threads={args.threads} must be at least 1")
        torch.set_num_threads(args.threads)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
        table = TASKS[args.task](args)
    except (ValueError, ArithmeticError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.output:
        table.to_csv(args.output, index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
