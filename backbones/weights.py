"""Weights from anywhere into a backbone or a classifier: found, verified, matched, loaded.

What the formats are and how they are told apart is said in `backbones.formats`. Some options change
what a network computes and not its keys: the activation, VoVNet's residuals. Where a format says
what its networks are, the module's options are held to it.
"""

import dataclasses
import hashlib
import logging
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchvision.models import WeightsEnum, get_model_weights

from backbones.base import Backbone
from backbones.classifier import Classifier
from backbones.formats import (
    WeightsError,
    adapt_first_conv,
    convert,
    is_darknet_file,
    match_structure,
    read_darknet,
)
from backbones.torchvision_ports import TorchvisionPort

_logger = logging.getLogger(__name__)

# Where checkpoints keep a state dict: ours and torchvision's, timm's, Lightning's and others'.
ENTRIES = ("model", "ema", "model_ema", "state_dict", "state_dict_ema", "ema_state_dict", "net")
# The first key of each format, by which whatever stands before it is found out.
FIRST_KEYS = ("stem.conv.weight", "stem.0.conv.weight", "stem.conv1.conv.weight", "conv1.weight")
FIRST_KEYS += ("features.0.0.weight",)
# What the checkpoint that a run of utils.training.loop saves has beside the model.
RUN_KEYS = {"config", "model", "ema", "optimizer"}
# These change what is computed and no key or shape, so that nothing else would tell.
_SILENT_OPTIONS = ("act", "residual", "stem_stride")


@dataclass(frozen=True)
class Report:
    """What became of the tensors of a source.

    Attributes:
        source: path or name, as given.
        format: of the keys, such as "timm VoVNet".
        sha256: of the file in hexadecimal, None for a state dict from memory.
        loaded: number of tensors that were loaded.
        adapted: the key of the first convolution where it was changed to other image channels.
        left_out: keys that the source has for what the module left out: a head, later stages.
        missing, unexpected, misshaped: keys that do not match; all empty if `strict`.
        differing: options of the module, by name, that are not those the weights were made with.
    """

    source: str
    format: str
    sha256: str | None
    loaded: int = 0
    adapted: str | None = None
    left_out: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[str, ...] = ()
    differing: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        digest = f", SHA-256 {self.sha256}" if self.sha256 else ""
        text = f"{self.source}: {self.loaded} tensors loaded ({self.format}{digest})"
        for name in ("left_out", "missing", "unexpected", "misshaped"):
            if keys := getattr(self, name):
                text += f"; {len(keys)} {name.replace('_', ' ')}, first {keys[0]}"
        if self.adapted:
            text += f"; {self.adapted} adapted to the image channels"
        if self.differing:
            text += f"; made with {_keywords(self.differing)}"
        return text


def load_weights(
    module: Backbone | Classifier,
    source: str | os.PathLike | WeightsEnum | Mapping[str, Tensor],
    *,
    entry: str | None = None,
    prefix: str | None = None,
    sha256: str | None = None,
    strict: bool = True,
) -> Report:
    """Loads weights into a backbone or a classifier; what does not match is an error.

    A backbone takes the weights of a classifier and leaves the head out, and with `out_indices`
    the stages that it does not have. A first convolution for RGB images is adapted to the
    backbone's `in_channels`: summed over the channels for one, repeated and rescaled for others.

    Args:
        module: gets the weights.
        source: a path (.pt, .pth, .safetensors, Darknet's .weights or .conv.N), the name of
            torchvision's weights for this network ("IMAGENET1K_V2", "DEFAULT") or the member of
            its enumeration, or a state dict. Only a name may touch the network, and only if the
            file is not in torch.hub's cache.
        entry: which state dict of a checkpoint that holds several, such as "model". A run's
            checkpoint gives its averaged weights, "ema", unless told otherwise.
        prefix: use only the keys below it, such as "module.".
        sha256: the file's, in hexadecimal, 8 digits or more; checked before anything is read.
        strict: whether anything that does not match is an error. Otherwise what does match is
            loaded, and the report tells of the rest.

    Raises:
        WeightsError: a file that is not there, broken, of another hash, or would run code when
            loaded; weights that do not match; a name that cannot be downloaded.
    """
    if not isinstance(module, (Backbone, Classifier)):
        kind = type(module).__name__
        raise WeightsError(f"weights go into a Backbone or a Classifier, not into a {kind}")
    if any(tensor.is_meta for tensor in module.state_dict().values()):
        raise WeightsError("the module is on the meta device; make it elsewhere, or to_empty() it")
    for name, value in (("entry", entry), ("prefix", prefix), ("sha256", sha256)):
        if not isinstance(value, (str, type(None))):
            raise WeightsError(f"{name}={value!r} must be a string")
    backbone = module.backbone if isinstance(module, Classifier) else module
    if isinstance(source, Mapping):
        if sha256 is not None:
            raise WeightsError("sha256 is that of a file; a state dict has none")
        name, digest, file = "state dict", None, source
    else:
        path, published = _find(source, backbone)
        name, digest = str(source), _checked_digest(path, sha256, published)
        file = None if is_darknet_file(path) else _read_file(path)
    if file is not None:
        picked = _pick(name, file, entry, prefix)
        form, state, options = convert(picked)
        options = {**options, **_options_of_run(file)}
    elif entry or prefix:
        raise WeightsError(f"{name}: a Darknet file has no entries and no prefixes")
    else:
        form, (state, options) = "Darknet", read_darknet(path, backbone, strict)
        picked = state
    report, state, bad = _match(module, backbone, state, options, Report(name, form, digest))
    if (strict and bad) or not report.loaded:
        hints = _hints(report, picked)
        raise WeightsError("; ".join([_describe(report, state, module.state_dict()), *hints]))
    target = module.state_dict()
    keys = target.keys() & state.keys() - set(report.misshaped)
    module.load_state_dict({key: state[key] for key in keys}, strict=False)
    backbone.weights_report = report
    _logger.info("%s", report)
    return report


# ---- finding and verifying ---------------------------------------------------------------------


def _find(source: str | os.PathLike | WeightsEnum, backbone: Backbone) -> tuple[Path, str | None]:
    """The file of a path or of a name, and the start of the hash that its publisher gave."""
    if isinstance(source, WeightsEnum):
        name = backbone.architecture if isinstance(backbone, TorchvisionPort) else None
        if name is None or source not in get_model_weights(name):
            raise WeightsError(f"{source} are weights of another network")
        return _find_by_name(source.name, backbone)
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        raise WeightsError(f"weights must be a path, a name or a state dict, not {kind}")
    text = os.fsdecode(source)
    if "://" in text:
        raise WeightsError(f"{text}: an address; download it and give the file's path")
    path = Path(text)
    try:
        if path.is_file():
            return path, None
        what = "is a folder" if text and path.is_dir() else "there is no such file"
    except (OSError, ValueError) as error:  # too long, or with a null byte
        what = _first_line(error)
    if isinstance(source, str) and re.fullmatch(r"\w+", text):
        return _find_by_name(text, backbone)
    raise WeightsError(f"{text or 'empty path'}: {what}; give a file with weights")


def _find_by_name(name: str, backbone: Backbone) -> tuple[Path, str | None]:
    if not isinstance(backbone, TorchvisionPort):
        kind = type(backbone).__name__
        raise WeightsError(
            f"{name!r} is no file, and {kind} has no weights by name; give the path of a file"
        )
    known = get_model_weights(backbone.architecture)
    if name not in known.__members__:
        raise WeightsError(
            f"{backbone.architecture} has no weights called {name!r}, and there is no such file; "
            f"choose from {', '.join(known.__members__)}"
        )
    url = known[name].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    published = re.search(r"-([0-9a-f]{8,})\.\w+$", path.name)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), published and published[1])
        except (OSError, RuntimeError) as error:  # no network; another hash
            raise WeightsError(
                f"{name} of {backbone.architecture} is not here and cannot be downloaded "
                f"({_first_line(error)}); download {url} elsewhere and put it at {path}"
            ) from error
    return path, published and published[1]


def _checked_digest(path: Path, sha256: str | None, published: str | None) -> str:
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256):
        raise WeightsError(f"sha256={sha256!r} must be 8 to 64 hexadecimal digits")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    for expected in (sha256, published):
        if expected and not digest.startswith(expected.lower()):
            raise WeightsError(
                f"{path}: has SHA-256 {digest}, expected {expected.lower()}; it is damaged or "
                "another file: delete it and fetch it again"
            )
    return digest


# ---- reading -----------------------------------------------------------------------------------


def _read_file(path: Path) -> Any:
    if path.suffix.lower() == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise WeightsError(f"{path}: needs `pip install safetensors`") from error
        read = load_file
    else:

        def read(file: Path) -> Any:
            return torch.load(file, map_location="cpu", weights_only=True)

    try:
        return read(path)
    except Exception as error:  # whatever a parser stumbles over in a broken file
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and found:
            raise WeightsError(
                f"{path}: refused, since loading {found[1]} could run code; save a state dict of "
                "tensors alone"
            ) from error
        what = "a TorchScript archive" if "TorchScript" in str(error) else "damaged or another file"
        raise WeightsError(f"{path}: not a file of weights, {what}; save a state dict") from error


def _pick(name: str, loaded: Any, entry: str | None, prefix: str | None) -> dict[str, Tensor]:
    """The state dict in what was read: keys below `prefix`, tensors alone."""
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{name}: holds a {type(loaded).__name__}, not a state dict")
    if entry is None and loaded.keys() >= RUN_KEYS:
        entry = "ema"
    if entry is not None:
        if not isinstance(loaded.get(entry), Mapping):
            there = ", ".join(str(k) for k, v in loaded.items() if isinstance(v, Mapping)) or "none"
            raise WeightsError(f"{name}: has no state dict {entry!r}; it has {there}")
        loaded = loaded[entry]
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            inside = [each for each in ENTRIES if isinstance(loaded.get(each), Mapping)]
            hint = f": load_weights(..., entry={inside[0]!r})" if inside else ""
            raise WeightsError(f"{name}: not a state dict, {key!r} is no name of a tensor{hint}")
        if is_lazy(value) or value.layout != torch.strided or value.is_nested or value.is_quantized:
            raise WeightsError(f"{name}: {key} is not a plain dense tensor")
        if value.is_meta or value.is_complex():
            what = "on the meta device, without values" if value.is_meta else "complex"
            raise WeightsError(f"{name}: {key} is {what}")
    if not prefix and "n_averaged" in loaded:  # torch.optim.swa_utils.AveragedModel
        prefix = "module."
    below = [key for key in loaded if key.startswith(prefix or "")]
    if prefix and not below:
        first = next(iter(loaded), "none")
        raise WeightsError(f"{name}: no key begins with {prefix!r}; the first is {first!r}")
    if not below:
        raise WeightsError(f"{name}: not a state dict, it is empty")
    return {key.removeprefix(prefix or ""): loaded[key] for key in below}


def _options_of_run(file: Mapping[str, Any]) -> Mapping[str, Any]:
    """Options of the backbone that a run's checkpoint tells of."""
    config = file.get("config") if file.keys() >= RUN_KEYS else None
    options = config.get("options") if isinstance(config, Mapping) else None
    return options if isinstance(options, Mapping) else {}


# ---- loading -----------------------------------------------------------------------------------


def _match(
    module: nn.Module,
    backbone: Backbone,
    state: dict[str, Tensor],
    options: Mapping[str, Any],
    report: Report,
) -> tuple[Report, dict[str, Tensor], bool]:
    """The report, the tensors under the module's keys, and whether anything does not match."""
    state = dict(state)
    match_structure(state, backbone)
    adapted = adapt_first_conv(state, backbone)
    left_out = [key for key in state if key.startswith(backbone.left_out)]
    if module is backbone:
        left_out += [key for key in state if key.startswith("head.")]
    for key in left_out:
        del state[key]
    if module is not backbone:
        state = {k if k.startswith("head.") else f"backbone.{k}": v for k, v in state.items()}
    target = module.state_dict()
    known = [key for key in state if key in target]
    misshaped = [key for key in known if not _fits(state[key], target[key])]
    report = dataclasses.replace(
        report,
        loaded=len(known) - len(misshaped),
        adapted=adapted,
        left_out=tuple(left_out),
        # Batches are not counted in old and foreign files, and matter to no fixed momentum.
        missing=tuple(
            k for k in target if k not in state and not k.endswith("num_batches_tracked")
        ),
        unexpected=tuple(key for key in state if key not in target),
        misshaped=tuple(misshaped),
        differing={k: v for k, v in options.items() if getattr(backbone, k, v) != v},
    )
    silent = any(option in report.differing for option in _SILENT_OPTIONS)
    return report, state, bool(report.missing or report.unexpected or misshaped or silent)


def _fits(value: Tensor, target: Tensor) -> bool:
    return value.shape == target.shape and value.is_floating_point() == target.is_floating_point()


def _describe(report: Report, state: dict[str, Tensor], target: Mapping[str, Tensor]) -> str:
    """One line of what does not match, and what may be the reason."""
    parts = [f"{len(report.missing)} keys missing", f"{len(report.unexpected)} unexpected"]
    parts += [f"{len(report.misshaped)} of another shape"]
    text = f"{report.source}: {report.format} weights do not match: {', '.join(parts)}"
    for name in ("missing", "unexpected"):
        if keys := getattr(report, name):
            text += f"; first {name}: {keys[0]}"
    if report.misshaped:
        key = report.misshaped[0]
        text += f"; first of another shape: {key} {_kind(state[key])}, here {_kind(target[key])}"
    return text


def _kind(tensor: Tensor) -> str:
    number = "" if tensor.is_floating_point() else f" of {str(tensor.dtype).removeprefix('torch.')}"
    return f"{list(tensor.shape)}{number}"


def _hints(report: Report, picked: Mapping[str, Tensor]) -> list[str]:
    hints = []
    if report.differing:
        hints.append(f"these weights were made with {_keywords(report.differing)}")
    for key in picked:
        first = next((each for each in FIRST_KEYS if key.endswith(f".{each}")), None)
        if key in FIRST_KEYS or key.startswith(("backbone.stem.", "stages.", "layer")):
            break
        if first:
            hints.append(f"load_weights(..., prefix={key.removesuffix(first)!r}) takes its keys")
            break
    bad = [*report.missing, *report.unexpected, *report.misshaped]
    if bad and all(key.startswith("head.") for key in bad):
        hints.append("only the head differs: load_weights(model.backbone, ...) leaves it as it is")
    return hints


def _keywords(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
