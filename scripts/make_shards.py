"""Packs class folders into WebDataset shards, or checks shards: `utils.data.shards`'s command line.

    python scripts/make_shards.py --data-dir ILSVRC/Data/CLS-LOC --output-dir shards
    python scripts/make_shards.py --verify --output-dir shards

The folder holds train/ and val/, each with one folder per class. After an interrupt the same
command resumes. scripts/train.py reads the shards, from a disk or through a pipe:

    --data-dir "shards/{train-{000000..001281},val-{000000..000049}}.tar"
    --data-dir "pipe:curl -sf http://host/{train-{000000..001281},val-{000000..000049}}.tar"
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import Parser, exit_code, int_at_least

# isort: split
from utils.data.shards import make_shards, verify_shards


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = Parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with train/ and val/")
    what.add_argument("--verify", action="store_true", help="read the shards back and check them")
    add = parser.add_argument
    add("--output-dir", type=Path, metavar="DIR", required=True, help="the folder of the shards")
    add(
        "--images-per-shard",
        type=int_at_least(1),
        default=1000,
        metavar="N",
        help="in all but the last (default: %(default)s)",
    )
    add(
        "--seed",
        type=int_at_least(0),
        default=0,
        help="seed of the training images' order (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    return exit_code(lambda: print(pack_or_verify(args)))


def pack_or_verify(args: argparse.Namespace) -> str:
    if args.verify:
        return verify_shards(args.output_dir)
    return make_shards(args.data_dir, args.output_dir, args.images_per_shard, args.seed)


if __name__ == "__main__":
    sys.exit(main())
