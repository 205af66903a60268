"""From the bytes of a .npy file, whoever wrote it, to its array."""

import io
import math
import tokenize
import warnings

import numpy as np
from numpy.lib import format as npy

warnings.filterwarnings("ignore", message="Reading `.npy`")  # by Python 2: read without a word, or refused


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
    except (RecursionError, MemoryError, SyntaxError, tokenize.TokenError):  # what Python's parser says of it
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
