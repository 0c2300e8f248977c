"""What the run reached: a table to print, report.md and report.json."""

import json
import platform
import statistics
from pathlib import Path

import torch

from finetune.score import Score, agreement, ratio

SPEED_BATCH = 32  # rows beside each other when sentences/s are measured
HEAD = ("model", "parameters", "accuracy", "of the teacher's", "agrees with it", f"sentences/s (batch {SPEED_BATCH})", "speed")


def lines(scores: dict[str, Score], speed: dict[str, list[float]], teacher: str | None) -> list[dict]:
    """A line of figures a model; what compares with the teacher is None where there is none."""
    first = scores.get(teacher)
    return [{
        "model": name, "parameters": found.parameters, "accuracy": found.accuracy, "standard_error": found.error,
        "of_teacher": found.accuracy / first.accuracy if first else None,
        "agreement": agreement(found, first) if first else None,
        "sentences_per_second": statistics.median(speed[name]),
        "speed_ratio": ratio(speed[name], speed[teacher]) if first else None,
    } for name, found in scores.items()]


def table(figures: list[dict]) -> str:
    """The lines as a Markdown table, padded so that it reads well in a terminal."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    cells = [HEAD] + [(
        f["model"], f"{f['parameters'] / 1e6:.1f} M", f"{f['accuracy']:.1%} ± {f['standard_error']:.1%}",
        share(f["of_teacher"]), share(f["agreement"]), f"{f['sentences_per_second']:.0f}",
        "" if f["speed_ratio"] is None else f"{f['speed_ratio']:.2f} x") for f in figures]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [[cell.ljust(width) if place == 0 else cell.rjust(width)
             for place, (cell, width) in enumerate(zip(row, widths, strict=True))] for row in cells]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def device_line(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, bfloat16 autocast"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), float32"


def write(out: Path, report: dict) -> str:
    """report.md, then report.json, each whole or not at all; gives the text of report.md."""
    text = (f"# QNLI\n\n{table(report['models'])}\n\n"
            f"Accuracy on {report['dev_rows']:,} dev rows of {report['data']}, with its standard error; "
            f"{report['train_rows']:,} training rows, seed {report['seed']}, method {report['settings']['method']}. "
            f"Speed: medians of interleaved rounds on {report['device']}; a sentence is a whole question/sentence row.\n")
    for name, content in (("report.md", text), ("report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")):
        part = out / f"{name}.part"
        part.write_text(content, encoding="utf-8")
        part.replace(out / name)
    return text
