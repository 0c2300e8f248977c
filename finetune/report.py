"""How good and how fast the classifiers are: measured, and as a table."""

import math
import time
from functools import partial
from statistics import median

import torch
from torch import nn

from finetune.data import Rows
from finetune.distill import each_row, logits, lowered

SPEED_BATCH = 32  # rows beside each other when sentences/s are measured
ROUNDS = 7  # of timing


@torch.inference_mode()
def speeds(models: dict[str, nn.Module], rows: Rows) -> dict[str, list[float]]:
    """Rows a second of each model, from host to host, in each of ROUNDS rounds of turns: a busy machine slows all of them."""
    numbers = list(range(min(4 * SPEED_BATCH, len(rows.labels))))
    batches = [rows.batch(numbers[n:n + SPEED_BATCH]) for n in range(0, len(numbers), SPEED_BATCH)]
    found: dict[str, list[float]] = {name: [] for name in models}
    for attempt in range(ROUNDS + 1):
        for name, model in models.items():
            started = time.perf_counter()
            with lowered(model.device, model.device.type == "cuda"):  # float32 on a CPU
                for batch in batches:
                    logits(model, batch.copy().to(model.device)).cpu()
            if attempt:  # the first round warms up
                found[name].append(len(numbers) / (time.perf_counter() - started))
    return found


def figures(models: dict[str, nn.Module], dev: Rows) -> list[dict]:
    """A line a model in eval mode; the first of two is the teacher, what compares with it is None for one alone."""
    said = {name: each_row(partial(logits, model), dev, model.device).argmax(-1) for name, model in models.items()}
    right = {name: (labels == dev.labels).double().mean().item() for name, labels in said.items()}
    speed, teacher = speeds(models, dev), next(iter(models)) if len(models) > 1 else None
    return [{
        "model": name, "parameters": model.num_parameters(), "accuracy": right[name],
        "standard_error": math.sqrt(right[name] * (1 - right[name]) / len(dev.labels)),
        "of_teacher": right[name] / max(right[teacher], 1e-9) if teacher else None,
        "agreement": (said[name] == said[teacher]).double().mean().item() if teacher else None,
        "sentences_per_second": median(speed[name]),
        "speed_ratio": median(a / b for a, b in zip(speed[name], speed[teacher], strict=True)) if teacher else None,
    } for name, model in models.items()]


def text(report: dict) -> str:
    """report.md from what report.json holds; its table is padded so that it reads well in a terminal."""
    cells = [("model", "parameters", "accuracy", "of the teacher's", "agrees with it", "sentences/s", "speed")]
    for f in report["models"]:
        shares = ["" if f[key] is None else f"{f[key]:.1%}" for key in ("of_teacher", "agreement")]
        cells.append((f["model"], f"{f['parameters'] / 1e6:.1f} M", f"{f['accuracy']:.1%} ± {f['standard_error']:.1%}", *shares,
                      f"{f['sentences_per_second']:.0f}", f"{f['speed_ratio']:.2f} x" if f["speed_ratio"] else ""))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    rows = [" | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    table = "\n".join(f"| {row} |" for row in rows)
    made = report["stages"].get("augment", {}).get("figures")
    words = (" ({rows:,} of them new: {words_by_mlm:,} words by {mlm}, {words_by_neighbours:,} by {neighbours}; the teacher "
             "labels {other_label:.1%} otherwise than their originals, and {teacher_not_gold:.1%} of these otherwise than gold)"
             ).format_map(made) if made else ""
    return (f"# QNLI\n\n{table}\n\nAccuracy on {report['dev_rows']:,} dev rows of {report['data']}, with its standard error; "
            f"{report['train_rows']:,} training rows{words}, seed {report['seed']}, method {report['settings']['method']}. "
            f"Sentences/s (rows of question and sentence): batch {SPEED_BATCH}, medians of interleaved rounds on "
            f"{report['device']}.\n")
