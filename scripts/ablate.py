"""Runs a study: one factor varied over seeds, a folder per run, all results in one CSV.

    python scripts/ablate.py networks --data-dir data/imagenette2-224sq --processes 2

Without --output the record is the repository's results/study_<name>.csv, which holds the runs of
one machine: choose another for your own.

Interrupted, the same command resumes. Finished runs, the rows of the record, are not repeated.
Failed runs are recorded as such, and repeated by the same command.
"""

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import Parser, exit_code

# isort: split
from utils.studies import statistics
from utils.studies.definitions import STUDIES
from utils.studies.runner import run_study


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("study", choices=STUDIES, help="declared in utils/studies/definitions.py")
    add("--data-dir", type=Path, required=True, help="folder with train/ and val/")
    add("--runs-dir", type=Path, default=Path("runs/studies"), help="default: %(default)s")
    add("--output", type=Path, help="the CSV (default: the repository's results/study_<study>.csv)")
    add("--weights", help="for studies of fine-tuning: a file, or a published name")
    add("--processes", type=int, help="runs at a time (default: one, or one per device)")
    add("--seeds", type=int, help="how many of the study's seeds, from the first (default: all)")
    add("--devices", default="", help="assigned to the runs in turn, such as cuda:0,cuda:1")
    return parser.parse_args(argv)


def ablate(args: argparse.Namespace) -> int:
    study = STUDIES[args.study]
    if args.seeds is not None:
        if not 1 <= args.seeds <= len(study.seeds):
            raise ValueError(f"--seeds {args.seeds} must be 1 to {len(study.seeds)}")
        study = replace(study, seeds=study.seeds[: args.seeds])
    devices = [device for device in args.devices.split(",") if device]
    count = max(1, len(devices)) if args.processes is None else args.processes
    output = args.output or statistics.RESULTS / f"study_{study.name}.csv"
    options = {"weights": args.weights, "processes": count, "devices": devices}
    table = run_study(study, args.data_dir, args.runs_dir, output, **options)
    failed = table[table.status != "done"]
    for row in failed.itertuples():
        print(f"{row.value}, seed {row.seed}: {row.status}", file=sys.stderr)
    if len(failed) < len(table):
        print(statistics.summarize(table, study.top1_column).round(2).to_string())
        print(statistics.differences(study, table).round(2).to_string())
    print(f"table: {output}")
    return int(len(failed) > 0)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also ends the runs' processes
    return exit_code(lambda: ablate(args))


if __name__ == "__main__":
    sys.exit(main())
