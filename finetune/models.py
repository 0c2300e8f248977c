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
from finetune.stage import sums
from pretrain.encoder import ATTENTION, model_config
from shards.tokenizer import auto_tokenizer, fingerprint, plain

UNNAMED = ["label_0", "label_1"]  # what transformers writes where nobody gave names


def seed_of(seed: int, *words: str) -> int:
    """A number for a generator, drawn from (seed, words): another one for each purpose."""
    return int.from_bytes(hashlib.sha256(" ".join([str(seed), *words]).encode()).digest()[:8], "big") >> 1


def identity(name: str) -> dict[str, str] | str:
    """What tells two models apart: the sums of a folder's files; a hub name stands for itself."""
    return sums(Path(name)) if Path(name).is_dir() else name


def output_names(config) -> list[str] | None:
    """What the outputs of a QNLI classifier are called, `not_entailment` or `label_1`; None for any other model."""
    classifier = any("ForSequenceClassification" in name for name in config.architectures or ())
    names = [re.sub(r"[\W_]+", "_", config.id2label[n].lower()) for n in sorted(config.id2label)]
    return names if classifier and sorted(names) in (sorted(LABELS), UNNAMED) else None


@torch.no_grad()
def reorder(model: nn.Module, order: list[int]) -> None:
    """Let output n be what output order[n] was."""
    head = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == len(order)][-1]
    for tensor in (head.weight, head.bias):
        tensor.copy_(tensor[order].clone())


def open_classifier(name: str, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A classifier over the model of a folder or hub name, its outputs in LABELS' order (as they stand if unnamed).

    What the model has no weights for (pooler, head) is drawn from the seed.
    """
    config = copy.deepcopy(model_config(name))
    names = output_names(config)
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {label: n for n, label in enumerate(LABELS)}
    config.problem_type = "single_label_classification"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:  # a head of another task's size is replaced; every other tensor's size follows from the config
            model = AutoModelForSequenceClassification.from_pretrained(
                name, config=config, dtype=dtype, attn_implementation=ATTENTION, ignore_mismatched_sizes=names is None)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"model {name!r}: does not open as a classifier ({reason})") from error
    if names and names != UNNAMED:
        reorder(model, [names.index(label) for label in LABELS])
    return model


def take_projection(name: str, projection: nn.Linear) -> bool:
    """Take over the projection that general distillation left beside a student, if there is one that fits."""
    path = Path(name) / "projection.safetensors"
    found = load_file(path) if path.is_file() else {}
    fits = {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in projection.state_dict().items()}
    if fits:
        projection.load_state_dict(found)
    return fits


def check_two(teacher: str, student: str, length: int) -> None:
    """ValueError, one line, where this student cannot learn from this teacher on rows of this length."""
    t, s = model_config(teacher), model_config(student)
    if t.num_attention_heads != s.num_attention_heads:
        raise ValueError(f"teacher {teacher} has {t.num_attention_heads} attention heads, student {student} has "
                         f"{s.num_attention_heads}: their scores cannot be compared; give models with as many heads")
    if fingerprint(auto_tokenizer(teacher)) != fingerprint(auto_tokenizer(student)):
        raise ValueError(f"teacher {teacher} and student {student} have different vocabularies; give a student made "
                         "with this teacher's tokenizer, or the teacher it was made from")
    longest = min(t.max_position_embeddings, s.max_position_embeddings)
    if length > longest:
        raise ValueError(f"length={length}: these models read at most {longest} tokens; write length={longest}")


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """What the classifier says of each row -> (B, labels) float32."""
    extra = {"token_type_ids": batch.segments} if getattr(model.config, "type_vocab_size", 0) >= 2 else {}
    return model(input_ids=batch.ids, attention_mask=batch.real, **extra).logits.float()


def save(model: nn.Module, tokenizer, folder: Path) -> None:
    """A folder that transformers opens by itself, the tokenizer with no truncation or padding stored in it."""
    model.save_pretrained(folder)  # transformers leaves the attention's name out of config.json
    plain(tokenizer).save_pretrained(folder)
