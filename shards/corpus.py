"""Sources of text -> documents of sentences.

A source is a text file, a glob, a folder of .txt files, a WikiText file (token or raw form), or `python-docs`.  A text
file is `lines` (one sentence a line, blank lines between documents; without blank lines the file is one document) or
`prose` (wrapped text or paragraphs, blank lines between paragraphs; the file is one document, split by sentencex).

Reading is cheap and yields Documents as they stand; Document.sentences() does the work, so that a build can do it in
its workers.
"""

import glob
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, dropwhile, groupby, islice
from pathlib import Path

CAN_BE = "a source is a text file, a glob, a folder of .txt files, a WikiText file, or python-docs"
SUFFIXES = (".txt", ".tokens", ".raw")  # what is taken from a folder
SAMPLED = 2000  # lines that `auto` looks at

HEADING = re.compile(r" ?(=(?: =)*) \S.* \1 ?")  # ` = Title = `, ` = = Section = = `: WikiText
GUTENBERG = re.compile(r"\*\*\* ?(START|END) OF (?:THE|THIS) PROJECT GUTENBERG", re.IGNORECASE)
GUTENBERG_CREDIT = re.compile(r"(?:Produced by|E-text prepared by|End of (?:the )?Project Gutenberg)")
SENTENCE_END = re.compile(r"[.!?:;][\"'”’)\]_ ]*$|''$")

# Corpora in token form (WikiText, BookCorpus, Penn Treebank) -> the spacing that a teacher saw in its pretraining.
UNDONE = [(re.compile(pattern), plain) for pattern, plain in (
    (r" ?@([-,.])@ ?", r"\1"),  # WikiText: `role @-@ playing`, `4 @,@ 386`
    (r" (n['’]t|['’] ?(?:s|S|re|ve|ll|d|m|em))\b", lambda found: found[1].replace(" ", "")),
    (r"(?<=\d) : (?=\d\d\b)", ":"),  # times
    (r" +([,.;:!?%)\]])(?=[\s\"'`)\]]|$)", r"\1"),
    (r"([(\[$£€]) +(?=\S)", r"\1"),
    (r"`` ?", '"'), (r" ?''", '"'), (r"(?<!\S)` ?", "'"),  # Penn Treebank quotes
    (r"(?<=[s.,!?;:]) '(?=\s|$)", "'"),
)]


def untokenized(text: str) -> str:
    """`he did n't go ( 4 @,@ 386 t ) .` -> `he didn't go (4,386 t).`"""
    parts = text.split('"')
    if len(parts) % 2:  # as many opening as closing quotes
        parts[1::2] = [part.strip() for part in parts[1::2]]
        text = '"'.join(parts)
    for pattern, plain in UNDONE:
        text = pattern.sub(plain, text)
    return text


@dataclass(frozen=True)
class Document:
    """Units of text as read, and what is still to do with them."""

    units: list[str]  # paragraphs, or sentences
    split: bool  # units are to be split into sentences
    spaced: bool  # in token form

    def sentences(self) -> list[str]:
        units = [untokenized(unit) for unit in self.units] if self.spaced else self.units
        if self.split:
            from sentencex import segment

            units = [sentence for unit in units for sentence in segment("en", unit)]
        return [sentence for unit in units if (sentence := unit.strip())]


@dataclass(frozen=True)
class Form:
    """What a text file was taken for."""

    kind: str  # wikitext, lines or prose
    spaced: bool  # in token form
    gutenberg: bool

    def __str__(self) -> str:
        extra = [self.spaced and "token spacing undone", self.gutenberg and "Project Gutenberg's own text left out"]
        return self.kind + "".join(f", {text}" for text in extra if text)


def _lines(path: Path) -> Iterator[str]:
    """Lines without their ends.  ValueError names the line and byte of NUL and of what is not UTF-8."""
    start = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: line {number:,}, byte {start + error.start:,}: not UTF-8 "
                                 f"(0x{raw[error.start]:02x}); convert the file with iconv -t UTF-8") from None
            if "\0" in text:
                raise ValueError(f"{path}: line {number:,}, byte {start + raw.index(0):,}: a NUL byte; "
                                 "is it a text file? Leave it out, or convert it with iconv -t UTF-8")
            yield text.rstrip("\r\n")
            start += len(raw)


def survey(path: Path, sentences: str = "auto") -> Form:
    """Decide what a file is from its first lines; `sentences` is auto, lines or prose."""
    from sentencex import segment

    sample = list(islice(_lines(path), SAMPLED))
    if gutenberg := any(map(GUTENBERG.match, sample)):
        sample = list(dropwhile(lambda line: not GUTENBERG.match(line), sample))
    text = [line for line in sample if line.strip()]
    if not text:
        raise ValueError(f"{path}: holds no text; leave it out")
    spaced = sum(line.rstrip().endswith((" .", " ?", " !", "''")) for line in text) > 0.3 * len(text)
    if any(HEADING.fullmatch(line) and line.count("=") == 2 for line in text[:20]):
        return Form("wikitext", True, gutenberg)
    if sentences != "auto":
        return Form(sentences, spaced, gutenberg)
    ended = sum(bool(SENTENCE_END.search(line)) for line in text) / len(text)
    each = sum(len(list(segment("en", untokenized(line)))) for line in text[:200]) / len(text[:200])
    return Form("lines" if ended > 0.5 and each < 1.6 else "prose", spaced, gutenberg)


def _without_gutenberg(lines: Iterable[str], counts: Counter) -> Iterator[str]:
    """Only what stands between START and END, less the lines that name who made the file."""
    inside = False
    for line in lines:
        if marker := GUTENBERG.match(line):
            inside = marker[1].upper() == "START"
        if marker or not inside or GUTENBERG_CREDIT.match(line):
            counts["gutenberg_lines"] += 1
        else:
            yield line


def _wikitext(lines: Iterable[str], counts: Counter) -> Iterator[list[str]]:
    """Articles as paragraphs.  Titles and section headings are labels, not sentences: left out and counted.

    A heading stands between blank lines; a formula such as ` = x = ` inside a paragraph does not.
    """
    article: list[str] = []
    before, held = "", None  # held: a heading if the next line is blank
    for line in chain(lines, [""]):
        if held is not None and line.strip():
            article.append(held)
        elif held is not None:
            counts["headings"] += 1
            if held.count("=") == 2:
                yield article
                article = []
        held = None
        if not before.strip() and HEADING.fullmatch(line):
            held = line
        elif line.strip():
            article.append(line)
        before = line
    yield article


def _blank_separated(lines: Iterable[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in chain(lines, [""]):
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def read_file(path: Path, form: Form, counts: Counter) -> Iterator[Document]:
    """The documents of one text file, in order; `counts` gains headings and gutenberg_lines left out."""
    lines = _lines(path)
    if form.gutenberg:
        lines = _without_gutenberg(lines, counts)
    if form.kind == "wikitext":
        yield from (Document(article, True, True) for article in _wikitext(lines, counts) if article)
    elif form.kind == "lines":
        yield from (Document(block, False, form.spaced) for block in _blank_separated(lines))
    else:
        yield Document([" ".join(map(str.strip, block)) for block in _blank_separated(lines)], True, form.spaced)


def files(source: str) -> list[Path]:
    """The text files of a source, sorted; none for python-docs.  ValueError says what can be given instead."""
    if source == "python-docs":
        return []
    path = Path(source).expanduser()
    if path.is_dir():
        found, wrong = [p for p in path.rglob("*") if p.suffix in SUFFIXES], "a folder without .txt files"
    elif glob.has_magic(source) and not path.exists():
        found, wrong = map(Path, glob.glob(str(path), recursive=True)), "the glob matches no file"
    else:
        found, wrong = [path], "no such file, folder or name"
        beside = {p.name: str(p) for p in path.parent.iterdir()} if path.parent.is_dir() else {}
        if near := get_close_matches(path.name, [*sorted(beside), "python-docs"], 1):
            wrong += f"; did you mean {beside.get(near[0], near[0])}?"
    if not (found := sorted(filter(Path.is_file, found))):
        raise ValueError(f"source {source}: {wrong}; {CAN_BE}".replace("?;", "?"))
    return found


@dataclass(frozen=True)
class Source:
    """A source whose files are known and looked at; nothing is read yet."""

    name: str
    files: tuple[tuple[Path, Form], ...]  # sorted; none for python-docs

    @staticmethod
    def opened(name: str, sentences: str = "auto") -> "Source":
        return Source(name, tuple((path, survey(path, sentences)) for path in files(name)))

    def __str__(self) -> str:
        """What each file was taken for, in one line."""
        forms = Counter(str(form) for _, form in self.files)
        verdicts = [f"{number} file{'s' * (number > 1)}: {form}" for form, number in sorted(forms.items())]
        return f"{self.name}: {'; '.join(verdicts) or 'docstrings and help topics of this Python'}"

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path, _ in self.files)

    def documents(self, counts: Counter) -> Iterator[Document]:
        if not self.files:
            yield from _python_docs()
        for path, form in self.files:
            yield from read_file(path, form, counts)


def _python_docs() -> Iterator[Document]:
    """A module of the standard library is a document, and so is a help topic."""
    from shards.pydocs import docstrings, topics

    for _, docs in groupby(docstrings(), key=lambda doc: doc.module):
        yield Document([sentence for doc in docs for sentence in doc.sentences], False, False)
    for _, sentences in topics():
        yield Document(sentences, False, False)


def documents(source: str, sentences: str = "auto") -> Iterator[list[str]]:
    """Documents as lists of sentences, in the order of the source; empty ones are left out."""
    for document in Source.opened(source, sentences).documents(Counter()):
        if found := document.sentences():
            yield found
