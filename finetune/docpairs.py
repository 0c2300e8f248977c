"""Question and sentence pairs out of the standard library's docstrings, for where there is no QNLI.

A question asks about a documented function; the sentence is the first of its docstring (entailment), or of another
function's in the same module (not_entailment).  Every question and every sentence stands once with each label, so
neither text alone says anything about the answer.
"""

import re
from typing import NamedTuple

import torch

from shards.pydocs import Doc, docstrings

DEV_SHARE = 0.1  # of the functions
TEMPLATES = (
    "What does {name} in {module} do?",
    "What is {module}.{name} for?",
    "What does {words} do in the module {module}?",
    "In {module}, what is the purpose of {words}?",
    "What happens when {name} of {module} is called?",
    "When would one use {words} from {module}?",
    "How is the function {name} of {module} described?",
    "Which job has {words} in {module}?",
)


class Pair(NamedTuple):
    """A row of QNLI; label 0 is entailment: the sentence answers the question."""

    question: str
    sentence: str
    label: int


def _words(name: str) -> str:
    """`JSONEncoder.iter_encode` -> `iter encode of JSON Encoder`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_+", " ", name)
    return " of ".join(part.strip() for part in reversed(words.split(".")))


def package(module: str) -> str:
    """`email.mime.text` -> `email`, and `_pydecimal` -> `pydecimal`."""
    return module.split(".")[0].lstrip("_")


def _modules() -> dict[str, list[Doc]]:
    """The functions documented and public by name, of modules with at least two; each name and first sentence once."""
    modules: dict[str, list[Doc]] = {}
    seen: set[str] = set()
    for doc in docstrings():
        once = {doc.sentences[0].casefold(), f"{doc.module}.{doc.name}"}  # a property and its setter share a name
        if doc.kind == "function" and not re.search(r"(^|\.)_", doc.name) and not once & seen:
            seen |= once
            modules.setdefault(doc.module, []).append(doc)
    return {module: docs for module, docs in sorted(modules.items()) if len(docs) > 1}


def _rows(docs: list[Doc], order: torch.Generator) -> list[Pair]:
    """Two rows a function: its own sentence, and that of the next one in a drawn ring."""
    ring = [docs[n] for n in torch.randperm(len(docs), generator=order).tolist()]
    rows = []
    for doc, other in zip(ring, ring[1:] + ring[:1], strict=True):
        template = TEMPLATES[torch.randint(len(TEMPLATES), (), generator=order)]
        question = template.format(name=doc.name, module=doc.module, words=_words(doc.name))
        rows += [Pair(question, doc.sentences[0], 0), Pair(question, other.sentences[0], 1)]
    return rows


def docs_pairs(seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and dev rows, some 7,300 and 800 on CPython 3.11.

    The split is by top package (`email.message` goes where `email.parser` goes): none is in both.
    """
    order = torch.Generator().manual_seed(seed)
    modules = _modules()
    sizes: dict[str, int] = {}
    for module, docs in modules.items():
        sizes[package(module)] = sizes.get(package(module), 0) + len(docs)
    names, dev, room = sorted(sizes), set(), DEV_SHARE * sum(sizes.values())
    for n in torch.randperm(len(names), generator=order).tolist():
        if sizes[names[n]] <= room:  # a large package (tkinter) that does not fit stays in training
            dev.add(names[n])
            room -= sizes[names[n]]
    splits: tuple[list[Pair], list[Pair]] = ([], [])
    for module, docs in modules.items():
        splits[package(module) in dev].extend(_rows(docs, order))
    return splits
