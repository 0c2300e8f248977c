"""One training loop, and the losses that teacher, layers and predictions put into it.

Letters: B rows, C labels.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from finetune.data import Batch, Rows
from finetune.models import logits, seed_of
from pretrain.encoder import Student, trace
from pretrain.objective import distil, weighted

Loss = Callable[[Batch], Tensor]  # -> (B,), one number a row


def half(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32: the dtype of autocast and of a teacher's weights.

    On a CPU with AVX512-BF16 a 6-layer, 384 wide model at L=64 read 110 rows/s in bfloat16 and 57 in float32 on one
    core, and trained on 27 to 40 against 12 to 18; without such instructions bfloat16 is emulated, and slower.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def lowered(device: torch.device):
    """Autocast to `half`; no context at all where that is float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half(device) != torch.float32)


@dataclass(frozen=True, kw_only=True)
class Training:
    """The numbers of one training."""

    name: str
    epochs: int
    lr: float
    constant: bool = False  # the rate: constant, or up over the warm-up and linearly down to 0
    dropout: bool = True  # whatever the model's config says of it; False: none
    batch: int
    warmup: float
    weight_decay: float
    clip: float
    seed: int

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of update `step` (from 0) of `steps`."""
        if self.constant:
            return self.lr
        warm = round(self.warmup * steps)
        return self.lr * ((step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm))


def gold_loss(model: nn.Module) -> Loss:
    """Cross-entropy against the labels of the data."""
    return lambda batch: F.cross_entropy(logits(model, batch), batch.labels, reduction="none")


def prediction_kl(s_logits_BC: Tensor, t_logits_BC: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) at a temperature, summed over labels -> (B,); no T^2 (the reference has none either)."""
    s = F.log_softmax(s_logits_BC.float() / temperature, -1)
    t = F.log_softmax(t_logits_BC.float() / temperature, -1)
    return F.kl_div(s, t, log_target=True, reduction="none").sum(-1)


def prediction_loss(student: nn.Module, teacher: nn.Module, temperature: float) -> Loss:
    """The student's predictions against the teacher's (TinyBERT eq. 10, as a divergence: 0 where they agree)."""

    def loss(batch: Batch) -> Tensor:
        with torch.inference_mode():
            wanted = logits(teacher, batch)
        return prediction_kl(logits(student, batch), wanted, temperature)

    return loss


def layer_loss(student: Student, teacher: nn.Module, layers: list[int], weights: dict[str, float]) -> Loss:
    """Embeddings, hidden states and attention scores against the teacher's: pretrain's objective on task rows."""

    def loss(batch: Batch) -> Tensor:
        with torch.inference_mode():
            wanted = trace(teacher, batch.ids, batch.segments, batch.real)
        return weighted(distil(student(batch.ids, batch.segments, batch.real), wanted, batch.real, layers), weights)

    return loss


def _optimizer(model: nn.Module, how: Training) -> torch.optim.Optimizer:
    """AdamW; biases and LayerNorms, which are vectors, do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": how.weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=how.lr, fused=True)


def fit(model: nn.Module, loss: Loss, rows: Rows, how: Training, measure: Callable[[], dict[str, float]],
        best: str | None = None) -> list[dict]:
    """Train the model in place; after each epoch `measure()` looks at dev rows.  Gives a line of figures an epoch.

    With `best` the model ends with the weights of the epoch in which that figure was highest.
    """
    device = next(model.parameters()).device
    order = torch.Generator().manual_seed(seed_of(how.seed, how.name, "order"))
    optimizer, curve, kept = _optimizer(model, how), [], None
    each = math.ceil(len(rows) / how.batch)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _bar(how, len(rows)) as bar:
        torch.manual_seed(seed_of(how.seed, how.name, "dropout"))
        for epoch in range(how.epochs):
            model.train(how.dropout)
            rates = [how.rate(step, how.epochs * each) for step in range(epoch * each, (epoch + 1) * each)]
            mean = _epoch(model, loss, zip(rates, rows.batches(how.batch, order), strict=True), optimizer, how, bar)
            model.eval()
            curve.append({"epoch": epoch + 1, "loss": mean, **measure()})
            said = ", ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in curve[-1].items() if key != "epoch")
            bar.write(f"  {how.name}, epoch {epoch + 1} of {how.epochs}: {said}", file=sys.stdout)
            if best and curve[-1][best] > max((past[best] for past in curve[:-1]), default=-math.inf):
                kept = {name: value.clone() for name, value in model.state_dict().items()}
    if kept is not None:
        model.load_state_dict(kept)
    return curve


def _bar(how: Training, rows: int) -> tqdm:
    every = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file wants few lines
    return tqdm(total=how.epochs * rows, desc=f"  {how.name}", unit="row", mininterval=every, leave=False)


def _epoch(model: nn.Module, loss: Loss, batches, optimizer, how: Training, bar: tqdm) -> float:
    """One pass over (rate, batch); gives its mean loss over rows.  ValueError where the loss is no number."""
    device = next(model.parameters()).device
    total, rows = torch.zeros((), device=device), 0
    for n, (rate, batch) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate
        with lowered(device):
            value = loss(batch.to(device)).mean()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), how.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        total += value.detach() * len(batch.rows)
        rows += len(batch.rows)
        bar.update(len(batch.rows))
        if n % 10 == 0:  # on a GPU each look waits for it
            bar.set_postfix(loss=f"{value.item():.4f}")
    if not torch.isfinite(total):
        raise ValueError(f"{how.name}: the loss became {total.item()}; write a smaller {how.name}_lr= or clip=")
    return total.item() / rows
