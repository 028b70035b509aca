"""Top-1 and top-5 accuracy of a checkpoint's raw and EMA weights, at any test resolution.

python scripts/evaluate.py --checkpoint runs/NAME/last.pt --data-dir data/sample/ILSVRC/Data/CLS-LOC
python scripts/evaluate.py --checkpoint runs/NAME/last.pt --data-dir DIR --size 288
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import Parser, exit_code, int_at_least

# isort: split
from utils.distributed import pick_device
from utils.training.checkpoint import load_trained
from utils.training.evaluation import evaluate_trained


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="last.pt of a run of scripts/train.py")
    add("--data-dir", required=True, help="folder with train/ and val/, or shards: a brace pattern")
    add("--size", type=int_at_least(1), help="side of the center crop (default: the recipe's)")
    add("--workers", type=int_at_least(0), default=1, help="decoding processes (default: 1)")
    add("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    add("--skip-corrupt", action="store_true", help="skip and list unreadable images")
    return parser.parse_args(argv)


def evaluate(args: argparse.Namespace) -> None:
    results, skipped = evaluate_trained(
        load_trained(args.checkpoint, pick_device(args.device)),
        args.data_dir,
        size_px=args.size,
        workers=args.workers,
        skip_corrupt=args.skip_corrupt,
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
    return exit_code(lambda: evaluate(args))


if __name__ == "__main__":
    sys.exit(main())
