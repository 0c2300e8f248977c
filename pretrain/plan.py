"""Everything that is decided and checked before anything is allocated, on every rank alike."""

import math
from argparse import Namespace
from pathlib import Path

import torch

from pretrain.encoder import check_tokenizer, model_config
from pretrain.engine import device_type, read_engine_file
from pretrain.objective import OF_HEADS, layer_map, term_weights
from pretrain.recipe import Recipe, override, parse_student
from pretrain.student import first_weights
from shards.block import check_there, read_manifest

ENGINES = Path(__file__).resolve().parent.parent / "ds_configs"


class Plan:
    """A run, resolved: every input read and checked.  ValueError says what to write instead."""

    def __init__(self, given: Namespace):
        recipe, shapes = override(Recipe(), given.settings), [parse_student(spec) for spec in given.student or ["tiny4"]]
        self.options, self.students = given, dict(shapes)
        if len(self.students) < len(shapes):
            raise ValueError(f"--student {' --student '.join(given.student)}: one is given twice; write each once")
        self.manifests = {folder: read_manifest(folder) for folder in given.shards or ["data/shards"]}
        for folder, manifest in self.manifests.items():
            if not manifest.rows:
                raise ValueError(f"{folder}: no training rows; build from more text")
            for shard in manifest.shards + manifest.held_out:
                check_there(folder, shard)  # there, in its full length; its sum is checked when it is read
        default = ENGINES / (f"gpu-{fastest_dtype()}.json" if device_type() == "cuda" else "cpu.json")
        self.engine_file = Path(given.engine or default)
        self.engine = read_engine_file(self.engine_file, "cuda" if given.gpus else device_type())
        config = model_config(given.teacher)
        self.tokenizer = [check_tokenizer(given.teacher, config, manifest) for manifest in self.manifests.values()][0]
        heads, common, width = config.num_attention_heads, recipe.relation_heads, config.hidden_size
        self.inits, self.layers, self.weights = {}, {}, {}  # by a student's name
        for name, shape in self.students.items():
            if not common and shape.heads != heads and recipe.weights.keys() & {*OF_HEADS}:
                raise ValueError(f"student {name} has {shape.heads} heads, the teacher {heads}: attention is compared head by "
                                 f"head; write --student {name}:heads={heads}, or relation_heads=R, a divisor of both widths")
            if common and (shape.hidden % common or width % common):
                raise ValueError(f"relation_heads={common} does not divide both widths, {shape.hidden} of student {name} and "
                                 f"{width} of the teacher; write such as {math.gcd(shape.hidden, width)}")
            self.inits[name] = first_weights(name, shape, config, recipe.init)
            self.layers[name] = layer_map(recipe.layer_map, shape.layers, config.num_hidden_layers)
            self.weights[name] = term_weights(self.layers[name], recipe.weights, recipe.layer_weights)
        self.recipe, self.steps = recipe.resolved([manifest.rows for manifest in self.manifests.values()])  # steps of each
        self.teacher_dtype = fastest_dtype() if given.teacher_dtype == "auto" else given.teacher_dtype


def fastest_dtype() -> str:
    """16 bit where the hardware multiplies it: bf16 on newer GPUs and CPUs with AVX512-BF16 or AMX, fp16 on older GPUs."""
    if device_type() == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
