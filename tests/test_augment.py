"""Augmentation: what is left alone, the likeliest and nearest words against direct sums, the same rows however it is run."""

import json
import shutil

import pandas
import pytest
import torch
from test_finetune import made_up_pairs, save_model, save_place
from test_qnli import run
from transformers import AutoTokenizer, BertForMaskedLM, BertModel

from finetune import augment, data, distill
from finetune.data import Pair
from finetune.qnli import Settings

CPU = torch.device("cpu")
SETTINGS = Settings(augment=3, augment_k=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_folder):
    """A teacher, a narrower student, 40 + 20 rows, a masked LM with its head and one without."""
    folder = save_place(tmp_path_factory.mktemp("qnli"), tokenizer_folder)
    save_model(folder / "mlm", tokenizer_folder, BertForMaskedLM, seed=2, initializer_range=0.3)
    save_model(folder / "headless", tokenizer_folder, BertModel)
    return folder


@pytest.fixture(scope="module")
def teacher(place):
    return distill.open_classifier(place / "teacher", 0, CPU)


def made(place, teacher, pairs=None, settings=SETTINGS, seed=0, mlm=None, glove=None):
    return augment.augmented(pairs or made_up_pairs(30, 5), teacher, settings, seed, mlm and str(place / mlm), glove)


def places_of(texts):
    return {place for text in texts for place in augment.places(Pair(text, "", 0), [])[0]}


def new_rows(pairs, words, seed=0, special=(), **settings):
    """The rows that come out where every word that may change has the same options."""
    found = [augment.places(pair, [*special]) for pair in pairs]
    options = {place: words for sides in found for side in sides for place in side}
    return list(augment.new_rows(pairs, found, options, Settings(**settings), seed))


# what is left alone


def test_only_plain_words_change_and_every_other_one_stands_where_it_stood():
    pair = Pair("When did tonga join 12 <mask> clubs in the 1990s ?", "The well-known Tonga joined [MASK] clubs, it's 5th .", 0)
    rows = new_rows([pair], ["xx", "yy"], special=["[MASK]", "<mask>"], augment=50, augment_p=1.0)
    questions = {new.question for _, new in rows} - {pair.question}
    sentences = {new.sentence for _, new in rows} - {pair.sentence}
    assert questions == {f"When did tonga {a} 12 <mask> {b} in the 1990s ?" for a in ("xx", "yy") for b in ("xx", "yy")}
    assert sentences == {f"The well-known Tonga {a} [MASK] {b}, it's 5th ." for a in ("xx", "yy") for b in ("xx", "yy")}


def test_question_and_sentence_are_each_augmented_from_the_original_row():
    pairs = made_up_pairs(30, 5)
    rows = new_rows(pairs, ["xx", "yy", "zz"], augment=5)
    changed = [(new.question != pairs[n].question, new.sentence != pairs[n].sentence) for n, new in rows]
    assert set(changed) == {(True, False), (False, True)}
    assert all(new.label == pairs[n].label for n, new in rows)
    assert len({new[:2] for _, new in rows} | {pair[:2] for pair in pairs}) == len(rows) + len({pair[:2] for pair in pairs})
    assert max(sum(origin == n for origin, _ in rows) for n in range(30)) <= 2 * 5


def test_the_share_of_changed_words_is_p():
    count = 500
    assert not new_rows([Pair("ba " * 40, "Be", 0)], ["xx"], augment=count)  # too short to change
    rows = new_rows([Pair("bafo " * 40, "Be", 0)], ["xx"], augment=count)
    hits = sum(new.question.count("xx") for _, new in rows) / (40 * count)
    # 20,000 draws: the standard error is 0.0035; drawing a row of 40 words twice has a chance of about 1e-8
    assert len(rows) == count and abs(hits - 0.4) < 5 * 0.0035


# likely words


def test_likely_words_are_those_of_the_whole_model_and_the_same_in_any_batch(place, monkeypatch):
    name, pairs = str(place / "mlm"), [pair for seed in range(6, 12) for pair in made_up_pairs(8, seed)]
    texts = places_of(text for pair in pairs for text in pair[:2])
    model, tokenizer, words = augment.open_mlm(name), AutoTokenizer.from_pretrained(name), augment.whole_words(name)
    found = augment.likely(model, texts, 4)
    for (text, start, end, _), answer in found.items():
        inputs = tokenizer(f"{text[:start]}[MASK]{text[end:]}", text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, (inputs.input_ids[0] == tokenizer.mask_token_id).nonzero()[0, 0]]
        best = sorted(words, key=lambda number: -logits[number])[:4]
        assert answer == [words[number] for number in sorted(best)]
    single = {place for place in texts if len(tokenizer.tokenize(place[3])) == 1}
    assert found.keys() == single and len(single) > 20
    for batch in (1, 7):
        monkeypatch.setattr(augment, "BATCH", batch)
        assert augment.likely(model, texts, 4) == found


def test_each_word_of_a_text_is_asked_once_and_the_head_sees_it_alone(place):
    name = str(place / "mlm")
    model, seen = augment.open_mlm(name), []
    whole = [word for word in augment.whole_words(name).values() if len(word) > 2][:2]
    text = " ".join(whole)
    model.cls.register_forward_hook(lambda _, given, out: seen.append(given[0].shape))
    pairs = [Pair(text, "Ba", 0), Pair(text, "Be", 1), Pair("Bi", text, 0)]
    augment.likely(model, places_of(text for pair in pairs for text in pair[:2]), 2)
    assert seen == [(2, 1, 24)]


def test_a_long_text_is_cut_and_never_longer_than_the_model(place):
    name = str(place / "mlm")
    model, longest = augment.open_mlm(name), []
    word = next(word for word in augment.whole_words(name).values() if len(word) > 2)
    text = " ".join(["ba", word, *["be"] * 100, word])  # the second one stands behind the cut
    model.bert.embeddings.word_embeddings.register_forward_pre_hook(lambda _, given: longest.append(given[0]))
    found = augment.likely(model, places_of([text]), 3)
    ids, mask = longest[0], AutoTokenizer.from_pretrained(name).mask_token_id
    assert [place[:2] for place in found] == [(text, 3)] and ids.shape == (2, 64)
    assert (ids == mask).sum() == 1


def test_a_masked_lm_without_its_head_is_refused_before_anything_is_made(place, tmp_path, capsys):
    assert run(place, tmp_path / "out", "augment=1", "--mlm", str(place / "headless")) == 2
    assert "tensors of a BertForMaskedLM of its config.json, such as cls.predictions" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# near words


def test_near_words_are_those_of_direct_cosines():
    draw = torch.Generator().manual_seed(0)
    choice = {f"w{n}": torch.randn(6, generator=draw) for n in range(30)}
    vectors = {"w3": choice["w3"], "other": torch.randn(6, generator=draw)}
    table, known = (pandas.DataFrame(torch.stack([*some.values()]).numpy(), [*some]) for some in (choice, vectors))
    found = augment.near(known, table, 5)
    for word, vector in vectors.items():
        cosines = {w: torch.cosine_similarity(vector.double(), v.double(), 0).item() for w, v in choice.items() if w != word}
        assert found[word] == sorted(cosines, key=lambda w: -cosines[w])[:5]
    assert augment.near(known[:0], table, 5) == {}


def glove_file(path, words):
    """A vector of three numbers for each word."""
    vectors = torch.randn(len(words), 3, generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("".join(f"{word} {a} {b} {c}\n" for word, (a, b, c) in zip(words, vectors, strict=True)))
    return str(path)


def test_a_file_of_vectors_is_read_as_glove_writes_it(tmp_path, monkeypatch):
    path = tmp_path / "glove.txt"
    path.write_text('null 1 2 3\n" 3 4 5\n. . . 1 2 3\nNaN -1e-3 0 7\nnull 9 9 9\ncafé 1 1 1\n')
    table = augment.read_glove(str(path))
    assert table.index.tolist() == ["null", '"', "NaN", "café"]  # ". . ." is a word of glove.840B
    assert table.to_numpy().tolist() == torch.tensor([[1, 2, 3], [3, 4, 5], [-1e-3, 0, 7], [1, 1, 1]]).tolist()
    monkeypatch.setattr(augment, "GLOVE_WORDS", 2)
    assert augment.read_glove(str(path)).index.tolist() == ["null", '"']


@pytest.mark.parametrize("lines, says", [
    ("400000 50\nthe 1 2 3\n", "1 numbers in its first line"), ("the 1 2 3\nof 1 2\n", "could not convert string to float: ''"),
    ("the 1 2\nof one 2\n", "could not convert string to float: 'one'"), ("", "No columns to parse"),
    ("the 1 2\nof nan 2\n", "not all of them"), (None, "No such file")])
def test_another_file_is_an_error_in_one_line(tmp_path, lines, says):
    path = tmp_path / "glove.txt"
    if lines is not None:
        path.write_text(lines)
    with pytest.raises(ValueError) as caught:
        augment.read_glove(str(path))
    assert says in str(caught.value) and str(caught.value).startswith(f"glove {path}: ")
    assert str(caught.value).endswith("each line must be a word and its numbers, as in glove.6B.300d.txt")


def test_the_neighbours_of_a_file_are_its_plain_words_and_words_it_lacks_stay(place, teacher, tmp_path):
    pair = Pair("Ba bado fogu ?", "Be lamu .", 0)
    path = glove_file(tmp_path / "glove.txt", ["bado", "zig", "Zag", "zog", "x1", "lamu"])
    _, rows, figures = made(place, teacher, [pair], Settings(augment=20, augment_p=1.0), glove=path)
    assert figures == {"words_by_mlm": 0, "words_by_neighbours": 2}
    assert {row.question for row in rows} == {pair.question} | {f"Ba {word} fogu ?" for word in ("zig", "zog", "lamu")}
    assert {row.sentence for row in rows} == {pair.sentence} | {f"Be {word} ." for word in ("zig", "zog", "bado")}


def test_words_come_from_the_teacher_the_file_or_the_model(place, teacher):
    pairs, vocabulary_words = made_up_pairs(30, 5), {*augment.whole_words(str(place / "teacher")).values()}

    def words_of(rows):
        return {word for row in rows for text in row[:2] for word in text.split()}

    def new_words(rows):
        return words_of(rows) - words_of(pairs)

    _, rows, figures = made(place, teacher)
    assert figures["words_by_mlm"] == 0 < figures["words_by_neighbours"]
    assert new_words(rows) and new_words(rows) <= vocabulary_words
    _, _, figures = made(place, teacher, mlm="mlm")
    assert figures["words_by_mlm"] > 0 < figures["words_by_neighbours"]


def test_the_same_seed_gives_the_same_rows_and_a_row_does_not_depend_on_those_after_it(place, teacher):
    first, again, other = (made(place, teacher, seed=seed, mlm="mlm") for seed in (0, 0, 1))
    assert first == again and first[1] != other[1]
    origins, rows, _ = made(place, teacher, made_up_pairs(30, 5)[:10], mlm="mlm")
    assert rows == [row for origin, row in zip(*first[:2]) if origin < 10] and max(origins) == 9


# the stage


def test_the_file_holds_originals_with_gold_and_new_rows_with_the_teachers_labels(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(place, out, "augment=2", "--stages", "teacher,augment") == 0
    assert sorted(path.name for path in out.iterdir()) == ["augment", "teacher"]
    gold, rows = data.read(place / "rows" / "train.tsv"), data.read(out / "augment" / "train.tsv")
    origins = [int(line.split("\t")[0]) for line in (out / "augment" / "train.tsv").read_text().splitlines()[1:]]
    assert sorted(rows[:40]) == sorted(gold) and origins[:40] == [*range(40)]
    model, tokenizer = distill.open_classifier(out / "teacher", 0, CPU), AutoTokenizer.from_pretrained(out / "teacher")
    said = distill.each_row(lambda batch: distill.logits(model, batch).argmax(-1), data.Rows(tokenizer, rows, 32), CPU, low=True)
    said = said.tolist()
    assert [row.label for row in rows[40:]] == said[40:]
    figures = json.loads((out / "augment" / "stage.json").read_text())["figures"]
    assert figures["rows"] == len(rows) - 40 > 40
    assert figures["other_label"] == sum(said[40 + n] != said[o] for n, o in enumerate(origins[40:])) / (len(rows) - 40)
    assert figures["teacher_not_gold"] == sum(said[n] != rows[n].label for n in range(40)) / 40
    capsys.readouterr()
    assert run(place, out, "augment=2") == 0
    assert capsys.readouterr().out.count("skipped") == 2
    written = json.loads((out / "report.json").read_text())
    assert written["train_rows"] == len(rows)
    said = (out / "report.md").read_text()
    assert f"{figures['rows']:,} of them new" in said and "by the teacher's embeddings;" in said
    glove = glove_file(tmp_path / "glove.txt", ["bado", "fogu", "lamu", *(f"z{letter}" for letter in "abcdefgh")])
    assert run(place, tmp_path / "glove", "augment=2", "--glove", glove) == 0
    assert f" by {glove};" in (tmp_path / "glove" / "report.md").read_text()
    shutil.copytree(out, tmp_path / "cut")
    with (tmp_path / "cut" / "augment" / "train.tsv").open("a") as file:
        file.write("half a li")
    assert run(place, tmp_path / "cut", "augment=2") == 0
    said = capsys.readouterr().out
    assert "augment: makes" in said and said.count("skipped") == 4  # the same rows come out, so what is made of them stands


@pytest.mark.parametrize("arguments, says", [
    (["--stages", "layers"], "teacher cannot be used (it is not there); name its stage too"),
    (["--stages", "layer"], "stages: 'layer' is none of this run; did you mean 'layers'?"),
    (["--stages", "augment"], "there are teacher, layers, predictions, report (augment with augment=20)"),
    (["--mlm", "{place}/mlm"], "mlm: is for the augmentation; write augment=20"),
    (["--glove", "{place}/rows/dev.tsv"], "dev.tsv: is for the augmentation; write augment=20"),
    (["--glove", "{place}/rows/dev.tsv", "augment=1"], "each line must be a word and its numbers"),
    (["augment=1", "augment_k=0"], "augment_k=0: must be greater than 0; write such as augment_k=15"),
    (["augment_p=1.5"], "augment_p=1.5: must be less than or equal to 1"),
])
def test_errors_are_one_line(place, tmp_path, capsys, arguments, says):
    assert run(place, tmp_path / "out", *(argument.format(place=place) for argument in arguments)) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and says in said[0] and not (tmp_path / "out").exists()


def test_a_stage_of_other_inputs_is_not_used(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(place, out, "--stages", "teacher") == 0
    assert run(place, out, "--stages", "layers", "teacher_lr=1e-4") == 2
    assert "cannot be used (teacher_lr was 0.001, is 0.0001)" in capsys.readouterr().err
    assert run(place, out, "--stages", "layers") == 0
    assert sorted(path.name for path in out.iterdir()) == ["layers", "teacher"]
