"""The optimizer of a recipe, its learning rates, and the decay of the EMA weights.

Muon's source: Keller Jordan and others, "Muon: An optimizer for hidden layers in neural networks"
(kellerjordan.github.io/posts/muon, 2024), whose airbench trains CIFAR-10 networks with it. The
scale of its update is that of "Muon is Scalable for LLM Training" (arXiv:2502.16982), which lets
kernels and other parameters share one learning rate. `torch.optim.Muon` takes matrices alone.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from utils.recipe import Recipe

# By type, never by name: "bn_head" may be linear. _NormBase: every BatchNorm and InstanceNorm.
NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def param_groups(
    model: nn.Module, weight_decay: float, norm_weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weights first, then normalization layers and biases.

    A parameter that two modules share counts once, as a weight if either holds it as one. Frozen
    parameters are left out.
    """
    decayed, plain = {}, {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_plain = isinstance(module, NORM_LAYERS) or name == "bias"
                (plain if is_plain else decayed)[id(parameter)] = parameter
    plain = {key: parameter for key, parameter in plain.items() if key not in decayed}
    return [
        {"params": list(decayed.values()), "weight_decay": weight_decay},
        {"params": list(plain.values()), "weight_decay": norm_weight_decay},
    ]


def lr_factor(step: int, warmup_steps: int, total_steps: int, flat_share: float = 0.0) -> float:
    """Learning rate of step 0, 1, ... as a share of the peak: linear warm-up, then cosine to 0.

    The last step of the warm-up has the peak; the cosine would reach 0 at `total_steps`.

    Args:
        flat_share: share of the steps after the warm-up that stay at the peak, before the cosine.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    falling = max(0.0, progress - flat_share) / (1 - flat_share)
    return 0.5 * (1 + math.cos(math.pi * falling))


def make_optimizer(
    model: nn.Module, recipe: Recipe, dtype: torch.dtype | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimizer for the parameters that are not frozen.

    Args:
        dtype: of autocast, and of Muon's orthogonalization; None is float32.
    """
    parts = [(model, 1.0)]
    if recipe.backbone_lr_factor != 1:
        parts = [(model.backbone, recipe.backbone_lr_factor), (model.head, 1.0)]
    options = {
        "params": [
            {**group, "lr": recipe.peak_lr * factor}
            for part, factor in parts
            for group in param_groups(part, recipe.weight_decay, recipe.norm_weight_decay)
        ],
        "fused": next(model.parameters()).device.type in ("cpu", "cuda"),  # one pass over them
    }
    if recipe.optimizer == "muon":
        return Muon(momentum=recipe.momentum, dtype=dtype or torch.float32, **options)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(betas=(recipe.momentum, 0.999), **options)
    sgd = torch.optim.SGD(momentum=recipe.momentum, nesterov=recipe.nesterov, **options)
    if dtype is torch.float16:  # a first step that overflows would leave the momentum uninitialized
        parameters = (each for group in sgd.param_groups for each in group["params"])
        sgd.state.update((p, {"momentum_buffer": torch.zeros_like(p)}) for p in parameters)
    return sgd


def ema_decay_at(updates: int, decay: float) -> float:
    """Decay of the EMA weights after `updates` updates: (1 + n) / (10 + n), at most `decay`.

    The warm-up of TensorFlow's ExponentialMovingAverage(num_updates): the average covers the last
    ninth of the run so far, so that a short run does not stay near its initial weights.
    """
    return min(decay, (1 + updates) / (10 + updates))


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Moves singular values above 0.002 of the matrix's norm to 0.7 to 1.2 (Newton-Schulz)."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if is_tall else x


class Muon(torch.optim.AdamW):
    """Muon for the kernels of convolutions, AdamW for all other parameters.

    A kernel `[out, in, height, width]` counts as a matrix of `out` rows, also that of a grouped
    convolution. AdamW updates kernels with one input channel, such as depthwise ones.

    Args:
        momentum: decay of the mean gradient, with Nesterov's step; beta1 of AdamW.
        dtype: type of the orthogonalization.
        options: as of AdamW.
    """

    def __init__(self, params: Any, momentum: float, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(params, betas=(momentum, 0.999), **options)
        self.momentum, self.dtype = momentum, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates all parameters; the gradients of kernels are None afterwards."""
        for group in self.param_groups:
            for kernel in group["params"]:
                if kernel.grad is not None and kernel.ndim == 4 and kernel.shape[1] > 1:
                    self._step_kernel(kernel, group["lr"], group["weight_decay"])
                    kernel.grad = None  # AdamW leaves it alone
        super().step(closure)

    def _step_kernel(self, kernel: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[kernel]
        if not state:  # with AdamW's names, as it reads every state that is loaded
            state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(kernel)
        state["exp_avg"].lerp_(kernel.grad, 1 - self.momentum)
        mean = kernel.grad.lerp(state["exp_avg"], self.momentum)
        update = orthogonalize(mean.flatten(1).to(self.dtype))
        kernel.mul_(1 - lr * weight_decay)
        scale = 0.2 * math.sqrt(max(update.shape))  # a root mean square of 0.2, as AdamW's
        kernel.add_(update.view_as(kernel), alpha=-lr * scale)
