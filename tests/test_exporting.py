"""Exported files: what they compute, what is refused, and that a wrong one is not written."""

import sys

import onnxruntime
import pytest
import torch
from helpers import ROOT, randomise_norms
from torch import nn

import backbones
from backbones import create_classifier
from backbones.deploy import NamedOutputs
from utils import exporting
from utils.exporting import ExportError, export

STRIDES = ["stride_2", "stride_4", "stride_8", "stride_16", "stride_32"]


def backbone(**options):
    torch.manual_seed(0)
    return randomise_norms(backbones.create("darknet19", width=0.125, **options)).eval()


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
    assert (entry.name, entry.shape) == ("images", ["batch", images.shape[1], "height", "width"])
    values = session.run(None, {"images": images.numpy()})
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, values), strict=True))


def run_pt2(path, images):
    return torch.export.load(path).module()(images)


RUN = {".onnx": run_onnx, ".pt2": run_pt2}


@torch.no_grad()
@pytest.mark.parametrize(
    ("suffix", "make", "names"),
    [
        (".pt2", backbone, STRIDES),
        (".onnx", lambda: backbone(out_indices=(0, 2), in_channels=1), ["stride_2", "stride_8"]),
        (".pt2", classifier, ["logits"]),
    ],
    ids=["backbone", "two maps of grey, ONNX", "classifier"],
)
def test_the_file_gives_what_the_network_gives(tmp_path, suffix, make, names):
    """At a batch and a size that neither the export nor its check have seen."""
    net, path = make(), tmp_path / f"net{suffix}"
    before = {key: value.clone() for key, value in net.state_dict().items()}
    source = NamedOutputs(net).eval()
    line = export(source, path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert line.startswith(f"{path}: ")
    assert all(name in line for name in names)
    images = torch.randn(4, source.in_channels, 70, 130)
    found, expected = RUN[suffix](path, images), net(images)
    assert list(found) == names
    for a, b in zip(found.values(), [expected] if names == ["logits"] else expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    assert str(ROOT).encode() not in path.read_bytes()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


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
    ids=["values", "NaN", "shape", "name", "it fails"],
)
def test_a_wrong_export_never_gets_its_name(tmp_path, monkeypatch, change, words):
    path = tmp_path / "net.pt2"
    path.write_bytes(b"an older one")
    write, read = exporting.FORMATS[".pt2"]

    def read_wrongly(temporary):
        found = read(temporary)
        return lambda images: change(found(images)["stride_1"])

    monkeypatch.setitem(exporting.FORMATS, ".pt2", (write, read_wrongly))
    with pytest.raises(ExportError, match=words) as caught:
        export(Scaled(), path, overwrite=True)
    assert str(caught.value).startswith(f"{path}: not written: for images [3, 3, 160, 96]")
    assert [(p, p.read_bytes()) for p in tmp_path.iterdir()] == [(path, b"an older one")]


def test_a_size_that_the_export_does_not_take_is_found_out(tmp_path):
    """Tracing keeps the way that Python took."""

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
    export(Scaled(), path, overwrite=True)
    assert list(run_pt2(path, torch.zeros(1, 3, 40, 50))) == ["stride_1"]
    with pytest.raises(ValueError, match=r"net.pth: must end in .onnx or .pt2"):
        export(Scaled(), tmp_path / "net.pth")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        export(Scaled(), tmp_path / "nowhere" / "net.onnx")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    package = "onnxscript"
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"^{package} is not installed: pip install {package} to"):
        export(Scaled(), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
