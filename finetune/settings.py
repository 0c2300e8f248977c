"""Every number that changes what a QNLI run learns.  Light to import: the command line reads it before torch."""

import math
from dataclasses import asdict, dataclass

from pretrain.recipe import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Task distillation's settings, TinyBERT's own for QNLI; `key=value` on the command line changes one."""

    method: str = "tinybert"  # tinybert: the layers, then the predictions; gold: the student on gold labels, no teacher
    rows: int | None = None  # training rows used, drawn by the seed; None: all
    length: int = 128  # most tokens of a row, [CLS] and both [SEP] counted
    batch: int = 32  # rows of an update
    warmup: float = 0.1  # share of the updates of a linear schedule
    weight_decay: float = 0.01  # not on bias and LayerNorm
    clip: float = 1.0  # largest global gradient norm; 0: any
    teacher_lr: float = 3e-5  # linear; small teachers want more (a 6-layer, 384 wide one 1e-4)
    teacher_epochs: int = 3
    min_teacher: float = 0.6  # a teacher below this dev accuracy is refused
    layers_lr: float = 5e-5  # constant, without warm-up
    layers_epochs: int = 10
    layer_map: str = "uniform"  # uniform, last or first: the teacher layer of each student layer
    embedding: float = 1.0  # weight of the embedding term
    hidden: float = 1.0  # weight of each layer's hidden term
    attention: float = 1.0  # weight of each layer's attention-score term
    predictions_lr: float = 3e-5  # linear
    predictions_epochs: int = 3
    temperature: float = 1.0  # of both models' predictions
    gold_lr: float = 3e-5  # linear; method=gold
    gold_epochs: int = 3

    def __post_init__(self):
        least = {"rows": 1, "batch": 1, "length": 8}  # 8: room for both texts beside the three special tokens
        for name, value in asdict(self).items():
            if isinstance(value, (int, float)) and not (value >= least.get(name, 0) and math.isfinite(value)):
                raise ValueError(f"{name}={value}: must be a number of at least {least.get(name, 0)}")
        for name in ("warmup", "min_teacher"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name}={getattr(self, name)}: a share, from 0 to 1")
        if self.temperature == 0:
            raise ValueError("temperature=0.0: must be above 0")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}{did_you_mean(getattr(self, name), known)} "
                                 f"(there are {', '.join(known)})")

    def rate(self, stage: str, step: int, steps: int) -> float:
        """The learning rate of update `step` (from 0) of `steps`: linear up and down, constant for the layers."""
        peak, warm = getattr(self, f"{stage}_lr"), round(self.warmup * steps)
        if stage == "layers":
            return peak
        return peak * ((step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm))

    def of(self, stage: str) -> dict:
        """The settings that a stage's output depends on."""
        return {name: getattr(self, name) for name in (*COMMON, *STAGE[stage])}


CHOICES = {"method": ("tinybert", "gold"), "layer_map": ("uniform", "last", "first")}
COMMON = ("rows", "length", "batch", "warmup", "weight_decay", "clip")
STAGE = {
    "teacher": ("teacher_lr", "teacher_epochs"),
    "layers": ("layers_lr", "layers_epochs", "layer_map", "embedding", "hidden", "attention"),
    "predictions": ("predictions_lr", "predictions_epochs", "temperature"),
    "gold": ("gold_lr", "gold_epochs"),
}
