"""The whole training run, top to bottom."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

import torch

from .errors import InputError
from .runtime import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED

EPILOG = """examples:
  deepspeed --num_gpus 8 rdmd_fast/train.py --config configs/digits/teacher_3.yaml
  deepspeed rdmd_fast/train.py --config configs/digits/rdmd_2to3.yaml rdmd.transport_weight=0.2 run_dir=runs/l02
  python rdmd_fast/train.py --config configs/toy/gaussian_to_8gaussians.yaml --dry-run

exit status: 0 done, 2 bad input, 75 stopped by a signal after saving; the same command goes on from there.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a teacher or distil it into a one-step translator.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required="--options" not in (argv or sys.argv), help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override of a config key, value in YAML")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="checkpoint to go on from (auto)")
    parser.add_argument("--dry-run", action="store_true", help="print config, parameters and memory, train nothing")
    parser.add_argument("--options", action="store_true", help="list every config key with default and meaning")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        if arguments.options:
            return print_options()
        from .config import load_config

        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            from .dry_run import dry_run

            return dry_run(config)
        return train(config, arguments.resume)
    except InputError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT


def print_options() -> int:
    from .config import option_table

    for key, default, description in option_table():
        print(f"{key}{f' = {default}' if default else ''}\n    {description}")
    return EXIT_DONE


def train(config, resume: str) -> int:
    """Run one stage to its end, a signal or bad input; returns the exit status."""
    from .distributed import join_world
    from .runtime import StopSignal, run_lock

    run_dir = Path(config.run_dir)
    with contextlib.ExitStack() as held:
        stop = held.enter_context(StopSignal())
        world = join_world()
        on_main(world, lambda: held.enter_context(run_lock(run_dir)))
        status = run(config, resume, world, run_dir, stop)
        world.barrier()
    return status


def on_main(world, action):
    """Run ``action`` on the main rank; its InputError is raised on every rank, so that none waits for it."""
    message = None
    if world.is_main:
        try:
            action()
        except InputError as error:
            message = str(error)
    message = world.broadcast(message)
    if message is not None:
        raise InputError(message)


def run(config, resume: str, world, run_dir: Path, stop) -> int:
    from .checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
    from .config import dump_config
    from .distributed import set_learning_rate
    from .experiment import build_experiment
    from .networks.exported import write_export
    from .runtime import write_atomically
    from .telemetry import Telemetry

    plain_config = config.model_dump(mode="json")
    total, options = config.train.steps, config.telemetry

    # ---- build, or bring back ------------------------------------------------------------------------------------
    found: list[Path | None] = [None]
    on_main(world, lambda: found.__setitem__(0, find_checkpoint(run_dir, resume)))
    checkpoint = world.broadcast(str(found[0]) if found[0] else None)
    telemetry = Telemetry(options, world, run_dir, total, config.train.global_batch_size)
    experiment = build_experiment(config, world, telemetry)
    stage, state = experiment.stage, experiment.state
    step = 0
    if checkpoint:
        manifest, tensors = load_checkpoint(Path(checkpoint), state, plain_config, world)
        step = manifest["step"]
        stage.load_counters(state.counters)
        telemetry.load_state(tensors)
        telemetry.say(f"resumed {checkpoint} at step {step}")
    if step >= total and (run_dir / "export").exists():
        telemetry.say(f"nothing to do: {run_dir} has reached train.steps = {total}; raise it, or --resume never")
        return EXIT_DONE
    telemetry.cut_back(step if checkpoint else -1)
    on_main(world, lambda: write_atomically(run_dir / "config.yaml", dump_config(config)))

    # ---- what happens at intervals, each a collective call ---------------------------------------------------------
    def save() -> None:
        state.counters |= stage.counters()
        save_checkpoint(run_dir, step, state, telemetry.state(), plain_config, world, config.checkpoint.keep)

    def export(weights: dict[str, torch.Tensor], name: str) -> None:
        if world.is_main:
            write_export(run_dir / name, experiment.export.model_copy(update={"step": step}), weights)

    def validate(weights: dict[str, torch.Tensor]) -> None:
        if world.is_main and experiment.measure:
            values = experiment.measure(weights)
            telemetry.write({"step": step, "validation": values})
            telemetry.say(f"step {step}/{total}  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))
            score = values.get(experiment.best_by)
            if score is None:
                raise InputError(f"validation.best_by: no metric {experiment.best_by!r}, one of {', '.join(values)}")
            if score < state.counters.get("best", float("inf")):
                state.counters["best"] = score
                export(weights, "best")

    def look(name: str, weights: dict[str, torch.Tensor] | None = None) -> None:
        experiment.picture(weights or state.ema.gather(), run_dir / "samples" / name)

    def due(every: int) -> bool:
        return every > 0 and step % every == 0 and step < total

    def stopping() -> bool:
        return world.any(stop.requested is not None)

    # ---- train -----------------------------------------------------------------------------------------------------
    telemetry.start(step)
    stopped = stopping()
    while not stopped and stage.warm_up():
        stopped = stopping()
    while not stopped and step < total:
        telemetry.begin_iteration(step)
        rates = {
            f"lr/{name}": set_learning_rate(engine, experiment.optimizers[name], step, total)
            for name, engine in state.engines.items()
        }
        stage.iteration(step)
        state.ema.update(step)
        line = telemetry.end_iteration(step, rates)
        step += 1
        if line:
            telemetry.announce(line)
        if due(options.sample_every):
            look(f"step_{step:08d}.png")
        if due(config.validation.every):
            gathered = state.ema.gather()
            on_main(world, lambda weights=gathered: validate(weights))
        if due(config.checkpoint.every):
            save()
        stopped = stopping()

    # ---- leave -----------------------------------------------------------------------------------------------------
    save()
    if stopped and step < total:
        telemetry.say(
            f"stopped by {stop.requested.name if stop.requested else 'another rank'} at step {step}, state saved"
        )
        telemetry.close()
        return EXIT_STOPPED
    weights = state.ema.gather()
    on_main(world, lambda: validate(weights))
    on_main(world, lambda: export(weights, "export"))
    look("final.png", weights)
    telemetry.close()
    telemetry.say(f"done: {run_dir}/export, picture {run_dir}/samples/final.png")
    return EXIT_DONE
