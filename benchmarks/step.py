"""One RDMD iteration, a generator and a fake-score update, ours against plain PyTorch, in one run.

    python -m benchmarks.step --case digits|toy|songunet64|adm64 [--dtype fp32 bf16] [--stage 0] [--compile MODE]
                              [--json FILE]                 # a list, an entry a dtype, and a picture beside it
    python -m benchmarks.step --draw PICTURE FILE [FILE …]  # one picture of several

Ours is what ``train.py`` does in an iteration (data, engines, EMA, telemetry); the plain formulation is that of
``benchmarks.plain_step``, on the same weights, batch and number of updates. Their losses are compared first. Then
iterations of all sides are timed in turn and the best of each counts, since machines are shared. MFU is of the plain
formulation's FLOPs without its second rollout, against a matrix product measured in the same run, so that all sides are
credited with the same work. Bytes outside matrix products and convolutions are counted with the fused kernels as on a
GPU (``benchmarks.traffic``). Memory is that of a process of its own for each side: its height above what it held once
everything was imported.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.host_syncs import HostSyncs, count_host, count_on_gpu
from benchmarks.networks import CUDA, DEVICE, build, matmul_peak, resident, seconds, tf32
from benchmarks.plain_networks import PlainUNet
from benchmarks.plain_step import PlainRDMD
from benchmarks.timing import copy_bandwidth
from benchmarks.traffic import MATMULS, network_traffic
from rdmd_fast.processes.host_memory import LARGEST_MMAP_THRESHOLD, keep_freed_memory

ROOT = Path(__file__).parent.parent
MIB = 2**20
IMAGES = 64  # distinct sources
SIZES = {"digits": 8, "songunet64": 64, "adm64": 64}
BATCHES = {"toy": 512, "digits": 64, "songunet64": 64 if CUDA else 4, "adm64": 32 if CUDA else 2}
BURSTS = {"toy": 20, "digits": 5, "songunet64": 1, "adm64": 1}
OUR_SIDES, PLAIN_SIDES = ("ours", "ours_compiled"), ("plain", "plain_compiled", "plain_fp32")
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # relative, of the losses


# -- ours --------------------------------------------------------------------------------------------------------------


class Ours:
    """A run of the trainer, iteration by iteration."""

    def __init__(self, config, arguments):
        from rdmd_fast.experiment import build_experiment
        from rdmd_fast.monitoring.telemetry import Telemetry
        from rdmd_fast.processes.world import join_world

        self.config, self.world = config, join_world()
        folder, batch = Path(config.run_dir), config.train.global_batch_size
        self.telemetry = Telemetry(config.telemetry, self.world, folder, config.train.steps, batch)
        self.experiment = build_experiment(config, self.world, self.telemetry)
        self.stage, self.state = self.experiment.stage, self.experiment.state
        self.telemetry.start(0)
        self.step = 0

    def iteration(self) -> None:
        self.telemetry.begin_iteration(self.step)
        rates = self.experiment.iteration(self.step, self.config.train.steps, self.telemetry)
        self.telemetry.end_iteration(self.step, rates)
        self.step += 1

    def means(self) -> dict[str, float]:
        """Of the iterations since the last call."""
        telemetry = self.telemetry
        means = {name: float(total) / telemetry._counts[name] for name, total in telemetry._sums.items()}
        telemetry._sums.clear(), telemetry._counts.clear()
        return means

    def on_device(self) -> list[torch.Tensor]:
        """Parameters, masters, averages: what a GPU run has on the device between iterations."""
        from rdmd_fast.engine.fp32_masters import master_shards

        tensors = [*self.state.ema.shards, *(part for part in vars(self.stage).values() if torch.is_tensor(part))]
        for engine in self.state.engines.values():
            tensors += [*engine.module.parameters(), *engine.module.buffers(), *master_shards(engine)]
            tensors += [*engine.guard.state().values(), engine.guard._numbers, engine.guard.norm, engine.guard._skip]
        if isinstance(self.stage.teacher, torch.nn.Module):
            tensors += [*self.stage.teacher.parameters(), *self.stage.teacher.buffers()]
        return tensors


def run_config(case: str, dtype: str, arguments, folder: Path, more: Sequence[str] = ()):
    """Configuration of a run of the case; ``more`` overrides."""
    from rdmd_fast.config import load_config

    batch = arguments.batch or BATCHES[case]
    common = [
        f"run_dir={folder}/run", f"train.dtype={dtype}", f"train.global_batch_size={batch}", "train.steps=1000000000",
        f"deepspeed.zero_optimization.stage={arguments.stage}", "telemetry.tensorboard=false",
        "telemetry.log_every=1000000", "validation.every=0", "rdmd.fake_updates=1",
    ]  # fmt: skip
    if case == "toy":
        toy = ROOT / "configs/toy/gaussian_to_8gaussians.yaml"
        return load_config(str(toy), [*common, "rdmd.fake_warmup=0", *more])
    shape = 3, SIZES[case], SIZES[case]
    # Random weights, with all branches alive.
    overrides = [*common, "rdmd.transport_weight=0.1", *more]
    return distillation(folder, network_options(case), shape, build(case), overrides)


def distillation(folder: Path, options, shape: tuple[int, int, int], network: torch.nn.Module, overrides: list[str]):
    """Configuration of a distillation of ``network``, on random samples that are packed below ``folder``."""
    from rdmd_fast.config import load_config

    source = packed_images(shape[-1], folder) if shape[0] == 3 else packed_latents(shape, folder)
    write_teacher(folder / "teacher", options, shape, network)
    (folder / "config.yaml").write_text("stage: rdmd\n")
    data = [f"data.source={source}", f"teacher={folder}/teacher"]
    return load_config(str(folder / "config.yaml"), [*overrides, *data])


def packed_latents(shape: tuple[int, int, int], folder: Path) -> Path:
    """Random latents as shards."""
    from rdmd_fast.data.packing.shard_writer import ShardWriter

    random = np.random.default_rng(0)
    with ShardWriter(folder / "shards", {}, "benchmarks", IMAGES) as writer:
        for number in range(IMAGES):
            writer.write(f"{number:03d}", random.standard_normal(shape, dtype=np.float32))
        writer.commit()
    return folder / "shards"


def packed_images(size: int, folder: Path) -> Path:
    """Random images as shards."""
    from rdmd_fast import cli

    random = np.random.default_rng(0)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    for number in range(IMAGES):
        Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(pictures / f"{number:03d}.png")
    with contextlib.redirect_stdout(None):
        status = cli.main(["pack", str(pictures), "--out", str(folder / "shards"), "--resolution", str(size)])
    if status:
        raise RuntimeError("packing failed")
    return folder / "shards"


def write_teacher(folder: Path, options, shape: tuple[int, ...], network: torch.nn.Module) -> None:
    """An export of ``network`` as a teacher."""
    from rdmd_fast.diffusion import DiffusionOptions
    from rdmd_fast.model_files.export_format import ExportConfig, write_export

    export = ExportConfig(role="teacher", network=options, sample_shape=list(shape), diffusion=DiffusionOptions())
    write_export(folder, export, network.state_dict())


def network_options(case: str):
    from rdmd_fast.networks.options import DhariwalUNetOptions, SongUNetOptions

    return {
        "songunet64": SongUNetOptions(kind="song_unet", channel_mult=[1, 2, 2, 2], dropout=0.0),
        "adm64": DhariwalUNetOptions(kind="dhariwal_unet", dropout=0.0),
        "digits": SongUNetOptions(
            kind="song_unet", model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.0
        ),
    }[case]


# -- plain -------------------------------------------------------------------------------------------------------------


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
        from rdmd_fast.diffusion import DiffusionOptions
        from rdmd_fast.networks import build_network

        config = config.model_copy(update={"train": config.train.model_copy(update={"dtype": dtype})})
        batch, toy = config.train.global_batch_size, case == "toy"
        shape = (2,) if toy else (3, SIZES[case], SIZES[case])
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
        self.compiled = compiled
        self.sources = sources or [torch.randn(batch, *shape, device=DEVICE).clamp(-1, 1) for _ in range(8)]
        self.drawn = 0

    @classmethod
    def like(cls, ours: Ours, case: str, dtype: str, compiled: str | None) -> Plain:
        """With ours's weights as they are now, and its sources."""
        from rdmd_fast.engine.fp32_masters import gather_parameters, master_shards

        weights = {
            name: gather_parameters(engine, [shard.clone() for shard in master_shards(engine)])
            for name, engine in ours.state.engines.items()
        }
        batch = ours.config.train.global_batch_size
        sources = [ours.stage.source.batch(torch.arange(start, start + batch)) for start in range(0, 8 * batch, batch)]
        exact = ours.stage.teacher.denoiser if case == "toy" else None
        return cls(case, ours.config, dtype, compiled, weights, sources, exact)

    def draw(self) -> torch.Tensor:
        self.drawn += 1
        return self.sources[self.drawn % len(self.sources)]

    def iteration(self) -> None:
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        self.rdmd.iteration(self.draw)


def check_equal(ours: Ours, plain: Plain, dtype: str) -> dict[str, tuple[float, float]]:
    """Losses of the coming iteration and gradient norms on ours's sources, noise levels and noise: (ours, plain).

    Raises:
        RuntimeError: they differ, and times would be of different things.
    """
    stage, step = ours.stage, ours.step
    layout = stage.layout
    x, _ = stage._sources(0)
    table, noise = stage.generator_process.draw(layout.positions(step * layout.global_batch, 0), 0)
    first = stage.fake_updates_done * layout.global_batch
    fake_table, fake_noise = stage.fake_process.draw(layout.positions(first, 0), 0)
    sigmas = [(t.row("sigma") / t.row("alpha")).clone() for t in (table, fake_table)]
    epsilons = [n.values(x).clone() for n in (noise, fake_noise)]
    ours.means()
    # What is compiled would be compiled anew for it.
    with contextlib.nullcontext() if plain.compiled else tf32(False):
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


# -- measuring ---------------------------------------------------------------------------------------------------------


def times_in_turn(sides: dict[str, Callable[[], None]], rounds: int, burst: int) -> dict[str, float]:
    """Best seconds of an iteration of each side, since machines are shared; ``burst`` iterations of one side at a time.

    The first one of several is not timed: it finds the memory and the caches as the other side has left them.
    """
    for iteration in sides.values():
        for _ in range(2):
            iteration()
    columns: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for dtype in TOLERANCE:
            matmul_peak(dtype)  # when the machine is fast, it is for both
        for name, iteration in sides.items():
            # As train.py sets the C library's allocator, and as it comes.
            keep_freed_memory() if name.startswith("ours") else keep_freed_memory(2 * LARGEST_MMAP_THRESHOLD)
            if burst > 1:
                iteration()
            timed = max(1, burst - 1)
            columns[name].append(seconds(lambda run=iteration, timed=timed: [run() for _ in range(timed)]) / timed)
    return {name: min(column) for name, column in columns.items()}


def count_plain(plain: Plain) -> dict:
    networks = (plain.rdmd.generator, plain.rdmd.fake_score, plain.rdmd.average, plain.rdmd.teacher)
    modules = [network for network in networks if isinstance(network, torch.nn.Module)]
    tensors = [tensor for module in modules for tensor in [*module.parameters(), *module.buffers()]]
    with HostSyncs([*tensors, *plain.sources]) as syncs:
        plain.iteration()
    return {"host_syncs": sum(syncs.counts.values()), "launches": syncs.launches}


def iteration_flops(plain: Plain) -> float:
    """Matmul and convolution FLOPs of one iteration with one rollout."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        plain.iteration()
    with FlopCounterMode(display=False) as rollout, torch.no_grad():
        plain.rdmd.translate(plain.draw())
    return counter.get_total_flops() - plain.rdmd.options.fake_updates * rollout.get_total_flops()


def peak_of_side(side: str, dtype: str, arguments) -> int:
    """Bytes of a process of its own that runs three iterations of one side."""
    command = [
        sys.executable, "-m", "benchmarks.step", "--case", arguments.case,
        "--memory-of", side.partition("_")[0], "--dtype", dtype,
        "--stage", str(arguments.stage), "--batch", str(arguments.batch or BATCHES[arguments.case]),
        *(["--compile", arguments.compile] if side.endswith("_compiled") else []),
    ]  # fmt: skip
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()  # the other process needs it
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def print_peak(arguments) -> None:
    """The process of ``peak_of_side``."""
    dtype = arguments.dtype[0]
    with tempfile.TemporaryDirectory(prefix="rdmd-step-") as folder:
        config = run_config(arguments.case, dtype, arguments, Path(folder), compile_as(arguments.compile))
        load_libraries(Path(folder), dtype)
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets the peak of the resident set
            before = resident("VmRSS")
        if arguments.memory_of == "ours":
            run = Ours(config, arguments)
        else:
            run = Plain(arguments.case, config, dtype, arguments.compile, exact_teacher=lambda state, sigma: state)
        for _ in range(2):  # optimizers have their states from the first one on
            run.iteration()
        print((torch.cuda.max_memory_allocated() if CUDA else resident("VmHWM")) - before)


def load_libraries(folder: Path, dtype: str) -> None:
    """An iteration of each side on a few points: what they import and load on the way counts for neither."""
    arguments = argparse.Namespace(case="toy", batch=4, stage=0)
    config = run_config("toy", dtype, arguments, folder / "small", ["network.hidden=8", "generator.hidden=8"])
    ours = Ours(config, arguments)
    ours.iteration()
    Plain("toy", config, dtype, exact_teacher=lambda state, sigma: state).iteration()
    ours.experiment.close()


# -- results -----------------------------------------------------------------------------------------------------------


def build_sides(
    dtype: str, arguments, folder: Path, plain_fp32: Plain | None
) -> tuple[dict[str, Ours | Plain], dict[str, dict]]:
    """What is timed, by name, and by ours's names the losses of ``check_equal``."""
    case, sides, losses = arguments.case, {}, {}
    modes = {"": None} | ({"_compiled": arguments.compile} if arguments.compile else {})
    for suffix, mode in modes.items():
        config = run_config(case, dtype, arguments, folder / f"run{suffix}", compile_as(mode))
        ours = Ours(config, arguments)
        for _ in range(2):
            ours.iteration()  # so that fake score and teacher differ
        plain = Plain.like(ours, case, dtype, mode)
        losses[f"ours{suffix}"] = check_equal(ours, plain, dtype)
        sides |= {f"ours{suffix}": ours, f"plain{suffix}": plain}
        if plain_fp32 is None:
            plain_fp32 = plain if dtype == "fp32" else Plain.like(ours, case, "fp32", None)
    return {**sides, "plain_fp32": plain_fp32}, losses


def compile_as(mode: str | None) -> list[str]:
    """Overrides."""
    return [f"train.compile={mode}"] if mode else []


def measure(dtype: str, arguments, folder: Path, plain_fp32: Plain | None) -> tuple[dict, Plain]:
    """One entry of the results, and the plain formulation in fp32."""
    case = arguments.case
    names = [*OUR_SIDES, *PLAIN_SIDES] if arguments.compile else ["ours", "plain", "plain_fp32"]
    if dtype == "fp32":
        names.remove("plain_fp32")  # it is plain
    # Ahead of all else: other processes need the memory that the sides take here.
    peaks = {side: peak_of_side(side, "fp32" if side == "plain_fp32" else dtype, arguments) for side in names}
    torch._dynamo.reset()  # operations that were counted below are not compiled again
    sides, losses = build_sides(dtype, arguments, folder, plain_fp32)
    ours, plain, plain_fp32 = sides["ours"], sides["plain"], sides["plain_fp32"]
    if plain_fp32 is plain:
        del sides["plain_fp32"]
    times = times_in_turn({side: run.iteration for side, run in sides.items()}, arguments.rounds, BURSTS[case])
    parts = phases(ours)  # before anything is counted: a dispatch mode ends compilation
    batch, flops = ours.config.train.global_batch_size, iteration_flops(plain_fp32)
    if CUDA:
        counts = {side: count_on_gpu(run) for side, run in sides.items()}
    else:
        counts = {"ours": count_host(ours), "plain": count_plain(plain)}
        for side in counts:
            counts[side]["bytes_outside_matmuls"] = network_traffic(sides[side].iteration, MATMULS)
    matmul_rates = {name: matmul_peak(name) for name in TOLERANCE}
    entry = {
        "case": case, "device": torch.cuda.get_device_name() if CUDA else processor(),
        "dtype": dtype, "batch": batch, "stage": arguments.stage, "compile": arguments.compile,
        "torch": torch.__version__, "threads": torch.get_num_threads(), "losses": losses,
    }  # fmt: skip
    for side, duration in times.items():
        side_dtype = "fp32" if side == "plain_fp32" else dtype
        entry[side] = {
            "images_per_second": batch / duration, "seconds": duration,
            "mfu": flops / duration / matmul_rates[side_dtype],
            "peak_bytes": peaks[side],
            **counts.get(side, {}),
        }  # fmt: skip
    # Matrix products at the speed of a large one, all other bytes at that of a large copy, neither hidden by the other.
    peak = matmul_rates[dtype]
    entry |= {"flops": flops, "matmul_peak": peak, "copy_bandwidth": copy_bandwidth()}
    if "bytes_outside_matmuls" in entry["ours"]:
        entry["floor_seconds"] = flops / peak + entry["ours"]["bytes_outside_matmuls"] / copy_bandwidth()
    entry.setdefault("plain_fp32", entry["plain"])
    entry["ratio"] = entry["plain"]["seconds"] / entry["ours"]["seconds"]
    entry["ratios"] = {
        our: {plain: entry[plain]["seconds"] / entry[our]["seconds"] for plain in PLAIN_SIDES if plain in entry}
        for our in OUR_SIDES if our in entry
    }  # fmt: skip
    entry["phases"] = parts
    for side in OUR_SIDES:
        if side in sides:
            sides[side].experiment.close()
    return entry, plain_fp32


def processor() -> str:
    """Name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def phases(ours: Ours, iterations: int = 3) -> dict[str, float]:
    """Seconds of an iteration by phase, as telemetry takes them, and what lies between them."""
    ours.telemetry.phase_seconds()
    total = sum(seconds(ours.iteration) for _ in range(iterations))
    parts = {name: duration / iterations for name, duration in ours.telemetry.phase_seconds().items()}
    return {**parts, "other": total / iterations - sum(parts.values())}


def print_table(entries: list[dict]) -> None:
    for entry in entries:
        print(f"{entry['case']}, {entry['dtype']}, batch {entry['batch']}, ZeRO {entry['stage']}, on {entry['device']}")
        for side in (*OUR_SIDES, *PLAIN_SIDES):
            if side in entry:
                row = entry[side]
                moved = f"{row['bytes_outside_matmuls'] / MIB:.0f}" if "bytes_outside_matmuls" in row else "-"
                print(
                    f"  {side:<15} {row['seconds'] * 1e3:10.2f} ms  {row['images_per_second']:10.1f} images/s  "
                    f"MFU {row['mfu']:5.1%}  peak {row['peak_bytes'] / MIB:6.0f} MiB  outside matmuls {moved:>6} MiB  "
                    f"host syncs {row.get('host_syncs', '-'):>4}  launches {row.get('launches', '-'):>5}"
                )
        for our, ratios in entry["ratios"].items():
            print(f"  {our} {', '.join(f'{ratio:.2f} times {plain}' for plain, ratio in ratios.items())}")
        print(
            f"  {entry['flops'] / 1e9:.2f} GFLOP; matrix products reach {entry['matmul_peak'] / 1e9:.0f} GFLOP/s, "
            f"copies {entry['copy_bandwidth'] / 1e9:.1f} GB/s",
            end="",
        )
        floor = entry.get("floor_seconds")
        print(f": floor {floor * 1e3:.2f} ms, {floor / entry['ours']['seconds']:.0%} of ours" if floor else "")
        for who, count in entry["ours"].get("host_syncs_of", {}).items():
            print(f"  host syncs of {who}: {count}")


def draw(entries: list[dict], path: Path) -> None:
    """A bar for each entry: where an iteration's time goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.6 * len(entries)), layout="constrained")
    names = list(dict.fromkeys(name for entry in entries for name in entry["phases"]))
    lefts = [0.0] * len(entries)
    labels = [f"{entry['case']} {entry['dtype']}" for entry in entries]
    for name in names:
        widths = [entry["phases"].get(name, 0.0) / sum(entry["phases"].values()) for entry in entries]
        axis.barh(labels, widths, left=lefts, label=name, color="lightgrey" if name == "other" else None)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axis.set(xlim=(0, 1), xlabel="share of an iteration")
    axis.legend(ncols=4, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=BATCHES, default="digits", help="which networks (digits)")
    parser.add_argument("--dtype", nargs="+", choices=TOLERANCE, default=list(TOLERANCE), help="(fp32 bf16)")
    parser.add_argument("--batch", type=int, help="samples of an iteration (by the case)")
    parser.add_argument("--stage", type=int, default=0, choices=(0, 1, 2, 3), help="ZeRO stage of ours (0)")
    parser.add_argument("--rounds", type=int, default=20 if CUDA else 7, help="timed rounds (7; on a GPU 20)")
    parser.add_argument(
        "--compile", choices=("default", "reduce-overhead", "max-autotune"),
        help="both sides under torch.compile in this mode, too; on a GPU the latter two modes use CUDA graphs",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the results there, and a picture beside it")
    parser.add_argument(
        "--draw", nargs="+", metavar=("PICTURE", "FILE"), help="only draw the results of FILEs that --json wrote"
    )
    parser.add_argument("--memory-of", choices=("ours", "plain"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_peak(arguments)
        return 0
    if arguments.draw:
        picture, *files = map(Path, arguments.draw)
        draw([entry for file in files for entry in json.loads(file.read_text())], picture)
        return 0
    entries, plain_fp32 = [], None
    for dtype in arguments.dtype:
        with tempfile.TemporaryDirectory(prefix="rdmd-step-") as folder:
            entry, plain_fp32 = measure(dtype, arguments, Path(folder), plain_fp32)
        entries.append(entry)
        print_table([entry])
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(entries, indent=1) + "\n")
            draw(entries, Path(arguments.json).with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
