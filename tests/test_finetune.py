"""The QNLI stage: labels by name, losses against direct sums, the same weights twice, whole stages, one-line errors."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SYLLABLES, save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

from finetune import data, distill, docpairs, models, qnli, report, stage
from finetune.docpairs import Pair
from finetune.settings import COMMON, STAGE, Settings
from pretrain.encoder import Student, load_teacher
from pretrain.recipe import override

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
QUICK = ["batch=8", "length=32", "teacher_epochs=1", "layers_epochs=1", "predictions_epochs=1", "gold_epochs=1",
         "min_teacher=0", "teacher_lr=1e-3", "layers_lr=1e-3", "predictions_lr=1e-3"]


def save_model(folder, tokenizer_folder, kind=BertModel, *, width=24, layers=3, heads=4, seed=0, **more):
    """A small random BERT with its tokenizer, as a folder."""
    shutil.copytree(tokenizer_folder, folder)
    size = len(AutoTokenizer.from_pretrained(folder))
    config = BertConfig(vocab_size=size, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                        intermediate_size=2 * width, max_position_embeddings=64, **more)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder)
    return folder


def made_up_pairs(count, seed):
    rng = np.random.Generator(np.random.PCG64(seed))
    words = ["".join(rng.choice(SYLLABLES, size=2)) for _ in range(30)]

    def text(longest):
        return " ".join(rng.choice(words, size=rng.integers(2, longest)))

    return [Pair(text(6) + " ?", text(12) + ' ".', int(label)) for label in rng.integers(2, size=count)]


def write_tsv(path, pairs):
    rows = [f"{n}\t{p.question}\t{p.sentence}\t{data.LABELS[p.label]}" for n, p in enumerate(pairs)]
    path.write_text("\n".join(["index\tquestion\tsentence\tlabel", *rows]) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_folder):
    """A teacher, a narrower student and 40 + 20 rows."""
    folder = tmp_path_factory.mktemp("qnli")
    save_model(folder / "teacher", tokenizer_folder)
    save_model(folder / "student", tokenizer_folder, width=16, layers=2, seed=1)
    (folder / "rows").mkdir()
    write_tsv(folder / "rows" / "train.tsv", made_up_pairs(40, 0))
    write_tsv(folder / "rows" / "dev.tsv", made_up_pairs(20, 1))
    return folder


def run(place, out, *more, teacher="teacher", student="student", rows="rows"):
    return qnli.main(["--teacher", str(place / teacher), "--student", str(place / student), "--data", str(place / rows),
                      "--out", str(out), *QUICK, *more])


@pytest.fixture(scope="module")
def done(place):
    """A whole run."""
    assert run(place, place / "out") == 0
    return place / "out"


def rows_of(folder, pairs, length=32):
    return data.tokenize(AutoTokenizer.from_pretrained(folder), pairs, length)


# data


def test_quotes_have_no_meaning_and_columns_go_by_name(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b'\xef\xbb\xbflabel\tsentence\tquestion\r\nentailment\t"b\ta "?\r\n'
                                     b"not_entailment\td\tc?\r\n")
    assert data.read_tsv(tmp_path / "a.tsv") == [('a "?', '"b', 0), ("c?", "d", 1)]


@pytest.mark.parametrize("text, says", [
    ("index\tquestion\tsentence\n", "no column 'label'"),
    ("index\tquestion\tsentense\tlabel\n", "no column 'sentence'; did you mean 'sentense'"),
    ("index\tquestion\tsentence\tlabel\n", "a header and no rows"),
    ("question\tsentence\tlabel\na?\tb\tentailment\na?\tb\t\n", "line 3: no label; write entailment or not_entailment"),
    ("question\tsentence\tlabel\na?\tb\tneutral\n", "line 2: unknown label 'neutral'"),
    ("question\tsentence\tlabel\na?\tb\n", "line 2: 2 fields between tabs, the header has 3"),
    ("question\tsentence\tlabel\na?\t \tentailment\n", "line 2: an empty sentence"),
])
def test_a_bad_tsv_names_file_and_line(tmp_path, text, says):
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(ValueError, match=f"train.tsv.*{says}"):
        data.read_tsv(tmp_path / "train.tsv")


def test_rows_are_cut_to_length_and_no_stored_truncation_acts(tmp_path):
    folder = save_tokenizer(tmp_path / "stored", truncation=12)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pair = Pair("ba " * 9, "be " * 40, 0)
    whole, cut = (data.tokenize(tokenizer, [pair], length) for length in (64, 24))
    assert len(whole.ids[0]) == 9 + 40 + 3
    assert len(cut.ids[0]) == 24 and cut.segments[0] == [0] * 11 + [1] * 13  # 9 + [CLS] [SEP], then 12 + [SEP]
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1,
                                                     num_attention_heads=2, intermediate_size=8))
    models.save(model, tokenizer, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert stored["truncation"] is None and stored["padding"] is None


def test_batches_hold_every_row_once_padded_to_eights(tokenizer_folder):
    rows = rows_of(tokenizer_folder, made_up_pairs(103, 2))
    first, again, other = (list(rows.batches(4, torch.Generator().manual_seed(n))) for n in (0, 0, 1))
    assert sorted(n for batch in first for n in batch.rows) == list(range(103))
    assert [b.rows for b in first] == [b.rows for b in again] != [b.rows for b in other]
    for batch in first:
        assert batch.ids.shape == batch.real.shape == batch.segments.shape and batch.ids.shape[1] % 8 == 0
        for row, n in enumerate(batch.rows):
            assert batch.ids[row][batch.real[row]].tolist() == rows.ids[n]
    waste = sum((~batch.real).sum().item() for batch in first) / sum(batch.ids.numel() for batch in first)
    assert waste < 0.3


def test_python_docs_hold_no_package_in_both_splits_and_say_nothing_by_one_text(monkeypatch):
    found = list(docpairs.docstrings())  # read once: it takes seconds
    monkeypatch.setattr(docpairs, "docstrings", lambda: found)
    train, dev = docpairs.docs_pairs(0)
    assert len(train) > 2000 and 0.03 < len(dev) / len(train) < 0.15
    modules = docpairs._modules()
    packages = {doc.sentences[0]: docpairs.package(module) for module, docs in modules.items() for doc in docs}
    assert not {packages[pair.sentence] for pair in train} & {packages[pair.sentence] for pair in dev}
    for split in (train, dev):
        assert len(set(split)) == len(split)
        for text in (0, 1):  # each question and each sentence stands once with each label
            assert set(Counter((pair[text], pair.label) for pair in split).values()) == {1}
            assert {pair[text] for pair in split if pair.label} == {pair[text] for pair in split if not pair.label}
    assert docpairs.docs_pairs(0) == (train, dev) != docpairs.docs_pairs(1)


# losses


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_prediction_loss_is_a_divergence_summed_over_labels(temperature):
    s, t = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0))
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (t, s))
    direct = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(distill.prediction_kl(s, t, temperature), direct.float(), rtol=1e-5, atol=1e-7)
    assert distill.prediction_kl(t, t, temperature).abs().max() < 1e-7


def test_layers_loss_falls_and_the_teacher_neither_moves_nor_drops(place):
    teacher = load_teacher(str(place / "teacher"), torch.float32, CPU)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    model = models.open_classifier(str(place / "student"), 0)
    student = Student(model.base_model, 24)
    loss = distill.layer_loss(student, teacher, [2, 3], {"embedding": 1.0, "hidden": 1.0, "attention": 1.0})
    modes = []

    def measure():
        modes.append(teacher.training or any(part.training for part in teacher.modules()))
        return {}

    settings = Settings(layers_lr=3e-3, layers_epochs=4, batch=8)
    curve = distill.fit(student, loss, rows_of(place / "teacher", made_up_pairs(40, 3)), settings, "layers", 0, measure)
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]
    assert modes == [False] * 4
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_loss_that_is_no_number_stops_the_run(place):
    model = models.open_classifier(str(place / "student"), 0)
    rows = rows_of(place / "student", made_up_pairs(8, 3))
    with pytest.raises(ValueError, match="gold: the loss became nan; write a smaller gold_lr="):
        distill.fit(model, lambda batch: models.logits(model, batch)[:, 0] * np.nan, rows, Settings(), "gold", 0, dict)


def test_the_best_epoch_is_what_the_model_ends_with(place):
    model = models.open_classifier(str(place / "student"), 0)
    seen, marks = [], iter([0.5, 0.9, 0.7])

    def measure():
        seen.append(model.classifier.weight.clone())
        return {"dev_accuracy": next(marks)}

    rows = rows_of(place / "student", made_up_pairs(16, 3))
    distill.fit(model, distill.gold_loss(model), rows, Settings(gold_lr=1e-2), "gold", 0, measure, best="dev_accuracy")
    assert torch.equal(model.classifier.weight, seen[1]) and not torch.equal(seen[1], seen[2])


def test_rates():
    settings = Settings(warmup=0.2, gold_lr=1.0, layers_lr=2.0)
    assert [round(settings.rate("gold", step, 10), 3) for step in range(10)] == [
        0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert {settings.rate("layers", step, 10) for step in range(10)} == {2.0}


def test_every_setting_belongs_to_a_stage():
    named = {*COMMON, *(name for names in STAGE.values() for name in names), "method", "min_teacher"}
    assert named == set(Settings.__dataclass_fields__)


# labels


@pytest.mark.parametrize("names", [("not_entailment", "entailment"), ("NOT-ENTAILMENT", "Entailment")])
def test_outputs_go_by_name(tmp_path, tokenizer_folder, names):
    folder = save_model(tmp_path / "m", tokenizer_folder, BertForSequenceClassification,
                        id2label=dict(enumerate(names)), label2id={name: n for n, name in enumerate(names)})
    batch = rows_of(folder, made_up_pairs(6, 4)).batch(list(range(6)))
    ours = models.open_classifier(str(folder), 0).eval()
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        said = theirs(batch.ids, batch.real.long(), batch.segments).logits
        torch.testing.assert_close(models.logits(ours, batch), said[:, [1, 0]])
    assert ours.config.id2label == {0: "entailment", 1: "not_entailment"}


def test_unnamed_outputs_are_tried_both_ways(place, tokenizer_folder, tmp_path):
    folder = save_model(tmp_path / "given", tokenizer_folder, BertForSequenceClassification)
    model = models.open_classifier(str(folder), 0).eval()
    dev = made_up_pairs(20, 1)
    batch = rows_of(folder, dev).batch(list(range(20)))
    said = models.logits(model, batch).argmax(-1).tolist()
    (tmp_path / "rows").mkdir()
    opposite = [pair._replace(label=1 - label) for pair, label in zip(dev, said, strict=True)]
    for name in ("train.tsv", "dev.tsv"):
        write_tsv(tmp_path / "rows" / name, opposite)
    assert run(place, tmp_path / "out", teacher=folder, rows=tmp_path / "rows") == 0
    record = json.loads((tmp_path / "out" / "teacher" / "stage.json").read_text())
    assert record["figures"] == {"dev_accuracy": 1.0, "epochs": []}
    flipped = load_file(tmp_path / "out" / "teacher" / "model.safetensors")
    assert torch.equal(flipped["classifier.weight"], model.classifier.weight[[1, 0]])


def test_another_tasks_head_is_not_taken_for_qnlis(tmp_path, tokenizer_folder):
    names = {0: "contradiction", 1: "neutral", 2: "entailment"}
    folder = save_model(tmp_path / "mnli", tokenizer_folder, BertForSequenceClassification, id2label=names)
    assert models.output_names(AutoModel.from_pretrained(folder).config) is None
    one, two = (models.open_classifier(str(folder), seed) for seed in (0, 1))
    assert one.classifier.weight.shape == (2, 24) and not torch.equal(one.classifier.weight, two.classifier.weight)
    assert torch.equal(one.bert.pooler.dense.weight, two.bert.pooler.dense.weight)


# stages


def test_a_run_leaves_whole_folders_and_a_table(done, place, capsys):
    assert sorted(path.name for path in done.iterdir()) == ["layers", "report.json", "report.md", "student", "teacher"]
    written = json.loads((done / "report.json").read_text())
    for line, name in zip(written["models"], ("teacher", "student"), strict=True):
        model = AutoModelForSequenceClassification.from_pretrained(done / name)
        assert line["model"] == f"{name} {name}" and line["parameters"] == model.num_parameters()
        assert line["sentences_per_second"] > 0 and 0 <= line["accuracy"] <= 1
    assert written["models"][0]["of_teacher"] == written["models"][0]["agreement"] == 1
    assert report.table(written["models"]) in (done / "report.md").read_text()
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
    assert sorted(path.name for path in (place / "gold").iterdir()) == ["report.json", "report.md", "student"]
    assert json.loads((place / "gold" / "report.json").read_text())["models"][0]["of_teacher"] is None


def test_the_projection_of_general_distillation_is_taken_where_it_fits(place, tmp_path):
    layer = torch.nn.Linear(16, 24)
    given = {"weight": torch.ones(24, 16), "bias": torch.ones(24)}
    assert not models.take_projection(str(tmp_path), layer)
    save_file({"weight": torch.ones(23, 16), "bias": torch.ones(23)}, tmp_path / "projection.safetensors")
    assert not models.take_projection(str(tmp_path), layer)
    save_file(given, tmp_path / "projection.safetensors")
    assert models.take_projection(str(tmp_path), layer) and torch.equal(layer.weight, given["weight"])


def test_nothing_half_made_is_left_by_an_error(tmp_path):
    def make(part):
        (part / "a").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        stage.stage(tmp_path / "s", {}, make)
    assert not list(tmp_path.iterdir())


# errors


@pytest.mark.parametrize("arguments, says", [
    (["predictions_lrr=1"], "unknown setting 'predictions_lrr'; did you mean 'predictions_lr'?"),
    (["batch=many"], "batch: cannot read 'many' as int; write batch=32"),
    (["batch"], "'batch' is no setting; write key=value, such as batch=32"),
    (["batch=0"], "batch=0: must be a number of at least 1"),
    (["temperature=0"], "temperature=0.0: must be above 0"),
    (["min_teacher=2"], "min_teacher=2.0: a share, from 0 to 1"),
    (["method=glod"], "method='glod'; did you mean 'gold'? (there are tinybert, gold)"),
    (["length=65"], "length=65: these models read at most 64 tokens; write length=64"),
    (["--data", "python-doc"], "data 'python-doc': no such folder; did you mean 'python-docs'?"),
    (["--data", "{place}"], "train.tsv: no such file; a QNLI folder holds train.tsv and dev.tsv"),
    (["--teacher", "/no/such/folder"], "model '/no/such/folder': no such folder"),
    (["--student", "{place}/rows"], "the folder holds no model that transformers opens"),
    (["--student", "{place}/heads"], "has 4 attention heads, student"),
    (["--student", "{place}/words"], "have different vocabularies"),
    (["--student", "{place}/deep"], "a student of 4 layers is deeper than its teacher of 3"),
    (["min_teacher=1"], "is below min_teacher=1.0: a student would learn its mistakes"),
    (["--out", "{place}/rows/dev.tsv"], "is a file; give a folder"),
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
    assert not list(tmp_path.glob("out/*.part")) and not (out / "student").exists()


def test_glue_without_a_hub_says_what_to_do(monkeypatch):
    def offline(*_):
        raise ConnectionError("no route\nat all")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(ValueError, match=r"data glue: .*ConnectionError: no route\)\. With no network give"):
        data.load("glue", 0)


def test_it_runs_as_a_script_and_as_a_module_and_helps_without_torch(tmp_path):
    for how, where in (([str(ROOT / "finetune" / "qnli.py")], tmp_path), (["-m", "finetune.qnli"], ROOT)):
        command = [sys.executable, "-X", "importtime", *how, "--help"]
        said = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
        assert said.returncode == 0 and "python-docs" in said.stdout
        assert "| torch\n" not in said.stderr
    assert override(Settings(), ["rows=100"]).rows == 100
