"""One iteration of training on the stand-in: its waits, copies and launches by place, as JSON.

    python -m tests.gpu_stand_in.iteration --kind rdmd --stage 0 --dtype bf16 [key=value …]

The network is the digits', at a batch of four; iterations before it have compiled what is compiled once, and have shown
ZeRO-3 the order of modules.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

from tests.gpu_stand_in import install

BATCH, BEFORE = 4, 2
NETWORK = ["model_channels=32", "channel_mult=[1,2]", "num_blocks=1", "attn_resolutions=[4]"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="iteration")
    parser.add_argument("--kind", choices=("rdmd", "teacher"), default="rdmd")
    parser.add_argument("--stage", type=int, choices=range(4), default=0, help="ZeRO stage (0)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument(
        "--before", type=int, default=BEFORE, help=f"iterations before the one that is logged ({BEFORE})"
    )
    parser.add_argument("--config", metavar="FILE", help="of this training, in place of those of --kind")
    parser.add_argument("--lines", action="store_true", help="write each operation at each place to standard error")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args()


def build_config(arguments: argparse.Namespace, folder: Path):
    from benchmarks.step_cases import packed, run_config, sample_shape
    from rdmd_fast.config import load_config

    if arguments.config:
        return load_config(arguments.config, [f"run_dir={folder}/run", *arguments.overrides])
    if arguments.kind == "rdmd":
        return run_config("digits", arguments.dtype, folder, arguments.overrides, BATCH, arguments.stage)
    file = folder / "config.yaml"
    file.write_text("stage: teacher\n")
    options = [
        f"run_dir={folder}/run", f"train.dtype={arguments.dtype}", f"train.global_batch_size={BATCH}",
        "train.steps=1000000000", f"deepspeed.zero_optimization.stage={arguments.stage}",
        "telemetry.tensorboard=false", "telemetry.log_every=1000000", "validation.every=0", "data.flip=true",
        f"data.target={packed(sample_shape('digits'), folder)}", "network.kind=song_unet",
        *(f"network.{option}" for option in NETWORK),
    ]  # fmt: skip
    return load_config(str(file), [*options, *arguments.overrides])


def record(arguments: argparse.Namespace, folder: Path) -> dict:
    """Train some iterations, then one that is logged."""
    import torch

    from benchmarks.step_sides import Ours
    from rdmd_fast.engine.engine import LOSS_SCALING
    from tests.gpu_stand_in.device import recording
    from tests.gpu_stand_in.log import KINDS
    from tests.gpu_stand_in.recordings import recordings

    LOSS_SCALING["initial_scale_power"] = 4  # no update in fp16 overflows
    ours = Ours(build_config(arguments, folder))
    while ours.stage.warm_up():
        pass
    for _ in range(arguments.before):
        ours.iteration()
    recorded_before = recordings.count
    with recording() as log:
        ours.iteration()
    if arguments.lines:
        print(*(f"{kind}: {line}" for kind in KINDS for line in log.lines(kind)), sep="\n", file=sys.stderr)
    norms = {name: float(engine.guard.norm) for name, engine in ours.state.engines.items()}
    result = {"losses": ours.means(), "norms": norms, "peak": torch.cuda.max_memory_allocated()}
    result["recorded"] = {"before": recorded_before, "within": recordings.count - recorded_before}
    ours.experiment.close()
    return result | {kind: log.table(kind) for kind in KINDS}


def main() -> None:
    arguments = parse_arguments()
    warnings.simplefilter("ignore")
    install()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(record(arguments, Path(folder))))


if __name__ == "__main__":
    main()
