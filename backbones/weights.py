"""Loads weights from files, by name or from state dicts into a backbone or a classifier.

Some options change what a network computes but not its keys, such as the activation. A backbone's
state dict records them in its `_metadata`, which `torch.save` keeps, and `utils.exporting` in a
safetensors file; these, or those of a format or a published file, are compared with the network's.
"""

import argparse
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models import WeightsEnum

from backbones import formats
from backbones.base import Backbone
from backbones.classifier import Classifier
from backbones.formats import WeightsError
from backbones.pretrained import DARKNET, Preprocessing, Published, download, published

# The first key of each format with a prefix before it.
_WRAPPED = r"(.+\.)(stem\.(0\.|conv1\.)?conv\.weight|conv1\.weight|features\.0\.0\.weight)"
# EMA weights in the checkpoints of this project, torchvision's and timm's training scripts.
_EMA_ENTRIES = ("ema", "model_ema", "state_dict_ema")
# Options that change the outputs but no key or shape.
_SILENT_OPTIONS = {"act", "residual", "stem_stride"}
_ADAPTED = ("in_channels", "out_indices")  # weights load into networks with others


@dataclass(frozen=True)
class Report:
    """What was loaded from a source and what was not.

    Attributes:
        format: format of the keys, such as "timm VoVNet V2".
        sha256: SHA-256 of the file in hexadecimal, None for a state dict.
        loaded: number of tensors that match and are loaded.
        adapted: key of the first convolution if it was adapted to other image channels.
        left_out: the source's keys for parts that the module does not have: a head, later stages.
        missing, unexpected, misshaped: keys that do not match, misshaped ones with both shapes.
        differing: recorded options, by name, that are not the module's.
        classes: number of classes of the source's head, None without one.
        class_names: their names, in the order of the logits, where the source records them.
    """

    format: str
    sha256: str | None
    loaded: int
    adapted: str | None
    left_out: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]
    differing: Mapping[str, Any]
    classes: int | None
    class_names: tuple[str, ...] | None

    @property
    def complete(self) -> bool:
        """Whether everything matches, so that the outputs are those of the source's network."""
        bad = self.missing or self.unexpected or self.misshaped
        return not bad and not self.differing.keys() & _SILENT_OPTIONS

    def __str__(self) -> str:
        digest = f", SHA-256 {self.sha256}" if self.sha256 else ""
        text = f"{self.loaded} tensors match ({self.format}{digest})"
        for name in ("left_out", "missing", "unexpected", "misshaped"):
            if keys := getattr(self, name):
                text += f"; {len(keys)} {name.replace('_', ' ')}, first {keys[0]}"
        if self.adapted:
            text += f"; {self.adapted} adapted to the image channels"
        if self.differing:
            options = ", ".join(f"{name}={value!r}" for name, value in self.differing.items())
            text += f"; these weights were made with {options}"
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

    A backbone takes a classifier's weights without the head, and with `out_indices` without the
    stages that it does not have. A first convolution for RGB images is adapted to the backbone's
    `in_channels`: summed over the channels for one, repeated and rescaled for others.

    Args:
        module: the network to load into.
        source: a path (.pt, .pth, .safetensors, Darknet's .weights or .conv.N), a name of
            `backbones.list_weights()` for this network, a member of torchvision's enumeration, or
            a state dict. Only a name can cause a download, if the file is not in torch.hub's
            cache. It also sets the backbone's `preprocessing`.
        entry: which state dict of a checkpoint that holds several, such as "model". Defaults to
            the EMA weights, "ema", "model_ema" or "state_dict_ema", or to the only one.
        prefix: use only the keys that begin with it, such as "module.".
        sha256: the file's, in hexadecimal, 8 digits or more; verified before anything is parsed.
        strict: whether anything that does not match is an error. Otherwise what matches is loaded
            and the report lists the rest.

    Raises:
        WeightsError: a file that is missing, broken, of another hash, or would run code when
            loaded; weights that do not match or are NaN; a name that cannot be downloaded.
    """
    backbone = module.backbone if isinstance(module, Classifier) else module
    name, digest, content, row = "state dict", None, source, None
    try:
        if not isinstance(source, Mapping):
            name = str(source)
            path, row = _find(source, backbone)
            data = path.read_bytes()
            digest = _verify(data, sha256, (row and row.sha256) or None)
            content = _parse(data, path.name)
        elif sha256:
            raise WeightsError("sha256 is that of a file; a state dict has none")
        config = _config(content)
        if isinstance(content, bytes):
            form, (state, options) = "Darknet", formats.read_darknet(content, backbone, strict)
        else:
            picked, recorded = _pick(content, entry, prefix)
            form, state, options = formats.convert(picked)
            options = {**options, **(recorded or config.get("options", {}))}
        origin, class_names = (form, digest), config.get("classes")
        report, tensors = _match(module, backbone, state, options, origin, class_names)
        if not report.loaded or (strict and not report.complete):
            text = f"do not match {backbone.architecture or 'the network'}: {report}"
            raise WeightsError("; ".join([text, *_hints(report, state)]))
    except (WeightsError, OSError) as error:
        failure = WeightsError(f"{name}: {error}")
        failure.is_bad_file = isinstance(source, (str, os.PathLike)) and os.path.isfile(source)
        raise failure from error
    module.load_state_dict(tensors, strict=False)
    backbone.weights_report = report
    if row is None and digest:  # a file of the table under another name
        rows = published(backbone.architecture).values()
        row = next((each for each in rows if each.sha256 and digest.startswith(each.sha256)), None)
    if row:
        backbone.preprocessing = row.preprocessing
    elif form == "Darknet":
        backbone.preprocessing = DARKNET
    else:
        recipe = config.get("recipe", {})
        backbone.preprocessing = Preprocessing.from_recipe(recipe) if "mean" in recipe else None
    return report


def _find(
    source: str | os.PathLike | WeightsEnum, backbone: Backbone
) -> tuple[Path, Published | None]:
    """The file, and its row in the table if it is published weights."""
    rows = published(backbone.architecture)
    if isinstance(source, WeightsEnum):
        row = next((row for row in rows.values() if row.url == source.url), None)
    elif Path(source).is_file():
        return Path(source), None
    else:
        row = rows.get(str(source))
    if row is None:
        names = ", ".join(rows) or "none"
        raise WeightsError(f"not a file; names of weights for this network: {names}")
    return download(row), row


def _verify(data: bytes, *expected: str | None) -> str:
    """The SHA-256 of a file, which must begin with each of `expected`."""
    digest = hashlib.sha256(data).hexdigest()
    for digits in expected:
        if digits is not None and (len(digits) < 8 or not digest.startswith(digits.lower())):
            raise WeightsError(
                f"has SHA-256 {digest}, expected {digits.lower()} (8 digits or more); if it is "
                "damaged, delete it and download it again"
            )
    return digest


def _parse(data: bytes, name: str) -> Any:
    """What a PyTorch or safetensors file holds; a Darknet file's bytes."""
    if re.search(r"\.(weights|conv\.\d+)$", name, re.IGNORECASE):
        return data
    try:
        if name.lower().endswith(".safetensors"):
            return _read_safetensors(data)
        # torchvision's and timm's training scripts save their arguments, which are values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except ImportError as error:
        raise WeightsError("needs `pip install safetensors`") from error
    except Exception as error:  # the parsers raise all kinds for a broken file
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"loading {code[1]} could run code" if code else "damaged or of another kind"
        raise WeightsError(f"not a file of weights, {reason}; save a state dict") from error


def _read_safetensors(data: bytes) -> Any:
    """The state dict, with the config that `utils.exporting` records as in a run's checkpoint."""
    from safetensors.torch import load

    state = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    recorded = header.get("__metadata__", {})
    if not recorded.keys() >= {"backbone", "options"}:  # another project's
        return state
    decoded = ("options", "classes", "mean", "std", "eval_resize_px", "eval_crop_px")
    config = {k: json.loads(text) if k in decoded else text for k, text in recorded.items()}
    return {"config": {**config, "recipe": config}, "weights": state}


def _config(content: Any) -> Mapping[str, Any]:
    """The config in a run's checkpoint or an exported file, empty in other files."""
    config = content.get("config") if isinstance(content, Mapping) else None
    return config if isinstance(config, Mapping) and "recipe" in config else {}


def _pick(
    content: Any, entry: str | None, prefix: str | None
) -> tuple[dict[str, Tensor], Mapping[str, Any] | None]:
    """The state dict in what was read, with the keys below `prefix`, and the options it records."""
    content = content if isinstance(content, Mapping) else {}
    entries = [str(key) for key, value in content.items() if _is_state_dict(value)]
    if entry is None:
        chosen = [key for key in entries if key in _EMA_ENTRIES] or entries
        entry = chosen[0] if len(chosen) == 1 else None
    state = content if entry is None else content.get(entry)
    if not _is_state_dict(state):
        raise WeightsError(
            f"entry={entry!r} is not a state dict of tensors; those in it: "
            f"{', '.join(entries) or 'none'}"
        )
    if not prefix and "n_averaged" in state:  # torch.optim.swa_utils.AveragedModel
        prefix = "module."
    below = [key for key in state if key.startswith(prefix or "")]
    if not below:
        raise WeightsError(f"no key begins with {prefix!r}; the first is {next(iter(state))!r}")
    recorded = None
    for key, entry in getattr(state, "_metadata", {}).items():
        if "options" in entry and f"{key}.".startswith(prefix or ""):
            recorded = entry["options"]
    return {key.removeprefix(prefix or ""): state[key] for key in below}, recorded


def _is_state_dict(content: Any) -> bool:
    """Whether it is a mapping of names to tensors, and not empty."""
    tensors = isinstance(content, Mapping) and content.items()
    return bool(tensors) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors)


def _match(
    module: Backbone | Classifier,
    backbone: Backbone,
    state: dict[str, Tensor],
    options: Mapping[str, Any],
    origin: tuple[str, str | None],
    class_names: list[str] | None,
) -> tuple[Report, dict[str, Tensor]]:
    """The report, which begins with `origin`, and the tensors to load under the module's keys."""
    heads = [len(value) for key, value in state.items() if re.match(r"head\..*weight$", key)]
    for key, value in state.items():  # counts get fractions where weights are averaged or halved
        if key.endswith("num_batches_tracked") and value.is_floating_point():
            state[key] = value.nan_to_num(posinf=0).long()
    formats.match_structure(state, backbone)
    adapted = formats.adapt_first_conv(state, backbone)
    absent = backbone.left_out if module is not backbone else (*backbone.left_out, "head.")
    left_out = tuple(key for key in state if key.startswith(absent))
    state = {key: value for key, value in state.items() if key not in left_out}
    if module is not backbone:
        state = {k if k.startswith("head.") else f"backbone.{k}": v for k, v in state.items()}
    target, own = module.state_dict(), backbone.options
    known = {
        key: (_kind(value), _kind(target[key])) for key, value in state.items() if key in target
    }
    tensors = {key: state[key] for key, (theirs, ours) in known.items() if theirs == ours}
    report = Report(
        *origin,
        loaded=len(tensors),
        adapted=adapted,
        left_out=left_out,
        # Old and foreign files do not count batches, which only matters without a momentum.
        missing=tuple(k for k in target if k not in state and "num_batches_tracked" not in k),
        unexpected=tuple(key for key in state if key not in target),
        misshaped=tuple(f"{k} {a}, here {b}" for k, (a, b) in known.items() if a != b),
        differing={k: v for k, v in options.items() if own.get(k, v) != v and k not in _ADAPTED},
        classes=heads[-1] if heads else None,
        class_names=tuple(class_names) if heads and class_names else None,
    )
    for key, value in tensors.items():
        if not value.float().isfinite().all() or ("running_var" in key and value.min() < 0):
            raise WeightsError(f"NaN, infinity or a negative variance in {key}")
    return report, tensors


def _kind(tensor: Tensor) -> str:
    """Shape, and type unless it is floating point: precisions are converted."""
    number = "" if tensor.is_floating_point() else f" of {str(tensor.dtype).removeprefix('torch.')}"
    return f"{list(tensor.shape)}{number}"


def _hints(report: Report, state: Mapping[str, Tensor]) -> list[str]:
    """What may help with a mismatch."""
    hints = []
    wrapped = [found[1] for key in state if (found := re.fullmatch(_WRAPPED, key))]
    if wrapped and report.format == "backbone" and not report.loaded:
        hints.append(f"load_weights(..., prefix={wrapped[0]!r}) takes the keys below it")
    bad = [*report.missing, *report.unexpected, *report.misshaped]
    if bad and all(key.startswith("head.") for key in bad):
        hints.append("only the head differs: load_weights(model.backbone, ...) leaves it as it is")
    return hints
