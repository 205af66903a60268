"""Options of training that the engine reads: optimizer, batch, precision, ZeRO."""

from typing import Annotated, Literal

import torch
from pydantic import Field

from rdmd_fast.engine.update_guard import GuardOptions
from rdmd_fast.options import Options

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class OptimizerOptions(Options):
    """Adam for one engine."""

    lr: float = Field(
        1e-4,
        gt=0,
        le=100,
        description="learning rate (ours; EDM trains at 2e-4 to 1e-3, DMD2 distils at 2e-6 to 5e-5)",
    )
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="Adam's moments (EDM)"
    )
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon (EDM)")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay; 0 is plain Adam (EDM)")
    grad_clip: float = Field(
        0.0,
        ge=0,
        description="global gradient norm is cut to this, 0 for never; it grows with the sample's size (ours)",
    )
    warmup: int = Field(0, ge=0, description="updates over which the learning rate rises from 0 (ours)")
    decay: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="course of the learning rate to 0 at train.steps (EDM: constant)"
    )


class TrainOptions(Options):
    """Length, batch and precision."""

    steps: int = Field(10_000, ge=0, description="iterations: generator updates (rdmd) or teacher updates (ours)")
    global_batch_size: int = Field(
        64, ge=1, le=2**24, description="samples an update averages over, all ranks together (ours)"
    )
    micro_batch_size: int | None = Field(
        None, ge=1, description="samples a rank holds at once; unset: global_batch_size / ranks (ours)"
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="dtype of weights and activations; masters are fp32. fp16, with dynamic loss scaling, is for GPUs "
        "without bf16 (ours)",
    )
    activation_checkpointing: bool = Field(
        False,
        description="compute activations inside blocks again in the backward pass instead of keeping them: about a "
        "third more FLOPs, far less memory, the same result up to rounding (ours)",
    )
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = Field(
        None,
        description="torch.compile of the networks, its mode; reduce-overhead and max-autotune replay passes as CUDA "
        "graphs on a GPU; null runs them as written. Below ZeRO 3 (ours)",
    )
    cuda_graphs: bool = Field(
        False,
        description="record the networks' passes over a micro-batch as CUDA graphs and replay them, without "
        "torch.compile: a few launches instead of hundreds, for activations that stay in memory. On a GPU, below ZeRO "
        "3; not yet measured (ours)",
    )
    tf32: bool = Field(
        True,
        description="matrix products and convolutions of fp32 on a GPU round their factors to TF32's 11 bits, several "
        "times as fast; bf16, which most train in, has 8. false: fp32 throughout. PyTorch has convolutions alone do it "
        "(DMD2: true; EDM: false)",
    )
    cudnn_benchmark: bool | None = Field(
        None,
        description="cuDNN times its algorithms at each convolution's first call and takes the fastest, which may be "
        "another in the next run, with other last bits. Unset: true unless train.deterministic (EDM: true)",
    )
    deterministic: bool = Field(
        False,
        description="the same bits from run to run on GPUs too, so that a resumed run ends as one never stopped: "
        "algorithms that add in one order, none chosen by timing; CPUs have that anyway (ours)",
    )
    guard: GuardOptions = Field(default_factory=GuardOptions)
    collective_timeout: float = Field(
        1800.0,
        gt=0,
        description="seconds that a rank waits for the others before the job ends; must exceed what the main rank does "
        "alone, such as validation and pictures (ours)",
    )

    @property
    def times_convolutions(self) -> bool:
        """Whether cuDNN chooses by timing."""
        return not self.deterministic if self.cudnn_benchmark is None else self.cudnn_benchmark


# DeepSpeed allocates its bucket whole, 5e8 elements unless told: more than most networks here and all their optimizers.
LARGEST_BUCKET = 50_000_000


def reduce_bucket_size(deepspeed_section: dict, parameters: int) -> int:
    """Elements of the buffer in which an engine of so many parameters reduces gradients at ZeRO 1 to 3."""
    zero = deepspeed_section.get("zero_optimization", {})
    return zero.get("reduce_bucket_size", min(LARGEST_BUCKET, parameters))


def zero_stage(deepspeed_section: dict) -> int:
    return deepspeed_section.get("zero_optimization", {}).get("stage", 0)
