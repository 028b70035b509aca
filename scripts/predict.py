"""Predicts the five most likely classes of images by the EMA weights of a run.

    python scripts/predict.py photo.jpg --checkpoint runs/NAME/last.pt
    python scripts/predict.py *.jpg --checkpoint runs/NAME/last.pt --json \\
        --synset-mapping imagenet/LOC_synset_mapping.txt

Images are read, resized and cropped as in scripts/evaluate.py. The name of a class is that of its
folder, such as n01440764 for ImageNet, and with --synset-mapping also its words. Those of
Imagenette's ten classes are known.

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
from utils.data.imagenet import class_names
from utils.distributed import pick_device
from utils.training.checkpoint import load_trained
from utils.training.evaluation import predict_files

TOP_CLASSES = 5


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM file")
    add("--checkpoint", type=Path, required=True, help="last.pt of a run of scripts/train.py")
    add("--synset-mapping", metavar="PATH", help="LOC_synset_mapping.txt, the words of the classes")
    add("--size", type=int_at_least(1), help="side of the center crop (default: the recipe's)")
    add("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    add("--json", action="store_true", help="print JSON")
    return parser.parse_intermixed_args(argv)  # images before and after options


def predict(args: argparse.Namespace) -> None:
    trained = load_trained(args.checkpoint, pick_device(args.device))
    names = class_names(trained.classes, args.synset_mapping)
    top = predict_files(trained, args.images, args.size).topk(min(TOP_CLASSES, len(names)))
    found = [
        {
            "image": image,
            "predictions": [
                {"class": trained.classes[label], "name": names[label], "probability": share}
                for label, share in zip(labels, shares, strict=True)
            ],
        }
        for image, labels, shares in zip(
            args.images, top.indices.tolist(), top.values.tolist(), strict=True
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
