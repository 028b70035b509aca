"""Weights of every format against the networks they come from, and files that must be refused."""

import argparse
import hashlib
import pickle
import re
import struct
import sys

import cv2
import numpy as np
import pytest
import timm
import torch
from helpers import assert_near, assert_same_bits, randomise_norms
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

import backbones
from backbones.classifier import Classifier
from backbones.darknet import convert_split
from backbones.weights import WeightsError, load_weights
from utils.training.checkpoint import load_published

CSP = {"layout": "darknet", "act": "leaky_relu_0.01"}
V1 = {"residual": False, "ese": False, "stem_stride": 4}
V2 = {"ese": "last", "stem_stride": 4}
TIMM = [  # others by their names: test_pretrained.py
    ("cspdarknet53", "cspdarknet53", {**CSP, "split": "slice"}),
    ("vovnet39a", "vovnet39", V1),
    ("ese_vovnet19b_slim", "vovnet19_slim", V2),
]


def tiny(**options):
    return backbones.create("cspdarknet19", width=0.125, **options)


def state_of(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


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
    model = Classifier(backbones.create(ours, **options), 5)
    assert load_weights(model, path).left_out == ()
    torch.testing.assert_close(model.eval()(images), logits, rtol=1e-3, atol=1e-4)
    assert_near(model.backbone(images), expected)


@torch.no_grad()
@pytest.mark.parametrize(("theirs", "ours", "options"), [TIMM[0], TIMM[2]])
def test_timms_feature_extractors(theirs, ours, options):
    """`features_only=True` flattens the names of stages."""
    theirs = randomise_norms(timm.create_model(theirs, features_only=True)).eval()
    assert "stages_0" in str(theirs.state_dict().keys())
    net = backbones.create(ours, weights=theirs.state_dict(), **options).eval()
    images = torch.randn(1, 3, 64, 96)
    assert_near(net(images)[1:], theirs(images)[-4:])


def test_options_that_no_key_shows_must_be_the_formats():
    state = timm.create_model("ese_vovnet19b_slim").state_dict()
    for options, words in (
        ({"ese": "last"}, "made with stem_stride=4"),
        ({**V2, "residual": False}, "made with residual=True"),
        ({**V2, "act": "mish"}, "made with act='relu'"),
    ):
        net = backbones.create("vovnet19_slim", **options)
        with pytest.raises(WeightsError, match=words):
            load_weights(net, state)
        assert words in str(load_weights(net, state, strict=False))


def toolbox_key(key, csp):
    """vision-toolbox's key for one of ours (gau-nernst/vision-toolbox)."""
    key = re.sub(r"\.blocks\.(\d+)\.(convs|out_conv|ese)\.", r".module_\1.\2.", key)
    key = key.replace(".ese.fc.", ".ese.linear.")
    if csp:
        key = key.replace(".shortcut_conv.", ".conv1.").replace(".blocks_conv.", ".conv2.")
    else:  # a Darknet stage without blocks is a bare convolution there
        key = re.sub(r"^stages\.0\.conv\.(conv|norm)\.", r"stages.0.\1.", key)
    return key


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options", "norm", "key"),  # "norm" now, "bn" in its first release
    [
        ("darknet19", {}, "norm", "stages.0.conv.weight"),
        ("darknet19", {}, "bn", "stages.0.bn.weight"),
        ("cspdarknet53", {"split": "slice"}, "bn", "stages.0.conv2.conv.weight"),
        ("vovnet39", {}, "bn", "stages.2.module_1.ese.linear.bias"),
        ("vovnet57", {"ese": False}, "norm", "stages.3.module_2.convs.4.conv.weight"),
        ("vovnet19_slim", {"slim_channels": 128}, "norm", "stages.0.module_0.ese.linear.bias"),
    ],
)
def test_vision_toolbox(name, options, norm, key):
    net = randomise_norms(backbones.create(name, **options)).eval()
    source = convert_split(net, "separate") if "csp" in name else net
    state = {
        toolbox_key(k, "csp" in name).replace(".norm.", f".{norm}."): value
        for k, value in source.state_dict().items()
    }
    assert key in state
    other = backbones.create(name, weights=state, **options).eval()
    images = torch.randn(1, 3, 64, 96)
    assert_near(other(images), net(images), 1e-6)


# ---- Darknet's files -----------------------------------------------------------------------------


class DarknetNet:
    """Writes a .cfg and its .weights by the documented layout, with known random numbers."""

    def __init__(self, csp):
        self.rng, self.layers, self.arrays, self.ends = np.random.default_rng(0), [], [], []
        self.conv(3, 32, 3)
        widths, depths = (32, 64, 128, 256, 512, 1024), (1, 2, 8, 8, 4)
        for i, depth in enumerate(depths):
            self.conv(widths[i], widths[i + 1], 3, 2)
            if csp:
                self.cross_stage(widths[i + 1], depth, i == 0)
            else:
                self.blocks(widths[i + 1], widths[i + 1] // 2, depth)
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

    def cross_stage(self, channels, depth, first):
        """As csdarknet53.cfg has it: the second 1x1 goes through the blocks and comes first."""
        part = channels if first else channels // 2
        self.conv(channels, part, 1)
        self.layers.append("[route]\nlayers=-2\n")
        self.conv(channels, part, 1)
        self.blocks(part, channels // 2, depth)
        self.conv(part, part, 1)
        self.layers.append(f"[route]\nlayers=-1,{-3 * depth - 4}\n")
        self.conv(2 * part, channels, 1)

    def numbers(self):
        return np.concatenate(self.arrays).astype("<f4")

    def write(self, folder):
        cfg, weights = folder / "net.cfg", folder / "net.weights"
        cfg.write_text("\n".join(["[net]\nheight=64\nwidth=96\nchannels=3\n", *self.layers]))
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
    net.cfg, net.path = net.write(tmp_path_factory.mktemp(net.name))
    net.create = lambda **more: backbones.create(net.name, **{**net.options, **more})
    net.loaded = net.create(weights=net.path).eval()
    return net


@torch.no_grad()
def test_darknet_files_against_opencv(darknet):
    """OpenCV's reader of the same two files, at the end of each stage."""
    images = torch.randn(1, 3, 64, 96)
    theirs = cv2.dnn.readNetFromDarknet(str(darknet.cfg), str(darknet.path))
    names = theirs.getLayerNames()
    ends = [
        next(n for n in (f"shortcut_{i}", f"leaky_{i + 1}") if n in names) for i in darknet.ends
    ]
    theirs.setInput(images.numpy())
    expected = [torch.from_numpy(each) for each in theirs.forward(ends)]
    net = darknet.create(weights=darknet.path).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-6  # OpenCV's; Darknet's CUDA code has 1e-5, as we do
    assert_near(net(images), expected, 1e-5)


@torch.no_grad()
def test_darknet_files_for_other_networks(darknet, tmp_path):
    """Parts of the network, the other split, and files of other versions or with only a part."""
    images = torch.randn(1, 3, 64, 96)
    expected = darknet.loaded(images)
    part = darknet.create(weights=darknet.path, out_indices=(0, 2)).eval()
    assert_near(part(images), [expected[0], expected[2]], 1e-6)
    if darknet.name == "cspdarknet53":
        sliced = darknet.create(weights=darknet.path, split="slice").eval()
        assert_near(sliced(images), expected, 1e-5)
    path = tmp_path / "net.conv.74"  # headers grew by four bytes in 0.2
    path.write_bytes(header(0, 1, 0) + darknet.numbers().tobytes())
    assert load_weights(part, path).loaded == len(part.state_dict()) * 5 // 6
    part = darknet.create(out_indices=(0, 1)).eval()
    count = sum(t.numel() for t in part.state_dict().values() if t.ndim)
    path.write_bytes(darknet.path.read_bytes()[: 20 + 4 * count])  # the first two stages
    load_weights(part, path)
    assert_near(part(images), expected[:2], 1e-6)
    with pytest.raises(WeightsError, match=r"missing, first stages\.2\.conv"):
        darknet.create(weights=path)


def test_darknets_classifiers_have_their_own_classes_and_colours(darknet, tmp_path):
    """Not that of wnids (data/imagenet.labels.list); RGB from 0 to 1."""
    path = tmp_path / "net.weights"
    path.write_bytes(darknet.path.read_bytes() + bytes(4 * 1000 * 1025))
    with pytest.raises(ValueError, match=r"not those of ImageNet .*; give --class-names"):
        load_published(darknet.name, str(path), darknet.options)
    images = darknet.create(weights=path).preprocessing
    assert (images.mean, images.std) == ((0, 0, 0), (1, 1, 1))


def test_darknet_heads_and_tails(darknet, tmp_path):
    """A 1x1 convolution with biases for 7 classes, biases first; the neck of yolov4.conv.137."""
    bias, weight = np.arange(7, dtype="<f4"), np.random.rand(7, 1024).astype("<f4")
    path, data = tmp_path / "net.weights", darknet.path.read_bytes()
    path.write_bytes(data + bias.tobytes() + weight.tobytes())
    model = Classifier(darknet.create(), 7)
    load_weights(model, path)
    assert torch.equal(model.head.bias, torch.from_numpy(bias))
    assert torch.equal(model.head.weight, torch.from_numpy(weight))
    assert load_weights(model.backbone, path).left_out == ("head.bias", "head.weight")
    path.write_bytes(data + bytes(4 * 15_857_152))
    assert load_weights(model.backbone, path).loaded == len(darknet.arrays)
    path.write_bytes(data + bytes(4 * 99))
    assert load_weights(model.backbone, path, strict=False).loaded == len(darknet.arrays)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-4], "numbers follow the last complete layer"),
        (lambda data: data[:-3], "bytes are not a header and float32 numbers"),
        (lambda data: b"\x89PNG\r\n\x1a\n" + data, "does not begin with the header"),
        (lambda data: data[:20] + bytes(4000) + data[20:-4000], "not of this network, or damaged"),
        (lambda data: data[:24] + b"\0\0\x80\x7f" * 50_000 + data[200_024:], "impossible values"),
    ],
)
def test_damaged_darknet_files_are_refused(darknet, tmp_path, change, words):
    path = tmp_path / "net.weights"
    path.write_bytes(change(darknet.path.read_bytes()))
    before = state_of(darknet.loaded)
    with pytest.raises(WeightsError, match=f"{path}: .*{words}"):
        load_weights(darknet.loaded, path)
    assert_same_bits(darknet.loaded.state_dict(), before)


def test_darknet_files_need_their_network(darknet):
    with pytest.raises(WeightsError, match="read for darknet53 and cspdarknet53 only"):
        tiny(weights=darknet.path)
    with pytest.raises(WeightsError, match='cspdarknet53", layout="darknet"'):
        backbones.create("cspdarknet53", weights=darknet.path)
    with pytest.raises(WeightsError, match="made with act='leaky_relu'"):
        darknet.create(weights=darknet.path, act="relu")
    if darknet.name == "darknet53":  # longer than csdarknet53's
        with pytest.raises(WeightsError, match="not of this network"):
            backbones.create("cspdarknet53", weights=darknet.path, act="mish", layout="darknet")
    else:
        darknet.create(weights=darknet.path, act="mish")  # YOLOv4's


# ---- this project's own --------------------------------------------------------------------------


def test_our_own_backbone_classifier_run_and_ema(tmp_path):
    model = randomise_norms(Classifier(tiny(), 3))
    ema = AveragedModel(model, use_buffers=True)
    for parameter in ema.module.parameters():
        parameter.data += 1
    run = {"config": {}, "model": model.state_dict(), "ema": ema.state_dict(), "optimizer": {}}
    files = {
        "backbone": (model.backbone.state_dict(), {}, model),
        "classifier": (model.state_dict(), {}, model),
        "run": (run, {}, ema.module),  # what is evaluated and exported
        "raw": (run, {"entry": "model"}, model),
        "ema": (ema.state_dict(), {}, ema.module),
    }
    for name, (content, options, expected) in files.items():
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        net, other = tiny(), Classifier(tiny(), 3)
        load_weights(net, path, **options)
        assert_same_bits(net.state_dict(), expected.backbone.state_dict())
        if name != "backbone":
            load_weights(other, path, **options)
            assert_same_bits(other.state_dict(), expected.state_dict())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cspdarknet19", {"act": "mish"}, "act='relu'"),
        ("vovnet39", {"residual": False}, "residual=True"),
        ("vovnet39", {"stem_stride": 4}, "stem_stride=2"),
    ],
)
def test_checkpoints_know_the_options_that_were_not_given(tmp_path, name, options, words):
    """The defaults too: such a file loads without a word otherwise and gives other maps."""
    model, path = backbones.create_classifier(name, 3, width=0.125), tmp_path / "file.pt"
    run = {"config": {}, "model": model.state_dict(), "optimizer": {}}
    run["ema"] = AveragedModel(model).state_dict()
    same, other = (backbones.create(name, width=0.125, **each) for each in ({}, options))
    for content in (model.backbone.state_dict(), model.state_dict(), run):
        torch.save(content, path)
        assert not load_weights(same, path).differing
        with pytest.raises(WeightsError, match=f"these weights were made with {words}"):
            load_weights(other, path)


def test_options_that_decide_the_function_are_complete():
    for name in ("darknet19", "cspdarknet19", "vovnet19_slim", "resnet18", "mobilenet_v3_small"):
        with torch.device("meta"):
            net = backbones.create(name)
        others = {"last_norm", "gradient_checkpointing"}
        assert net.options.keys() == set(net.keywords()) - others, name
    assert convert_split(tiny(), "slice").options["split"] == "slice"
    net = backbones.create("darknet19", width=np.float64(0.125), in_channels=np.int64(1))
    assert {type(value) for value in net.options.values()} == {str, float, tuple, int}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_paths_and_reports(tmp_path, suffix):
    net = tiny()
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(net.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for source in (path, str(path)):
        other = tiny(weights=source)
        assert_same_bits(other.state_dict(), net.state_dict())
        assert other.weights_report.sha256 == digest
        assert f"{len(net.state_dict())} tensors match" in str(other.weights_report)
        assert digest in str(other.weights_report)
    assert net.weights_report is None


def test_the_two_splits_load_each_other():
    images = torch.randn(1, 3, 64, 64)
    source = randomise_norms(tiny()).eval()
    sliced = tiny(split="slice", weights=source.state_dict()).eval()
    assert_same_bits(tiny(weights=sliced.state_dict()).state_dict(), source.state_dict())
    assert_near(sliced(images), source(images), 1e-5)
    with pytest.raises(WeightsError, match="missing, first"):
        tiny(split="slice", weights=tiny(split="partial").state_dict())


@pytest.mark.parametrize("name", ["cspdarknet19", "vovnet19_slim", "resnet18", "mobilenet_v2"])
def test_later_stages_are_left_out(name):
    whole, part = backbones.create(name), backbones.create(name, out_indices=(0, 2))
    report = load_weights(part, whole.state_dict())
    assert report.loaded == len(part.state_dict())
    assert len(report.left_out) == len(whole.state_dict()) - len(part.state_dict()) > 0
    with pytest.raises(WeightsError, match="missing, first"):
        load_weights(whole, part.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("name", ["darknet19", "vovnet19_slim", "resnet18", "mobilenet_v3_small"])
def test_image_channels_are_adapted(name):
    """A grey image gives what its three copies gave; so does an image of six equal channels."""
    rgb = randomise_norms(backbones.create(name)).eval()
    grey = torch.randn(1, 1, 64, 64)
    expected = rgb(grey.expand(-1, 3, -1, -1))
    for channels in (1, 6):
        net = backbones.create(name, in_channels=channels, weights=rgb.state_dict()).eval()
        assert_near(net(grey.expand(-1, channels, -1, -1)), expected)
    net = backbones.create(name, in_channels=5, weights=rgb.state_dict())
    assert net.weights_report.adapted == next(iter(rgb.state_dict()))
    stems = [next(iter(each.state_dict().values())) for each in (rgb, net)]
    torch.testing.assert_close(stems[1], stems[0][:, [0, 1, 2, 0, 1]] * 3 / 5)
    with pytest.raises(WeightsError, match=r"misshaped, first .*\[\d+, 5, .*, here .*6, "):
        backbones.create(name, in_channels=6, weights=net.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(dtype):
    source = tiny()
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in source.state_dict().items()}
    grey = tiny(in_channels=1, weights=state)
    expected = source.stem.conv.weight.sum(1, keepdim=True)
    torch.testing.assert_close(grey.stem.conv.weight, expected, rtol=0.02, atol=0.02)
    assert tiny(weights=state).stem.conv.weight.dtype is torch.float32


# ---- what does not match -------------------------------------------------------------------------


def test_one_error_lists_everything_and_nothing_is_loaded():
    state = state_of(tiny())
    state["stages.9.extra"] = state.pop("stages.1.conv.conv.weight")
    state["stem.conv.weight"] = torch.zeros(4, 3, 3, 3)
    net = tiny()
    before = state_of(net)
    with pytest.raises(WeightsError) as caught:
        load_weights(net, state)
    assert str(caught.value) == (
        "state dict: do not match cspdarknet19: 178 tensors match (backbone); 1 missing, first "
        "stages.1.conv.conv.weight; 1 unexpected, first stages.9.extra; 1 misshaped, first "
        "stem.conv.weight [4, 3, 3, 3], here [8, 3, 3, 3]"
    )
    assert_same_bits(net.state_dict(), before)
    assert load_weights(net, state, strict=False).loaded == len(before) - 2
    bad = ("stages.1.conv.conv.weight", "stem.conv.weight")
    assert_same_bits(net.state_dict(), {**state_of(net), **{key: before[key] for key in bad}})
    with pytest.raises(WeightsError, match="0 tensors match"):
        load_weights(net, {"x": torch.zeros(1)}, strict=False)


@pytest.mark.parametrize("prefix", ["_orig_mod.module.", "student.encoder."])
def test_prefixes_are_suggested_and_taken(prefix):
    net, other = tiny(), tiny()
    state = {"loss.weight": torch.zeros(1)} if prefix == "student.encoder." else {}
    state |= {prefix + key: value for key, value in net.state_dict().items()}
    with pytest.raises(WeightsError, match=re.escape(f"load_weights(..., prefix='{prefix}')")):
        load_weights(other, state)
    load_weights(other, state, prefix=prefix)
    assert_same_bits(other.state_dict(), net.state_dict())
    with pytest.raises(WeightsError, match=r"no key begins with 'nothing.'; the first is"):
        load_weights(other, state, prefix="nothing.")


def test_entries_are_suggested_and_taken(tmp_path):
    net, other, path = tiny(), tiny(), tmp_path / "checkpoint.pth"
    torch.save({"teacher": tiny().state_dict(), "student": net.state_dict(), "epoch": 3}, path)
    with pytest.raises(WeightsError, match=r"dict of tensors; those in it: teacher, student"):
        load_weights(other, path)
    load_weights(other, path, entry="student")
    assert_same_bits(other.state_dict(), net.state_dict())
    with pytest.raises(WeightsError, match="entry='best' is not a state dict of tensors"):
        load_weights(other, path, entry="best")


@pytest.mark.parametrize("entry", ["model", "state_dict"])
def test_checkpoints_of_torchvisions_and_timms_training(tmp_path, entry):
    """Their `args` are a Namespace, which holds values and no code. EMA weights are taken."""
    net, path = tiny(), tmp_path / "checkpoint.pth"
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    args = argparse.Namespace(lr=0.1, device="cuda", mean=[0.5], model_kwargs={})
    content = {"epoch": 3, entry: net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**content, "args": args}, path)
    assert_same_bits(tiny(weights=path).state_dict(), net.state_dict())
    ema = AveragedModel(tiny()) if entry == "model" else tiny()  # torchvision's wraps it
    torch.save({**content, f"{entry}_ema": ema.state_dict(), "args": args}, path)
    assert_same_bits(tiny(weights=path).state_dict(), getattr(ema, "module", ema).state_dict())
    torch.save({**content, "args": argparse.Namespace(hook=Bomb())}, path)
    with pytest.raises(WeightsError, match="print could run code"):
        tiny(weights=path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("conv.weight", float("nan")),
        ("norm.bias", float("inf")),
        ("norm.bias", 1e300),  # too large for float32
        ("norm.running_var", -1.0),
    ],
)
def test_impossible_values_are_refused(key, value):
    net, state = tiny(), {k: v.double() for k, v in tiny().state_dict().items()}
    before = state_of(net)
    state[f"stem.{key}"].view(-1)[3] = value
    for strict in (True, False):
        with pytest.raises(WeightsError, match=f"infinity or a negative variance in stem.{key}"):
            load_weights(net, state, strict=strict)
    assert_same_bits(net.state_dict(), before)


def test_float_counts_of_batches_are_converted():
    """timm averages checkpoints with all their buffers, and halves cannot hold a large count."""
    for count, expected in ((7.5, 7), (7.0, 7), (float("inf"), 0)):
        state = {k: v if v.ndim else torch.tensor(count) for k, v in state_of(tiny()).items()}
        assert tiny(weights=state).stem.norm.num_batches_tracked == expected
        half = {k: v.half() for k, v in state.items()}
        assert tiny(weights=half).stem.norm.num_batches_tracked.dtype is torch.int64


def test_other_heads():
    state = Classifier(tiny(), 3).state_dict()
    for model, other in ((Classifier(tiny(), 4), state), (Classifier(tiny(), 3), state_of(tiny()))):
        with pytest.raises(WeightsError, match=r"load_weights\(model.backbone, ...\)"):
            load_weights(model, other)


def test_two_keys_for_one_tensor_are_refused():
    state = state_of(tiny())
    with pytest.raises(WeightsError, match="two keys of these weights mean the same: backbone"):
        load_weights(tiny(), {**{f"backbone.{k}": v for k, v in state.items()}, **state})
    with pytest.raises(WeightsError, match=r"unexpected, first stages.1.split_conv"):
        load_weights(tiny(), {**state, **tiny(split="slice").state_dict()})


KEY = "stages.2.out_conv.conv.weight"
HALVES = ("stages.2.shortcut_conv.norm.weight", "stages.2.blocks_conv.norm.weight")


@pytest.mark.parametrize("split", ["separate", "slice"])
@pytest.mark.parametrize(
    ("key", "change"),
    [
        (KEY, lambda t: t.to(torch.complex64)),
        (KEY, lambda t: t[0, 0, 0, 0]),
        (HALVES[0], lambda t: t[0]),
        (HALVES[1], lambda t: t[:, None]),
    ],
)
def test_unexpected_tensors_are_refused_and_nothing_is_loaded(split, key, change):
    net = tiny(split=split)
    before = state_of(net)
    state = {k: v + 1 for k, v in tiny().state_dict().items()}
    with pytest.raises(WeightsError):
        load_weights(net, {**state, key: change(state[key])})
    del state[HALVES[0]], state[HALVES[0].replace("norm", "conv")]
    with pytest.raises(WeightsError):
        load_weights(net, state)
    assert_same_bits(net.state_dict(), before)


# ---- files that are missing, damaged or dangerous ------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (print, ("code ran",))


def test_code_is_refused_and_does_not_run(tmp_path, capsys):
    path = tmp_path / "bomb.pt"
    torch.save({"stem.conv.weight": torch.zeros(1), "extra": Bomb()}, path)
    pickled = tmp_path / "bomb.pth"
    pickled.write_bytes(pickle.dumps(Bomb(), protocol=2))
    for each in (path, pickled):
        with pytest.raises(WeightsError, match=r"bomb.pth?: .* loading .*print could run code"):
            load_weights(tiny(), each)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_broken_files_are_one_line(tmp_path, suffix):
    path = tmp_path / f"broken{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tiny().state_dict(), path)
    cut = path.read_bytes()[:-1000]
    for content in (b"", b"not weights\n", b"PK\x03\x04 cut short", bytes(99), cut):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=f"broken{suffix}: not a file of weights") as caught:
            load_weights(tiny(), path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {}, {"epoch": 3}, {3: torch.zeros(1)}])
def test_other_contents_are_refused(tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(WeightsError, match="not a state dict of tensors; those in it: none"):
        load_weights(tiny(), path)


def test_missing_files(tmp_path):
    for source in (tmp_path / "missing.pt", tmp_path, "", "DEFAULT"):
        with pytest.raises(WeightsError, match=r"not a file; names of weights for .*: none"):
            tiny(weights=source)


def test_hashes_are_verified_before_anything_is_parsed(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(tiny().state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for right in (digest, digest[:8], digest.upper()):
        assert load_weights(tiny(), path, sha256=right).sha256 == digest
    torch.save(Bomb(), path)
    for wrong in (digest, "", "abc"):
        with pytest.raises(WeightsError, match=f"has SHA-256 [0-9a-f]+, expected {wrong}"):
            load_weights(tiny(), path, sha256=wrong)
    with pytest.raises(WeightsError, match="a state dict has none"):
        load_weights(tiny(), {}, sha256=digest)


def test_safetensors_is_needed_only_for_its_files(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_file(tiny().state_dict(), path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(WeightsError, match=r"w.safetensors: needs `pip install safetensors`"):
        tiny(weights=path)
