"""Measures this project against timm, torchvision and ONNX Runtime, interleaved on this machine.

    python scripts/benchmark.py --task inference --backbones vovnet39 --batch-size 8 1 --compile
    python scripts/benchmark.py --task step input --batch-size 16 --image-px 176 --memory
    python scripts/benchmark.py --task costs --width 0.25 --batch-size 64 --image-px 64 --memory

    inference  feature maps by deploy.optimize, against timm, torchvision and ONNX Runtime
    step       a training step, against the training scripts of torchvision and timm
    input      JPEG files of 500 x 375 pixels to batches on one core, against torchvision's preset
    costs      time, memory, parameters and GMACs of the networks of scripts/ablate.py

Ratios say how many times as fast as the first implementation each one is, within each round.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import Parser, exit_code, int_at_least

# isort: split
import pandas as pd
import torch

from utils import benchmark
from utils.distributed import pick_device
from utils.records import command_line, describe_machine, provenance


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add, count, compared = parser.add_argument, int_at_least(1), list(benchmark.IMPLEMENTATIONS)
    add("--task", nargs="+", default=compared, choices=[*compared, "costs"],
        help="what to measure (default: inference step input)")  # fmt: skip
    add("--backbones", nargs="+", default=["cspdarknet53", "resnet50"], choices=benchmark.SHARED,
        metavar="NAME", help="of inference and step (default: cspdarknet53 resnet50)")  # fmt: skip
    add("--batch-size", type=count, nargs="+", default=[8], help="images per call (default: 8)")
    add("--image-px", type=count, default=224, help="side of the images (default: 224)")
    add("--width", type=float, default=1.0, help="factor on the channels, for costs (default: 1)")
    add("--compile", action="store_true", help="inference under torch.compile, too: minutes each")
    add("--memory", action="store_true", help="peak memory, too, of CPUs under Linux")
    add("--rounds", type=count, default=7, help="timed rounds (default: 7)")
    add(
        "--threads",
        type=count,
        default=2,
        help="threads; input uses 1 (default: 2)",
    )
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--output", type=Path, default=Path("runs/benchmark.csv"), help="CSV file in which rows "
        "are added or replaced (default: runs/benchmark.csv)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.memory and args.device != "cpu":
        parser.error("--memory is measured with --device cpu only")
    return args


def run(args: argparse.Namespace) -> None:
    pick_device(args.device)
    if args.output.exists():
        benchmark.read_benchmark(args.output)  # another file is an error before the measuring
    machine = describe_machine()
    if args.device == "cpu":
        machine["hardware"]["gpu"] = None
    facts = provenance({**machine, "command": command_line()})
    for task in args.task:
        facts["threads"] = 1 if task == "input" else args.threads
        torch.set_num_threads(facts["threads"])
        names = args.backbones if task in ("inference", "step") else ["none"]
        for name, batch_size in itertools.product(names, args.batch_size):
            width = args.width if task == "costs" else 1.0
            case = benchmark.Case(task, name, batch_size, args.image_px, width, args.device)
            rows = benchmark.run(case, args.rounds, args.compile, args.memory)
            rows = [{**row, **facts} for row in rows]
            benchmark.save(args.output, rows)
            table = benchmark.ratios(pd.DataFrame(rows)).drop(columns=["width", "hardware"])
            print(table.round(3).to_string(index=False), flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
