"""Every number that changes what is learned.  They are TinyBERT's, but for two traps: its code clips each tensor by itself, and
its Adam does not correct the bias.  How the machine runs it stands in ds_configs/."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False)  # values by their types, read from text too
Fraction = Annotated[float, Field(ge=0, lt=1)]
Several = Annotated[str, Field(pattern=r"^[1-9]\d*(,[1-9]\d*)+$")]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Recipe:
    """The settings of general distillation; `key=value` on the command line changes one."""
    steps: PositiveInt | Several | None = None  # optimizer steps, a number for each --shards: 9000,1000; None: three passes
    batch: PositiveInt = 256  # rows of an optimizer step, over all ranks
    lr: NonNegativeFloat = 1e-4  # at the end of the warm-up; linear to 0 at the last step
    warmup: NonNegativeFloat = 0.1  # a share of the steps; an integer above 1 is steps
    weight_decay: NonNegativeFloat = 0.01  # not on bias and LayerNorm
    clip: NonNegativeFloat = 1.0  # largest global gradient norm
    beta1: Fraction = 0.9  # AdamW's
    beta2: Fraction = 0.999  # AdamW's
    eps: NonNegativeFloat = 1e-6  # AdamW's
    seed: NonNegativeInt = 0  # of the order of rows, the masks' set and the students' first weights
    lanes: PositiveInt | None = None  # bounds the ranks a run can use; None: the largest divisor of batch up to 64
    mask: Literal["precomputed", "dynamic", "none"] = "precomputed"  # the shards' mask sets in turn, or new masks in each pass
    init: Literal["auto", "teacher", "projected", "random"] = "auto"  # the teacher copied, or fitted; auto: what fits best
    layer_map: str = "uniform"  # uniform, last, first, or groups such as 1:3-5,2:6-8: each student layer's teacher layers
    layer_weights: str = "equal"  # inverse: 1/(m+1); balanced: the terms' logarithms; or numbers, the embeddings' first
    normalize: Literal["row", "padded"] = "row"  # means over real tokens; padded: over rows at full length (the reference)
    projection: Literal["shared", "each"] = "shared"  # to the teacher's width: one of all hidden states, or one of each
    dropout: Fraction = 0.0  # of the students; 0 keeps the loss the same for any cut of the batch
    embedding: NonNegativeFloat = 1.0  # weight of the embedding term
    hidden: NonNegativeFloat = 1.0  # weight of each layer's hidden term
    attention: NonNegativeFloat = 1.0  # weight of each layer's attention-score term
    cosine: NonNegativeFloat = 0.0  # weight of each layer's cosine of hidden states (DistilBERT)
    qk: NonNegativeFloat = 0.0  # weight of each layer's attention distributions' KL (MiniLM)
    qq: NonNegativeFloat = 0.0  # weight of each layer's relations of queries (MiniLMv2)
    kk: NonNegativeFloat = 0.0  # weight of each layer's relations of keys (MiniLMv2)
    vv: NonNegativeFloat = 0.0  # weight of each layer's relations of values (MiniLM, MiniLMv2)
    mlm: NonNegativeFloat = 0.0  # weight of the masked words' cross-entropy; the student then has a masked-LM head
    soft_mlm: NonNegativeFloat = 0.0  # weight of the masked words' KL to the teacher's head (DistilBERT)
    temperature: PositiveFloat = 2.0  # of the latter
    relation_heads: PositiveInt | None = None  # both models' heads joined and cut into so many, for scores and relations
    log_every: PositiveInt = 10  # steps between two logged lines
    save_every: PositiveInt = 500  # steps between two checkpoints; the last step always saves
    keep_every: NonNegativeInt = 0  # checkpoints of every so many steps stay for good; 0: only the newest three
    gradient_checkpointing: bool = False  # students' layers are computed again in the backward pass: less memory, more time
    compile: bool = False  # torch.compile for what stands in a layer beside attention; needs a C++ compiler
    deterministic: bool = False  # ask torch for deterministic kernels; an operation that has none is an error
    eval_every: PositiveInt = 500  # steps between two looks at the held-out rows; first and last step always
    profile: str = ""  # such as 100:105: torch's trace of steps 100 to 104, of rank 0, goes into OUT/tensorboard

    def __post_init__(self):
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup={self.warmup}: a share of the steps (0 to 1), or an integer number of steps")
        if self.profile and not ((found := re.fullmatch(r"([1-9]\d*):(\d+)", self.profile)) and int(found[1]) < int(found[2])):
            raise ValueError(f"profile={self.profile}: write the first step and the one after the last, such as profile=100:105")
        if (self.mlm or self.soft_mlm) and self.mask == "none":
            raise ValueError("mlm= and soft_mlm= are of masked words, mask=none leaves none; write mask=precomputed or dynamic")
        if not self.weights:
            raise ValueError("every term's weight is 0: nothing would be learned; write attention=1, for one")
        if self.lanes is not None and self.batch % self.lanes:
            most = max(1, round(self.batch / self.lanes)) * self.lanes
            raise ValueError(f"batch={self.batch} does not divide over lanes={self.lanes}; write such as batch={most}")

    def resolved(self, rows: list[int]) -> tuple["Recipe", list[int]]:
        """With steps and lanes as numbers, and the steps of each --shards, which have so many training rows."""
        lanes = self.lanes or max(n for n in range(1, min(64, self.batch) + 1) if self.batch % n == 0)
        steps = [*map(int, str(self.steps).split(","))] if self.steps else [-(-3 * n // self.batch) for n in rows]
        if len(steps) != len(rows):
            raise ValueError(f"steps={self.steps}: write a number for each of {len(rows)} --shards, as 9{',1' * len(rows[1:])}")
        return replace(self, steps=sum(steps), lanes=lanes), steps

    def rate(self, step: int) -> float:
        """The learning rate of update `step` (from 0): linear up over the warm-up, linear down to 0 after the last."""
        warm = self.warmup if self.warmup > 1 else round(self.warmup * self.steps)
        return self.lr * min((step + 1) / max(1, warm), (int(self.steps) - step) / max(1, int(self.steps) - warm))

    @property
    def weights(self) -> dict[str, float]:
        """Of the kinds of terms; one of weight 0 is not computed."""
        return {kind: getattr(self, kind) for kind in KINDS if getattr(self, kind)}


KINDS = ("embedding", "hidden", "attention", "cosine", "qk", "qq", "kk", "vv", "mlm", "soft_mlm")  # of terms
NOT_LEARNED = "log_every save_every eval_every keep_every deterministic compile gradient_checkpointing profile".split()


def override(recipe, settings: Iterable[str]):
    """`key=value` strings over a dataclass of settings.  ValueError says what was given and what to write."""
    known, changes = recipe.__dataclass_fields__, {}
    for setting in settings:
        key, equals, changes[key] = setting.partition("=")
        if not equals:
            raise ValueError(f"{setting!r} is no setting; write key=value (options begin with --)")
        if key not in known:
            close = did_you_mean(key, known)
            raise ValueError(f"unknown setting {key!r}{close} (options begin with --; there are {', '.join(known)})")
    try:
        return replace(recipe, **changes)
    except ValidationError as error:
        wrong = error.errors()[0]
        if not wrong["loc"]:  # a __post_init__ says by itself what to write
            raise wrong["ctx"]["error"] from None
        key, example = wrong["loc"][0], getattr(recipe, wrong["loc"][0])
        raise ValueError(f"{key}={changes[key]}: {wrong['msg'].replace('Input should', 'must')}; write such as "
                         f"{key}={100 if example is None else str(example).lower()}") from None


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Shape:
    """A student's size.  Named ones are in SHAPES."""
    layers: PositiveInt
    hidden: PositiveInt
    intermediate: PositiveInt
    heads: PositiveInt = 12

    def __post_init__(self):
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} does not divide over heads={self.heads}; write "
                             f"hidden={max(1, self.hidden // self.heads) * self.heads} or another number of heads")


SHAPES = {"tiny4": Shape(layers=4, hidden=312, intermediate=1200),  # TinyBERT4, arXiv 1909.10351
          "tiny6": Shape(layers=6, hidden=768, intermediate=3072),  # TinyBERT6, same paper
          "tiny4-384": Shape(layers=4, hidden=384, intermediate=1536),
          "tiny6-384": Shape(layers=6, hidden=384, intermediate=1536)}


def parse_student(spec: str) -> tuple[str, Shape]:
    """`tiny4` or `tiny4:layers=3,hidden=288` -> (a name fit for a folder, its shape)."""
    name, _, numbers = spec.partition(":")
    if name not in SHAPES:
        raise ValueError(f"unknown student {name!r}{did_you_mean(name, SHAPES)} (there are {', '.join(SHAPES)}, NAME:layers=3)")
    try:
        return re.sub(r"[:,=]", "-", spec), override(SHAPES[name], filter(None, numbers.split(",")))
    except ValueError as error:
        raise ValueError(f"--student {spec}: {error}") from None
