"""Packs class folders into WebDataset shards, or checks shards: `utils.packing`'s command line.

    python scripts/make_shards.py --data-dir ILSVRC/Data/CLS-LOC --output-dir shards
    python scripts/make_shards.py --verify --output-dir shards

The folder holds train/ and val/, each with one folder per class. Interrupted, the same command goes
on. scripts/train.py reads the shards, from a disk or through a pipe:

    --data-dir "shards/{train-{000000..001281},val-{000000..000049}}.tar"
    --data-dir "pipe:curl -sf http://host/{train-{000000..001281},val-{000000..000049}}.tar"

Exit codes: 0, all shards are made (with --verify: are whole); 1, the images or the shards are not
right; 2, a wrong option or path.
"""

import argparse
import sys
from pathlib import Path

from utils.packing import make_shards, verify_shards


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with train/ and val/")
    what.add_argument("--verify", action="store_true", help="read the shards back and check them")
    add = parser.add_argument
    add("--output-dir", type=Path, metavar="DIR", required=True, help="the folder of the shards")
    add("--images-per-shard", type=int, default=1000, help="in all but the last (%(default)s)")
    add("--seed", type=int, default=0, help="of the training images' order (%(default)s)")
    args = parser.parse_args(argv)
    for name, least in (("images_per_shard", 1), ("seed", 0)):
        if (value := getattr(args, name)) < least:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least {least}")
    try:
        if args.verify:
            summary = verify_shards(args.output_dir, progress=True)
        else:
            summary = make_shards(
                args.data_dir, args.output_dir, args.images_per_shard, args.seed, progress=True
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, FileExistsError | NotADirectoryError) else 1
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
