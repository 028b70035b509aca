"""Sorts the flat validation folder of ImageNet: the command line of `utils.data.imagenet`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import EXIT_CODES, Parser, exit_code

# isort: split
from utils.data.imagenet import sort_val

EXAMPLE = """example:
  python scripts/imagenet.py --val_solution_path LOC_val_solution.csv \\
      --val_image_dir ILSVRC/Data/CLS-LOC/val

"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = Parser(
        "Sort ImageNet's val/*.JPEG into val/<wnid>/*.JPEG by renaming, or undo it. Safe to "
        "interrupt and to run again.",
        epilog=EXAMPLE + EXIT_CODES,
    )
    parser.add_argument(
        "--val_solution_path", required=True, metavar="CSV", help="LOC_val_solution.csv"
    )
    parser.add_argument("--val_image_dir", required=True, metavar="DIR", help="the val folder")
    parser.add_argument("--dry-run", action="store_true", help="check and print, move nothing")
    parser.add_argument("--undo", action="store_true", help="move the images back")
    args = parser.parse_args(argv)
    options = {"undo": args.undo, "dry_run": args.dry_run, "progress": True}
    return exit_code(lambda: print(sort_val(args.val_solution_path, args.val_image_dir, **options)))


if __name__ == "__main__":
    sys.exit(main())
