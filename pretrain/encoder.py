"""Encoders from transformers, the trace each one hands out, and the teacher.

No hooks and no copied BERT: an attention function registered with transformers returns the projected queries, keys and values in
the place of the attention weights.  Letters: B rows, L positions, D features, H heads, d features of a head."""

from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel, AutoModelForMaskedLM
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from pretrain.objective import Trace
from shards.tokenizer import auto_tokenizer, fingerprint

ATTENTION = "trace"  # the name under which transformers knows `_attend`
TEACHERS = ("bert", "roberta", "xlm-roberta", "electra", "albert", "distilbert", "modernbert")
BETWEEN = ("intermediate", "output", "ffn", "mlp")  # modules of a layer that hold no attention
POOLED = ("bert", "roberta", "xlm-roberta", "albert")  # these would make a pooler, which nothing here reads
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def _attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_):
    """SDPA that gives (output (B, L, H, d), [query, key, value]); a fallback that would build L x L is an error on CUDA."""
    traced, width = [query, key, value], query.shape[-1]
    scaling = width**-0.5 if scaling is None else scaling
    if query.is_cuda and width % 8:
        # Fused kernels want head widths divisible by 8 in 16 bit (tiny4 has 26); zeros change neither scores nor values.
        query, key, value = (nn.functional.pad(x, (0, -width % 8)) for x in (query, key, value))
    with sdpa_kernel(FUSED) if query.is_cuda else nullcontext():
        out = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    return out[..., :width].transpose(1, 2), traced


def _mask(attention_mask=None, **given):
    """(B, 1, 1, L) boolean, True where a key is real; None without padding.  transformers' own is (B, 1, L, L)."""
    if "local_size" in given:  # a layer with a window: a band is no mask of keys
        return sdpa_mask(attention_mask=attention_mask, **given)
    return None if attention_mask is None else attention_mask[:, None, None, :].bool()


logging.set_verbosity_error()  # it reports at length on poolers and heads that are not used here
logging.disable_progress_bar()
AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)  # without it padding is ignored in silence


def trace(model: nn.Module, ids: Tensor, segments: Tensor, real: Tensor | None, words: Tensor | None = None) -> Trace:
    """Run an encoder on ids (B, L) with segments (B, L); `real` (B, L) is True on tokens, None without padding.  With `words`
    (2 or more, P), rows and positions, the head of a masked LM says what stands there, and nowhere else."""
    def narrowed(_module, _given, out) -> None:
        out.last_hidden_state = out.last_hidden_state[words[0], words[1]][None]
    extra = {"token_type_ids": segments} if getattr(model.config, "type_vocab_size", 0) >= 2 else {}
    with nullcontext() if words is None else model.base_model.register_forward_hook(narrowed):
        out = model(input_ids=ids, attention_mask=real, output_hidden_states=True, output_attentions=True, **extra)
    parts = [part for part in out.attentions or () if isinstance(part, list)]  # a tensor: attention weights
    layers = model.config.num_hidden_layers
    if len(parts) != layers or len(out.hidden_states) != layers + 1:
        raise ValueError(f"{type(model).__name__}: attention of {layers - len(parts)} layers cannot be traced; take {TEACHERS}")
    return Trace(tuple(out.hidden_states), *zip(*parts, strict=True), None if words is None else out.logits[0])


def model_config(name: str):
    """The config of a model folder or hub name.  ValueError in one line where there is none."""
    if name.count("/") > 1 and not Path(name).is_dir():
        raise ValueError(f"model {name!r}: no such folder. Give a folder with config.json and model.safetensors, or a hub name")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        wrong = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(f"model {name!r}: " + (
            f"the folder holds no model that transformers opens ({wrong}); it needs config.json and model.safetensors"
            if Path(name).is_dir() else f"not a folder here, and the hub did not give it ({wrong}). Give a folder, or on a "
            f"networked machine: hf download {name} --local-dir FOLDER")) from error


def check_family(name: str, config) -> None:
    """ValueError where a model's attention is not known to be traced, and its padding to be left out: tests hold it of these."""
    if config.model_type not in TEACHERS:
        raise ValueError(f"{name!r} is a {config.model_type} model; its attention cannot be traced here; take {TEACHERS}")


def longest_row(config) -> int:
    """The most tokens that a model has positions for."""
    longest = getattr(config, "max_position_embeddings", 2**63)  # some have no bound
    return longest - config.pad_token_id - 1 if "roberta" in config.model_type else longest  # theirs begin after padding's


def check_tokenizer(name: str, config, manifest):
    """The teacher's tokenizer, which must be the one that the shards were built with.  ValueError names both."""
    tokenizer, built = auto_tokenizer(name), manifest.tokenizer
    if fingerprint(tokenizer) != built["fingerprint"]:
        raise ValueError(f"the shards were built with the tokenizer of {built['name']} ({built['vocab_size']:,} ids), teacher "
                         f"{name} has another ({len(tokenizer):,} ids); build shards with --tokenizer {name}")
    if built["vocab_size"] > config.vocab_size:
        raise ValueError(f"teacher {name}: {config.vocab_size:,} embeddings for a tokenizer of {built['vocab_size']:,} ids")
    if config.pad_token_id not in (None, built["pad"]):  # RoBERTa counts positions by it
        raise ValueError(f"teacher {name}: its config.json has pad_token_id={config.pad_token_id}, the shards pad with "
                         f"{built['pad']}; write the tokenizer's pad id into config.json")
    if manifest.row_length > (most := longest_row(config)):
        raise ValueError(f"shards: {manifest.row_length} tokens a row, {name} reads {most}; build them with --row-length {most}")
    return tokenizer


def opened(kind, name: str, may_lack: bool = False, **more) -> nn.Module:
    """`kind.from_pretrained`.  ValueError in one line where it does not open, or lacks tensors (which would be random ones)."""
    try:  # from .safetensors, or from .bin through torch's weights_only loading
        model, found = kind.from_pretrained(name, output_loading_info=True, **more)
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise ValueError(f"model {name!r}: its weights do not open ({' '.join(str(error).split())[:200]})") from error
    if not may_lack and (missing := sorted(found["missing_keys"])):
        raise ValueError(f"model {name!r}: its file lacks {len(missing)} tensors of a {type(model).__name__} of its config.json, "
                         f"such as {missing[0]}; give one that was saved with them")
    return model


def load_teacher(name: str, dtype: torch.dtype, device: torch.device, head: bool = False) -> nn.Module:
    """A pre-trained encoder in eval mode, without gradients; with its masked-LM head where that is asked for."""
    config = model_config(name)
    check_family(name, config)
    pooler = {"add_pooling_layer": False} if config.model_type in POOLED and not head else {}
    kind = AutoModelForMaskedLM if head else AutoModel
    model = opened(kind, name, config=config, dtype=dtype, attn_implementation=ATTENTION, **pooler)
    return model.eval().requires_grad_(False).to(device)
