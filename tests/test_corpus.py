"""Sources become documents of sentences: forms, spacing, what is left out, and what is said about bad input."""

from collections import Counter
from inspect import cleandoc

import pytest

from shards import corpus, pydocs
from shards.corpus import Source, documents, untokenized
from shards.tokenizer import fingerprint, open_tokenizer
from tests.conftest import generated_documents, save_tokenizer

WIKITEXT = """
 = Red Fox =

 The red fox is a well @-@ known animal . It weighs 4 @.@ 5 kg , or 4 @,@ 500 g ( on average ) .
 A second paragraph has one sentence .

 = = Range = =

 It lives in the " north " , and it does n't <unk> .

 = = = Winter = = =

 It sleeps .
 = x =
 A formula above is text .

 = Grey Wolf =

 The wolf 's range is large .
"""

GUTENBERG = """The Project Gutenberg EBook of Nothing\r
Title: Nothing\r
*** START OF THIS PROJECT GUTENBERG EBOOK NOTHING ***\r
Produced by Nobody\r
\r
It was a long day, and the sun that stood\r
over the hill was slow. Nobody\r
came.\r
\r
Then it was night.\r
*** END OF THIS PROJECT GUTENBERG EBOOK NOTHING ***\r
License text follows here.\r
"""


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_wikitext_is_cut_at_titles_and_its_spacing_undone(tmp_path):
    found = list(documents(write(tmp_path / "wiki.tokens", WIKITEXT)))
    assert found == [
        ["The red fox is a well-known animal.", "It weighs 4.5 kg, or 4,500 g (on average).",
         "A second paragraph has one sentence.", 'It lives in the "north", and it doesn\'t <unk>.', "It sleeps.",
         "= x =", "A formula above is text."],
        ["The wolf's range is large."],
    ]


def test_gutenberg_text_is_left_out_and_counted_and_wraps_are_joined(tmp_path):
    source = Source.opened(write(tmp_path / "book.txt", GUTENBERG, "utf-8-sig"))
    counts = Counter()
    found = [document.sentences() for document in source.documents(counts)]
    assert found == [["It was a long day, and the sun that stood over the hill was slow.", "Nobody came.",
                      "Then it was night."]]
    assert counts["gutenberg_lines"] == 6 and "prose" in str(source) and "Gutenberg" in str(source)


def test_lines_come_back_as_they_were_written(text_folder):
    expected = [[s.replace(" .", ".") for s in document] for document in generated_documents()]
    assert list(documents(str(text_folder))) == expected
    assert list(documents(f"{text_folder}/*.txt")) == expected
    assert "2 files: lines" in str(Source.opened(str(text_folder)))


@pytest.mark.parametrize("text, kind, count", [
    ("One sentence a line.\nAnother one.\n\nA second document.\n", "lines", 2),
    ("One sentence a line.\nAnother one.\nA third.\n", "lines", 1),
    ("Text that is wrapped at a width, so\nthat a line is no sentence. More\nstands here\nand ends.\n", "prose", 1),
    ("A paragraph. It has four sentences. They are short. So it goes.\n\nAnother one. It is alike.\n", "prose", 1),
])
def test_auto_tells_lines_from_prose(tmp_path, text, kind, count):
    source = write(tmp_path / "a.txt", text)
    assert Source.opened(source).files[0][1].kind == kind
    assert len(list(documents(source))) == count
    other = {"lines": "prose", "prose": "lines"}[kind]
    assert Source.opened(source, other).files[0][1].kind == other  # what is asked for is not second-guessed


@pytest.mark.parametrize("tokens, text", [
    ("he did n't go ( 4 @,@ 386 t ) .", "he didn't go (4,386 t)."),
    ('the " red " one , and " blue " .', 'the "red" one, and "blue".'),
    ("`` Who is that ? '' she said .", '"Who is that?" she said.'),
    ("at 18 : 10 , for $ 5 [ net ] ;", "at 18:10, for $5 [net];"),
    ("the players ' choice : 50 % of it !", "the players' choice: 50% of it!"),
    ("already plain, isn't it (yes).", "already plain, isn't it (yes)."),
])
def test_token_spacing_is_undone(tokens, text):
    assert untokenized(tokens) == text
    assert untokenized(text) == text


@pytest.mark.parametrize("name, content, says", [
    ("a.txt", b"fine\nbad \xff byte\n", "a.txt: line 2, byte 9: not UTF-8 .0xff.; convert"),
    ("a.txt", b"fine\nnu\0l\n", "a.txt: line 2, byte 7: a NUL byte"),
    ("a.txt", b"", "a.txt: holds no text; leave it out"),
    ("a.txt", b" \n\n", "a.txt: holds no text; leave it out"),
    ("b.txt", b"fine\n", r"no such file, folder or name; did you mean .*b.txt\? a source is a text file"),
    ("b.md", b"fine\n", "a folder without .txt files; a source is"),
])
def test_a_bad_source_says_what_to_give(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    given = {"b.txt": tmp_path / "c.txt", "b.md": tmp_path}.get(name, tmp_path / name)
    with pytest.raises(ValueError, match=says):
        list(documents(str(given)))


@pytest.mark.parametrize("given, says", [
    ("python-doc", "did you mean python-docs"),
    ("no/such/*.txt", "the glob matches no file"),
    ("no/such/file.txt", "no such file, folder or name; a source is"),
])
def test_an_unknown_source_says_what_to_give(given, says):
    with pytest.raises(ValueError, match=says):
        corpus.files(given)


def test_bad_bytes_after_the_sample_are_named_too(tmp_path):
    (tmp_path / "long.txt").write_bytes(b"A sentence.\n" * (corpus.SAMPLED + 5) + b"\xe9\n")
    with pytest.raises(ValueError, match=r"line 2,006, byte 24,060: not UTF-8"):
        list(documents(str(tmp_path / "long.txt")))


def test_docstrings_become_sentences():
    text = """Return the sum of *a* and ``b``.

    Heading
    -------
    The arguments are :class:`int`; a long
    line goes on.  For example::

        >>> add(1, 2)
        3

    - The first item is a sentence.
    - second: x = 1

    add(a, b) -> int
    """
    assert pydocs.to_sentences(cleandoc(text)) == [
        "Return the sum of a and b.", "The arguments are int; a long line goes on.", "The first item is a sentence."]


def test_the_library_gives_prose_sorted_by_module():
    docs = list(pydocs.docstrings())
    assert [doc.module for doc in docs] == sorted(doc.module for doc in docs)
    assert {"module", "class", "function"} == {doc.kind for doc in docs}
    words = sum(len(sentence.split()) for doc in docs for sentence in doc.sentences)
    assert words > 100_000
    assert not any(">>>" in sentence or "``" in sentence for doc in docs for sentence in doc.sentences)
    assert not any("test" in doc.module.split(".") for doc in docs)
    assert sum(1 for _ in pydocs.topics()) > 50


def test_a_fingerprint_is_of_the_vocabulary_not_of_the_folder(tokenizer_folder, tmp_path):
    from transformers import AutoTokenizer

    here = open_tokenizer(tokenizer_folder)
    cut = save_tokenizer(tmp_path / "cut", truncation=16)
    assert open_tokenizer(cut).fingerprint == here.fingerprint == fingerprint(AutoTokenizer.from_pretrained(cut))
    other = save_tokenizer(tmp_path / "other", tokenizer_class="PreTrainedTokenizerFast", mask_token="[unused1]")
    assert open_tokenizer(other).fingerprint != here.fingerprint
    assert (here.pad, here.cls, here.sep, here.mask, here.unk) == (0, 2, 3, 4, "[UNK]")
    assert here.special.sum() == 5 and not (here.may_replace & here.special).any()
    assert not here.may_replace[5:15].any() and here.may_replace[15:].all()  # [unused0] to [unused9]


def test_words_begin_where_sentencepiece_and_byte_level_marks_stand(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    for mark in ("\u2581", "\u0120"):
        vocabulary = {token: n for n, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", f"{mark}a", "b"])}
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE(vocabulary, [])), cls_token="<s>", pad_token="<pad>",
            sep_token="</s>", unk_token="<unk>", mask_token="<mask>").save_pretrained(tmp_path / mark)
        found = open_tokenizer(tmp_path / mark)
        assert found.begins_word.tolist() == [True] * 6 + [False]


def test_a_byte_level_sentence_begins_with_a_word(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {f"{role}_token": f"<{role}>" for role in ("pad", "cls", "sep", "mask", "unk")}
    pieces = [*names.values(), *pre_tokenizers.ByteLevel.alphabet(), "\u0120b"]
    bpe = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [("\u0120", "b")], unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(tmp_path)
    found = open_tokenizer(tmp_path)
    first = Tokenizer.from_str(found.json).encode("ba").ids[0]
    assert first == len(pieces) - 1 and found.begins_word[first]


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
