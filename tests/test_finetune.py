"""QNLI's rows, losses and labels: read by name, batched whole, losses against direct sums, outputs in GLUE's order."""

import shutil
from functools import partial

import numpy as np
import pandas
import pytest
import torch
from conftest import SYLLABLES, save_tokenizer
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
)

from finetune import data, distill, qnli, stages
from finetune.data import Pair
from finetune.qnli import COMMON, METHODS, Settings
from pretrain.student import Student

CPU = torch.device("cpu")


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


def save_place(folder, tokenizer_folder):
    """A teacher, a narrower student and 40 + 20 rows."""
    save_model(folder / "teacher", tokenizer_folder)
    save_model(folder / "student", tokenizer_folder, width=16, layers=2, seed=1)
    (folder / "rows").mkdir()
    write_tsv(folder / "rows" / "train.tsv", made_up_pairs(40, 0))
    write_tsv(folder / "rows" / "dev.tsv", made_up_pairs(20, 1))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_folder):
    """A teacher, a narrower student and 40 + 20 rows."""
    return save_place(tmp_path_factory.mktemp("qnli"), tokenizer_folder)


def rows_of(folder, pairs, length=32):
    return data.Rows(AutoTokenizer.from_pretrained(folder), pairs, length)


# data


def test_quotes_have_no_meaning_and_columns_go_by_name(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b'\xef\xbb\xbflabel\tsentence\tquestion\r\nentailment\t"b\ta "?\r\n'
                                     b"not_entailment\td\tc?\r\n")
    assert data.read(tmp_path / "a.tsv") == [('a "?', '"b', 0), ("c?", "d", 1)]


@pytest.mark.parametrize("text, says", [
    (b"question\tsentence\tlabel\n\xff?\tb\tentailment\n", "Row #2: .*invalid UTF8"),
    ("index\tquestion\tsentence\n", "no column 'label'"),
    ("index\tquestion\tsentense\tlabel\n", "no column 'sentence'; did you mean 'sentense'"),
    ("index\tquestion\tsentence\tlabel\n", "a header and no rows"),
    ("question\tsentence\tlabel\na?\tb\tentailment\na?\tb\t\n", "row 3: no label; write entailment or not_entailment"),
    ("question\tsentence\tlabel\na?\tb\tneutral\n", "row 2: unknown label 'neutral'"),
    ("question\tsentence\tlabel\na?\tb\n", "Row #2: Expected 3 columns, got 2: a.\\tb"),
    ("question\tsentence\tlabel\na?\t \tentailment\n", "row 2: an empty sentence"),
    ("question\tsentence\tlabel\na?\tb\tentailment\n\n", "row 3: no label"),
    ("question\tsentence\tlabel\tlabel\na?\tb\tentailment\tx\n", "label.* exists 2 times"),
    ("", "Empty CSV file"),
])
def test_a_bad_tsv_names_file_and_row(tmp_path, text, says):
    (tmp_path / "train.tsv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"train.tsv.*{says}"):
        data.read(tmp_path / "train.tsv")


TASK = (("text", "kind"), ("no", "yes", "3"))  # single sentences, three labels
TABLE = [("ba, be", "yes"), ('a "b"', "no"), ("two\nlines", "3"), ("x", "yes")]


def write_table(path, rows=TABLE):
    frame = pandas.DataFrame([(n, *row) for n, row in enumerate(rows)], columns=["id", "text", "kind"])
    frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_other_tasks_are_read_by_their_columns_and_labels(tmp_path, kind):
    for split in ("train", "dev"):
        write_table(tmp_path / f"{split}.{kind}")
    train, dev, _ = data.load(str(tmp_path), *TASK)
    assert sorted(train) == sorted(dev) and dev == [(text, "", TASK[1].index(label)) for text, label in TABLE]
    with pytest.raises(ValueError, match=f"row {2 + (kind == 'csv')}: unknown label 'maybe'; write no or yes or 3"):
        data.read(write_table(tmp_path / f"bad.{kind}", [("a", "no"), ("b", "maybe")]), *TASK)
    with pytest.raises(ValueError, match=f"row {2 + (kind == 'csv')}: an empty text"):
        data.read(write_table(tmp_path / f"bad.{kind}", [("a\nb", "no"), (" ", "no")]), *TASK)
    (tmp_path / f"bad.{kind}").write_bytes(b"id,text,kind\n1,a\n" if kind == "csv" else b"no parquet")
    with pytest.raises(ValueError, match=f"bad.{kind}: .*" + ("Row #2: Expected 3 columns" if kind == "csv" else "[Pp]arquet")):
        data.read(tmp_path / f"bad.{kind}", *TASK)


def test_numbers_are_labels_too(tmp_path):
    pandas.DataFrame({"a": ["x", "y"], "b": ["z", "z"], "n": [1, 0]}).to_parquet(tmp_path / "a.parquet")
    assert data.read(tmp_path / "a.parquet", ("b", "a", "n"), ("1", "0")) == [("z", "x", 0), ("z", "y", 1)]


def test_a_single_sentence_is_one_segment(tokenizer_folder):
    rows = rows_of(tokenizer_folder, [Pair("ba be", "", 0), Pair("ba", "", 1)])
    assert rows.fields["token_type_ids"] == [[0] * 4, [0] * 3] and rows.fields["input_ids"][1][-1] == 3  # one [SEP], the last


def test_what_is_written_is_read_again(tmp_path):
    (tmp_path / "a.tsv").write_bytes(data.tsv([("index", *Pair._fields), (0, "a\tb", 'c\r\n"d', "entailment")]))
    assert data.read(tmp_path / "a.tsv") == [("a b", 'c  "d', 0)]


def test_rows_are_cut_to_length_and_no_stored_truncation_acts(tmp_path):
    folder = save_tokenizer(tmp_path / "stored", truncation=12)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pair = Pair("ba " * 9, "be " * 40, 0)
    whole, cut = (data.Rows(tokenizer, [pair], length) for length in (64, 24))
    assert len(whole.fields["input_ids"][0]) == 9 + 40 + 3
    assert len(cut.fields["input_ids"][0]) == 24
    assert cut.fields["token_type_ids"][0] == [0] * 11 + [1] * 13  # 9 + [CLS] [SEP], then 12 + [SEP]


def test_batches_hold_every_row_once_padded_to_eights(tokenizer_folder):
    pairs = made_up_pairs(103, 2)
    rows = rows_of(tokenizer_folder, pairs)
    first, again, other = (list(rows.batches(4, torch.Generator().manual_seed(n))) for n in (0, 0, 1))
    numbers, numbers_again, numbers_other = ([b.rows.tolist() for b in batches] for batches in (first, again, other))
    assert sorted(sum(numbers, [])) == list(range(103))
    assert numbers == numbers_again != numbers_other
    for batch in first:
        real = batch.attention_mask.bool()
        assert batch.input_ids.shape == real.shape == batch.token_type_ids.shape and real.shape[1] % 8 == 0
        assert real[:, 0].all() and (real.long().diff() <= 0).all()  # the padding is on the right
        for row, n in enumerate(batch.rows.tolist()):
            assert batch.input_ids[row][real[row]].tolist() == rows.fields["input_ids"][n]
            assert batch.token_type_ids[row][real[row]].tolist() == rows.fields["token_type_ids"][n]
            assert batch.labels[row] == pairs[n].label
    waste = sum((1 - batch.attention_mask).sum().item() for batch in first) / sum(b.input_ids.numel() for b in first)
    assert waste < 0.3


def test_what_is_said_of_rows_stands_in_their_order(tokenizer_folder):
    rows = rows_of(tokenizer_folder, made_up_pairs(300, 2))
    assert torch.equal(distill.each_row(lambda batch: batch.rows, rows, CPU), torch.arange(300.0))
    assert torch.equal(distill.each_row(lambda batch: batch.labels, rows, CPU), rows.labels.float())


def test_glue_without_a_hub_says_what_to_do(monkeypatch):
    def offline(*_):
        raise ConnectionError("no route\nat all")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(ValueError, match=r"data glue: .*ConnectionError: no route\)\. With no network give"):
        data.load("glue")


# losses


def imitation(model, batch, weights, teacher=None, layers=(), settings=None):
    return distill.imitation(weights, teacher and Student(teacher, 24), [*layers], settings or Settings(),
                             Student(model, model.config.hidden_size), batch)


def gold(model):
    return lambda batch: imitation(model, batch, {"hard": 1.0})


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_prediction_loss_is_a_divergence_summed_over_labels(place, temperature):
    teacher, student = (distill.open_classifier(place / name, 0, CPU) for name in ("teacher", "student"))
    batch = rows_of(place / "student", made_up_pairs(7, 3)).batch(list(range(7)))
    s, t = (torch.softmax(distill.logits(model, batch).double() / temperature, -1) for model in (student, teacher))
    direct = (t * (t.log() - s.log())).sum(-1)
    settings = Settings(temperature=temperature)
    loss = imitation(student, batch, {"soft": 1.0}, teacher, settings=settings)
    torch.testing.assert_close(loss, direct.float(), rtol=1e-3, atol=1e-7)
    assert imitation(teacher, batch, {"soft": 1.0}, teacher, settings=settings).abs().max() < 1e-7


def test_layers_loss_falls_and_the_teacher_neither_moves_nor_drops(place, tmp_path):
    teacher = distill.open_classifier(place / "teacher", 0, CPU).requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    model = distill.open_classifier(place / "student", 0, CPU)
    student, weights = Student(model, 24), {"embedding": 1.0, "hidden": 1.0, "attention": 1.0}
    loss = partial(distill.imitation, weights, Student(teacher, 24), [2, 3], Settings(), student)
    modes = []

    def measure():
        modes.append(teacher.training or any(part.training for part in teacher.modules()))
        return 0.0

    settings = Settings(layers_lr=3e-3, layers_epochs=4, batch=8)
    curve = distill.fit(student, loss, rows_of(place / "teacher", made_up_pairs(40, 3)), settings, "layers", 0, measure,
                        tmp_path / "state.pt")
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]
    assert modes == [False] * 4
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_loss_that_is_no_number_stops_the_run(place, tmp_path):
    model = distill.open_classifier(place / "student", 0, CPU)
    rows = rows_of(place / "student", made_up_pairs(8, 3))
    with pytest.raises(ValueError, match="gold: the loss became nan; write a smaller gold_lr="):
        distill.fit(model, lambda batch: distill.logits(model, batch)[:, 0] * np.nan, rows, Settings(), "gold", 0, float,
                    tmp_path / "state.pt")


def test_the_best_epoch_is_what_the_model_ends_with(place, tmp_path):
    model = distill.open_classifier(place / "student", 0, CPU)
    seen, marks = [], iter([0.5, 0.9, 0.7])

    def measure():
        seen.append(model.classifier.weight.detach().clone())
        return next(marks)

    rows = rows_of(place / "student", made_up_pairs(16, 3))
    distill.fit(model, gold(model), rows, Settings(gold_lr=1e-2), "gold", 0, measure, tmp_path / "state.pt")
    assert torch.equal(model.classifier.weight, seen[1]) and not torch.equal(seen[1], seen[2])


def test_every_epoch_has_an_order_and_dropout_of_its_own(place, tmp_path):
    model, orders, noise = distill.open_classifier(place / "student", 0, CPU), [], []
    rows, settings = rows_of(place / "student", made_up_pairs(20, 3)), Settings(gold_lr=0.0, gold_epochs=3, batch=20)

    def loss(batch):
        orders.append(tuple(batch.rows.tolist()))
        noise.append(gold(model)(batch).mean().item())
        return gold(model)(batch)

    distill.fit(model, loss, rows, settings, "gold", 0, lambda: 0.5, tmp_path / "state.pt")
    assert len({*orders}) == 3 and len({*noise}) == 3


def test_rates(place, monkeypatch, tmp_path):
    """Linear up over the warm-up and down to 0 after the last update; constant for the layers."""
    used, stepped = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (used.append(self.param_groups[0]["lr"]), stepped(self)))
    model = distill.open_classifier(place / "student", 0, CPU)
    rows = rows_of(place / "student", made_up_pairs(10, 3))
    settings = Settings(warmup=0.2, gold_lr=1e-3, layers_lr=2e-3, batch=2, gold_epochs=2, layers_epochs=2)
    for stage in ("gold", "layers"):
        distill.fit(model, gold(model), rows, settings, stage, 0, lambda: 0.5, tmp_path / stage)
    assert used[:10] == pytest.approx([0, 5e-4, *(1e-3 * left / 8 for left in range(8, 0, -1))])
    assert used[10:] == [2e-3] * 10


def test_every_setting_belongs_to_a_stage():
    plan = {stage for stages in METHODS.values() for stage in stages}
    named = {name for stage in plan for name in Settings().of(stage)} | {"method", "min_teacher"}
    assert named == set(Settings.__dataclass_fields__)
    assert Settings().of("teacher").keys() == {*COMMON, "teacher_lr", "teacher_epochs"}
    assert "temperature" not in Settings().of("layers") and {"hidden", "soft"} < Settings().of("predictions").keys()


# labels


@pytest.mark.parametrize("names", [("not_entailment", "entailment"), ("NOT-ENTAILMENT", "Entailment")])
def test_outputs_go_by_name(tmp_path, tokenizer_folder, names):
    folder = save_model(tmp_path / "m", tokenizer_folder, BertForSequenceClassification,
                        id2label=dict(enumerate(names)), label2id={name: n for n, name in enumerate(names)})
    batch = rows_of(folder, made_up_pairs(6, 4)).batch(list(range(6)))
    ours = distill.open_classifier(folder, 0, CPU)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        said = theirs(batch.input_ids, batch.attention_mask, batch.token_type_ids).logits
        torch.testing.assert_close(distill.logits(ours, batch), said[:, [1, 0]])
    assert ours.config.id2label == {0: "entailment", 1: "not_entailment"}


def test_another_tasks_head_is_not_taken_for_qnlis(tmp_path, tokenizer_folder):
    names = {0: "contradiction", 1: "neutral", 2: "entailment"}
    folder = save_model(tmp_path / "mnli", tokenizer_folder, BertForSequenceClassification, id2label=names)
    assert distill.output_names(AutoModel.from_pretrained(folder).config) is None
    one, two = (distill.open_classifier(folder, seed, CPU) for seed in (0, 1))
    assert one.classifier.weight.shape == (2, 24) and not torch.equal(one.classifier.weight, two.classifier.weight)
    assert torch.equal(one.bert.pooler.dense.weight, two.bert.pooler.dense.weight)


@pytest.mark.parametrize("width", [24, 23])
def test_the_projection_of_general_distillation_is_taken_where_it_fits(place, tmp_path, width):
    model = distill.open_classifier(place / "student", 0, CPU)
    drawn, again, other = (distill.with_projection(model, str(tmp_path), 24, seed).projection.weight for seed in (0, 0, 1))
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)
    save_file({"weight": torch.ones(width, 16), "bias": torch.ones(width)}, tmp_path / "projection.safetensors")
    taken = distill.with_projection(model, str(tmp_path), 24, 0).projection
    assert torch.equal(taken.weight, torch.ones(24, 16) if width == 24 else drawn)
    assert bool((taken.bias == 1).all()) == (width == 24)
    assert not [*distill.with_projection(model, str(tmp_path), 16, 0).projection.parameters()]


def test_rows_are_no_longer_than_either_model_has_positions_for(place, tokenizer_folder, tmp_path):
    def opened(length):
        given = ["--teacher", str(folder), "--student", str(place / "student"), "--data", str(place / "rows"), "--out", "none"]
        return stages.Run(qnli.options(given), Settings(length=length))

    folder = tmp_path / "roberta"
    shutil.copytree(tokenizer_folder, folder)
    RobertaConfig(num_attention_heads=4, num_hidden_layers=3, max_position_embeddings=64, pad_token_id=0).save_pretrained(folder)
    assert opened(63).layers == [2, 3]  # RoBERTa's positions begin after the padding's
    with pytest.raises(ValueError, match="length=64: these models read at most 63 tokens; write length=63"):
        opened(64)
