"""Packs class folders into WebDataset shards.

    python scripts/make_shards.py --data-dir ILSVRC/Data/CLS-LOC --output-dir shards

The folder holds train/ and val/, each with one folder per class. After an interrupt the same
command resumes, and it packs damaged shards again. The checksums are in SHA256SUMS, for sha256sum
--check. scripts/train.py reads the shards, from a disk or through a pipe:

    --data-dir "shards/{train-{000000..001281},val-{000000..000049}}.tar"
    --data-dir "pipe:curl -sf http://host/{train-{000000..001281},val-{000000..000049}}.tar"
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import Parser, exit_code, int_at_least

# isort: split
from utils.data.shards import make_shards


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = Parser(__doc__)
    add, count = parser.add_argument, int_at_least(1)
    add("--data-dir", type=Path, required=True, help="folder with train/ and val/")
    add("--output-dir", type=Path, required=True, help="the folder of the shards")
    add("--images-per-shard", type=count, default=1000, metavar="N",
        help="in all but the last (default: %(default)s)")  # fmt: skip
    add("--seed", type=int_at_least(0), default=0, help="seed of the training images' order "
        "(default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    options = args.images_per_shard, args.seed
    return exit_code(lambda: print(make_shards(args.data_dir, args.output_dir, *options)))


if __name__ == "__main__":
    sys.exit(main())
