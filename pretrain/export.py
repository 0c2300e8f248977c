"""A student -> a folder that transformers opens."""

import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from pretrain.checkpoint import sync
from pretrain.student import Student


def export(folder: Path, student: Student, weights: dict[str, Tensor], tokenizer) -> None:
    """Write model, tokenizer and, where there is one, projection (for the task stage), whole or not at all; training is over.

    `weights` are the fp32 masters by parameter name.  projection.safetensors holds `weight` (teacher, student width), `bias`."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    encoder, projection = ({name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
                           for prefix in ("encoder.", "projection."))
    student.encoder.float().save_pretrained(part, state_dict=encoder)  # config.json tells the type of the module's own weights
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
        shutil.rmtree(old) if old.with_suffix("").exists() else old.rename(old.with_suffix(""))
