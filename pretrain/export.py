"""A student -> a folder that transformers opens."""

import copy
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertModel

from pretrain.checkpoint import sync
from pretrain.student import Student


def export(folder: Path, student: Student, weights: dict[str, Tensor], tokenizer) -> None:
    """Write model, tokenizer and, where there is one, projection (for the task stage), whole or not at all.

    `weights` are the fp32 masters by parameter name.  projection.safetensors holds `weight` (teacher, student width), `bias`."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    encoder, projection = ({name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
                           for prefix in ("encoder.", "projection."))
    config = copy.deepcopy(student.encoder.config)
    config._attn_implementation = None  # the tracing attention is known to this project alone
    with torch.device("meta"):
        model = BertModel(config, add_pooling_layer=False)
    model.save_pretrained(part, state_dict=encoder)
    tokenizer.save_pretrained(part)
    if projection:
        save_file(projection, part / "projection.safetensors")
    sync(part, *part.rglob("*"))
    old = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(students: Path) -> None:
    """After a kill between the two renames of `export`: the old folder gets its name back."""
    for old in students.glob("*.old"):
        if old.with_suffix("").exists():
            shutil.rmtree(old)
        else:
            old.rename(old.with_suffix(""))
