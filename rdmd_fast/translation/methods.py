"""What translates a batch: a generator in one pass; ``rdmd baseline`` has others."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from rdmd_fast.engine.options import DTYPES

Translate = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, str]]
"""``translate(x, numbers)`` of float32 [N, C, H, W] in data units, on the device of the networks, and int64 [N] on the
CPU: which samples of the folder they are, so that noise can be theirs in any batch. Returns float32 [N, C, H, W] in
data units, and what a sample took, for the command's last line ("" for nothing to say)."""


class Method(Protocol):
    """Small enough to be sent to other processes, which load the networks themselves."""

    def load(self, device: torch.device) -> Translate:
        """Its networks on ``device``; InputError where they are not there or do not fit."""

    def not_finite(self, name: str) -> str:
        """The message for a translation of the sample ``name`` that is not finite."""


class OneStep(NamedTuple):
    """A trained generator.

    Attributes:
        model: folder of its export.
        dtype: it computes in, a key of ``DTYPES``.
        transport_weight: λ for a generator of a range of them, None for its middle.
    """

    model: str
    dtype: str = "fp32"
    transport_weight: float | None = None

    def load(self, device: torch.device) -> Translate:
        from rdmd_fast.model_files.models import load_generator

        generator = load_generator(self.model).to(device=device, dtype=DTYPES[self.dtype])
        return lambda x, numbers: (generator(x, self.transport_weight), "")

    def not_finite(self, name: str) -> str:
        others = {"fp16": "bf16 or fp32", "bf16": "fp32"}.get(self.dtype)
        remedy = f"lower precision may overflow: --dtype {others}" if others else "take the sample out"
        return f"--model {self.model}: the translation of {name} is not finite; {remedy}"
