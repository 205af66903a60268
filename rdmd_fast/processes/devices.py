"""Devices that a command's --device names."""

import torch

from rdmd_fast.errors import InputError


def pick_devices(name: str, workers: int = 1) -> list[str]:
    """Devices that share the work, a process each: GPUs, or ``workers`` times the CPU.

    Args:
        name: auto (all GPUs, the CPU where there is none), cpu, cuda (all GPUs), or some as "cuda:0,cuda:1".

    Raises:
        InputError: no such device, one named twice, or several workers on GPUs.
    """
    if workers < 1:
        raise InputError(f"--workers {workers}: must be at least 1")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    devices = [str(pick_device(part.strip())) for part in name.split(",")]
    if devices == ["cuda"]:
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if len(set(devices)) < len(devices):
        raise InputError(f"--device {name}: names a device twice; several processes on the CPU are --workers N")
    if workers > 1 and devices != ["cpu"]:
        raise InputError(f"--workers {workers}: is for the CPU, name GPUs by --device")
    return devices * workers


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: no such device, use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    return device
