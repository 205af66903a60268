"""Sound inputs of every kind, small, made once: what the mutations start from."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
from pathlib import Path

import deepspeed
import matplotlib
import matplotlib.pyplot
import numpy as np
import torch
import torch._dynamo  # with the first optimizer, else seconds of each training
import torch._inductor.compile_fx  # with the first ZeRO optimizer
import torch.utils.tensorboard
import yaml
from fuzz_sandbox import ROOT
from material import encoded, npy, write_files, write_shards, write_tar
from PIL import Image
from safetensors.torch import load_file, save_file

from rdmd_fast import trainer
from rdmd_fast.diffusion import DiffusionOptions
from rdmd_fast.model_files.export_format import ExportConfig, write_export
from rdmd_fast.networks import build_network
from rdmd_fast.networks.flops import forward_flops
from rdmd_fast.networks.options import AffineOptions, DhariwalUNetOptions, MLPOptions, SongUNetOptions

# Everything is imported before the forks, once.
for _name in (
    "cli", "commands.evaluate", "commands.import_edm", "commands.pack", "commands.sample", "commands.translate",
    "data.packing.check", "data.stream", "monitoring.drawing",
):  # fmt: skip
    importlib.import_module(f"rdmd_fast.{_name}")
Image.init()
matplotlib.get_configdir(), matplotlib.get_cachedir()  # made here, once
_ = deepspeed.ops.__compatible_ops__  # tries compilers, once
torch.set_num_threads(1)

SIDE, COUNT, EACH = 8, 12, 4
TINY = SongUNetOptions(
    kind="song_unet", model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[8], dropout=0.0
)
CONDITIONAL = DhariwalUNetOptions(
    kind="dhariwal_unet", model_channels=32, channel_mult=[1], num_blocks=1, attn_resolutions=[], label_dim=3,
    dropout=0.0,
)  # fmt: skip
SHAPE = [3, SIDE, SIDE]


class Material:
    """Paths of sound inputs below ``root``.

    Attributes:
        images, latents: packed sets, the images with classes.
        foreign, foreign_latents: folders of tars without manifest.
        pictures: a folder of image files.
        teacher, generator: exports of a network for the images.
        exports: all exports, by name.
        diffusers, pipeline: diffusers folders, of a model and of a pipeline with its weights in two files.
        pickle, pickles: EDM pickles.
        run: a run folder with two checkpoints.
    """

    def __init__(self, root: Path, edm: Path | None):
        root.mkdir(parents=True)
        self.root = root
        self._make_sets()
        self._make_exports()
        forward_flops(TINY, tuple(SHAPE))  # imports what meta tensors need, a second's worth
        self._make_pickles(edm)
        self.diffusers, ours = root / "diffusers", ROOT / "tests/networks/fixtures/diffusers_unet"
        shutil.copytree(ours, self.diffusers, ignore=shutil.ignore_patterns("reference*"))
        self._make_pipeline()
        self._make_run()

    def _make_sets(self) -> None:
        chance = np.random.default_rng(0)
        pictures = chance.integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
        latents = chance.standard_normal((COUNT, 4, SIDE, SIDE)).astype(np.float32)
        self.images, self.latents = self.root / "images", self.root / "latents"
        write_shards(self.images, pictures, EACH, "class/{}", [number % 3 for number in range(COUNT)])
        write_shards(self.latents, latents, EACH)
        self.foreign, self.foreign_latents = self.root / "foreign", self.root / "foreign_latents"
        forms = ("PNG", "JPEG", "WEBP")
        for shard, form in enumerate(forms):
            members = []
            for number in range(EACH):
                suffix = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[form]
                members.append((f"{shard}_{number}.{suffix}", encoded(pictures[shard * EACH + number], form)))
                members.append((f"{shard}_{number}.cls", str(number % 3).encode()))
            write_tar(self.foreign / f"{shard}.tar", members)
        write_tar(self.foreign_latents / "0.tar", [(f"{n}.npy", npy(latents[n])) for n in range(COUNT)])
        files = {f"{n}.{form.lower()}": encoded(pictures[n], form) for n, form in enumerate(forms * 2)}
        self.pictures = write_files(self.root / "pictures", files)

    def _make_exports(self) -> None:
        torch.manual_seed(0)
        points = MLPOptions(kind="mlp", hidden=8, depth=2, embedding=4)
        edm = DiffusionOptions()
        configs = {
            "teacher": ExportConfig(role="teacher", network=TINY, sample_shape=SHAPE, diffusion=edm, step=3),
            "conditional": ExportConfig(
                role="teacher", network=CONDITIONAL, sample_shape=SHAPE, diffusion=edm, target_class=1
            ),
            "generator": ExportConfig(
                role="generator", network=TINY, sample_shape=SHAPE, diffusion=edm, reading="teacher",
                generator_sigma=1.0,
            ),
            "affine": ExportConfig(
                role="generator", network=AffineOptions(kind="affine"), sample_shape=[2], diffusion=edm,
                reading="affine",
                generator_sigma=1.0,
            ),
            "points": ExportConfig(
                role="generator", network=points, sample_shape=[2], diffusion=edm, reading="mlp", generator_sigma=1.0
            ),
        }  # fmt: skip
        self.exports = {}
        for name, config in configs.items():
            weights = build_network(config.network, tuple(config.sample_shape)).state_dict()
            write_export(self.root / "exports" / name, config, weights)
            self.exports[name] = self.root / "exports" / name
        self.teacher, self.generator = self.exports["teacher"], self.exports["generator"]

    def _make_pipeline(self) -> None:
        self.pipeline, weights = self.root / "pipeline", "diffusion_pytorch_model"
        unet = Path(shutil.copytree(self.diffusers, self.pipeline / "unet"))
        (self.pipeline / "scheduler").mkdir()
        (unet / "scheduler_config.json").rename(self.pipeline / "scheduler/scheduler_config.json")
        tensors = load_file(unet / f"{weights}.safetensors")
        (unet / f"{weights}.safetensors").unlink()
        parts = {name: f"{weights}-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
        for file in set(parts.values()):
            save_file({name: tensor for name, tensor in tensors.items() if parts[name] == file}, unet / file)
        size = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        index = {"metadata": size, "weight_map": parts}
        (unet / f"{weights}.safetensors.index.json").write_text(json.dumps(index))
        classes = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
        (self.pipeline / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", **classes}))

    def _make_pickles(self, edm: Path | None) -> None:
        self.pickles = []
        conftest = _load(ROOT / "tests/model_files/conftest.py")
        with conftest.edm_modules() as writer:
            for name in ("tiny", "ncsnpp", "adm"):
                self.pickles.append(self.root / f"{name}.pkl")
                writer(self.pickles[-1], getattr(writer, name), protocol=4 if name != "tiny" else 2)
        self.pickle = self.pickles[0]
        self.pickles += sorted(edm.glob("*.pkl")) if edm else []

    def _make_run(self) -> None:
        """Train in a process of its own: a process group does not survive a fork."""
        from fuzz_configs import small_rdmd

        self.run = self.root / "run"
        values = small_rdmd() | {"run_dir": str(self.run), "checkpoint": {"every": 1, "keep": 2}}
        path = self.root / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        child = os.fork()
        if child == 0:
            status = 70
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                status = trainer.main(["--config", str(path)])
            finally:
                os._exit(status)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
            raise SystemExit("the fuzz's own training failed")


def _load(path: Path):
    spec = importlib.util.spec_from_file_location("edm_writer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
