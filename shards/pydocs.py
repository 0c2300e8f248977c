"""The prose that every CPython ships: docstrings of the standard library (read by ast, never imported) and help topics.

It differs between Python versions, so no figure may rest on its exact size.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo",
           "lib-dynload", "_bundled", "encodings", "msilib", "pydoc_data", "__phello__"}
KINDS = {ast.Module: "module", ast.ClassDef: "class", ast.FunctionDef: "function", ast.AsyncFunctionDef: "function"}
UNDERLINE = re.compile(r"\s*([=*~^\"#+-])\1{2,}[\s=*~^\"#+|-]*")
BULLET = re.compile(r"\s*(?:[-*o•]|\d+[.)]|\(\w\))\s+(?=\S)")
DEFINED = re.compile(r"\s*[\w.*]+(?:\([^)]*\))?(?: \([^)]*\))?\s*(?::|--+)\s+(?=\S)")  # `width (default: 70): ...`
CODE = re.compile(r">>>|::=|\w\(.*\)\s*(?:->|$)|"
                  r"^\s*(?:\w+ \+?= |def |class \w+[:(]|import |from \w+ import |@|#|%|\$ )")
MARKUP = (
    (re.compile(r":[\w:+-]+:`~?([^`<]+?)\s*(?:<[^`]*>)?`"), r"\1"),  # :class:`~a.b`
    (re.compile(r"``([^`]+)``|`([^`']+)[`'](?:__?\b)?"), r"\1\2"),
    (re.compile(r"(?<![\w*])\*{1,2}([\w][^*\n]*?)(?<=\S)\*{1,2}(?![\w*])"), r"\1"),  # *emphasis*, not *args
    (re.compile(r"\s+"), " "),
    (re.compile(r"(?<=[a-z])- (?=[a-z])(?!and |or )"), "-"),  # a hyphen that stood at the end of a line
)
ORDINARY = re.compile(r"[(\"'\[]*[A-Za-z]+(?:['’/-][A-Za-z]+)*[)\"'\]]*[.,;:!?]*[)\"']*")


@dataclass(frozen=True)
class Doc:
    """One docstring as prose."""

    module: str  # dotted, as imported
    name: str  # qualified inside the module; the module's own docstring has ""
    kind: str  # module, class or function
    sentences: list[str]


def _units(text: str) -> Iterator[tuple[str, bool]]:
    """Paragraphs and list items of reST-like text as (one line, whether it is indented); headings and code left out."""
    unit: list[str] = []
    margin, literal = 0, None  # literal: the indentation that `::` or `>>>` opened, None outside
    for line in [*text.expandtabs().splitlines(), ""]:
        depth = len(line) - len(line.lstrip())
        if UNDERLINE.fullmatch(line):
            unit = []  # what stands above a line of ==== is a heading
            continue
        if literal is not None and line.strip():
            if depth > literal:
                continue
            literal = None
        item = BULLET.match(line) or DEFINED.match(line)
        if unit and (not line.strip() or item or depth < margin or unit[-1].rstrip().endswith(":") and depth > margin):
            yield " ".join(unit), margin > 0
            if unit[-1].rstrip().endswith("::"):
                literal = margin
            unit = []
        if literal is not None and depth > literal or not line.strip():
            continue
        if line.lstrip().startswith((">>>", "..")):
            literal, unit = depth - (line.lstrip()[0] == ">"), []
            continue
        margin = depth if not unit else margin
        unit.append(line[item.end():] if item and not unit and BULLET.match(line) else line.strip())


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    ordinary = sum(bool(ORDINARY.fullmatch(word)) for word in words)
    return len(words) <= 150 and ordinary >= max(3, 0.65 * len(words)) and not CODE.search(sentence)


def to_sentences(text: str) -> list[str]:
    """The sentences of a docstring or help topic, without code, doctests, tables, headings and markup."""
    from sentencex import segment

    kept = []
    for number, (unit, indented) in enumerate(_units(text)):
        for pattern, plain in MARKUP:
            unit = pattern.sub(plain, unit)
        ends = re.search(r"[.!?:;][)\"']*$", unit)
        if indented and not ends or number and len(unit.split()) < 6 and not ends:
            continue  # a line of code, a table's cell, a label
        found = [sentence.strip().replace("::", ":") for sentence in segment("en", unit.strip())]
        kept += [sentence for sentence in found if _is_prose(sentence)]
    return kept


def _walk(node: ast.AST, name: str = "") -> Iterator[tuple[str, str, str]]:
    """(qualified name, kind, docstring) of a module, class or function and all in it, in the order of the source."""
    if type(node) in KINDS and (text := ast.get_docstring(node)):
        yield name, KINDS[type(node)], text
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _walk(child, f"{name}.{child.name}".lstrip(".") if type(child) in KINDS else name)


def docstrings() -> Iterator[Doc]:
    """Every docstring that holds prose, modules sorted by name; a text met before (C and Python twins) is left out."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = {".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__"): path
             for path in library.rglob("*.py") if not SKIPPED.intersection(path.relative_to(library).parts[:-1])}
    seen: set[tuple[str, ...]] = set()
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


def topics() -> Iterator[tuple[str, list[str]]]:
    """(name, sentences) of what help() knows about the language, sorted by name."""
    from pydoc_data.topics import topics as texts

    for name, text in sorted(texts.items()):
        if sentences := to_sentences(text):
            yield name, sentences
