"""The report: intervals, ratios and agreement against direct counts, other models beside ours, where the models err."""

import csv
import json
import math
import shutil

import pytest
import torch
from test_finetune import CPU, made_up_pairs, rows_of, save_model, save_place
from test_qnli import run
from transformers import BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from finetune import data, distill, report
from finetune.data import LABELS, Pair


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_folder):
    """A teacher, a narrower student, 40 + 20 rows, a classifier of other width."""
    folder = save_place(tmp_path_factory.mktemp("report"), tokenizer_folder)
    save_model(folder / "other", tokenizer_folder, BertForSequenceClassification, width=32, layers=1, seed=5,
               id2label=dict(enumerate(LABELS)), initializer_range=0.5)
    return folder


@pytest.fixture(scope="module")
def done(place):
    """A whole run with another model beside it."""
    assert run(place, place / "out", "--compare", str(place / "other")) == 0
    return place / "out"


def read(done):
    return json.loads((done / "report.json").read_text())


def said(done, place, name):
    """The probabilities (rows, labels) of a folder, by transformers alone."""
    folder = place / name if name == "other" else done / name
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    rows = rows_of(folder, data.read(place / "rows" / "dev.tsv"))
    batch = rows.batch(list(range(20)))
    with torch.no_grad():
        return model(batch.input_ids, batch.attention_mask, batch.token_type_ids).logits.softmax(-1), rows.labels


def is_wilsons(interval: list[float], share: float, count: int) -> None:
    """The interval holds the shares that a test of 95 % does not refuse (Wilson, 1927)."""
    low, high = interval
    for edge in (low, high):
        deviation = math.sqrt(count) * abs(share - edge)
        assert deviation == pytest.approx(1.959964 * math.sqrt(max(0, edge * (1 - edge))), abs=1e-6)
    assert -1e-12 <= low <= share <= high <= 1 + 1e-12 and low < high


def test_a_line_for_every_model_with_the_teacher_first(done, place):
    lines = read(done)["models"]
    assert [line["model"] for line in lines] == ["teacher teacher", "student student", "other"]
    (teacher, gold), (ours, _), (other, _) = (said(done, place, name) for name in ("teacher", "student", "other"))
    for line, shares, folder in zip(lines, (teacher, ours, other), (done / "teacher", done / "student", place / "other")):
        right = (shares.argmax(-1) == gold).double().mean().item()
        assert line["accuracy"] == right
        is_wilsons(line["interval"], right, 20)
        assert line["of_teacher"] == right / lines[0]["accuracy"]
        assert line["agreement"] == (shares.argmax(-1) == teacher.argmax(-1)).double().mean().item()
        assert line["bytes"] == (folder / "model.safetensors").stat().st_size > 4 * line["parameters"]
        assert [*line["rows_per_second"], *line["speed_ratio"]] == ["32", "1"] * 2
        assert min(*line["rows_per_second"].values(), *line["speed_ratio"].values()) > 0
    assert lines[0]["speed_ratio"] == {"32": 1, "1": 1}


def test_errors_are_listed_with_what_both_said(done, place):
    (ours, gold), (teacher, _) = (said(done, place, name) for name in ("student", "teacher"))
    dev = data.read(place / "rows" / "dev.tsv")
    with (done / "errors.tsv").open(newline="") as file:
        listed = {int(row["index"]): row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}
    wrong = {n for n in range(20) if {ours[n].argmax().item(), teacher[n].argmax().item()} != {gold[n].item()}}
    assert listed.keys() == wrong and wrong
    for n, row in listed.items():
        assert (row["question"], row["sentence"], row["gold"]) == (dev[n].question, dev[n].sentence, LABELS[gold[n]])
        for name, shares in (("student", ours), ("teacher", teacher)):
            assert row[name] == LABELS[shares[n].argmax()]
            assert float(row[f"{name}_probability"]) == pytest.approx(shares[n].max().item(), abs=1e-4)
        right = [name for name in ("teacher", "student") if row[name] == row["gold"]]
        assert row["right"] == (right[0] if right else "neither") and len(right) < 2


def test_rates_count_each_row_once_and_the_worst_rows_are_the_surest_wrong_ones():
    pairs = [Pair("Who is it ?", "It is he .", 0), Pair("is it he ?", "It is he .", 0), Pair("How ?", "x " * 59, 1),
             Pair("When and where was it ?", "no", 1)]
    shares = {"teacher": torch.tensor([[.95, .05], [.95, .05], [.15, .85], [.35, .65]]),
              "student": torch.tensor([[.95, .05], [.25, .75], [.85, .15], [.35, .65]])}
    table, found = report.answers(pairs, shares, LABELS)
    assert [*table.right] == ["teacher and student", "teacher", "teacher", "teacher and student"]
    first, words, overlap = ([[*row.values()] for row in rows] for rows in found["errors"])
    assert [*found["errors"][0][0]] == ["question word", "rows", "teacher", "student"]
    assert first == [["how", 1, 0, 1], ["none", 1, 0, 1], ["when", 1, 0, 0], ["who", 1, 0, 0]]
    assert words == [["(0.0, 20.0]", 3, 0, pytest.approx(1 / 3)], ["(60.0, inf]", 1, 0, 1]]
    assert [count for _, count, *_ in overlap] == [2, 1, 1]  # 0 and 0; 2 of 3; 3 of 3
    assert [row["index"] for row in found["worst"]] == [2, 1] and found["worst"][0]["gold"] == "not_entailment"
    assert found["confusion"].tolist() == [[1, 1], [1, 1]]  # of two rows of each label the student is right about one
    sure, right = found["calibration"]["teacher"]
    assert sure == pytest.approx([0.65, 0.85, 0.95], abs=1e-6) and right.tolist() == [1, 1, 1]
    sure, right = found["calibration"]["student"]
    assert sure == pytest.approx([0.65, 0.75, 0.85, 0.95], abs=1e-6) and right.tolist() == [1, 0, 0, 1]


def test_the_report_has_the_sections_and_the_terminal_the_table_alone(done, place, capsys):
    written = (done / "report.md").read_text()
    assert written == report.text(read(done))
    assert written.count("\n## ") == 2 and "question word" in written and "surest errors" in written
    assert run(place, done, "--compare", str(place / "other")) == 0
    shown = capsys.readouterr().out
    assert "| other " in shown and "## " not in shown and "report.json is of these models and rows; skipped" in shown
    assert run(place, done) == 0  # other models: measured again
    assert "report: accuracy and speed" in capsys.readouterr().out and len(read(done)["models"]) == 2


def test_plots_show_counts_of_the_dev_rows(done, place):
    found = read(done)
    for name in ("teacher", "student"):
        shares, gold = said(done, place, name)
        probability, label = (values.numpy() for values in shares.max(-1))
        tenths = [[n for n in range(20) if int(10 * probability[n]) == tenth] for tenth in range(5, 11)]
        bins = [rows for rows in tenths if rows]
        sure, right = found["calibration"][name]
        assert sure == pytest.approx([probability[rows].mean() for rows in bins], abs=1e-6)
        assert right == [(label[rows] == gold.numpy()[rows]).mean() for rows in bins]
    assert found["confusion"] == [[sum((label == n) & (gold.numpy() == g)) for n in (0, 1)] for g in (0, 1)]


def test_the_page_is_made_of_the_json_alone(done, place):
    assert (done / "report.html").read_text() == report.page(read(done))
    titles = ("Accuracy against speed", "Learning curves: accuracy", "Learning curves: loss", "Confusion", "Calibration")
    shown = ("teacher, dev accuracy", "layers, dev loss", "student, loss", *titles, *LABELS)
    assert [words for words in shown if f">{words}<" not in report.page(read(done))] == []


def test_a_report_of_an_older_version_is_measured_again(done, place, tmp_path, capsys):
    shutil.copytree(done, out := tmp_path / "out")
    old = {key: value for key, value in read(out).items() if key not in ("confusion", "calibration")}
    (out / "report.json").write_text(json.dumps(old))
    (out / "report.html").unlink()
    assert run(place, out, "--compare", str(place / "other")) == 0
    assert capsys.readouterr().out.count("skipped") == 3  # the stages
    assert {*read(out)} == {*read(done)} and (out / "report.html").read_text() == report.page(read(out))


def test_models_of_another_vocabulary_and_without_names_are_measured_too(place, tmp_path, tokenizer_folder):
    from conftest import save_tokenizer

    folder = save_tokenizer(tmp_path / "cased", do_lower_case=False)
    config = RobertaConfig(vocab_size=700, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                           max_position_embeddings=40, pad_token_id=0)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    assert run(place, tmp_path / "out", "method=gold", "length=48", "--compare", str(folder)) == 0
    ours, other = json.loads((tmp_path / "out" / "report.json").read_text())["models"]
    assert other["model"] == "cased" and other["accuracy"] >= 0.5 and "of_teacher" not in ours
    rows = rows_of(folder, made_up_pairs(3, 0))
    assert distill.each_row(lambda batch: batch.labels, rows, CPU).shape == (3,)


@pytest.mark.parametrize("name, says", [
    ("{place}/teacher", "compare {place}/teacher: is no classifier with the labels entailment,not_entailment; give one"),
    ("no/such-model", "model 'no/such-model': not a folder here, and the hub did not give it"),
])
def test_a_model_that_is_no_classifier_is_refused_before_anything_is_made(place, tmp_path, capsys, name, says):
    assert run(place, tmp_path / "out", "--compare", name.format(place=place)) == 2
    assert says.format(place=place) in capsys.readouterr().err and not (tmp_path / "out").exists()
