"""The demo's data: prose without code, and a task that no text alone gives away."""

from collections import Counter
from inspect import cleandoc

from launch import demo_data


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
    assert demo_data.to_sentences(cleandoc(text)) == [
        "Return the sum of a and b.", "The arguments are int; a long line goes on.", "The first item is a sentence."]


def test_the_library_gives_prose_sorted_by_module(monkeypatch):
    docs = list(demo_data.docstrings())
    assert [doc.module for doc in docs] == sorted(doc.module for doc in docs)
    assert {"module", "class", "function"} == {doc.kind for doc in docs}
    words = sum(len(sentence.split()) for doc in docs for sentence in doc.sentences)
    assert words > 100_000
    assert not any(">>>" in sentence or "``" in sentence for doc in docs for sentence in doc.sentences)
    assert not any("test" in doc.module.split(".") for doc in docs)
    monkeypatch.setattr(demo_data, "docstrings", lambda: iter(docs))
    documents = demo_data.text().split("\n\n")
    modules = len({doc.module for doc in docs})
    assert sum(len(doc.sentences) for doc in docs) == sum(len(document.splitlines()) for document in documents[:modules])
    assert len(documents[modules:]) > 50  # help topics

    train, dev = demo_data.pairs(0)
    assert len(train) > 2000 and 0.03 < len(dev) / len(train) < 0.15
    packages = {doc.sentences[0]: doc.module.split(".")[0].lstrip("_") for doc in reversed(docs) if doc.kind == "function"}
    assert not {packages[sentence] for _, sentence, _ in train} & {packages[sentence] for _, sentence, _ in dev}
    for split in (train, dev):
        assert len(set(split)) == len(split)
        for text in (0, 1):  # each question and each sentence stands once with each label
            assert set(Counter((pair[text], pair[2]) for pair in split).values()) == {1}
            answered = {pair[text] for pair in split if pair[2] == "entailment"}
            assert answered == {pair[text] for pair in split if pair[2] == "not_entailment"}
    assert demo_data.pairs(0) == (train, dev) != demo_data.pairs(1)
