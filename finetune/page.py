"""report.html: one self-contained page; matplotlib and markdown are in the extra `export`."""

import html
import io

import markdown
import matplotlib
import numpy as np
import pandas
from matplotlib.figure import Figure

from finetune.report import SPEED_ROWS, text

STYLE = "body { font: 15px sans-serif; max-width: 75em; margin: 2em auto } td, th { padding: 0.2em 0.8em; text-align: right }"
BINS = 10  # of probability


def page(report: dict, answers: pandas.DataFrame) -> str:
    """The text of report.md under four plots: accuracy and speed, learning curves, confusion, calibration."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    speed, curves, confusion, calibration = figure.subplots(2, 2).flat
    for f in report["models"]:
        (low, high), share = f["interval"], f["accuracy"]
        speed.errorbar([*f["rows_per_second"].values()][0], share, [[max(0, share - low)], [max(0, high - share)]], fmt="o",
                       label=f["model"])
    speed.set(title="Accuracy against speed", xlabel=f"rows a second, batch {[*SPEED_ROWS][0]}", ylabel="dev accuracy")
    for name, record in report["stages"].items():
        if epochs := [line for line in record["figures"].get("epochs", []) if "dev_accuracy" in line]:
            curves.plot([line["epoch"] for line in epochs], [line["dev_accuracy"] for line in epochs], "o-", label=name)
    curves.set(title="Learning curves", xlabel="epoch", ylabel="dev accuracy")
    counts = pandas.crosstab(answers.gold, answers.student)
    confusion.imshow(counts, cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        confusion.text(column, row, f"{count:,}", ha="center", va="center", bbox={"color": "white", "alpha": 0.8})
    confusion.set(title="Confusion", xlabel="the student says", ylabel="gold")
    confusion.set_xticks(range(counts.shape[1]), counts.columns)
    confusion.set_yticks(range(counts.shape[0]), counts.index)
    for name in (name for name in ("teacher", "student") if name in answers):
        sure = answers[f"{name}_probability"]
        bins = pandas.DataFrame({"sure": sure, "right": answers[name] == answers.gold}).groupby((sure * BINS).astype(int)).mean()
        calibration.plot(bins.sure, bins.right, "o-", label=name)
    calibration.plot([0, 1], [0, 1], ":", color="gray")
    calibration.set(title="Calibration", xlabel="probability of the label it gives", ylabel="share of rows where that is right")
    for axes in (speed, curves, calibration):
        axes.legend() if axes.get_legend_handles_labels()[0] else None
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):  # the same figures, the same bytes
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    words = markdown.markdown(html.escape(text(report), quote=False), extensions=["tables"])
    svg = drawn.getvalue()
    return f"<!doctype html><meta charset='utf-8'><title>QNLI</title><style>{STYLE}</style>\n{svg[svg.index('<svg'):]}\n{words}\n"
