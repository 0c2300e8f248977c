"""The students: small BERTs over the teacher's vocabulary, the weights they begin with, and the folders they end in."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from pretrain.checkpoint import sync
from pretrain.encoder import ATTENTION, trace
from pretrain.objective import Trace, one_layer_each
from pretrain.projected import project
from pretrain.recipe import Recipe, Shape


class Student(nn.Module):
    """A small BERT, and a projection to the teacher's width, where it is another: of all hidden states, or one for `each`."""

    def __init__(self, encoder: BertModel, teacher_width: int, each: bool = False):
        super().__init__()
        width, count = encoder.config.hidden_size, encoder.config.num_hidden_layers + 1
        self.encoder, self.projection = encoder, None
        if width != teacher_width:
            linears = [nn.Linear(width, teacher_width) for _ in range(count if each else 1)]
            self.projection = nn.ModuleList(linears) if each else linears[0]

    def forward(self, ids: Tensor, segments: Tensor, real: Tensor | None) -> Trace:
        """The trace with hidden states of the teacher's width."""
        traced = trace(self.encoder, ids, segments, real)
        if self.projection is None:
            return traced
        linears = self.projection if isinstance(self.projection, nn.ModuleList) else [self.projection] * len(traced.hidden)
        return replace(traced, hidden=tuple(linear(h) for linear, h in zip(linears, traced.hidden, strict=True)))


def first_weights(name: str, shape: Shape, teacher, wanted: str) -> str:
    """What `init` comes to: teacher, projected or random.  ValueError where the teacher's config does not allow it."""
    own, its = (shape.hidden, shape.intermediate), (teacher.hidden_size, teacher.intermediate_size)
    fits = (teacher.model_type == "bert" and shape.heads == teacher.num_attention_heads
            and shape.layers <= teacher.num_hidden_layers and own[0] <= its[0] and own[1] <= its[1])
    if wanted == "auto":  # copied layers are best only where none is left out: a fitted one makes up for those before it
        whole = own == its and shape.layers == teacher.num_hidden_layers
        return "random" if not fits else "teacher" if whole else "projected"
    if wanted != "random" and not fits or wanted == "teacher" and own != its:
        as_wide = "of the same widths" if wanted == "teacher" else "at least as wide"
        raise ValueError(f"student {name}: init={wanted} needs a BERT teacher {as_wide}, of as many heads; write init=auto")
    return wanted


def build_student(name: str, shape: Shape, teacher: nn.Module, layers: list, init: str, recipe: Recipe,
                  rows: tuple[Tensor, Tensor, Tensor] | None = None) -> Student:
    """A new student over the teacher's vocabulary and positions; `layers` and `init` are what layer_map and first_weights give.

    Random weights are BERT's own, drawn from (seed, name): the same alone and beside others.  `projected` ones are fitted to what
    the teacher computes on `rows`: ids, segments, real."""
    t = teacher.config
    config = BertConfig(
        vocab_size=t.vocab_size, hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate, hidden_act=getattr(t, "hidden_act", "gelu"), hidden_dropout_prob=recipe.dropout,
        attention_probs_dropout_prob=recipe.dropout, max_position_embeddings=t.max_position_embeddings,
        type_vocab_size=max(2, getattr(t, "type_vocab_size", 2)), layer_norm_eps=getattr(t, "layer_norm_eps", 1e-12),
        pad_token_id=t.pad_token_id or 0)
    config._attn_implementation = ATTENTION
    draw = int.from_bytes(hashlib.sha256(f"{recipe.seed} {name}".encode()).digest()[:8], "big") >> 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw)
        encoder = BertModel(config, add_pooling_layer=False)
        student = Student(encoder, t.hidden_size, recipe.projection == "each")
        if student.projection is not None:
            student.projection.apply(student.encoder._init_weights)
        copied = one_layer_each(layers, t.num_hidden_layers)
        if init == "projected":
            project(student.eval().to(teacher.device), teacher, copied, *rows)
    if init == "teacher":
        encoder.embeddings.load_state_dict(teacher.embeddings.state_dict())
        for own, n in zip(encoder.encoder.layer, copied, strict=True):
            own.load_state_dict(teacher.encoder.layer[n - 1].state_dict())
    if recipe.gradient_checkpointing:
        encoder.activation_checkpointing_enable({"use_reentrant": False})  # the other kind loses the traces' gradients
    return student.train()


def export(folder: Path, student: Student, weights: dict[str, Tensor], tokenizer) -> None:
    """Write model, tokenizer and, where there is one, projection (for the task stage), whole or not at all; training is over.

    `weights` are the fp32 masters by parameter name.  projection.safetensors holds `weight` (teacher, student width), `bias`,
    or those of each state as `0.weight` and on."""
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
