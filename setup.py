from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# What a run needs on any machine. torch >= 2.11 and Triton >= 3.6 are the oldest that are supported.
REQUIRED = [
    "torch>=2.11",
    "triton>=3.6; platform_system == 'Linux'",  # the CPU build of torch installs none
    "deepspeed>=0.19.6",  # earlier ZeRO-2 gradients were wrong (microsoft/DeepSpeed#7718)
    "webdataset>=1.0.2",
    "braceexpand>=0.1.7",  # brace patterns of shards; WebDataset depends on it too
    "safetensors>=0.5",
    "numpy>=2.0",
    "pydantic>=2.12",  # typed options; DeepSpeed depends on it too
    "pyyaml>=6.0",  # configs
    "pillow>=11.0",  # images in and out
    "jinja2>=3.1",  # the model card's template; torch depends on it too
    "fsspec>=2024.2",  # shards in object stores; torch depends on it too
    "filelock>=3.30",  # one process at a time fills a cache; torch depends on it too
    "tqdm>=4.66",  # progress bar; DeepSpeed depends on it too
    "ninja>=1.11",  # DeepSpeed builds its CPU and GPU ops with it
    "setuptools>=75",  # torch's extension builder, which DeepSpeed calls, imports it
]

EXTRAS = {
    "eval": [
        "scikit-learn>=1.5",  # real digits, the k-NN judge, the feature classifier
        "scipy>=1.14",  # matrix square roots of Fréchet distances
        "scikit-image>=0.24",  # PSNR and SSIM
        "matplotlib>=3.9",  # figures
        "tensorboard>=2.18",  # curves beside metrics.jsonl
    ],
    "toy": ["POT>=0.9.5"],  # exact optimal transport in 2-D
    "lpips": ["lpips>=0.1.4"],  # only for the LPIPS metric and cost; it needs a torchvision that fits torch
    "diffusers": ["diffusers>=0.30"],  # only for the autoencoder of latents (its networks are read without it)
    "text": [  # only for text-to-image pipelines as teachers
        "diffusers>=0.42",  # their U-Nets and prompt encoding
        "transformers>=5.24",  # their tokenizers and text encoders
        "peft>=0.21",  # low-rank adapters
        "sentencepiece>=0.2",  # tokenizers that hold only spiece.model
        "protobuf>=5.29",  # they are read with it, too
    ],
    "onnx": [  # only for `rdmd export --format onnx`
        "onnx>=1.18",  # the format
        "onnxscript>=0.5",  # torch.onnx writes with it
        "onnxruntime>=1.22",  # runs what was written, to compare it with the generator
    ],
    "wandb": ["wandb>=0.18"],  # only for telemetry.wandb_project
    "bench": ["mosaicml-streaming>=0.8"],  # only to be compared with in benchmarks/test_data.py
    "test": [
        "pytest>=8.3",
        "pytest-benchmark>=5.0",
        "pytest-xdist>=3.6",  # two test files at a time
        "pytest-timeout>=2.3",  # a hung rank fails its test instead of the job
        "hypothesis>=6.100",
        "torchmetrics>=1.4",  # independent FID, KID and PSNR to compare with
        "ruff>=0.9",
        "import-linter>=2.17",  # the layers of rdmd_fast/, see pyproject.toml
    ],
}

setup(
    name="rdmd_fast",
    version="0.1.0",
    description="Fast trainer for one-step unpaired image-to-image translation by diffusion distillation (RDMD)",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["rdmd_fast*"]), "rdmd_fast.kernels"],
    # `kernels` alone is the name of another package on PyPI, so ours is importable only inside rdmd_fast.
    package_dir={"rdmd_fast": "rdmd_fast", "rdmd_fast.kernels": "kernels"},
    package_data={"rdmd_fast.model_files": ["*.j2"], "rdmd_fast.monitoring": ["*.j2", "*.js", "*.css"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["rdmd=rdmd_fast.cli:main"]},
)
