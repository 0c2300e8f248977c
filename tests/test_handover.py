"""What leaves the QNLI stage: ONNX against torch, rows of the report, card, GLUE's file; answers for rows."""

import io
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pandas
import pytest
import torch
from huggingface_hub import ModelCard
from test_finetune import made_up_pairs, save_model, save_place, write_table
from test_qnli import run
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finetune import data, report
from finetune.data import LABELS
from finetune.distill import BATCH
from launch import handover, predict

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [pair[:2] for pair in made_up_pairs(150, 9)]
ACTIVE = ["<script>alert(1)</script> ?", "![a](http://example.com/a.png) [b](http://example.com) ?"]
MODELS = ["student", "student/onnx/model.onnx", "student/onnx/model-int8.onnx"]


@pytest.fixture(scope="module")
def done(tmp_path_factory, tokenizer_folder):
    """A run, handed over, on rows that hold HTML and Markdown, and rows without labels in another order than their index."""
    place = save_place(tmp_path_factory.mktemp("handover"), tokenizer_folder)
    shutil.rmtree(place / "student")  # another one, whose answers differ from row to row
    save_model(place / "student", tokenizer_folder, width=16, layers=2, seed=1, initializer_range=0.5)
    with (place / "rows" / "dev.tsv").open("a") as file:  # each with both labels: one of them is among the errors
        file.writelines(f"9\t{text}\tba be\t{label}\n" for text in ACTIVE for label in LABELS)
    lines = [("index", "question", "sentence"), *((n, *PAIRS[n]) for n in reversed(range(150)))]
    (place / "rows" / "test.tsv").write_bytes(data.tsv(lines))
    assert run(place, place / "out", "length=64") == 0 and handover.main([str(place / "out")]) == 0
    return place / "out"


def read(done):
    return json.loads((done / "report.json").read_text())


def direct(folder, rows=PAIRS):
    """(label, probability) by transformers alone, row by row."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for row in rows:
        with torch.no_grad():
            shares = model(**tokenizer(*([row] if isinstance(row, str) else row), return_tensors="pt")).logits.softmax(-1)[0]
        yield model.config.id2label[shares.argmax().item()], shares.max().item()


@pytest.mark.parametrize("rows, length", [(1, 1), (1, 64), (7, 23), (33, 8)])
def test_onnx_says_what_torch_says_on_ragged_batches_of_any_size(done, rows, length):
    model = AutoModelForSequenceClassification.from_pretrained(done / "student").eval()
    onnx, draw = predict.OnnxClassifier(done / "student/onnx/model.onnx"), torch.Generator().manual_seed(rows)
    ids, segments = (torch.randint(most, (rows, length), generator=draw) for most in (model.config.vocab_size, 2))
    real = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=draw)).long()
    with torch.no_grad():
        wanted = model(ids, real, segments).logits
    given = onnx(input_ids=ids, attention_mask=real, token_type_ids=segments).logits
    assert (given - wanted).abs().max() <= handover.CLOSE
    other = onnx(input_ids=(ids + 1) % model.config.vocab_size, attention_mask=real, token_type_ids=segments).logits
    assert (other - given).abs().max() > handover.CLOSE  # so that the bound tells answers apart


def test_a_file_that_says_otherwise_leaves_nothing(done, tmp_path, monkeypatch, capsys):
    shutil.copytree(done, out := tmp_path / "out", ignore=shutil.ignore_patterns("onnx"))
    before = {path: path.is_file() and path.read_bytes() for path in out.rglob("*")}
    model = handover.opened(AutoModelForSequenceClassification, str(out / "student"), attn_implementation="eager").eval()
    model.classifier.bias.data += 2 * handover.CLOSE
    monkeypatch.setattr(handover, "opened", lambda *given, **more: model)
    assert handover.main([str(out)]) == 2
    assert re.search(r"its logits in ONNX differ from torch's by 0.0002\d*, more than 0.0001\n$", capsys.readouterr().err)
    assert {path: path.is_file() and path.read_bytes() for path in out.rglob("*")} == before


def test_the_table_has_both_files(done):
    teacher, student, exact, small = read(done)["models"]
    assert (exact["model"], small["model"]) == ("student student, ONNX", "student student, ONNX int8")
    assert [exact["bytes"], small["bytes"]] == [(done / model).stat().st_size for model in MODELS[1:]]
    assert small["bytes"] < exact["bytes"]
    assert all(exact[key] == student[key] for key in ("parameters", "accuracy", "interval", "agreement", "of_teacher"))
    assert small.keys() == student.keys() and small["interval"][0] <= small["accuracy"] <= small["interval"][1]
    assert min(*exact["speed_ratio"].values(), *small["rows_per_second"].values()) > 0
    assert (done / "report.md").read_text() == report.text(read(done)) and teacher["speed_ratio"] == {"32": 1, "1": 1}
    made = json.loads((done / "student/onnx/stage.json").read_text())["figures"]
    assert read(done)["models"] == made["models"]  # all speeds of one run
    on_gpu = {"device": "a GPU", "models": (own := [teacher | {"rows_per_second": {}}, student, small | {"model": "other"}])}
    for _ in range(2):
        handover.merge(on_gpu, made, 2)
        assert on_gpu["models"] == [*own, exact, small]
        assert on_gpu["device"] == f"a GPU; ONNX's beside the teacher on CPU, {made['threads']} thread(s), float32"


def test_a_second_start_writes_the_same_bytes_and_no_stage_is_made_again(done, capsys):
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    said = subprocess.run([sys.executable, ROOT / "launch/handover.py", done], capture_output=True, text=True, check=True).stdout
    assert said.count("skipped") == 1 and said.count("wrote ") == 3
    assert run(done.parent, done, "length=64") == 0
    assert (said := capsys.readouterr().out).count("skipped") == 4 and "ONNX int8" in said
    assert {path: path.read_bytes() for path in done.rglob("*") if path.is_file()} == before


def test_the_page_asks_for_nothing_and_runs_nothing(done):
    text = (done / "report.html").read_text()
    tags, asked = {*re.findall(r"<(\w+)", text)}, re.findall(r"\b(?:src|href|srcset|data)\s*=\s*[\"']?([^\"' >]*)", text)
    assert not tags & {"script", "link", "img", "iframe", "a", "object"} and {"svg", "table", "strong"} <= tags
    # In the drawing: parts of it, and the colours of the confusion.
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in asked) and text.count("url(") == text.count("url(#")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "http://example.com/a.png" in text  # as words
    assert text == report.page(read(done)) and text.count("student student, ONNX int8<") == 2  # in a plot and in the table


def test_the_card_states_what_the_student_is_made_of(done):
    card = ModelCard.load(done / "student" / "README.md")
    assert card.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "text-classification"}
    wanted = [f"Data: `{done.parent / 'rows'}`, 40 training rows, 24 dev rows",
              f"Teacher: `{done.parent}/teacher`", f"was before: `{done.parent}/student`",
              "predictions_lr=0.001", "seed=0", "entailment or not_entailment", report.text(read(done)).split("\n\n")[1]]
    assert [part for part in wanted if part not in card.text] == []


def test_glues_server_gets_its_file_in_the_order_of_the_index(done):
    lines = [line.split("\t") for line in (done / "QNLI.tsv").read_text().splitlines()]
    assert lines == [["index", "prediction"], *([str(n), label] for n, (label, _) in enumerate(direct(done / "student")))]
    assert {*LABELS} < {label for _, label in lines}  # both are said


def test_a_task_of_one_text_and_without_a_teacher(done, tmp_path):
    for split in ("train", "dev"):
        write_table(tmp_path / f"{split}.csv", [("bado fogu", "low"), ("lamu", "mid"), ("nipo bado", "high")] * 8)
    shutil.copy(done.parent / "rows" / "test.tsv", tmp_path)
    columns = ("--columns", "text,kind")
    assert run(done.parent, tmp_path / "out", *columns, "--labels", "low,mid,high", "method=gold", rows=tmp_path) == 0
    assert handover.main([str(tmp_path / "out")]) == 0
    student, exact, small = read(tmp_path / "out")["models"]
    assert exact["accuracy"] == student["accuracy"] and "agreement" not in small
    assert not (tmp_path / "out" / "QNLI.tsv").exists()  # other labels than GLUE's
    assert "Teacher: none" in (tmp_path / "out" / "student" / "README.md").read_text()


def said_of(capsys, *arguments):
    assert predict.main([*map(str, arguments)]) == 0
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("kind", ["tsv", "csv", "parquet"])
def test_answers_stand_in_the_order_of_the_rows(done, tmp_path, capsys, kind):
    table = pandas.DataFrame(PAIRS, columns=["question", "sentence"])[["sentence", "question"]].assign(id=7)
    file = tmp_path / f"rows.{kind}"
    {"tsv": lambda: file.write_bytes(data.tsv([table.columns, *table.itertuples(index=False)])),
     "csv": lambda: table.to_csv(file, index=False), "parquet": lambda: table.to_parquet(file)}[kind]()
    wanted = [*direct(done / "student")]
    for model in MODELS[:2]:
        said = said_of(capsys, done / model, file)
        assert [(int(number), label) for number, label, _ in said] == [(n, label) for n, (label, _) in enumerate(wanted)]
        assert [float(share) for *_, share in said] == pytest.approx([share for _, share in wanted], abs=1e-4)  # four places
    assert {label for _, label, _ in said_of(capsys, done / MODELS[2], file)} == {label for label, _ in wanted} == {*LABELS}


def test_it_answers_a_pipe_before_the_pipe_ends(done):
    lines = [f"{question}\t{sentence}\n" for question, sentence in PAIRS]
    command = [sys.executable, ROOT / "launch/predict.py", done / MODELS[1]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        (guard := threading.Timer(100, process.kill)).start()  # ends one that would wait for more than it is given
        process.stdin.writelines(lines[:BATCH])
        process.stdin.flush()
        said = [process.stdout.readline() for _ in range(BATCH)]
        said += process.communicate("".join(lines[BATCH:]))[0].splitlines()
        guard.cancel()
    wanted = [[str(n), label] for n, (label, _) in enumerate(direct(done / "student"))]
    assert process.returncode == 0 and [line.split("\t")[:2] for line in said] == wanted


@pytest.mark.parametrize("columns, given", [("text", "note\ttext\nx\tba be ?\nx\tnipo lamu\n"), ("any", "ba be ?\nnipo lamu\n"),
                                            ("any", "\ufeffany\r\nba be ?\r\nnipo lamu")])
def test_a_header_of_standard_input_is_no_row_and_one_text_is_enough(done, monkeypatch, capsys, given, columns):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    said = [label for _, label, _ in said_of(capsys, done / "student", "--columns", columns)]
    assert said == [label for label, _ in direct(done / "student", ["ba be ?", "nipo lamu"])]


@pytest.mark.parametrize("arguments, says", [
    (["{place}/none", "rows.tsv"], "no such folder. Give a folder with config.json"),
    (["{place}/none.onnx", "rows.tsv"], "none.onnx: no such file; python launch/handover.py runs/qnli makes one"),
    (["{place}/student", "rows.tsv"], "student: is no classifier; give the folder of one, such as runs/qnli/student"),
    (["lone.onnx", "rows.tsv"], "lone.onnx: no config.json in its folder or the one above; leave it where it was made"),
    (["{place}/broken.onnx", "rows.tsv"], "broken.onnx: does not open as ONNX"),
    (["{model}", "none.tsv"], "none.tsv: no such file; give a .tsv, .csv or .parquet file, or - for standard input"),
    (["{model}", "rows.tsv", "--columns", "question,sentense"], "column 'sentense' is not there; did you mean 'sentence'?"),
    (["{model}", "rows.parquet"], "rows.parquet: column 'question' is not there"),
    (["{model}", "rows.tsv", "--columns", "a,b,c"], "columns a,b,c: name one or two, such as --columns question,sentence"),
    (["{model}", "rows.tsv", "--length", "65"], "length 65: write --length from 8 to 64"),
    (["{model}", "rows.tsv"], "rows.tsv: row 3: an empty sentence"),
    (["{model}", "short.tsv"], "short.tsv: row 2: 1 fields, and not 2 (question, sentence)"),
    (["{model}", "twice.tsv"], "twice.tsv: column 'question' stands twice"),
    (["{model}", "header.tsv"], "header.tsv: no rows"),
    (["{model}", "bytes.tsv"], "bytes.tsv: after row 0: no UTF-8"),
    (["{model}", "quotes.csv"], "quotes.csv: after row 2: "),
])
def test_what_cannot_be_answered_is_one_line(done, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    head, place = "question\tsentence\n", tmp_path / "place"
    files = {"rows.tsv": f"{head}a\tb\nc\t \n", "short.tsv": f"{head}a\n", "header.tsv": head, "twice.tsv": f"question\t{head}",
             "bytes.tsv": f"{head}a\t\xff\n", "quotes.csv": 'question,sentence\na,"b"\n"a"b,c\n', "lone.onnx": "no model"}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    pandas.DataFrame({"text": ["a"]}).to_parquet("rows.parquet")
    shutil.copytree(done.parent / "student", place / "student")
    shutil.copy(done / "student" / "config.json", place)
    shutil.copy("lone.onnx", place / "broken.onnx")
    assert predict.main([argument.format(place=place, model=done / "student") for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert (err[:7], err.count("\n"), out) == ("error: ", 1, "") and says in err


def test_a_run_that_cannot_be_handed_over_is_one_line(done, tmp_path, monkeypatch, capsys):
    def says(*arguments):
        assert handover.main([*map(str, arguments)]) == 2
        said = capsys.readouterr()
        assert len(said.err.splitlines()) == 1 and not (out / "student" / "onnx").exists()
        return said.err

    shutil.copytree(done, out := tmp_path / "out", ignore=shutil.ignore_patterns("onnx"))
    assert "rows: no report.json in it; give the --out of a finished" in says(done.parent / "rows")
    assert "data 'none': no such folder; give one with train.tsv and dev.tsv, or glue" in says(out, "--data", "none")
    shutil.copytree(done.parent / "rows", other := tmp_path / "rows")
    (other / "dev.tsv").write_bytes((other / "train.tsv").read_bytes())
    assert f"data {other}: other rows than this run had ({done.parent / 'rows'}); give --data" in says(out, "--data", other)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        assert "onnxscript: not installed; pip install -e '.[export]'" in says(out)
    whole = read(out)
    (out / "report.json").write_text(json.dumps({key: whole[key] for key in whole if key != "confusion"}))
    assert "report.json: of an older version; start finetune/qnli.py again, which writes it anew" in says(out)
    (out / "report.json").write_text(json.dumps(whole))
    (out / "student" / "config.json").write_text("{}")
    assert "student: a file is missing or changed since report.json; start finetune/qnli.py again" in says(out)
