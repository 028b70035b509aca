"""Convolutional backbones that return their feature maps at every stride.

>>> import backbones, torch
>>> net = backbones.create("cspdarknet53")
>>> [tuple(m.shape) for m in net(torch.zeros(1, 3, 64, 96))]
[(1, 64, 32, 48), (1, 128, 16, 24), (1, 256, 8, 12), (1, 512, 4, 6), (1, 1024, 2, 3)]
"""

import difflib
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.models import WeightsEnum

from backbones import darknet, torchvision_ports, vovnet
from backbones.base import Backbone
from backbones.classifier import Classifier
from backbones.pretrained import Table, published
from backbones.weights import load_weights

__all__ = ["create", "create_classifier", "list_models", "list_options", "list_weights"]
__version__ = "0.2.0"

# name -> (network class, its configuration)
_MODELS = {
    **{
        name: (darknet.CSPDarknet if config.csp else darknet.Darknet, config)
        for name, config in darknet.VARIANTS.items()
    },
    **{name: (vovnet.VoVNet, config) for name, config in vovnet.VARIANTS.items()},
    **{name: (torchvision_ports.ResNet, name) for name in torchvision_ports.RESNETS},
    **{
        name: (torchvision_ports.InvertedResidualNet, name)
        for name in torchvision_ports.INVERTED_RESIDUALS
    },
}


def create(
    name: str,
    *,
    weights: str | os.PathLike | WeightsEnum | Mapping[str, Tensor] | None = None,
    **overrides: Any,
) -> Backbone:
    """Builds a backbone, with random weights by default.

    Args:
        name: one of `list_models()`.
        weights: a name of `list_weights()`, which brings the options that its file needs and may
            download it, a path or a state dict; see `backbones.weights.load_weights`. The
            backbone's `weights_report` says what was loaded, and `preprocessing` what published
            weights expect of images.
        overrides: keyword arguments of the family's network class, such as `out_indices`,
            `in_channels`, `width`, `act` or `split`.

    Raises:
        ValueError: an unknown name, override or value; the message lists what is accepted. Or
            weights that cannot be found, verified or matched (`WeightsError`). Or an override
            that contradicts published weights.
    """
    accepted = list_options(name)
    network, config = _MODELS[name]
    for key in overrides:
        if key not in accepted:
            raise ValueError(f"{name} takes no {key!r}; it takes {', '.join(accepted)}")
    row = published(name).get(weights) if isinstance(weights, str) else None
    if row and not Path(weights).is_file():
        overrides = row.merge(overrides)
    backbone = network(config, **overrides)
    backbone.architecture = name
    if weights is not None:
        load_weights(backbone, weights)
    return backbone


def create_classifier(
    name: str, num_classes: int | None = None, *, weights: Any = None, **options: Any
) -> Classifier:
    """A `Classifier` on `create(name, weights=weights, **options)`.

    Args:
        num_classes: a new head for so many classes; None takes the head of `weights`.

    Raises:
        ValueError: as `create`; or neither `num_classes` nor a head in `weights`.
    """
    backbone = create(name, weights=weights, **options)
    if num_classes is not None:
        return Classifier(backbone, num_classes)
    report = backbone.weights_report
    if report is None or report.classes is None:
        given = "a state dict" if isinstance(weights, Mapping) else repr(weights)
        raise ValueError(f"weights={given}: no head; num_classes adds a new one, to be trained")
    classifier = Classifier(backbone, report.classes)
    load_weights(classifier, weights)
    return classifier


def list_models(pattern: str = "*") -> list[str]:
    """Sorted names of the backbones that match a shell wildcard, such as `"*darknet*"`."""
    return sorted(name for name in _MODELS if fnmatchcase(name, pattern))


def list_options(name: str) -> list[str]:
    """Keyword arguments that `create` takes for a backbone.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(name, str) or name not in _MODELS:
        nearest = difflib.get_close_matches(str(name), _MODELS, n=3, cutoff=0.5) or list_models()
        raise ValueError(f"no backbone is called {name!r}; nearest: {', '.join(nearest)}")
    return list(_MODELS[name][0].keywords())


def list_weights(pattern: str = "*") -> Table:
    """Published weights of the backbones that match a shell wildcard; prints as a table."""
    found = [published(name).items() for name in list_models(pattern)]
    return Table(row for rows in found for key, row in rows if key == row.name)  # not "DEFAULT"
