"""Bytes that --dry-run predicts for an iteration of a small distillation, and the stand-in allocator's peak, as JSON.

python -m tests.gpu_stand_in.memory --stage 0 --dtype bf16
"""

from __future__ import annotations

import argparse
import json
import warnings

from tests.gpu_stand_in import install


def compare(stage: int, dtype: str) -> dict[str, float]:
    from benchmarks.memory import Case, planned, predict, run
    from rdmd_fast.networks.options import SongUNetOptions
    from rdmd_fast.planning.activations import activations

    options = SongUNetOptions(
        kind="song_unet", model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8], dropout=0.0
    )
    case, layout = Case("SongUNet 16²", options, (3, 16, 16), 4), {"stage": stage}
    networks = planned(case)
    used = activations(networks, case.micro_batch, 1, dtype, False, fused=True)
    parts = predict(networks, used, layout, 1, dtype)
    return {**parts, "measured": run(case, layout, dtype, False, iterations=1)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="memory")
    parser.add_argument("--stage", type=int, choices=range(4), default=0, help="ZeRO stage (0)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16", help="(bf16)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    install()
    print(json.dumps(compare(arguments.stage, arguments.dtype)))


if __name__ == "__main__":
    main()
