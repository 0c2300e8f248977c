"""What the run reached: a table to print, report.md and report.json."""

import json
import math
import platform
from pathlib import Path
from statistics import median

import torch
from torch import nn

from finetune.data import Rows
from finetune.score import predict, speeds

SPEED_BATCH = 32  # rows beside each other when sentences/s are measured
HEAD = ("model", "parameters", "accuracy", "of the teacher's", "agrees with it", "sentences/s", "speed")


def figures(models: dict[str, nn.Module], dev: Rows, teacher: str | None) -> list[dict]:
    """A line a model in eval mode; what compares with the teacher is None where there is none."""
    gold = torch.tensor(dev.labels)
    said = {name: predict(model, dev) for name, model in models.items()}
    share = {name: (labels == gold).double().mean().item() for name, labels in said.items()}
    speed = speeds(models, dev, SPEED_BATCH)
    return [{
        "model": name, "parameters": sum(p.numel() for p in model.parameters()), "accuracy": share[name],
        "standard_error": math.sqrt(share[name] * (1 - share[name]) / len(dev)),
        "of_teacher": share[name] / max(share[teacher], 1e-9) if teacher else None,
        "agreement": (said[name] == said[teacher]).double().mean().item() if teacher else None,
        "sentences_per_second": median(speed[name]),
        "speed_ratio": median(a / b for a, b in zip(speed[name], speed[teacher], strict=True)) if teacher else None,
    } for name, model in models.items()]


def table(models: list[dict]) -> str:
    """The figures as a Markdown table, padded so that it reads well in a terminal."""
    cells = [HEAD] + [(
        f["model"], f"{f['parameters'] / 1e6:.1f} M", f"{f['accuracy']:.1%} ± {f['standard_error']:.1%}",
        *("" if f[key] is None else f"{f[key]:.1%}" for key in ("of_teacher", "agreement")),
        f"{f['sentences_per_second']:.0f}", f"{f['speed_ratio']:.2f} x" if f["speed_ratio"] else "") for f in models]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    rows = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def device_line(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, bfloat16 autocast"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), float32"


def read(out: Path) -> dict:
    """What report.json says; empty where it is not there or not whole."""
    try:
        return json.loads((out / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def text(report: dict) -> str:
    """report.md."""
    return (f"# QNLI\n\n{table(report['models'])}\n\n"
            f"Accuracy on {report['dev_rows']:,} dev rows of {report['data']}, with its standard error; "
            f"{report['train_rows']:,} training rows, seed {report['seed']}, method {report['settings']['method']}. "
            f"Sentences/s (rows of question and sentence): batch {SPEED_BATCH}, medians of interleaved rounds on "
            f"{report['device']}.\n")


def write(out: Path, report: dict) -> str:
    """report.md, then report.json, each whole or not at all; gives the text of report.md."""
    for name, content in (("report.md", text(report)), ("report.json", json.dumps(report, indent=2) + "\n")):
        part = out / f"{name}.part"
        part.write_text(content, encoding="utf-8")
        part.replace(out / name)
    return text(report)
