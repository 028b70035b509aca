"""Weight formats of this and other projects, converted to this project's keys.

A state dict's keys identify its format:

- this project's: a backbone's or a classifier's state dict
- torchvision's classification networks (torchvision.models)
- timm's darknet53, cspdarknet53, vovnet39a/57a and ese_vovnet19b_slim/39b/57b/99b (timm/models)
- gau-nernst/vision-toolbox's (vision_toolbox/backbones)
- Darknet's binary `.weights` of darknet53 and csdarknet53, and their first layers (`*.conv.N`)
"""

import math
import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backbones.base import Backbone
from backbones.darknet import VARIANTS, CSPDarknet, CSPStage, Darknet, DarknetStage, convert_keys
from backbones.layers import ConvNormAct


class WeightsError(ValueError):
    """Weights that cannot be found, verified or matched; the message says what would be right."""

    is_bad_file = False  # there is a file, which is at fault


class Format(NamedTuple):
    """Another project's keys: `marker` matches a key that only this format has.

    `renames` are regular expressions and replacements, applied in order to every key; `options`
    those of the networks in this format, as of `backbones.create`.
    """

    name: str
    marker: str
    renames: tuple[tuple[str, str], ...] = ()
    options: Mapping[str, Any] = {}


# fmt: off
_BN = (r"\.bn\.", ".norm.")
_HEAD = (r"^head\.fc\.", "head.")
_TIMM_DARKNET = (
    (r"^stem\.conv1\.", "stem."), (r"\.conv_down\.", ".conv."), (r"\.conv_exp\.", ".split_conv."),
    (r"\.conv_transition_b\.", ".transition_conv."), (r"\.conv_transition\.", ".out_conv."),
    _HEAD, _BN,
)
_TIMM_VOVNET = (
    (r"^stem\.2\.", "stages.0.halve."), (r"\.conv_mid\.", ".convs."),
    (r"\.conv_concat\.", ".out_conv."), (r"\.attn\.", ".ese."), _HEAD, _BN,
)
_TOOLBOX_VOVNET = ((r"\.module_", ".blocks."), (r"\.ese\.linear\.", ".ese.fc."), _BN)
_TOOLBOX_CSP = (
    (r"^(stages\.\d+)\.conv1\.", r"\1.shortcut_conv."),
    (r"^(stages\.\d+)\.conv2\.", r"\1.blocks_conv."), _BN,
)
_V1, _V2 = {"residual": False, "ese": False}, {"residual": True, "ese": "last"}
_STAGE = r"stages\.\d+\."
FORMATS = (
    Format("timm Darknet", r"stem\.conv1\.conv\.weight", _TIMM_DARKNET,
           {"act": "leaky_relu_0.01", "layout": "darknet"}),
    Format("timm VoVNet V2", _STAGE + r"blocks\.\d+\.attn\.fc\.weight", _TIMM_VOVNET,
           {"stem_stride": 4, "act": "relu", **_V2}),
    Format("timm VoVNet V1", _STAGE + r"blocks\.\d+\.conv_mid\.0\.conv\.weight", _TIMM_VOVNET,
           {"stem_stride": 4, "act": "relu", **_V1}),
    # vision-toolbox adds residuals wherever the channels agree, without eSE too.
    Format("vision-toolbox VoVNet with eSE", _STAGE + r"module_\d+\.ese\.linear\.weight",
           _TOOLBOX_VOVNET, {"stem_stride": 2, "residual": True, "ese": True, "act": "relu"}),
    Format("vision-toolbox VoVNet", _STAGE + r"module_\d+\.convs\.0\.conv\.weight",
           _TOOLBOX_VOVNET, {"stem_stride": 2, "residual": True, "ese": False, "act": "relu"}),
    Format("vision-toolbox CSPDarknet", _STAGE + r"conv1\.conv\.weight", _TOOLBOX_CSP,
           {"act": "relu", "layout": "half"}),
    Format("vision-toolbox Darknet", r"stem\.bn\.weight", (_BN,), {"act": "relu"}),
    Format("torchvision", r"conv1\.weight|features\.0\.0\.weight",
           ((r"^(fc|classifier)\.", "head."),)),
)
# fmt: on


def convert(state: dict[str, Tensor]) -> tuple[str, dict[str, Tensor], Mapping[str, Any]]:
    """The format's name, the state under this project's keys, and the options of its networks.

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
    """Converts keys of another structure with the same function to the backbone's, in place."""
    for i, stage in enumerate(backbone.stages if isinstance(backbone, Darknet) else ()):
        name = f"stages.{i}."
        if isinstance(stage, CSPStage):
            splits = ("split_conv", "blocks_conv")
            if sum(f"{name}{split}.conv.weight" in state for split in splits) == 1:
                try:
                    convert_keys(state, stage.split, name)
                except (KeyError, RuntimeError, ValueError) as error:
                    raise WeightsError(f"the two halves of {name}split_conv differ") from error
        elif isinstance(stage, DarknetStage) and f"{name}conv.weight" in state:
            # A Darknet stage without blocks: a bare convolution in vision-toolbox.
            for key in [k for k in state if re.match(rf"{name}(conv|norm)\.\w+$", k)]:
                state[f"{name}conv.{key.removeprefix(name)}"] = state.pop(key)


def adapt_first_conv(state: dict[str, Tensor], backbone: Backbone) -> str | None:
    """Adapts an RGB convolution to the backbone's `in_channels`; returns its key if it did."""
    key = next(name for name, _ in backbone.named_parameters())
    weight, count = state.get(key), backbone.in_channels
    if weight is None or weight.ndim != 4 or weight.shape[1] != 3 or count == 3:
        return None
    weight = weight.float()  # narrow types neither sum nor scale well
    if count == 1:  # a grey image is three equal channels
        state[key] = weight.sum(dim=1, keepdim=True)
    else:  # outputs keep their magnitude
        repeated = weight.repeat(1, math.ceil(count / 3), 1, 1)[:, :count]
        state[key] = repeated * (3 / count)
    return key


_LAYER_ORDER = ("norm.bias", "norm.weight", "norm.running_mean", "norm.running_var", "conv.weight")
# Numbers in yolov4.conv.137 after csdarknet53: the convolutions of yolov4.cfg's layers 105 to 136.
_YOLOV4_NECK = 15_857_152


def read_darknet(
    data: bytes, backbone: Backbone, strict: bool
) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Tensors of a Darknet file under this project's keys, a head's too, and their options.

    The file (parser.c: load_weights_upto of pjreddie/darknet and AlexeyAB/darknet) has three int32
    (major, minor, revision), the number of images seen as int64, int32 before version 0.2, then
    for each convolution in the order of the .cfg: beta, gamma, mean, variance, weights; or biases,
    weights without batch normalisation. All are little-endian and the numbers float32.

    A file may end after any convolution, such as darknet53.conv.74. BatchNorm's epsilon stays
    PyTorch's 1e-5, as in Darknet's CUDA code, which trains; its CPU code and OpenCV have 1e-6.
    """
    is_csp = isinstance(backbone, CSPDarknet)
    name = "cspdarknet53" if is_csp else "darknet53"
    if not isinstance(backbone, Darknet) or backbone.config != VARIANTS[name]:
        raise WeightsError("Darknet's files can be read for darknet53 and cspdarknet53 only")
    if is_csp and backbone.layout != "darknet":
        raise WeightsError('csdarknet53 is create("cspdarknet53", layout="darknet")')
    with torch.device("meta"):
        complete = type(backbone)(backbone.config, **({"layout": "darknet"} if is_csp else {}))
    layers = {k: m.state_dict() for k, m in complete.named_modules() if isinstance(m, ConvNormAct)}
    shapes = {f"{k}.{end}": layer[end].shape for k, layer in layers.items() for end in _LAYER_ORDER}
    state, rest = {}, _darknet_numbers(data)
    for key, shape in shapes.items():
        if shape.numel() > len(rest):
            break
        state[key], rest = rest[: shape.numel()].view(shape), rest[shape.numel() :]
        if not state[key].isfinite().all() or ("running_var" in key and state[key].min() < 0):
            raise WeightsError(f"not of this network, or damaged: {key} has impossible values")
        if key.endswith(".out_conv.conv.weight"):  # the .cfg concatenates in the other order
            state[key] = torch.cat(state[key].chunk(2, dim=1)[::-1], dim=1)
    num_classes, remainder = divmod(len(rest), complete.channels[-1] + 1)
    if len(state) == len(shapes) and num_classes and not remainder:
        # The classifier's 1x1 convolution, before or after the average pool.
        state["head.bias"], weight = rest[:num_classes], rest[num_classes:]
        state["head.weight"] = weight.view(num_classes, -1)
    elif len(rest) not in (0, _YOLOV4_NECK) and strict:
        raise WeightsError(
            f"{len(rest):,} numbers follow the last complete layer, neither a head nor nothing; "
            "for the first layers of a detector pass strict=False"
        )
    # YOLOv3's networks have leaky ReLU; YOLOv4's has Mish, and csdarknet53.cfg came with both.
    return state, {} if is_csp and backbone.act == "mish" else {"act": "leaky_relu"}


def _darknet_numbers(data: bytes) -> Tensor:
    """What follows the header of a Darknet file."""
    major, minor = struct.unpack("<2i", data[:8]) if len(data) >= 8 else (-1, -1)
    if not (0 <= major < 1000 and 0 <= minor < 1000):  # higher: transposed, of no known file
        raise WeightsError("does not begin with the header of a Darknet file")
    header_bytes = 20 if (major, minor) >= (0, 2) else 16
    if len(data) <= header_bytes or len(data) % 4:
        raise WeightsError(f"its {len(data)} bytes are not a header and float32 numbers")
    return torch.frombuffer(bytearray(data), dtype=torch.float32, offset=header_bytes)
