"""The QNLI stage: fine-tune the teacher, distil its layers and its predictions into the student, report.

The command line, and every number that changes what a run learns; light to import: torch comes after both are checked.

    python finetune/qnli.py --teacher bert-base-uncased --student runs/general/students/tiny4 --data glue"""

import argparse
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

if __package__ in (None, ""):  # started as a script: python puts finetune/ on the path, not the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.recipe import CHECKED, override

Share = Annotated[float, Field(ge=0, le=1)]
COMMON = ("rows", "length", "batch", "warmup", "weight_decay", "clip")
STAGE = {  # the settings that its output depends on, beside the common ones
    "teacher": ("teacher_lr", "teacher_epochs"),
    "layers": ("layers_lr", "layers_epochs", "layer_map", "embedding", "hidden", "attention"),
    "predictions": ("predictions_lr", "predictions_epochs", "temperature"),
    "gold": ("gold_lr", "gold_epochs"),
}


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Settings:
    """Task distillation's settings, TinyBERT's own for QNLI; `key=value` on the command line changes one."""

    method: Literal["tinybert", "gold"] = "tinybert"  # layers, then predictions; or gold labels, no teacher
    rows: PositiveInt | None = None  # training rows used, drawn by the seed; None: all
    length: Annotated[int, Field(ge=8)] = 128  # most tokens of a row, [CLS] and both [SEP] counted; 8 leaves room for both texts
    batch: PositiveInt = 32  # rows of an update
    warmup: Share = 0.1  # share of the updates of a linear schedule
    weight_decay: NonNegativeFloat = 0.01  # not on bias and LayerNorm
    clip: NonNegativeFloat = 1.0  # largest global gradient norm; 0: any
    teacher_lr: NonNegativeFloat = 3e-5  # linear; small teachers want more (a 6-layer, 384 wide one 1e-4)
    teacher_epochs: NonNegativeInt = 3
    min_teacher: Share = 0.6  # a teacher below this dev accuracy is refused
    layers_lr: NonNegativeFloat = 5e-5  # constant, without warm-up
    layers_epochs: NonNegativeInt = 10
    layer_map: str = "uniform"  # uniform, last or first: the teacher layer of each student layer
    embedding: NonNegativeFloat = 1.0  # weight of the embedding term
    hidden: NonNegativeFloat = 1.0  # weight of each layer's hidden term
    attention: NonNegativeFloat = 1.0  # weight of each layer's attention-score term
    predictions_lr: NonNegativeFloat = 3e-5  # linear
    predictions_epochs: NonNegativeInt = 3
    temperature: PositiveFloat = 1.0  # of both models' predictions
    gold_lr: NonNegativeFloat = 3e-5  # linear; method=gold
    gold_epochs: NonNegativeInt = 3

    def of(self, stage: str) -> dict:
        """The settings that a stage's output depends on."""
        return {name: getattr(self, name) for name in (*COMMON, *STAGE[stage])}


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; reading it imports no torch."""
    parser = argparse.ArgumentParser(
        prog="finetune/qnli.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Task distillation on QNLI: does a sentence answer a question?",
        epilog=f"key=value settings: {', '.join(asdict(Settings()))} (see finetune/qnli.py)")
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
