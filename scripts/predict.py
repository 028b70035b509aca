"""Predicts the five most likely classes of images, by the EMA weights of a run or by any weights.

    python scripts/predict.py photo.jpg --checkpoint runs/NAME/last.pt
    python scripts/predict.py photos/ --backbone resnet50 --weights IMAGENET1K_V2 --json

Images are read, resized and cropped as in scripts/evaluate.py. Folders are searched for images, in
folders below as well. The name of a class is that of its folder, for ImageNet's wnids followed by
their words. --class-names gives other words, and weights with other classes their names.

--json prints a list of {"image": path, "predictions": [{"class", "name", "probability"}, ...]},
the most likely class first; "name" is the words, or the class again.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import Parser, exit_code, int_at_least, printable

# isort: split
from utils.data import folders
from utils.data.imagenet import class_names
from utils.distributed import pick_device
from utils.training.checkpoint import add_network_arguments, open_network
from utils.training.evaluation import predict_files

TOP_CLASSES = 5


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_network_arguments(parser)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM file, "
        "or a folder of them")  # fmt: skip
    add("--size", type=int_at_least(1), help="side of the center crop (default: that of the run or "
        "the weights, else 224)")  # fmt: skip
    add("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    add("--skip-corrupt", action="store_true", help="skip and list unreadable images")
    add("--json", action="store_true", help="print JSON")
    return parser.parse_intermixed_args(argv)  # images before and after options


def predict(args: argparse.Namespace) -> None:
    trained = open_network(args, pick_device(args.device))
    names = class_names(trained.classes, args.class_names)
    images = []
    for path in args.images:
        images += folders.images_below(path) if Path(path).is_dir() else [path]
    indices, shares, skipped = predict_files(trained, images, args.size, args.skip_corrupt)
    top = shares.topk(min(TOP_CLASSES, len(names)))
    for message in skipped:
        print(printable(f"skipped: {message}"), file=sys.stderr)
    found = [
        {
            "image": images[index],
            "predictions": [
                {"class": trained.classes[label], "name": names[label], "probability": share}
                for label, share in zip(labels, shares, strict=True)
            ],
        }
        for index, labels, shares in zip(
            indices, top.indices.tolist(), top.values.tolist(), strict=True
        )
    ]
    if args.json:
        print(json.dumps(found, indent=2))
        return
    for each in found:
        print(printable(each["image"]))
        for row in each["predictions"]:
            words = "" if row["name"] == row["class"] else f"  {row['name']}"
            print(printable(f"{100 * row['probability']:7.2f} %  {row['class']}{words}"))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_code(lambda: predict(args))


if __name__ == "__main__":
    sys.exit(main())
