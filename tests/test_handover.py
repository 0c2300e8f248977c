"""What leaves the stage: the predict command, the student's card, the file for GLUE's server."""

import json
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from test_finetune import made_up_pairs, rows_of, save_model, save_place
from test_qnli import run
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, pipeline

from finetune import data, qnli, report
from finetune.data import LABELS

ROOT = Path(__file__).resolve().parent.parent
PAIRS = made_up_pairs(150, 9)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_folder):
    """A teacher, a narrower student, 40 + 20 rows and 150 without labels."""
    folder = save_place(tmp_path_factory.mktemp("handover"), tokenizer_folder)
    lines = [("index", "question", "sentence"), *((n, *pair[:2]) for n, pair in enumerate(PAIRS))]
    (folder / "rows" / "test.tsv").write_bytes(data.tsv(lines))
    save_model(folder / "classifier", tokenizer_folder, BertForSequenceClassification, seed=3, initializer_range=0.5,
               id2label={0: "not_entailment", 1: "entailment"}, label2id={"not_entailment": 0, "entailment": 1})
    return folder


def direct(folder, pairs=PAIRS):
    """Labels and probabilities by transformers alone, row by row."""
    model, rows = AutoModelForSequenceClassification.from_pretrained(folder).eval(), rows_of(folder, pairs, 64)
    for n in range(len(pairs)):
        batch = rows.batch([n])
        with torch.no_grad():
            share = model(batch.input_ids, batch.attention_mask, batch.token_type_ids).logits.softmax(-1)[0]
        yield model.config.id2label[share.argmax().item()], share.max().item()


@pytest.mark.parametrize("kind", ["header.tsv", "plain.tsv", "plain.txt", "table.csv", "table.parquet"])
def test_predictions_stand_in_the_order_of_the_rows(place, tmp_path, capsys, kind):
    file = tmp_path / kind
    if kind.startswith("table"):
        table = pandas.DataFrame({"sentence": [pair.sentence for pair in PAIRS], "question": [pair.question for pair in PAIRS]})
        table.to_parquet(file) if kind.endswith("parquet") else table.to_csv(file, index=False)
    else:
        header = [("index", "sentence", "question")] if kind == "header.tsv" else []
        file.write_bytes(data.tsv([*header, *(((7, p.sentence, p.question) if header else p[:2]) for p in PAIRS)]))
    assert qnli.main(["predict", "--model", str(place / "classifier"), str(file)]) == 0
    said = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    wanted = list(direct(place / "classifier"))
    assert [label for label, _ in said] == [label for label, _ in wanted] and len({label for label, _ in said}) == 2
    # printed to four places, computed in other batches
    assert [float(share) for _, share in said] == pytest.approx([share for _, share in wanted], abs=6e-5)


def test_predict_reads_standard_input_and_single_texts(place):
    texts = "".join(f"{pair.question}\n" for pair in PAIRS[:5])
    command = [sys.executable, str(ROOT / "finetune" / "qnli.py"), "predict", "--model", str(place / "classifier")]
    said = subprocess.run(command, input=texts, capture_output=True, text=True, check=True).stdout.splitlines()
    classify = pipeline("text-classification", str(place / "classifier"))
    assert [line.split("\t")[0] for line in said] == [one["label"] for one in classify(texts.splitlines())]


@pytest.mark.parametrize("text, says", [
    ("a\tb\nc\n", "line 2: 1 fields between tabs, the header has 2"),
    ("a\tb\n \tc\n", "line 2: an empty question"),
    ("a\tb\tc\n", "no column 'question' (its header has a, b, c)"),
    ("question\tsentence\n", "a header and no rows"),
    ("", "no column 'question' (its header has )"),
])
def test_what_cannot_be_read_is_an_error_with_its_line(place, tmp_path, capsys, text, says):
    (tmp_path / "rows.tsv").write_text(text)
    assert qnli.main(["predict", "--model", str(place / "classifier"), str(tmp_path / "rows.tsv")]) == 2
    said = capsys.readouterr()
    assert not said.out and says in said.err and len(said.err.splitlines()) == 1


def test_a_model_that_is_no_classifier_is_refused(place, tmp_path, capsys):
    (tmp_path / "rows.tsv").write_text("a\tb\n")
    assert qnli.main(["predict", "--model", str(place / "student"), str(tmp_path / "rows.tsv")]) == 2
    assert "is no classifier; give the folder of one, such as runs/qnli/student" in capsys.readouterr().err


def test_the_student_has_a_card_and_glues_server_its_file(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(place, out, "predictions_lr=2e-3") == 0
    card, written = (out / "student" / "README.md").read_text(), json.loads((out / "report.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-classification\n---\n")
    assert report.text(written).split("\n\n")[1] in card  # the table
    says = "It says of question and sentence: entailment or not_entailment."
    for part in (str(place / "teacher"), str(place / "rows"), "`predictions_lr=0.002`", says):
        assert part in card
    lines = [line.split("\t") for line in (out / "QNLI.tsv").read_text().splitlines()]
    assert lines[0] == ["index", "prediction"] and [int(number) for number, _ in lines[1:]] == list(range(150))
    assert [label for _, label in lines[1:]] == [label for label, _ in direct(out / "student")]
    assert {label for _, label in lines[1:]} <= {*LABELS}
    capsys.readouterr()
    assert run(place, out, "predictions_lr=2e-3") == 0 and capsys.readouterr().out.count("skipped") == 4  # a card changes no sum
