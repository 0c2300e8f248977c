"""The command line of general distillation, started by launch/general.sh."""

import argparse
import os
import sys

from pretrain.recipe import RECIPES, SHAPES, Recipe


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; reading it imports no torch."""
    parser = argparse.ArgumentParser(
        prog="deepspeed launch/general.sh", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Distil a small BERT from a big one: embeddings, hidden states and attention scores.",
        epilog="key=value settings: " + ", ".join(Recipe.__dataclass_fields__) + " (see pretrain/recipe.py)")
    parser.add_argument("--shards", default="data/shards", help="folder written by python -m shards.build")
    parser.add_argument("--teacher", default="bert-base-uncased", help="model folder or hub name")
    parser.add_argument("--student", action="append", help=f"{', '.join(SHAPES)}, or NAME:layers=3,hidden=288; may be "
                        "given several times (one teacher pass for all); default: tiny4")
    parser.add_argument("--engine", help="DeepSpeed file; default: ds_configs/ gpu-bf16.json, gpu-fp16.json or cpu.json, "
                        "by device")
    parser.add_argument("--out", default="runs/general", help="folder of the run; the same command goes on in it")
    parser.add_argument("--recipe", default="tinybert", help=f"settings to begin from: {', '.join(RECIPES)}")
    parser.add_argument("--teacher-dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                        help="the teacher's own; auto: 16 bit where the device multiplies it fast")
    parser.add_argument("--fresh", action="store_true", help="begin at step 0; an old run is renamed to OUT.1, OUT.2, ...")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher gives it; LOCAL_RANK is what is read
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings over the recipe's")
    parser.error = _refuse  # one line on one rank, as for every other error
    return parser.parse_intermixed_args(argv)


def _refuse(text: str) -> None:
    raise ValueError(f"{text}; see bash launch/general.sh --help")


def main(argv: list[str] | None = None) -> None:
    """Run; an error of the user's is one line on rank 0 and exit code 2 on every rank."""
    try:
        given = options(argv)
        run(given)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def run(given: argparse.Namespace) -> None:
    """Check every input, join the other ranks, load, go on from the newest good checkpoint, train, export."""
    from pretrain import engine  # here: --help answers without torch
    from pretrain.plan import resolve

    plan = wrong = None
    try:
        plan = resolve(given)
    except ValueError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        wrong = error  # perhaps on this rank alone: another host may lack the shards
    from pretrain.train import Run

    ranks = engine.join()
    try:
        ranks.agree(wrong)
        Run(plan, ranks).finish()
    finally:
        engine.leave()
