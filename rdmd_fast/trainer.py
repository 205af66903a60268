"""The whole training run, top to bottom."""

import argparse
import contextlib
import math
import os
import sys
from functools import partial
from pathlib import Path

import torch

from rdmd_fast.errors import EXIT_DONE, EXIT_STOPPED, InputError, WriteError
from rdmd_fast.processes.entry import system_input_error
from rdmd_fast.processes.failures import end_on_bad_input
from rdmd_fast.processes.launchers import adopt_launcher, restarts_left
from rdmd_fast.processes.run_lock import run_lock
from rdmd_fast.processes.signals import StopSignal
from rdmd_fast.processes.world import on_all_ranks, on_main

EPILOG = """examples:
  deepspeed --num_gpus 8 rdmd_fast/train.py --config configs/digits/teacher_3.yaml
  deepspeed rdmd_fast/train.py --config configs/digits/rdmd_2to3.yaml rdmd.transport_weight=0.2 run_dir=runs/l02
  python rdmd_fast/train.py --config configs/toy/gaussian_to_8gaussians.yaml --dry-run
  python rdmd_fast/train.py --config configs/digits/rdmd_2to3.yaml --profile

exit status: 0 done, 1 broken (the first error printed is the cause), 2 bad input, 75 stopped by a signal after
saving; the same command goes on from there. See docs/signals.md.
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
    parser.add_argument("--dry-run", action="store_true", help="print config, memory, disk, traffic; train nothing")
    parser.add_argument("--ranks", type=int, metavar="N", help="--dry-run: predict for N GPUs (those of the launcher)")
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="--dry-run: of a GPU; exit status 2 if it is too little (this one)",
    )
    parser.add_argument("--time-iterations", type=int, default=0, metavar="N", help="--dry-run: time N iterations (0)")
    parser.add_argument(
        "--profile", type=int, nargs="?", const=5, metavar="N", help="trace N steady iterations (5); train nothing"
    )
    parser.add_argument("--options", action="store_true", help="list every config key with default and meaning")
    # The deepspeed launcher passes the first, torch.distributed.launch the second.
    parser.add_argument("--local_rank", "--local-rank", metavar="N", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None, stop: StopSignal | None = None) -> int:
    """The command; ``stop`` has signals in hand already, if given."""
    arguments = parse_arguments(argv)
    if stop and (arguments.options or arguments.dry_run or arguments.profile is not None):
        stop.release()
    try:
        if arguments.options:
            return print_options()
        if arguments.local_rank is not None:
            os.environ.setdefault("LOCAL_RANK", arguments.local_rank)
        adopt_launcher()
        from rdmd_fast.config import load_config

        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            from rdmd_fast.planning.dry_run import dry_run

            return dry_run(config, arguments.ranks, arguments.time_iterations, arguments.gpu_memory)
        if arguments.ranks or arguments.time_iterations or arguments.gpu_memory:
            raise InputError(
                "--ranks, --time-iterations, --gpu-memory: are options of --dry-run, add it or leave them out"
            )
        if arguments.profile is not None:
            from rdmd_fast.planning.profiling import profile

            return profile(config, arguments.profile)
        return train(config, arguments.resume, stop)
    except InputError as error:
        return end_on_bad_input(error)
    except (OSError, MemoryError, RuntimeError, UnicodeEncodeError) as error:
        # Memory that a network or a batch asks for, and a path that the system will have none of, are input as well.
        lacks_memory = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        bad_input = system_input_error(MemoryError(str(error)) if lacks_memory else error)
        if bad_input is None:
            raise
        return end_on_bad_input(bad_input)


def print_options() -> int:
    from rdmd_fast.config import option_table

    for key, default, description in option_table():
        print(f"{key}{f' = {default}' if default else ''}\n    {description}")
    return EXIT_DONE


def train(config, resume: str, stop: StopSignal | None = None) -> int:
    """Run one stage to its end, a signal or bad input; returns the exit status."""
    from rdmd_fast.data.sample_names import refuse_inside
    from rdmd_fast.processes.shared_folder import check_shared
    from rdmd_fast.processes.world import join_world

    run_dir = Path(config.run_dir)
    refuse_inside(run_dir, "run_dir", config.data.named_paths())
    with contextlib.ExitStack() as held:
        stop = stop or held.enter_context(StopSignal())
        world = join_world(config.train.collective_timeout)
        on_main(world, lambda: held.enter_context(run_lock(run_dir)))
        check_shared(world, run_dir)
        status = run(config, resume, world, run_dir, stop)
        world.barrier()
    return status


def run(config, resume: str, world, run_dir: Path, stop) -> int:
    """One stage in a run folder that this job holds; returns the exit status."""
    training = Training(config, world, run_dir, stop)
    with contextlib.closing(training.experiment):
        if training.resume(resume):
            return EXIT_DONE
        stopped = training.train()
        return training.finish(stopped)


class Training:
    """A stage, its telemetry, and what happens at intervals. Every method is a collective call."""

    def __init__(self, config, world, run_dir: Path, stop):
        from rdmd_fast.engine.update_guard import Guards
        from rdmd_fast.experiment import build_experiment
        from rdmd_fast.monitoring.telemetry import Telemetry
        from rdmd_fast.processes.launchers import busy_cores

        self.config, self.world, self.run_dir, self.stop = config, world, run_dir, stop
        self.plain_config = config.model_dump(mode="json")
        self.step, self.total = 0, config.train.steps  # finished iterations, of all
        self.saved: int | None = None  # at which step last
        self.measured: tuple[dict[str, float], int | None] = {}, None  # the last validation, and its step
        self.telemetry = Telemetry(config.telemetry, world, run_dir, self.total, config.train.global_batch_size)
        if world.device.type == "cpu" and (warning := busy_cores()):
            self.telemetry.say(warning)
        self.experiment = build_experiment(config, world, self.telemetry)
        self.stage, self.state = self.experiment.stage, self.experiment.state
        self.guards = Guards(self.state.engines)
        self.telemetry.at_log.append(self.guards.metrics)

    def train(self) -> bool:
        """Iterate to the end; True if a signal came first."""
        experiment, options = self.experiment, self.config
        stopped = self.stopping()
        while not stopped and self.stage.warm_up():
            stopped = self.stopping()
        while not stopped and self.step < self.total:
            self.telemetry.begin_iteration(self.step)
            rates = experiment.set_learning_rates(self.step, self.total)
            experiment.update_networks(self.step)  # on fresh data: the generator once, the fake score some times
            experiment.update_ema(self.step)
            self.log(rates)
            self.step += 1
            pictures, validation = self.due(options.telemetry.sample_every), self.due(options.validation.every)
            weights = experiment.averaged() if pictures or validation else None
            if pictures:
                self.draw_samples(f"step_{self.step:08d}.png", weights)
            if validation:
                self.validate(weights)
            if self.due(options.checkpoint.every):
                self.tolerate_write_failure(self.save_checkpoint, counter="failed_checkpoints")
            stopped = self.stopping()
        return stopped and self.step < self.total

    # -- before and after ----------------------------------------------------------------------------------------------

    def resume(self, resume: str) -> bool:
        """Go to the checkpoint that ``resume`` means and open the run folder; True if the run had ended already."""
        from rdmd_fast.checkpoints.checkpoint import find_checkpoint, load_checkpoint
        from rdmd_fast.checkpoints.manifest import clear_leftovers, read_manifest, set_aside_newer
        from rdmd_fast.config import check_compatible, dump_config
        from rdmd_fast.files import write_atomically

        world, run_dir, say = self.world, self.run_dir, self.telemetry.say
        on_main(world, lambda: clear_leftovers(run_dir / "checkpoints"))
        checkpoint = find_checkpoint(run_dir, resume, world, say)
        if checkpoint:
            manifest = read_manifest(checkpoint)
            check_compatible(checkpoint, manifest, self.plain_config, self.experiment.made_of)
            tensors = load_checkpoint(checkpoint, manifest, self.state, world)
            self.step = manifest["step"]
            self.stage.load_counters(self.state.counters)
            if checkpoint.parent.parent.resolve() != run_dir.resolve():
                self.state.counters.pop("best", None)  # of another run, whose RUN/best is not here
            self.telemetry.load_state(tensors)
            self.guards.load_state(tensors)
            say(f"resumed {checkpoint} at step {self.step}")
            self.tell_of_moved_rates(manifest["config"]["train"]["steps"])
        if checkpoint and self.step >= self.total and on_main(world, self.exported):
            say(f"nothing to do: {run_dir} has reached train.steps = {self.total}")
            return True
        began = self.step if checkpoint else -1
        on_main(world, lambda: self.telemetry.drop_lines_after(began, ended=self.step >= self.total))
        aside = on_main(world, lambda: set_aside_newer(run_dir, began))
        if aside:
            say(f"later checkpoints are now in {aside}")
        on_main(world, lambda: write_atomically(run_dir / "config.yaml", dump_config(self.config)))
        on_all_ranks(world, lambda: self.telemetry.start(self.step, anew=not checkpoint))
        return False

    def tell_of_moved_rates(self, total: int) -> None:
        """Say which learning rates leave the course they had with ``total`` steps, the one option that may change."""
        if self.step >= self.total:
            return
        rates = self.experiment.set_learning_rates  # at each iteration they are set anew
        last, expected = dict(rates(max(self.step - 1, 0), total)), dict(rates(self.step, total))
        for name, rate in rates(self.step, self.total).items():
            if not math.isclose(rate, expected[name]):
                self.telemetry.say(
                    f"warning: {name} goes on at {rate:.3g} from {last[name]:.3g} at step {self.step}: train.steps is "
                    f"{self.total}, of this checkpoint's run it was {total}"
                )

    def finish(self, stopped: bool) -> int:
        """Save; at the end of the run also validate, export and draw. Returns the exit status."""
        if self.saved != self.step:
            self.save_checkpoint()
        if stopped:
            name = self.stop.requested.name if self.stop.requested else "a request to another rank"
            self.telemetry.say(f"stopped by {name} at step {self.step}, state saved")
            if restarts_left():
                self.telemetry.say(
                    f"torchrun starts the ranks again ({restarts_left()} of its --max-restarts are left), unless it "
                    "was signalled itself: docs/signals.md"
                )
        else:
            weights = self.experiment.averaged()
            self.validate(weights)
            self.draw_samples("final.png", weights)
            self.export(weights, "export")  # last: a run that has it at its last step is done
            picture = self.run_dir / "samples/final.png"
            self.telemetry.say(f"done: {self.run_dir}/export" + (f", picture {picture}" if picture.exists() else ""))
        self.telemetry.close()
        return EXIT_STOPPED if stopped else EXIT_DONE

    def stopping(self) -> bool:
        return self.world.any(self.stop.requested is not None)

    # -- at intervals --------------------------------------------------------------------------------------------------

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0 and self.step < self.total

    def log(self, rates: dict[str, float]) -> None:
        """End the iteration for telemetry, which writes a line of metrics if one is due."""
        from rdmd_fast.engine.engine import loss_scaling_metrics

        failed = {key: count for key, count in self.state.counters.items() if key == "failed_checkpoints"}
        metrics = rates | loss_scaling_metrics(self.state.engines) | failed
        self.tolerate_write_failure(lambda: self.telemetry.end_iteration(self.step, metrics))

    def tolerate_write_failure(self, action, counter: str | None = None) -> None:
        """Run a collective ``action`` that writes; if it cannot, checkpoint.on_failure says whether the run goes on.

        Args:
            counter: counts failures, in ``state.counters`` and the metrics.
        """
        try:
            action()
        except WriteError as error:
            if self.config.checkpoint.on_failure == "stop":
                raise
            if counter:
                self.state.counters[counter] = self.state.counters.get(counter, 0) + 1
            self.telemetry.say(f"warning: {error}; training goes on without it")

    def draw_samples(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        """Draw RUN/samples/NAME from the averaged weights."""
        path = self.run_dir / "samples" / name
        picture = partial(self.experiment.picture, weights, path)
        self.tolerate_write_failure(lambda: on_all_ranks(self.world, picture, f"picture {path}"))

    def validate(self, weights: dict[str, torch.Tensor]) -> None:
        """Measure the averaged weights on held-out data; the best so far go to RUN/best."""
        if self.experiment.measure:
            self.tolerate_write_failure(lambda: self._keep_if_best(weights))

    def _keep_if_best(self, weights: dict[str, torch.Tensor]) -> None:
        best = on_main(self.world, lambda: self._measure(weights))
        if best is not None:
            self.export(weights, "best")
            self.state.counters["best"] = best

    def _measure(self, weights: dict[str, torch.Tensor]) -> float | None:
        """Write the metrics; returns that of validation.best_by if it is the best so far."""
        values = self.experiment.measure(weights)
        self.telemetry.write({"step": self.step, "validation": values})
        self.measured = values, self.step
        listing = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.telemetry.say(f"step {self.step}/{self.total}  {listing}")
        best_by = self.experiment.best_by
        if best_by is None:
            return None
        if best_by not in values:
            raise InputError(f"validation.best_by: no metric {best_by!r}, one of {', '.join(values)}")
        return values[best_by] if values[best_by] < self.state.counters.get("best", float("inf")) else None

    def save_checkpoint(self) -> None:
        from rdmd_fast.checkpoints.checkpoint import save_checkpoint

        self.guards.before_save(self.world)
        self.state.counters |= self.stage.counters()
        on_main(self.world, self.telemetry.flush)
        tensors = self.telemetry.state() | self.guards.state()
        save_checkpoint(
            self.run_dir, self.step, self.state, tensors, self.plain_config, self.experiment.made_of, self.world,
            self.config.checkpoint,
        )  # fmt: skip
        self.saved = self.step

    def exported(self) -> bool:
        """Whether RUN/export is of this step: the run has been here, to its very end."""
        from rdmd_fast.model_files.export_format import read_export_config

        try:
            return read_export_config(self.run_dir / "export", self.experiment.export.role).step == self.step
        except InputError:
            return False

    def export(self, weights: dict[str, torch.Tensor], name: str) -> None:
        """Write the averaged weights to RUN/NAME, with their model card."""
        from rdmd_fast.model_files.export_format import write_export
        from rdmd_fast.model_files.model_card import Run, model_card

        config = self.experiment.export.model_copy(update={"step": self.step})
        folder = self.run_dir / name

        def write() -> None:
            write_export(folder, config, weights, model_card(config, Run(self.plain_config, *self.measured)))

        on_main(self.world, write, f"export {folder}")
