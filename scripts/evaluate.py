"""Top-1 and top-5 accuracy of a run's raw and EMA weights, or of any weights, at any test size.

    python scripts/evaluate.py --checkpoint runs/NAME/last.pt --data-dir data/imagenette2
    python scripts/evaluate.py --checkpoint runs/NAME/last.pt --data-dir DIR --size 288
    python scripts/evaluate.py --backbone resnet50 --weights IMAGENET1K_V2 --data-dir DIR
    python scripts/evaluate.py --checkpoint runs/NAME/last.pt --data-dir DIR --exported int8.onnx

DIR/val holds a folder per class, for ImageNet's weights one named by its wnid. If these are some
of the network's classes, it chooses among them alone. Sizes and normalization are those of the run
or of the published weights. For other weights images are resized to 256 pixels, cropped to 224 and
normalized with ImageNet's mean and deviation, in float32. --output writes the accuracy per class.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import Parser, exit_code, int_at_least, share

# isort: split
from utils.data.imagenet import class_names
from utils.distributed import pick_device
from utils.exporting import Exported
from utils.records import file_digest, write_json, write_table
from utils.training.checkpoint import add_network_arguments, open_network
from utils.training.evaluation import autocast_dtype, dtype_name, evaluate_trained


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_network_arguments(parser)
    add = parser.add_argument
    add("--data-dir", required=True, help="folder with val/, or shards: a brace pattern")
    add("--val-share", type=share, default=0.0, metavar="SHARE", help="evaluate on the images that "
        "scripts/train.py held out with the same --val-share")  # fmt: skip
    add("--exported", type=Path, metavar="PATH", help="also evaluate the same classifier as "
        "scripts/export.py wrote it: .onnx, .pt2 or .xml")  # fmt: skip
    add("--size", type=int_at_least(1), help="side of the center crop (default: that of the run or "
        "the weights, else 224)")  # fmt: skip
    add("--workers", type=int_at_least(0), default=1, help="decoding processes (default: 1)")
    add("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    add("--skip-corrupt", action="store_true", help="skip and list unreadable images")
    add("--output", type=Path, metavar="PATH", help="also write a .csv file with a row per class, "
        "or a .json file with the totals and the classes")  # fmt: skip
    args = parser.parse_args(argv)
    if args.output and args.output.suffix not in (".csv", ".json"):
        parser.error(f"--output {args.output}: must end in .csv or .json")
    return args


def evaluate(args: argparse.Namespace) -> None:
    trained = open_network(args, pick_device(args.device))
    words = dict(zip(trained.classes, class_names(trained.classes, args.class_names), strict=True))
    others = {each.name: Exported(each, len(trained.classes)) for each in [args.exported] if each}
    results, classes, skipped = evaluate_trained(
        trained,
        args.data_dir,
        size_px=args.size,
        val_share=args.val_share,
        workers=args.workers,
        skip_corrupt=args.skip_corrupt,
        others=others,
    )
    for message in skipped:
        print(f"skipped: {message}")
    if len(classes) < len(trained.classes):
        print(f"chosen among {len(classes)} of the network's {len(trained.classes)} classes")
    for name, result in results.items():
        print(
            f"{name:>3}: top-1 {result['top1_pct']:.2f} %  top-5 {result['top5_pct']:.2f} %  "
            f"loss {result['loss']:.4f}  ({result['images']} images)"
        )
    if args.output is None:
        return
    rows = [
        {"weights": weights, "class": name, "name": words[name], **row}
        for weights, result in results.items()
        for name, row in zip(classes, result.pop("classes"), strict=True)
    ]
    if args.output.suffix == ".csv":
        write_table(args.output, rows)
    else:
        report = trained.ema.backbone.weights_report
        digest = file_digest(args.checkpoint) if args.checkpoint else report.sha256
        how = {
            "network_classes": len(trained.classes),
            "crop_px": args.size or trained.recipe.eval_crop_px,
            "dtype": dtype_name(autocast_dtype(trained.device, trained.recipe.precision)),
        }
        if args.exported:
            how["exported_sha256"] = file_digest(args.exported)
        totals = {"sha256": digest, **how, "totals": results, "skipped": skipped}
        # JSON has no NaN, which is the accuracy of a class without images.
        rows = [{k: None if v != v else v for k, v in row.items()} for row in rows]
        write_json(args.output, {**totals, "classes": rows})


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_code(lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main())
