"""Pickles in NVIDIA EDM's format, written from our own networks as `torch_utils.persistence` would write theirs."""

import contextlib
import math
import pickle
import sys
import types
from collections import OrderedDict
from unittest import mock

import numpy as np
import pytest
import torch

SOURCE = "raise SystemExit('the source text in a pickle must never run')\n"
HOOKS = ["_backward_pre_hooks", "_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks"]

# A DDPM++ of a few thousand parameters, and an NCSN++ and an ADM with classes.
TINY = dict(model_type="SongUNet", model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0)
NCSNPP = TINY | dict(
    embedding_type="fourier",
    encoder_type="residual",
    channel_mult_noise=2,
    resample_filter=[1, 3, 3, 1],
    label_dim=3,
    augment_dim=9,
)
ADM = dict(
    model_type="DhariwalUNet", model_channels=64, channel_mult=[1], num_blocks=1, attn_resolutions=[8], label_dim=4,
    dropout=0.13,
)  # fmt: skip


class Persistent:
    """An object of one of EDM's classes, pickled by reference to its class's name and source."""

    def __init__(self, class_name, state):
        self.meta = dict(type="class", version=6, module_src=SOURCE, class_name=class_name, state=state)

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def state_of(network, **more):
    """What torch.nn.Module keeps, with every submodule as EDM pickles it."""
    state = dict(training=False, _parameters=dict(network._parameters), _buffers=dict(network._buffers))
    state["_non_persistent_buffers_set"] = set(network._non_persistent_buffers_set)
    state |= {name: OrderedDict() for name in HOOKS}
    state["_modules"] = {name: persistent(child) for name, child in network._modules.items()}
    return state | more


def persistent(network, class_name=None, **more):
    if isinstance(network, torch.nn.ModuleDict):
        made = torch.nn.ModuleDict.__new__(torch.nn.ModuleDict)
        made.__dict__.update(state_of(network))
        return made
    if network is None:
        return None
    state = dict(skip_scale=np.float64(math.sqrt(0.5)), _init_args=(), _init_kwargs=dict(num_channels=3))
    return Persistent(class_name or type(network).__name__, state_of(network, **state | more))


class EDMWriter:
    """Writes EDM pickles while their modules seem to exist.

    Attributes:
        tiny, ncsnpp, adm: arguments of EDMPrecond for small networks.
    """

    tiny, ncsnpp, adm = TINY, NCSNPP, ADM

    def network(self, arguments, resolution=8):
        """Our network for EDMPrecond's arguments, with random parameters, float32."""
        from rdmd_fast.networks.dhariwal_unet import DhariwalUNet
        from rdmd_fast.networks.song_unet import SongUNet

        kind = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}[arguments["model_type"]]
        keywords = {name: value for name, value in arguments.items() if name != "model_type"}
        network = kind(resolution, 3, 3, **keywords)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                scale = 1 / math.sqrt(max(1, parameter[0].numel()))
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        return network.eval().requires_grad_(False)

    def contents(self, network, arguments, resolution=8, class_name="EDMPrecond", **changes):
        """The dict that is pickled; ``changes`` go into EDMPrecond's state."""
        keywords = dict(img_resolution=resolution, img_channels=3, use_fp16=True) | arguments
        outer = torch.nn.Module()
        outer.model = network
        state = dict(_init_args=(), _init_kwargs=keywords, sigma_max=float("inf")) | changes
        ema = persistent(outer, class_name, **state)
        inner = ema.meta["state"]["_modules"]["model"]
        inner.meta["class_name"] = arguments.get("model_type", "DhariwalUNet")
        loss = Persistent("EDMLoss", dict(P_mean=-1.2, P_std=1.2, sigma_data=0.5, _init_args=(), _init_kwargs={}))
        return dict(ema=ema, loss_fn=loss, augment_pipe=None, dataset_kwargs=dict(path="data.zip", xflip=False))

    def write(self, path, contents, protocol=4):
        path.write_bytes(pickle.dumps(contents, protocol))
        return path

    def __call__(self, path, arguments=TINY, resolution=8, protocol=4, **changes):
        """A whole file; returns its network."""
        network = self.network(arguments, resolution)
        self.write(path, self.contents(network, arguments, resolution, **changes), protocol)
        return network


@contextlib.contextmanager
def edm_modules():
    """A writer of pickles, and meanwhile EDM's module names, which it refers to."""
    package, persistence = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("a pickle was loaded by Python's own unpickler")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    with mock.patch.dict(sys.modules, {"torch_utils": package, "torch_utils.persistence": persistence}):
        yield EDMWriter()


@pytest.fixture
def edm():
    with edm_modules() as writer:
        yield writer
