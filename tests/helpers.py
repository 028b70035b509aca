"""What more than one test file uses and no fixture can be."""

import torch


def randomise_norms(net):
    """Statistics and affine parameters that are not the identity, so that they are tested too."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return net
