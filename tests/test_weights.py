"""Weights of every format against the networks they come from, and files that must be refused."""

import hashlib
import pickle
import re
import struct
import subprocess
import sys
import urllib.error

import cv2
import numpy as np
import pytest
import timm
import torch
from helpers import randomise_norms
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel
from torchvision.models import ResNet50_Weights, Weights, WeightsEnum, get_model_builder

import backbones
from backbones.classifier import Classifier
from backbones.darknet import convert_split
from backbones.weights import WeightsError, load_weights

CSP = {"layout": "darknet", "act": "leaky_relu_0.01"}
V1 = {"residual": False, "ese": False, "stem_stride": 4}
V2 = {"ese": "last", "stem_stride": 4}
TIMM = [
    ("darknet53", "darknet53", {"act": "leaky_relu_0.01"}),
    ("cspdarknet53", "cspdarknet53", {**CSP, "split": "separate"}),
    ("cspdarknet53", "cspdarknet53", {**CSP, "split": "slice"}),
    ("vovnet39a", "vovnet39", V1),
    ("vovnet57a", "vovnet57", V1),
    ("ese_vovnet19b_slim", "vovnet19_slim", V2),
    ("ese_vovnet39b", "vovnet39", V2),
    ("ese_vovnet57b", "vovnet57", V2),
    ("ese_vovnet99b", "vovnet99", V2),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Nothing here may try: a path never needs it, and a name gets a clear error."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)


def tiny(**options):
    return backbones.create("cspdarknet19", width=0.125, **options)


def state_of(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def assert_near(found, expected, tolerance=1e-4):
    """Equal to a share of the largest value of each map."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# ---- other projects' networks --------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("theirs", "ours", "options"), TIMM)
def test_timm(tmp_path, theirs, ours, options):
    theirs = randomise_norms(timm.create_model(theirs, num_classes=5)).eval()
    path = tmp_path / "timm.safetensors"
    save_file(theirs.state_dict(), path)
    stages = [*theirs.stages]
    if "vovnet" in ours:
        stages.insert(0, theirs.stem[1])
    expected = []
    for stage in stages:
        stage.register_forward_hook(lambda module, inputs, output: expected.append(output))
    images = torch.randn(1, 3, 64, 96)
    logits = theirs(images)
    net = backbones.create(ours, weights=path, **options).eval()
    assert_near(net(images), expected)
    model = Classifier(backbones.create(ours, **options), 5)
    assert load_weights(model, path).left_out == ()
    torch.testing.assert_close(model.eval()(images), logits, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("theirs", "ours", "options"), [TIMM[1], TIMM[5]])
def test_timms_feature_extractors(theirs, ours, options):
    """`features_only=True` flattens the names of stages."""
    theirs = randomise_norms(timm.create_model(theirs, features_only=True)).eval()
    assert "stages_0" in str(theirs.state_dict().keys())
    net = backbones.create(ours, weights=theirs.state_dict(), **options).eval()
    images = torch.randn(1, 3, 64, 96)
    assert_near(net(images)[1:], theirs(images)[-4:])


def toolbox_key(key, csp):
    """The key of gau-nernst/vision-toolbox for one of ours."""
    key = re.sub(r"\.blocks\.(\d+)\.(convs|out_conv|ese)\.", r".module_\1.\2.", key)
    key = key.replace(".ese.fc.", ".ese.linear.")
    if csp:
        key = key.replace(".shortcut_conv.", ".conv1.").replace(".blocks_conv.", ".conv2.")
    else:  # a Darknet stage without blocks is a bare convolution there
        key = re.sub(r"^stages\.0\.conv\.(conv|norm)\.", r"stages.0.\1.", key)
    return key


@torch.no_grad()
@pytest.mark.parametrize("norm", ["norm", "bn"])  # now, and in its first release
@pytest.mark.parametrize(
    ("name", "options", "keys"),
    [
        ("darknet19", {}, {"stem.conv.weight", "stages.0.conv.weight"}),
        ("darknet53", {}, {"stem.conv.weight", "stages.0.blocks.0.conv1.conv.weight"}),
        ("cspdarknet53", {}, {"stages.0.conv1.conv.weight", "stages.4.out_conv.conv.weight"}),
        ("cspdarknet53", {"split": "slice"}, {"stages.0.conv2.conv.weight"}),
        ("vovnet39", {}, {"stem.2.conv.weight", "stages.2.module_1.ese.linear.bias"}),
        ("vovnet57", {"ese": False}, {"stages.3.module_2.convs.4.conv.weight"}),
    ],
)
def test_vision_toolbox(name, options, keys, norm):
    net = randomise_norms(backbones.create(name, **options)).eval()
    source = convert_split(net, "separate") if "csp" in name else net
    state = {
        re.sub(r"\.norm\.(\w+)$", rf".{norm}.\1", toolbox_key(key, "csp" in name))
        if name != "darknet53"
        else key.replace(".norm.", f".{norm}."): value
        for key, value in source.state_dict().items()
    }
    assert keys <= state.keys()
    other = backbones.create(name, weights=state, **options).eval()
    images = torch.randn(1, 3, 64, 96)
    assert_near(other(images), net(images), 1e-6)


# ---- Darknet's files -----------------------------------------------------------------------------


class DarknetNet:
    """Writes a .cfg and its .weights by the documented layout, with known random numbers."""

    def __init__(self, csp, seed=0):
        self.rng, self.layers, self.arrays, self.ends = np.random.default_rng(seed), [], [], []
        self.conv(3, 32, 3)
        widths, depths = (32, 64, 128, 256, 512, 1024), (1, 2, 8, 8, 4)
        for i, depth in enumerate(depths):
            (self.csp_stage if csp else self.stage)(widths[i], widths[i + 1], depth, i == 0)
            self.ends.append(len(self.layers) - 1)

    def conv(self, in_channels, channels, size, stride=1):
        self.layers.append(
            f"[convolutional]\nbatch_normalize=1\nfilters={channels}\nsize={size}\n"
            f"stride={stride}\npad=1\nactivation=leaky\n"
        )
        fan_in, rng = in_channels * size * size, self.rng
        self.arrays += [rng.normal(0, 0.3, channels), rng.uniform(0.5, 1.5, channels)]
        self.arrays += [rng.normal(0, 0.3, channels), rng.uniform(0.5, 2, channels)]
        self.arrays.append(rng.normal(0, (2 / fan_in) ** 0.5, channels * fan_in))

    def blocks(self, channels, mid_channels, depth):
        for _ in range(depth):
            self.conv(channels, mid_channels, 1)
            self.conv(mid_channels, channels, 3)
            self.layers.append("[shortcut]\nfrom=-3\nactivation=linear\n")

    def stage(self, in_channels, channels, depth, first):
        self.conv(in_channels, channels, 3, 2)
        self.blocks(channels, channels // 2, depth)

    def csp_stage(self, in_channels, channels, depth, first):
        """As csdarknet53.cfg has it: the second 1x1 goes through the blocks and comes first."""
        part = channels if first else channels // 2
        self.conv(in_channels, channels, 3, 2)
        self.conv(channels, part, 1)
        self.layers.append("[route]\nlayers=-2\n")
        self.conv(channels, part, 1)
        self.blocks(part, channels // 2, depth)
        self.conv(part, part, 1)
        self.layers.append(f"[route]\nlayers=-1,{-3 * depth - 4}\n")
        self.conv(2 * part, channels, 1)

    def numbers(self):
        return np.concatenate(self.arrays).astype("<f4")

    def write(self, folder, height_px, width_px):
        cfg, weights = folder / "net.cfg", folder / "net.weights"
        size = f"[net]\nheight={height_px}\nwidth={width_px}\nchannels=3\n"
        cfg.write_text("\n".join([size, *self.layers]))
        weights.write_bytes(header() + self.numbers().tobytes())
        return cfg, weights


def header(major=0, minor=2, revision=5):
    """Three int32 and the images seen: int64 from version 0.2 on."""
    return struct.pack("<3iq" if (major, minor) >= (0, 2) else "<4i", major, minor, revision, 64)


@pytest.fixture(scope="module", params=[False, True], ids=["darknet53", "csdarknet53"])
def darknet(request, tmp_path_factory):
    net = DarknetNet(csp=request.param)
    net.name = "cspdarknet53" if request.param else "darknet53"
    net.options = {"act": "leaky_relu", **({"layout": "darknet"} if request.param else {})}
    net.cfg, net.path = net.write(tmp_path_factory.mktemp(net.name), 64, 96)
    return net


def opencv_maps(darknet, images):
    """What OpenCV's reader makes of the same two files at the end of each stage."""
    theirs = cv2.dnn.readNetFromDarknet(str(darknet.cfg), str(darknet.path))
    names = theirs.getLayerNames()
    ends = [
        next(n for n in (f"shortcut_{i}", f"leaky_{i + 1}") if n in names) for i in darknet.ends
    ]
    theirs.setInput(images.numpy())
    return [torch.from_numpy(each) for each in theirs.forward(ends)]


@torch.no_grad()
def test_darknet_files_against_opencv(darknet):
    net = backbones.create(darknet.name, weights=darknet.path, **darknet.options).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-6  # OpenCV's; Darknet's CUDA code has 1e-5, as we do
    images = torch.randn(1, 3, 64, 96)
    assert_near(net(images), opencv_maps(darknet, images), 1e-5)


@torch.no_grad()
def test_darknet_files_for_parts_and_other_splits(darknet):
    images = torch.randn(1, 3, 64, 96)
    create = backbones.create
    whole = create(darknet.name, weights=darknet.path, **darknet.options).eval()
    part = create(darknet.name, weights=darknet.path, out_indices=(0, 2), **darknet.options).eval()
    assert_near(part(images), [whole(images)[0], whole(images)[2]], 1e-6)
    if darknet.name == "cspdarknet53":
        sliced = create(darknet.name, weights=darknet.path, split="slice", **darknet.options)
        assert_near(sliced.eval()(images), whole(images), 1e-5)


def test_truncated_darknet_files_and_old_headers(darknet, tmp_path):
    """`darknet53.conv.74` ends with the last convolution; headers grew by four bytes in 0.2."""
    net = backbones.create(darknet.name, **darknet.options)
    for version in ((0, 1, 0), (0, 2, 0)):
        path = tmp_path / f"net{version[1]}.conv.74"
        path.write_bytes(header(*version) + darknet.numbers().tobytes())
        assert load_weights(net, path).loaded == len(darknet.arrays)


def test_darknet_heads(darknet, tmp_path):
    """A 1x1 convolution with biases for 7 classes: biases first, then weights."""
    bias, weight = np.arange(7, dtype="<f4"), np.random.rand(7, 1024).astype("<f4")
    path = tmp_path / "net.weights"
    path.write_bytes(header() + b"".join(a.tobytes() for a in (darknet.numbers(), bias, weight)))
    model = Classifier(backbones.create(darknet.name, **darknet.options), 7)
    load_weights(model, path)
    assert torch.equal(model.head.bias, torch.from_numpy(bias))
    assert torch.equal(model.head.weight, torch.from_numpy(weight))
    assert load_weights(model.backbone, path).left_out == ("head.bias", "head.weight")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-4], "cut short or of a smaller network; [0-9,]+ numbers"),
        (lambda data: data[:-3], "bytes are not a header of 20 and float32 numbers"),
        (lambda data: data + bytes(8), "2 numbers follow the last convolution"),
        (lambda data: data[:10], "10 bytes are not a header"),
        (lambda data: b"", "does not begin with the header"),
        (lambda data: b"\x89PNG\r\n\x1a\n" + data, "does not begin with the header"),
        (lambda data: data[:20] + bytes(4000) + data[20:-4000], "not of this network, or damaged"),
        (lambda data: data[:24] + b"\0\0\x80\x7f" * 500_000 + data[2_000_024:], "not finite"),
    ],
)
def test_damaged_darknet_files_are_refused(darknet, tmp_path, change, words):
    path = tmp_path / "net.weights"
    path.write_bytes(change(darknet.path.read_bytes()))
    net = backbones.create(darknet.name, **darknet.options)
    before = state_of(net)
    with pytest.raises(WeightsError, match=words) as caught:
        load_weights(net, path)
    assert str(path) in str(caught.value)
    assert_same(net, before)


def test_darknet_files_of_other_networks_are_refused(darknet, tmp_path):
    for name in ("darknet19", "vovnet39", "resnet18"):
        with pytest.raises(WeightsError, match="read for darknet53 and cspdarknet53 alone"):
            backbones.create(name, weights=darknet.path)
    with pytest.raises(WeightsError, match='cspdarknet53", layout="darknet"'):
        backbones.create("cspdarknet53", weights=darknet.path)
    if darknet.name == "darknet53":  # longer than csdarknet53's
        with pytest.raises(WeightsError, match="not of this network"):
            backbones.create("cspdarknet53", weights=darknet.path, act="mish", layout="darknet")


def test_darknet_files_are_held_to_their_activation(darknet):
    options = {**darknet.options, "act": "relu"}
    with pytest.raises(WeightsError, match="made with act='leaky_relu'"):
        backbones.create(darknet.name, weights=darknet.path, **options)
    if darknet.name == "cspdarknet53":  # YOLOv4's
        backbones.create(darknet.name, weights=darknet.path, **{**options, "act": "mish"})


def test_the_first_layers_are_enough_for_the_first_maps(darknet, tmp_path):
    part = backbones.create(darknet.name, out_indices=(0, 1), **darknet.options)
    whole = backbones.create(darknet.name, weights=darknet.path, **darknet.options).eval()
    count = sum(t.numel() for t in part.state_dict().values() if t.ndim)
    path = tmp_path / "net.conv.11"
    path.write_bytes(darknet.path.read_bytes()[: 20 + 4 * count])
    load_weights(part.eval(), path)
    images = torch.randn(1, 3, 64, 64)
    assert_near(part(images), whole(images)[:2], 1e-6)
    with pytest.raises(WeightsError, match="cut short"):
        load_weights(whole, path)
    path.write_bytes(darknet.path.read_bytes()[: 24 + 4 * count])  # and one number more
    with pytest.raises(WeightsError, match="1 numbers follow the last convolution"):
        load_weights(part, path)


def test_first_layers_of_a_detector(darknet, tmp_path):
    """yolov4.conv.137 as it is; other tails when asked for."""
    path = tmp_path / "yolov4.conv.137"
    net = backbones.create(darknet.name, **darknet.options)
    path.write_bytes(darknet.path.read_bytes() + bytes(4 * 15_857_152))
    assert load_weights(net, path).loaded == len(darknet.arrays)
    path.write_bytes(darknet.path.read_bytes() + bytes(4 * 99))
    with pytest.raises(WeightsError, match="no entries and no prefixes"):
        load_weights(net, path, prefix="module.")
    assert load_weights(net, path, strict=False).loaded == len(darknet.arrays)


# ---- this project's own --------------------------------------------------------------------------


def assert_same(net, state):
    assert net.state_dict().keys() == state.keys()
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_our_own_backbone_classifier_run_and_average(tmp_path):
    model = randomise_norms(Classifier(tiny(), 3))
    average = AveragedModel(model, use_buffers=True)
    for parameter in average.module.parameters():
        parameter.data += 1
    run = {"config": {}, "model": model.state_dict(), "ema": average.state_dict()}
    files = {
        "backbone": (model.backbone.state_dict(), {}, model),
        "classifier": (model.state_dict(), {}, model),
        "run": ({**run, "optimizer": {}}, {}, average.module),  # as what is evaluated and exported
        "raw": ({**run, "optimizer": {}}, {"entry": "model"}, model),
        "average": (average.state_dict(), {}, average.module),
    }
    for name, (content, options, expected) in files.items():
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        net = tiny()
        load_weights(net, path, **options)
        assert_same(net, expected.backbone.state_dict())
        if name != "backbone":
            other = Classifier(tiny(), 3)
            load_weights(other, path, **options)
            assert_same(other, expected.state_dict())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_files_and_paths(tmp_path, suffix):
    net = tiny()
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(net.state_dict(), path)
    for source in (path, str(path)):
        report = load_weights(tiny(), source)
        assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert report.sha256 in str(report)
        assert report.loaded == len(net.state_dict())
        assert_same(tiny(weights=source), net.state_dict())


def test_the_two_splits_load_each_other():
    images = torch.randn(1, 3, 64, 64)
    source = randomise_norms(tiny()).eval()
    sliced = tiny(split="slice", weights=source.state_dict()).eval()
    back = tiny(weights=sliced.state_dict())
    assert_same(back, source.state_dict())
    assert_near(sliced(images), source(images), 1e-5)
    with pytest.raises(WeightsError, match="keys missing"):
        tiny(split="slice", weights=tiny(split="partial").state_dict())


def test_stages_that_are_not_there_are_left_out():
    for name in ("cspdarknet19", "vovnet19_slim", "resnet18", "mobilenet_v2"):
        whole = backbones.create(name)
        part = backbones.create(name, out_indices=(0, 2))
        report = load_weights(part, whole.state_dict())
        assert report.loaded == len(part.state_dict())
        assert len(report.left_out) == len(whole.state_dict()) - len(part.state_dict()) > 0
        with pytest.raises(WeightsError, match="keys missing"):
            load_weights(whole, part.state_dict())


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["darknet19", "vovnet19_slim", "resnet18", "mobilenet_v3_small", "efficientnet_b0"]
)
def test_image_channels_are_adapted(name):
    """A grey image gives what its three copies gave; so does an image of six equal channels."""
    rgb = randomise_norms(backbones.create(name)).eval()
    grey = torch.randn(1, 1, 64, 64)
    expected = rgb(grey.expand(-1, 3, -1, -1))
    for channels in (1, 6):
        net = backbones.create(name, in_channels=channels, weights=rgb.state_dict()).eval()
        assert_near(net(grey.expand(-1, channels, -1, -1)), expected)
    net = backbones.create(name, in_channels=5)
    report = load_weights(net, rgb.state_dict())
    assert report.adapted == next(iter(rgb.state_dict()))
    stems = [next(iter(each.state_dict().values())) for each in (rgb, net)]
    torch.testing.assert_close(stems[1], stems[0][:, [0, 1, 2, 0, 1]] * 3 / 5)
    with pytest.raises(WeightsError, match=r"first of another shape: .*\[\d+, 5, .*, here .*6, "):
        backbones.create(name, in_channels=6, weights=net.state_dict())


# ---- what does not match -------------------------------------------------------------------------


def test_one_error_tells_all_and_nothing_is_loaded():
    state = state_of(tiny())
    state["stages.9.extra"] = state.pop("stages.1.conv.conv.weight")
    state["stem.conv.weight"] = torch.zeros(4, 3, 3, 3)
    net = tiny()
    before = state_of(net)
    with pytest.raises(WeightsError) as caught:
        load_weights(net, state)
    assert str(caught.value) == (
        "state dict: backbone weights do not match: 1 keys missing, 1 unexpected, 1 of another "
        "shape; first missing: stages.1.conv.conv.weight; first unexpected: stages.9.extra; first "
        "of another shape: stem.conv.weight [4, 3, 3, 3], here [8, 3, 3, 3]"
    )
    assert_same(net, before)
    report = load_weights(net, state, strict=False)
    assert report.missing == ("stages.1.conv.conv.weight",)
    assert report.unexpected == ("stages.9.extra",)
    assert report.misshaped == ("stem.conv.weight",)
    assert report.loaded == len(before) - 2
    assert torch.equal(net.state_dict()["stem.conv.weight"], before["stem.conv.weight"])
    key = "stages.4.out_conv.conv.weight"
    assert torch.equal(net.state_dict()[key], state[key])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_wrapped_keys_are_told_and_taken_when_asked(prefix):
    net = tiny()
    state = {prefix + key: value for key, value in net.state_dict().items()}
    with pytest.raises(WeightsError, match=re.escape(f"load_weights(..., prefix='{prefix}')")):
        load_weights(tiny(), state)
    other = tiny()
    load_weights(other, state, prefix=prefix)
    assert_same(other, net.state_dict())
    with pytest.raises(WeightsError, match=r"no key begins with 'nothing.'; the first is"):
        load_weights(tiny(), state, prefix="nothing.")


@pytest.mark.parametrize("entry", ["state_dict", "model_ema", "model"])
def test_wrapped_state_dicts_are_told_and_taken_when_asked(tmp_path, entry):
    net, path = tiny(), tmp_path / "checkpoint.pth"
    torch.save({"epoch": 3, entry: net.state_dict()}, path)
    with pytest.raises(WeightsError, match=f"load_weights\\(..., entry='{entry}'\\)"):
        load_weights(tiny(), path)
    other = tiny()
    load_weights(other, path, entry=entry)
    assert_same(other, net.state_dict())
    with pytest.raises(WeightsError, match=f"has no state dict 'best'; it has {entry}"):
        load_weights(tiny(), path, entry="best")


def test_other_heads():
    state = Classifier(tiny(), 3).state_dict()
    for wrong in (Classifier(tiny(), 4), Classifier(backbones.create("cspdarknet19"), 3)):
        with pytest.raises(WeightsError, match="do not match: 0 keys missing, 0 unexpected"):
            load_weights(wrong, state)
    with pytest.raises(WeightsError, match=r"load_weights\(model.backbone, ...\)"):
        load_weights(Classifier(tiny(), 4), state)
    with pytest.raises(WeightsError, match=r"load_weights\(model.backbone, ...\)"):
        load_weights(Classifier(tiny(), 3), tiny().state_dict())


@pytest.mark.parametrize(
    ("theirs", "name", "options", "words"),
    [
        ("darknet53", "darknet53", {}, "made with act='leaky_relu_0.01'"),
        ("cspdarknet53", "cspdarknet53", {"act": "leaky_relu_0.01"}, "layout='darknet'"),
        ("vovnet39a", "vovnet39", {"ese": False, "stem_stride": 4}, "residual=False"),
        ("ese_vovnet39b", "vovnet39", {"ese": "last"}, "stem_stride=4"),
        ("ese_vovnet39b", "vovnet39", {"stem_stride": 4}, "made with ese='last'"),
        ("ese_vovnet39b", "vovnet39", {**V2, "act": "mish"}, "made with act='relu'"),
    ],
)
def test_options_that_no_key_shows_are_held_to_the_format(theirs, name, options, words):
    state = timm.create_model(theirs).state_dict()
    with pytest.raises(WeightsError, match=words):
        backbones.create(name, weights=state, **options)
    report = load_weights(backbones.create(name, **options), state, strict=False)
    assert report.differing
    assert "made with" in str(report)


def test_wrappers_in_wrappers_and_larger_networks():
    net = tiny()
    for prefix in ("_orig_mod.module.", "backbone.body.", "student.encoder."):
        state = {"loss.weight": torch.zeros(1)} if prefix[0] == "s" else {}
        state |= {prefix + key: value for key, value in net.state_dict().items()}
        with pytest.raises(WeightsError, match=re.escape(f"prefix='{prefix}'")):
            load_weights(tiny(), state)
        other = tiny()
        load_weights(other, state, prefix=prefix)
        assert_same(other, net.state_dict())


def test_a_run_tells_its_options(tmp_path):
    """The activation shows in no key."""
    weights = Classifier(tiny(act="mish"), 3).state_dict()
    state = {"model": weights, "ema": weights, "optimizer": {}}
    path = tmp_path / "last.pt"
    torch.save({**state, "config": {"options": {"width": 0.125, "act": "mish"}}}, path)
    with pytest.raises(WeightsError, match="made with act='mish'"):
        load_weights(tiny(), path)
    assert load_weights(tiny(act="mish"), path).loaded


def test_two_keys_for_one_tensor_are_refused():
    net = tiny()
    state = state_of(net)
    twice = [
        {**state, **{f"backbone.{key}": value for key, value in state.items()}},
        {**state, **tiny(split="slice").state_dict()},
    ]
    for each in twice:
        with pytest.raises(WeightsError, match=r"two keys of these weights|unexpected"):
            load_weights(net, each)
    theirs = get_model_builder("resnet18")(weights=None).state_dict()
    model = Classifier(backbones.create("resnet18"), 1000)
    with pytest.raises(WeightsError, match="two keys of these weights mean the same: fc"):
        load_weights(model, {"head.weight": torch.zeros(1000, 512), **theirs})


KEY = "stages.2.out_conv.conv.weight"
HALVES = ("stages.2.shortcut_conv.norm.weight", "stages.2.blocks_conv.norm.weight")


@pytest.mark.parametrize("split", ["separate", "slice"])
@pytest.mark.parametrize(
    ("key", "change"),
    [
        (KEY, lambda t: t.to("meta")),
        (KEY, lambda t: t.to_sparse()),
        (KEY, lambda t: t.to(torch.complex64)),
        (KEY, lambda t: t.to(torch.int8)),
        (KEY, lambda t: t > 0),
        (KEY, lambda t: torch.nn.UninitializedParameter()),
        (KEY, lambda t: t[0, 0, 0, 0]),
        (HALVES[0], lambda t: t[0]),
        (HALVES[1], lambda t: t[0]),
        (HALVES[1], lambda t: t[:, None]),
        (HALVES[1].replace("weight", "num_batches_tracked"), lambda t: t[None]),
    ],
)
def test_odd_tensors_are_refused_and_nothing_is_loaded(split, key, change):
    net = tiny(split=split)
    before = state_of(net)
    state = {k: v + 1 for k, v in tiny().state_dict().items()}
    with pytest.raises(WeightsError):
        load_weights(net, {**state, key: change(state[key])})
    assert_same(net, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_taken(dtype):
    source = tiny()
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in source.state_dict().items()}
    grey = tiny(in_channels=1, weights=state)
    torch.testing.assert_close(
        grey.stem.conv.weight, source.stem.conv.weight.sum(1, keepdim=True), rtol=0.02, atol=0.02
    )
    assert tiny(weights=state).stem.conv.weight.dtype is torch.float32


def test_nothing_that_matches_is_an_error_strict_or_not():
    with pytest.raises(WeightsError, match="150 keys missing, 1 unexpected"):
        load_weights(tiny(), {"x": torch.zeros(1)}, strict=False)


def test_a_module_without_storage_is_refused():
    with torch.device("meta"):
        net = tiny()
    with pytest.raises(WeightsError, match="on the meta device"):
        load_weights(net, tiny().state_dict())


@pytest.mark.parametrize(
    "options", [{"entry": ["model"]}, {"prefix": 3}, {"sha256": 123}, {"sha256": b"00"}]
)
def test_arguments_of_other_types_are_refused(options):
    with pytest.raises(WeightsError, match="must be a string"):
        load_weights(tiny(), tiny().state_dict(), **options)


def test_the_backbone_keeps_its_report(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(tiny().state_dict(), path)
    assert tiny().weights_report is None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in str(tiny(weights=path).weights_report)


# ---- files that are not there, damaged or dangerous ----------------------------------------------


class Bomb:
    def __reduce__(self):
        return (print, ("code ran",))


def test_code_is_refused_and_does_not_run(tmp_path, capsys):
    path = tmp_path / "bomb.pt"
    torch.save({"stem.conv.weight": torch.zeros(1), "extra": Bomb()}, path)
    pickled = tmp_path / "bomb.pth"
    pickled.write_bytes(pickle.dumps(Bomb(), protocol=2))
    for each in (path, pickled):
        with pytest.raises(WeightsError, match=r"bomb.pth?: refused, .*print could run"):
            load_weights(tiny(), each)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights\n", b"PK\x03\x04 cut short", bytes(99)])
def test_broken_files_are_one_line(tmp_path, suffix, content):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"broken{suffix}: not a file of weights") as caught:
        load_weights(tiny(), path)
    assert "\n" not in str(caught.value)


def test_cut_files_are_one_line(tmp_path):
    for suffix, save in ((".pt", torch.save), (".safetensors", save_file)):
        path = tmp_path / f"cut{suffix}"
        save(tiny().state_dict(), path)
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(WeightsError, match="not a file of weights"):
            load_weights(tiny(), path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1)], "holds a list, not a state dict"),
        (torch.zeros(1), "holds a Tensor, not a state dict"),
        ({}, "it is empty"),
        ({"epoch": 3}, "'epoch' is no name of a tensor"),
        ({3: torch.zeros(1)}, "3 is no name of a tensor"),
        ({"n_averaged": torch.zeros(()), 3: torch.zeros(1)}, "3 is no name of a tensor"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, words):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(WeightsError, match=words):
        load_weights(tiny(), path)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(WeightsError, match=r"missing.pt: there is no such file"):
        tiny(weights=tmp_path / "missing.pt")
    with pytest.raises(WeightsError, match="is a folder"):
        tiny(weights=tmp_path)
    with pytest.raises(WeightsError, match="'DEFAULT' is no file, and CSPDarknet has no weights"):
        tiny(weights="DEFAULT")
    for text in ("", "x" * 300 + ".pt", "a\0b.pt", "https://example.org/resnet18.pt"):
        with pytest.raises(WeightsError, match=r"give (a file|the file)"):
            tiny(weights=text)
    with pytest.raises(WeightsError, match="must be a path, a name or a state dict, not int"):
        tiny(weights=3)
    with pytest.raises(WeightsError, match="into a Backbone or a Classifier, not into a Linear"):
        load_weights(torch.nn.Linear(1, 1), {})


def test_hashes_are_checked_before_anything_is_read(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(tiny().state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for right in (digest, digest[:8], digest.upper()):
        assert load_weights(tiny(), path, sha256=right).sha256 == digest
    torch.save(Bomb(), path)
    with pytest.raises(WeightsError, match=f"has SHA-256 [0-9a-f]+, expected {digest}"):
        load_weights(tiny(), path, sha256=digest)
    with pytest.raises(WeightsError, match="a state dict has none"):
        load_weights(tiny(), {}, sha256=digest)
    for wrong in ("", "abc", "x" * 64):
        with pytest.raises(WeightsError, match="must be 8 to 64 hexadecimal digits"):
            load_weights(tiny(), path, sha256=wrong)


# ---- torchvision's weights by name ---------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


def test_names_without_the_network_say_what_to_fetch_and_where_to_put_it(hub):
    with pytest.raises(WeightsError) as caught:
        backbones.create("resnet18", weights="IMAGENET1K_V1")
    assert str(caught.value) == (
        "IMAGENET1K_V1 of resnet18 is not here and cannot be downloaded (<urlopen error no network "
        "in this test>); download https://download.pytorch.org/models/resnet18-f37072fd.pth "
        f"elsewhere and put it at {hub / 'resnet18-f37072fd.pth'}"
    )
    assert not list(hub.iterdir())


def test_torchvisions_enumerations_are_names(hub):
    with pytest.raises(WeightsError, match=r"put it at .*resnet50-11ad3fa6\.pth"):
        backbones.create("resnet50", weights=ResNet50_Weights.IMAGENET1K_V2)
    for name in ("resnet18", "vovnet39"):
        with pytest.raises(WeightsError, match="are weights of another network"):
            backbones.create(name, weights=ResNet50_Weights.DEFAULT)


def test_unknown_names_list_the_known():
    with pytest.raises(WeightsError, match="choose from IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"):
        backbones.create("resnet50", weights="IMAGENET1K_V9")


def test_cached_files_are_checked_too(hub, monkeypatch):
    """The name of a published file ends in the first digits of its SHA-256."""
    path = hub / "resnet18-f37072fd.pth"
    path.parent.mkdir()
    theirs = get_model_builder("resnet18")(weights=None)
    torch.save(theirs.state_dict(), path)
    with pytest.raises(WeightsError, match="expected f37072fd; it is damaged or another file"):
        backbones.create("resnet18", weights="DEFAULT")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    right = path.rename(hub / f"resnet18-{digest[:8]}.pth")
    published = Weights(
        url=f"https://download.pytorch.org/models/{right.name}", transforms=None, meta={}
    )
    known = WeightsEnum("Published", {"DEFAULT": published})
    monkeypatch.setattr("backbones.weights.get_model_weights", lambda name: known)
    model = Classifier(backbones.create("resnet18"), 1000)
    load_weights(model, "DEFAULT")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model.eval()(images), theirs.eval()(images))


def test_safetensors_is_asked_for_only_when_needed(tmp_path):
    """The module works without the package, and says what to install when a file needs it."""
    path = tmp_path / "w.safetensors"
    save_file(tiny().state_dict(), path)
    code = (
        "import sys; sys.modules['safetensors'] = sys.modules['safetensors.torch'] = None\n"
        "import backbones\n"
        "try:\n"
        f"    backbones.create('cspdarknet19', width=0.125, weights={str(path)!r})\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "needs `pip install safetensors`" in done.stdout, done.stderr
