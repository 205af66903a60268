"""Transformers of the straight path in pipelines of diffusers' own classes, beside the library's own parts."""

import json
import logging
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from text_pipelines import NEGATIVE, PROMPT, TOKENS, diffusers, flux_pipeline, sd3_pipeline

from rdmd_fast import cli, load_denoiser
from rdmd_fast.errors import InputError
from rdmd_fast.model_files.prompts import embed_prompts
from rdmd_fast.model_files.teachers import read_teacher, read_teacher_config
from rdmd_fast.networks.adapters import add_adapters
from rdmd_fast.networks.text_options import LoRAOptions

logging.getLogger("diffusers").setLevel("ERROR")

MAKERS = {"sd3": sd3_pipeline, "flux": flux_pipeline, "flux schnell": partial(flux_pipeline, guidance_embeds=False)}
T5_TOKENS = {"sd3": 256, "flux": 512, "flux schnell": 256}


@pytest.fixture(scope="module", params=MAKERS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``folders(kind)``: a saved pipeline, which no test may change."""
    made = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("pipeline") / "p"
            MAKERS[kind]().save_pretrained(made[kind])
        return made[kind]

    return of


def velocity(made, x, timestep, text: str) -> torch.Tensor:
    """As the pipelines call their networks."""
    if isinstance(made, diffusers.StableDiffusion3Pipeline):
        embeds, _, pooled, _ = made.encode_prompt(text, None, None, device="cpu")
        told = dict(encoder_hidden_states=embeds, pooled_projections=pooled, timestep=timestep)
        return made.transformer(x, **told).sample
    most = 512 if made.transformer.config.guidance_embeds else 256
    embeds, pooled, txt_ids = made.encode_prompt(text, device="cpu", max_sequence_length=most)
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    told = dict(encoder_hidden_states=embeds, pooled_projections=pooled, timestep=timestep / 1000, txt_ids=txt_ids)
    told |= dict(img_ids=made._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32))
    guidance = torch.full([1], 3.5) if made.transformer.config.guidance_embeds else None
    packed = made._pack_latents(x, 1, 16, *x.shape[2:])
    output = made.transformer(packed, guidance=guidance, **told).sample
    return made._unpack_latents(output, *(side * made.vae_scale_factor for side in x.shape[2:]), made.vae_scale_factor)


@torch.no_grad()
def library_denoised(made, x, level: float, guidance: float) -> tuple[float, torch.Tensor]:
    """(t, x0) by the library's parts: its scheduler chooses t from ``level``, and steps from there to 0."""
    dynamic = {"mu": 0.8} if made.scheduler.config.use_dynamic_shifting else {}
    made.scheduler.set_timesteps(sigmas=[level], **dynamic)
    (timestep,) = made.scheduler.timesteps
    outputs = [velocity(made, x, timestep.expand(1), text) for text in (PROMPT, NEGATIVE)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    output = outputs[1] + guidance * (outputs[0] - outputs[1])
    t = made.scheduler.sigmas[0].item()
    return t, made.scheduler.step(output, timestep, x).prev_sample


@pytest.mark.parametrize("guidance", [1.0, 0.0, 3.5], ids=["conditional", "unconditional", "guided"])
@pytest.mark.parametrize("scheduler", [{}, {"use_dynamic_shifting": True}], ids=["shift", "dynamic shift"])
def test_denoised_is_the_librarys_own(tmp_path, kind, scheduler, guidance):
    made = MAKERS[kind](**scheduler)
    made.save_pretrained(tmp_path / "p")
    denoiser = load_denoiser(tmp_path / "p", PROMPT, NEGATIVE, guidance)
    x = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    for level in (0.02, 0.4, 0.97):
        t, expected = library_denoised(made, x, level, guidance)
        assert t != pytest.approx(level)  # the shift has moved it
        with torch.no_grad():
            denoised = denoiser((x / (1 - t)).float(), t / (1 - t))
        torch.testing.assert_close(denoised, expected, rtol=0, atol=1e-5)


def test_variant_and_shards_read_alike(tmp_path, folders, kind):
    plain = read_teacher(folders(kind))
    embedded = embed_prompts(folders(kind), {"prompt.": PROMPT}, NEGATIVE, plain[0].network.tokens, print)
    ways = {"shards": {"max_shard_size": "100KB"}, "half": {"variant": "fp16"}}
    ways["both"] = ways["shards"] | ways["half"]
    for name, options in ways.items():
        MAKERS[kind]().save_pretrained(tmp_path / name, **options)
        config, weights = read_teacher(tmp_path / name)
        config = config.model_copy(update={"pipeline": plain[0].pipeline})  # a path of its own
        assert config == plain[0] and weights.keys() == plain[1].keys()
        assert all(torch.equal(weights[key], plain[1][key]) for key in weights)
        again = embed_prompts(tmp_path / name, {"prompt.": PROMPT}, NEGATIVE, config.network.tokens, print)
        assert again.keys() == embedded.keys() and all(torch.equal(again[key], embedded[key]) for key in again)
    assert len(list((tmp_path / "shards/transformer").glob("*-of-*.safetensors"))) > 1
    assert list((tmp_path / "both/transformer").glob("*index.fp16.json"))


def test_activation_checkpointing_changes_no_gradient(folders, kind):
    x, gradients = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)), []
    network = load_denoiser(folders(kind), PROMPT).model.requires_grad_(True)
    for network.checkpointing in (False, True):
        assert network.checkpointing == network.transformer.is_gradient_checkpointing == bool(gradients)
        network.zero_grad()
        network(x, torch.zeros(2)).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_without_t5_its_tokens_are_zero(tmp_path, folders):
    sd3_pipeline(t5=False).save_pretrained(tmp_path / "p")
    assert not (tmp_path / "p/text_encoder_3").exists()
    tokens = read_teacher_config(tmp_path / "p").network.tokens
    assert tokens == TOKENS + T5_TOKENS["sd3"]
    embedded = embed_prompts(tmp_path / "p", {"prompt.": PROMPT}, NEGATIVE, tokens, print)
    whole = embed_prompts(folders("sd3"), {"prompt.": PROMPT}, NEGATIVE, tokens, print)
    for name in ("prompt.embeds", "negative.embeds"):
        assert embedded[name].shape == (1, tokens, 64) and not embedded[name][:, TOKENS:].any()
        assert torch.equal(embedded[name][:, :TOKENS], whole[name][:, :TOKENS]) and whole[name][:, TOKENS:].any()
    assert torch.equal(embedded["prompt.pooled"], whole["prompt.pooled"])


def test_a_guidance_embedding_is_told(folders):
    network = load_denoiser(folders("flux"), PROMPT, guidance_embedding=1.0).model
    assert network.prompt.guidance.tolist() == [1.0]
    x, usual = torch.ones(1, 16, 8, 8), load_denoiser(folders("flux"), PROMPT).model
    assert usual.prompt.guidance.tolist() == [3.5]
    assert (network(x, torch.zeros(1)) - usual(x, torch.zeros(1))).abs().max() > 1e-3
    with pytest.raises(InputError, match="is not told its guidance, leave out guidance_embedding"):
        load_denoiser(folders("flux schnell"), PROMPT, guidance_embedding=1.0)


ATTENTION = {
    "sd3": ("0.attn.to_q", "0.attn.add_v_proj", "0.attn.to_add_out", "0.attn2.to_out.0", "1.attn.add_q_proj"),
    "flux": ("0.attn.to_q", "0.attn.add_v_proj", "0.attn.to_add_out", "0.attn.to_out.0"),
}
FEED_FORWARD = ("0.ff.net.0.proj", "0.ff.net.2", "0.ff_context.net.0.proj", "0.ff_context.net.2")


@pytest.mark.parametrize("kind", ATTENTION)
def test_adapters_are_where_they_are_asked_for(kind):
    found = {}
    for targets in ("attention", "attention_feed_forward", "all"):
        network = MAKERS[kind]().transformer
        linear = {
            name for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        }
        add_adapters(network, LoRAOptions(rank=1, targets=targets))
        found[targets] = {name for name, layer in network.named_modules() if hasattr(layer, "lora_A")}
    assert found["all"] == linear
    assert {f"transformer_blocks.{name}" for name in ATTENTION[kind]} <= found["attention"]
    assert all(".attn" in name for name in found["attention"])
    more = found["attention_feed_forward"] - found["attention"]
    single = {f"single_transformer_blocks.{n}.proj_{name}" for n in (0, 1) for name in ("mlp", "out")}
    last = {"transformer_blocks.1.ff.net.0.proj", "transformer_blocks.1.ff.net.2"}
    assert more == {f"transformer_blocks.{name}" for name in FEED_FORWARD} | (single if kind == "flux" else last)


def test_a_long_prompt_is_cut_and_said_so(folders, kind):
    said = []
    tokens = read_teacher_config(folders(kind)).network.tokens
    embed_prompts(folders(kind), {"prompt.": "abc " * 20}, NEGATIVE, tokens, said.append)
    assert len(said) == 1 and "of 62 tokens, the text encoder takes 16: the rest is cut" in said[0]
    embed_prompts(folders(kind), {"prompt.": "abc " * 200}, NEGATIVE, tokens, said.append)
    assert f"the text encoder takes {T5_TOKENS[kind]}: the rest" in said[2]


# -- bad input ---------------------------------------------------------------------------------------------------------


def edit(name: str, **changes):
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


TRANSFORMER, VAE, INDEX, SCHEDULER = (
    "transformer/config.json", "vae/config.json", "model_index.json", "scheduler/scheduler_config.json"
)  # fmt: skip
VP = dict(
    _class_name="DDIMScheduler", beta_schedule="linear", beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction"
)
BAD = {
    "other network": (edit(TRANSFORMER, _class_name="DiTTransformer2DModel"), "_class_name is 'DiTTransformer2DModel'"),
    "no transformer": (lambda folder: shutil.rmtree(folder / "transformer"), "transformer/config.json: "),
    "other T5": (edit(INDEX, text_encoder_3=["transformers", "UMT5EncoderModel"]), "of transformers: T5EncoderModel"),
    "CLIP for T5": (edit(INDEX, text_encoder_3=["transformers", "CLIPTextModel"]), "transformers: T5EncoderModel"),
    "lost T5": (lambda folder: shutil.rmtree(folder / "text_encoder_3"), "text_encoder_3: missing"),
    "other tokenizer": (edit(INDEX, tokenizer_3=["transformers", "GPT2Tokenizer"]), "of transformers: T5Tokenizer"),
    "other vae": (edit(VAE, latent_channels=4), "latent_channels is 4, transformer/config.json has in_channels 16"),
    "channels": (edit(TRANSFORMER, out_channels=32), "transformer.out_channels is 32, in_channels 16"),
    "no number": (edit(TRANSFORMER, num_layers="many"), "transformer.num_layers: 'many' is not a size"),
    "unknown key": (edit(TRANSFORMER, gates=True), "gates: is not a key that the installed diffusers knows"),
    "not so": (edit(TRANSFORMER, qk_norm="none of these"), "describes no SD3Transformer2DModel"),
    "too small": (edit(TRANSFORMER, pos_embed_max_size=3), "takes latents of sides up to 6, the data has shape"),
    "diffusion": (edit(SCHEDULER, **VP), "schedule: a transformer of this family is trained on the straight path"),
    "weights": (edit(TRANSFORMER, caption_projection_dim=16), "has shape"),
}


FLUX_BAD = {
    "flux null T5": (edit(INDEX, text_encoder_2=[None, None]), "text_encoder_2: missing"),
    "flux fill": (
        edit(TRANSFORMER, in_channels=384, out_channels=64),
        "transformer.out_channels is 64, in_channels 384",
    ),
    "flux channels": (edit(TRANSFORMER, in_channels=66), "66 in patches of 1 are not those of 2×2 latents"),
    "flux patches": (edit(TRANSFORMER, patch_size=2), "64 in patches of 2 are not those of 2×2 latents"),
    "flux vae": (edit(VAE, latent_channels=4), "latent_channels is 4, transformer/config.json has in_channels 64"),
}


@pytest.mark.parametrize("case", BAD | FLUX_BAD)
def test_bad_folders_are_one_line_and_exit_2(tmp_path, folders, capsys, case):
    folder = Path(shutil.copytree(folders("sd3" if case in BAD else "flux"), tmp_path / "p"))
    damage, expected = (BAD | FLUX_BAD)[case]
    damage(folder)
    assert cli.main(["sample", "--model", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line


def test_a_t5_tokenizer_of_sentencepiece_alone_names_what_reads_it(tmp_path, folders, monkeypatch):
    folder = Path(shutil.copytree(folders("sd3"), tmp_path / "p"))
    (folder / "tokenizer_3/tokenizer.json").unlink()
    (folder / "tokenizer_3/spiece.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match=r"sentencepiece is not installed: run `pip install rdmd_fast\[text\]`"):
        embed_prompts(folder, {"prompt.": PROMPT}, None, TOKENS + T5_TOKENS["sd3"], print)
