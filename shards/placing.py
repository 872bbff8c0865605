"""Small tensors on their way to a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def placed(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Values, or a tensor of a CPU, as a tensor on `device`, without waiting for what the device is at.

    A plain copy from memory that may be paged out waits until all work queued on a GPU is done.
    """
    made = values if isinstance(values, Tensor) and dtype is None else torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda" or made.is_cuda:
        return made.to(device)
    return (made if made.is_pinned() else made.pin_memory()).to(device, non_blocking=True)
