"""The contract that every backbone keeps: images in, one feature map per stride out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Backbone(nn.Module):
    """A stem and a chain of stages; every stage ends in the map of one stride.

    A subclass builds `self.stem` and `self.stages` after calling this constructor, and builds only
    the first `self.num_stages` stages; or it overrides `parts`. Where `stem_gives_map`, the first
    map is the stem's. Nothing here runs a forward pass: channels and strides come from the
    configuration.

    Args:
        channels: channels of each map of the whole network, fine to coarse.
        strides: pixels of the image per pixel of each of those maps, each twice the one before.
        out_indices: which maps `forward` returns; negative indices count from the end, None means
            all. Stages after the last one picked are not built.
        in_channels: channels of the images, at least 1.
        gradient_checkpointing: keep only the maps between stages while training and compute the
            rest again in the backward pass: less memory, one more forward pass, equal gradients.

    Attributes:
        channels: channels of each returned map.
        strides: stride of each returned map.
        weights_report: of the weights loaded last (`backbones.weights.Report`), None before.
    """

    stem_gives_map = False

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        out_indices: Sequence[int] | None,
        in_channels: int,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        if not is_integer(in_channels) or in_channels < 1:
            raise ValueError(f"in_channels={in_channels!r} must be an integer of at least 1")
        if not isinstance(gradient_checkpointing, bool):
            raise ValueError(
                f"gradient_checkpointing={gradient_checkpointing!r} must be True or False"
            )
        self.out_indices = _resolve_indices(out_indices, len(channels))
        self.channels = tuple(channels[i] for i in self.out_indices)
        self.strides = tuple(strides[i] for i in self.out_indices)
        self.num_stages = self.out_indices[-1] + (0 if self.stem_gives_map else 1)
        every_stage = range(len(channels) - (1 if self.stem_gives_map else 0))
        # Prefixes of the state dict's keys in the whole network that are not in this one.
        self.left_out = tuple(f"stages.{i}." for i in every_stage[self.num_stages :])
        self.in_channels = in_channels
        self.gradient_checkpointing = gradient_checkpointing
        self._frozen_stages: int | None = None
        self.weights_report: object | None = None  # set by backbones.weights.load_weights

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of `images`, fine to coarse.

        Args:
            images: floating point, `[N, in_channels, H, W]`, any H and W.

        Returns:
            One map `[N, channels[i], ceil(H / strides[i]), ceil(W / strides[i])]` per stride.

        Raises:
            ValueError: `images` has another rank, channel count or an integer type.
        """
        self.validate_images(images)
        run = _run
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            run = _run_checkpointed
        x, maps = images, []
        for part in self.parts():
            x = run(part, x)
            maps.append(x)
        if not self.stem_gives_map:
            del maps[0]
        return [maps[i] for i in self.out_indices]

    def parts(self) -> list[list[nn.Module]]:
        """The stem, then each stage: the modules that it runs one after another."""
        return [[self.stem], *([stage] for stage in self.stages)]

    def make_head(self, num_classes: int) -> nn.Module:
        """What turns the coarsest map, averaged over its pixels, into `num_classes` logits."""
        return nn.Linear(self.channels[-1], num_classes)

    def freeze(self, num_stages: int | None) -> "Backbone":
        """Stops the stem and the first `num_stages` stages from learning; returns self.

        Their parameters take no gradient and their BatchNorm layers keep their statistics, also
        after a later `.train()`. `freeze(0)` freezes the stem alone, `freeze(None)` frees
        everything, and a later call replaces an earlier one.

        Raises:
            ValueError: the network has fewer stages.
        """
        allowed = range(self.num_stages + 1)
        if num_stages is not None and not (is_integer(num_stages) and num_stages in allowed):
            raise ValueError(
                f"freeze({num_stages!r}): choose 0 to {self.num_stages} stages, or None for none"
            )
        self.requires_grad_(True)
        self._frozen_stages = num_stages
        for module in self._frozen_modules():
            module.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        """Sets training mode everywhere but in what is frozen."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        if self._frozen_stages is None:
            return []
        return [module for part in self.parts()[: self._frozen_stages + 1] for module in part]

    def validate_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise ValueError(
                f"images are a {type(images).__name__}; expected a tensor [N, C, H, W]"
            )
        shape = tuple(images.shape)
        if images.ndim != 4 or shape[1] != self.in_channels:
            raise ValueError(f"images are {list(shape)}; expected [N, {self.in_channels}, H, W]")
        if not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype}; expected a floating-point type, normalised"
            )


def is_integer(value: object) -> bool:
    """Whether it is a whole number, NumPy's too; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _resolve_indices(out_indices: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """`out_indices` as ascending indices from 0; ValueError for one that no map has."""
    if out_indices is None:
        return tuple(range(count))
    if not isinstance(out_indices, Sequence):
        raise ValueError(f"out_indices={out_indices!r} must be a tuple of integers")
    wrong = [i for i in out_indices if not is_integer(i) or not -count <= i < count]
    if wrong or not out_indices:
        raise ValueError(
            f"out_indices={tuple(out_indices)} must be at least one of -{count} to {count - 1}, "
            "the maps from fine to coarse"
        )
    indices = [int(i) % count for i in out_indices]
    if sorted(set(indices)) != indices:
        raise ValueError(
            f"out_indices={tuple(out_indices)} must name each map once, fine to coarse"
        )
    return tuple(indices)


def _run(part: list[nn.Module], x: Tensor) -> Tensor:
    for module in part:
        x = module(x)
    return x


def _run_checkpointed(part: list[nn.Module], x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # traces the part once, so statistics move once
        return checkpoint(_run, part, x, use_reentrant=False)
    return checkpoint(
        _run,
        part,
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _fixed_statistics(part)),
    )


@contextmanager
def _fixed_statistics(part: list[nn.Module]) -> Iterator[None]:
    """Keeps the recomputation from moving BatchNorm's running statistics a second time."""
    norms = [m for module in part for m in module.modules() if isinstance(m, _BatchNorm)]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, saved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
