"""Measures this project against what else there is, side by side on this machine.

    python scripts/benchmark.py --data-dir data/sample/ILSVRC/Data/CLS-LOC
    taskset -c 0,1 python scripts/benchmark.py --task inference --backbones vovnet39 --compile
    python scripts/benchmark.py --task epoch --data-dir imagenette2 --timm-script timm/train.py ...
    python scripts/benchmark.py --task networks --train-crop-px 224 --batch-size 8 --width 1

All sides run by turns in one run; a ratio says how many times better ours is, within each round.

    inference  feature maps, ours by deploy.optimize, timm's and torchvision's; with --compile also
               compiled, and ONNX Runtime; and peak memory
    step       a classifier's training step, and its peak memory, against torchvision's and timm's
    input      images/s of one core from JPEG files of ImageNet's size, against torchvision's preset
    loop       input and step together, against torchvision's
    shards     reading from shards, against the class folders that they are packed from
    listing    folders of a thousand to a million files: start of scripts/train.py, memory, images/s
    import     import backbones, over importing torch and torchvision
    epoch      scripts/train.py as a whole against torchvision's and timm's scripts, given as files
    networks   costs of every network of the studies of scripts/ablate.py, a table of its own
"""

import argparse
import dataclasses
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import Parser, exit_code, int_at_least

# isort: split
import pandas as pd
import torch
from torch import nn

import backbones
from backbones import create_classifier
from backbones.deploy import keep_freed_memory, optimize
from utils import contest, costs, peers, recipe
from utils.data.folders import Splits, open_folders
from utils.distributed import pick_device
from utils.records import command_line, describe_machine, write_table
from utils.studies import definitions
from utils.training import evaluation

KEY = [
    "task",
    "what",
    "setting",
    "ours",
    "peer",
    "unit",
    "freed_memory_kept_by",
    "threads",
]  # one row each
ROOT = Path(__file__).resolve().parents[1]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add, count = parser.add_argument, int_at_least(1)
    default = ["inference", "step", "input", "loop", "listing", "import"]
    add("--task", dest="tasks", nargs="+", default=default, choices=TASKS, help="what to measure, "
        f"see above (default: {' '.join(default)})")  # fmt: skip
    add("--data-dir", type=Path, help="folder with train/ and val/; only inference, step, import "
        "and networks do without")  # fmt: skip
    add("--backbones", nargs="+", default=["cspdarknet53", "resnet50"], help="names of "
        "backbones.list_models() that timm has too (default: cspdarknet53 resnet50)")  # fmt: skip
    add("--compile", action="store_true", help="also under torch.compile: minutes for each")
    add("--keep-freed-memory", action="store_true", help="of inference and step: all "
        "sides after deploy.keep_freed_memory()")  # fmt: skip
    add("--recipe", default="imagenet", choices=recipe.RECIPES, help="preset (default: imagenet)")
    add("--train-crop-px", type=count, help="side of the crops, pixels (default: the preset's)")
    add("--batch-size", type=count, default=16, help="images per training step (default: 16)")
    add("--batch-sizes", type=count, nargs="+", default=[8, 1], help="of inference (default: 8 1)")
    add("--image-px", type=count, default=224, help="side of inference's images (default: 224)")
    add("--width", type=float, help="factor on the channels, for networks alone (default: the "
        "preset's)")  # fmt: skip
    add("--rounds", type=count, default=7, help="turns of each side (default: 7)")
    add("--steps", type=count, default=8, help="steps per turn, of input and loop (default: 8)")
    add("--workers", type=int_at_least(0), default=1, help="decoding processes: of both "
        "sides in loop, of others in epoch, where ours has its default (default: 1)")  # fmt: skip
    add("--files", type=count, nargs="+", default=[1000, 100_000], help="how many to list")
    add("--threads", type=count, default=2, help="of each side (default: 2)")
    add("--device", default="cpu", help="of inference and step (default: cpu)")
    add("--torchvision-script", type=Path, help="references/classification/train.py, for epoch")
    add("--timm-script", type=Path, help="train.py of pytorch-image-models, for epoch")
    add("--output", type=Path, help="CSV file in which rows are added or replaced (default: "
        "results/benchmark_<hardware>.csv; for networks: none)")  # fmt: skip
    args = parser.parse_args(argv)
    for task in args.tasks:
        if task in NEED_DATA and args.data_dir is None:
            parser.error(f"{task} needs --data-dir, a folder with train/ and val/")
    if len(args.files) < 2 or len(set(args.files)) < len(args.files):
        parser.error("--files needs two different counts or more")
    for path in (args.torchvision_script, args.timm_script):
        if path and not path.is_file():
            parser.error(f"{path} is not a file: give the other project's train.py")
    if args.width is not None and args.tasks != ["networks"]:
        parser.error("--width is for --task networks")
    if args.keep_freed_memory and not set(args.tasks) <= {"inference", "step"}:
        parser.error("--keep-freed-memory is for --task inference step")
    if "networks" in args.tasks and len(args.tasks) > 1:
        parser.error("networks has a table of its own; run it alone")
    return args


def chosen_recipe(args: argparse.Namespace) -> recipe.Recipe:
    """The preset, with the sizes that were given; at full width beside others' networks."""
    sizes = {name: getattr(args, name) for name in ("batch_size", "train_crop_px")}
    sizes["width"] = args.width if "networks" in args.tasks else 1.0
    given = {name: size for name, size in sizes.items() if size is not None}
    return dataclasses.replace(recipe.RECIPES[args.recipe], **given)


def machine(args: argparse.Namespace) -> dict[str, object]:
    """The columns that say what a row was measured on, and how."""
    described = describe_machine()
    hardware = described["hardware"]
    return {
        "torch": described["versions"]["torch"],
        "hardware": hardware["gpu"] if args.device.startswith("cuda") else hardware["cpu"],
        "commit": described["commit"],
        "command": command_line(),
    }


def optimized(name: str, dtype: torch.dtype, compile: bool) -> nn.Module:
    return optimize(backbones.create(name, **peers.SHARED[name].options), dtype, compile)


def inference(args: argparse.Namespace) -> list[contest.Row]:
    rows, device = [], pick_device(args.device)
    for name in args.backbones:
        for batch_size in args.batch_sizes:
            rows += show(
                contest.inference(
                    name, optimized, batch_size, args.image_px, args.rounds, args.compile, device
                )
            )
        if device.type == "cpu" and not args.keep_freed_memory:
            rows += show(
                contest.inference_peaks(name, optimized, args.batch_sizes[0], args.image_px)
            )
    return rows


def step(args: argparse.Namespace) -> list[contest.Row]:
    rows, device = [], pick_device(args.device)
    for name in args.backbones:
        make = partial(create_classifier, **peers.SHARED[name].options)
        chosen = chosen_recipe(args)
        rows += show(contest.step(name, make, chosen, args.rounds, args.compile, device))
        if device.type == "cpu" and not args.keep_freed_memory:
            rows += show(contest.step_peaks(name, make, chosen))
    return rows


def open_data(args: argparse.Namespace) -> Splits:
    return open_folders(args.data_dir, chosen_recipe(args))


def input_speed(args: argparse.Namespace) -> list[contest.Row]:
    with tempfile.TemporaryDirectory() as folder:
        contest.draw_imagenet_sized(open_data(args).train, Path(folder), 10 * args.batch_size)
        return show(contest.input_speed(Path(folder), chosen_recipe(args), args.rounds, args.steps))


def shards(args: argparse.Namespace) -> list[contest.Row]:
    with tempfile.TemporaryDirectory() as folder:
        rest = (chosen_recipe(args), args.rounds, args.steps, args.workers)
        return show(contest.shards_speed(args.data_dir, Path(folder), *rest))


def loop(args: argparse.Namespace) -> list[contest.Row]:
    rows, data, chosen = [], open_data(args), chosen_recipe(args)
    for name in args.backbones:
        torch.manual_seed(0)
        model = create_classifier(name, len(data.classes))
        rows += show(contest.loop(name, model, data, chosen, args.rounds, args.steps, args.workers))
    return rows


def listing(args: argparse.Namespace) -> list[contest.Row]:
    with tempfile.TemporaryDirectory() as folder:
        source, start = open_data(args).train, partial(start_command, args)
        rest = (args.files, chosen_recipe(args), start, logs_folder())
        return show(contest.listing(source, Path(folder), *rest))


def imports(args: argparse.Namespace) -> list[contest.Row]:
    return show(contest.imports(args.rounds))


def epoch(args: argparse.Namespace) -> list[contest.Row]:
    scripts = {
        "torchvision train.py": (args.torchvision_script, peers.torchvision_command),
        "timm train.py": (args.timm_script, peers.timm_command),
    }
    given = {side: (path, make) for side, (path, make) in scripts.items() if path}
    if not given:
        raise ValueError("epoch needs --torchvision-script or --timm-script, a training script")
    open_data(args)  # a wrong folder is told of before anything is run
    crop_px, rows = chosen_recipe(args).train_crop_px, []
    # One size for training and test: timm's script has no other.
    chosen = chosen_recipe(args).tested_at(crop_px)
    chosen = dataclasses.replace(chosen, epochs=1, warmup_epochs=0.0)
    for name in args.backbones:
        with tempfile.TemporaryDirectory() as folder:
            rest = (name, args.data_dir, chosen)
            ours = our_command(*rest, args.recipe, "--output-dir", Path(folder) / "ours")
            commands = {"scripts/train.py": ours}
            for side, (path, make) in given.items():
                output_dir = Path(folder) / side
                output_dir.mkdir()
                commands[side] = make(path.resolve(), *rest, args.workers, output_dir)
            rows += show(contest.epochs(name, commands, chosen, args.rounds, logs_folder()))
    return rows


def logs_folder() -> Path:
    """Where the output of the scripts that are measured goes."""
    folder = Path("runs") / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def our_command(
    name: str, data_dir: Path, chosen: recipe.Recipe, preset: str, *more: object
) -> list[str]:
    """scripts/train.py by a preset, with the fields of `chosen` that this script sets."""
    fields = ("epochs", "warmup_epochs", "batch_size", "train_crop_px", "eval_resize_px")
    values = {field: getattr(chosen, field) for field in (*fields, "eval_crop_px", "width")}
    values |= {"data_dir": data_dir, "backbone": name, "recipe": preset}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
    return [sys.executable, str(ROOT / "scripts" / "train.py"), *flags, *map(str, more)]


def start_command(args: argparse.Namespace, data_dir: Path, output_dir: Path) -> list[str]:
    """scripts/train.py, of a network whose steps take no time, with a checkpoint of the first."""
    rest = (data_dir, chosen_recipe(args), args.recipe, "--output-dir", output_dir)
    more = ("--checkpoint-steps=1", "--workers=0", "--device=cpu")
    return our_command("mobilenet_v3_small", *rest, *more)


def networks(args: argparse.Namespace) -> pd.DataFrame:
    """Prints the medians; a row per network, quantity and round."""
    chosen = chosen_recipe(args)
    made = {
        name: partial(
            create_classifier,
            variant.backbone,
            costs.NUM_CLASSES,
            width=chosen.width,
            **variant.options,
        )
        for name, variant in definitions.networks().items()
    }
    dtype = evaluation.autocast_dtype(torch.device("cpu"), chosen.precision)
    table = pd.DataFrame(costs.measure_networks(made, chosen, args.rounds)).assign(
        width=chosen.width,
        crop_px=chosen.train_crop_px,
        batch_size=chosen.batch_size,
        autocast=evaluation.dtype_name(dtype),
        threads=args.threads,
        **machine(args),
    )
    medians = table.pivot_table("value", "network", ["quantity", "unit"], "median", sort=False)
    print(medians.round(2).to_string())
    return table


def conditions(args: argparse.Namespace, task: str) -> dict[str, object]:
    """Whose freed memory stayed with the process, and how many threads each side had."""
    # scripts/train.py sees to its own.
    kept = "all" if args.keep_freed_memory else "ours" if task == "epoch" else "none"
    return {"freed_memory_kept_by": kept, "threads": 1 if task == "input" else args.threads}


TASKS = {
    "inference": inference,
    "step": step,
    "input": input_speed,
    "loop": loop,
    "shards": shards,
    "listing": listing,
    "import": imports,
    "epoch": epoch,
    "networks": networks,
}
NEED_DATA = ("input", "shards", "loop", "listing", "epoch")


def show(rows: list[contest.Row]) -> list[contest.Row]:
    line = (
        "{task}: {what}, {setting}: {ours} {ours_value:.4g} {unit}, {peer} {peer_value:.4g}: "
        "{ratio_median:.2f} ({ratio_min:.2f} to {ratio_max:.2f})"
    )
    for row in rows:
        print(line.format(**row), flush=True)
    return rows


def recorded(path: Path) -> pd.DataFrame:
    """The rows of a table, of which there may be none yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return pd.DataFrame(columns=KEY)
    try:
        table = pd.read_csv(path, dtype={"commit": str})  # some are all digits
    except ValueError:  # not even CSV
        table = pd.DataFrame()
    if not set(KEY) <= set(table):
        raise ValueError(f"{path} is not a table of this script; give --output another path")
    return table


def save(path: Path, table: pd.DataFrame) -> None:
    """Adds rows to a table, in the place of those of the same `KEY`."""
    old = recorded(path)
    if len(old):
        new = set(table[KEY].fillna("").itertuples(index=False, name=None))
        keys = old[KEY].fillna("").itertuples(index=False, name=None)
        table = pd.concat([old[[key not in new for key in keys]], table])
    write_table(path, table.to_dict("records"))
    print(f"written: {path}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_code(lambda: benchmark(args), "smaller --batch-sizes, --batch-size or --image-px")


def benchmark(args: argparse.Namespace) -> None:
    if unknown := sorted(set(args.backbones) - set(peers.SHARED)):
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(peers.SHARED)}")
    if args.keep_freed_memory:
        keep_freed_memory()
    facts = machine(args)
    name = re.sub(r"[^a-z0-9]+", "_", facts["hardware"].lower()).replace("_cores", "cores")
    path = args.output or Path("results") / f"benchmark_{name}.csv"
    if args.tasks != ["networks"]:
        recorded(path)  # rather told now than after the measuring
    for task in args.tasks:
        torch.set_num_threads(args.threads)
        found = TASKS[task](args)
        if task == "networks":
            if args.output:
                write_table(args.output, found.to_dict("records"))
            continue
        save(path, pd.DataFrame(found).assign(**conditions(args, task), **facts))


if __name__ == "__main__":
    sys.exit(main())
