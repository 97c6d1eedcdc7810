"""Data on its way to the device that computes with it."""

import numpy as np
import torch

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
