"""Exports a backbone, or with --classifier the whole network, to the format of --output's suffix.

    python scripts/export.py --checkpoint runs/NAME/last.pt --output net.onnx
    python scripts/export.py --checkpoint runs/NAME/last.pt --classifier --output net.safetensors
    python scripts/export.py --backbone resnet50 --weights IMAGENET1K_V2 --output resnet50.onnx \\
        --option out_indices=2,3,4 --fp16 --shape 1 640 640

.onnx needs the packages onnx, onnxscript and onnxruntime; .pt2 is torch.export's; .xml, with its
weights in .bin, is OpenVINO's and needs openvino; .safetensors holds the weights alone, for
--weights. A checkpoint gives its EMA weights.

The network takes float32 images [batch, channels, height, width] of any batch and of any size above
32 pixels, or of --shape, and gives one output per map (stride_2, stride_4, ...), or logits. The
file's metadata has the backbone and its options, strides, channels, classes and, where it is known,
what the weights expect of images: RGB from 0 to 1, minus mean, divided by std.

scripts/evaluate.py --exported measures what --int8 costs in accuracy. --optimize folds BatchNorm
into the convolutions, and merges the two 1x1 convolutions that split a CSP stage. The file is read
back and compared with the network, at other batch and image sizes unless --shape is given.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import Parser, exit_code, int_at_least

# isort: split
import torch

import backbones
from backbones.base import Backbone
from backbones.classifier import Classifier
from backbones.deploy import NamedOutputs
from utils import exporting
from utils.data.imagenet import class_names
from utils.training.checkpoint import add_network_arguments, load_trained, open_network


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_network_arguments(parser)
    add, precision = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--output", type=Path, required=True, metavar="PATH",
        help=f"a new file that ends in {' or '.join(exporting.FORMATS)}")  # fmt: skip
    add("--classifier", action="store_true", help="export the head, too")
    add("--shape", nargs=3, type=int_at_least(1), metavar=("N", "HEIGHT", "WIDTH"),
        help="of all images (default: any)")  # fmt: skip
    add("--opset", type=int_at_least(1), help="of ONNX (default: PyTorch's)")
    precision("--fp16", action="store_true", help="weights in half precision; images and outputs "
        "stay float32")  # fmt: skip
    precision("--int8", type=Path, metavar="IMAGES", help="8-bit weights and activations, "
        "calibrated on images in and below this folder")  # fmt: skip
    add("--optimize", action="store_true", help="export the graph of backbones.deploy.optimize")
    add("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)
    if args.weights and args.checkpoint:
        parser.error("--weights is for --backbone; a checkpoint has its own")
    if args.int8 and args.shape:
        parser.error("--int8 is for images of any size: omit --shape")
    if args.class_names and not args.classifier:
        parser.error("--class-names is for --classifier")
    return args


def open_source(args: argparse.Namespace) -> tuple[Backbone | Classifier, dict[str, Any]]:
    """The network and the metadata of its classes."""
    device = torch.device("cpu")
    if args.classifier:
        trained = open_network(args, device)
        names = class_names(trained.classes, args.class_names)
        return trained.ema, {"classes": trained.classes, "class_names": names}
    if args.checkpoint:
        trained = load_trained(args.checkpoint, device)
        options = {**trained.options, **dict(args.option)}
        return backbones.create(trained.backbone, weights=args.checkpoint, **options), {}
    return backbones.create(args.backbone, weights=args.weights, **dict(args.option)), {}


def export(args: argparse.Namespace) -> None:
    net, classes = open_source(args)
    metadata = {**exporting.describe(net), **classes}
    names = ("overwrite", "shape", "opset", "fp16", "optimize")
    settings = {key: getattr(args, key) for key in names}
    settings["int8"] = exporting.calibration_images(net, args.int8) if args.int8 else None
    source = NamedOutputs(net).eval().to(memory_format=torch.contiguous_format)  # the files' layout
    print(exporting.export(source, args.output, metadata=metadata, **settings))
    if not (args.checkpoint or args.weights):
        print("its weights are random: --weights was not given")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_code(lambda: export(args))


if __name__ == "__main__":
    sys.exit(main())
