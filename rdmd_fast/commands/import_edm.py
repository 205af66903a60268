"""``rdmd import-edm``: an NVIDIA EDM pickle as an export of ours, safetensors and config.json."""

import argparse
from pathlib import Path

from rdmd_fast.errors import InputError
from rdmd_fast.paths import path_to_read, path_to_write

EPILOG = """example:
  rdmd import-edm edm-afhqv2-64x64-uncond-vp.pkl --out teachers/afhqv2
  deepspeed rdmd_fast/train.py --config configs/images/teacher.yaml teacher=teachers/afhqv2 …

The pickle is read as data, nothing in it is executed. Configs take the .pkl itself, too.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "pickle", type=path_to_read, metavar="FILE.pkl", help="an EDM network, as NVIDIA publishes them"
    )
    parser.add_argument(
        "--out", type=path_to_write, required=True, metavar="DIR", help="folder of the export; an older one is replaced"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the export and print one line about it.

    Raises:
        InputError: no EDM network there, or a folder that cannot be written or holds something else.
    """
    from rdmd_fast.model_files.edm_pickle import read_edm_pickle
    from rdmd_fast.model_files.export_format import write_export
    from rdmd_fast.model_files.model_card import Run, model_card

    folder = Path(arguments.out).absolute()
    _check_free(folder)
    config, weights = read_edm_pickle(arguments.pickle)
    try:
        write_export(folder, config, weights, model_card(config, Run({"teacher": arguments.pickle})))
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror or error})") from None
    channels, height, width = config.sample_shape
    parameters = sum(value.numel() for name, value in weights.items() if name.endswith((".weight", ".bias")))
    classes = f"{config.network.label_dim} classes" if config.network.label_dim else "no classes"
    print(
        f"{arguments.out}: {config.network.kind}, {parameters / 1e6:.2f} M parameters, "
        f"{height}×{width} with {channels} channels, {classes}"
    )
    return 0


def _check_free(folder: Path) -> None:
    """Only a teacher's export may be replaced, and write_export replaces the folder as a whole."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file, name a folder")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if found - {"README.md"} not in (set(), {"config.json", "teacher.safetensors"}):
        raise InputError(f"--out {folder}: holds other files ({min(found)}), choose a new or empty folder")
