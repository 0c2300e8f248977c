"""Everything that is decided and checked before anything is allocated, on every rank alike."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging

from pretrain.encoder import can_copy, check_copy, check_tokenizer, model_config
from pretrain.engine import device_type, read_engine_file
from pretrain.objective import layer_map
from pretrain.recipe import RECIPES, Recipe, did_you_mean, override, parse_student
from shards.block import Manifest, read_manifest, shard_path


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, resolved."""

    options: Namespace
    recipe: Recipe
    students: dict  # name -> Shape
    layers: dict  # name -> the teacher layer of each student layer
    inits: dict  # name -> teacher or random
    engine_file: Path
    engine: dict
    manifest: Manifest
    teacher_dtype: str
    tokenizer: object  # the teacher's, as transformers opened it


def resolve(given: Namespace) -> Plan:
    """Read and check every input, on every rank alike.  ValueError says what to write instead."""
    logging.set_verbosity_error()  # it reports at length on a pooler that is not used here
    logging.disable_progress_bar()
    if given.recipe not in RECIPES:
        raise ValueError(f"unknown recipe {given.recipe!r}{did_you_mean(given.recipe, RECIPES)} (there are {', '.join(RECIPES)})")
    recipe = override(RECIPES[given.recipe], given.settings)
    students = {}
    for spec in given.student or ["tiny4"]:
        name, shape = parse_student(spec)
        if name in students:
            raise ValueError(f"student {name} is given twice")
        students[name] = shape
    manifest = read_manifest(Path(given.shards))
    if not manifest.rows:
        raise ValueError(f"{given.shards}: no training rows; build from more text")
    for shard in manifest.shards + manifest.held_out:
        shard_path(Path(given.shards), shard)  # there, in its full length; its sum is checked when it is read

    file = Path(given.engine) if given.engine else default_engine()
    engine = read_engine_file(file, device_type())
    config = model_config(given.teacher)
    tokenizer = check_tokenizer(given.teacher, config, manifest)
    for name, shape in students.items():
        if shape.heads != config.num_attention_heads:
            raise ValueError(f"student {name} has {shape.heads} heads, the teacher {config.num_attention_heads}: attention "
                             f"scores are compared head by head; write --student {name}:heads={config.num_attention_heads}")
        if recipe.init == "teacher":
            check_copy(name, shape, config)
    inits = {name: ("teacher" if can_copy(shape, config) else "random") if recipe.init == "auto" else recipe.init
             for name, shape in students.items()}
    return Plan(
        options=given, recipe=recipe.resolved(manifest.rows), students=students, inits=inits, engine=engine,
        layers={name: layer_map(recipe.layer_map, shape.layers, config.num_hidden_layers) for name, shape in students.items()},
        engine_file=file, manifest=manifest, teacher_dtype=teacher_dtype(given.teacher_dtype), tokenizer=tokenizer)


def default_engine() -> Path:
    name = "cpu"
    if device_type() == "cuda":
        name = "gpu-bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "gpu-fp16"
    return Path(__file__).resolve().parent.parent / "ds_configs" / f"{name}.json"


def teacher_dtype(asked: str) -> str:
    """16 bit where the hardware multiplies it: bf16 on newer GPUs and CPUs with AVX512-BF16 or AMX, fp16 on older GPUs."""
    if asked != "auto":
        return asked
    if device_type() == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"
