"""One training loop, and the losses that teacher, layers and predictions put into it.

Letters: B rows, C labels.
"""

import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from finetune.data import Batch, Rows
from finetune.models import logits, seed_of
from finetune.settings import Settings
from pretrain.encoder import Student, trace
from pretrain.objective import distil, weighted

Loss = Callable[[Batch], Tensor]  # -> (B,), one number a row


def half(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32: the dtype of autocast and of a teacher's weights.

    On one core with AVX512-BF16 a 6-layer, 384 wide model read 110 rows/s of 64 tokens in bfloat16 and 57 in float32,
    and trained on 30 to 37 rows/s of 49 against 23; without such instructions bfloat16 is emulated, and slower.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def lowered(device: torch.device):
    """Autocast to `half`; no context at all where that is float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half(device) != torch.float32)


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


def fit(model: nn.Module, loss: Loss, rows: Rows, settings: Settings, stage: str, seed: int,
        measure: Callable[[], dict[str, float]], *, epochs: int | None = None, best: str | None = None) -> list[dict]:
    """Train the model in place; after each epoch `measure()` looks at dev rows.  Gives a line of figures an epoch.

    With `best` the model ends with the weights of the epoch in which that figure was highest.
    """
    device = next(model.parameters()).device
    epochs = getattr(settings, f"{stage}_epochs") if epochs is None else epochs
    each = math.ceil(len(rows) / settings.batch)
    order = torch.Generator().manual_seed(seed_of(seed, stage, "order"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]  # vectors: biases and LayerNorms
    optimizer, curve, kept = torch.optim.AdamW(groups, fused=True), [], None
    every = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file wants few lines
    with (torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
          tqdm(total=epochs * len(rows), desc=f"  {stage}", unit="row", mininterval=every, leave=False) as bar):
        torch.manual_seed(seed_of(seed, stage, "dropout"))
        for epoch in range(epochs):
            model.train(stage != "layers")  # hidden states are matched value by value: dropout would be noise in both
            rates = [settings.rate(stage, step, epochs * each) for step in range(epoch * each, (epoch + 1) * each)]
            mean = _epoch(model, loss, zip(rates, rows.batches(settings.batch, order), strict=True), optimizer,
                          settings.clip, bar)
            if not math.isfinite(mean):
                raise ValueError(f"{stage}: the loss became {mean}; write a smaller {stage}_lr= or clip=")
            model.eval()
            curve.append({"epoch": epoch + 1, "loss": mean, **measure()})
            said = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in curve[-1].items())
            bar.clear()
            print(f"  {stage}: {said} (of {epochs} epochs)", flush=True)
            if best and curve[-1][best] > max((past[best] for past in curve[:-1]), default=-math.inf):
                kept = {name: value.clone() for name, value in model.state_dict().items()}
    if kept is not None:
        model.load_state_dict(kept)
    return curve


def _epoch(model: nn.Module, loss: Loss, batches, optimizer, clip: float, bar: tqdm) -> float:
    """One pass over (rate, batch); gives its mean loss over rows."""
    device = next(model.parameters()).device
    total, rows = torch.zeros((), device=device), 0
    for n, (rate, batch) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate
        with lowered(device):
            value = loss(batch.to(device)).mean()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        total += value.detach() * len(batch.rows)
        rows += len(batch.rows)
        bar.update(len(batch.rows))
        if n % 10 == 0:  # on a GPU each look waits for it
            bar.set_postfix(loss=f"{value.item():.4f}")
    return total.item() / rows
