"""Top-1 and top-5 accuracy of a checkpoint's raw and EMA weights, at any test resolution.

python scripts/evaluate.py --checkpoint runs/NAME/last.pt --data-dir data/sample/ILSVRC/Data/CLS-LOC
python scripts/evaluate.py --checkpoint runs/NAME/last.pt --data-dir DIR --size 288
"""

import argparse
import sys
from pathlib import Path

from backbones.classifier import create_classifier
from backbones.deploy import optimize
from utils import distributed, evaluation
from utils.errors import Parser, exit_code, whole_number
from utils.trained import load_trained


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="last.pt of a run of scripts/train.py")
    add("--data-dir", required=True, help="folder with train/ and val/, or shards: a brace pattern")
    add(
        "--size",
        type=whole_number(1),
        help="side of the centre crop (default: the recipe's)",
    )
    add("--workers", type=whole_number(0), default=1, help="decoding processes (default: 1)")
    add("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    add("--skip-corrupt", action="store_true", help="leave out and list unreadable images")
    return parser.parse_args(argv)


def evaluate(args: argparse.Namespace) -> None:
    device = distributed.pick_device(args.device)
    results, skipped = evaluation.evaluate_trained(
        load_trained(args.checkpoint, create_classifier, device),
        args.data_dir,
        size_px=args.size,
        workers=args.workers,
        skip_corrupt=args.skip_corrupt,
        optimize=optimize,
    )
    for message in skipped:
        print(f"skipped: {message}")
    for name, result in results.items():
        print(
            f"{name:>3}: top-1 {result['top1_pct']:.2f} %  top-5 {result['top5_pct']:.2f} %  "
            f"loss {result['loss']:.4f}  ({result['images']} images)"
        )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_code(lambda: evaluate(args), "a smaller --size or fewer --workers")


if __name__ == "__main__":
    sys.exit(main())
