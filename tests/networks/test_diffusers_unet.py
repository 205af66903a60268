"""UNet2D against outputs of diffusers' own network (stored, and live where diffusers is installed); schedules."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rdmd_fast.diffusion import DiffusionOptions, coefficients, denoise
from rdmd_fast.model_files.diffusers_folder import read_diffusers
from rdmd_fast.model_files.weights import rebuild
from rdmd_fast.networks import build_network
from rdmd_fast.networks.diffusers_options import DiffusersUNetOptions, FlowSchedule, UNet2DOptions, VPSchedule
from rdmd_fast.networks.diffusers_unet import TimestepFeatures, log_sigma_table

FOLDER = Path(__file__).parent / "fixtures/diffusers_unet"  # saved, and its outputs computed, by diffusers 0.42.1
SCHEDULES = {
    "linear": VPSchedule(),
    "scaled_linear": VPSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": VPSchedule(beta_schedule="squaredcos_cap_v2"),
    "cosine_4000": VPSchedule(beta_schedule="squaredcos_cap_v2", num_train_timesteps=4000),
    "zero_snr": VPSchedule(rescale_betas_zero_snr=True),
}
TINY = dict(
    sample_size=8, block_out_channels=[8, 16], down_block_types=["DownBlock2D", "AttnDownBlock2D"],
    up_block_types=["AttnUpBlock2D", "UpBlock2D"], norm_num_groups=4, attention_head_dim=4, layers_per_block=1,
)  # fmt: skip
VARIANTS = {
    "plain": {},
    "ddpm": dict(
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None, norm_eps=1e-6,
        layers_per_block=2,
    ),
    "scale_shift": dict(resnet_time_scale_shift="scale_shift", mid_block_scale_factor=1.4142, attn_norm_num_groups=2),
    "resnets": dict(
        downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
        block_out_channels=[8, 16, 24], down_block_types=["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 2],
        up_block_types=[*["AttnUpBlock2D"] * 2, "ResnetUpsampleBlock2D"],
    ),
    "classes": dict(
        num_class_embeds=3, in_channels=5, out_channels=5, center_input_sample=True, time_embedding_dim=24,
        sample_size=[8, 16],
    ),
    "no_middle": dict(mid_block_type=None),
    "no_attention": dict(
        add_attention=False, block_out_channels=[8, 12, 16], down_block_types=["DownBlock2D"] * 3,
        up_block_types=["UpBlock2D"] * 3,
    ),
}  # fmt: skip


def features(schedule) -> TimestepFeatures:
    return TimestepFeatures(schedule, channels=8, freq_shift=0, cosine_first=True)


def c_noise(sigma) -> torch.Tensor:
    """float32, by the coefficient table, as networks get it."""
    return coefficients(torch.as_tensor(sigma, dtype=torch.float64), DiffusionOptions()).c_noise


def reference() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The stored network, in float32, and diffusers' outputs of it."""
    config, weights = read_diffusers(FOLDER)
    return rebuild(config, weights, str(FOLDER)), load_file(FOLDER / "reference.safetensors")


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


# -- schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_levels_are_products_of_one_minus_beta(name):
    schedule, steps, survival = SCHEDULES[name], 1000, 1.0
    root = 0.5 if name == "scaled_linear" else 1
    for t, level in enumerate(log_sigma_table(schedule)):
        ends = schedule.beta_start**root, schedule.beta_end**root
        survival *= 1 - (ends[0] + (ends[1] - ends[0]) * t / (steps - 1)) ** (1 / root)
        assert level == pytest.approx(0.5 * math.log((1 - survival) / survival), abs=1e-10)


def test_cosine_levels_are_the_formulas_until_the_cap():
    def survival(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2

    levels = log_sigma_table(SCHEDULES["cosine"])
    expected = [0.5 * math.log(1 / survival(t + 1) - 1) for t in range(999)]
    np.testing.assert_allclose(levels[:999], expected, atol=1e-9)
    assert 1 / (1 + math.exp(2 * levels[999])) == pytest.approx(survival(999) * 0.001, rel=1e-9)


def test_trained_betas_replace_the_formula():
    levels = log_sigma_table(VPSchedule(trained_betas=[0.1, 0.2]))
    np.testing.assert_allclose(levels, [0.5 * math.log(0.1 / 0.9), 0.5 * math.log(0.28 / 0.72)], atol=1e-12)


def test_zero_snr_keeps_the_first_level_and_loses_the_last():
    plain, rescaled = log_sigma_table(SCHEDULES["linear"]), log_sigma_table(SCHEDULES["zero_snr"])
    assert len(rescaled) == 999
    assert rescaled[0] == pytest.approx(plain[0], abs=1e-9)
    alpha = np.sqrt(1 / (1 + np.exp(2 * plain)))
    middle = (alpha[500] - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    assert rescaled[500] == pytest.approx(0.5 * math.log(1 / middle**2 - 1), abs=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_timesteps_are_exact_at_every_level(name):
    table = log_sigma_table(SCHEDULES[name])
    timesteps = features(SCHEDULES[name]).timestep(c_noise(np.exp(table)))
    assert timesteps.tolist() == list(range(len(table)))


def test_timesteps_between_levels_are_interpolated_and_beyond_them_clamped():
    schedule = SCHEDULES["linear"]
    table = log_sigma_table(schedule)
    between = np.exp(0.75 * table[:-1] + 0.25 * table[1:])
    expected = torch.arange(999) + 0.25
    assert torch.allclose(features(schedule).timestep(c_noise(between)), expected.double(), atol=1e-3)
    assert features(schedule).timestep(c_noise([1e-4, 1e4])).tolist() == [0, 999]


def test_flow_timesteps_are_shares_of_the_path():
    share = torch.tensor([0.001, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    timesteps = features(FlowSchedule()).timestep(c_noise(share / (1 - share)))
    assert torch.allclose(timesteps, 1000 * share, rtol=1e-6)


def test_casting_rounds_no_table():
    cast = features(SCHEDULES["linear"]).to(torch.bfloat16)
    assert cast.log_sigma.dtype == torch.float64 and cast.frequencies.dtype == torch.float32
    level = c_noise(np.exp(log_sigma_table(SCHEDULES["linear"])))
    assert torch.equal(cast(level), features(SCHEDULES["linear"])(level))


# -- the network -------------------------------------------------------------------------------------------------------


def levels_of(timesteps: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.exp(log_sigma_table(VPSchedule())))[timesteps]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_stored_network_gives_diffusers_outputs(dtype, tolerance):
    network, stored = reference()
    labels = F.one_hot(stored["classes"], 3).float()
    output = network.to(dtype)(stored["x"], c_noise(levels_of(stored["timesteps"])), labels)
    assert output.dtype == torch.float32
    assert relative_error(output, stored["output"]) < tolerance


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow"])
def test_denoiser_is_the_predicted_clean_sample(prediction):
    network, stored = reference()
    x_t, timesteps, labels = stored["x"], stored["timesteps"], F.one_hot(stored["classes"], 3).float()
    output = stored["output"].double()
    if prediction == "flow":
        network.time_features = TimestepFeatures(FlowSchedule(), 8, 0, True)
        share = ((timesteps.double() + 0.5) / 1000)[:, None, None, None]
        sigma_tilde, alpha = (share / (1 - share)).flatten(), 1 - share
        output = network(x_t, c_noise(sigma_tilde), labels).double()
        expected = x_t - share * output
    else:
        sigma_tilde = levels_of(timesteps)
        survival = (1 / (1 + sigma_tilde**2))[:, None, None, None]
        alpha, sigma = survival.sqrt(), (1 - survival).sqrt()
        expected = {
            "epsilon": (x_t - sigma * output) / alpha, "v": alpha * x_t - sigma * output, "x0": output
        }[prediction]  # fmt: skip
    options = DiffusionOptions(parameterization=prediction)
    denoised = denoise(network, (x_t / alpha).float(), sigma_tilde, options, labels)
    scale = expected.abs().amax((1, 2, 3))
    assert ((denoised - expected).abs().amax((1, 2, 3)) / scale).max() < 1e-5


def test_no_class_is_a_row_of_zeros():
    network, stored = reference()
    arguments = stored["x"], c_noise(levels_of(stored["timesteps"]))
    without = network(*arguments)
    assert torch.equal(without, network(*arguments, torch.zeros(8, 3)))
    assert relative_error(without, stored["output"]) > 1e-3


def test_recomputed_activations_give_the_same_gradients():
    network, stored = reference()
    network.requires_grad_(True)
    gradients, calls = [], []
    network.mid_block.register_forward_pre_hook(lambda *_: calls.append(network.checkpointing))
    for network.checkpointing in (False, True):
        network.zero_grad()
        network(stored["x"], c_noise(levels_of(stored["timesteps"]))).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert calls == [False, True, True]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_dropout_is_for_training_alone():
    options = DiffusersUNetOptions(unet=UNet2DOptions(**TINY, dropout=0.5), schedule=VPSchedule())
    x, level = torch.randn(2, 3, 8, 8), torch.zeros(2)
    network = build_network(options, (3, 8, 8))
    assert not torch.equal(network(x, level), network(x, level))
    network.eval()
    assert torch.equal(network(x, level), network(x, level))
    distilled = build_network(options, (3, 8, 8), dropout=False)
    assert torch.equal(distilled(x, level), distilled(x, level))


# -- beside diffusers itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_keys_equal_those_of_diffusers(variant, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**TINY | VARIANTS[variant]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    diffusers.DDPMScheduler().save_pretrained(tmp_path)
    config, weights = read_diffusers(tmp_path)
    ours = rebuild(config, weights, "here")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    timesteps = torch.tensor([0, 1, 7, 500, 998, 999])
    x, classes = torch.randn(6, *config.sample_shape), torch.arange(6) % 3
    conditional = config.network.label_dim > 0
    labels = F.one_hot(classes, 3).float() if conditional else None
    with torch.no_grad():
        expected = theirs(x, timesteps, class_labels=classes if conditional else None).sample
    assert relative_error(ours(x, c_noise(levels_of(timesteps)), labels), expected) < 1e-5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2", "zero_snr", "trained"])
def test_denoiser_equals_the_schedulers_own_step(prediction, betas, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    keys = {
        "zero_snr": dict(rescale_betas_zero_snr=True),
        "trained": dict(trained_betas=[0.01 * i for i in range(1, 21)]),
    }
    scheduler = diffusers.DDIMScheduler(
        prediction_type=prediction, clip_sample=False, set_alpha_to_one=True,
        **keys.get(betas, dict(beta_schedule=betas)),
    )  # fmt: skip
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    scheduler.save_pretrained(tmp_path)
    config, weights = read_diffusers(tmp_path)
    network = rebuild(config, weights, "here")
    theirs = diffusers.UNet2DModel.from_config(json.loads((FOLDER / "config.json").read_text())).eval()
    theirs.load_state_dict(weights)
    count = len(scheduler.alphas_cumprod)
    scheduler.set_timesteps(count)
    torch.manual_seed(0)
    for t in [0, 1, count // 3, count // 2, count - 2]:
        clean, noise = torch.randn(2, 1, 3, 8, 8)
        state = scheduler.add_noise(clean, noise, torch.tensor([t]))
        with torch.no_grad():
            output = theirs(state, t, class_labels=torch.tensor([1])).sample
        expected = scheduler.step(output, t, state).pred_original_sample
        survival = scheduler.alphas_cumprod[t].double()
        label = F.one_hot(torch.tensor([1]), 3).float()
        own = denoise(network, state / survival.sqrt(), ((1 - survival) / survival).sqrt(), config.diffusion, label)
        assert relative_error(own, expected) < 1e-5
