"""Sorts ImageNet's val/*.JPEG into val/<wnid>/*.JPEG by renaming, or undoes it.

    python scripts/imagenet.py --val_solution_path LOC_val_solution.csv \\
        --val_image_dir ILSVRC/Data/CLS-LOC/val

Safe to interrupt and to run again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import Parser, exit_code

# isort: split
from utils.data.imagenet import sort_val


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--val_solution_path", required=True, metavar="CSV", help="LOC_val_solution.csv")
    add("--val_image_dir", required=True, metavar="DIR", help="the val folder")
    add("--dry-run", action="store_true", help="check and print, move nothing")
    add("--undo", action="store_true", help="move the images back")
    args = parser.parse_args(argv)
    options = {"undo": args.undo, "dry_run": args.dry_run, "progress": True}
    return exit_code(lambda: print(sort_val(args.val_solution_path, args.val_image_dir, **options)))


if __name__ == "__main__":
    sys.exit(main())
