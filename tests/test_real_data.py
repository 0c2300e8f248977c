"""Real public files, where the environment variable DISTILL_DATA names their folder: what made-up text cannot show."""

import os
from pathlib import Path

import pytest

from finetune.data import read
from shards.corpus import Tally
from shards.sources import Source
from tests.conftest import documents

DATA = Path(os.environ.get("DISTILL_DATA", "/nonexistent"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="DISTILL_DATA names no folder with the real files")


def test_wikitext_articles_are_documents_without_token_spacing():
    found = list(documents(str(DATA / "wikitext-103/wiki.valid.raw")))
    assert len(found) == 60  # its README's count
    text = "\n".join(sentence for document in found for sentence in document)
    assert " @-@ " not in text and " @,@ " not in text and "\n = " not in text
    assert text.count(" , ") < 0.001 * text.count(", ")


def test_gutenbergs_own_text_is_left_out_and_counted():
    tally = Tally()
    ((form, units),) = Source.opened(str(DATA / "books/soseki-botchan.txt")).documents(tally)
    sentences = form.sentences(units)
    assert tally.counts["gutenberg_lines"] > 100 and len(sentences) > 1000
    assert not any("gutenberg" in sentence.lower() or "\ufeff" in sentence for sentence in sentences)


def test_tokenized_books_are_lines():
    source = Source.opened(str(DATA / "books/austen-emma.txt"))
    form, units = next(source.documents(Tally()))
    assert "lines" in str(source) and len(form.sentences(units)) > 5000


def test_qnli_with_its_stray_quotes_reads_whole():
    assert len(read(DATA / "qnli/train.tsv")) == 9_475 and len(read(DATA / "qnli/dev.tsv")) == 1_000
