"""How this and other projects name and order the tensors of these networks.

Formats are told apart by the keys of the state dict, and each key has one place to go:

- this project's: a backbone's or a classifier's state dict
- torchvision's classification networks (torchvision.models)
- timm's darknet53, cspdarknet53, vovnet39a/57a and ese_vovnet19b_slim/39b/57b/99b (timm/models)
- those of gau-nernst/vision-toolbox (vision_toolbox/backbones)
- Darknet's binary `.weights` of darknet53 and csdarknet53, and their first layers (`*.conv.N`)
"""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.base import Backbone
from backbones.darknet import VARIANTS, CSPDarknet, CSPStage, Darknet, DarknetStage
from backbones.layers import ConvNormAct


class WeightsError(ValueError):
    """Weights that cannot be found, trusted or matched; the message says what would be right."""


@dataclass(frozen=True)
class Format:
    """How others name what this project has.

    Attributes:
        marker: matches a key that only this format has.
        renames: patterns and what they become, one after another, on every key.
        options: of the networks that have this format, by name.
    """

    name: str
    marker: str
    renames: tuple[tuple[str, str], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


_BN = (r"\.bn\.", ".norm.")
_TIMM_VOVNET = (
    (r"^stem\.2\.", "stages.0.halve."),
    (r"\.conv_mid\.", ".convs."),
    (r"\.conv_concat\.", ".out_conv."),
    (r"\.attn\.", ".ese."),
    (r"^head\.fc\.", "head."),
    _BN,
)
_TOOLBOX_VOVNET = ((r"\.module_", ".blocks."), (r"\.ese\.linear\.", ".ese.fc."), _BN)
FORMATS = (
    Format(
        "timm Darknet",
        r"stem\.conv1\.conv\.weight",
        (
            (r"^stem\.conv1\.", "stem."),
            (r"\.conv_down\.", ".conv."),
            (r"\.conv_exp\.", ".split_conv."),
            (r"\.conv_transition_b\.", ".transition_conv."),
            (r"\.conv_transition\.", ".out_conv."),
            (r"^head\.fc\.", "head."),
            _BN,
        ),
        {"act": "leaky_relu_0.01", "layout": "darknet"},
    ),
    Format(
        "timm VoVNet V2",
        r"stages\.\d+\.blocks\.\d+\.attn\.fc\.weight",
        _TIMM_VOVNET,
        {"stem_stride": 4, "residual": True, "ese": "last", "act": "relu"},
    ),
    Format(
        "timm VoVNet V1",
        r"stages\.\d+\.blocks\.\d+\.conv_mid\.0\.conv\.weight",
        _TIMM_VOVNET,
        {"stem_stride": 4, "residual": False, "ese": False, "act": "relu"},
    ),
    # vision-toolbox adds residuals wherever the channels agree, without eSE too.
    Format(
        "vision-toolbox VoVNet with eSE",
        r"stages\.\d+\.module_\d+\.ese\.linear\.weight",
        _TOOLBOX_VOVNET,
        {"stem_stride": 2, "residual": True, "ese": True, "act": "relu"},
    ),
    Format(
        "vision-toolbox VoVNet",
        r"stages\.\d+\.module_\d+\.convs\.0\.conv\.weight",
        _TOOLBOX_VOVNET,
        {"stem_stride": 2, "residual": True, "ese": False, "act": "relu"},
    ),
    Format(
        "vision-toolbox CSPDarknet",
        r"stages\.\d+\.conv1\.conv\.weight",
        (
            (r"^(stages\.\d+)\.conv1\.", r"\1.shortcut_conv."),
            (r"^(stages\.\d+)\.conv2\.", r"\1.blocks_conv."),
            _BN,
        ),
        {"act": "relu", "layout": "half"},
    ),
    Format("vision-toolbox Darknet", r"stem\.bn\.weight", (_BN,), {"act": "relu"}),
    Format(
        "torchvision",
        r"conv1\.weight|features\.0\.0\.weight",
        ((r"^(fc|classifier)\.", "head."),),
    ),
)


def convert(state: dict[str, Tensor]) -> tuple[str, dict[str, Tensor], Mapping[str, Any]]:
    """The format's name, the state under this project's keys, the options it was made with.

    Raises:
        WeightsError: two keys of `state` would become one.
    """
    if any(re.match(r"backbone\.(stem|stages|conv1|features)\.", key) for key in state):
        return "classifier", _rename(state, ((r"^backbone\.", ""),)), {}
    if any(re.match(r"stages_\d+\.", key) for key in state):  # timm's features_only
        state = _rename(state, ((r"^(stem|stages)_(\w+)\.", r"\1.\2."),))
    for each in FORMATS:
        if any(re.fullmatch(each.marker, key) for key in state):
            return each.name, _rename(state, each.renames), each.options
    return "backbone", state, {}


def _rename(state: dict[str, Tensor], renames: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        new = key
        for pattern, replacement in renames:
            new = re.sub(pattern, replacement, new)
        if new in renamed or (new != key and new in state):
            raise WeightsError(f"two keys of these weights mean the same: {key} and another")
        renamed[new] = value
    return renamed


def match_structure(state: dict[str, Tensor], backbone: Backbone) -> None:
    """Brings what is one function under two names to the module's, in place."""
    stages = backbone.stages if isinstance(backbone, Darknet) else ()
    for i, stage in enumerate(stages):
        name = f"stages.{i}"
        if isinstance(stage, CSPStage):
            _match_split(state, name, stage.split)
        elif isinstance(stage, DarknetStage) and f"{name}.conv.weight" in state:
            # A Darknet stage without blocks: a bare convolution in vision-toolbox.
            for key in [k for k in state if re.match(rf"{name}\.(conv|norm)\.\w+$", k)]:
                state.setdefault(f"{name}.conv.{key.removeprefix(name + '.')}", state.pop(key))


def _match_split(state: dict[str, Tensor], stage: str, split: str) -> None:
    """One 1x1 convolution for two and the other way round, as `darknet.convert_split` does."""
    names = [f"{stage}.{name}" for name in ("split_conv", "shortcut_conv", "blocks_conv")]
    joined, first, second = (
        {k.removeprefix(name): k for k in state if k.startswith(f"{name}.")} for name in names
    )
    if joined and (first or second):
        return  # both at once are of no network: what does not fit tells of itself
    if split == "slice" and first.keys() == second.keys():
        for end in first:
            halves = state[first[end]], state[second[end]]
            if halves[0].ndim == halves[1].ndim and halves[0].shape[1:] == halves[1].shape[1:]:
                state[names[0] + end] = torch.cat(halves) if halves[0].ndim else halves[0]
                del state[first[end]], state[second[end]]
    elif split == "separate":
        for end, key in joined.items():
            value = state[key]
            halves = value.chunk(2) if value.ndim else (value, value)
            if len(halves) == 2:
                state[names[1] + end], state[names[2] + end] = halves
                del state[key]


def adapt_first_conv(state: dict[str, Tensor], backbone: Backbone) -> str | None:
    """Makes an RGB convolution one for the backbone's `in_channels`; returns its key if it did."""
    key = next(name for name, _ in backbone.named_parameters())
    weight = state.get(key)
    count = backbone.in_channels
    if weight is None or weight.ndim != 4 or weight.shape[1] != 3 or count == 3:
        return None
    weight = weight.float()  # narrow types neither sum nor scale well
    if count == 1:  # a grey image is three equal channels
        state[key] = weight.sum(dim=1, keepdim=True)
    else:  # sums stay of one size
        repeated = weight.repeat(1, math.ceil(count / 3), 1, 1)[:, :count]
        state[key] = repeated * (3 / count)
    return key


def is_darknet_file(path: Path) -> bool:
    return re.search(r"\.(weights|conv\.\d+)$", path.name, re.IGNORECASE) is not None


_LAYER_ORDER = (
    *("norm.bias", "norm.weight", "norm.running_mean", "norm.running_var"),
    "conv.weight",
)
# Numbers in yolov4.conv.137 behind csdarknet53: the convolutions of yolov4.cfg's layers 105 to 136.
_YOLOV4_NECK = 15_857_152


def read_darknet(
    path: Path, backbone: Backbone, strict: bool
) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Tensors of a Darknet file under this project's names, a head's too, and their options.

    The file (parser.c: load_weights_upto of pjreddie/darknet and AlexeyAB/darknet) has three int32
    (major, minor, revision), the number of images seen as int64, int32 before version 0.2, then
    for each convolution in the order of the .cfg: beta, gamma, mean, variance, weights; or biases,
    weights without batch normalisation. All little-endian, all float32.

    A file may end behind any convolution, if it has those of `backbone`. BatchNorm's epsilon stays
    PyTorch's 1e-5, as in Darknet's CUDA code, which trains; its CPU code and OpenCV have 1e-6.
    """
    if not isinstance(backbone, Darknet) or backbone.config not in (
        VARIANTS["darknet53"],
        VARIANTS["cspdarknet53"],
    ):
        raise WeightsError(f"{path}: Darknet's files are read for darknet53 and cspdarknet53 alone")
    is_csp = isinstance(backbone, CSPDarknet)
    if is_csp and backbone.layout != "darknet":
        raise WeightsError(
            f'{path}: csdarknet53 is create("cspdarknet53", layout="darknet"); this module has '
            f'layout="{backbone.layout}"'
        )
    numbers = _read_numbers(path)
    with torch.device("meta"):
        options = {"layout": "darknet"} if is_csp else {}
        whole = type(backbone)(backbone.config, **options)
    modules = whole.named_modules()
    layers = [(name, m.state_dict()) for name, m in modules if isinstance(m, ConvNormAct)]
    counts = {name: sum(tensors[key].numel() for key in _LAYER_ORDER) for name, tensors in layers}
    needed = sum(n for name, n in counts.items() if not f"{name}.".startswith(backbone.left_out))
    if len(numbers) < needed and strict:
        raise WeightsError(
            f"{path}: cut short or of a smaller network; {len(numbers):,} numbers, and the "
            f"convolutional part of this network has {needed:,}"
        )
    state, at = {}, 0
    for name, tensors in layers:
        if at + counts[name] > len(numbers):
            break
        for key in _LAYER_ORDER:
            shape = tensors[key].shape
            state[f"{name}.{key}"] = numbers[at : at + shape.numel()].view(shape)
            at += shape.numel()
    variances = [t for key, t in state.items() if key.endswith("running_var")]
    if not numbers[:at].isfinite().all() or any(t.min() < 0 for t in variances):
        raise WeightsError(
            f"{path}: not of this network, or damaged; it would have variances below zero or "
            "numbers that are not finite"
        )
    for key in state:
        if key.endswith(".out_conv.conv.weight"):  # the .cfg concatenates the other way round
            state[key] = torch.cat(state[key].chunk(2, dim=1)[::-1], dim=1)
    rest, in_features = numbers[at:], whole.channels[-1]
    num_classes, odd = divmod(len(rest), in_features + 1)
    if len(state) == len(layers) * len(_LAYER_ORDER) and num_classes and not odd:
        # The classifier's 1x1 convolution, after or before the average pool.
        state["head.bias"], weight = rest[:num_classes], rest[num_classes:]
        state["head.weight"] = weight.view(num_classes, in_features)
    elif len(rest) not in (0, _YOLOV4_NECK) and strict:
        raise WeightsError(
            f"{path}: {len(rest):,} numbers follow the last convolution, neither a head nor "
            "nothing; for the first layers of a detector pass strict=False"
        )
    # YOLOv3's networks have leaky ReLU; YOLOv4's has Mish, and csdarknet53.cfg came with both.
    return state, {} if is_csp and backbone.act == "mish" else {"act": "leaky_relu"}


def _read_numbers(path: Path) -> Tensor:
    """What follows the header of a Darknet file."""
    data = bytearray(path.read_bytes())
    major, minor = struct.unpack("<2i", data[:8]) if len(data) >= 8 else (-1, -1)
    if not (0 <= major < 1000 and 0 <= minor < 1000):  # beyond: transposed, of no known file
        raise WeightsError(f"{path}: does not begin with the header of a Darknet file")
    header_bytes = 20 if (major, minor) >= (0, 2) else 16
    if len(data) <= header_bytes or (len(data) - header_bytes) % 4:
        raise WeightsError(
            f"{path}: its {len(data)} bytes are not a header of {header_bytes} and float32 numbers"
        )
    return torch.frombuffer(data, dtype=torch.float32, offset=header_bytes)
