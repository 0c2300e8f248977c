"""Everything that is decided and checked before anything is allocated, on every rank alike."""

import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.encoder import check_tokenizer, model_config
from pretrain.engine import device_type, read_engine_file
from pretrain.objective import OF_HEADS, layer_map, term_weights
from pretrain.recipe import Recipe, Shape, override, parse_student
from pretrain.student import first_weights
from shards.block import Manifest, check_there, read_manifest

ENGINES = Path(__file__).resolve().parent.parent / "ds_configs"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, resolved."""
    options: Namespace
    recipe: Recipe
    students: dict  # name -> Shape
    layers: dict  # name -> the teacher layer, or layers, of each student layer
    inits: dict  # name -> teacher, projected or random
    weights: dict  # name -> each term's weight
    engine_file: Path
    engine: dict
    manifest: Manifest
    teacher_dtype: str
    tokenizer: object  # the teacher's, as transformers opened it


def resolve(given: Namespace) -> Plan:
    """Read and check every input, on every rank alike.  ValueError says what to write instead."""
    recipe = override(Recipe(), given.settings)
    shapes = [parse_student(spec) for spec in given.student or ["tiny4"]]
    students = dict(shapes)
    if len(students) < len(shapes):
        raise ValueError(f"--student {' --student '.join(given.student)}: one is given twice; write each once")
    manifest = read_manifest(given.shards)
    if not manifest.rows:
        raise ValueError(f"{given.shards}: no training rows; build from more text")
    for shard in manifest.shards + manifest.held_out:
        check_there(given.shards, shard)  # there, in its full length; its sum is checked when it is read
    engine_file = Path(given.engine or ENGINES / (f"gpu-{fastest_dtype()}.json" if device_type() == "cuda" else "cpu.json"))
    engine = read_engine_file(engine_file, "cuda" if given.gpus else device_type())
    config = model_config(given.teacher)
    tokenizer = check_tokenizer(given.teacher, config, manifest)
    for name, shape in students.items():
        check_heads(name, shape, config, recipe)
    inits = {name: first_weights(name, shape, config, recipe.init) for name, shape in students.items()}
    layers = {name: layer_map(recipe.layer_map, shape.layers, config.num_hidden_layers) for name, shape in students.items()}
    weights = {name: term_weights(layers[name], recipe.weights, recipe.layer_weights) for name in students}
    return Plan(options=given, recipe=recipe.resolved(manifest.rows), students=students, inits=inits, layers=layers,
                weights=weights, engine_file=engine_file, engine=engine, manifest=manifest, tokenizer=tokenizer,
                teacher_dtype=fastest_dtype() if given.teacher_dtype == "auto" else given.teacher_dtype)


def check_heads(name: str, shape: Shape, teacher, recipe: Recipe) -> None:
    """ValueError where attention cannot be compared with the teacher's, head by head or re-split."""
    heads, common = teacher.num_attention_heads, recipe.relation_heads
    if not common and shape.heads != heads and recipe.weights.keys() & {*OF_HEADS}:
        raise ValueError(f"student {name} has {shape.heads} heads, the teacher {heads}: attention is compared head by "
                         f"head; write --student {name}:heads={heads}, or relation_heads=R with R a divisor of both widths")
    if common and (shape.hidden % common or teacher.hidden_size % common):
        raise ValueError(f"relation_heads={common} does not divide both widths, {shape.hidden} of student {name} and "
                         f"{teacher.hidden_size} of the teacher; write such as {math.gcd(shape.hidden, teacher.hidden_size)}")


def fastest_dtype() -> str:
    """16 bit where the hardware multiplies it: bf16 on newer GPUs and CPUs with AVX512-BF16 or AMX, fp16 on older GPUs."""
    if device_type() == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
