"""A folder of images, of latents or of shards through any method of translation."""

import argparse
import functools
import sys
from pathlib import Path

from rdmd_fast.errors import InputError
from rdmd_fast.paths import path_to_read, path_to_write
from rdmd_fast.processes.devices import pick_devices
from rdmd_fast.translation.methods import Method

EXIT_INTERRUPTED = 128 + 2  # as shells report SIGINT


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that ``translate_folder`` reads."""
    add = functools.partial(parser.add_argument, metavar="FOLDER", required=True)
    add("--input", type=path_to_read, help="a folder of images or latents, or of shards")
    add("--output", type=path_to_write, help="where files of the same names go")
    parser.add_argument(
        "--size", choices=("crop", "resize", "tiles"), default="crop", help="images of another size (crop), see below"
    )
    parser.add_argument("--format", choices=("png", "jpg", "webp"), help="of images (png); jpg and webp at quality 95")
    parser.add_argument(
        "--autoencoder",
        type=path_to_read,
        metavar="DIR",
        help="diffusers AutoencoderKL folder: encodes images, decodes latents",
    )
    parser.add_argument("--skip-existing", action="store_true", help="leave results alone that are there and whole")
    parser.add_argument("--skip-unreadable", action="store_true", help="go on after files that cannot be read")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images or tiles at a time (64)")
    parser.add_argument(
        "--device",
        default="auto",
        help="auto (all GPUs, or the CPU), cpu, cuda, or some GPUs as cuda:0,cuda:1 (auto)",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes on the CPU (1)")


def translate_folder(
    arguments: argparse.Namespace,
    method: Method,
    origin: str,
    shape: tuple[int, ...],
    overlap: float | None = None,
    autoencoder: str | None = None,
) -> int:
    """Translate every sample; names and folder structure are kept, the suffix is that of --format, or .npy.

    Args:
        arguments: of ``add_folder_arguments``.
        origin: the flag that names the method's model, with its value, for messages.
        shape: of the model's samples.
        overlap: of tiles; None for the default.
        autoencoder: folder of the model's own, where --autoencoder names none; pictures then become pictures alone.

    Returns:
        The command's exit status.

    Raises:
        InputError: no such model, nothing to translate, an unreadable sample, or an output that cannot be written.
    """
    from tqdm import tqdm

    from rdmd_fast.translation.workers import work_on

    devices = pick_devices(arguments.device, arguments.workers)
    job, autoencoder = _plan(arguments, method, origin, shape, overlap, autoencoder)
    names = job.samples.names
    left = range(len(names))
    if arguments.skip_existing:
        left = [index for index in left if not job.outputs.are_there(names[index])]
    size = 1 if job.size.blends else job.batch_size  # an image that needs tiles is large, and has a batch of them
    chunks = [left[first : first + size] for first in range(0, len(left), size)]
    skipped: list[str] = []
    with tqdm(total=len(names), initial=len(names) - len(left), unit="img", disable=None) as bar:

        def report(done: int, unreadable: list[str]) -> None:
            skipped.extend(unreadable)
            bar.update(done + len(unreadable))

        try:
            said = work_on(job, devices, chunks, report, autoencoder)
        except KeyboardInterrupt:
            print(f"{arguments.output}: interrupted; the same command with --skip-existing goes on", file=sys.stderr)
            return EXIT_INTERRUPTED
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    notes = [said] * bool(said)
    notes += [f"{len(names) - len(left)} were there"] * (len(left) < len(names))
    notes += [f"{len(skipped)} unreadable ones skipped"] * bool(skipped)
    made = f"{len(left) - len(skipped)} {'images' if job.outputs.images else 'latents'}"
    print(f"{arguments.output}: {', '.join([made, *notes])}")
    return 0


def _plan(
    arguments: argparse.Namespace,
    method: Method,
    origin: str,
    shape: tuple[int, ...],
    overlap: float | None,
    own_autoencoder: str | None,
):
    """(Job, its Autoencoder or None) of the command line; InputError where its parts do not fit."""
    from rdmd_fast.data.sample_names import check_results, refuse_inside
    from rdmd_fast.data.threads import default_workers
    from rdmd_fast.translation.inputs import open_inputs
    from rdmd_fast.translation.outputs import Outputs
    from rdmd_fast.translation.sizes import make_size
    from rdmd_fast.translation.translator import TranslationPlan

    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size}: must be at least 1")
    if len(shape) != 3:
        raise InputError(f"{origin}: is for points of shape {shape}, images are translated here")
    folder = arguments.autoencoder or own_autoencoder
    autoencoder = _open_autoencoder(folder, shape) if folder else None
    image_shape = autoencoder.image_shape(shape) if autoencoder else shape
    size = make_size(arguments.size, *image_shape[1:], overlap)
    refuse_inside(arguments.output, "--output", [("--input", arguments.input)])
    samples = open_inputs(arguments.input, shape, image_shape, arguments.size)
    pictures = bool(autoencoder) or not samples.latents
    if arguments.format and not pictures:
        raise InputError(f"--format {arguments.format}: is for images, --input {arguments.input} holds latents")
    arrays = samples.latents or (arguments.autoencoder and not size.blends)  # the latents of tiles are of no image
    outputs = Outputs(Path(arguments.output), (arguments.format or "png") if pictures else None, bool(arrays))
    check_results(outputs.folder, outputs.files(samples.names), f"--input {arguments.input}")
    flags = arguments.batch_size, arguments.skip_unreadable, default_workers()
    return TranslationPlan(method, folder, samples, size, outputs, *flags), autoencoder


def _open_autoencoder(folder: str, shape: tuple[int, int, int]):
    from rdmd_fast.model_files.autoencoder import Autoencoder

    autoencoder = Autoencoder(folder)
    if autoencoder.channels != shape[0]:
        raise InputError(
            f"--autoencoder {folder}: has latents of {autoencoder.channels} channels, the generator takes {shape[0]}"
        )
    return autoencoder
