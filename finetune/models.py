"""Classifiers and their tokenizers: opened with our labels in our order, compared, saved for transformers alone."""

import copy
import hashlib
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from finetune.data import LABELS, Batch
from pretrain.encoder import ATTENTION, model_config
from shards.tokenizer import auto_tokenizer, fingerprint

UNNAMED = ["label_0", "label_1"]  # what transformers writes where nobody gave names


def seed_of(seed: int, *words: str) -> int:
    """A number for a generator, drawn from (seed, words): another one for each stage."""
    return int.from_bytes(hashlib.sha256(" ".join([str(seed), *words]).encode()).digest()[:8], "big") >> 1


def weights_of(name: str) -> str:
    """sha256 over the files of a model folder; a hub name stands for itself."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    total = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".json", ".txt")):
        if path.name != "stage.json":  # holds the seconds it took
            with path.open("rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def label_order(config) -> list[int] | None:
    """Where LABELS stand among the outputs of a classifier, by name; None for an encoder or another task's classifier.

    LABEL_0 and LABEL_1 are taken as they stand: `unnamed` says so, and dev rows tell.
    """
    names = [re.sub(r"[\W_]+", "_", config.id2label[n].lower()) for n in sorted(config.id2label)]
    if not any("ForSequenceClassification" in name for name in config.architectures or ()):
        return None
    if names == UNNAMED:
        return [0, 1]
    return [names.index(label) for label in LABELS] if sorted(names) == sorted(LABELS) else None


def unnamed(config) -> bool:
    return [config.id2label[n].lower() for n in sorted(config.id2label)] == UNNAMED


@torch.no_grad()
def reorder(model: nn.Module, order: list[int]) -> None:
    """Let output n be what output order[n] was."""
    head = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == len(order)][-1]
    head.weight.copy_(head.weight[order].clone())
    head.bias.copy_(head.bias[order].clone())


def open_classifier(name: str, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A classifier with LABELS over the model of a folder or hub name, outputs in LABELS' order.

    What the model has no weights for (pooler, head) is drawn from the seed.
    """
    given = model_config(name)
    order = label_order(given)
    config = copy.deepcopy(given)
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {label: n for n, label in enumerate(LABELS)}
    config.problem_type = "single_label_classification"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            # A head of another task's size is replaced; every other tensor's size follows from the config.
            model = AutoModelForSequenceClassification.from_pretrained(
                name, config=config, dtype=dtype, attn_implementation=ATTENTION, ignore_mismatched_sizes=order is None)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"model {name!r}: does not open as a classifier ({reason})") from error
    if order and order != sorted(order):
        reorder(model, order)
    return model


def given_projection(name: str, projection: nn.Linear) -> bool:
    """Take over the projection that general distillation left beside a student, if there is one that fits."""
    path = Path(name).expanduser() / "projection.safetensors"
    if not path.is_file():
        return False
    found = load_file(path)
    if {key: value.shape for key, value in found.items()} != {k: v.shape for k, v in projection.state_dict().items()}:
        return False
    projection.load_state_dict(found)
    return True


def check_two(teacher: str, student: str, length: int) -> None:
    """ValueError, one line, where this student cannot learn from this teacher on rows of this length."""
    t, s = model_config(teacher), model_config(student)
    if t.num_attention_heads != s.num_attention_heads:
        raise ValueError(f"teacher {teacher} has {t.num_attention_heads} attention heads, student {student} has "
                         f"{s.num_attention_heads}: their scores cannot be compared; give models with as many heads")
    if fingerprint(auto_tokenizer(teacher)) != fingerprint(auto_tokenizer(student)):
        raise ValueError(f"teacher {teacher} and student {student} have different vocabularies; give a student made "
                         "with this teacher's tokenizer, or the teacher it was made from")
    for name, config in ((teacher, t), (student, s)):
        if length > config.max_position_embeddings:
            raise ValueError(f"length={length}: {name} reads at most {config.max_position_embeddings} tokens; "
                             f"write length={config.max_position_embeddings}")


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """What the classifier says of each row -> (B, labels) float32."""
    extra = {"token_type_ids": batch.segments} if getattr(model.config, "type_vocab_size", 0) >= 2 else {}
    return model(input_ids=batch.ids, attention_mask=batch.real, **extra).logits.float()


def save(model: nn.Module, tokenizer, folder: Path) -> None:
    """A folder that transformers opens by itself, the tokenizer with no truncation or padding stored in it."""
    model.save_pretrained(folder)  # transformers leaves the attention's name out of config.json
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for key in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)  # what other programs left in tokenizer_config.json
    tokenizer.save_pretrained(folder)
