"""From the bytes of one sample to its array: an image or a .npy file, from whoever wrote it."""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
from numpy.lib import format as npy

from rdmd_fast.data.formats import decode_rgb
from rdmd_fast.data.parts import ARRAY_EXTENSION

warnings.filterwarnings("ignore", message="Reading `.npy`")  # by Python 2: read without a word, or refused


def decode_sample(data: bytes, extension: str) -> np.ndarray:
    """Uint8 [H, W, 3] of an image, float32 [C, H, W] or [D] of an array; raises ``formats.UNREADABLE``."""
    return decode_array(data) if extension == ARRAY_EXTENSION else decode_image(data)


def decode_image(data: bytes) -> np.ndarray:
    """A png, jpg or webp file as uint8 [H, W, 3]; raises ``formats.UNREADABLE``."""
    return np.asarray(decode_rgb(data))


def decode_array(data: bytes) -> np.ndarray:
    """A .npy file's floats as float32: latents [C, H, W] or a point [D]. Takes no more memory than ``data``.

    Raises:
        ValueError: another shape or type, values that are not finite, a damaged or pickled file.
    """
    if data.startswith(b"PK"):
        raise ValueError("holds several arrays; save one with numpy.save")
    file = io.BytesIO(data)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(npy.read_magic(file))
    if read_header is None:
        raise ValueError("is of an unknown .npy version")
    try:
        shape, by_columns, dtype = read_header(file)
    except (RecursionError, MemoryError):  # Python's parser says either of text that is nested too deeply
        raise ValueError("its header is no header") from None
    if dtype.kind != "f":
        raise ValueError(f"holds {dtype}; save float32 or float16")
    if len(shape) not in (1, 3) or not all(type(side) is int and side > 0 for side in shape):
        raise ValueError(f"has shape {shape}; a sample is [C, H, W] or [D]")
    if math.prod(shape) * dtype.itemsize > len(data) - file.tell():
        raise ValueError("is cut short")
    values = np.frombuffer(data, dtype, math.prod(shape), file.tell())
    return checked_array(values.reshape(shape, order="F" if by_columns else "C"))


def checked_array(array: np.ndarray) -> np.ndarray:
    """Floats [C, H, W] or [D] as float32; ValueError for values that are not finite."""
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
        raise ValueError("holds values that are not finite in float32")
    return array
