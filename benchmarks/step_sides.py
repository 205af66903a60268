"""The sides of an iteration's benchmark, ours and the plain formulation, and a check that they compute the same."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from benchmarks.fastgen_side import FastGen, check_same_networks
from benchmarks.networks import DEVICE, build, tf32
from benchmarks.plain_networks import PlainUNet
from benchmarks.plain_step import PlainRDMD
from benchmarks.step_cases import compile_as, run_config, sample_shape
from rdmd_fast.config import Config
from rdmd_fast.diffusion import DiffusionOptions
from rdmd_fast.engine.fp32_masters import gather_parameters, master_shards
from rdmd_fast.experiment import build_experiment
from rdmd_fast.monitoring.telemetry import Telemetry
from rdmd_fast.networks import build_network
from rdmd_fast.processes.world import join_world

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # relative, of the losses


class Ours:
    """A run of the trainer, iteration by iteration."""

    def __init__(self, config: Config):
        self.config, self.world = config, join_world()
        folder, batch = Path(config.run_dir), config.train.global_batch_size
        self.telemetry = Telemetry(config.telemetry, self.world, folder, config.train.steps, batch)
        self.experiment = build_experiment(config, self.world, self.telemetry)
        self.stage, self.state = self.experiment.stage, self.experiment.state
        self.telemetry.start(0)
        self.step = 0

    def iteration(self) -> None:
        self.telemetry.begin_iteration(self.step)
        rates = self.experiment.set_learning_rates(self.step, self.config.train.steps)
        self.experiment.update_networks(self.step)
        self.experiment.update_ema(self.step)
        self.telemetry.end_iteration(self.step, rates)
        self.step += 1

    def means(self) -> dict[str, float]:
        """Average what was logged since the last call."""
        telemetry = self.telemetry
        means = {name: float(total) / telemetry._counts[name] for name, total in telemetry._sums.items()}
        telemetry._sums.clear(), telemetry._counts.clear()
        return means

    def networks(self) -> dict[str, torch.nn.Module]:
        """Give the networks by name; an exact teacher is none."""
        networks = {name: engine.module for name, engine in self.state.engines.items()}
        teacher = self.stage.teacher
        return networks | ({"teacher": teacher} if isinstance(teacher, torch.nn.Module) else {})

    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """Give state dicts of the trained networks as they are now, in fp32."""
        return {
            name: gather_parameters(engine, [shard.clone() for shard in master_shards(engine)])
            for name, engine in self.state.engines.items()
        }

    def sources(self) -> list[torch.Tensor]:
        """Give eight batches, on the device."""
        batch = self.config.train.global_batch_size
        return [self.stage.source.batch(torch.arange(start, start + batch)) for start in range(0, 8 * batch, batch)]

    def on_device(self) -> list[torch.Tensor]:
        """List parameters, masters, averages: what a GPU run has on the device between iterations."""
        tensors = [*self.state.ema.shards, *(part for part in vars(self.stage).values() if torch.is_tensor(part))]
        for engine in self.state.engines.values():
            tensors += [*engine.module.parameters(), *engine.module.buffers(), *master_shards(engine)]
            tensors += [*engine.guard.state().values(), engine.guard._numbers, engine.guard.norm, engine.guard._skip]
        if isinstance(self.stage.teacher, torch.nn.Module):
            tensors += [*self.stage.teacher.parameters(), *self.stage.teacher.buffers()]
        return tensors


class Plain:
    """The plain formulation.

    Args:
        config: ours.
        weights: state dicts of "generator" and "fake_score"; None for those that the case begins with.
        sources: batches, ready on the device: the plain side pays nothing for data. None makes random ones.
        exact_teacher: denoiser of the toys.
    """

    def __init__(
        self, case: str, config, dtype: str, compiled: str | None = None, weights=None, sources=None, exact_teacher=None
    ):
        config = config.model_copy(update={"train": config.train.model_copy(update={"dtype": dtype})})
        batch, toy, shape = config.train.global_batch_size, case == "toy", sample_shape(case)
        if toy:
            networks = [build_network(config.generator, shape), build_network(config.network, shape)]
        else:
            networks = [build(case) for _ in range(3)]
            networks[2].requires_grad_(False)
        for network, name in zip(networks, ("generator", "fake_score"), strict=False):
            if weights is not None:
                network.load_state_dict(weights[name])
        calls = [network.to(DEVICE) if toy else PlainUNet(network.to(DEVICE)) for network in networks]
        if compiled:
            calls = [torch.compile(call, mode=compiled) for call in calls]
        diffusion = config.diffusion or DiffusionOptions()
        self.rdmd = PlainRDMD(
            *calls[:2], exact_teacher if toy else calls[2], config, diffusion.sigma_data, exact_teacher=toy,
            residual_generator=toy,
        )  # fmt: skip
        self.sources = sources or [torch.randn(batch, *shape, device=DEVICE).clamp(-1, 1) for _ in range(8)]
        self.compiled, self.drawn = compiled, 0
        if compiled:
            self.rdmd.begin_update = torch.compiler.cudagraph_mark_step_begin  # as ours

    @classmethod
    def like(cls, ours: Ours, case: str, dtype: str, compiled: str | None) -> Plain:
        """Build one with ours's weights as they are now, and its sources."""
        exact = ours.stage.teacher.denoiser if case == "toy" else None
        return cls(case, ours.config, dtype, compiled, ours.weights(), ours.sources(), exact)

    def networks(self) -> dict[str, torch.nn.Module]:
        """Give the networks by name; an exact teacher is none."""
        networks = {name: getattr(self.rdmd, name) for name in ("generator", "fake_score", "teacher")}
        return {name: network for name, network in networks.items() if isinstance(network, torch.nn.Module)}

    def draw(self) -> torch.Tensor:
        self.drawn += 1
        return self.sources[self.drawn % len(self.sources)]

    def iteration(self) -> None:
        self.rdmd.iteration(self.draw)


def check_equal(ours: Ours, plain: Plain, dtype: str) -> dict[str, tuple[float, float]]:
    """Compare losses of the coming iteration and gradient norms on ours's sources, levels and noise: (ours, plain).

    Raises:
        RuntimeError: they differ, and times would be of different things.
    """
    x, _, table, noise = ours.stage._draw(ours.step, 0)
    fake_table, fake_noise = ours.stage._draw_fake_noise(0)
    sigmas = [(t.row("sigma") / t.row("alpha")).clone() for t in (table, fake_table)]
    epsilons = [n.values(x).clone() for n in (noise, fake_noise)]
    ours.means()
    # What is compiled would be compiled anew for it.
    compiled = plain.compiled or ours.config.train.compile
    with contextlib.nullcontext() if compiled else tf32(False):
        ours.iteration()
        mine = ours.means()
        y = plain.rdmd.generator_update(x, sigmas[0], epsilons[0])
        plain.rdmd.fake_update(x, sigmas[1], epsilons[1], y)
    pairs = {name: (mine[name], plain.rdmd.logged[name]) for name in ("score_gradient_square", "transport_cost")}
    # Ours reports ‖F - F*‖², which is that loss.
    pairs["fake_loss"] = (mine["fake_loss"], plain.rdmd.logged["fake_loss"])
    for name, engine in ours.state.engines.items():
        norm = "generator_norm" if name == "generator" else "fake_norm"
        pairs[norm] = (float(engine.guard.norm), plain.rdmd.logged[norm])
    for name, (a, b) in pairs.items():
        if not abs(a - b) <= TOLERANCE[dtype] * abs(b):
            raise RuntimeError(f"{name}: ours {a:.6g}, plain {b:.6g}: the two do not compute the same")
    return pairs


def build_side(
    name: str, sides: dict[str, Ours | Plain | FastGen], dtype: str, arguments, folder: Path
) -> dict[str, tuple]:
    """Add a side to ``sides``; returns the losses of ``check_equal``, {} where there was nothing to compare.

    Ours come before the other ones, which begin with the weights of the last of ours.
    """
    case, ours = arguments.case, next((side for side in reversed(sides.values()) if isinstance(side, Ours)), None)
    mode = arguments.compile if name.endswith("_compiled") else None
    if name.startswith("ours"):
        overrides = [*compile_as(mode), *arguments.set]
        ours = Ours(run_config(case, dtype, folder / name, overrides, arguments.batch, arguments.stage))
        sides[name] = ours
        for _ in range(2):
            ours.iteration()  # so that fake score and teacher differ
        compared = mode and any(each.startswith("plain") for each in arguments.sides)
        return check_equal(ours, Plain.like(ours, case, dtype, None), dtype) if compared else {}
    if name == "fastgen":
        sides[name] = FastGen.like(ours, arguments.fastgen, case, dtype)
        check_same_networks(ours, sides[name], dtype)
        return {}
    sides[name] = Plain.like(ours, case, "fp32" if name == "plain_fp32" else dtype, mode)
    return check_equal(ours, sides[name], dtype) if name != "plain_fp32" else {}
