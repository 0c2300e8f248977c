"""A student -> a folder that transformers opens."""

import copy
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertForMaskedLM, BertModel

from pretrain.checkpoint import sync
from pretrain.student import Student


def export(folder: Path, student: Student, weights: dict[str, Tensor], tokenizer) -> None:
    """Write model (with a masked-LM head where it has learned one), tokenizer and, where there is one, projection, whole or not.

    `weights` are the fp32 masters by parameter name.  projection.safetensors holds `weight` (teacher, student width) and `bias`,
    or those of each layer as `0.weight` and on.
    """
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    encoder, projection = ({name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
                           for prefix in ("encoder.", "projection."))
    config = copy.deepcopy(student.encoder.config)
    config._attn_implementation = None  # the tracing attention is known to this project alone
    with torch.device("meta"):
        model = BertForMaskedLM(config) if hasattr(student.encoder, "head") else BertModel(config, add_pooling_layer=False)
    if hasattr(student.encoder, "head"):
        encoder = {name.removeprefix("head.") if name.startswith("head.") else f"bert.{name}": x for name, x in encoder.items()}
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
