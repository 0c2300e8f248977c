"""The QNLI stage: fine-tune the teacher, distil its layers and its predictions into the student, report.

The command line, and every number that changes what a run learns; light to import: torch comes after both are checked.

    python finetune/qnli.py --teacher bert-base-uncased --student runs/general/students/tiny4 --data glue"""

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a script: python puts finetune/ on the path, not the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.recipe import did_you_mean, override

METHODS = ("tinybert", "gold")
LEAST = {"rows": 1, "batch": 1, "length": 8}  # 0 for other numbers; 8: room for both texts beside three special tokens
COMMON = ("rows", "length", "batch", "warmup", "weight_decay", "clip")
STAGE = {  # the settings that its output depends on, beside the common ones
    "teacher": ("teacher_lr", "teacher_epochs"),
    "layers": ("layers_lr", "layers_epochs", "layer_map", "embedding", "hidden", "attention"),
    "predictions": ("predictions_lr", "predictions_epochs", "temperature"),
    "gold": ("gold_lr", "gold_epochs"),
}


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
        for name, value in asdict(self).items():
            if isinstance(value, (int, float)) and not (value >= LEAST.get(name, 0) and math.isfinite(value)):
                raise ValueError(f"{name}={value}: must be a number of at least {LEAST.get(name, 0)}")
            if name in ("warmup", "min_teacher") and value > 1:
                raise ValueError(f"{name}={value}: a share, from 0 to 1")
        if self.temperature == 0:
            raise ValueError("temperature=0.0: must be above 0")
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}{did_you_mean(self.method, METHODS)} (there are {', '.join(METHODS)})")

    def of(self, stage: str) -> dict:
        """The settings that a stage's output depends on."""
        return {name: getattr(self, name) for name in (*COMMON, *STAGE[stage])}


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; reading it imports no torch."""
    parser = argparse.ArgumentParser(
        prog="finetune/qnli.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Task distillation on QNLI: does a sentence answer a question?",
        epilog=f"key=value settings: {', '.join(Settings.__dataclass_fields__)} (see finetune/qnli.py)")
    parser.add_argument("--teacher", default="bert-base-uncased",
                        help="model folder or hub name; fine-tuned first unless it is a QNLI model already")
    parser.add_argument("--student", default="runs/general/students/tiny4", help="from general distillation, or any BERT")
    parser.add_argument("--data", default="glue", help="glue, or a folder with train.tsv and dev.tsv")
    parser.add_argument("--out", default="runs/qnli", help="gets teacher/, layers/, student/, report.md, report.json")
    parser.add_argument("--seed", default=0, type=int, help="of order, dropout and new weights")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes a setting, such as teacher_lr=1e-4")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the stages; what a person got wrong is one line and exit code 2."""
    given = options(argv)
    try:
        settings = override(Settings(), given.settings)
        import transformers

        from finetune.stages import run_all

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        text = run_all(given, settings)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"\n{text}\nThe student is {Path(given.out) / 'student'}; transformers opens it by that name.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
