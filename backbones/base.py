"""The contract that every backbone keeps: images in, one feature map per stride out."""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Backbone(nn.Module):
    """A stem and a chain of stages; every stage ends in the feature map of one stride.

    A subclass builds `self.stem` and the first `self.num_stages` stages in `self.stages` after
    calling this constructor; or it overrides `parts`. If `stem_gives_map`, the first feature map is
    the stem's. Construction runs no forward pass: channels and strides come from the configuration.

    Args:
        channels: channels of each feature map of the complete network, fine to coarse.
        strides: pixels of the image per pixel of each of those maps, each twice the one before.
        out_indices: which maps `forward` returns; negative indices count from the end, None means
            all. Stages after the last one picked are not built.
        in_channels: channels of the images, at least 1.
        gradient_checkpointing: in training, keep only the maps between stages and recompute the
            rest in the backward pass: less memory, one more forward pass, the same gradients.

    Attributes:
        channels: channels of each returned map.
        strides: stride of each returned map.
        left_out: prefixes of the complete network's keys that this network does not have.
        architecture: the name that `backbones.create` made it by.
        weights_report: the `backbones.weights.Report` of the weights loaded last, None before.
        preprocessing: what the weights expect of images, a `backbones.pretrained.Preprocessing`;
            None where it is not known.
    """

    stem_gives_map = False

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        out_indices: Sequence[int] | None = None,
        in_channels: int = 3,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        validate_count("in_channels", in_channels)
        validate_choice("gradient_checkpointing", gradient_checkpointing, (True, False))
        self.out_indices = _resolve_indices(out_indices, len(channels))
        self.channels = tuple(channels[i] for i in self.out_indices)
        self.strides = tuple(strides[i] for i in self.out_indices)
        self.num_stages = self.out_indices[-1] + 1 - self.stem_gives_map
        stages = range(len(channels) - self.stem_gives_map)
        self.left_out = tuple(f"stages.{i}." for i in stages[self.num_stages :])
        self.in_channels = int(in_channels)  # not one of NumPy's, which no checkpoint may hold
        self.gradient_checkpointing = gradient_checkpointing
        self._num_frozen_parts = 0
        self.architecture: str | None = None
        self.weights_report: object | None = None
        self.preprocessing: Any = None
        self.register_state_dict_post_hook(_record_options)

    @classmethod
    def keywords(cls) -> dict[str, Any]:
        """Keyword-only arguments of this class and its parents, with their defaults."""
        classes = [each for each in cls.__mro__ if issubclass(each, Backbone)]
        parameters = [p for c in classes for p in inspect.signature(c.__init__).parameters.values()]
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that decide what it computes, those not given included.

        They are saved with every state dict, in its `_metadata`.
        """
        others = ("gradient_checkpointing", "last_norm")
        names = [name for name in self.keywords() if name not in others and hasattr(self, name)]
        return {name: getattr(self, name) for name in names}

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of `images`, fine to coarse.

        Args:
            images: floating point, `[N, in_channels, H, W]`, any H and W.

        Returns:
            One map `[N, channels[i], ceil(H / strides[i]), ceil(W / strides[i])]` per stride.

        Raises:
            ValueError: `images` has another number of dimensions or channels, or an integer type.
        """
        self.validate_images(images)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        run = _run_checkpointed if recompute else _run
        x, maps = images, []
        for part in self.parts():
            x = run(part, x)
            maps.append(x)
        if not self.stem_gives_map:
            del maps[0]
        return [maps[i] for i in self.out_indices]

    def parts(self) -> list[list[nn.Module]]:
        """The stem, then each stage, as the modules that it runs in order."""
        return [[self.stem], *([stage] for stage in self.stages)]

    def make_head(self, num_classes: int) -> nn.Module:
        """Maps the coarsest feature map, averaged over its pixels, to `num_classes` logits."""
        return nn.Linear(self.channels[-1], num_classes)

    def freeze(self, num_stages: int | None) -> "Backbone":
        """Freezes the stem and the first `num_stages` stages; returns self.

        Their parameters take no gradient and their BatchNorm layers keep their statistics, even
        after a later `.train()`. `freeze(0)` freezes the stem alone, `freeze(None)` unfreezes
        everything, and a later call replaces an earlier one.

        Raises:
            ValueError: the network has fewer stages.
        """
        validate_choice("freeze", num_stages, (*range(self.num_stages + 1), None))
        self.requires_grad_(True)
        self._num_frozen_parts = 0 if num_stages is None else num_stages + 1
        for module in self._frozen_modules():
            module.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        """Sets training mode, except for frozen stages, which stay in eval mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        return [module for part in self.parts()[: self._num_frozen_parts] for module in part]

    def validate_images(self, images: Tensor) -> None:
        """Raises ValueError unless `images` are floating point, `[N, in_channels, H, W]`."""
        given = type(images).__name__
        if isinstance(images, Tensor):
            channels_fit = images.ndim == 4 and images.shape[1] == self.in_channels
            if channels_fit and images.is_floating_point():
                return
            given = f"{images.dtype} {list(images.shape)}"
        expected = f"a floating-point tensor [N, {self.in_channels}, H, W]"
        raise ValueError(f"images are {given}; expected {expected}")


def _record_options(net: Backbone, state: object, prefix: str, metadata: dict[str, Any]) -> None:
    metadata["options"] = net.options


def is_integer(value: object) -> bool:
    """Whether it is an integer, also one of NumPy's, but not True or False."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def validate_count(name: str, value: object) -> None:
    """Raises ValueError unless `value` is an integer of at least 1."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1")


def validate_number(name: str, value: object) -> None:
    """Raises ValueError unless `value` is a finite number."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number")


def validate_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError unless `value` is one of `choices`; 1 is not True."""
    if not any(value == each and type(value) is type(each) for each in choices):
        raise ValueError(f"{name}={value!r} must be one of {tuple(choices)}")


def _resolve_indices(out_indices: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """`out_indices` as ascending indices from 0."""
    if out_indices is None:
        return tuple(range(count))
    indices = []
    if isinstance(out_indices, Sequence) and all(is_integer(i) for i in out_indices):
        indices = [int(i) % count for i in out_indices if -count <= i < count]
    if not indices or len(indices) < len(out_indices) or sorted(set(indices)) != indices:
        raise ValueError(
            f"out_indices={out_indices!r} must be a tuple of integers from -{count} to {count - 1} "
            "that names each feature map once, fine to coarse"
        )
    return tuple(indices)


def _run(part: list[nn.Module], x: Tensor) -> Tensor:
    for module in part:
        x = module(x)
    return x


def _run_checkpointed(part: list[nn.Module], x: Tensor) -> Tensor:
    # When compiled, a part is traced once and its running statistics are updated once.
    compiling = torch.compiler.is_compiling()
    contexts = {} if compiling else {"context_fn": lambda: (nullcontext(), _fix_statistics(part))}
    return checkpoint(_run, part, x, use_reentrant=False, **contexts)


@contextmanager
def _fix_statistics(part: list[nn.Module]) -> Iterator[None]:
    """Keeps the recomputation from updating BatchNorm's running statistics a second time."""
    norms = [m for module in part for m in module.modules() if isinstance(m, _BatchNorm)]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, saved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
