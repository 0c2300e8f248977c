"""The demo's data, where there is no hub and no corpus: the prose that every CPython ships.

    python launch/demo_data.py FOLDER

FOLDER/docs.txt: docstrings of the standard library (read by ast, never imported) and help topics, a sentence a line, a blank
line between documents (a module, a topic).  FOLDER/qnli/train.tsv and dev.tsv, in GLUE's layout: a question asks about a
public function; the sentence is the first of its docstring, or of another function's in the module.  They differ between
Python versions, so no figure may rest on their exact size.
"""

import ast
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo",
           "lib-dynload", "_bundled", "encodings", "msilib", "pydoc_data", "__phello__"}
KINDS = {ast.Module: "module", ast.ClassDef: "class", ast.FunctionDef: "function", ast.AsyncFunctionDef: "function"}
HEADING = re.compile(r"^.*\n *([=*~^\"#+-])\1{2,}[ =*~^\"#+|-]*$", re.MULTILINE)  # with the line under it
BULLET = r"[ ]*(?:[-*o•]|\d+[.)]|\(\w\))[ ]+(?=\S)"
DEFINED = r"[ ]*[\w.*]+(?:\([^)\n]*\))?(?: \([^)\n]*\))?[ ]*(?::|--+)[ ]+(?=\S)"  # `width (default: 70): ...`
CUT = re.compile(rf"\n(?:\s*\n)+|\n(?={BULLET}|{DEFINED})|(?<=:)\n(?=[ ])")  # between paragraphs and list items
CODE = re.compile(r">>>|::=|^Traceback \(|\w\(.*\)\s*(?:->|$)|"
                  r"^\s*(?:\w+ \+?= |def |class \w+[:(]|import |from \w+ import |@|#|%|\$ )")
MARKUP = (
    (re.compile(rf"^{BULLET}"), ""),
    (re.compile(r"\s+"), " "),
    (re.compile(r":[\w:+-]+:`~?([^`<]+?)\s*(?:<[^`]*>)?`"), r"\1"),  # :class:`~a.b`
    (re.compile(r"``([^`]+)``|`([^`']+)[`'](?:__?\b)?"), r"\1\2"),
    (re.compile(r"(?<![\w*])\*{1,2}([\w][^*\n]*?)(?<=\S)\*{1,2}(?![\w*])"), r"\1"),  # *emphasis*, not *args
    (re.compile(r"(?<=[a-z])- (?=[a-z])(?!and |or )"), "-"),  # a hyphen that stood at the end of a line
)
ORDINARY = re.compile(r"[(\"'\[]*[A-Za-z]+(?:['’/-][A-Za-z]+)*[)\"'\]]*[.,;:!?]*[)\"']*")

DEV_SHARE = 0.1  # of the functions
TEMPLATES = ("What does {name} in {module} do?", "What is {module}.{name} for?", "What does {words} do in the module {module}?",
             "In {module}, what is the purpose of {words}?", "What happens when {name} of {module} is called?",
             "When would one use {words} from {module}?", "How is the function {name} of {module} described?",
             "Which job has {words} in {module}?")


class Doc(NamedTuple):
    """One docstring as prose."""
    module: str  # dotted, as imported
    name: str  # qualified inside the module; the module's own docstring has ""
    kind: str  # module, class or function
    sentences: list[str]


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    ordinary = sum(bool(ORDINARY.fullmatch(word)) for word in words)
    return len(words) <= 150 and ordinary >= max(3, 0.65 * len(words)) and not CODE.search(sentence)


def to_sentences(text: str) -> list[str]:
    """The sentences of a docstring or help topic, without code, doctests, tables, headings and markup."""
    from sentencex import segment

    kept, literal = [], None  # literal: the indentation that `::`, `..` or `>>>` opened, None outside
    for number, block in enumerate(CUT.split(HEADING.sub("\n", text.expandtabs()))):
        depth = len(block) - len(block.lstrip(" "))
        if literal is not None and depth > literal:
            continue
        directive = block.lstrip().startswith(("..", ">>>"))
        literal = depth if directive or block.rstrip().endswith("::") else None
        if directive:
            continue
        for pattern, plain in MARKUP:
            block = pattern.sub(plain, block)
        ends = re.search(r"[.!?:;][)\"']*$", block.strip())
        if ends or not depth and (number == 0 or len(block.split()) >= 6):  # else a line of code, a table's cell, a label
            kept += [sentence.strip().replace("::", ":") for sentence in segment("en", block.strip())]
    return list(filter(_is_prose, kept))


def _walk(node: ast.AST, name: str = "") -> Iterator[tuple[str, str, str]]:
    """(qualified name, kind, docstring) of a module, class or function and all in it, in the order of the source."""
    if type(node) in KINDS and (text := ast.get_docstring(node)):
        yield name, KINDS[type(node)], text
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _walk(child, f"{name}.{child.name}".lstrip(".") if type(child) in KINDS else name)


def docstrings() -> Iterator[Doc]:
    """Every docstring that holds prose, modules sorted by name; a text met before (C and Python twins) is left out."""
    library, seen = Path(sysconfig.get_path("stdlib")), set()
    paths = {".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__"): path
             for path in library.rglob("*.py") if not SKIPPED.intersection(path.relative_to(library).parts[:-1])}
    for module, path in sorted(paths.items()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in the library's own source
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for name, kind, text in _walk(tree):
            sentences = to_sentences(text)
            if sentences and tuple(sentences) not in seen:
                seen.add(tuple(sentences))
                yield Doc(module, name, kind, sentences)


def text() -> str:
    """A module of the standard library is a document, and so is a help topic."""
    from pydoc_data.topics import topics

    documents = [[sentence for doc in docs for sentence in doc.sentences]
                 for _, docs in groupby(docstrings(), key=lambda doc: doc.module)]
    documents += [to_sentences(topic) for _, topic in sorted(topics.items())]
    return "\n\n".join("\n".join(sentences) for sentences in documents if sentences) + "\n"


def pairs(seed: int = 0) -> tuple[list[tuple], list[tuple]]:
    """Training and dev rows (question, sentence, label), some 7,300 and 800 on CPython 3.11.

    Every question and every sentence stands once with each label, so neither text alone says anything about the answer.  The
    split is by top package (`email.message` goes where `email.parser` goes): none is in both.
    """
    rng = np.random.Generator(np.random.PCG64([seed]))
    modules, seen = defaultdict(list), set()
    for doc in docstrings():
        once = {doc.sentences[0].casefold(), f"{doc.module}.{doc.name}"}  # a property and its setter share a name
        if doc.kind == "function" and not re.search(r"(^|\.)_", doc.name) and not once & seen:
            seen |= once
            modules[doc.module].append(doc)
    package = {module: module.split(".")[0].lstrip("_") for module, docs in modules.items() if len(docs) > 1}
    sizes = Counter(package[module] for module in package for _ in modules[module])
    dev, room = set(), DEV_SHARE * sizes.total()
    for name in rng.permutation(sorted(sizes)).tolist():
        if sizes[name] <= room:  # a large package (tkinter) that does not fit stays in training
            dev.add(name)
            room -= sizes[name]
    splits = [], []
    for module in package:
        ring = [modules[module][n] for n in rng.permutation(len(modules[module]))]
        for doc, other in zip(ring, ring[1:] + ring[:1], strict=True):
            parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_+", " ", doc.name).split(".")
            words = " of ".join(part.strip() for part in reversed(parts))  # JSONEncoder.iter_encode: iter encode of JSON Encoder
            question = TEMPLATES[rng.integers(len(TEMPLATES))].format(name=doc.name, module=module, words=words)
            splits[package[module] in dev].extend([(question, doc.sentences[0], "entailment"),
                                                   (question, other.sentences[0], "not_entailment")])
    return splits


def main(folder: Path) -> None:
    (folder / "qnli").mkdir(parents=True, exist_ok=True)
    (folder / "docs.txt").write_text(text(), encoding="utf-8")
    for name, rows in zip(("train", "dev"), pairs(), strict=True):
        lines = ["\t".join(("index", "question", "sentence", "label"))]
        lines += ["\t".join((str(number), *row)) for number, row in enumerate(rows)]
        (folder / "qnli" / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
