"""The QNLI stage: its command line and every number that changes what a run learns; torch comes after both are checked.

    python finetune/qnli.py --teacher bert-base-uncased --student runs/general/students/tiny4 --data glue"""

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a script: python puts finetune/ on the path, not the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.recipe import did_you_mean, override

METHODS = {"tinybert": ("teacher", "augment", "layers", "predictions", "report"),  # and the stages of each
           "joint": ("teacher", "augment", "predictions", "report"), "gold": ("gold", "report")}
JOINT = {"embedding": 0.3, "hidden": 0.3, "attention": 0.5, "temperature": 2.0}  # what method=joint begins with
LEAST = {"rows": 1, "batch": 1, "augment_k": 1, "length": 8}  # others: 0; length has room for two texts, three special tokens
COMMON = ("rows", "length", "batch", "warmup", "weight_decay", "clip", "patience")  # every stage's output depends on these,
LAYERS = ("layer_map", "embedding", "hidden", "attention")  # on those that begin with its name, and two on more
STAGE = {"layers": LAYERS, "predictions": (*LAYERS, "method", "temperature", "prediction", "soft", "hard")}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Task distillation's settings, TinyBERT's own for QNLI; `key=value` on the command line changes one."""

    method: str = "tinybert"  # layers, then predictions; joint: both and gold labels at once; gold: these alone, no teacher
    rows: int | None = None  # training rows used, drawn by the seed; None: all
    length: int = 128  # most tokens of a row, [CLS] and both [SEP] counted
    batch: int = 32  # rows of an update
    warmup: float = 0.1  # share of the updates of a linear schedule
    weight_decay: float = 0.01  # not on bias and LayerNorm
    clip: float = 1.0  # largest global gradient norm; 0: any
    patience: int = 0  # epochs without a better dev figure after which a training ends; 0: none does
    teacher_lr: float = 3e-5  # linear; small teachers want more (a 6-layer, 384 wide one 1e-4)
    teacher_epochs: int = 3
    min_teacher: float = 0.6  # a teacher below this dev accuracy is refused
    augment: int = 0  # tries a text at a new row, TinyBERT's are 20 and take long; 0: no augmentation
    augment_p: float = 0.4  # probability of a word to be changed
    augment_k: int = 15  # likely or near words that it is changed for
    layers_lr: float = 5e-5  # constant, without warm-up
    layers_epochs: int = 10
    layer_map: str = "uniform"  # uniform, last or first: the teacher layer of each student layer
    embedding: float = 1.0  # weight of the embedding term; joint 0.3
    hidden: float = 1.0  # weight of each layer's hidden term; joint 0.3
    attention: float = 1.0  # weight of each layer's attention-score term; joint 0.5
    predictions_lr: float = 3e-5  # linear
    predictions_epochs: int = 3
    temperature: float = 1.0  # of both models' predictions; joint 2.0
    prediction: str = "kl"  # summed over labels; tinybert: cross-entropy, mean over labels
    soft: float = 0.2  # weight of the predictions beside the layers' terms, in method=joint
    hard: float = 0.1  # weight of the labels beside them
    gold_lr: float = 3e-5  # linear; method=gold
    gold_epochs: int = 3

    def __post_init__(self):
        for name, value in asdict(self).items():
            if isinstance(value, (int, float)) and not (value >= LEAST.get(name, 0) and math.isfinite(value)):
                raise ValueError(f"{name}={value}: must be a number of at least {LEAST.get(name, 0)}")
            if name in ("warmup", "min_teacher", "augment_p") and value > 1:
                raise ValueError(f"{name}={value}: a share, from 0 to 1")
        if self.temperature == 0:
            raise ValueError("temperature=0.0: must be above 0")
        for name, known in {"method": METHODS, "prediction": ("kl", "tinybert")}.items():
            if (given := getattr(self, name)) not in known:
                raise ValueError(f"{name}={given!r}{did_you_mean(given, known)} (there are {', '.join(known)})")

    def of(self, stage: str) -> dict:
        """The settings that a stage's output depends on."""
        return {name: value for name, value in asdict(self).items() if name in (*COMMON, *STAGE.get(stage, ())) or
                name.startswith(stage)}


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; reading it imports no torch."""
    parser = argparse.ArgumentParser(
        prog="finetune/qnli.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Task distillation on QNLI: does a sentence answer a question?",
        epilog=f"key=value settings: {', '.join(Settings.__dataclass_fields__)} (see finetune/qnli.py)")
    parser.add_argument("--teacher", default="bert-base-uncased", help="folder or hub name; fine-tuned unless it knows QNLI")
    parser.add_argument("--student", default="runs/general/students/tiny4", help="from general distillation, or any BERT")
    parser.add_argument("--data", default="glue", help="glue, or a folder with train.tsv and dev.tsv (or .csv, .parquet)")
    parser.add_argument("--columns", default="question,sentence,label", help="of the data: one or two texts, then the label")
    parser.add_argument("--labels", default="entailment,not_entailment", help="of the data, in the order of the outputs")
    parser.add_argument("--out", default="runs/qnli", help="gets a folder a stage (student/ is the last), report.md, report.json")
    parser.add_argument("--stages", help=f"run some of {','.join(METHODS['tinybert'])} alone; what they read must be there")
    parser.add_argument("--mlm", help="masked LM with its head, for augment=N: a word becomes one that it finds likely")
    parser.add_argument("--glove", metavar="FILE", help="vectors for augment=N: a word becomes a near one (default: teacher's)")
    parser.add_argument("--compare", nargs="+", default=[], metavar="MODEL", help="other classifiers for the table; goes last")
    parser.add_argument("--seed", default=0, type=int, help="of order, dropout and new weights")
    parser.add_argument("--seeds", default=1, type=int, choices=range(1, 100), metavar="N", help="students, and their spread")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes a setting, such as teacher_lr=1e-4")
    return parser.parse_intermixed_args(argv)


def predict_options(argv: list[str]) -> argparse.Namespace:
    """The command line of `predict`."""
    parser = argparse.ArgumentParser(prog="finetune/qnli.py predict", description="A line a row: label, tab, probability.")
    parser.add_argument("--model", required=True, help="folder of a student, or any classifier")
    parser.add_argument("--columns", default="question,sentence", help="of a file with a header")
    parser.add_argument("file", nargs="?", default="-", help="text<tab>text or text a line, or a table like --data's; -: stdin")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the stages, or `predict`; what a person got wrong is one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    given = predict_options(argv[1:]) if argv[:1] == ["predict"] else options(argv)
    try:
        settings = override(Settings(**JOINT if "method=joint" in argv else {}), getattr(given, "settings", ()))
        import transformers

        from finetune import data, stages

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if argv[:1] == ["predict"]:
            pairs = data.read(Path("/dev/stdin" if given.file == "-" else given.file), tuple(given.columns.split(",")), ())
            print("\n".join(f"{label}\t{share:.4f}" for label, share in stages.predict(given.model, pairs)))
            return 0
        text = stages.Run(given, settings).run()
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    table, cut = text.partition("\n\n## ")[:2]
    print(f"\n{table}\n\nThe student is {Path(given.out) / 'student'}; transformers opens it by that name." if cut else "done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
