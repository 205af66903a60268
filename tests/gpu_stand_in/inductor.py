"""Has torch.compile make kernels for the stand-in as it does for an H200; they go by way of our Triton driver.

Nothing is timed: where Inductor would try several configurations of a kernel on the device, a rule of its own decides.
"""

from __future__ import annotations

import functools
import os

import torch

from rdmd_fast.kernels._dispatch import source_digest
from tests.gpu_stand_in import build
from tests.gpu_stand_in.recordings import recordings


def install() -> None:
    """Prepare Inductor when something is compiled first: its import takes seconds."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(build.CACHE / "inductor"))
    torch.compiler.config.cache_key_tag = source_digest()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # other processes would have no stand-in
    compile_ = torch.compile

    @functools.wraps(compile_)
    def prepare_and_compile(*arguments, **options):
        _prepare()
        return compile_(*arguments, **options)

    torch.compile = prepare_and_compile


@functools.cache
def _prepare() -> None:
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import compile_fx, config
    from torch._inductor.runtime import benchmarking, triton_heuristics

    CudaInterface.get_raw_stream = staticmethod(torch._C._cuda_getCurrentRawStream)
    torch._C._dynamo.guards._empty_strided_cuda = functools.partial(_empty_strided, device="cuda")
    compile_fx.cudagraphify = recordings.cudagraphify
    config.triton.cudagraph_or_error = True  # a pass that could not be recorded would only run slowly
    config.shape_padding = False  # of matrix products, which is decided by timing
    triton_heuristics.check_autotune_cache = _choose_configuration
    benchmarking.benchmarker.benchmark = benchmarking.benchmarker.benchmark_gpu = _refuse_to_time


def _choose_configuration(configs, file, about):
    """By the rule that Inductor itself has for when it may not time them."""
    from torch._inductor.runtime.triton_heuristics import filter_reduction_configs_for_determinism

    return filter_reduction_configs_for_determinism({**about, "deterministic": True}, configs), None, {}


def _empty_strided(size, stride, dtype, device) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def _refuse_to_time(*_, **__):
    raise NotImplementedError("there are no times to measure on the stand-in")
