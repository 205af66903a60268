"""Class labels as networks take them: one-hot rows, float32 [N, classes]; None for a network without classes."""

from collections.abc import Callable

import torch

from rdmd_fast.errors import InputError

Labels = Callable[[torch.Tensor], torch.Tensor | None]
"""Maps positions, int64 [N] on the CPU, to one-hot rows on the device; None without classes."""

NO_CLASS = -1
"""Its row is zeros: EDM's unconditional input."""


def one_hot_rows(indices: torch.Tensor, classes: int, device) -> torch.Tensor | None:
    """Class numbers [N], ``NO_CLASS`` among them or not, as rows on ``device``."""
    if not classes:
        return None
    rows = torch.nn.functional.one_hot(indices.long().clamp(min=0), classes) * (indices != NO_CLASS)[:, None]
    rows = rows.float()
    on_gpu = torch.device(device).type == "cuda"
    return rows.pin_memory().to(device, non_blocking=True) if on_gpu and not rows.is_cuda else rows.to(device)


def target_class_row(classes: int, target_class: int | None, device: torch.device) -> torch.Tensor | None:
    """The row [1, classes] of data.target_class.

    Raises:
        InputError: a class is named for a network without classes, or none or a wrong one for a network with them.
    """
    if not classes:
        if target_class is not None:
            raise InputError("data.target_class: the network has no classes, remove the key")
        return None
    if target_class is None or target_class >= classes:
        raise InputError(f"data.target_class: the network has {classes} classes, name one from 0 to {classes - 1}")
    return one_hot_rows(torch.tensor([target_class]), classes, device)


def training_labels(
    classes: int, target_class: int | None, own_labels, labels_at: Callable[[torch.Tensor], torch.Tensor], device
) -> Labels:
    """Labels of the teacher stage: data.target_class where it is set, else the target shards' own.

    Args:
        own_labels: class of every sample in the shards, an integer array; None where they have none.
        labels_at: maps positions to those of the samples there, int64 [N] on the CPU.

    Raises:
        InputError: as ``target_class_row``, or the shards' labels are missing or out of the network's range.
    """
    if not classes or target_class is not None:
        row = target_class_row(classes, target_class, device)
        return lambda positions: None if row is None else row.expand(len(positions), -1)
    if own_labels is None:
        raise InputError(
            f"data.target: its samples have no labels and the network has {classes} classes: pack it with labels, "
            f"or name one class from 0 to {classes - 1} by data.target_class"
        )
    if len(own_labels) and not 0 <= own_labels.min() <= own_labels.max() < classes:
        raise InputError(
            f"data.target: labels from {own_labels.min()} to {own_labels.max()}, the network has {classes} classes: "
            f"set network.label_dim to {own_labels.max() + 1}, or pack other labels"
        )
    return lambda positions: one_hot_rows(labels_at(positions), classes, device)


def varied_labels(classes: int, target_class: int | None, count: int, device: torch.device) -> torch.Tensor | None:
    """Rows of the teacher stage's pictures: data.target_class, or one class after another."""
    if target_class is None:
        return one_hot_rows(torch.arange(count) % max(classes, 1), classes, device)
    return one_hot_rows(torch.full((count,), target_class), classes, device)


def label_rows(
    classes: int, target_class: int | None, class_labels: torch.Tensor | None, count: int, device
) -> torch.Tensor | None:
    """Class indices [N] (or rows [N, classes], kept) as rows.

    Without labels it is ``target_class``, an export's own; without that, too, ``NO_CLASS``.

    Raises:
        InputError: a class that the network does not have, or labels of another shape.
    """
    if not classes:
        return None
    if class_labels is None:
        index = NO_CLASS if target_class is None else target_class
        return one_hot_rows(torch.full((count,), index), classes, device)
    labels = torch.as_tensor(class_labels)  # checked where it is: on the CPU that stops no GPU
    if labels.shape == (count, classes):
        return labels.to(device).float()
    if labels.shape != (count,):
        raise InputError(f"class_labels: shape {list(labels.shape)}, give [{count}] or one-hot [{count}, {classes}]")
    if count and not 0 <= labels.min() <= labels.max() < classes:
        raise InputError(f"class_labels: the network has {classes} classes, name them from 0 to {classes - 1}")
    return one_hot_rows(labels, classes, device)
