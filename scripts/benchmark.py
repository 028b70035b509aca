r"""Measures this project against timm and torchvision, interleaved on this machine.

    python scripts/benchmark.py --task inference --backbones vovnet39 --batch-size 8 1 --compile
    python scripts/benchmark.py --task step input --batch-size 16 --image-px 176 --memory

    inference  feature maps by deploy.optimize, against timm and torchvision; on CPUs also both in
               ONNX Runtime and, where it is installed, OpenVINO
    step       a training step, against the training scripts of torchvision and timm
    input      JPEG files of 500 x 375 pixels to batches on one core, against torchvision's preset
    accuracy   training time until a held-out tenth of the training images reaches an accuracy

Ratios say how many times as fast as the first implementation each one is, within each round.

    python scripts/benchmark.py --task accuracy --data-dir data/imagenette2-224sq \
        --backbones resnet18 --image-px 128 --epochs 8 16 --lr 1 2

trains by ours, by torchvision's reference recipe for its weights of 2021, and by the defaults of
timm's script, each at multiples of its own learning rate. Ours reports EMA weights, the others raw
ones. torchvision and timm decode in worker processes, ours in threads. Options that say "accuracy"
belong to this task, which runs alone.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import Parser, exit_code, int_at_least

# isort: split
import pandas as pd
import torch

from utils import benchmark
from utils.distributed import pick_device
from utils.recipe import RECIPES
from utils.records import command_line, describe_machine, provenance


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add, count, compared = parser.add_argument, int_at_least(1), list(benchmark.IMPLEMENTATIONS)
    add("--task", nargs="+", default=compared, choices=[*compared, "accuracy"],
        help="what to measure (default: inference step input)")  # fmt: skip
    add("--backbones", nargs="+", default=["cspdarknet53", "resnet50"], choices=benchmark.SHARED,
        metavar="NAME", help="not of input (default: cspdarknet53 resnet50)")  # fmt: skip
    add("--batch-size", type=count, nargs="+", help="images per call (default: 8; accuracy: 64)")
    add("--image-px", type=count,
        help="side of the images (default: 224; accuracy: the recipe's)")  # fmt: skip
    add("--compile", action="store_true", help="inference under torch.compile, too: minutes each")
    add("--memory", action="store_true", help="peak memory, too, of CPUs under Linux")
    add("--rounds", type=count, default=7, help="timed rounds (default: 7)")
    add("--threads", type=count, default=2, help="threads; input uses 1 (default: 2)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--output", type=Path, help="CSV file in which rows are added or replaced (default: "
        "runs/benchmark.csv, or runs/accuracy.csv)")  # fmt: skip
    add("--data-dir", type=Path, help="accuracy: folder with train/ and val/; val/ is not read")
    add("--implementations", nargs="+", default=list(benchmark.TRAINERS),
        choices=benchmark.TRAINERS, help="accuracy: (default: ours torchvision timm)")  # fmt: skip
    add("--recipe", default="imagenet", choices=RECIPES, help="accuracy: ours (default: imagenet)")
    add("--epochs", type=count, nargs="+", default=[16], help="accuracy: lengths (default: 16)")
    add("--lr", type=float, nargs="+", default=[1.0], metavar="FACTOR",
        help="accuracy: multiples of each recipe's peak learning rate (default: 1)")  # fmt: skip
    add("--seeds", type=count, default=1, metavar="N", help="accuracy: seeds 0 to N - 1; from 2 "
        "on, differences with Welch's 90 %% interval (default: 1)")  # fmt: skip
    add("--workers", type=int_at_least(0), default=2, help="accuracy: decoding processes of "
        "torchvision and timm (default: 2)")  # fmt: skip
    add("--target-top1-pct", type=float, default=75.0, help="accuracy: (default: 75)")
    args = parser.parse_args(argv)
    if args.memory and args.device != "cpu":
        parser.error("--memory is measured with --device cpu only")
    trains = "accuracy" in args.task
    if trains and (len(args.task) > 1 or args.data_dir is None):
        parser.error("--task accuracy runs alone and needs --data-dir")
    args.batch_size = args.batch_size or [64 if trains else 8]
    args.image_px = args.image_px or (RECIPES[args.recipe].train_crop_px if trains else 224)
    args.output = args.output or Path("runs", "accuracy.csv" if trains else "benchmark.csv")
    return args


def run(args: argparse.Namespace) -> None:
    pick_device(args.device)
    trains = "accuracy" in args.task
    if args.output.exists():  # another file is an error before the measuring
        benchmark.read_benchmark(args.output, benchmark.CURVE if trains else benchmark.RUN)
    machine = describe_machine()
    if args.device == "cpu":
        machine["hardware"]["gpu"] = None
    facts = provenance({**machine, "command": command_line()})
    if trains:
        return train(args, {**facts, "threads": args.threads})
    for task in args.task:
        facts["threads"] = 1 if task == "input" else args.threads
        torch.set_num_threads(facts["threads"])
        names = args.backbones if task in ("inference", "step") else ["none"]
        for name, batch_size in itertools.product(names, args.batch_size):
            case = benchmark.Case(task, name, batch_size, args.image_px, args.device)
            rows = benchmark.run(case, args.rounds, args.compile, args.memory)
            rows = [{**row, **facts} for row in rows]
            benchmark.save(args.output, rows)
            table = benchmark.ratios(pd.DataFrame(rows)).drop(columns="hardware")
            print(table.round(3).to_string(index=False), flush=True)


def train(args: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Implementations innermost, so that all have the same share of a change in the machine."""
    torch.set_num_threads(args.threads)
    lists = args.backbones, args.batch_size, args.epochs, args.lr
    seeds, finals = range(args.seeds), []
    for *setting, seed, who in itertools.product(*lists, seeds, args.implementations):
        name, batch_size, epochs, lr = setting
        case = ("accuracy", name, batch_size, args.image_px, args.device, who)
        run = benchmark.TrainingRun(*case, epochs, lr, args.recipe, seed, args.workers)
        rows = [{**row, **facts} for row in benchmark.learning_curve(run, args.data_dir)]
        benchmark.save(args.output, rows, benchmark.CURVE)
        finals.append(benchmark.time_to_accuracy(pd.DataFrame(rows), args.target_top1_pct))
        found = finals[-1].iloc[0]
        reached = "not reached" if pd.isna(found.minutes) else f"after {found.minutes:.1f} minutes"
        print(f"{name}, {who}, {epochs} epochs, {lr:g} x its learning rate, seed {seed}: "
              f"{args.target_top1_pct:g} % {reached}, {found.top1_pct:.1f} % in the end",
              flush=True)  # fmt: skip
    differences = benchmark.accuracy_differences(pd.concat(finals))
    if len(differences):
        print(differences.round(2).to_string(index=False))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
