"""Teachers from anywhere: exports of the teacher stage, NVIDIA EDM pickles, folders and pipelines of diffusers."""

from pathlib import Path

import torch

from rdmd_fast.errors import InputError
from rdmd_fast.model_files.diffusers_folder import is_diffusers_folder, read_diffusers, read_diffusers_config
from rdmd_fast.model_files.export_format import ExportConfig, read_export, read_export_config
from rdmd_fast.model_files.hub import local_folder
from rdmd_fast.model_files.text_pipeline import is_text_pipeline, read_text_pipeline, read_text_pipeline_config


def read_teacher(spec: str | Path) -> tuple[ExportConfig, dict[str, torch.Tensor]]:
    """Configuration and weights (float32, CPU) of a teacher; what ``spec`` names is told by what is there.

    Args:
        spec: an export folder, an NVIDIA EDM pickle, or a diffusers folder (a pipeline's or its network's). The
            network of a text-to-image pipeline lacks its prompts (see ``text_pipeline.with_prompts``), and an adapter
            over one the pipeline's weights (``adapted.whole``). A pipeline may be named as on the hub: hf:owner/name.

    Raises:
        InputError: there is no teacher, or one that cannot be read.
    """
    path = local_folder(spec)
    if path.is_file():
        from rdmd_fast.model_files.edm_pickle import read_edm_pickle

        return read_edm_pickle(path)
    if not path.is_dir():
        raise InputError(f"teacher {spec}: not there, name a RUN/export folder, an EDM .pkl or a diffusers folder")
    if is_text_pipeline(path):
        return read_text_pipeline(path)
    if is_diffusers_folder(path):
        return read_diffusers(path)
    return read_export(path, "teacher")


def read_teacher_config(spec: str | Path) -> ExportConfig:
    """The configuration alone; errors as ``read_teacher``."""
    path = local_folder(spec)
    if path.is_dir():
        if is_text_pipeline(path):
            return read_text_pipeline_config(path)
        return read_diffusers_config(path) if is_diffusers_folder(path) else read_export_config(path, "teacher")
    return read_teacher(path)[0]
