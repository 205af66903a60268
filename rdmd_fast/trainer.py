"""The whole training run, top to bottom."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

import torch

from .errors import InputError, of_the_machine
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
    except (OSError, MemoryError, RuntimeError) as error:
        # Memory that a network or a batch asks for, and a path that the system will have none of, are input as well.
        if isinstance(error, OSError) and error.filename is None:
            raise
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        line = of_the_machine(MemoryError(str(error)) if isinstance(error, RuntimeError) else error)
        print(f"error: {line}", file=sys.stderr, flush=True)
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
        except OSError as error:
            message = f"{error.filename}: cannot be written ({error.strerror}), free some space or change run_dir"
    message = world.broadcast(message)
    if message is not None:
        raise InputError(message)


def run(config, resume: str, world, run_dir: Path, stop) -> int:
    """One stage in a run folder that this job holds; returns the exit status."""
    training = Training(config, world, run_dir, stop)
    if training.bring_back(resume):
        return EXIT_DONE
    stopped = training.train()
    return training.leave(stopped)


class Training:
    """A stage, its telemetry, and what happens at intervals. Every method is a collective call."""

    def __init__(self, config, world, run_dir: Path, stop):
        from .experiment import build_experiment
        from .telemetry import Telemetry

        self.config, self.world, self.run_dir, self.stop = config, world, run_dir, stop
        self.plain_config = config.model_dump(mode="json")
        self.step, self.total = 0, config.train.steps  # finished iterations, of all
        self.telemetry = Telemetry(config.telemetry, world, run_dir, self.total, config.train.global_batch_size)
        self.experiment = build_experiment(config, world, self.telemetry)
        self.stage, self.state = self.experiment.stage, self.experiment.state

    def bring_back(self, resume: str) -> bool:
        """Go to the checkpoint that ``resume`` means and open the run folder; True if the run had ended already."""
        from .checkpoint import find_checkpoint, load_checkpoint, set_aside_newer
        from .config import dump_config
        from .runtime import write_atomically

        found: list[Path | None] = []
        on_main(self.world, lambda: found.append(find_checkpoint(self.run_dir, resume, self.telemetry.say)))
        checkpoint = self.world.broadcast(found[0] if found else None)
        if checkpoint:
            manifest, tensors = load_checkpoint(checkpoint, self.state, self.plain_config, self.world)
            self.step = manifest["step"]
            self.stage.load_counters(self.state.counters)
            self.telemetry.load_state(tensors)
            self.telemetry.say(f"resumed {checkpoint} at step {self.step}")
        if checkpoint and self.step >= self.total and (self.run_dir / "export").exists():
            self.telemetry.say(f"nothing to do: {self.run_dir} has reached train.steps = {self.total}")
            return True
        kept = self.step if checkpoint else -1
        self.telemetry.cut_back(kept)
        on_main(self.world, lambda: set_aside_newer(self.run_dir, kept))
        on_main(self.world, lambda: write_atomically(self.run_dir / "config.yaml", dump_config(self.config)))
        self.telemetry.start(self.step)
        return False

    def train(self) -> bool:
        """Iterate to the end; True if a signal came first."""
        from .distributed import loss_scaling_metrics, set_learning_rate

        options, engines = self.config, self.state.engines
        stopped = self.stopping()
        while not stopped and self.stage.warm_up():
            stopped = self.stopping()
        while not stopped and self.step < self.total:
            self.telemetry.begin_iteration(self.step)
            rates = {
                f"lr/{name}": set_learning_rate(engine, self.experiment.optimizers[name], self.step, self.total)
                for name, engine in engines.items()
            }
            self.stage.iteration(self.step)
            self.state.ema.update(self.step)
            self.telemetry.end_iteration(self.step, rates | loss_scaling_metrics(engines))
            self.step += 1
            if self.due(options.telemetry.sample_every):
                self.look(f"step_{self.step:08d}.png", self.state.ema.gather())
            if self.due(options.validation.every):
                self.validate(self.state.ema.gather())
            if self.due(options.checkpoint.every):
                self.save()
            stopped = self.stopping()
        return stopped and self.step < self.total

    def leave(self, stopped: bool) -> int:
        """Save; at the end of the run also validate, export and draw. Returns the exit status."""
        self.save()
        if stopped:
            name = self.stop.requested.name if self.stop.requested else "a signal to another rank"
            self.telemetry.say(f"stopped by {name} at step {self.step}, state saved")
        else:
            weights = self.state.ema.gather()
            self.validate(weights)
            self.export(weights, "export")
            self.look("final.png", weights)
            picture = self.run_dir / "samples/final.png"
            self.telemetry.say(f"done: {self.run_dir}/export" + (f", picture {picture}" if picture.exists() else ""))
        self.telemetry.close()
        return EXIT_STOPPED if stopped else EXIT_DONE

    # ---- at intervals ----------------------------------------------------------------------------------------------

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0 and self.step < self.total

    def stopping(self) -> bool:
        return self.world.any(self.stop.requested is not None)

    def save(self) -> None:
        from .checkpoint import save_checkpoint

        self.state.counters |= self.stage.counters()
        tensors, keep = self.telemetry.state(), self.config.checkpoint.keep
        save_checkpoint(self.run_dir, self.step, self.state, tensors, self.plain_config, self.world, keep)

    def look(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        self.experiment.picture(weights, self.run_dir / "samples" / name)

    def export(self, weights: dict[str, torch.Tensor], name: str) -> None:
        from .networks.exported import write_export

        config = self.experiment.export.model_copy(update={"step": self.step})
        on_main(self.world, lambda: write_export(self.run_dir / name, config, weights))

    def validate(self, weights: dict[str, torch.Tensor]) -> None:
        """Metrics on held-out data; the best weights so far go to RUN/best."""
        if not self.experiment.measure:
            return
        improved = []
        on_main(self.world, lambda: improved.append(self._measure(weights)))
        if self.world.broadcast(improved[0] if improved else None):
            self.export(weights, "best")

    def _measure(self, weights: dict[str, torch.Tensor]) -> bool:
        values = self.experiment.measure(weights)
        self.telemetry.write({"step": self.step, "validation": values})
        listing = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.telemetry.say(f"step {self.step}/{self.total}  {listing}")
        best_by = self.experiment.best_by
        if best_by is None:
            return False
        if best_by not in values:
            raise InputError(f"validation.best_by: no metric {best_by!r}, one of {', '.join(values)}")
        improved = values[best_by] < self.state.counters.get("best", float("inf"))
        if improved:
            self.state.counters["best"] = values[best_by]
        return improved
