"""Text-to-image pipelines of diffusers' own classes as denoisers, beside the library's model and scheduler."""

import json
import logging
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from text_pipelines import NEGATIVE, PROMPT, TOKENS, pipeline, saved

from rdmd_fast import cli, load_denoiser
from rdmd_fast.errors import InputError
from rdmd_fast.model_files.autoencoder import Autoencoder
from rdmd_fast.model_files.prompts import embed_prompts
from rdmd_fast.model_files.teachers import read_teacher, read_teacher_config
from rdmd_fast.networks.diffusers_unet import nearest_level

logging.getLogger("diffusers").setLevel("ERROR")

SCHEDULERS = {
    "epsilon": {},
    "v": {"prediction_type": "v_prediction"},
    "v, zero terminal SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


@pytest.fixture(scope="module", params=[False, True], ids=["sd", "sdxl"])
def xl(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``folders(xl)``: a saved pipeline, which no test may change."""
    made = {}

    def of(xl: bool) -> Path:
        if xl not in made:
            made[xl] = saved(tmp_path_factory.mktemp("pipeline") / "p", xl)
        return made[xl]

    return of


@torch.no_grad()
def library_denoised(made, xl: bool, x, timesteps, guidance: float) -> torch.Tensor:
    """By the library's text encoders, U-Net and scheduler alone; x [N, 4, 8, 8] in the units of its own process."""
    positive, negative, *pooled = made.encode_prompt(
        prompt=PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True,
        negative_prompt=NEGATIVE,
    )  # fmt: skip
    outputs = []
    for number, embeds in enumerate((positive, negative)):
        added = {}
        if xl:
            ids = made._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, 16)
            texts = pooled[number].expand(len(x), -1)
            added = {"added_cond_kwargs": {"text_embeds": texts, "time_ids": ids.expand(len(x), -1)}}
        embeds = embeds.expand(len(x), -1, -1)
        outputs.append(made.unet(x, timesteps, encoder_hidden_states=embeds, **added).sample)
    output = outputs[1] + guidance * (outputs[0] - outputs[1])
    made.scheduler.set_timesteps(made.scheduler.config.num_train_timesteps)
    steps = [made.scheduler.step(output[i : i + 1], int(t), x[i : i + 1]) for i, t in enumerate(timesteps)]
    return torch.cat([step.pred_original_sample for step in steps])


@pytest.mark.parametrize("guidance", [1.0, 0.0, 3.5], ids=["conditional", "unconditional", "guided"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_denoised_is_the_librarys_own(tmp_path, xl, scheduler, guidance):
    made = pipeline(xl, **SCHEDULERS[scheduler])
    made.save_pretrained(tmp_path / "p")
    timesteps = torch.tensor([1, 250, 777, 998])
    alpha_bar = made.scheduler.alphas_cumprod[timesteps].double()
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = library_denoised(made, xl, x, timesteps, guidance)

    denoiser = load_denoiser(tmp_path / "p", PROMPT, NEGATIVE, guidance)
    alpha, sigma = alpha_bar.sqrt(), ((1 - alpha_bar) / alpha_bar).sqrt()
    with torch.no_grad():
        denoised = denoiser((x / alpha.view(-1, 1, 1, 1)).float(), sigma)
    error = (denoised - expected).flatten(1).abs().amax(1) / expected.flatten(1).abs().amax(1)
    assert (error < 1e-5).all()


def test_variant_and_shards_read_alike(tmp_path, folders, xl):
    plain = read_teacher(folders(xl))
    shards = saved(tmp_path / "shards", xl, max_shard_size="200KB")
    half = saved(tmp_path / "half", xl, variant="fp16")
    both = saved(tmp_path / "both", xl, variant="fp16", max_shard_size="200KB")
    assert len(list((shards / "unet").glob("*-of-*.safetensors"))) > 1
    assert list((half / "unet").glob("*.fp16.safetensors")) and list((both / "unet").glob("*index.fp16.json"))
    embedded = embed_prompts(folders(xl), {"prompt.": PROMPT}, NEGATIVE, TOKENS, print)
    for folder in (shards, half, both):
        config, weights = read_teacher(folder)
        config = config.model_copy(update={"pipeline": plain[0].pipeline})  # a path of its own
        assert config == plain[0] and weights.keys() == plain[1].keys()
        assert all(torch.equal(weights[name], plain[1][name]) for name in weights)
        again = embed_prompts(folder, {"prompt.": PROMPT}, NEGATIVE, TOKENS, print)
        assert again.keys() == embedded.keys() and all(torch.equal(again[name], embedded[name]) for name in again)


def test_prompts_without_a_negative_one_are_the_librarys(folders, xl):
    """SDXL takes zeros, not an empty text."""
    embedded = embed_prompts(folders(xl), {"prompt.": PROMPT}, None, TOKENS, print)
    assert (embedded["negative.embeds"] == 0).all() == xl
    assert embedded["prompt.embeds"].shape == (1, TOKENS, 40 if xl else 24)
    assert ("prompt.pooled" in embedded) == xl


def test_a_long_prompt_is_cut_and_said_so(folders, xl):
    said = []
    embedded = embed_prompts(folders(xl), {"prompt.": "abc " * 20}, NEGATIVE, TOKENS, said.append)
    cut = embed_prompts(folders(xl), {"prompt.": "abc " * 8}, NEGATIVE, TOKENS, said.append)
    assert "of 62 tokens, the text encoder takes 16: the rest is cut" in said[0]
    assert torch.equal(embedded["prompt.embeds"], cut["prompt.embeds"])


def test_generator_sigma_picks_the_nearest_level(folders):
    schedule = read_teacher_config(folders(False)).network.schedule
    alpha_bar = pipeline(False).scheduler.alphas_cumprod.double()
    levels = ((1 - alpha_bar) / alpha_bar).sqrt()
    for sigma in (1e-3, 0.5, 1.0, 100.0):
        assert nearest_level(schedule, sigma) == pytest.approx(float(levels[(levels - sigma).abs().argmin()]), rel=1e-4)


# -- bad input ---------------------------------------------------------------------------------------------------------


def edit(name: str, **changes):
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def pickled(part: str, stem: str):
    def change(folder: Path) -> None:
        (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.bin")

    return change


UNET, VAE, INDEX = "unet/config.json", "vae/config.json", "model_index.json"
BAD = {
    "other pipeline": (edit(INDEX, _class_name="SanaPipeline"), "_class_name is 'SanaPipeline', supported: StableDiff"),
    "custom class": (edit(INDEX, _class_name=["pipeline", "Own"]), "_class_name is ['pipeline', 'Own']"),
    "other network": (edit(UNET, _class_name="UNet3DConditionModel"), "_class_name is 'UNet3DConditionModel'"),
    "pickled network": (pickled("unet", "diffusion_pytorch_model"), "a pickle, which is not loaded"),
    "pickled encoder": (pickled("text_encoder", "model"), "diffusers.DiffusionPipeline.from_pretrained"),
    "no encoder": (lambda folder: shutil.rmtree(folder / "text_encoder"), "text_encoder: missing"),
    "null encoder": (edit(INDEX, text_encoder=[None, None]), "text_encoder: missing"),
    "other encoder": (edit(INDEX, text_encoder=["transformers", "GPT2Model"]), "supported of transformers: CLIPText"),
    "foreign encoder": (edit(INDEX, text_encoder=["evil", "CLIPTextModel"]), "supported of transformers: CLIPText"),
    "damaged encoder": (lambda folder: (folder / "text_encoder/model.safetensors").write_text("<"), "cannot be loaded"),
    "no vae": (lambda folder: shutil.rmtree(folder / "vae"), "vae/config.json: missing"),
    "other vae": (edit(VAE, latent_channels=16), "latent_channels is 16, unet/config.json has in_channels 4"),
    "inpainting": (edit(UNET, in_channels=9), "unet.out_channels is 4, in_channels 9"),
    "family": (edit(UNET, addition_embed_type="text_time"), "unet.addition_embed_type: 'text_time'"),
    "classes": (edit(UNET, class_embed_type="timestep"), "unet.class_embed_type: 'timestep' is not supported"),
    "unknown key": (edit(UNET, gates=True), "gates: is not a key that the installed diffusers knows"),
    "blocks": (edit(UNET, down_block_types=["A", "B"]), "describes no UNet2DConditionModel"),
    "no size": (edit(UNET, sample_size=None), "sample_size"),
    "scheduler": (edit("scheduler/scheduler_config.json", _class_name="VQDiffusionScheduler"), "VQDiffusionScheduler"),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "scheduler_config.json: missing"),
    "weights": (edit(UNET, block_out_channels=[16, 24]), "has shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_one_line_and_exit_2(tmp_path, folders, capsys, case):
    folder = Path(shutil.copytree(folders(False), tmp_path / "p"))
    damage, expected = BAD[case]
    damage(folder)
    assert cli.main(["sample", "--model", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line


def test_without_the_library_the_extra_is_named(folders, monkeypatch):
    for name in ("diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # its specification is None then, too
        with pytest.raises(InputError, match=rf"{name} is not installed: run `pip install rdmd_fast\[text\]`"):
            load_denoiser(folders(False), PROMPT)
        monkeypatch.undo()


def test_a_tokenizer_of_sentencepiece_alone_names_what_reads_it(tmp_path, folders, monkeypatch):
    folder = Path(shutil.copytree(folders(False), tmp_path / "p"))
    (folder / "tokenizer/tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer/spiece.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match=r"sentencepiece is not installed: run `pip install rdmd_fast\[text\]`"):
        embed_prompts(folder, {"prompt.": PROMPT}, None, TOKENS, print)


class Hub:
    """Stands in for huggingface_hub: one repository, whose files are copied where their patterns match."""

    errors = SimpleNamespace(LocalEntryNotFoundError=FileNotFoundError)

    def __init__(self, repository: Path, cache: Path):
        self.repository, self.cache, self.online = repository, cache, True
        self.HfApi = lambda: self

    def list_repo_files(self, name, revision=None):
        if not self.online:
            raise ConnectionError("no route")
        if name != "owner/model":
            raise ValueError("404 not found")
        return [path.relative_to(self.repository).as_posix() for path in self.repository.rglob("*") if path.is_file()]

    def snapshot_download(self, name, revision=None, allow_patterns=None, ignore_patterns=(), local_files_only=False):
        target = self.cache / str(revision)
        if local_files_only and not target.is_dir():
            raise FileNotFoundError("not in the cache")
        for file in [] if local_files_only else self.list_repo_files(name):
            allowed, ignored = (any(fnmatch(file, each) for each in them) for them in (allow_patterns, ignore_patterns))
            if allowed and not ignored:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.repository / file, target / file)
        return str(target)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_pipeline_of_the_hub_is_fetched_without_what_is_not_read(tmp_path, folders, monkeypatch, variant):
    repository = saved(tmp_path / "repository", False, variant=variant)
    if variant is None:
        saved(tmp_path / "repository", False, variant="fp16")
    (repository / "model.ckpt").write_bytes(b"a pickle")
    (repository / "unet/diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    hub = Hub(repository, tmp_path / "cache")
    monkeypatch.setattr("rdmd_fast.model_files.hub.require", lambda *_: hub)
    plain, own = read_teacher(repository), read_teacher("hf:owner/model@main")
    assert all(torch.equal(own[1][name], value) for name, value in plain[1].items())
    fetched = {path.name for path in (tmp_path / "cache/main").rglob("*") if path.is_file()}
    assert not fetched & {"model.ckpt", "diffusion_pytorch_model.bin"}
    assert any("fp16" in name for name in fetched) == (variant == "fp16")
    hub.online = False  # what was fetched is enough
    assert read_teacher("hf:owner/model@main")[0] == own[0]
    assert Autoencoder("hf:owner/model@main").channels == 4
    with pytest.raises(InputError, match=r"hf:owner/model: cannot be fetched from the hub \(no route\); name a folder"):
        read_teacher("hf:owner/model")
    hub.online = True
    with pytest.raises(InputError, match=r"hf:owner/other: cannot be fetched from the hub \(404 not found\)"):
        read_teacher("hf:owner/other")
    with pytest.raises(InputError, match=r"hf:model: is no name on the hub, write hf:owner/name"):
        read_teacher("hf:model")


def test_a_prompt_is_refused_for_other_teachers():
    folder = Path(__file__).parents[1] / "networks/fixtures/diffusers_unet"
    with pytest.raises(InputError, match="is no text-to-image pipeline, leave out prompt"):
        load_denoiser(folder, PROMPT)
