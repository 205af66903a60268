"""train.tf32 and train.cudnn_benchmark: how a GPU computes matrix products and convolutions. CPUs heed neither.

TF32 rounds the factors of fp32 products to 11 significant bits, bf16 keeps 8; sums stay fp32. The same bits come out
each time, so train.deterministic goes with it. Choosing convolutions by timing them does not: a resumed run may choose
others.
"""

import warnings

import torch

from rdmd_fast.engine.determinism import make_deterministic
from rdmd_fast.engine.options import TrainOptions


def set_arithmetic(train: TrainOptions) -> None:
    """Apply ``train`` to this process, before it has used the GPU."""
    allow_tf32(train.tf32, train.tf32)
    torch.backends.cudnn.benchmark = train.times_convolutions
    if train.deterministic:
        make_deterministic()


def allow_tf32(products: bool, convolutions: bool) -> None:
    """Let matrix products and convolutions of fp32 round their factors to TF32, or not.

    PyTorch has an older and a newer setting, refuses to read the older one where they disagree, and Inductor 2.13 reads
    both. The older one goes first: setting it resets the newer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions call the older one deprecated
        torch.backends.cuda.matmul.allow_tf32 = products  # sets the newer one, too
        torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cudnn.fp32_precision = "tf32" if convolutions else "ieee"


def tf32_allowed() -> tuple[bool, bool]:
    """(of matrix products, of convolutions); PyTorch begins with convolutions alone."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    return tuple(backend.fp32_precision == "tf32" for backend in backends)
