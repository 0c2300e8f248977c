"""Tokenizers of every layout against the programs they come from, and which of their pieces begin words or replace others."""

import json
import os
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from pretrain.student import Student, export
from shards import block
from shards.build import main
from shards.tokenizer import PROBE, auto_tokenizer, fingerprint, open_tokenizer
from tests import conftest
from tests.conftest import generated_documents, save_tokenizer

DATA = Path(os.environ.get("DISTILL_DATA", "/nonexistent"))
OWN = ["<tag>", "babe", "<tag>x"]
MODELS = {
    "unigram": {},
    "unigram bytes": dict(byte_fallback=True, vocab_size=600),
    "unigram own": dict(byte_fallback=True, vocab_size=600, user_defined_symbols=OWN),
    "case folded": dict(normalization_rule_name="nmt_nfkc_cf", vocab_size=280),
    "as it stands": dict(normalization_rule_name="identity", remove_extra_whitespaces=False),
    "no first space": dict(add_dummy_prefix=False),
    "bpe": dict(model_type="bpe"),
    "bpe bytes": dict(model_type="bpe", byte_fallback=True, vocab_size=600),
    "bpe own": dict(model_type="bpe", user_defined_symbols=OWN),
    "albert": dict(pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, control_symbols=["[CLS]", "[SEP]", "[MASK]"]),
    "t5": dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
    "suffix": dict(treat_whitespace_as_suffix=True),
    "word": dict(model_type="word"),
    "ties": dict(add_dummy_prefix=False, vocab_size=450),
}
TEXTS = [*(sentence for document in generated_documents() for sentence in document), PROBE, "", " ", "  two  spaces \n",
         "\u3000ｂａ ①", "<tag>", "a <tag> <tag>xbabe<tag>", "ba<tag>be", "ba\u2581be", "naïve café 😀😀 zz", "ba\t\u00a0be"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function: the name of a kind of MODELS -> its SentencePiece file, trained on the made-up corpus when first asked for."""
    folder = tmp_path_factory.mktemp("pieces")

    def train(kind: str) -> Path:
        sentences = [f"{n} {text}" if kind == "ties" else text for n, text in enumerate(TEXTS[:-11])]
        if not (folder / f"{kind}.model").exists():
            SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_prefix=str(folder / kind), minloglevel=2,
                                       num_threads=1, **{"vocab_size": 350} | MODELS[kind])
        return folder / f"{kind}.model"
    return train


def place(folder: Path, model: Path, name: str, model_type: str = "bert", **settings) -> Path:
    """A model's folder as a hub holds it: config.json, the SentencePiece file under `name`, perhaps tokenizer_config.json."""
    folder.mkdir()
    shutil.copy(model, folder / name)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def same_after_saving(tokenizer, folder: Path) -> None:
    """A student's folder (a BERT, whatever the tokenizer) gives AutoTokenizer the same ids, roles and pairs."""
    model = BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=8), add_pooling_layer=False)
    student = Student(model, 8)
    export(folder, student, student.state_dict(), tokenizer)
    again = AutoTokenizer.from_pretrained(folder)
    assert ids(again, TEXTS) == ids(tokenizer, TEXTS)
    assert again(TEXTS[:9], TEXTS[9:18])["input_ids"] == tokenizer(TEXTS[:9], TEXTS[9:18])["input_ids"]
    assert fingerprint(again) == fingerprint(tokenizer)
    assert open_tokenizer(folder).stated() | {"name": ""} == stated_of(tokenizer, folder.with_name("plain")) | {"name": ""}


def stated_of(tokenizer, folder: Path) -> dict:
    tokenizer.save_pretrained(folder)
    return open_tokenizer(folder).stated()


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in ("suffix", "word", "ties")])
def test_a_bare_model_gives_sentencepieces_own_ids(trained, tmp_path, kind):
    file = trained(kind)
    itself, tokenizer, found = SentencePieceProcessor(model_file=str(file)), auto_tokenizer(str(file)), open_tokenizer(file)
    assert ids(tokenizer, TEXTS) == itself.encode(TEXTS)
    worker = Tokenizer.from_str(found.json)
    assert [worker.encode(text, add_special_tokens=False).ids for text in TEXTS] == itself.encode(TEXTS)
    (first,), (second,) = ids(tokenizer, ["ba be"]), ids(tokenizer, ["bi"])
    assert tokenizer("ba be", "bi")["input_ids"] == [found.cls, *first, found.sep, *second, found.sep]
    assert tokenizer.decode(first).strip() == "ba be"
    same_after_saving(tokenizer, tmp_path / "student")


def test_what_a_bare_model_lacks_comes_after_its_last_piece(trained):
    found = open_tokenizer(trained("unigram"))
    assert found.stated() == {"fingerprint": found.fingerprint, "name": str(trained("unigram")), "vocab_size": 354, "pad": 350,
                              "cls": 351, "sep": 352, "mask": 353}
    itself = SentencePieceProcessor(model_file=str(trained("unigram")))
    special = {itself.unk_id(), itself.bos_id(), itself.eos_id(), 350, 351, 352, 353}
    assert set(found.special.nonzero()[0]) == special and not found.may_replace[sorted(special)].any()
    albert, t5 = open_tokenizer(trained("albert")), open_tokenizer(trained("t5"))
    assert (albert.pad, albert.cls, albert.sep, albert.mask) == (0, 2, 3, 4)
    assert (t5.pad, t5.cls, t5.sep, t5.mask) == (0, 350, 351, 352)


def test_a_folder_with_a_bare_model_is_that_model(trained, tmp_path):
    want = open_tokenizer(trained("bpe")).fingerprint
    assert open_tokenizer(place(tmp_path / "bert", trained("bpe"), "spiece.model")).fingerprint == want
    assert open_tokenizer(place(tmp_path / "other", trained("bpe"), "tokenizer.model", "roberta")).fingerprint == want
    (tmp_path / "other/config.json").unlink()
    assert open_tokenizer(tmp_path / "other").fingerprint == want


def test_a_class_that_reads_sentencepiece_keeps_its_own_ids(trained, tmp_path):
    xlmr = place(tmp_path / "xlmr", trained("unigram"), "sentencepiece.bpe.model", "xlm-roberta")
    found, itself = open_tokenizer(xlmr), SentencePieceProcessor(model_file=str(trained("unigram")))
    assert (found.cls, found.pad, found.sep, found.mask, found.size) == (0, 1, 2, 351, 352)
    shifted = [[number + 1 if number > 2 else 3 for number in row] for row in itself.encode(TEXTS[:50])]
    assert ids(auto_tokenizer(str(xlmr)), TEXTS[:50]) == shifted
    same_after_saving(auto_tokenizer(str(xlmr)), tmp_path / "a")
    albert = place(tmp_path / "albert", trained("albert"), "spiece.model", "albert")
    assert open_tokenizer(albert).cls == 2
    same_after_saving(auto_tokenizer(str(albert)), tmp_path / "b" / "c")


def test_a_tokenizer_with_a_slow_form_alone_becomes_fast(trained, tmp_path):
    folder = place(tmp_path / "slow", trained("unigram"), "spiece.model", "bert-generation", cls_token="<s>",
                   sep_token="</s>", mask_token="<mask>")
    slow, tokenizer = AutoTokenizer.from_pretrained(folder), auto_tokenizer(str(folder))
    assert not slow.is_fast and tokenizer.is_fast
    assert ids(tokenizer, TEXTS[:50] + [PROBE]) == ids(slow, TEXTS[:50] + [PROBE])
    roles = ("pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    assert [getattr(tokenizer, role) for role in roles] == [getattr(slow, role) for role in roles]
    same_after_saving(tokenizer, tmp_path / "student")


def test_byte_level_bpe_in_robertas_layout(tmp_path):
    bpe = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(TEXTS, vocab_size=400, show_progress=False, special_tokens=specials)
    bpe.save_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    found, tokenizer = open_tokenizer(tmp_path), auto_tokenizer(str(tmp_path))
    assert (found.cls, found.pad, found.sep, found.mask, found.unk) == (0, 1, 2, 4, "<unk>")
    assert set(found.special.nonzero()[0]) == {0, 1, 2, 3, 4}
    worker = Tokenizer.from_str(found.json)
    for text in filter(str.strip, TEXTS):  # laid end to end: as if every sentence began after a space
        numbers = worker.encode(text, add_special_tokens=False).ids
        assert [numbers] == ids(tokenizer, [text if text.startswith(" ") else f" {text}"])
        assert found.begins_word[numbers[0]]
    same_after_saving(tokenizer, tmp_path / "student")


def test_a_students_tokenizer_gives_the_ids_of_the_shards(trained, tmp_path):
    sentences = sorted({sentence.replace(" .", ".") for document in generated_documents(8) for sentence in document})
    (tmp_path / "a.txt").write_text("\n\n".join(sentences))
    main([str(tmp_path / "a.txt"), "--tokenizer", str(trained("unigram own")), "--out", str(tmp_path / "out"),
          "--one-segment", "--held-out=0", "--row-length=256", "--sentences=lines", "--workers=1"])
    manifest = block.read_manifest(tmp_path / "out")
    assert manifest.tokenizer.items() <= open_tokenizer(trained("unigram own")).stated().items()
    same_after_saving(auto_tokenizer(str(trained("unigram own"))), tmp_path / "student")
    student = AutoTokenizer.from_pretrained(tmp_path / "student")
    rows = []
    for shard in manifest.shards:
        rows += [row.tolist() for row in rows_of(block.read_shard(tmp_path / "out", shard))]
    assert sorted(rows) == sorted(student(sentences)["input_ids"])


def rows_of(whole: block.Block):
    ends = whole.lengths.astype(int).cumsum()
    return [whole.ids[end - length:end] for end, length in zip(ends, whole.lengths.astype(int), strict=True)]


@pytest.mark.parametrize("kind, says", [("suffix", "no fast form with the same ids"), ("word", "words or characters")])
def test_a_model_without_an_equal_fast_form_is_refused(trained, kind, says):
    with pytest.raises(ValueError, match=says):
        open_tokenizer(trained(kind))


def test_a_cut_of_equal_score_does_not_refuse_a_model(trained):
    itself, found = SentencePieceProcessor(model_file=str(trained("ties"))), auto_tokenizer(str(trained("ties")))
    (ours,), its = ids(found, [PROBE]), itself.encode(PROBE)
    assert ours != its  # 2 34 and 23 4 weigh the same, up to the rounding of float32
    assert itself.decode(ours) == itself.decode(its)


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "text.model").write_text("no pieces in here")
    with pytest.raises(ValueError, match="text.model: holds no tokenizer .*a SentencePiece FILE.model"):
        open_tokenizer(tmp_path / "text.model")
    with pytest.raises(ValueError, match="no such file; give a folder"):
        open_tokenizer("pieces.model")


@pytest.mark.skipif(not DATA.is_dir(), reason="DISTILL_DATA names no folder with the real files")
def test_a_real_model_on_real_text():
    file = DATA / "sentencepiece/english-1k.model"
    lines = (DATA / "wikitext-103/wiki.valid.raw").read_text().splitlines()
    lines += (DATA / "books/soseki-botchan.txt").read_text().splitlines()
    assert ids(auto_tokenizer(str(file)), lines) == SentencePieceProcessor(model_file=str(file)).encode(lines)
    found = open_tokenizer(file)
    assert (found.pad, found.cls, found.sep, found.mask) == (1000, 1001, 1002, 1003)


def test_a_fingerprint_is_of_the_vocabulary_not_of_the_folder(tokenizer_folder, tmp_path):
    here = open_tokenizer(tokenizer_folder)
    cut = save_tokenizer(tmp_path / "cut", truncation=16)
    assert open_tokenizer(cut).fingerprint == here.fingerprint == fingerprint(AutoTokenizer.from_pretrained(cut))
    other = save_tokenizer(tmp_path / "other", tokenizer_class="PreTrainedTokenizerFast", mask_token="[unused1]")
    assert open_tokenizer(other).fingerprint != here.fingerprint
    assert (here.pad, here.cls, here.sep, here.mask, here.unk) == (0, 2, 3, 4, "[UNK]")
    assert here.special.sum() == 5 and not (here.may_replace & here.special).any()
    assert not here.may_replace[5:15].any() and here.may_replace[15:].all()  # [unused0] to [unused9]


def test_truncation_and_padding_of_a_file_are_off(tmp_path):
    found = open_tokenizer(save_tokenizer(tmp_path, truncation=16))
    worker = Tokenizer.from_str(found.json)
    assert worker.truncation is None and worker.padding is None
    assert [len(worker.encode(text, add_special_tokens=False).ids) for text in ("ba " * 5000, "ba")] == [5000, 1]


@pytest.mark.parametrize("mark", "\u2581\u0120")
def test_words_begin_under_their_mark_and_at_punctuation(tmp_path, mark):
    pieces = {"<s>": 1, "<pad>": 1, "</s>": 1, "<unk>": 1, "<mask>": 1, f"{mark}a": 1, mark: 1, f"{mark}12": 1, "(": 1, "...": 1,
              "b": 0, "1": 0, "'t": 0, "<0x0A>": 0, "<tag>": 0, "unused1": 0, "<unused1>": 0, "madeupword0001": 0}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [])), cls_token="<s>",
        pad_token="<pad>", sep_token="</s>", unk_token="<unk>", mask_token="<mask>").save_pretrained(tmp_path)
    found = open_tokenizer(tmp_path)
    assert found.begins_word.tolist() == [bool(begins) for begins in pieces.values()]
    never = {"<s>", "<pad>", "</s>", "<unk>", "<mask>", "<0x0A>", "<unused1>", "madeupword0001"}
    assert found.may_replace.tolist() == [piece not in never for piece in pieces]


@pytest.mark.parametrize("settings, says", [
    ({"mask_token": None}, "no mask token; name one in its tokenizer_config.json"),
    ({"mask_token": None, "cls_token": None}, "no cls and no mask token"),
])
def test_a_tokenizer_without_a_role_is_refused(tmp_path, settings, says):
    folder = save_tokenizer(tmp_path, tokenizer_class="PreTrainedTokenizerFast", **settings)
    with pytest.raises(ValueError, match=says):
        open_tokenizer(folder)


def test_a_folder_that_is_not_there_is_refused_without_a_look_at_the_network(tmp_path):
    with pytest.raises(ValueError, match="no such folder; give a folder that holds tokenizer.json"):
        open_tokenizer(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("size, dtype", [(256, "uint8"), (257, "uint16")])
def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path, monkeypatch, size, dtype):
    pieces = conftest.vocabulary()[:size]
    monkeypatch.setattr(conftest, "vocabulary", lambda: pieces)
    folder = save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("\n\n".join(f"{word}." for word in pieces[-100:]))
    main([str(tmp_path / "a.txt"), "--tokenizer", str(folder), "--out", str(tmp_path / "out"), "--one-segment",
          "--held-out=0", "--workers=1", "--sentences=lines"])
    manifest = block.read_manifest(tmp_path / "out")
    whole = block.read_shard(tmp_path / "out", manifest.shards[0])
    assert manifest.tokenizer["vocab_size"] == size and whole.ids.dtype == whole.mask_ids.dtype == dtype
    rows = [f"[CLS] {word} . [SEP]" for word in pieces[-100:]]
    assert sorted(" ".join(pieces[number] for number in row) for row in rows_of(whole)) == sorted(rows)
