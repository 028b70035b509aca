"""Exported files: what they compute and say, what is refused, and that no wrong one is written."""

import dataclasses
import json
import sys
from importlib.util import find_spec
from xml.etree import ElementTree

import onnx
import onnxruntime
import pytest
import torch
from helpers import ROOT, TINY, randomise_norms
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torchvision.models import EfficientNet_B0_Weights

import backbones
from backbones import create_classifier
from backbones.darknet import CSPStage
from backbones.deploy import NamedOutputs
from backbones.pretrained import Preprocessing, published
from backbones.weights import WeightsError, load_weights
from utils import exporting
from utils.data.folders import Preprocess, open_folders
from utils.exporting import ExportError, describe, export

needs_openvino = pytest.mark.skipif(not find_spec("openvino"), reason="openvino is not installed")
OPENVINO = pytest.param(".xml", marks=needs_openvino)
STRIDES = ["stride_2", "stride_4", "stride_8", "stride_16", "stride_32"]


def backbone(**options):
    torch.manual_seed(0)
    return randomise_norms(backbones.create("darknet19", width=0.125, **options)).eval()


def two_maps_of_grey():
    return backbone(out_indices=(0, 2), in_channels=1)


def classifier():
    torch.manual_seed(0)
    return randomise_norms(create_classifier("cspdarknet19", 7, width=0.125)).eval()


class Scaled(nn.Module):
    """Small enough to be exported in no time."""

    in_channels, names = 3, ["stride_1"]

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, images):
        return {"stride_1": self.conv(images)}


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert entry.name == "images"
    assert entry.shape in (["batch", images.shape[1], "height", "width"], list(images.shape))
    values = session.run(None, {"images": images.numpy()})
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, values), strict=True))


def run_pt2(path, images):
    return torch.export.load(path).module()(images)


def run_openvino(path, images):
    import openvino

    config = {"INFERENCE_PRECISION_HINT": "f32"}
    values = openvino.compile_model(path, "CPU", config)({"images": images.numpy()})
    return {key.any_name: torch.from_numpy(value) for key, value in values.items()}


RUN = {".onnx": run_onnx, ".pt2": run_pt2, ".xml": run_openvino}


@torch.no_grad()
@pytest.mark.parametrize(
    ("suffix", "make", "names", "settings"),
    [
        (".pt2", backbone, STRIDES, {}),
        (".onnx", two_maps_of_grey, ["stride_2", "stride_8"], {}),
        (".onnx", lambda: classifier().backbone, STRIDES, {"optimize": True}),
        (".pt2", classifier, ["logits"], {}),
        pytest.param(".xml", backbone, STRIDES, {}, marks=needs_openvino),
    ],
)
def test_the_file_gives_what_the_network_gives(tmp_path, suffix, make, names, settings):
    """At a batch and a size that neither the export nor its check have seen."""
    source, path = NamedOutputs(make()).eval(), tmp_path / f"net{suffix}"
    line = export(source, path, **settings)
    assert all(name in line for name in names)
    images = torch.randn(4, source.in_channels, 70, 130)
    found, expected = RUN[suffix](path, images), source(images)
    assert list(found) == list(expected) == names
    for a, b in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())
    assert str(ROOT).encode() not in path.read_bytes()


@torch.no_grad()
def test_an_optimized_graph_has_no_norms_and_merged_splits(tmp_path):
    """A CSP stage has one convolution less, and BatchNorm is in the weights."""
    net, path, images = classifier(), tmp_path / "net.pt2", torch.randn(1, 3, 70, 130)
    export(NamedOutputs(net).eval(), path, optimize=True)
    names = [str(node.target) for node in torch.export.load(path).graph.nodes]
    convs = sum(isinstance(module, nn.Conv2d) for module in net.modules())
    stages = sum(isinstance(module, CSPStage) for module in net.modules())
    assert sum("conv2d" in name for name in names) == convs - stages
    assert not any("batch_norm" in name for name in names)
    torch.testing.assert_close(run_pt2(path, images)["logits"], net(images))


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".onnx", OPENVINO])
def test_a_fixed_shape_in_half_precision(tmp_path, suffix):
    """Half of the bytes, inputs and outputs in float32, and for ONNX the opset."""
    net, path, shape = classifier(), tmp_path / f"net{suffix}", (2, 48, 80)
    opset = {"opset": 20} if suffix == ".onnx" else {}
    line = export(NamedOutputs(net).eval(), path, shape=shape, fp16=True, optimize=True, **opset)
    assert "MB, float16 weights, images float32 [2, 3, 48, 80] to logits (7); " in line
    images = torch.randn(2, 3, 48, 80)
    (found,), expected = RUN[suffix](path, images).values(), net(images)
    assert found.dtype is torch.float32
    error = (found - expected).abs().max() / expected.abs().max()
    assert 1e-5 < error < 5e-3  # rounded, and not more
    count = sum(parameter.numel() for parameter in net.parameters())
    assert path.with_suffix(".bin" if suffix == ".xml" else suffix).stat().st_size < 3 * count
    if suffix == ".onnx":
        (entry,) = onnx.load(path).opset_import
        assert (entry.domain, entry.version) == ("", 20)
    else:
        (size,) = ElementTree.parse(path).findall(".//layer[@name='images']/data")
        assert size.get("shape") == "2,3,48,80"


def test_calibration_images_are_prepared_as_in_evaluation(folders, monkeypatch):
    """All of a small folder, in the order of their names; of a larger one, spread over it."""
    net, val = classifier(), open_folders(folders, TINY).val
    net.backbone.preprocessing = Preprocessing.from_recipe(dataclasses.asdict(TINY))
    (batch,) = val.eval_loader(len(val), 0)
    expected, _ = Preprocess(torch.device("cpu"), TINY)(batch)
    torch.testing.assert_close(exporting.calibration_images(net, folders / "val"), expected)
    monkeypatch.setattr(exporting, "CALIBRATION_IMAGES", 3)
    few = exporting.calibration_images(net, folders / "val")
    torch.testing.assert_close(few, expected[[0, 8, 17]])


def read_texts(path):
    """The metadata of each format by its own means."""
    if path.suffix == ".onnx":
        return {each.key: each.value for each in onnx.load(path).metadata_props}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return file.metadata()
    if path.suffix == ".xml":
        return {
            each.tag: each.get("value") for each in ElementTree.parse(path).find(".//model_info")
        }
    extra_files = {"metadata.json": ""}
    torch.export.load(path, extra_files=extra_files)
    pairs = json.loads(extra_files["metadata.json"]).items()
    return {key: each if isinstance(each, str) else json.dumps(each) for key, each in pairs}


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".safetensors", OPENVINO])
def test_the_file_says_what_it_is(tmp_path, suffix):
    """The preprocessing as torchvision has it."""
    net, images = classifier(), EfficientNet_B0_Weights.IMAGENET1K_V1.transforms()
    net.backbone.preprocessing = published("efficientnet_b0")["IMAGENET1K_V1"].preprocessing
    classes, path = ["ant", 'bee "<é>', *"vwxyz"], tmp_path / f"net{suffix}"
    metadata = {**describe(net), "classes": classes}
    export(NamedOutputs(net).eval(), path, metadata=metadata)
    texts = read_texts(path)
    assert texts.pop("backbone") == "cspdarknet19"
    assert texts.pop("eval_interpolation") == images.interpolation.value == "bicubic"
    assert texts.pop("format", "pt") == "pt"
    found = {key: json.loads(text) for key, text in texts.items()}
    assert found.pop("options") == json.loads(json.dumps(net.backbone.options))
    assert found == {
        "strides": [2, 4, 8, 16, 32],
        "channels": list(net.backbone.channels),
        "classes": classes,
        "mean": images.mean,
        "std": images.std,
        "eval_resize_px": images.resize_size[0],
        "eval_crop_px": images.crop_size[0],
    }


@torch.no_grad()
@pytest.mark.parametrize("fp16", [False, True])
def test_weights_alone_load_again(tmp_path, fp16):
    """With the head, the options to compare and the preprocessing."""
    net, path = classifier(), tmp_path / "net.safetensors"
    net.backbone.preprocessing = published("darknet19")["vision_toolbox.in1k"].preprocessing
    export(NamedOutputs(net).eval(), path, fp16=fp16, metadata=describe(net))
    again = create_classifier("cspdarknet19", weights=path, width=0.125).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(images), net(images), rtol=0, atol=2e-3 if fp16 else 0)
    types = {tensor.dtype for tensor in load_file(path).values() if tensor.ndim > 1}
    assert types == {torch.float16 if fp16 else torch.float32}
    assert again.backbone.preprocessing == net.backbone.preprocessing._replace(train_px=None)
    with pytest.raises(WeightsError, match="these weights were made with act='relu'"):
        load_weights(backbones.create("cspdarknet19", width=0.125, act="mish"), path)
    path.write_bytes(path.read_bytes().replace(b'"mean":"[', b'"mean":"{', 1))
    with pytest.raises(WeightsError, match=r"net.safetensors: not a file of weights"):
        load_weights(net, path)


def broken(value):
    raise RuntimeError("shapes do not fit\nat a node")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: {"stride_1": y + 0.01}, "has an error of 0.00. in stride_1"),
        (lambda y: {"stride_1": y * float("nan")}, "has an error of nan in stride_1"),
        (lambda y: {"stride_1": y[:1]}, r"gives \{'stride_1': \[1, 4, 160, 96\]\}, not .*\[3, 4, "),
        (lambda y: {"output": y}, r"gives \{'output': .*\}, not \{'stride_1'"),
        (broken, r"fails \(shapes do not fit\)$"),
    ],
)
def test_a_wrong_export_never_gets_its_name(tmp_path, monkeypatch, change, words):
    path = tmp_path / "net.pt2"
    path.write_bytes(b"an older one")
    write, read, takes = exporting.FORMATS[".pt2"]

    def read_wrongly(files, source):
        found = read(files, source)
        return lambda images: change(found(images)["stride_1"])

    monkeypatch.setitem(exporting.FORMATS, ".pt2", (write, read_wrongly, takes))
    with pytest.raises(ExportError, match=words) as caught:
        export(Scaled(), path, overwrite=True)
    assert str(caught.value).startswith(f"{path}: not written: for images [3, 3, 160, 96]")
    assert [(p, p.read_bytes()) for p in tmp_path.iterdir()] == [(path, b"an older one")]


def test_a_size_that_the_export_does_not_take_is_found_out(tmp_path):
    class Fixed(Scaled):
        def forward(self, images):
            return {"stride_1": self.conv(images) * int(images.shape[-1] > 100)}

    with pytest.raises(ExportError, match=r"for images \[1, 3, 75, 107\] the exported"):
        export(Fixed(), tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_unasked(tmp_path):
    path = tmp_path / "net.pt2"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"net.pt2: exists already; --overwrite"):
        export(Scaled(), path)
    assert path.read_text() == "mine"
    with pytest.raises(ValueError, match=r"net.pth: must end in .onnx or .pt2"):
        export(Scaled(), tmp_path / "net.pth")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        export(Scaled(), tmp_path / "nowhere" / "net.onnx")
    for suffix, field in ((".pt2", "fp16"), (".safetensors", "optimize")):
        with pytest.raises(ValueError, match=f"new{suffix}: --{field} is for .* alone"):
            export(Scaled(), tmp_path / f"new{suffix}", **{field: True})
    with pytest.raises(ValueError, match=r"^--opset 99: this network needs another, such as 18$"):
        export(Scaled(), tmp_path / "new.onnx", opset=99)
    assert [each.name for each in tmp_path.iterdir()] == ["net.pt2"]


@needs_openvino
def test_neither_file_of_openvino_is_replaced_unasked(tmp_path):
    (tmp_path / "net.bin").write_text("mine")
    with pytest.raises(FileExistsError, match=r"net.bin: exists already; --overwrite"):
        export(Scaled(), tmp_path / "net.xml")


@pytest.mark.parametrize(("suffix", "package"), [(".onnx", "onnxscript"), (".xml", "openvino")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, suffix, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"^{package} is not installed: pip install {package} to"):
        export(Scaled(), tmp_path / f"net{suffix}")
    assert list(tmp_path.iterdir()) == []
