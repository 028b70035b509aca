"""Exports a backbone to ONNX or torch.export's .pt2, one output per map: stride_2, stride_4, ...

    python scripts/export.py --checkpoint runs/NAME/last.pt --output net.onnx
    python scripts/export.py --checkpoint runs/NAME/last.pt --classifier --output net.pt2
    python scripts/export.py --backbone resnet50 --weights IMAGENET1K_V2 --output resnet50.onnx \\
        --option out_indices=2,3,4

A checkpoint gives its EMA weights. The network takes float32 images [batch, channels, height,
width] of any batch and of any size above 32 pixels. Networks of this project and of torchvision
expect RGB from 0 to 1, minus the mean (0.485, 0.456, 0.406), divided by the standard deviation
(0.229, 0.224, 0.225).

The file is read back by ONNX Runtime or torch.export and compared with its source at other batch
and image sizes. Existing files are replaced only with --overwrite. ONNX needs the packages onnx,
onnxscript and onnxruntime.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import DataError, Parser, backbone_option, exit_code

# isort: split
import torch

import backbones
from backbones.base import Backbone
from backbones.classifier import Classifier
from backbones.deploy import NamedOutputs
from backbones.weights import WeightsError
from utils import exporting
from utils.training.checkpoint import load_trained


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="last.pt of a run of scripts/train.py")
    source.add_argument("--backbone", help="a name of backbones.list_models()")
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="PATH", help="a new .onnx or .pt2 file")
    add("--weights", help="weights of --backbone: a file, or a name of torchvision's")
    add("--option", action="append", default=[], type=backbone_option, metavar="KEY=VALUE",
        help="an option of the backbone, such as act=mish; repeatable")  # fmt: skip
    add("--classifier", action="store_true", help="export the classifier of --checkpoint")
    add("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)
    if args.weights and args.checkpoint:
        parser.error("--weights is for --backbone; a checkpoint has its own")
    if args.classifier and (args.backbone or args.option):
        parser.error("--classifier is for --checkpoint without --option")
    return args


def open_network(args: argparse.Namespace) -> Backbone | Classifier:
    if args.checkpoint:
        trained = load_trained(args.checkpoint, torch.device("cpu"))
        if args.classifier:
            return trained.ema
        options = {**trained.options, **dict(args.option)}
        return backbones.create(trained.backbone, weights=trained.ema.state_dict(), **options)
    try:
        return backbones.create(args.backbone, weights=args.weights, **dict(args.option))
    except WeightsError as error:
        if Path(args.weights).exists():  # the file is wrong, not the option
            raise DataError(str(error)) from error
        raise


def export(args: argparse.Namespace) -> None:
    source = NamedOutputs(open_network(args)).eval()
    source.to(memory_format=torch.contiguous_format)  # the layout of both formats
    print(exporting.export(source, args.output, overwrite=args.overwrite))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_code(lambda: export(args))


if __name__ == "__main__":
    sys.exit(main())
