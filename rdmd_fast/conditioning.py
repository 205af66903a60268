"""Class labels for networks that have classes: one class, or each sample's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import one_hot

from .data.device import DeviceStream
from .errors import InputError

Labels = Callable[[torch.Tensor], torch.Tensor | None]
"""Maps positions, int64 [N] on the CPU, to one-hot rows, float32 [N, classes] on the device; None without classes."""


def target_class_row(classes: int, target_class: int | None, device: torch.device) -> torch.Tensor | None:
    """One-hot row [1, classes] of data.target_class, or None for a network without classes.

    Raises:
        InputError: a class is named for a network without classes, or none or a wrong one for a network with them.
    """
    if not classes:
        if target_class is not None:
            raise InputError("data.target_class: the network has no classes, remove the key")
        return None
    if target_class is None or target_class >= classes:
        raise InputError(f"data.target_class: the network has {classes} classes, name one from 0 to {classes - 1}")
    return one_hot(torch.tensor([target_class], device=device), classes).float()


def training_labels(classes: int, target_class: int | None, target: DeviceStream, device: torch.device) -> Labels:
    """Labels of the teacher stage: data.target_class where it is set, else the target shards' own.

    Raises:
        InputError: as ``target_class_row``, or the shards' labels are missing or out of the network's range.
    """
    if not classes or target_class is not None:
        row = target_class_row(classes, target_class, device)
        return lambda positions: None if row is None else row.expand(len(positions), -1)
    own = getattr(target.stream, "shards", None)
    own = getattr(own, "labels", None)
    if own is None:
        raise InputError(
            f"data.target: its samples have no labels and the network has {classes} classes: pack it with labels, "
            f"or name one class from 0 to {classes - 1} by data.target_class"
        )
    if len(own) and not 0 <= own.min() <= own.max() < classes:
        raise InputError(
            f"data.target: labels from {own.min()} to {own.max()}, the network has {classes} classes: "
            f"set network.label_dim to {own.max() + 1}, or pack other labels"
        )

    def labels(positions: torch.Tensor) -> torch.Tensor:
        rows = one_hot(target.labels(positions), classes).float()
        return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows

    return labels


def varied_labels(classes: int, target_class: int | None, count: int, device: torch.device) -> torch.Tensor | None:
    """Labels [count, classes] of the teacher stage's pictures: data.target_class, or one class after another."""
    if not classes:
        return None
    indices = torch.arange(count) % classes if target_class is None else torch.full((count,), target_class)
    return one_hot(indices, classes).float().to(device)
