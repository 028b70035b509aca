"""Muon, an optimizer that orthogonalizes the updates of convolution kernels.

Source: Keller Jordan and others, "Muon: An optimizer for hidden layers in neural networks"
(kellerjordan.github.io/posts/muon, 2024), whose airbench trains CIFAR-10 networks with it. The
scale of the update is that of "Muon is Scalable for LLM Training" (arXiv:2502.16982), which lets
both kinds of parameters share one learning rate. `torch.optim.Muon` takes matrices alone.
"""

import math
from typing import Any

import torch
from torch import Tensor


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Moves all singular values of a matrix near 1 (0.7 to 1.2) by Newton-Schulz iterations."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if is_tall else x


class Muon(torch.optim.AdamW):
    """Muon for the kernels of convolutions, AdamW for all other parameters.

    A kernel `[out, in, height, width]` counts as a matrix of `out` rows. Depthwise kernels are
    vectors, so AdamW updates them.

    Args:
        momentum: decay of the mean gradient, with Nesterov's step; for AdamW, beta1.
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
