"""A student -> a folder that transformers opens."""

import copy
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.encoder import Student


def export(folder: Path, student: Student, weights: dict[str, Tensor], tokenizer) -> None:
    """Write model, tokenizer and projection (from general distillation, for the task stage), whole or not at all.

    `weights` are the fp32 masters by parameter name.  projection.safetensors holds `weight` (teacher width, student
    width) and `bias`, and is there only where the widths differ.
    """
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    encoder = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    config = copy.deepcopy(student.encoder.config)
    config._attn_implementation = None  # the tracing attention is known to this project alone
    config.dtype = torch.float32
    config.architectures = [type(student.encoder).__name__]
    with torch.device("meta"):
        model = type(student.encoder)(config, add_pooling_layer=False)
    model.save_pretrained(part, state_dict=encoder)
    tokenizer.save_pretrained(part)
    projection = {name.removeprefix("projection."): value for name, value in weights.items()
                  if name.startswith("projection.")}
    if projection:
        save_file(projection, part / "projection.safetensors")
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
