"""train.deterministic: a run on GPUs that gives the same bits each time it is run on as many of the same kind.

Without it cuDNN chooses convolutions by trial and may add in any order, as backward passes of attention do. With it
PyTorch (notes/randomness) takes what adds in one order, or refuses an operation that has no such form. CPUs give the
same bits either way.
"""

import os

import torch


def make_deterministic() -> None:
    """For this process, before it has used the GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one workspace: cuBLAS splits sums the same way
    torch.use_deterministic_algorithms(True)  # flash and memory-efficient attention then add in one order
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what nobody wrote
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass has no such form
    from torch._inductor import config

    config.deterministic = True  # choose kernels by rule, not by timing them
