"""The QNLI stage: its command line and every number that changes what a run learns; torch comes after both are checked."""

import argparse
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

if __package__ in (None, ""):  # started as a script: python puts finetune/ on the path, not the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.recipe import CHECKED, override

METHODS = {"tinybert": ("teacher", "augment", "layers", "predictions", "report"),  # and the stages of each
           "joint": ("teacher", "augment", "predictions", "report"), "gold": ("gold", "report")}
JOINT = {"embedding": 0.3, "hidden": 0.3, "attention": 0.5, "temperature": 2.0}  # what method=joint begins with
COMMON = ("rows", "length", "batch", "warmup", "weight_decay", "clip", "patience")  # every stage's output depends on these,
LAYERS = ("layer_map", "embedding", "hidden", "attention")  # on those that begin with its name, and two on more
STAGE = {"layers": LAYERS, "predictions": (*LAYERS, "method", "temperature", "prediction", "soft", "hard")}
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Settings:
    """Task distillation's settings, TinyBERT's own for QNLI; `key=value` on the command line changes one."""
    method: Literal["tinybert", "joint", "gold"] = "tinybert"  # joint: layers, predictions and gold at once; gold: these alone
    rows: PositiveInt | None = None  # training rows used, drawn by the seed; None: all
    length: Annotated[int, Field(ge=8)] = 128  # most tokens of a row, [CLS] and both [SEP] counted; 8 leaves room for both texts
    batch: PositiveInt = 32  # rows of an update
    warmup: Share = 0.1  # share of the updates of a linear schedule
    weight_decay: NonNegativeFloat = 0.01  # not on bias and LayerNorm
    clip: NonNegativeFloat = 1.0  # largest global gradient norm; 0: any
    patience: NonNegativeInt = 0  # epochs without a better dev figure that end a training; 0: none do
    teacher_lr: NonNegativeFloat = 3e-5  # linear; small teachers want more (a 6-layer, 384 wide one 1e-4)
    teacher_epochs: NonNegativeInt = 3
    min_teacher: Share = 0.6  # a teacher below this dev accuracy is refused
    augment: NonNegativeInt = 0  # tries a text at a new row, TinyBERT's are 20 and take long; 0: no augmentation
    augment_p: Share = 0.4  # probability of a word to be changed
    augment_k: PositiveInt = 15  # likely or near words that it is changed for
    layers_lr: NonNegativeFloat = 5e-5  # constant, without warm-up
    layers_epochs: NonNegativeInt = 10
    layer_map: str = "uniform"  # uniform, last or first: the teacher layer of each student layer
    embedding: NonNegativeFloat = 1.0  # weight of the embedding term; joint 0.3
    hidden: NonNegativeFloat = 1.0  # weight of each layer's hidden term; joint 0.3
    attention: NonNegativeFloat = 1.0  # weight of each layer's attention-score term; joint 0.5
    predictions_lr: NonNegativeFloat = 3e-5  # linear
    predictions_epochs: NonNegativeInt = 3
    temperature: PositiveFloat = 1.0  # of both models' predictions; joint 2.0
    prediction: Literal["kl", "tinybert"] = "kl"  # summed over labels; tinybert: cross-entropy, mean over labels
    soft: NonNegativeFloat = 0.2  # weight of the predictions beside the layers' terms, in method=joint
    hard: NonNegativeFloat = 0.1  # weight of the labels beside them
    gold_lr: NonNegativeFloat = 3e-5  # linear; method=gold
    gold_epochs: NonNegativeInt = 3

    def of(self, stage: str) -> dict:
        """The settings that a stage's output depends on."""
        return {key: value for key, value in vars(self).items() if key.startswith(stage) or key in COMMON + STAGE.get(stage, ())}


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; reading it imports no torch."""
    parser = argparse.ArgumentParser(prog="finetune/qnli.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Task distillation on QNLI: does a sentence answer a question?",
                                     epilog=f"key=value settings: {', '.join(vars(Settings()))} (see finetune/qnli.py)")
    parser.error = lambda text: parser.exit(2, f"error: {text}; see python finetune/qnli.py --help\n")
    parser.add_argument("--teacher", default="bert-base-uncased", help="folder or hub name; fine-tuned unless it knows QNLI")
    parser.add_argument("--student", default="runs/general/students/tiny4", help="from general distillation, or any BERT")
    parser.add_argument("--data", default="glue", help="glue, or a folder with train.tsv and dev.tsv (or .csv, .parquet)")
    parser.add_argument("--columns", default="question,sentence,label", help="of the data: one or two texts, then the label")
    parser.add_argument("--labels", default="entailment,not_entailment", help="of the data, in the order of the outputs")
    parser.add_argument("--out", default="runs/qnli", help="gets a folder a stage (student/ is last), report.html, .md, .json")
    parser.add_argument("--stages", help=f"run some of {','.join(METHODS['tinybert'])} alone; what they read must be there")
    parser.add_argument("--mlm", help="masked LM with its head, for augment=N: a word becomes one that it finds likely")
    parser.add_argument("--glove", metavar="FILE", help="words and vectors, for all other words; else the teacher's embeddings")
    parser.add_argument("--compare", nargs="+", default=[], metavar="MODEL", help="other classifiers for the table; goes last")
    parser.add_argument("--seed", default=0, type=int, help="of order, dropout and new weights")
    parser.add_argument("--seeds", default=1, type=int, metavar="N", help="runs, with a seed more each, in OUT/seed-S")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher gives it
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes a setting, such as teacher_lr=1e-4")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the stages; what a person got wrong is one line and exit code 2."""
    given, rank = options(argv), os.environ.get("RANK", "0")
    try:
        if given.seeds < 1:
            raise ValueError(f"seeds {given.seeds}: write 1 or more")
        settings = override(Settings(**JOINT if "method=joint" in given.settings else {}), given.settings)
        from finetune.stages import Run, met, several
        print(several(given, settings) if given.seeds > 1 else met().together(lambda: Run(given, settings)).run())
        met().leave()
        return 0
    except ValueError as error:  # where ranks have met they all have the same
        said = "" if rank != "0" and "finetune.stages" in sys.modules else " ".join(str(error).split())
    except Exception as error:
        why = error.__context__ if isinstance(error, RuntimeError) else error  # torch has one behind a full disk's
        if "by peer" in str(error):  # gloo's words
            said = f"rank {rank} lost another rank; the same command goes on after the last whole epoch"
        elif isinstance(why, OSError) or "(os error " in str(why):  # the latter: safetensors' and tokenizers' own
            said = f"--out {given.out}: {why}; make room or mend it, then the same command goes on"
        else:
            raise
    except KeyboardInterrupt:
        said = "stopped; the same command goes on after the last whole epoch"
    if said:
        print("error:", said, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
