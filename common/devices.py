"""Data on its way to the device that computes with it, and gradients as the device wants them."""

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

LARGEST_SHARE = 0.25  # of a GPU's free memory, for a data set


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return an array as a tensor on a device. The CPU does not wait until a GPU has it."""
    tensor = torch.from_numpy(values)
    if device.type == 'cpu':
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def keep_on_device(values: np.ndarray, device: torch.device) -> torch.Tensor | None:
    """Return a data set on a GPU if it is small enough beside the memory that is free there.

    Returns None where it is too large, and on a CPU, where it may be a file that is mapped.
    """
    if device.type == 'cpu':
        return None
    free, _ = torch.cuda.mem_get_info(device)
    if values.nbytes > LARGEST_SHARE * free:
        return None
    return torch.from_numpy(np.array(values)).to(device)


def collect_gradients(model: nn.Module) -> list[torch.Tensor]:
    """Return the gradients of a model's parameters, each with the strides of its parameter.

    A backward pass may give any stride to a dimension of size 1. On a GPU, fused Adam refuses
    gradients whose strides differ from those of their parameters.
    """
    gradients = []
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.stride() != parameter.stride():
            gradient = gradient.as_strided(parameter.shape, parameter.stride())
            parameter.grad = gradient
        gradients.append(gradient)
    return gradients


def scales_gradients(optimizer: Optimizer) -> bool:
    """Return whether an optimizer looks at ``grad_scale`` and ``found_inf``, as fused ones do."""
    return getattr(optimizer, '_step_supports_amp_scaling', False)
