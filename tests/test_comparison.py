"""The table that compares `backbones` with timm and torchvision: every cell is tried here.

A function of a row tries one capability and yields the cells of the three libraries as
results/feature_maps_compared.csv has them. timm and torchvision are used as they document it, by
`features_only=True` and `create_feature_extractor`. Another version of them may change a cell: the
failing test shows the new one. Rows that hold for all three alike (compiling, export), that count
networks or helpful messages, or that say what we do not have, were tried once, when the table was
made; tests/test_contract.py has our side of them.
"""

import csv
import math
import os
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from timm.models import load_checkpoint
from torch import nn
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor

import backbones
from backbones.weights import load_weights

TABLE = Path(__file__).resolve().parents[1] / "results" / "feature_maps_compared.csv"
ROWS = {row["capability"]: row for row in csv.DictReader(TABLE.open())}
LIBRARIES = ("backbones", "timm", "torchvision")
STRIDES = [2, 4, 8, 16, 32]
NODES = ("relu", "layer1", "layer2", "layer3", "layer4")  # torchvision's ResNet, per stride
TRIALS = {}


def row(capability):
    """Registers a function as the trial of a row."""
    return lambda function: TRIALS.setdefault(capability, function)


def of_timm(name="resnet18", **options):
    return timm.create_model(name, features_only=True, **options)


def extractor(name="resnet18", nodes=NODES, **options):
    return create_feature_extractor(get_model(name, weights=None, **options), list(nodes))


our_resnet = partial(backbones.create, "resnet18")
NETWORKS = {  # a small network of each kind; our VoVNet has the stem of timm's
    "backbones": {
        "ResNet": our_resnet,
        "CSPDarknet": partial(backbones.create, "cspdarknet19", width=0.125),
        "VoVNet": partial(backbones.create, "vovnet19_slim", width=0.125, stem_stride=4),
    },
    "timm": {
        "ResNet": of_timm,
        "CSPDarknet": partial(of_timm, "cspdarknet53"),
        "VoVNet": partial(of_timm, "ese_vovnet19b_slim"),
    },
    "torchvision": {"ResNet": extractor},
}
RESNETS = [NETWORKS[library]["ResNet"] for library in LIBRARIES]


def images(height=64, width=96, channels=3):
    return torch.randn(2, channels, height, width)


def maps_of(net, x):
    maps = net(x)
    return list(maps.values()) if isinstance(maps, dict) else maps


def backward(maps):
    sum(m.square().mean() for m in maps).backward()


def near(found, expected):
    """Equal up to 1e-4 of each tensor's largest value."""
    pairs = zip(found, expected, strict=True)
    return all((a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in pairs)


def state_of(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def changed(net, before):
    return {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}


def error_of(function, *args, **options):
    try:
        function(*args, **options)
    except Exception as error:
        return error
    return None


def yes(holds):
    return "yes" if holds else "no"


def verdict(works):
    """Yes, no, or which of several."""
    words = {holds: [name for name in works if works[name] == holds] for holds in (True, False)}
    if words[True] and words[False]:
        return f"{', '.join(words[True])} yes, {', '.join(words[False])} no"
    return yes(words[True])


@row("a map at each stride from 2 to 32, in one call")
def every_stride(path):
    for library in LIBRARIES:
        more = []
        for family, make in NETWORKS[library].items():
            maps = maps_of(make(), images())
            strides = [64 // m.shape[-2] for m in maps]
            assert set(STRIDES) <= set(strides)
            more += [f"{family} at stride {s} too" for s in strides if s not in STRIDES]
        kind = "a dict of named nodes" if isinstance(make()(images()), dict) else "a list"
        yield ", ".join(["yes", kind, *more])


@row("maps of ceil(size / stride) pixels at odd sizes")
def odd_sizes(path):
    def check(make):
        maps = [m for m in maps_of(make(), images(65, 43)) if m.shape[-1] < 43]
        expected = [(math.ceil(65 / s), math.ceil(43 / s)) for s in STRIDES]
        return [tuple(m.shape[-2:]) for m in maps] == expected

    for networks in NETWORKS.values():
        yield verdict({family: check(make) for family, make in networks.items()})


@row("channels and strides known before a forward pass")
def metadata(path):
    def holds(net):
        info = getattr(net, "feature_info", None)
        known = (info.channels(), info.reduction()) if info else (net.channels, net.strides)
        maps = net(images())
        return [*map(list, known)] == [[m.shape[1] for m in maps], [64 // m.shape[2] for m in maps]]

    assert holds(our_resnet(out_indices=(1, 3)))
    assert holds(of_timm(out_indices=(1, 3)))
    yield yes(error_of(our_resnet, out_indices=(3, 1)))
    swapped = not holds(of_timm(out_indices=(3, 1)))
    yield "yes, in the wrong order if indices are not sorted" if swapped else "yes"
    words = ("channel", "stride", "reduction", "info")
    yield yes(any(word in name for name in dir(extractor()) for word in words))


@row("maps picked by index, later stages left out")
def picking(path):
    def check(part, whole):
        part.load_state_dict(whole.state_dict(), strict=False)
        picked = maps_of(whole.eval(), x := images())
        assert near(maps_of(part.eval(), x), (picked[1], picked[3]))
        sizes = [sum(p.numel() for p in net.parameters()) for net in (part, whole)]
        return sizes[0] < 0.5 * sizes[1]

    for make in RESNETS[:2]:
        yield yes(all(check(make(out_indices=picked), make()) for picked in ((1, 3), (-4, -2))))
    assert error_of(extractor, nodes=(-4, -2))
    yield f"{yes(check(extractor(nodes=('layer1', 'layer3')), extractor()))}, by name; no indices"


@row("freezing the first stages, BatchNorm statistics too")
def freezing(path):
    """timm's as its documentation has it; for torchvision what one writes first, by hand."""

    def holds(net):
        net.eval().train()
        before = state_of(net)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        backward(maps_of(net, images()))
        optimizer.step()
        return {key.split(".")[0] for key in changed(net, before)} == {"layer3", "layer4"}

    yield "yes, freeze(2)" if holds(our_resnet().freeze(2)) else "no"
    net = of_timm()
    timm.utils.freeze(net, ["conv1", "bn1", "act1", "maxpool", "layer1", "layer2"])
    yield "yes, by module names" if holds(net) else "no"
    net = extractor()
    for module in (net.conv1, net.bn1, net.layer1, net.layer2):
        module.requires_grad_(False).eval()
    yield "yes" if holds(net) else "manual; .train() updates the statistics again"


@row("gradient checkpointing by one option")
def checkpointing(path):
    def check(plain, checked):
        """One step of each on the same images; tests/test_contract.py has the memory of ours."""
        checked.load_state_dict(plain.state_dict())
        x, every = images(), []
        for net in (plain, checked):
            every.append(maps_of(net, x))
            backward(every[-1])
        assert near(*every)
        assert near(*([p.grad for p in net.parameters()] for net in (plain, checked)))
        return f"yes, statistics updated {'twice' if changed(checked, state_of(plain)) else 'once'}"

    yield check(our_resnet(), our_resnet(gradient_checkpointing=True))
    (checked := of_timm()).set_grad_checkpointing(True)
    yield check(of_timm(), checked)
    yield yes(any("checkpoint" in name for name in dir(extractor())))


def overlay(path):
    """timm's options for weights from a file: those of `checkpoint_path` load into no head."""
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": path}}


@row("images of 1 and 5 channels, from RGB weights")
def channels(path):
    """RGB weights for 1 channel see grey as RGB does; for 5 they are repeated and rescaled."""

    def check(make):
        whole, grey, five = make(3).eval(), make(1).eval(), make(5).eval()
        rgb, wide = (next(net.parameters()) for net in (whole, five))
        assert maps_of(five, images(channels=5))
        x = images(channels=1)
        same = near(maps_of(grey, x), maps_of(whole, x.expand(-1, 3, -1, -1)))
        return yes(same and torch.allclose(wide[:, :3], rgb * 3 / 5))

    torch.save(get_model("resnet18").state_dict(), path)
    yield check(lambda count: our_resnet(in_channels=count, weights=path))
    torch.save(timm.create_model("resnet18").state_dict(), path)
    yield check(lambda count: of_timm(in_chans=count, **overlay(path)))
    net = get_model("resnet18")
    state = net.state_dict()
    net.conv1 = nn.Conv2d(5, 64, 7, 2, 3, bias=False)
    errors = error_of(get_model, "resnet18", in_channels=5), error_of(net.load_state_dict, state)
    yield f"no, {' and '.join(type(e).__name__ for e in errors)}"


@row("weights of a classifier from a local file")
def offline(path):
    whole = get_model("resnet18")
    torch.save(whole.state_dict(), path)
    assert not changed(our_resnet(weights=path), whole.state_dict())
    yield "yes, by weights="
    theirs = timm.create_model("resnet18")
    torch.save(theirs.state_dict(), path)
    assert not changed(of_timm(**overlay(path)), theirs.state_dict())
    error = error_of(of_timm, checkpoint_path=path)
    yield f"checkpoint_path {'fails' if error else 'works'}, pretrained_cfg works"
    other = get_model("resnet18")
    other.load_state_dict(whole.state_dict())
    assert not changed(create_feature_extractor(other, list(NODES)), whole.state_dict())
    yield "yes, before extraction"


@row("a tensor of another shape leaves the network as it was")
def misshaped(path):
    for make, load in zip(
        RESNETS,
        (load_weights, load_checkpoint, lambda net, path: net.load_state_dict(torch.load(path))),
        strict=True,
    ):
        net, state = make(), state_of(make())
        state["layer2.0.conv1.weight"] = state["layer2.0.conv1.weight"][:5]
        before = state_of(net)
        torch.save(state, path)
        assert "layer2.0.conv1.weight" in str(error_of(load, net, path))
        yield "no, half-loaded" if changed(net, before) else "yes"


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@row("a file that runs code or misses a tensor is refused")
def bad_files(path):
    loads = (
        lambda: our_resnet(weights=path),
        lambda: of_timm(**overlay(path)),
        lambda: extractor().load_state_dict(torch.load(path)),
    )
    for make, load in zip(RESNETS, loads, strict=True):
        state = state_of(make())
        del state["layer2.0.conv1.weight"]
        torch.save(state, path)
        missing = error_of(load) is not None
        torch.save({"code": RunsCode(f"{path}.made")}, path)
        code = error_of(load) is not None and not os.path.exists(f"{path}.made")
        torch.load(path, weights_only=False)
        os.rmdir(f"{path}.made")  # it would have run
        yield verdict({"code": code, "missing": missing})


@pytest.mark.parametrize("capability", TRIALS)
def test_cells_say_what_happens(capability, tmp_path):
    torch.manual_seed(0)
    cells = [ROWS[capability][library] for library in LIBRARIES]
    assert cells == list(TRIALS[capability](str(tmp_path / "weights.pt")))
