"""How good and how fast the classifiers are and where they err: measured, and as tables."""

import math
import re
import time
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev

import pandas
import torch
from tabulate import tabulate
from torch import Tensor, nn

from finetune.data import Pair, Rows
from finetune.distill import each_row, logits, lowered

SPEED_ROWS = {32: 128, 1: 32}  # of each measured batch size
ROUNDS = 7  # of timing
WORST = 20  # rows to read
QUESTION = r"\b(who|whom|whose|what|when|where|which|why|how)\b"


@torch.inference_mode()
def speeds(models: dict[str, tuple[nn.Module, Rows]], size: int) -> dict[str, list[float]]:
    """Rows a second from host to host (bfloat16 on a GPU), in each of ROUNDS rounds of turns: a busy machine slows all."""
    numbers, found = range(min(SPEED_ROWS[size], *(len(rows.labels) for _, rows in models.values()))), {}
    batches = {name: [rows.batch([*numbers[n:n + size]]) for n in numbers[::size]] for name, (_, rows) in models.items()}
    for attempt in range(ROUNDS + 1):
        for name, (model, _) in models.items():
            started = time.perf_counter()
            with lowered(model.device, model.device.type == "cuda"):
                for batch in batches[name]:
                    logits(model, batch.copy().to(model.device)).cpu()
            if attempt:  # the first round warms up
                found.setdefault(name, []).append(len(numbers) / (time.perf_counter() - started))
    return found


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` rows."""
    z = 1.959964**2 / count
    middle, half = share + z / 2, math.sqrt(share * (1 - share) * z + z * z / 4)
    return (middle - half) / (1 + z), (middle + half) / (1 + z)


def figures(models: dict[str, tuple[nn.Module, Rows]], teacher: str | None) -> tuple[list[dict], dict[str, Tensor]]:
    """A line a model, without what compares where there is no teacher; each one's probabilities (rows, labels)."""
    speed, lines, shares = {size: speeds(models, size) for size in SPEED_ROWS}, {}, {}
    for name, (model, rows) in models.items():
        shares[name] = each_row(partial(logits, model), rows, model.device).softmax(-1)
        said, files = shares[name].argmax(-1), Path(model.name_or_path).glob("*.safetensors")
        accuracy = (said == rows.labels).double().mean().item()
        lines[name] = {"model": name, "parameters": model.num_parameters(), "accuracy": accuracy,
                       "bytes": sum(file.stat().st_size for file in files) or model.get_memory_footprint(),  # the hub's: the same
                       "interval": interval(accuracy, len(said)), "rows_per_second": {n: median(speed[n][name]) for n in speed}}
        if teacher:  # it comes first
            lines[name] |= {
                "of_teacher": accuracy / max(lines[teacher]["accuracy"], 1e-9),
                "agreement": (said == shares[teacher].argmax(-1)).double().mean().item(),
                "speed_ratio": {n: median(a / b for a, b in zip(speed[n][name], speed[n][teacher], strict=True)) for n in speed}}
    return [*lines.values()], shares


def answers(dev: list[Pair], shares: dict[str, Tensor], labels: tuple) -> pandas.DataFrame:
    """Each dev row with its gold label, each model's and how probable it finds that (rows, labels), and who is right."""
    table = pandas.DataFrame(dev).rename_axis("index").rename(columns={"label": "gold"})
    table["gold"] = table.gold.map(labels.__getitem__)
    for name, share in shares.items():
        best = share.max(-1)
        table[name], table[f"{name}_probability"] = [labels[n] for n in best.indices.tolist()], best.values.numpy().round(4)
    table["right"] = [" and ".join(name for name in shares if row[name] == row["gold"]) or "neither"
                      for row in table.to_dict("records")]
    return table


def errors(table: pandas.DataFrame, names: list[str]) -> dict:
    """`errors`: (group, rows, each model's share of errors) by question word, length, overlap; `worst`: rows to read."""
    words = [[set(re.findall(r"\w+", text)) for text in column.str.lower()] for column in (table.question, table.sentence)]
    shared = pandas.Series([len(one & other) / max(1, len(one)) for one, other in zip(*words, strict=True)])
    groups = {"question word": table.question.str.lower().str.extract(QUESTION)[0].fillna("none"),
              "words": pandas.cut((table.question + " " + table.sentence).str.split().str.len(), [0, 20, 30, 40, 60, math.inf]),
              "share of the question's words in the sentence": pandas.cut(shared, [0, 0.25, 0.5, 0.75, 1], include_lowest=True)}
    wrong = table[table.student != table.gold].nlargest(WORST, "student_probability").reset_index()
    return {"worst": wrong.to_dict("records"), "errors": {kind: [
        [str(group), len(part), *(float((part[name] != part.gold).mean()) for name in names)]
        for group, part in table.groupby(key, observed=True)] for kind, key in groups.items()}}


def grid(head: list[str], rows: list[list]) -> str:
    """A Markdown table that reads well in a terminal."""
    return tabulate(rows, head, "pipe", disable_numparse=True, colalign=["left", *["right"] * (len(head) - 1)])


def text(report: dict) -> str:
    """report.md from what report.json holds; what stands before its second heading is for the terminal."""
    cells, names = [], [name for name in ("teacher", "student") if name in report["stages"]]
    for f in report["models"]:
        compared = [f"{f[key]:.1%}" if key in f else "" for key in ("of_teacher", "agreement")]
        ratios = [f", {ratio:.2f} x" for ratio in f["speed_ratio"].values()] if "speed_ratio" in f else [""] * len(SPEED_ROWS)
        speed = [f"{rate:.0f}/s{ratio}" for rate, ratio in zip(f["rows_per_second"].values(), ratios, strict=True)]
        cells.append([f["model"], f"{f['parameters'] / 1e6:.1f} M", f"{f['bytes'] / 1e6:.1f} MB", f"{f['accuracy']:.1%}",
                      "{:.1%} to {:.1%}".format(*f["interval"]), *compared, *speed])
    made = report["stages"].get("augment", {}).get("figures")
    words = (" ({rows:,} of them new: {words_by_mlm:,} words by {mlm}, {words_by_neighbours:,} by {neighbours}; the teacher "
             "labels {other_label:.1%} otherwise than their originals, and {teacher_not_gold:.1%} of these otherwise than gold)"
             ).format_map(made) if made else ""
    said = (f"Accuracy on {report['dev_rows']:,} dev rows of {report['data']}; {report['train_rows']:,} training rows{words}, "
            f"seed {report['seed']}, method {report['settings']['method']}. Rows a second: medians of interleaved rounds on "
            f"{report['device']}.")
    if len(students := report["students"]) > 1:
        said += f" Students of {len(students)} seeds: mean {mean(students):.1%}, standard deviation {stdev(students):.1%}."
    rates = [grid([kind, "rows", *names], [[group, f"{count:,}", *(f"{share:.1%}" for share in shares)]
                                           for group, count, *shares in rows]) for kind, rows in report["errors"].items()]
    worst = ["- {index}: **{question}** {sentence} (gold {gold}, said {student} with {student_probability:.1%})".format_map(row)
             for row in report["worst"]]
    head = ["model", "parameters", "size", "accuracy", "95 % interval", "of the teacher's", "agrees with it"]
    return "\n\n".join(["# QNLI", grid([*head, *(f"batch {size}" for size in SPEED_ROWS)], cells), said, "## Shares of errors",
                        *rates, f"## The student's {len(worst)} surest errors", "\n".join(worst), ""])


def card(report: dict, given) -> str:
    """The README.md of the student's folder: what it is, of what it was made and how, how good it is."""
    changed = "`, `".join(f"{key}={value}" for key, value in report["settings"].items())
    table = text(report).partition("\n\n## ")[0].partition("\n")[2]
    labels = given.labels.replace(",", " or ")
    return ("---\nlibrary_name: transformers\npipeline_tag: text-classification\n---\n# A distilled classifier\n\n"
            f"It says of {' and '.join(given.columns.split(',')[:-1])}: {labels}. Made from `{given.student}` with "
            f"`{given.teacher}` as the teacher on the rows of `{given.data}`.\n{table}\n\nSettings: `{changed}`.\n")
