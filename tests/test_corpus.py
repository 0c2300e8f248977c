"""Text becomes documents of sentences: what it is taken for, spacing, what is left out, where long documents are cut."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards import corpus
from shards.corpus import Form, Tally, documents_in, untokenized
from shards.sources import Source
from tests.conftest import documents, generated_documents

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
    tally = Tally()
    found = [form.sentences(units) for form, units in source.documents(tally)]
    assert found == [["It was a long day, and the sun that stood over the hill was slow.", "Nobody came.",
                      "Then it was night."]]
    assert tally.counts["gutenberg_lines"] == 6 and "prose" in str(source) and "Gutenberg" in str(source)


def test_lines_come_back_as_they_were_written(text_folder):
    expected = [[s.replace(" .", ".") for s in document] for document in generated_documents()]
    assert list(documents(str(text_folder))) == expected
    assert list(documents(f"{text_folder}/*.txt")) == expected
    assert "2 files: lines" in str(Source.opened(str(text_folder)))


@pytest.mark.parametrize("text, kind, count", [
    ("One sentence a line.\nAnother one.\n\nA second document.\n", "lines", 2),
    ("One sentence a line.\nAnother one.\nA third.\n", "lines", 1),
    ("Text that is wrapped at a width, so\nthat a line is no sentence. More\nstands here\nand ends.\n", "wrapped", 1),
    ("A paragraph. It has four sentences. They are short. So it goes.\n\nAnother one. It is alike.\n", "paragraphs", 1),
])
def test_auto_tells_lines_from_prose(tmp_path, text, kind, count):
    source = write(tmp_path / "a.txt", text)
    assert Source.opened(source).files[0][1].kind == kind
    assert len(list(documents(source))) == count
    other, becomes = ("prose", "paragraphs") if kind == "lines" else ("lines", "lines")
    assert Source.opened(source, other).files[0][1].kind == becomes  # what is asked for is not second-guessed


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


@pytest.mark.parametrize("text, kind", [
    ("A sentence stands here.\n\n" * 9, "lines"),
    ("A sentence stands here, and\nit ends. A line goes\non without\nend. ", "wrapped"),
    ("Here is one. Here is another. Here is a third one.\n" * 9, "paragraphs"), (WIKITEXT, "wikitext")])
@given(largest=st.integers(5, 400), ends=st.sampled_from(["text", "row"]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_document_is_cut_at_its_largest_size_and_nothing_is_lost(text, kind, largest, ends, monkeypatch):
    def read():
        tally = Tally()
        texts = iter(text.split("\n") if ends == "text" else [text])
        return list(documents_in(Form(kind, ends, False), texts, tally)), tally.counts["cut_documents"]

    whole, cuts = read()
    assert cuts == 0
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "LARGEST", largest)
        parts, cuts = read()
    assert all(len(part) == 1 or sum(map(len, part)) <= largest for part in parts)
    if len(whole) == 1:  # no cut is early
        assert all(sum(map(len, [*one, after[0]])) > largest for one, after in zip(parts, parts[1:]))
    assert cuts == len(parts) - len(whole)
    assert "".join(unit for part in parts for unit in part).replace(" ", "") == "".join(
        unit for document in whole for unit in document).replace(" ", "")


def test_a_row_is_one_document_with_or_without_blank_lines():
    rows = iter(["One sentence.\n\nAnother one.\n", "A third."])
    form = Form("lines", "row", False)
    assert [form.sentences(units) for units in documents_in(form, rows, Tally())] == [
        ["One sentence.", "Another one."], ["A third."]]


def test_wrapped_lines_without_a_blank_line_become_long_paragraphs(monkeypatch):
    monkeypatch.setattr(corpus, "LARGEST", 2 * 64)
    (found,) = documents_in(Form("wrapped"), iter(["one", " two ", "three", "four", "", "", "five"]), Tally())
    assert found == ["one two three", "four", "five"]


def test_a_line_that_looks_like_a_heading_is_text_unless_blank_lines_stand_around_it():
    lines = ["", " = A = ", "", "text", " = x = ", "", " = y = ", "more", "", " = B = ", ""]
    found = list(documents_in(Form("wikitext"), iter(lines), tally := Tally()))
    assert found == [["text", " = x = ", " = y = ", "more"]]
    assert tally.counts["headings"] == 2
