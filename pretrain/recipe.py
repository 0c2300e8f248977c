"""Every number that changes what is learned.  How the machine runs it stands in ds_configs/."""

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of general distillation; `key=value` on the command line changes one."""

    steps: int | None = None  # optimizer steps; None: three passes over the training rows
    batch: int = 256  # rows of an optimizer step, over all ranks
    lr: float = 1e-4  # at the end of the warm-up; linear to 0 at the last step
    warmup: float = 0.1  # a share of the steps; an integer above 1 is steps
    weight_decay: float = 0.01  # not on bias and LayerNorm
    clip: float = 1.0  # largest global gradient norm
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's, written betas=0.9,0.999
    eps: float = 1e-6  # AdamW's
    seed: int = 0  # of the order of rows, the masks' set and the students' first weights
    lanes: int | None = None  # bounds the ranks a run can use; None: the largest divisor of batch up to 64
    mask: str = "precomputed"  # precomputed: the pass's mask set of the shards; none: the rows unmasked
    init: str = "auto"  # teacher: copied embeddings and layers; random; auto: teacher where the shapes agree
    layer_map: str = "uniform"  # uniform, last or first: the teacher layer of each student layer
    dropout: float = 0.0  # of the students; 0 keeps the loss the same for any cut of the batch
    embedding: float = 1.0  # weight of the embedding term
    hidden: float = 1.0  # weight of each layer's hidden term
    attention: float = 1.0  # weight of each layer's attention-score term
    log_every: int = 10  # steps between two logged lines
    save_every: int = 500  # steps between two checkpoints; the last step always saves
    eval_every: int = 500  # steps between two looks at the held-out rows; first and last step always

    def __post_init__(self):
        at_least = {"steps": 1, "batch": 1, "lanes": 1, "log_every": 1, "save_every": 1, "eval_every": 1, "seed": 0,
                    "lr": 0, "warmup": 0, "weight_decay": 0, "clip": 0, "eps": 0, "dropout": 0, "embedding": 0,
                    "hidden": 0, "attention": 0}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not (value >= least and math.isfinite(value)):
                raise ValueError(f"{name}={value}: must be a number of at least {least}")
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup={self.warmup}: a share of the steps (0 to 1), or an integer number of steps")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be from 0 to below 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: two numbers from 0 to below 1, written betas=0.9,0.999")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}{did_you_mean(getattr(self, name), known)} "
                                 f"(there are {', '.join(known)})")
        if self.lanes is not None and self.batch % self.lanes:
            raise ValueError(f"batch={self.batch} does not divide over lanes={self.lanes}; write a batch that is a "
                             f"multiple of it, such as batch={max(1, round(self.batch / self.lanes)) * self.lanes}")

    def resolved(self, rows: int) -> "Recipe":
        """With steps and lanes as numbers, for shards of `rows` training rows."""
        lanes = self.lanes or max(n for n in range(1, min(64, self.batch) + 1) if self.batch % n == 0)
        return replace(self, steps=self.steps or math.ceil(3 * rows / self.batch), lanes=lanes)

    def rate(self, step: int) -> float:
        """The learning rate of update `step` (from 0): linear up over the warm-up, linear down to 0 after the last."""
        warm = self.warmup if self.warmup > 1 else round(self.warmup * self.steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (self.steps - step) / max(1, self.steps - warm)

    @property
    def weights(self) -> dict[str, float]:
        return {"embedding": self.embedding, "hidden": self.hidden, "attention": self.attention}


CHOICES = {"mask": ("precomputed", "none"), "init": ("auto", "teacher", "random"), "layer_map": ("uniform", "last", "first")}
NOT_LEARNED = ("log_every", "save_every", "eval_every")  # may change between a run and its resume

# TinyBERT's own numbers, but for two of its traps: the reference clips each tensor by itself and its Adam
# does not correct the bias.  lr: 5e-5 in the reference's defaults, 1e-4 in later published runs.
RECIPES = {"tinybert": Recipe()}


def override(recipe, settings: Iterable[str]):
    """`key=value` strings over a dataclass of settings.  ValueError says what was given and what to write."""
    hints = typing.get_type_hints(type(recipe))
    changes = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"{setting!r} is no setting; write key=value, such as batch={recipe.batch} "
                             "(options begin with --)")
        if key not in hints:
            raise ValueError(f"unknown setting {key!r}{did_you_mean(key, hints)} (there are {', '.join(hints)})")
        changes[key] = _read(key, text, hints[key], getattr(recipe, key))
    return replace(recipe, **changes)


def _read(key: str, text: str, kind, example):
    if isinstance(kind, types.UnionType):  # int | None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    try:
        if typing.get_origin(kind) is tuple:
            return tuple(float(part) for part in text.split(","))
        return kind(text.replace("_", "") if kind is int else text)
    except ValueError:
        name = getattr(kind, "__name__", "two numbers")
        example = 100 if example is None else example
        raise ValueError(f"{key}: cannot read {text!r} as {name}; write {key}={example}") from None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A student's size.  Named ones are in SHAPES; `name:layers=3,hidden=288` changes some numbers."""

    layers: int
    hidden: int
    intermediate: int
    heads: int = 12

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"student: {name}={value} must be at least 1")
        if self.hidden % self.heads:
            near = max(1, self.hidden // self.heads) * self.heads
            raise ValueError(f"student: hidden={self.hidden} does not divide over heads={self.heads}; "
                             f"write hidden={near} or another number of heads")


SHAPES = {
    "tiny4": Shape(layers=4, hidden=312, intermediate=1200),  # TinyBERT4, arXiv 1909.10351
    "tiny6": Shape(layers=6, hidden=768, intermediate=3072),  # TinyBERT6, same paper
    "tiny4-384": Shape(layers=4, hidden=384, intermediate=1536),
    "tiny6-384": Shape(layers=6, hidden=384, intermediate=1536),
}


def parse_student(spec: str) -> tuple[str, Shape]:
    """`tiny4` or `tiny4:layers=3,hidden=288` -> (a name fit for a folder, its shape)."""
    name, _, numbers = spec.partition(":")
    if name not in SHAPES:
        raise ValueError(f"unknown student {name!r}{did_you_mean(name, SHAPES)} (there are {', '.join(SHAPES)}; change "
                         "one with NAME:layers=3,hidden=288)")
    known = [field.name for field in fields(Shape)]
    changes = {}
    for part in filter(None, numbers.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise ValueError(f"student {spec!r}: no number {key!r}{did_you_mean(key, known)} (there are {', '.join(known)})")
        if not value.isdigit():
            raise ValueError(f"student {spec!r}: cannot read {key}={value!r} as an integer")
        changes[key] = int(value)
    return re.sub(r"[:,=]", "-", spec), replace(SHAPES[name], **changes)
