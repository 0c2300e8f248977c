"""Teacher and students from transformers, and the trace each one hands out.

No hooks and no copied BERT: an attention function registered with transformers runs SDPA and returns the
projected queries and keys in the place of the attention weights, and `output_attentions=True` collects them.

Letters: B rows, L positions, D features, H heads, d features of a head.
"""

import copy
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel, BertConfig, BertModel

from pretrain.recipe import Shape
from shards.tokenizer import auto_tokenizer, fingerprint

ATTENTION = "trace"  # the name under which transformers knows `_attend`
TEACHERS = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")  # every layer attends to all real tokens
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


@dataclass(frozen=True)
class Trace:
    """What one encoder computed.  hidden[0] is the embedding output, hidden[i] the output of layer i."""

    hidden: tuple[Tensor, ...]  # layers + 1 of (B, L, D)
    queries: tuple[Tensor, ...]  # layers of (B, H, L, d), projected, not scaled
    keys: tuple[Tensor, ...]  # layers of (B, H, L, d)


def _attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_):
    """SDPA that gives (output (B, L, H, d), [query, key]); a fallback that would build L x L is an error on CUDA."""
    traced = [query, key]
    width = query.shape[-1]
    scaling = width**-0.5 if scaling is None else scaling
    if query.is_cuda:
        # Fused kernels want head widths divisible by 8 in 16 bit (tiny4 has 26); zeros change neither scores nor values.
        if width % 8:
            query, key, value = (F.pad(x, (0, -width % 8)) for x in (query, key, value))
        with sdpa_kernel(FUSED):
            out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    else:
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    return out[..., :width].transpose(1, 2), traced


def _key_mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, attention_mask=None, **_):
    """(B, 1, 1, L) boolean, True where a key is real; None without padding.  transformers' own is (B, 1, L, L)."""
    return None if attention_mask is None else attention_mask[:, None, None, :].bool()


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _key_mask)  # without it padding is ignored in silence


def trace(model: nn.Module, ids: Tensor, segments: Tensor, real: Tensor | None) -> Trace:
    """Run an encoder on ids (B, L) with segments (B, L); `real` (B, L) is True on tokens, None without padding."""
    extra = {"token_type_ids": segments} if getattr(model.config, "type_vocab_size", 0) >= 2 else {}
    out = model(input_ids=ids, attention_mask=real, output_hidden_states=True, output_attentions=True, **extra)
    pairs = [pair for pair in out.attentions or () if isinstance(pair, list)]  # a tensor: attention weights
    layers = model.config.num_hidden_layers
    if len(pairs) != layers or len(out.hidden_states) != layers + 1:
        raise ValueError(
            f"{type(model).__name__}: gave {len(pairs)} attention traces and {len(out.hidden_states)} hidden states for "
            f"{layers} layers; its attention cannot be traced. Use a BERT, RoBERTa, XLM-R, ELECTRA or DistilBERT model"
        )
    return Trace(tuple(out.hidden_states), tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))


@torch.no_grad()
def check_trace(model: nn.Module) -> None:
    """Run one small padded batch: every layer must be traced, and padding must not reach the real tokens."""
    device = next(model.parameters()).device
    ids = torch.arange(10, 18, device=device).remainder(model.config.vocab_size).repeat(2, 1)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, 5:] = False
    mode = model.training
    model.eval()
    padded = trace(model, ids, torch.zeros_like(ids), real)
    alone = trace(model, ids[1:, :5], torch.zeros_like(ids[1:, :5]), None)
    model.train(mode)
    gap = (padded.hidden[-1][1, :5] - alone.hidden[-1][0]).abs().max().item()
    scale = alone.hidden[-1].abs().max().item()
    # 2^-5 of the largest value: far above bf16 rounding over some layers, far below what ignored padding does.
    if gap > scale / 32:
        raise ValueError(f"{type(model).__name__}: padding changes its output by {gap:.3g}; its mask cannot be used here")


def model_config(name: str):
    """The config of a model folder or hub name.  ValueError in one line where there is none."""
    if ("/" in name or "\\" in name or name.startswith(".")) and name.count("/") > 1 and not Path(name).is_dir():
        raise ValueError(f"model {name!r}: no such folder. Give a folder with config.json and model.safetensors, "
                         "or a hub name such as bert-base-uncased")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            raise ValueError(f"model {name!r}: the folder holds no model that transformers opens "
                             f"({_first_line(error)}); it needs config.json and model.safetensors") from error
        raise ValueError(
            f"model {name!r}: not a folder here, and the hub did not give it ({_first_line(error)}). Give a folder, or "
            f"fetch it where there is a network: python -c \"from transformers import AutoModel, AutoTokenizer; "
            f"[c.from_pretrained('{name}').save_pretrained('FOLDER') for c in (AutoModel, AutoTokenizer)]\""
        ) from error


def check_tokenizer(name: str, config, manifest):
    """The teacher's tokenizer, which must be the one that the shards were built with.  ValueError names both."""
    tokenizer = auto_tokenizer(name)
    built = manifest.tokenizer
    if fingerprint(tokenizer) != built["fingerprint"]:
        raise ValueError(
            f"the shards were built with the tokenizer of {built['name']} ({built['vocab_size']:,} ids), the teacher "
            f"{name} has another ({len(tokenizer):,} ids): its embeddings would not fit. Build shards with "
            f"--tokenizer {name}, or take the teacher that belongs to the shards")
    if built["vocab_size"] > config.vocab_size:
        raise ValueError(f"teacher {name}: {config.vocab_size:,} embeddings for a tokenizer of {built['vocab_size']:,} ids")
    longest = getattr(config, "max_position_embeddings", manifest.row_length)
    if "roberta" in config.model_type:
        longest -= config.pad_token_id + 1  # their positions begin after the padding's
    if manifest.row_length > longest:
        raise ValueError(f"the shards hold rows of up to {manifest.row_length} tokens, the teacher {name} reads {longest}; "
                         f"build them with --row-length {longest}")
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def load_teacher(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A pre-trained encoder without heads, in eval mode, without gradients."""
    config = copy.deepcopy(model_config(name))  # the attention's name is kept on the config: never share one
    if config.model_type not in TEACHERS:  # ModernBERT's windows, for one, want another mask, and would be wrong in silence
        raise ValueError(f"teacher {name!r}: is a {config.model_type} model; its attention cannot be traced here (there are "
                         f"{', '.join(TEACHERS)})")
    pooler = {"add_pooling_layer": False} if config.model_type in ("bert", "roberta", "xlm-roberta") else {}
    try:
        model, found = AutoModel.from_pretrained(name, config=config, dtype=dtype, attn_implementation=ATTENTION,
                                                 output_loading_info=True, **pooler)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"teacher {name!r}: its weights do not open ({_first_line(error)})") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"teacher {name!r}: its file lacks {len(missing)} tensors that its config.json asks for, such as "
                         f"{missing[0]}; take the config and the weights of one model")
    model.eval().requires_grad_(False).to(device)
    check_trace(model)
    return model


class Student(nn.Module):
    """A small BERT, and the projection of its hidden states to the teacher's width where the widths differ.

    One shared Linear for the embedding output and every layer, as the reference code has it.
    """

    def __init__(self, encoder: BertModel, teacher_width: int):
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        self.projection = nn.Linear(width, teacher_width) if width != teacher_width else None

    def forward(self, ids: Tensor, segments: Tensor, real: Tensor | None) -> Trace:
        """The trace with hidden states of the teacher's width."""
        traced = trace(self.encoder, ids, segments, real)
        if self.projection is None:
            return traced
        return Trace(tuple(self.projection(h) for h in traced.hidden), traced.queries, traced.keys)


def student_config(shape: Shape, teacher, dropout: float = 0.0) -> BertConfig:
    """A BERT of this shape over the teacher's vocabulary and positions."""
    return BertConfig(
        vocab_size=teacher.vocab_size,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        hidden_act=getattr(teacher, "hidden_act", "gelu"),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        max_position_embeddings=teacher.max_position_embeddings,
        type_vocab_size=max(2, getattr(teacher, "type_vocab_size", 2)),
        layer_norm_eps=getattr(teacher, "layer_norm_eps", 1e-12),
        pad_token_id=teacher.pad_token_id or 0,
    )


def can_copy(shape: Shape, teacher) -> bool:
    """Whether embeddings and layers of the teacher fit this student as they are."""
    return (teacher.model_type == "bert" and shape.layers <= teacher.num_hidden_layers
            and (shape.hidden, shape.intermediate, shape.heads)
            == (teacher.hidden_size, teacher.intermediate_size, teacher.num_attention_heads))


def check_copy(name: str, shape: Shape, t) -> None:
    """ValueError where `can_copy` does not hold."""
    if not can_copy(shape, t):
        raise ValueError(f"student {name}: init=teacher needs the teacher's shape ({t.model_type}, hidden={t.hidden_size}, "
                         f"intermediate={getattr(t, 'intermediate_size', '?')}, heads={t.num_attention_heads}), this "
                         f"student has {shape}; write init=random")


def build_student(name: str, shape: Shape, teacher: nn.Module, layers: list[int], *, init: str, seed: int,
                  dropout: float = 0.0) -> Student:
    """A new student.  `layers[m-1]` is the teacher layer (from 1) that student layer m imitates.

    `init` is `random` or `teacher` (embeddings and the mapped layers copied).  Random weights are BERT's own
    N(0, 0.02), drawn from (seed, name), so a student has the same ones alone and beside others.
    """
    config = student_config(shape, teacher.config, dropout)
    config._attn_implementation = ATTENTION
    draw = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw)
        student = Student(BertModel(config, add_pooling_layer=False), teacher.config.hidden_size)
        if student.projection is not None:
            nn.init.normal_(student.projection.weight, std=config.initializer_range)
            nn.init.zeros_(student.projection.bias)
    if init == "teacher":
        check_copy(name, shape, teacher.config)
        source = {key: value.float() for key, value in teacher.state_dict().items()}
        wanted = student.encoder.state_dict()
        for key in wanted:
            match = re.match(r"encoder\.layer\.(\d+)\.(.*)", key)
            wanted[key] = source[f"encoder.layer.{layers[int(match[1])] - 1}.{match[2]}" if match else key]
        student.encoder.load_state_dict(wanted)
    return student
