"""``rdmd translate``: a folder of images, of latents or of shards through a trained generator.

``translate_folder`` takes any other method through the same files, sizes and devices.
"""

import argparse

from rdmd_fast.paths import path_to_read
from rdmd_fast.translation.folder import add_folder_arguments, translate_folder
from rdmd_fast.translation.methods import OneStep

EPILOG = """examples:
  rdmd translate --model runs/digits_2to3/export --input shards/digits/2/test --output out/threes
  rdmd translate --model runs/cat2wild/export --input photos/cats --output out/wild --size resize
  rdmd translate --model runs/summer2winter/export --input photos/valley --output out/winter --size tiles --format jpg
  rdmd translate --model runs/digits_2to3_any_weight/export --transport-weight 0.3 --input … --output …
  rdmd translate --model runs/cats2lions/export --input photos/cats --output out/lions     of a text-to-image pipeline
  rdmd translate --model runs/latent_cat2wild/export --autoencoder sd-vae --input photos/cats --output out/wild

--size crop takes the central square to the generator's resolution, as `rdmd pack` does; resize takes the whole image
there and the result back to the image's own size; tiles go over the image at its own scale and are blended.
Names and folders are kept. Latents, from shards or a folder of .npy arrays [C, H, W], become .npy files. With
--autoencoder images are encoded first, and each .npy has its decoded picture beside it (tiles: the picture alone).
A generator that comes from a text-to-image pipeline finds that pipeline's autoencoder itself; pictures become pictures.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "--model", type=path_to_read, required=True, metavar="DIR", help="RUN/export or RUN/best of the rdmd stage"
    )
    add_folder_arguments(parser)
    parser.add_argument(
        "--overlap", type=float, metavar="SHARE", help="tiles: least share of a side that neighbours share (0.25)"
    )
    parser.add_argument(
        "--transport-weight",
        type=float,
        metavar="λ",
        help="for a generator of a range of λ: more keeps more of the input (the range's geometric mean)",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="the generator's (fp32)")


def run(arguments: argparse.Namespace) -> int:
    """Translate every sample by a generator; errors as ``translate_folder``."""
    from rdmd_fast.model_files.export_format import read_export_config
    from rdmd_fast.model_files.models import condition_inputs

    config = read_export_config(arguments.model, "generator")
    condition_inputs(config, arguments.transport_weight, 1)  # names a λ that it does not take ahead of any work
    method = OneStep(arguments.model, arguments.dtype, arguments.transport_weight)
    return translate_folder(
        arguments, method, f"--model {arguments.model}", tuple(config.sample_shape), arguments.overlap,
        config.autoencoder,
    )  # fmt: skip
