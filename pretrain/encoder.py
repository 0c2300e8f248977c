"""Encoders from transformers, the trace each one hands out, and the teacher.

No hooks and no copied BERT: an attention function registered with transformers runs SDPA and returns the
projected queries and keys in the place of the attention weights, and `output_attentions=True` collects them.

Letters: B rows, L positions, D features, H heads, d features of a head."""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel
from transformers.masking_utils import sdpa_mask

from pretrain.objective import Trace
from shards.tokenizer import auto_tokenizer, fingerprint

ATTENTION = "trace"  # the name under which transformers knows `_attend`
TEACHERS = ("bert", "roberta", "xlm-roberta", "electra", "albert", "distilbert", "modernbert")
POOLED = ("bert", "roberta", "xlm-roberta", "albert")  # these would make a pooler, which nothing here reads
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def _attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_):
    """SDPA that gives (output (B, L, H, d), [query, key, value]); a fallback that would build L x L is an error on CUDA."""
    traced, width = [query, key, value], query.shape[-1]
    scaling = width**-0.5 if scaling is None else scaling
    if query.is_cuda and width % 8:
        # Fused kernels want head widths divisible by 8 in 16 bit (tiny4 has 26); zeros change neither scores nor values.
        query, key, value = (F.pad(x, (0, -width % 8)) for x in (query, key, value))
    with sdpa_kernel(FUSED) if query.is_cuda else nullcontext():
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    return out[..., :width].transpose(1, 2), traced


def _mask(attention_mask=None, **given):
    """(B, 1, 1, L) boolean, True where a key is real; None without padding.  transformers' own is (B, 1, L, L).

    Layers with a window (they alone give a local_size) keep transformers' own: a band is no mask of keys."""
    if "local_size" in given:
        return sdpa_mask(attention_mask=attention_mask, **given)
    return None if attention_mask is None else attention_mask[:, None, None, :].bool()


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)  # without it padding is ignored in silence


def windowed(config) -> list[int]:
    """The layers (from 1) that attend within a window; their scores are compared over all real pairs all the same."""
    return [n for n, kind in enumerate(getattr(config, "layer_types", None) or (), 1) if kind == "sliding_attention"]


def trace(model: nn.Module, ids: Tensor, segments: Tensor, real: Tensor | None) -> Trace:
    """Run an encoder on ids (B, L) with segments (B, L); `real` (B, L) is True on tokens, None without padding."""
    extra = {"token_type_ids": segments} if getattr(model.config, "type_vocab_size", 0) >= 2 else {}
    out = model(input_ids=ids, attention_mask=real, output_hidden_states=True, output_attentions=True, **extra)
    parts = [part for part in out.attentions or () if isinstance(part, list)]  # a tensor: attention weights
    layers = model.config.num_hidden_layers
    if len(parts) != layers or len(out.hidden_states) != layers + 1:
        raise ValueError(f"{type(model).__name__}: gave {len(parts)} attention traces and {len(out.hidden_states)} hidden states "
                         f"for {layers} layers; its attention cannot be traced. There are {', '.join(TEACHERS)}")
    return Trace(tuple(out.hidden_states), *zip(*parts, strict=True))


@torch.no_grad()
def check_trace(model: nn.Module) -> None:
    """Run one small padded batch: every layer must be traced, and padding must not reach the real tokens."""
    ids = torch.arange(10, 18, device=next(model.parameters()).device).remainder(model.config.vocab_size).repeat(2, 1)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, 5:] = False
    mode = model.training
    model.eval()
    padded = trace(model, ids, torch.zeros_like(ids), real).hidden[-1][1, :5]
    alone = trace(model, ids[1:, :5], torch.zeros_like(ids[1:, :5]), None).hidden[-1][0]
    model.train(mode)
    gap = (padded - alone).abs().max().item()
    # 2^-5 of the largest value: far above bf16 rounding over some layers, far below what ignored padding does.
    if gap > alone.abs().max().item() / 32:
        raise ValueError(f"{type(model).__name__}: padding changes its output by {gap:.3g}; its mask cannot be used here")


def model_config(name: str):
    """The config of a model folder or hub name.  ValueError in one line where there is none."""
    if ("/" in name or "\\" in name or name.startswith(".")) and name.count("/") > 1 and not Path(name).is_dir():
        raise ValueError(f"model {name!r}: no such folder. Give a folder with config.json and model.safetensors, "
                         "or a hub name such as bert-base-uncased")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        wrong = _first_line(error)
        raise ValueError(f"model {name!r}: " + (
            f"the folder holds no model that transformers opens ({wrong}); it needs config.json and model.safetensors"
            if Path(name).is_dir() else
            f"not a folder here, and the hub did not give it ({wrong}). Give a folder, or fetch it where there is a network: "
            f"python -c \"from transformers import AutoModel, AutoTokenizer; "
            f"[c.from_pretrained('{name}').save_pretrained('FOLDER') for c in (AutoModel, AutoTokenizer)]\"")) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def longest_row(config) -> int:
    """The most tokens that a model has positions for."""
    longest = getattr(config, "max_position_embeddings", sys.maxsize)
    return longest - config.pad_token_id - 1 if "roberta" in config.model_type else longest  # theirs begin after padding's


def check_tokenizer(name: str, config, manifest):
    """The teacher's tokenizer, which must be the one that the shards were built with.  ValueError names both."""
    tokenizer, built = auto_tokenizer(name), manifest.tokenizer
    if fingerprint(tokenizer) != built["fingerprint"]:
        raise ValueError(
            f"the shards were built with the tokenizer of {built['name']} ({built['vocab_size']:,} ids), the teacher "
            f"{name} has another ({len(tokenizer):,} ids): its embeddings would not fit. Build shards with "
            f"--tokenizer {name}, or take the teacher that belongs to the shards")
    if built["vocab_size"] > config.vocab_size:
        raise ValueError(f"teacher {name}: {config.vocab_size:,} embeddings for a tokenizer of {built['vocab_size']:,} ids")
    if config.pad_token_id not in (None, built["pad"]):  # RoBERTa counts positions by it
        raise ValueError(f"teacher {name}: its config.json has pad_token_id={config.pad_token_id}, the shards pad with "
                         f"{built['pad']}; write the tokenizer's pad id into config.json")
    if manifest.row_length > (longest := longest_row(config)):
        raise ValueError(f"the shards hold rows of up to {manifest.row_length} tokens, the teacher {name} reads {longest}; "
                         f"build them with --row-length {longest}")
    return tokenizer


def load_teacher(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A pre-trained encoder in eval mode, without gradients."""
    config = copy.deepcopy(model_config(name))  # the attention's name is kept on the config: never share one
    if config.model_type not in TEACHERS:
        raise ValueError(f"teacher {name!r}: is a {config.model_type} model; its attention cannot be traced here (there are "
                         f"{', '.join(TEACHERS)})")
    pooler = {"add_pooling_layer": False} if config.model_type in POOLED else {}
    try:  # from .safetensors, or from .bin through torch's weights_only loading
        model, found = AutoModel.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True,
                                                 attn_implementation=ATTENTION, **pooler)
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise ValueError(f"teacher {name!r}: its weights do not open ({_first_line(error)})") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"teacher {name!r}: its file lacks {len(missing)} tensors that its config.json asks for, such as "
                         f"{missing[0]}; take the config and the weights of one model")
    model.eval().requires_grad_(False).to(device)
    check_trace(model)
    return model


def keep_layers(teacher: nn.Module, highest: int) -> None:
    """Let the layers above one go, which no student imitates; the trace up to it stays what it was, bit for bit."""
    if hasattr(getattr(teacher, "encoder", None), "layer"):  # BERT's kin; ALBERT shares its layers, ModernBERT ends in a norm
        del teacher.encoder.layer[highest:]
        teacher.config.num_hidden_layers = len(teacher.encoder.layer)
