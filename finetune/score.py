"""How good and how fast a classifier is."""

import time
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from finetune.data import Rows
from finetune.distill import Loss, lowered
from finetune.models import logits

BATCH = 128  # rows of an evaluation's batch; changes no figure
ROUNDS = 7  # of timing


@torch.inference_mode()
def predict(model: nn.Module, rows: Rows, fast: bool = False) -> Tensor:
    """The label of every row, in the order of the rows -> (rows,) int64.

    `fast` autocasts as training does; without it the model runs in its own dtype.
    """
    out = torch.empty(len(rows), dtype=torch.int64)
    for batch in rows.batches(BATCH):
        with lowered(model.device) if fast else nullcontext():
            out[batch.rows] = logits(model, batch.to(model.device)).argmax(-1).cpu()
    return out


def accuracy(model: nn.Module, rows: Rows) -> float:
    """The share of right rows, computed as training computes."""
    return (predict(model, rows, fast=True) == torch.tensor(rows.labels)).double().mean().item()


@torch.inference_mode()
def mean_loss(loss: Loss, rows: Rows, device: torch.device) -> float:
    """A loss over rows that are not trained on, computed as training computes."""
    with lowered(device):
        return sum(loss(batch.to(device)).sum().item() for batch in rows.batches(BATCH)) / len(rows)


@torch.inference_mode()
def speeds(models: dict[str, nn.Module], rows: Rows, size: int) -> dict[str, list[float]]:
    """Rows a second of each model in each of ROUNDS rounds over the first four batches of `size` rows.

    From rows on the host to answers on the host, float32 on a CPU, bfloat16 autocast on a GPU.  The models take turns
    within a round, so that a busy machine slows all of them.
    """
    numbers = list(range(min(4 * size, len(rows))))
    batches = [rows.batch(numbers[n:n + size]) for n in range(0, len(numbers), size)]
    found: dict[str, list[float]] = {name: [] for name in models}
    for attempt in range(ROUNDS + 1):
        for name, model in models.items():
            started = time.perf_counter()
            with lowered(model.device) if model.device.type == "cuda" else nullcontext():
                for batch in batches:
                    logits(model, batch.to(model.device)).cpu()
            if attempt:  # the first round warms up
                found[name].append(len(numbers) / (time.perf_counter() - started))
    return found
