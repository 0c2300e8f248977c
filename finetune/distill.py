"""Classifiers with our labels in our order, and the losses and the loop that train teacher, layers and predictions.

Letters: B rows, C labels.  A batch is what finetune.data.Rows.batch gives; a loss is one number a row (B,)."""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, BatchEncoding, get_scheduler

from finetune.data import LABELS, Rows
from pretrain.encoder import ATTENTION, longest_row, model_config, trace
from pretrain.objective import distil, weighted
from pretrain.plan import fastest_dtype
from pretrain.student import Student
from shards.tokenizer import auto_tokenizer, fingerprint, plain

UNNAMED = ["label_0", "label_1"]  # what transformers writes where nobody gave names
BATCH = 128  # rows of an evaluation's batch; changes no figure


def output_names(config) -> list[str] | None:
    """What the outputs of a QNLI classifier are called, `not_entailment` or `label_1`; None for any other model."""
    classifier = any("ForSequenceClassification" in name for name in config.architectures or ())
    names = [re.sub(r"[\W_]+", "_", config.id2label[n].lower()) for n in sorted(config.id2label)]
    return names if classifier and sorted(names) in (sorted(LABELS), UNNAMED) else None


def reorder(model: nn.Module, order: list[int]) -> None:
    """Let output n be what output order[n] was."""
    head = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == len(order)][-1]
    head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]


def open_classifier(name: str | Path, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A classifier in eval mode over the model of a folder or hub name, its outputs in LABELS' order (unnamed: as they are).

    What the model has no weights for (pooler, head) is drawn from the seed."""
    config = copy.deepcopy(model_config(str(name)))
    names = output_names(config)
    config.id2label, config.label2id = dict(enumerate(LABELS)), {label: n for n, label in enumerate(LABELS)}
    config.problem_type = "single_label_classification"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:  # a head of another task's size is replaced; every other tensor's size follows from the config
            model = AutoModelForSequenceClassification.from_pretrained(
                name, config=config, dtype=dtype, attn_implementation=ATTENTION, ignore_mismatched_sizes=names is None)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"model {str(name)!r}: does not open as a classifier ({reason})") from error
    if names and names != UNNAMED:
        reorder(model, [names.index(label) for label in LABELS])
    return model.to(device).eval()


def with_projection(model: nn.Module, name: str, teacher_width: int, seed: int) -> Student:
    """A classifier's encoder; its projection to another width is that of general distillation where it fits, or drawn."""
    path = Path(name) / "projection.safetensors"
    found = load_file(path) if path.is_file() else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = Student(model.base_model, teacher_width, "0.weight" in found).to(model.device).eval()
    if student.projection is not None:
        wanted = student.projection.state_dict()
        if {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}:
            student.projection.load_state_dict(found)
            print("  projection to the teacher's width: from general distillation")
    return student


def check_two(student: str, teacher: str, length: int) -> None:
    """ValueError, one line, where this student cannot learn from this teacher on rows of this length."""
    s, t = model_config(student), model_config(teacher)
    if t.num_attention_heads != s.num_attention_heads:
        raise ValueError(f"teacher {teacher} has {t.num_attention_heads} attention heads, student {student} has "
                         f"{s.num_attention_heads}: their scores cannot be compared; give models with as many heads")
    if fingerprint(auto_tokenizer(teacher)) != fingerprint(auto_tokenizer(student)):
        raise ValueError(f"teacher {teacher} and student {student} have different vocabularies; give a student made "
                         "with this teacher's tokenizer, or the teacher it was made from")
    if length > (longest := min(longest_row(t), longest_row(s))):
        raise ValueError(f"length={length}: these models read at most {longest} tokens; write length={longest}")


def logits(model: nn.Module, batch: BatchEncoding) -> Tensor:
    """What the classifier says of each row -> (B, labels) float32."""
    extra = {"token_type_ids": batch.token_type_ids} if getattr(model.config, "type_vocab_size", 0) >= 2 else {}
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **extra).logits.float()


def save(model: nn.Module, tokenizer, folder: Path) -> None:
    """A folder that transformers opens by itself, the tokenizer with no truncation or padding stored in it."""
    model.save_pretrained(folder)  # transformers leaves the attention's name out of config.json
    plain(tokenizer).save_pretrained(folder)


def half() -> torch.dtype:
    """Of autocast and of a teacher's weights: bfloat16 where the hardware multiplies it."""
    return torch.bfloat16 if fastest_dtype() == "bf16" else torch.float32


def lowered(device: torch.device):
    """Autocast to `half`; no context at all where that is float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half() != torch.float32)


@torch.inference_mode()
def each_row(function: Callable[[BatchEncoding], Tensor], rows: Rows, device: torch.device) -> Tensor:
    """What a function of a batch gives for every row, in the order of the rows -> (rows, ...) float32."""
    given = [(batch.rows, function(batch.to(device)).float().cpu()) for batch in rows.batches(BATCH, torch.Generator())]
    numbers, values = map(torch.cat, zip(*given, strict=True))
    return values[numbers.argsort()]


def mean(function: Callable[[BatchEncoding], Tensor], rows: Rows, device: torch.device) -> float:
    """The mean over rows that are not trained on, computed as training computes."""
    with lowered(device):
        return each_row(function, rows, device).double().mean().item()


def gold_loss(model: nn.Module, batch: BatchEncoding) -> Tensor:
    """Cross-entropy against the labels of the data."""
    return F.cross_entropy(logits(model, batch), batch.labels, reduction="none")


def prediction_loss(teacher: nn.Module, temperature: float, student: nn.Module, batch: BatchEncoding) -> Tensor:
    """KL(teacher || student) at a temperature, summed over labels (TinyBERT eq. 10 less the teacher's entropy); no T^2."""
    with torch.inference_mode():
        wanted = logits(teacher, batch)
    s_BC, t_BC = (F.log_softmax(logits_BC / temperature, -1) for logits_BC in (logits(student, batch), wanted))
    return F.kl_div(s_BC, t_BC, log_target=True, reduction="none").sum(-1)


def layer_loss(teacher: nn.Module, layers: list[int], weights: dict, student: Student, batch: BatchEncoding) -> Tensor:
    """Embeddings, hidden states and attention scores against the teacher's: pretrain's objective on task rows."""
    real = batch.attention_mask.bool()
    with torch.inference_mode():
        wanted = trace(teacher, batch.input_ids, batch.token_type_ids, real)
    return weighted(distil(student(batch.input_ids, batch.token_type_ids, real), wanted, real, layers), weights)


def fit(model: nn.Module, loss: Callable[[BatchEncoding], Tensor], rows: Rows, settings, stage: str, seed: int,
        measure: Callable[[], float]) -> list[dict]:
    """Train the model in place; after each epoch `measure()` looks at dev rows.  Gives a line of figures an epoch.

    The model ends with the weights of the epoch of the best dev accuracy; a student's layers with those of the last."""
    device, epochs = next(model.parameters()).device, getattr(settings, f"{stage}_epochs")
    figure = "dev_loss" if stage == "layers" else "dev_accuracy"
    order, each = torch.Generator().manual_seed(seed), math.ceil(len(rows.labels) / settings.batch)
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]  # biases and LayerNorms
    optimizer = torch.optim.AdamW(groups, lr=getattr(settings, f"{stage}_lr"), fused=True)
    rate = get_scheduler("constant" if stage == "layers" else "linear", optimizer, round(settings.warmup * epochs * each),
                         epochs * each)
    curve, kept = [], None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for epoch in range(1, epochs + 1):
            model.train(stage != "layers")  # hidden states are matched value by value: dropout would be noise in both
            total = torch.zeros((), device=device)
            for batch in tqdm(rows.batches(settings.batch, order), f"  {stage} {epoch}", each, leave=False, disable=None):
                with lowered(device):
                    value = loss(batch.to(device)).mean()
                value.backward()
                nn.utils.clip_grad_norm_(model.parameters(), settings.clip or math.inf)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
                total += value.detach() * len(batch.rows)
            if not math.isfinite(mean_loss := total.item() / len(rows.labels)):
                raise ValueError(f"{stage}: the loss became {mean_loss}; write a smaller {stage}_lr= or clip=")
            model.eval()
            curve.append({"epoch": epoch, "loss": mean_loss, figure: measure()})
            print(f"  {stage}: epoch {epoch} of {epochs}, loss {mean_loss:.4g}, {figure} {curve[-1][figure]:.4g}", flush=True)
            if stage != "layers" and curve[-1] is max(curve, key=lambda line: line[figure]):
                kept = copy.deepcopy(model.state_dict())
    if kept is not None:
        model.load_state_dict(kept)
    return curve
