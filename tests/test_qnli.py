"""The QNLI stage as it is started: the same weights twice, whole stages, what is made again and why, one-line errors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_tokenizer
from safetensors.torch import load_file
from test_finetune import made_up_pairs, save_model, save_place, write_table, write_tsv
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from finetune import data, distill, qnli, report, stages
from finetune.qnli import Settings
from pretrain.recipe import override

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["batch=8", "length=32", "teacher_epochs=1", "layers_epochs=1", "predictions_epochs=1", "gold_epochs=1",
         "min_teacher=0", "teacher_lr=1e-3", "layers_lr=1e-3", "predictions_lr=1e-3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_folder):
    """A teacher, a narrower student and 40 + 20 rows."""
    return save_place(tmp_path_factory.mktemp("qnli"), tokenizer_folder)


def run(place, out, *more, teacher="teacher", student="student", rows="rows"):
    return qnli.main(["--teacher", str(place / teacher), "--student", str(place / student), "--data", str(place / rows),
                      "--out", str(out), *QUICK, *more])


@pytest.fixture(scope="module")
def done(place):
    """A whole run."""
    assert run(place, place / "out") == 0
    return place / "out"


def test_a_run_leaves_whole_folders_and_a_table(done, place, capsys):
    assert sorted(path.name for path in done.iterdir()) == [
        "errors.tsv", "layers", "report.html", "report.json", "report.md", "student", "teacher"]
    written = json.loads((done / "report.json").read_text())
    for line, name in zip(written["models"], ("teacher", "student"), strict=True):
        stored = json.loads((done / name / "tokenizer.json").read_text())
        assert stored["truncation"] is None and stored["padding"] is None  # though rows were cut and padded with it
        model = AutoModelForSequenceClassification.from_pretrained(done / name)
        assert line["model"] == f"{name} {name}" and line["parameters"] == model.num_parameters()
        assert min(line["rows_per_second"].values()) > 0 and 0 <= line["accuracy"] <= 1
    assert written["models"][0]["of_teacher"] == written["models"][0]["agreement"] == 1
    assert (done / "report.md").read_text() == report.text(written)
    assert load_file(done / "layers" / "projection.safetensors")["weight"].shape == (24, 16)


def test_the_student_opens_without_us(done, tmp_path):
    code = ("import sys; from transformers import pipeline; "
            f"p = pipeline('text-classification', {str(done / 'student')!r}); m = p.model.config; "
            "print(m.id2label, m._attn_implementation, p({'text': 'ba be ?', 'text_pair': 'bi bo'})['label'], "
            "'pretrain' in sys.modules)")
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.startswith("{0: 'entailment', 1: 'not_entailment'} sdpa ") and said.endswith("entailment False\n")


def test_a_second_start_skips_what_is_there(done, place, capsys):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    assert run(place, done) == 0
    assert capsys.readouterr().out.count("skipped") == 4
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before


def test_the_same_seed_gives_the_same_weights_and_another_one_others(done, place):
    for number, seed in enumerate((0, 1)):
        assert run(place, place / f"again{number}", "--seed", str(seed)) == 0
        for name in ("teacher", "layers", "student"):
            same = (done / name / "model.safetensors").read_bytes() == (
                place / f"again{number}" / name / "model.safetensors").read_bytes()
            assert same == (seed == 0), name


def test_a_run_goes_on_after_the_last_whole_stage(done, place, capsys):
    out = place / "cut"
    shutil.copytree(done, out)
    shutil.rmtree(out / "student")
    (out / "report.json").unlink()
    (out / "student.part").mkdir()
    (out / "student.part" / "model.safetensors").write_bytes(b"half")
    assert run(place, out) == 0
    said = capsys.readouterr().out
    assert said.count("skipped") == 2 and "student: makes" in said and "report: accuracy" in said
    assert (out / "student" / "model.safetensors").read_bytes() == (done / "student" / "model.safetensors").read_bytes()


def test_other_settings_and_damage_make_a_stage_again_and_delete_nothing(done, place, capsys):
    out = place / "changed"
    shutil.copytree(done, out)
    with (out / "layers" / "config.json").open("a") as file:
        file.write("\n")
    assert run(place, out, "predictions_lr=2e-3") == 0
    said = capsys.readouterr().out
    assert "teacher: " in said and said.count("skipped") == 1
    assert "layers: makes" in said and "again (a file is missing or changed)" in said
    assert "student: makes" in said and "predictions_lr was 0.001, is 0.002" in said
    assert (out / "layers.1").is_dir() and (out / "student.1").is_dir()


def test_gold_uses_no_teacher(place):
    assert run(place, place / "gold", "method=gold") == 0
    assert sorted(path.name for path in (place / "gold").iterdir()) == [
        "errors.tsv", "report.html", "report.json", "report.md", "student"]
    assert json.loads((place / "gold" / "report.json").read_text())["models"][0].keys().isdisjoint({"of_teacher", "agreement"})


def test_an_error_leaves_nothing_and_the_next_start_a_whole_one(tmp_path):
    def half(part):
        (part / "a").write_text("half")
        raise ValueError("no")

    def whole(part):
        (part / "a").write_text("whole")
        return {}

    for other in ({"seed": 0}, {"seed": 1}):
        with pytest.raises(ValueError, match="no"):
            stages.stage(tmp_path / "s", other, half)
        assert not list(tmp_path.iterdir())
    stages.stage(tmp_path / "s", {"seed": 1}, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["s"] and (tmp_path / "s" / "a").read_text() == "whole"


def test_several_seeds_are_the_runs_of_each_and_a_table_of_all(done, place, capsys):
    assert run(place, place / "seeds", "--seeds", "2") == 0
    said = capsys.readouterr().out
    for name in ("teacher", "layers", "student"):
        assert (place / "seeds" / "seed-0" / name / "model.safetensors").read_bytes() == (
            done / name / "model.safetensors").read_bytes()
    reports = [json.loads((place / "seeds" / f"seed-{n}" / "report.json").read_text()) for n in (0, 1)]
    assert [each["seed"] for each in reports] == [0, 1]
    a, b = (each["models"][1]["accuracy"] for each in reports)
    text = (place / "seeds" / "seeds.md").read_text()
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")]
    # of two numbers the sample's standard deviation is their distance over the root of 2
    assert cells[1:3] == ["student student", f"{(a + b) / 2:.1%} ± {abs(a - b) / 2**0.5:.1%}"]
    assert "2 seeds: mean ± standard deviation" in text and text in said
    assert run(place, place / "seeds", "--seeds", "2", "--stages", "teacher") == 0
    assert "student" not in (said := capsys.readouterr().out) and said.endswith("done\n")


def test_a_task_of_single_sentences_and_three_labels_goes_the_whole_road(place, tmp_path):
    rows = [("bado fogu", "low"), ("lamu", "mid"), ("nipo bado", "high")] * 8
    for split in ("train", "dev"):
        write_table(tmp_path / f"{split}.csv", rows)
    task = ("--columns", "text,kind", "--labels", "low,mid,high", "augment=1")
    assert run(place, tmp_path / "out", *task, rows=tmp_path) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "student")
    assert model.config.id2label == {0: "low", 1: "mid", 2: "high"}
    new = (tmp_path / "out" / "augment" / "train.tsv").read_text().splitlines()
    assert new[0] == "index\ttext\tkind" and len(new) > 25
    assert (tmp_path / "out" / "errors.tsv").read_text().startswith("index\tquestion\tsentence\tgold\t")


def test_unnamed_outputs_are_tried_both_ways(place, tokenizer_folder, tmp_path):
    folder = save_model(tmp_path / "given", tokenizer_folder, BertForSequenceClassification)
    model = distill.open_classifier(folder, 0, torch.device("cpu"))
    dev = made_up_pairs(20, 1)
    batch = data.Rows(AutoTokenizer.from_pretrained(folder), dev, 32).batch(list(range(20)))
    said = distill.logits(model, batch).argmax(-1).tolist()
    (tmp_path / "rows").mkdir()
    opposite = [pair._replace(label=1 - label) for pair, label in zip(dev, said, strict=True)]
    for name in ("train.tsv", "dev.tsv"):
        write_tsv(tmp_path / "rows" / name, opposite)
    assert run(place, tmp_path / "out", teacher=folder, rows=tmp_path / "rows") == 0
    record = json.loads((tmp_path / "out" / "teacher" / "stage.json").read_text())
    assert record["figures"] == {"dev_accuracy": 1.0, "epochs": []}
    flipped = load_file(tmp_path / "out" / "teacher" / "model.safetensors")
    assert torch.equal(flipped["classifier.weight"], model.classifier.weight[[1, 0]])


# errors


@pytest.mark.parametrize("arguments, says", [
    (["predictions_lrr=1"], "unknown setting 'predictions_lrr'; did you mean 'predictions_lr'?"),
    (["batch=many"], "batch=many: must be a valid integer, unable to parse string as an integer; write such as batch=32"),
    (["batch"], "'batch' is no setting; write key=value"),
    (["batch=0"], "batch=0: must be greater than 0; write such as batch=32"),
    (["temperature=0"], "temperature=0: must be greater than 0"),
    (["min_teacher=2"], "min_teacher=2: must be less than or equal to 1"),
    (["method=glod"], "method=glod: must be 'tinybert', 'joint' or 'gold'"),
    (["length=65"], "length=65: these models read at most 64 tokens; write length=64"),
    (["--data", "gleu"], "data 'gleu': no such folder; give one with train.tsv and dev.tsv, or glue"),
    (["--data", "{place}"], "train.tsv: no such file; a QNLI folder holds train.tsv and dev.tsv"),
    (["--teacher", "/no/such/folder"], "model '/no/such/folder': no such folder"),
    (["--student", "{place}/rows"], "the folder holds no model that transformers opens"),
    (["--student", "{place}/heads"], "has 4 attention heads, student"),
    (["--student", "{place}/words"], "have different vocabularies"),
    (["--student", "{place}/deep"], "a student of 4 layers is deeper than its teacher; write layers=3 or fewer"),
    (["teacher_lr=1e30", "clip=0"], "teacher: the loss became nan; write a smaller teacher_lr= or clip="),
    (["min_teacher=1"], "is below min_teacher=1.0: a student would learn its mistakes"),
    (["--columns", "label"], "columns label, labels entailment,not_entailment: write one or two texts' columns and"),
    (["--columns", "question,text,label"], "train.tsv: no column 'text' in ['index', 'question', 'sentence', 'label']"),
    (["--labels", "yes,no"], "train.tsv: row 2: unknown label"),
    (["--out", "{place}/rows/dev.tsv"], "is a file; give a folder"),
    (["--seeds", "0"], "seeds 0: write 1 or more"),
])
def test_errors_are_one_line(place, tokenizer_folder, tmp_path, capsys, arguments, says):
    if not (place / "words").exists():
        save_model(place / "heads", tokenizer_folder, heads=2)
        save_model(place / "deep", tokenizer_folder, layers=4)
        save_model(place / "words", save_tokenizer(tmp_path / "cased", do_lower_case=False), layers=2)
    out = tmp_path / "out"
    assert run(place, out, *(argument.format(place=place) for argument in arguments)) == 2
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if line.startswith("error: ")] == [said.splitlines()[-1]]
    assert says in said.splitlines()[-1] and "Traceback" not in said
    assert not (out / "student").exists()


def test_it_runs_as_a_script_and_as_a_module_and_helps_without_torch(tmp_path):
    for how, where in (([str(ROOT / "finetune" / "qnli.py")], tmp_path), (["-m", "finetune.qnli"], ROOT)):
        command = [sys.executable, "-X", "importtime", *how, "--help"]
        said = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
        assert said.returncode == 0 and "train.tsv" in said.stdout
        assert "| torch\n" not in said.stderr
    assert override(Settings(), ["rows=100"]).rows == 100


def test_an_unknown_option_is_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        qnli.main(["--teachr", "x"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --teachr; see python finetune/qnli.py --help\n")


@pytest.mark.parametrize("raised, says", [
    (KeyboardInterrupt(), "stopped; the same command goes on after the last whole epoch"),
    (OSError(28, "No space"), "--out {out}: [Errno 28] No space; make room or mend it, then the same command goes on")])
def test_what_ends_a_run_from_outside_is_one_line(place, tmp_path, capsys, monkeypatch, raised, says):
    def ended(*_):
        raise raised

    monkeypatch.setattr(stages.Run, "make", ended)
    assert run(place, tmp_path / "out") == 2
    assert capsys.readouterr().err == f"error: {says.format(out=tmp_path / 'out')}\n"
