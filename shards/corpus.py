"""Text -> documents of sentences: what a text is taken for, what is undone, what is left out."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby, islice

from sentencex import segment

SAMPLED = 2000  # lines that `auto` looks at
LARGEST = 2**22  # characters of a document: a longer one is cut, so that memory does not grow with a file
RUN = 1000  # rows of a document where the source does not say where documents end

HEADING = re.compile(r" ?(=(?: =)*) \S.* \1 ?")  # ` = Title = `, ` = = Section = = `: WikiText
GUTENBERG = re.compile(r"\*\*\* ?(START|END) OF (?:THE|THIS) PROJECT GUTENBERG", re.IGNORECASE)
GUTENBERG_CREDIT = re.compile(r"(?:Produced by|E-text prepared by|End of (?:the )?Project Gutenberg)")
QUOTED = re.compile('"([^"]*)"')
SENTENCE_END = re.compile(r"[.!?:;][\"'”’)\]_ ]*$|''$")

# Corpora in token form (WikiText, BookCorpus, Penn Treebank) -> the spacing that a teacher saw in its pretraining.
# Each stands behind a text without which its pattern cannot match: looking for that first is several times faster.
UNDONE = [(needle, re.compile(pattern), plain) for needle, pattern, plain in (
    ("@", r" ?@([-,.])@ ?", r"\1"),  # WikiText: `role @-@ playing`, `4 @,@ 386`
    *((quote, rf" (n{quote}t|{quote} ?(?:s|S|re|ve|ll|d|m|em))\b", lambda found: found[1].replace(" ", "")) for quote in "'’"),
    (" : ", r"(?<=\d) : (?=\d\d\b)", ":"),  # times
    (" ", r" +(?=[,.;:!?%)\]](?:[\s\"'`)\]]|$))", ""),
    *((f"{sign} ", rf"(?<=\{sign}) +(?=\S)", "") for sign in "([$£€"),
    ("``", r"`` ?", '"'), ("''", r" ?''", '"'), ("`", r"(?<!\S)` ?", "'"),  # Penn Treebank quotes
    (" '", r"(?<=[s.,!?;:]) '(?=\s|$)", "'"),
)]


def untokenized(text: str) -> str:
    """`he did n't go ( 4 @,@ 386 t ) .` -> `he didn't go (4,386 t).`"""
    if text.count('"') % 2 == 0:  # as many opening as closing ones
        text = QUOTED.sub(lambda found: f'"{found[1].strip()}"', text)
    for needle, pattern, plain in UNDONE:
        if needle in text:
            text = pattern.sub(plain, text)
    return text


@dataclass
class Tally:
    """What reading met, in the process that reads."""
    skip: bool = False  # bad records are counted and named instead of ending the build
    counts: Counter = field(default_factory=Counter)  # headings, gutenberg_lines, cut_documents, bad_records
    bad: list[str] = field(default_factory=list)  # the first 20 bad records, "file: line N: what"
    read: int = 0  # bytes of the files read so far, compressed where they are

    def wrong(self, text: str) -> None:
        """A record that cannot be read.  ValueError, unless such records are to be skipped."""
        if not self.skip:
            raise ValueError(f"{text}; mend it or get it again, or leave such records out with --on-error skip")
        self.counts["bad_records"] += 1
        self.bad += [text][:20 - len(self.bad)]


WHOLE = f"a file is a document, cut between paragraphs at {LARGEST:,} characters"
SAYS = {"wikitext": ("WikiText without headings, <unk> kept as the tokenizer's unknown token", "titles end documents"),
        "lines": ("lines, a sentence each", "blank lines end documents"),
        "paragraphs": ("prose, a line is a paragraph", WHOLE),
        "wrapped": ("prose, wrapped lines joined up to a blank line", WHOLE)}


@dataclass(frozen=True)
class Form:
    """What a text was taken for."""
    kind: str  # of SAYS
    ends: str = "text"  # what a document ends at: text (its titles, blank lines or end), row, or run (of RUN rows)
    spaced: bool = True  # in token form
    gutenberg: bool = False

    def __str__(self) -> str:
        what, end = SAYS[self.kind]
        ends = {"text": end, "row": "a row is a document", "run": f"{RUN:,} rows are a document"}[self.ends]
        return f"{what}, {ends}" + ", token spacing undone" * self.spaced + ", Project Gutenberg's text left out" * self.gutenberg

    def sentences(self, units: list[str]) -> list[str]:
        """A document's, of its units, paragraphs or sentences as read: what is left to the workers of a build."""
        units = [untokenized(unit) for unit in units] if self.spaced else units
        if self.kind != "lines":
            units = [sentence for unit in units for sentence in segment("en", unit)]
        return [sentence for unit in units if (sentence := unit.strip())]


def survey(lines: Iterable[str], sentences: str, ends: str = "text") -> Form:
    """What its first lines say a text is; `sentences` is auto, lines or prose."""
    text = [line for line in lines if line.strip()] or [""]
    gutenberg = any(map(GUTENBERG.match, text))
    if any(HEADING.fullmatch(line) and line.count("=") == 2 for line in text[:20]):
        return Form("wikitext", ends, True, gutenberg)
    ended = sum(bool(SENTENCE_END.search(line)) for line in text) > 0.5 * len(text)
    if sentences == "auto":
        each = sum(len(list(segment("en", untokenized(line[:2000])))) for line in text[:200]) / len(text[:200])
        sentences = "lines" if ended and each < 1.6 else "prose"
    spaced = sum(line.rstrip().endswith((" .", " ?", " !", "''")) for line in text) > 0.3 * len(text)
    return Form("lines" if sentences == "lines" else "paragraphs" if ended else "wrapped", ends, spaced, gutenberg)


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


def _units(form: Form, lines: Iterable[str], counts: Counter) -> Iterator[str | None]:
    """Sentences or paragraphs, None where a document ends."""
    if form.gutenberg and (form.ends == "text" or any(map(GUTENBERG.match, lines))):
        lines = _without_gutenberg(lines, counts)
    if form.kind == "wrapped":
        for text, paragraph in groupby(map(str.strip, lines), bool):
            while text and (part := " ".join(islice(paragraph, 1 + LARGEST // 64))):  # where no blank line comes
                yield part
        return
    lines, before, ends = iter(lines), "", form.kind == "lines" and form.ends == "text"
    for line in lines:
        if not line or line.isspace():
            if ends:
                yield None
        elif form.kind == "wikitext" and HEADING.fullmatch(line) and not before.strip():
            if after := next(lines, "").strip():  # no blank line: text, such as a formula ` = x = `
                yield from (line, after)
            else:
                counts["headings"] += 1
                if line.count("=") == 2:
                    yield None
            line = after
        else:
            yield line
        before = line


def documents_in(form: Form, texts: Iterator[str], tally: Tally) -> Iterator[list[str]]:
    """The units of each document of a text given as its lines, or of rows; the tally counts what is left out and cut."""
    groups = {"text": [texts], "row": (row.split("\n") for row in texts), "run": iter(lambda: list(islice(texts, RUN)), [])}
    for lines in groups[form.ends]:
        units, size = [], 0
        for unit in chain(_units(form, lines, tally.counts), [None]):
            if units and (unit is None or size + len(unit) > LARGEST):
                tally.counts["cut_documents"] += unit is not None
                yield units
                units, size = [], 0
            if unit:
                units.append(unit)
                size += len(unit)
