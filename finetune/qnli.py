"""The QNLI stage: fine-tune the teacher, distil its layers and its predictions into the student, report.

    python finetune/qnli.py --teacher bert-base-uncased --student runs/general/students/tiny4 --data glue
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

if __package__ in (None, ""):  # started as a script: python puts finetune/ on the path, not the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from finetune.settings import Settings
from pretrain.recipe import override


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; reading it imports no torch."""
    parser = argparse.ArgumentParser(
        prog="finetune/qnli.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Task distillation on QNLI: does a sentence answer a question?",
        epilog="key=value settings: " + ", ".join(field.name for field in fields(Settings))
               + " (see finetune/settings.py)")
    parser.add_argument("--teacher", default="bert-base-uncased",
                        help="model folder or hub name; fine-tuned first unless it is a QNLI model already")
    parser.add_argument("--student", default="runs/general/students/tiny4", help="folder from general distillation, or "
                        "any BERT-like model")
    parser.add_argument("--data", default="glue", help="glue, python-docs, or a folder with train.tsv and dev.tsv")
    parser.add_argument("--out", default="runs/qnli", help="gets teacher/, layers/, student/, report.md, report.json")
    parser.add_argument("--seed", default=0, type=int, help="of order, dropout, new weights and python-docs' split")
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
        text = run_all(given.teacher, given.student, given.data, Path(given.out), settings, given.seed)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"\n{text}\nThe student is {Path(given.out) / 'student'}; transformers opens it by that name.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
