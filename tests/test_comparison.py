"""README's table that sets `backbones` beside timm and torchvision: every cell is tried here.

A trial does one thing with one library and says in a few words what came of it; the cells of
results/feature_maps_compared.csv must be these words. The peers are used as their documentation
has it: `timm.create_model(name, features_only=True)` and
`torchvision.models.feature_extraction.create_feature_extractor`. Another version of a peer may
change a cell: the failing test shows the new one.
"""

import csv
import math
import os
import tempfile
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from timm.models import load_checkpoint
from torch import nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.feature_extraction import create_feature_extractor

import backbones
from backbones.weights import load_weights

TABLE = Path(__file__).resolve().parents[1] / "results" / "feature_maps_compared.csv"
ROWS = {row["capability"]: row for row in csv.DictReader(TABLE.open())}
LIBRARIES = ("backbones", "timm", "torchvision")
STRIDES = [2, 4, 8, 16, 32]
NODES = ("relu", "layer1", "layer2", "layer3", "layer4")  # of torchvision's ResNet, per stride


def of_timm(name="resnet18", **options):
    return timm.create_model(name, features_only=True, **options)


def extractor(name="resnet18", nodes=NODES, **options):
    return create_feature_extractor(get_model(name, weights=None, **options), list(nodes))


# A small network of each kind. VoVNet has the stem of timm's.
NETWORKS = {
    "backbones": {
        "ResNet": partial(backbones.create, "resnet18"),
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
TRIALS = {}


def trial(capability, *libraries):
    """Enters a function that takes a library as the trial of each of `libraries`, or of all."""

    def enter(function):
        for library in libraries or LIBRARIES:
            TRIALS[capability, library] = partial(function, library)
        return function

    return enter


def images(height=64, width=96, channels=3):
    return torch.randn(2, channels, height, width)


def maps_of(net, x):
    maps = net(x)
    return list(maps.values()) if isinstance(maps, dict) else maps


def backward(maps):
    sum(m.square().mean() for m in maps).backward()


def near(found, expected):
    """Equal to 1e-4 of the largest value, each tensor to its own."""
    pairs = zip(found, expected, strict=True)
    return all((a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in pairs)


def state_of(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def changed(net, before):
    return {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}


def error_of(function, *args, **options):
    """What a call raises, None if nothing."""
    try:
        function(*args, **options)
    except Exception as error:
        return error
    return None


def verdict(works):
    """What holds for each family: "yes", "no", or which is which."""
    words = {True: [], False: []}
    for family, holds in works.items():
        words[holds].append(family)
    if not words[False] or not words[True]:
        return "yes" if words[True] else "no"
    return f"{', '.join(words[True])} yes, {', '.join(words[False])} no"


def tried(library, check, families=("ResNet", "CSPDarknet", "VoVNet")):
    """The verdict of `check(make)` over the library's networks."""
    networks = NETWORKS[library]
    return verdict({family: check(networks[family]) for family in families if family in networks})


@contextmanager
def saved(state):
    """The path of a file that holds `state`."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.pt")
        torch.save(state, path)
        yield path


def overlay(path):
    """timm's options for weights from a file: those of `checkpoint_path` load into no head."""
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": path}}


# ---- maps --------------------------------------------------------------------------------------

EVERY_STRIDE = "a map at each stride from 2 to 32, in one call"


@trial(EVERY_STRIDE)
def every_stride(library):
    """What comes without asking for certain maps, except of torchvision, which has to be told."""
    kind, more = set(), ""
    for family, make in NETWORKS[library].items():
        maps = make()(images())
        kind.add("a dict of named nodes" if isinstance(maps, dict) else "a list")
        maps = list(maps.values()) if isinstance(maps, dict) else maps
        strides = [64 // m.shape[-2] for m in maps]
        if not set(STRIDES) <= set(strides):
            return f"no, {family} has {strides}"
        more += "".join(f", {family} at stride {s} too" for s in strides if s not in STRIDES)
    return f"yes, {' and '.join(kind)}{more}"


@trial("maps of ceil(size / stride) pixels at odd sizes")
def odd_sizes(library):
    def check(make):
        maps = [m for m in maps_of(make(), images(65, 43)) if m.shape[-1] < 43]
        expected = [(math.ceil(65 / s), math.ceil(43 / s)) for s in STRIDES]
        return [tuple(m.shape[-2:]) for m in maps] == expected

    return tried(library, check)


def metadata_cell(make, known):
    """Whether `known(net)` are the channels and strides of the maps, also of maps out of order."""

    def holds(out_indices):
        net = make(out_indices=out_indices)
        told, maps = known(net), net(images())
        return told == ([m.shape[1] for m in maps], [64 // m.shape[2] for m in maps])

    if not holds((1, 3)):
        return "no"
    refused = isinstance(error_of(make, out_indices=(3, 1)), ValueError)
    return "yes" if refused or holds((3, 1)) else "yes, swapped for indices out of order"


@trial("channels and strides known before a forward pass", "backbones")
def metadata(_):
    return metadata_cell(
        partial(backbones.create, "resnet18"), lambda net: (list(net.channels), list(net.strides))
    )


@trial("channels and strides known before a forward pass", "timm")
def metadata_of_timm(_):
    return metadata_cell(
        of_timm, lambda net: (net.feature_info.channels(), net.feature_info.reduction())
    )


@trial("channels and strides known before a forward pass", "torchvision")
def metadata_of_torchvision(_):
    words = ("channel", "stride", "reduction", "info")
    return "yes" if any(word in name for name in dir(extractor()) for word in words) else "no"


@trial("construction runs and traces nothing")
def construction(library):
    """Counts the calls of each module, with tensors or with the proxies of a trace."""
    calls = {"run": Counter(), "traced": Counter()}

    def count(module, args):
        calls["traced" if isinstance(args[0], torch.fx.Proxy) else "run"][module] += 1

    handle = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        nets = [make() for make in NETWORKS[library].values()]
    finally:
        handle.remove()
    words = [f"{how} {max(c.values())} times" for how, c in calls.items() if c]
    buffers = [each for net in nets for each in net.named_buffers()]
    if any((b != (1 if key.endswith("running_var") else 0)).any() for key, b in buffers):
        words.append("buffers moved")
    return f"no, {', '.join(words)}" if words else "yes"


def picking_cell(part, same, whole):
    """Whether `part` and `same`, two ways to ask for maps 1 and 3, leave out what comes later."""
    picked = maps_of(whole.eval(), x := images())
    sizes = []
    for net in (part, same):
        net.load_state_dict(whole.state_dict(), strict=False)
        found = maps_of(net.eval(), x)
        assert near(found, (picked[1], picked[3]))
        sizes.append(sum(p.numel() for p in net.parameters()))
    assert sizes[0] == sizes[1]
    return "yes" if sizes[0] < 0.5 * sum(p.numel() for p in whole.parameters()) else "no"


@trial("maps picked by index, later stages left out", "backbones", "timm")
def picking(library):
    make = NETWORKS[library]["ResNet"]
    return picking_cell(make(out_indices=(1, 3)), make(out_indices=(-4, -2)), make())


@trial("maps picked by index, later stages left out", "torchvision")
def picking_of_torchvision(_):
    error = error_of(extractor, nodes=(-4, -2))
    part = extractor(nodes=("layer1", "layer3"))
    left_out = picking_cell(part, part, extractor())
    return left_out if error is None else f"{left_out}, by name; no indices"


@trial("any inner map by name", "backbones", "timm")
def inner_maps(library):
    make = NETWORKS[library]["ResNet"]
    return "no" if error_of(make, out_indices=("layer2.0.conv1",)) else "yes"


@trial("any inner map by name", "torchvision")
def inner_maps_of_torchvision(_):
    (found,) = maps_of(extractor(nodes=("layer2.0.conv1",)), images())
    return "yes" if found.shape[1:] == (128, 8, 12) else "no"


@trial("dilation in place of the last strides", "backbones", "timm")
def dilation(library):
    def check(make):
        error = error_of(make, output_stride=8)
        return error is None and maps_of(make(output_stride=8), images())[-1].shape[-2:] == (8, 12)

    return tried(library, check)


@trial("dilation in place of the last strides", "torchvision")
def dilation_of_torchvision(_):
    def check(name):
        make = partial(extractor, name, replace_stride_with_dilation=(False, True, True))
        return error_of(make) is None and maps_of(make(), images())[-1].shape[-2:] == (8, 12)

    return verdict({"ResNet-50": check("resnet50"), "ResNet-18": check("resnet18")})


# ---- training ----------------------------------------------------------------------------------

FREEZING = "freezing the first stages, BatchNorm statistics too"


def stays_frozen(net, *frozen):
    """Whether a step after `.train()` changes all of the modules but those named `frozen`."""
    net.eval().train()
    before = state_of(net)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    backward(maps_of(net, images()))
    optimizer.step()
    return {key.split(".")[0] for key in changed(net, before)} == set(NODES[1:]) - set(frozen)


@trial(FREEZING, "backbones")
def freezing(_):
    net = backbones.create("resnet18").freeze(2)
    return "yes, freeze(2)" if stays_frozen(net, "layer1", "layer2") else "no"


@trial(FREEZING, "timm")
def freezing_of_timm(_):
    """As the docstring of `timm.utils.freeze` has it; it changes the BatchNorm layers' type."""
    net = of_timm()
    timm.utils.freeze(net, ["conv1", "bn1", "act1", "maxpool", "layer1", "layer2"])
    return "yes, by module names" if stays_frozen(net, "layer1", "layer2") else "no"


@trial(FREEZING, "torchvision")
def freezing_of_torchvision(_):
    """torchvision has no function for it, so what one writes by hand first."""
    net = extractor()
    for module in (net.conv1, net.bn1, net.layer1, net.layer2):
        module.requires_grad_(False).eval()
    return (
        "yes" if stays_frozen(net, "layer1", "layer2") else "by hand, statistics move on .train()"
    )


CHECKPOINTING = "gradient checkpointing by one option"


def checkpointing_cell(plain, checked):
    """One step of each on the same images: what is kept for it, what comes of it."""
    checked.load_state_dict(plain.state_dict())
    x, every, kept = images(), [], []
    for net in (plain, checked):
        saved_tensors = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, here=saved_tensors: here.append(t.numel()) or t, lambda t: t
        ):
            every.append(maps_of(net, x))
        kept.append(sum(saved_tensors))
        backward(every[-1])
    gradients = [[p.grad for p in net.parameters()] for net in (plain, checked)]
    if kept[1] >= kept[0] or not near(*every) or not near(*gradients):
        return "no"
    return f"yes, statistics move {'twice' if changed(checked, state_of(plain)) else 'once'}"


@trial(CHECKPOINTING, "backbones")
def checkpointing(_):
    make = partial(backbones.create, "resnet18")
    return checkpointing_cell(make(), make(gradient_checkpointing=True))


@trial(CHECKPOINTING, "timm")
def checkpointing_of_timm(_):
    checked = of_timm()
    checked.set_grad_checkpointing(True)
    return checkpointing_cell(of_timm(), checked)


@trial(CHECKPOINTING, "torchvision")
def checkpointing_of_torchvision(_):
    return "yes" if any("checkpoint" in name for name in dir(extractor())) else "no"


@trial("torch.compile(fullgraph=True)")
def compiles(library):
    """Tracing alone: what a graph is compiled to is not the networks' doing."""

    def check(make):
        torch.compiler.reset()
        net, x = make().eval(), images()
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        return error_of(compiled, x) is None and near(maps_of(compiled, x), maps_of(net, x))

    return tried(library, check, ("ResNet", "VoVNet"))


@trial("torch.export with dynamic batch and image size")
def exports(library):
    free = torch.export.Dim.DYNAMIC

    def check(make):
        # Programs of all three refuse images of at most 32 pixels, whose last map is of one pixel.
        net = make().eval()
        program = torch.export.export(
            net, (images(),), dynamic_shapes=({0: free, 2: free, 3: free},)
        )
        run, others = program.module(), (torch.randn(3, 3, 96, 128), torch.randn(1, 3, 97, 131))
        return all(not error_of(run, x) and near(maps_of(run, x), maps_of(net, x)) for x in others)

    return tried(library, check, ("ResNet", "VoVNet"))


# ---- images ------------------------------------------------------------------------------------

CHANNELS = "images of 1 and 5 channels, from RGB weights"


def adapted_cell(make, path):
    """RGB weights for 1 channel see grey as RGB does; for 5 they are repeated and rescaled."""
    whole, grey, five = make(3, path).eval(), make(1, path).eval(), make(5, path).eval()
    x = images(channels=1)
    rgb, wide = (next(net.parameters()) for net in (whole, five))
    assert maps_of(five, images(channels=5))
    same = near(maps_of(grey, x), maps_of(whole, x.expand(-1, 3, -1, -1)))
    return "yes" if same and torch.allclose(wide[:, :3], rgb * 3 / 5) else "no"


@trial(CHANNELS, "backbones")
def channels(_):
    def make(count, path):
        return backbones.create("resnet18", in_channels=count, weights=path)

    with saved(get_model("resnet18").state_dict()) as path:
        return adapted_cell(make, path)


@trial(CHANNELS, "timm")
def channels_of_timm(_):
    with saved(timm.create_model("resnet18").state_dict()) as path:
        return adapted_cell(lambda count, path: of_timm(in_chans=count, **overlay(path)), path)


@trial(CHANNELS, "torchvision")
def channels_of_torchvision(_):
    """Neither option nor adaptation: the convolution replaced by hand refuses the weights."""
    net = get_model("resnet18")
    state = net.state_dict()
    net.conv1 = nn.Conv2d(5, 64, 7, 2, 3, bias=False)
    errors = error_of(get_model, "resnet18", in_channels=5), error_of(net.load_state_dict, state)
    return "yes" if None in errors else f"no, {' and '.join(type(e).__name__ for e in errors)}"


@trial("error for images without batch, of 4 channels, of uint8")
def wrong_images(library):
    """Whether the message says what to pass: a batch, three channels, floating point."""
    net = NETWORKS[library]["ResNet"]()
    wrong = (
        (images()[0], ("4D", "[N, 3, H, W]")),
        (images(channels=4), ("3 channels", "[N, 3, H, W]")),
        (images().to(torch.uint8), ("floating",)),
    )
    told = sum(any(word in str(error_of(net, x)) for word in words) for x, words in wrong)
    return f"{told} of 3 say what to pass"


# ---- names and weights -------------------------------------------------------------------------


def telling(*errors_and_words):
    """How many errors' messages have the word that helps."""
    told = sum(word in str(error) for error, word in errors_and_words)
    return f"{told} of {len(errors_and_words)} say what there is"


UNKNOWN = "error for an unknown name, and for an unknown map"


@trial(UNKNOWN, "backbones", "timm")
def unknown(library):
    create = backbones.create if library == "backbones" else of_timm
    return telling(
        (error_of(create, "resnet19"), "resnet18"),
        (error_of(create, "resnet18", out_indices=(5,)), "to 4"),
    )


@trial(UNKNOWN, "torchvision")
def unknown_to_torchvision(_):
    return telling(
        (error_of(get_model, "resnet19"), "resnet18"),
        (error_of(extractor, nodes=("layer5",)), "get_graph_node_names"),
    )


OFFLINE = "weights of a classifier from a local file"


@trial(OFFLINE, "backbones")
def offline(_):
    whole = get_model("resnet18")
    with saved(whole.state_dict()) as path:
        net = backbones.create("resnet18", weights=path)
    return "no" if changed(net, whole.state_dict()) else "yes, by weights="


@trial(OFFLINE, "timm")
def offline_of_timm(_):
    whole = timm.create_model("resnet18")
    with saved(whole.state_dict()) as path:
        error = error_of(of_timm, checkpoint_path=path)
        net = of_timm(**overlay(path))
    if changed(net, whole.state_dict()):
        return "no"
    return f"checkpoint_path {'fails' if error else 'works'}, pretrained_cfg works"


@trial(OFFLINE, "torchvision")
def offline_of_torchvision(_):
    whole, other = get_model("resnet18"), get_model("resnet18")
    with saved(whole.state_dict()) as path:
        other.load_state_dict(torch.load(path))
    net = create_feature_extractor(other, list(NODES))
    return "no" if changed(net, whole.state_dict()) else "yes, before extraction"


@trial("a tensor of another shape leaves the network as it was")
def misshaped(library):
    make = NETWORKS[library]["ResNet"]
    net, state = make(), state_of(make())
    state["layer2.0.conv1.weight"] = state["layer2.0.conv1.weight"][:5]
    before = state_of(net)
    with saved(state) as path:
        load = {
            "backbones": partial(load_weights, net, path),
            "timm": partial(load_checkpoint, net, path),
            "torchvision": lambda: net.load_state_dict(torch.load(path)),
        }[library]
        error = error_of(load)
    assert "layer2.0.conv1.weight" in str(error)
    return "no, half-loaded" if changed(net, before) else "yes"


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@trial("a file that runs code or misses a tensor is refused")
def bad_files(library):
    """By the way that loads a file into a network that gives maps; see `overlay` for timm."""
    load = {
        "backbones": lambda path: backbones.create("resnet18", weights=path),
        "timm": lambda path: of_timm(**overlay(path)),
        "torchvision": lambda path: extractor().load_state_dict(torch.load(path)),
    }[library]
    state = state_of(NETWORKS[library]["ResNet"]())
    del state["layer2.0.conv1.weight"]
    with saved(state) as path, saved({"code": RunsCode(f"{path}.made")}) as code:
        refused = error_of(load, code) is not None and not os.path.exists(f"{path}.made")
        missed = error_of(load, path) is not None
        torch.load(code, weights_only=False)
        assert os.path.exists(f"{path}.made")  # it would have run
    return verdict({"code": refused, "missing": missed})


def at_least(count):
    """A round number that later versions will not fall below, such as "1,000+" for 1371."""
    step = 10 ** (len(str(count)) - 1)
    return f"{count // step * step:,}+"


@trial("networks, and weights by name")
def catalogue(library):
    """torchvision's classification networks; of ours only its networks have weights by name."""
    if library == "timm":
        networks, weights = len(timm.list_models()), len(timm.list_pretrained())
    else:
        theirs = torchvision.models.list_models(module=torchvision.models)
        names = theirs if library == "torchvision" else backbones.list_models()
        networks = len(names)
        weights = sum(len(get_model_weights(name)) for name in set(names) & set(theirs))
    return f"{at_least(networks)} networks, {at_least(weights)} weights"


# ---- the table ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_the_table_has_a_row_for_each_trial():
    assert set(TRIALS) == {(capability, name) for capability in ROWS for name in LIBRARIES}


@pytest.mark.parametrize(("capability", "library"), TRIALS)
def test_cells_say_what_happens(capability, library):
    assert ROWS[capability][library] == TRIALS[capability, library]()
