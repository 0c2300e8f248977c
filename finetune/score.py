"""How good and how fast a classifier is."""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.data import Batch, Rows
from finetune.distill import lowered
from finetune.models import logits

BATCH = 128  # rows of an evaluation's batch; changes no figure
ROUNDS = 7  # of timing, of which the median counts


@dataclass(frozen=True, kw_only=True)
class Score:
    """A classifier on dev rows."""

    parameters: int
    accuracy: float
    error: float  # standard error of the accuracy
    predicted: list[int]  # the label of each row


@torch.inference_mode()
def predict(model: nn.Module, rows: Rows, fast: bool = False) -> Tensor:
    """The logits of every row, in the order of the rows -> (rows, labels) float32.

    `fast` autocasts as training does; without it the model runs in its own dtype.
    """
    device = next(model.parameters()).device
    out = torch.empty(len(rows), model.config.num_labels)
    for batch in rows.batches(BATCH):
        with lowered(device) if fast else nullcontext():
            out[batch.rows] = logits(model, batch.to(device)).cpu()
    return out


@torch.inference_mode()
def mean_loss(loss: Callable[[Batch], Tensor], rows: Rows, device: torch.device) -> float:
    """A loss over rows that are not trained on."""
    with lowered(device):
        return sum(loss(batch.to(device)).sum().item() for batch in rows.batches(BATCH)) / len(rows)


def accuracy(model: nn.Module, rows: Rows) -> float:
    """The share of right rows, as training computes."""
    return (predict(model, rows, fast=True).argmax(-1) == torch.tensor(rows.labels)).double().mean().item()


def score(model: nn.Module, rows: Rows) -> Score:
    """Accuracy of a model in eval mode and in its own dtype, with the binomial standard error."""
    predicted = predict(model, rows).argmax(-1).tolist()
    share = sum(p == label for p, label in zip(predicted, rows.labels, strict=True)) / len(rows)
    return Score(parameters=sum(p.numel() for p in model.parameters()), accuracy=share,
                 error=math.sqrt(share * (1 - share) / len(rows)), predicted=predicted)


def agreement(one: Score, other: Score) -> float:
    """The share of rows on which two models say the same."""
    return sum(a == b for a, b in zip(one.predicted, other.predicted, strict=True)) / len(one.predicted)


@torch.inference_mode()
def speeds(models: dict[str, nn.Module], rows: Rows, size: int) -> dict[str, list[float]]:
    """Rows a second of each model at a batch size, in each of ROUNDS rounds over the same rows.

    The models take turns within a round, so that a busy machine slows all of them; on a GPU under bfloat16 autocast.
    """
    batches = [rows.batch(list(range(n, n + size))) for n in range(0, min(4 * size, len(rows) - size + 1), size)]
    batches = batches or [rows.batch(list(range(len(rows))))]
    found: dict[str, list[float]] = {name: [] for name in models}
    for attempt in range(ROUNDS + 1):
        for name, model in models.items():
            device = next(model.parameters()).device
            moved = [batch.to(device) for batch in batches]
            _wait(device)
            started = time.perf_counter()
            with lowered(device) if device.type == "cuda" else nullcontext():
                for batch in moved:
                    logits(model, batch)
            _wait(device)
            if attempt:  # the first round warms up
                found[name].append(sum(len(b.rows) for b in batches) / (time.perf_counter() - started))
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(one: list[float], other: list[float]) -> float:
    """The median over rounds of how much faster the one was."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))
