"""The students: small BERTs over the teacher's vocabulary, the weights they begin with, and the folders they end in.

`init=projected`: a BERT teacher's embeddings and layers cut to a student's widths and fitted to what it computes on some rows.
Every state x (D) of the teacher stands as P^T x in the student, P (D, d) being the principal components of all states, turned at
random so that LayerNorm finds features that are alike.  Heads keep the directions that their scores, or what they add, are made
of; the intermediate layer the neurons that add most.  Then each matrix in turn is the ridge regression of its target on what the
student itself computes up to there: a layer also makes up for those of the teacher that were left out before it.
Letters: B rows, L positions, N tokens, H heads, D and d features of teacher and student, E and e of their heads."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from pretrain.checkpoint import sync
from pretrain.encoder import ATTENTION, trace
from pretrain.objective import Trace, one_layer_each
from pretrain.recipe import Recipe, Shape

RIDGE = 1e-2  # of the mean variance of what a target is regressed on


class Student(nn.Module):
    """A small BERT, and a projection to the teacher's width where that is another: one of all hidden states, or one of `each`."""

    def __init__(self, encoder: nn.Module, teacher_width: int, each: bool = False):
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder, self.projection = encoder, nn.Identity()
        if width != teacher_width:
            linears = [nn.Linear(width, teacher_width) for _ in range(encoder.config.num_hidden_layers + 1 if each else 1)]
            self.projection = nn.ModuleList(linears) if each else linears[0]

    def forward(self, ids: Tensor, segments: Tensor, real: Tensor | None, words: Tensor | None = None) -> Trace:
        """The trace with hidden states of the teacher's width."""
        traced = trace(self.encoder, ids, segments, real, words)
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
                  rows: tuple[Tensor, Tensor, Tensor] | None = None) -> Student:  # ids, segments, real to fit `projected` to
    """A new student over the teacher's vocabulary and positions; `layers` and `init` as layer_map and first_weights give them."""
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
        encoder = BertForMaskedLM(config) if recipe.mlm or recipe.soft_mlm else BertModel(config, add_pooling_layer=False)
        student = Student(encoder, t.hidden_size, recipe.projection == "each")
        student.projection.apply(student.encoder._init_weights)
        copied = one_layer_each(layers, t.num_hidden_layers)
        if init == "projected":
            project(student.eval().to(teacher.device), teacher, copied, *rows)
    if init == "teacher":
        encoder.base_model.embeddings.load_state_dict(teacher.base_model.embeddings.state_dict())
        for own, n in zip(encoder.base_model.encoder.layer, copied, strict=True):
            own.load_state_dict(teacher.base_model.encoder.layer[n - 1].state_dict())
        if recipe.soft_mlm:
            encoder.cls.load_state_dict(teacher.cls.state_dict())
    if recipe.gradient_checkpointing:
        encoder.activation_checkpointing_enable({"use_reentrant": False})  # the other kind loses the traces' gradients
    return student.train()


def _roots(x_HNE: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of each head's second moments and its inverse, (H, E, E) both."""
    values, vectors = torch.linalg.eigh(x_HNE.mT @ x_HNE / x_HNE.shape[1])
    root = values.clamp(min=1e-6 * values.max().item()).sqrt()[:, None]
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT


def _halves(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors A (H, m, rank), B (H, rank, n) of left @ right."""
    u, s, v = torch.linalg.svd(left @ right, full_matrices=False)
    s = s[:, None, :rank].sqrt()
    return u[:, :, :rank] * s, s.mT * v[:, :rank]


def _fit(linear: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    """Let a Linear be the ridge regression of y (N, out) on x (N, in) -> what it gives for x."""
    centred = x - x.mean(0)
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    linear.weight.copy_(torch.linalg.solve(gram, centred.T @ (y - y.mean(0))).T)
    linear.bias.copy_(y.mean(0) - linear.weight @ x.mean(0))
    return linear(x)


def _fit_norm(norm: nn.LayerNorm, x: Tensor, y: Tensor) -> Tensor:
    """The same for a LayerNorm, feature by feature."""
    norm.reset_parameters()
    plain = norm(x)
    slope = ((plain - plain.mean(0)) * (y - y.mean(0))).mean(0) / plain.var(0, correction=0).clamp(min=1e-12)
    norm.weight.copy_(slope)
    norm.bias.copy_(y.mean(0) - slope * plain.mean(0))
    return norm(x)


def _heads(q: Tensor, k: Tensor, v: Tensor, out_HdE: Tensor, width: int) -> list[Tensor]:
    """Queries, keys, values (H, N, E) cut to `width` features a head, best for their scores and for what they add -> (N, d)."""
    if width < q.shape[-1]:
        (q_root, q_inverse), (k_root, k_inverse), (v_root, v_inverse) = map(_roots, (q, k, v))
        for_q, for_k = _halves(q_root, k_root, width)
        scale = (width / q.shape[-1]) ** 0.25  # scores are divided by the root of the head's width
        q, k = scale * (q @ q_inverse @ for_q), scale * (k @ k_inverse @ for_k.mT)
        v = v @ v_inverse @ _halves(out_HdE, v_root, width)[1].mT
    return [x.transpose(0, 1).flatten(1) for x in (q, k, v)]


@torch.no_grad()
def project(student: nn.Module, teacher: nn.Module, layers: list[int], ids: Tensor, segments: Tensor, real: Tensor) -> None:
    """Fit a Student in place, layer m to layer `layers[m - 1]` (from 1) of a float32 teacher; the turn is torch's generator's."""
    traced, encoder, mask = trace(teacher, ids, segments, real), student.encoder.base_model, real[:, None, None, :]
    teacher = teacher.base_model
    width, states = encoder.config.hidden_size, torch.cat([traced.hidden[n][real] for n in (0, *layers)])
    p_Dd = torch.eye(width, device=states.device)
    if width < states.shape[1]:
        turn = torch.linalg.qr(torch.randn(width, width)).Q.to(states)
        p_Dd = torch.linalg.eigh(states.T @ states).eigenvectors.flip(1)[:, :width] @ turn
    for name, table in encoder.embeddings.named_children():
        if name.endswith("_embeddings"):
            table.weight.copy_(getattr(teacher.embeddings, name).weight @ p_Dd)
    summed = encoder.embeddings.word_embeddings(ids) + encoder.embeddings.token_type_embeddings(segments)
    summed = summed + encoder.embeddings.position_embeddings.weight[:ids.shape[1]]
    x = _fit_norm(encoder.embeddings.LayerNorm, summed[real], traced.hidden[0][real] @ p_Dd)
    for own, n in zip(encoder.encoder.layer, layers, strict=True):
        its, before = teacher.encoder.layer[n - 1], traced.hidden[n - 1]  # what the teacher computes, step by step
        attended = (its.attention.output.dense(its.attention.self(before, mask)[0]) + before)[real]
        between = its.attention.output.LayerNorm(attended)
        neurons, act = its.intermediate.dense(between), its.intermediate.intermediate_act_fn
        parts = [getattr(traced, part)[n - 1].transpose(1, 2)[real].transpose(0, 1) for part in ("queries", "keys", "values")]
        out_HdE = p_Dd.T @ its.attention.output.dense.weight.unflatten(1, (len(parts[0]), -1)).transpose(0, 1)
        mine = own.attention.self
        for linear, y in zip((mine.query, mine.key, mine.value), _heads(*parts, out_HdE, width // len(parts[0])), strict=True):
            _fit(linear, x, y)
        x_BLd = x.new_zeros(*real.shape, width).masked_scatter(real[..., None], x)
        x = x + _fit(own.attention.output.dense, mine(x_BLd, mask)[0][real], attended @ p_Dd - x)
        x = _fit_norm(own.attention.output.LayerNorm, x, between @ p_Dd)
        adds = act(neurons).var(0) * (p_Dd.T @ its.output.dense.weight).square().sum(0)
        kept = adds.argsort(descending=True)[:encoder.config.intermediate_size].sort().values
        inside = act(_fit(own.intermediate.dense, x, neurons[:, kept]))
        x = x + _fit(own.output.dense, inside, (its.output.dense(act(neurons)) + between) @ p_Dd - x)
        x = _fit_norm(own.output.LayerNorm, x, traced.hidden[n][real] @ p_Dd)
    for linear in student.projection.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.copy_(p_Dd)
            linear.bias.zero_()


def export(folder: Path, student: Student, weights: dict[str, Tensor], tokenizer) -> None:
    """Write model, tokenizer and, where there is one, projection, whole or not at all; `weights`: fp32, by parameter name."""
    part, old = (folder.with_name(f"{folder.name}.{kind}") for kind in ("part", "old"))
    for left in (part, old):  # by a run that was killed; the same command exports again
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    encoder, projection = ({name.removeprefix(of): value for name, value in weights.items() if name.startswith(of)}
                           for of in ("encoder.", "projection."))
    student.encoder.float().save_pretrained(part, state_dict=encoder)  # config.json tells the type of the module's own weights
    tokenizer.save_pretrained(part)
    if projection:
        save_file(projection, part / "projection.safetensors")  # weight (teacher's, student's width), bias; each: 0.weight, ...
    sync(part, *part.rglob("*"))
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
