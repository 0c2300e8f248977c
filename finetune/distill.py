"""Classifiers with our labels in our order, and the loss and the loop that train them.  Letters: B rows, C labels."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, BatchEncoding, get_scheduler

from finetune.data import LABELS, Rows
from pretrain.encoder import ATTENTION, model_config, opened
from pretrain.objective import TERMS, distil, weighted
from pretrain.plan import fastest_dtype
from pretrain.student import Student
from shards.block import chance, written_whole

BATCH = 128  # rows of an evaluation's batch; changes no figure


def output_names(config, labels: tuple = LABELS) -> list[str] | None:
    """Which of these labels each output of a classifier stands for, [] where outputs have no names; None for another model."""
    names, known = ([re.sub(r"[\W_]+", "_", name.lower()) for name in given] for given in (
        [config.id2label[n] for n in sorted(config.id2label)], labels))
    unnamed = names == [f"label_{n}" for n in range(len(labels))]  # what transformers writes where nobody gave names
    if "ForSequenceClassification" not in " ".join(config.architectures or ()) or not unnamed and sorted(names) != sorted(known):
        return None
    return [] if unnamed else [labels[known.index(name)] for name in names]


def open_classifier(name: str | Path, seed: int, device: torch.device, labels: tuple = LABELS, swap: bool = False) -> nn.Module:
    """A classifier in eval mode, outputs in the labels' order (unnamed: as they are, or swapped); what is missing is drawn."""
    names = output_names(model_config(str(name)), labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a head of another task's size is drawn too; every other tensor's size follows from the config
        model = opened(AutoModelForSequenceClassification, str(name), may_lack=True, attn_implementation=ATTENTION,
                       id2label=dict(enumerate(labels)), label2id=dict(map(reversed, enumerate(labels))), dtype=torch.float32,
                       problem_type="single_label_classification", ignore_mismatched_sizes=names is None)
    if order := [names.index(label) for label in labels] if names else [1, 0] * swap:
        head = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == len(labels)][-1]
        head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
    return model.to(device).eval()


def with_projection(model: nn.Module, name: str, teacher_width: int, seed: int) -> Student:
    """A classifier; its projection to another width is that of general distillation where it fits, or drawn."""
    path = Path(name) / "projection.safetensors"
    stored = load_file(path) if path.is_file() else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = Student(model, teacher_width, "0.weight" in stored).to(model.device).eval()
    if stored and {n: x.shape for n, x in stored.items()} == {n: x.shape for n, x in student.projection.state_dict().items()}:
        student.projection.load_state_dict(stored)
        print("  projection to the teacher's width: from general distillation")
    return student


def logits(model: nn.Module, batch: BatchEncoding) -> Tensor:
    """What the classifier says of each row -> (B, labels) float32."""
    extra = {"token_type_ids": batch.token_type_ids} if getattr(model.config, "type_vocab_size", 0) >= 2 else {}
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **extra).logits.float()


def lowered(device: torch.device, wanted: bool = True):
    """Autocast to bfloat16; no change where the hardware does not multiply it, or it is not wanted."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted and fastest_dtype() == "bf16")


@torch.inference_mode()
def each_row(function: Callable[[BatchEncoding], Tensor], rows: Rows, device: torch.device, low: bool = False) -> Tensor:
    """What a function of a batch gives for every row, in their order -> (rows, ...) float32; `low`: as training computes."""
    with lowered(device, low):
        given = [(batch.rows, function(batch.to(device)).float().cpu()) for batch in rows.batches(BATCH, torch.Generator())]
    numbers, values = map(torch.cat, zip(*given, strict=True))
    return values[numbers.argsort()]


def judged(model: nn.Module, rows: Rows, loss: Callable[[BatchEncoding], Tensor] | None = None) -> float:
    """The share of rows that a classifier is right about, or the mean of a loss; computed as training computes."""
    right = loss or (lambda batch: logits(model, batch).argmax(-1) == batch.labels)
    return each_row(right, rows, model.device, low=True).double().mean().item()


def imitation(weights: dict, teacher: Student | None, layers: list, settings, student: Student, batch: BatchEncoding) -> Tensor:
    """The weighted sum of pretrain's layer terms, `soft` predictions and `hard` labels, in one pass of each model -> (B,)."""
    kinds, said, traces = {kind: weights[kind] for kind in TERMS if weights.get(kind)}, [], []
    real = batch.attention_mask.bool()
    for model in (student, teacher) if teacher else (student,):
        hook = model.encoder.register_forward_hook(lambda *given: said.append(given[2].logits.float()))
        with hook, torch.set_grad_enabled(model is student and torch.is_grad_enabled()):
            traces.append(model(batch.input_ids, batch.token_type_ids, real) if kinds else logits(model.encoder, batch))
    loss = weights.get("hard", 0.0) * nn.functional.cross_entropy(said[0], batch.labels, reduction="none")
    if teacher:
        s_BC, t_BC = ((logits_BC / settings.temperature).log_softmax(-1) for logits_BC in said)
        soft = (-(t_BC.exp() * s_BC).mean(-1) if settings.prediction == "tinybert" else
                nn.functional.kl_div(s_BC, t_BC, log_target=True, reduction="none").sum(-1))  # KL(teacher || student), no T^2
        loss = loss + weights.get("soft", 0.0) * soft
    return loss + weighted(distil(*traces, real, layers, kinds), kinds) if kinds else loss


def fit(model: nn.Module, loss: Callable[[BatchEncoding], Tensor], rows: Rows, settings, stage: str, seed: int,
        measure: Callable[[], float], state: Path, layered: bool = False, rank: int = 0, world: int = 1) -> list[dict]:
    """Train in place to the epoch of the best dev accuracy, which `measure()` gives (layers: to the last) -> a line an epoch.
    The file `state` is written after each epoch; where it is there, training goes on behind its epoch, bit for bit.  Every rank
    takes its share of each batch, and all make the same update."""
    device, epochs = next(model.parameters()).device, getattr(settings, f"{stage}_epochs")
    figure, best = ("dev_loss", min) if stage == "layers" else ("dev_accuracy", max)
    order, each = torch.Generator(), math.ceil(len(rows.labels) / settings.batch)
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]  # biases and LayerNorms
    optimizer = torch.optim.AdamW(groups, lr=getattr(settings, f"{stage}_lr"), fused=True)
    kind, steps, curve, kept = "constant" if stage == "layers" else "linear", epochs * each, [], None
    rate = get_scheduler(kind, optimizer, round(settings.warmup * steps), steps)
    if state.exists():
        *states, curve, kept = torch.load(state, weights_only=True, map_location=device)
        for one, its in zip((model, optimizer, rate), states, strict=True):
            one.load_state_dict(its)
        print(f"  {stage}: goes on after epoch {len(curve)}", flush=True)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for epoch in range(len(curve) + 1, epochs + 1):
            if settings.patience and curve and epoch - best(curve, key=lambda line: line[figure])["epoch"] > settings.patience:
                break
            for draw, key in ((torch.manual_seed, rank), (order.manual_seed, 0)):
                draw(int(chance(seed, epoch, key).integers(2**32)))  # of 32 bits, as torch's CPU generator reads no more
            model.train(not layered)  # hidden states are matched value by value: dropout would be noise in both
            total = torch.zeros((), device=device)
            bar = tqdm(rows.batches(settings.batch, order), f"  {stage} {epoch}", each, leave=False, disable=rank > 0 or None)
            for batch in bar:
                count = len(batch.rows)  # of all ranks; one that is left without a row takes a row that counts for nothing
                share = slice(rank, None, world) if rank < count else slice(1)
                with lowered(device):
                    losses = loss(BatchEncoding({name: value[share] for name, value in batch.items()}).to(device))
                value = losses.sum() * (rank < count) / count
                value.backward()
                for parameter in model.parameters() if world > 1 else ():
                    if parameter.grad is not None:
                        torch.distributed.all_reduce(parameter.grad)
                nn.utils.clip_grad_norm_(model.parameters(), settings.clip or math.inf)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
                total += value.detach() * count
            if world > 1:
                torch.distributed.all_reduce(total)
            if not math.isfinite(mean_loss := total.item() / len(rows.labels)):
                raise ValueError(f"{stage}: the loss became {mean_loss}; write a smaller {stage}_lr= or clip=")
            model.eval()
            curve.append({"epoch": epoch, "loss": mean_loss, figure: measure()})
            print(f"  {stage}: epoch {epoch} of {epochs}, loss {mean_loss:.4g}, {figure} {curve[-1][figure]:.4g}", flush=True)
            if stage != "layers" and curve[-1] is best(curve, key=lambda line: line[figure]):
                kept = {name: value.clone() for name, value in model.state_dict().items()}
            if rank == 0:
                with written_whole(state) as file:
                    torch.save((*(one.state_dict() for one in (model, optimizer, rate)), curve, kept), file)
    model.load_state_dict(kept or model.state_dict())
    return curve
