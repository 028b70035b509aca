"""A run's trained classifier, made again from its checkpoint: to evaluate, to ask, to export."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from utils import distributed
from utils.recipe import Recipe
from utils.training.checkpoint import RunError, load_checkpoint


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds, ready to use.

    Attributes:
        raw, average: the classifier with its last and with its averaged (EMA) weights, on a device
            and in the memory format of the recipe, in eval mode.
        backbone, options: what made it, as of `backbones.create`.
        classes: names of the class folders; their order numbers the logits.
    """

    raw: nn.Module
    ema: nn.Module
    backbone: str
    options: dict[str, Any]
    classes: list[str]
    recipe: Recipe
    device: torch.device


def load_trained(
    path: str | Path, make: Callable[..., nn.Module], device: torch.device | None = None
) -> Trained:
    """The classifier of a run.

    Args:
        path: a checkpoint, such as a run's last.pt.
        make: `backbones.classifier.create_classifier`.
        device: where its weights are put (default: a GPU if there is one).

    Raises:
        FileNotFoundError: there is no such file.
        RunError: it is no checkpoint of a run, or its weights are not those of its own config.
    """
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    if not all(isinstance(name, str) for name in config["classes"]):
        raise RunError(f"{path}: its config's classes are not all names")
    try:
        model = make(config["backbone"], len(config["classes"]), **config["options"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{path}: its config names no network: {error}") from error
    try:
        recipe = Recipe(**config["recipe"])
    except (TypeError, ValueError) as error:
        raise RunError(f"{path}: its recipe is of another version ({error})") from error
    average = AveragedModel(model, use_buffers=True)
    try:
        model.load_state_dict(checkpoint["model"])
        average.load_state_dict(checkpoint["ema"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: its weights are not those of its own config") from error
    if not all(tensor.isfinite().all() for tensor in average.state_dict().values()):
        raise RunError(f"{path}: its weights are not all finite; take an earlier checkpoint")
    device = device or distributed.pick_device()
    memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
    raw, ema = (
        net.to(device, memory_format=memory_format).eval() for net in (model, average.module)
    )
    named = {name: config[name] for name in ("backbone", "options", "classes")}
    return Trained(raw, ema, recipe=recipe, device=device, **named)
