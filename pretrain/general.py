"""The command line of general distillation, started by launch/general.sh: options, and every check before a run."""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pretrain.recipe import RECIPES, SHAPES, Recipe, did_you_mean, override, parse_student


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; reading it imports no torch."""
    parser = argparse.ArgumentParser(
        prog="deepspeed launch/general.sh", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Distil a small BERT from a big one: embeddings, hidden states and attention scores.",
        epilog="key=value settings: " + ", ".join(Recipe.__dataclass_fields__) + " (see pretrain/recipe.py)")
    parser.add_argument("--shards", default="data/shards", help="folder written by python -m shards.build")
    parser.add_argument("--teacher", default="bert-base-uncased", help="model folder or hub name")
    parser.add_argument("--student", action="append", help=f"{', '.join(SHAPES)}, or NAME:layers=3,hidden=256; may be "
                        "given several times (one teacher pass for all); default: tiny4")
    parser.add_argument("--engine", help="DeepSpeed file; default: ds_configs/ gpu-bf16.json, gpu-fp16.json or cpu.json, "
                        "by device")
    parser.add_argument("--out", default="runs/general", help="folder of the run; the same command goes on in it")
    parser.add_argument("--recipe", default="tinybert", help=f"settings to begin from: {', '.join(RECIPES)}")
    parser.add_argument("--teacher-dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                        help="the teacher's own; auto: 16 bit where the device multiplies it fast")
    parser.add_argument("--fresh", action="store_true", help="begin at step 0; an old run is renamed to OUT.1, OUT.2, ...")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher gives it; LOCAL_RANK is what is read
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings over the recipe's")
    return parser.parse_intermixed_args(argv)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is decided before anything is allocated."""

    options: argparse.Namespace
    recipe: Recipe
    students: dict  # name -> Shape
    layers: dict  # name -> the teacher layer of each student layer
    inits: dict  # name -> teacher or random
    engine_file: Path
    engine: dict
    manifest: object
    teacher_dtype: str
    tokenizer: object


def main(argv: list[str] | None = None) -> None:
    """Run; an error of the user's is one line on rank 0 and exit code 2 on every rank."""
    given = options(argv)
    try:
        plan = resolve(given)
        run(plan)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def resolve(given: argparse.Namespace) -> Plan:
    """Read and check every input, on every rank alike.  ValueError says what to write instead."""
    from transformers.utils import logging

    from pretrain.objective import layer_map
    from shards.block import read_manifest, shard_path

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

    from pretrain.encoder import can_copy, check_tokenizer, model_config
    from pretrain.engine import device_type, read_engine_file

    file = Path(given.engine) if given.engine else default_engine()
    engine = read_engine_file(file, device_type())
    config = model_config(given.teacher)
    tokenizer = check_tokenizer(given.teacher, config, manifest)
    for name, shape in students.items():
        if shape.heads != config.num_attention_heads:
            raise ValueError(f"student {name} has {shape.heads} heads, the teacher {config.num_attention_heads}: attention "
                             f"scores are compared head by head; write --student {name}:heads={config.num_attention_heads}")
    inits = {name: ("teacher" if can_copy(shape, config) else "random") if recipe.init == "auto" else recipe.init
             for name, shape in students.items()}
    return Plan(
        options=given, recipe=recipe.resolved(manifest.rows), students=students, inits=inits, engine=engine,
        layers={name: layer_map(recipe.layer_map, shape.layers, config.num_hidden_layers) for name, shape in students.items()},
        engine_file=file, manifest=manifest, teacher_dtype=teacher_dtype(given.teacher_dtype), tokenizer=tokenizer)


def default_engine() -> Path:
    import torch

    name = "cpu"
    if torch.cuda.is_available():
        name = "gpu-bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "gpu-fp16"
    return Path(__file__).resolve().parent.parent / "ds_configs" / f"{name}.json"


def teacher_dtype(asked: str) -> str:
    """16 bit where the hardware multiplies it: bf16 on newer GPUs and CPUs with AVX512-BF16 or AMX, fp16 on older GPUs."""
    import torch

    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"


def run(plan: Plan) -> None:
    """Join the other ranks, load, go on from the newest good checkpoint, train, export."""
    from pretrain import engine
    from pretrain.train import Run

    ranks = engine.join()
    try:
        Run(plan, ranks).finish()
    finally:
        engine.leave()
