"""Does a detector gain from a trained backbone? RetinaNets from scratch and pretrained, over seeds.

    python scripts/detect.py
    python scripts/detect.py --data-dir coco --checkpoint runs/NAME/last.pt --seeds 3

Each seed trains one detector from random weights and one whose backbone was first trained to
classify the embedded sample, as in notebook 03, or comes from --checkpoint. Without --data-dir the
images are scenes of the sample's objects with boxes.

Interrupted, the same command resumes; finished runs, the rows of --output, are not repeated.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import Parser, exit_code, int_at_least

# isort: split
from utils.data import imagenet, sample
from utils.data.boxes import open_boxes
from utils.recipe import RECIPES, DetectorRecipe
from utils.studies import statistics
from utils.studies.detection import SCRATCH, DetectionStudy, run_detection_study
from utils.training.checkpoint import load_trained

SAMPLE, SCENES = Path("data/sample"), Path("data/scenes")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data-dir", type=Path, help=f"folder in COCO's layout (default: {SCENES}, drawn)")
    add("--checkpoint", type=Path, help="last.pt of a run of scripts/train.py, for every seed")
    add("--runs-dir", type=Path, default=Path("runs/detection"), help="default: %(default)s")
    add("--output", type=Path, default=Path("runs/detection.csv"), help="default: %(default)s")
    add("--seeds", type=int_at_least(1), default=5, help="how many (default: %(default)s)")
    return parser.parse_args(argv)


def detect(args: argparse.Namespace) -> None:
    boxes = args.data_dir or sample.draw_scenes(SCENES)
    open_boxes(boxes)  # fails before anything is trained
    backbone, recipe, classes = "cspdarknet19", RECIPES["quick"], None
    options = recipe.backbone_options
    if args.checkpoint:
        trained = load_trained(args.checkpoint)
        backbone, options, recipe = trained.backbone, trained.options, trained.recipe
    else:
        classes = sample.draw(SAMPLE)
        imagenet.sort_val(SAMPLE / "LOC_val_solution.csv", classes / "val")
    shared = (backbone, options, DetectorRecipe(), boxes, classes, recipe, args.checkpoint)
    table = run_detection_study(DetectionStudy(*shared), args.seeds, args.runs_dir, args.output)
    print(table.groupby("value", sort=False).map_pct.agg(["mean", "std", "count"]).round(2))
    print(statistics.compare(table, SCRATCH, "map_pct").round(2).to_string())
    print(f"table: {args.output}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_code(lambda: detect(args))


if __name__ == "__main__":
    sys.exit(main())
