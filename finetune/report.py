"""How good and how fast the classifiers are and where they err: measured, as tables, and as a page with plots."""

import html
import io
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas
import torch
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from tabulate import tabulate

from finetune.data import Pair, Rows
from finetune.distill import each_row, logits, lowered
from shards.block import write, write_json

SPEED_ROWS = {32: 128, 1: 32}  # of each measured batch size
STYLE = "body { font: 15px sans-serif; max-width: 80em; margin: 2em auto } td, th { padding: 0.2em 0.5em; white-space: nowrap }"
QUESTION = r"\b(who|whom|whose|what|when|where|which|why|how)\b"


@torch.inference_mode()
def speeds(models: dict[str, tuple[torch.nn.Module, Rows]], size: int) -> pandas.DataFrame:
    """Rows a second of each model from host to host (bfloat16 on a GPU), a line a round of turns: a busy machine slows all."""
    numbers = [*range(min(SPEED_ROWS[size], *(len(rows.labels) for _, rows in models.values())))]
    turns = [(name, model, [rows.batch(numbers[n:n + size]) for n in numbers[::size]]) for name, (model, rows) in models.items()]
    rounds = {name: [] for name in models}
    for name, model, batches in turns * 8:
        started = time.perf_counter()
        with lowered(model.device, model.device.type == "cuda"):
            for batch in batches:
                logits(model, batch.copy().to(model.device)).cpu()
        rounds[name].append(len(numbers) / (time.perf_counter() - started))
    return pandas.DataFrame(rounds)[1:]  # the first one of eight warms up


def figures(models: dict[str, tuple[torch.nn.Module, Rows]], teacher: str | None) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """A line a model, its speed beside the first one's, its answers beside the teacher's; each one's shares (rows, labels)."""
    speed, lines, shares = {size: speeds(models, size) for size in SPEED_ROWS}, {}, {}
    for name, (model, rows) in models.items():
        shares[name] = each_row(partial(logits, model), rows, model.device).softmax(-1)
        said, files = shares[name].argmax(-1), Path(model.name_or_path).glob("*.safetensors")
        right = binomtest((said == rows.labels).sum().item(), len(said))
        lines[name] = {"model": name, "parameters": model.num_parameters(), "accuracy": right.statistic,
                       "bytes": sum(file.stat().st_size for file in files) or model.get_memory_footprint(),  # the hub's: the same
                       "interval": tuple(right.proportion_ci(method="wilson")),  # at 95 %
                       "rows_per_second": {size: rounds[name].median() for size, rounds in speed.items()},
                       "speed_ratio": {size: (rounds[name] / rounds.iloc[:, 0]).median() for size, rounds in speed.items()}}
        if teacher:  # it comes first
            lines[name] |= {"of_teacher": right.statistic / max(lines[teacher]["accuracy"], 1e-9),
                            "agreement": (said == shares[teacher].argmax(-1)).double().mean().item()}
    return [*lines.values()], shares


def answers(dev: list[Pair], shares: dict[str, torch.Tensor], labels: tuple) -> tuple[pandas.DataFrame, dict]:
    """Each dev row with its gold label, each model's and how probable it finds that, and who is right; and in figures: tables of
    `errors` by question word, length, overlap, `worst` rows to read, `confusion` (gold, said), `calibration` (sure, right)."""
    table, names = pandas.DataFrame(dev).rename_axis("index").rename(columns={"label": "gold"}), np.array(labels)
    table["gold"] = names[table.gold]
    for name, share in shares.items():
        table[name], table[f"{name}_probability"] = names[share.argmax(-1)], share.amax(-1).double().numpy().round(4)
    wrong = table[[*shares]].ne(table.gold, axis=0)
    table["right"] = [" and ".join(wrong.columns[~row]) or "neither" for row in wrong.to_numpy()]
    words = [column.str.lower().str.findall(r"\w+").map(set) for column in (table.question, table.sentence)]
    shared = pandas.Series([len(one & other) / max(1, len(one)) for one, other in zip(*words, strict=True)])
    groups = {"question word": table.question.str.lower().str.extract(QUESTION)[0].fillna("none"),
              "words": pandas.cut((table.question + " " + table.sentence).str.split().str.len(), [0, 20, 30, 40, 60, np.inf]),
              "share of the question's words in the sentence": pandas.cut(shared, [0, 0.25, 0.5, 0.75, 1], include_lowest=True)}
    rates = [wrong.assign(rows=1).groupby(key.rename(kind), observed=True).agg({"rows": "size"} | dict.fromkeys(shares, "mean"))
             .reset_index().astype({kind: str}).to_dict("records") for kind, key in groups.items()]
    worst = table[wrong.student].nlargest(20, "student_probability").reset_index().to_dict("records")
    confusion = confusion_matrix(table.gold, table.student, labels=labels)
    curves = {name: calibration_curve(~wrong[name], share.amax(-1).numpy(), n_bins=10)[::-1] for name, share in shares.items()}
    return table, {"errors": rates, "worst": worst, "confusion": confusion, "calibration": curves}


def grid(rows: list[dict]) -> str:
    """A Markdown table that reads well in a terminal; shares are written as such."""
    cells = [{key: f"{value:.1%}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    return tabulate(cells, "keys", "pipe", disable_numparse=True, colalign=["left"], colglobalalign="right")


def spread(reports: list[dict]) -> str:
    """A line a model: mean and standard deviation over runs of several seeds."""
    lines = pandas.DataFrame([line for each in reports for line in each["models"]])
    found = lines.groupby("model", sort=False)[lines.columns.intersection(["accuracy", "of_teacher", "agreement"])]
    shown = found.mean().map("{:.1%}".format) + " ± " + found.std().map("{:.1%}".format)
    return f"# QNLI, {len(reports)} seeds: mean ± standard deviation\n\n{grid(shown.reset_index().to_dict('records'))}\n"


def text(report: dict) -> str:
    """report.md from what report.json holds; what stands before its second heading is for the terminal."""
    models = [{"model": f["model"], "parameters": f"{f['parameters'] / 1e6:.1f} M", "size": f"{f['bytes'] / 1e6:.1f} MB",
               "accuracy": f["accuracy"], "95 % interval": "{:.1%} to {:.1%}".format(*f["interval"]),
               **({"of the teacher's": f["of_teacher"], "agrees with it": f["agreement"]} if "agreement" in f else {}),
               **{f"batch {n}": f"{rate:.0f}/s, {f['speed_ratio'][n]:.2f} x" for n, rate in f["rows_per_second"].items()}}
              for f in report["models"]]
    new = {"by": report["given"]["glove"] or "the teacher's embeddings"} | report["stages"].get("augment", {}).get("figures", {})
    words = (" ({rows:,} of them new, with {words_by_mlm:,} words by a masked LM and {words_by_neighbours:,} by {by}; "
             "{other_label:.1%} labelled otherwise than their originals)").format_map(new) if "rows" in new else ""
    said = (f"Accuracy on {report['dev_rows']:,} dev rows of {report['data']}; {report['train_rows']:,} training rows{words}, "
            f"seed {report['seed']}, method {report['settings']['method']}. Rows a second: medians on {report['device']}.")
    row = "- {index}: **{question}** {sentence} (gold {gold}, said {student} with {student_probability:.1%})"
    worst = [*map(row.format_map, report["worst"])]
    return "\n\n".join(["# QNLI", grid(models), said, "## Shares of errors", *map(grid, report["errors"]),
                        f"## The student's {len(worst)} surest errors", "\n".join(worst), ""])


def page(report: dict) -> str:
    """report.html: report.md's text under plots of accuracy and speed, learning curves, confusion, calibration; asks no host."""
    import markdown  # here: both take a second, and only this needs them
    import matplotlib.figure

    models, batch = report["models"], next(iter(report["models"][0]["speed_ratio"]))
    epochs = {name: record["figures"].get("epochs") or [{}] for name, record in report["stages"].items()}
    curves = {key: {f"{name}, {key.replace('_', ' ')}": ([line["epoch"] for line in lines], [line[key] for line in lines])
                    for name, lines in epochs.items() if key in lines[0]} for key in ("dev_accuracy", "loss", "dev_loss")}
    plots = [("Accuracy against speed", f"rows a second, times those of {models[0]['model']}, batch {batch}",
              "dev accuracy in its 95 % interval",
              {f["model"]: ([f["speed_ratio"][batch]] * 3, sorted([f["accuracy"], *f["interval"]])) for f in models}),
             ("Learning curves: accuracy", "epoch", "dev accuracy", curves["dev_accuracy"]),
             ("Learning curves: loss", "epoch", "mean over rows", curves["loss"] | curves["dev_loss"]),
             ("Calibration", "probability of the label it gives", "share of rows where that is right",
              report["calibration"] | {"as often as it is sure": ([0, 1], [0, 1])})]
    with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "none", "text.parse_math": False}):
        figure = matplotlib.figure.Figure(figsize=(12, 13), layout="constrained")
        *places, last = figure.subplot_mosaic("aa;bc;de").values()
        for axes, (title, x, y, lines) in zip(places, plots, strict=True):
            for label, values in lines.items():
                axes.plot(*values, "o-", label=label)
                axes.legend()
            axes.set(title=title, xlabel=x, ylabel=y)
            axes.locator_params("x", integer=x == "epoch")
        ConfusionMatrixDisplay(np.array(report["confusion"]), display_labels=report["given"]["labels"].split(",")).plot(
            ax=last, cmap="Blues", values_format=",", colorbar=False)
        last.set(title="Confusion", xlabel="the student says", ylabel="gold")
        figure.savefig(drawn := io.StringIO(), format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    # A row's text is text: no tag, and no link or picture of Markdown, which would have the page ask another host.
    words = markdown.markdown(html.escape(text(report), quote=False).replace("[", "&#91;"), extensions=["tables"])
    svg = drawn.getvalue()
    return f"<!doctype html><meta charset='utf-8'><title>QNLI</title><style>{STYLE}</style>\n{svg[svg.index('<svg'):]}\n{words}\n"


def save(out: Path, report: dict) -> str:
    """OUT/report.html, report.md and report.json, of which the first two are made; gives what is for the terminal."""
    write(out / "report.html", page(report).encode())
    write(out / "report.md", (said := text(report)).encode())
    write_json(out / "report.json", report)
    return said.partition("\n\n## ")[0]
