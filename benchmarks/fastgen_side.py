"""A side of ``benchmarks.step``: the DMD2 step of a checkout of NVlabs/FastGen, on the weights and batches of ours.

The user names the checkout, and its own classes do the work: ``DMD2Model`` with its GAN off, ``EDMPrecond`` around its
U-Net, its AdamW, and its callbacks that clip the generator's gradient and average its weights. They are called in the
order of its ``Trainer.train_step``, without its data loader and logging.

Iterations of FastGen update one network each. One iteration here is as many of them as make what an iteration of ours
makes: the fake-score updates, then a generator update. Each has its own batch and rollout, and the average is updated
after each. As in DMD2 the generator starts from noise at FastGen's largest level; there is no transport cost.
"""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.host_syncs import HostSyncs, returning_marked
from benchmarks.network_passes import count_passes, passes_of
from benchmarks.networks import DEVICE, TOLERANCE, build, tf32
from benchmarks.plain_kernels import over_samples
from benchmarks.step_cases import network_options, sample_shape
from rdmd_fast.config import Config
from rdmd_fast.diffusion import DiffusionOptions
from rdmd_fast.errors import InputError

if TYPE_CHECKING:
    from benchmarks.step_sides import Ours

MODULES = {
    "DMD2Model": "fastgen.methods.distribution_matching.dmd2",
    "EDMPrecond": "fastgen.networks.EDM.network",
    "GradClipCallback": "fastgen.callbacks.grad_clip",
    "EMACallback": "fastgen.callbacks.ema",
    "BaseOptimizerConfig": "fastgen.configs.opt",
    "BaseSchedulerConfig": "fastgen.configs.opt",
    "LazyCall": "fastgen.utils",
    "set_log_level": "fastgen.utils.logging_utils",
    "DictConfig": "omegaconf",
}
METHOD = "fastgen/methods/distribution_matching/dmd2.py"
GET = "git clone https://github.com/NVlabs/FastGen"
INSTALL = "pip install attrs boto3 diffusers einops ftfy imageio loguru omegaconf requests scipy 'wandb<0.20'"
NETWORKS = ("generator", "fake_score", "teacher")
KINDS = {"song_unet": "SongUNet", "dhariwal_unet": "DhariwalUNet"}
UNUSED = {"logvar_linear.weight", "logvar_linear.bias"}  # parameters of FastGen's U-Nets that DMD2 does not read


def load_fastgen(path: str | Path) -> SimpleNamespace:
    """Import what the step needs from the checkout at ``path``.

    Raises:
        InputError: the folder is no checkout, or a package that FastGen imports is not installed.
    """
    folder = Path(path).resolve()
    if not (folder / METHOD).is_file():
        raise InputError(f"--fastgen {path}: no checkout of NVlabs/FastGen, {METHOD} is missing: {GET}")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last: it has folders named as some of ours
    try:
        found = {name: getattr(importlib.import_module(module), name) for name, module in MODULES.items()}
    except (ImportError, AttributeError) as error:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "fastgen"]:
            del sys.modules[name]
        missing = getattr(error, "name", None) or ""
        if isinstance(error, ModuleNotFoundError) and missing.partition(".")[0] != "fastgen":
            raise InputError(f"--fastgen {path}: FastGen imports {missing}, not installed: {INSTALL}") from error
        raise InputError(f"--fastgen {path}: {error}: take the commit that docs/performance.md names") from error
    found["set_log_level"]("ERROR")
    return SimpleNamespace(**found)


def commit_of(path: str | Path) -> str | None:
    """Name the checkout's commit; None without git."""
    done = subprocess.run(["git", "-C", str(path), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


class FastGen:
    """FastGen's DMD2, iteration by iteration.

    Args:
        config: ours.
        weights: state dicts of "generator", "fake_score" and "teacher"; None for those that the case begins with.
        sources: batches, ready on the device. None makes random ones.
    """

    def __init__(self, path: str | Path, case: str, config: Config, dtype: str, weights=None, sources=None):
        fastgen, shape, self.config = load_fastgen(path), sample_shape(case), config
        self.model = fastgen.DMD2Model(model_config(fastgen, case, config, dtype))
        weights = weights or dict.fromkeys(NETWORKS, build(case).state_dict())
        for name, network in self.networks().items():
            self._load(network.model, weights[name], name)
        self._load(self.model.ema.model, weights["generator"], "average")
        self.model.on_train_begin()
        self.model.init_optimizers()
        self.clip, self.average = fastgen.GradClipCallback(grad_norm=10.0), fastgen.EMACallback()
        batch = config.train.global_batch_size
        self.sources = sources or [torch.randn(batch, *shape, device=DEVICE).clamp(-1, 1) for _ in range(8)]
        self.updates = 0

    @staticmethod
    def _load(network: nn.Module, weights: dict[str, Tensor], name: str) -> None:
        missing, unexpected = network.load_state_dict(weights, strict=False)
        # Filters are no weights, and alike where outputs are.
        differing = {key for key in (*missing, *unexpected) if not key.endswith("resample_filter")} - UNUSED
        if differing:
            raise RuntimeError(f"{name}: FastGen's network has other weights than ours: {sorted(differing)[:3]}")

    @classmethod
    def like(cls, ours: Ours, path: str | Path, case: str, dtype: str) -> FastGen:
        """Build one with ours's weights as they are now, and its sources."""
        weights = {**ours.weights(), "teacher": ours.stage.teacher.state_dict()}
        return cls(path, case, ours.config, dtype, weights, ours.sources())

    def networks(self) -> dict[str, nn.Module]:
        return dict(zip(NETWORKS, (self.model.net, self.model.fake_score, self.model.teacher), strict=True))

    def iteration(self) -> None:
        """Update the fake score ``fake_updates`` times, then the generator."""
        for _ in range(self.model.config.student_update_freq):
            self.updates += 1
            self._update(self.updates)

    def _update(self, number: int) -> None:
        model = self.model
        data = {"real": self.sources[number % len(self.sources)], "condition": None, "neg_condition": None}
        with model.autocast():
            losses, outputs = model.single_train_step(data, number)
        model.grad_scaler.scale(losses["total_loss"]).backward()
        self.clip.on_optimizer_step_begin(model, iteration=number)
        model.optimizers_schedulers_step(number)
        model.optimizers_zero_grad(number)
        self.average.on_training_step_end(model, data, outputs, losses, iteration=number)


def model_config(fastgen: SimpleNamespace, case: str, config: Config, dtype: str) -> SimpleNamespace:
    """Configure DMD2 as FastGen's defaults do, with our networks, levels, learning rates and number of updates."""
    options, shape, rdmd = network_options(case), sample_shape(case), config.rdmd
    diffusion = config.diffusion or DiffusionOptions()
    network = fastgen.LazyCall(fastgen.EDMPrecond)(
        img_resolution=shape[-1], img_channels=shape[0], sigma_data=diffusion.sigma_data,
        model_type=KINDS[options.kind], **options.model_dump(exclude={"kind"}),
    )  # fmt: skip
    schedule = copy.deepcopy(fastgen.BaseSchedulerConfig)
    schedule.warm_up_steps = [0]
    optimizers = {}
    for name, adam in (("net", rdmd.generator_optimizer), ("fake_score", rdmd.fake_optimizer)):
        optimizers[f"{name}_scheduler"] = schedule
        optimizers[f"{name}_optimizer"] = copy.deepcopy(fastgen.BaseOptimizerConfig)
        optimizers[f"{name}_optimizer"].update(lr=adam.lr, betas=tuple(adam.betas), eps=adam.eps)
    return SimpleNamespace(
        device=DEVICE.type, input_shape=list(shape), net=network, teacher=None, use_ema=True,
        precision="float32", precision_amp="bfloat16" if dtype == "bf16" else None,
        precision_amp_infer=None, precision_amp_enc=None, precision_fsdp=None,
        fsdp_meta_init=False, add_teacher_to_fsdp_dict=True, enable_preprocessors=True,
        pretrained_model_path="", pretrained_student_net_path="", load_student_weights=False,
        guidance_scale=None, skip_layers=None, gan_loss_weight_gen=0.0, gan_r1_reg_weight=0.0,
        fake_score_pred_type=None,
        student_sample_steps=1, student_update_freq=rdmd.fake_updates + 1,
        sample_t_cfg=fastgen.DictConfig({
            "time_dist_type": "lognormal", "train_p_mean": rdmd.sigma.mean, "train_p_std": rdmd.sigma.std,
            "min_t": 0.002, "max_t": 80.0,
        }),
        grad_scaler_enabled=False, grad_scaler_init_scale=65536.0, grad_scaler_growth_interval=2000, **optimizers,
    )  # fmt: skip


@torch.no_grad()
def check_same_networks(ours: Ours, peer: FastGen, dtype: str) -> dict[str, float]:
    """Compare denoised states D(x_t; σ) of each network of both sides; returns the relative differences.

    Raises:
        RuntimeError: they differ, and times would be of different things.
    """
    sigma_data = (ours.config.diffusion or DiffusionOptions()).sigma_data
    sigma = torch.linspace(0.1, 10.0, len(peer.sources[0]), device=DEVICE)
    level = over_samples(sigma, peer.sources[0])
    total = (level**2 + sigma_data**2).sqrt()
    state, differences = peer.sources[0] + level * torch.randn_like(peer.sources[0]), {}
    for name, network in peer.networks().items():
        # EDM's D(x_t; σ) (arXiv 2206.00364, Equation 7)
        with tf32(False):
            raw = getattr(ours.stage, name)((state / total).to(ours.stage.context.dtype), sigma.log() / 4, None)
            with peer.model.autocast():
                theirs = network(state, sigma.double(), fwd_pred_type="x0")
        mine = (sigma_data / total) ** 2 * state + level * sigma_data / total * raw.float()
        differences[name] = float((theirs - mine).norm() / mine.norm())
        if not differences[name] < TOLERANCE[dtype]:
            raise RuntimeError(f"{name}: FastGen's output differs from ours by {differences[name]:.2e}")
    return differences


def count_fastgen(peer: FastGen) -> dict:
    """Count passes, operations, host synchronisations and launches of an iteration, without a GPU."""
    model = peer.model
    tensors = [*model.parameters(), *model.buffers(), *peer.sources]
    with (
        count_passes(peer.networks()) as passes,
        HostSyncs(tensors) as syncs,
        returning_marked(syncs, model, "_generate_noise_and_time"),
    ):
        peer.iteration()
    return {**syncs.totals(), "passes": passes_of(passes)}
