"""Names of sources -> documents.

    PATH[:COLUMN]                    a file, folder or glob of text, or of JSON lines or Parquet, whose rows are documents
    wikitext:[NAME:]CONFIG           rows are lines; NAME is Salesforce/wikitext, or another of the same layout
    bookcorpus[:NAME[:CONFIG]]       rows are sentences, and RUN of them a document: nothing says where books end
    bookcorpusopen[:NAME[:CONFIG]]   a row is a book
    hf:NAME[:CONFIG]:COLUMN          a row is a document

NAME is a repository of the Hugging Face hub, streamed and not downloaded whole ([@SPLIT][#REVISION] may follow), or a folder
laid out like one.  =WEIGHT behind a source repeats or thins it.
"""

import glob
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import fsspec
import pyarrow
from pyarrow.parquet import ParquetFile

from shards.corpus import SAMPLED, Document, Form, Tally, documents_in, survey

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
TEXT, JSON, PARQUET = (".txt", ".tokens", ".raw"), (".jsonl", ".ndjson", ".json"), (".parquet",)  # taken from a folder
BUFFER, BATCH = 2**16, 128  # bytes, and rows of Parquet, held at once: a row may be a book
HUB = re.compile(r"(hf|wikitext|bookcorpus|bookcorpusopen)(?::([^@#]+))?(?:@([^@#]+))?(?:#(.+))?")


def _suffix(file) -> str:
    path = Path(file)
    return Path(path.stem).suffix if path.suffix in CODECS else path.suffix


def _raw(opened, file, column: str) -> Iterator[bytes | None]:
    """Lines with their ends, or rows of Parquet."""
    if _suffix(file) not in PARQUET:
        codec = CODECS.get(Path(file).suffix)
        yield from io.BufferedReader(pyarrow.input_stream(opened, codec), BUFFER) if codec else opened
        return
    rows = ParquetFile(opened, buffer_size=BUFFER, pre_buffer=False)
    types = {field.name: str(field.type) for field in rows.schema_arrow}
    if types.get(column) not in ("string", "large_string"):
        raise ValueError(f"{file}: no text in column {column!r}; name one of {types}")
    for batch in rows.iter_batches(BATCH, columns=[column]):
        yield from batch.column(0).cast(pyarrow.large_binary()).to_pylist()


def _rows(file: Path | str, column: str, tally: Tally) -> Iterator[str]:
    """Lines of a text file without their ends, or rows of another; an empty one for one that is bad."""
    before, local, kind = tally.read, isinstance(file, Path), _suffix(file)
    try:
        with fsspec.open(str(file), "rb") as opened:
            for number, raw in enumerate(_raw(opened, file, column), 1):
                text, wrong = "", None
                try:
                    text = raw.decode().strip("\ufeff\r\n")
                    if text and kind in JSON:
                        text = str.strip(json.loads(text)[column])
                    wrong = "a NUL byte" if "\0" in text else None
                except (AttributeError, KeyError, TypeError):
                    wrong = f"no text in column {column!r} (PATH:COLUMN names another) of {raw!r:.80}"
                except ValueError as error:  # not UTF-8, no JSON
                    wrong = f"cannot be read ({error})"
                if wrong:
                    tally.wrong(f"{file}: {'row' if kind in PARQUET else 'line'} {number:,}: {wrong}")
                if number % BATCH == 0:
                    tally.read = before + opened.tell()
                yield "" if wrong else text
    except (pyarrow.ArrowException, OSError) if local else Exception as error:  # a network has errors of its own
        if type(error) is ValueError:
            raise
        what = f"{file}: cannot be read on after byte {tally.read - before:,} ({' '.join(str(error).split())})"
        if not local:  # the rest is there: not a bad record
            raise ValueError(f"{what}; give the same command again") from error
        tally.wrong(what)
    if local:
        tally.read = before + file.stat().st_size


def _surveyed(files: list, column: str, sentences: str) -> list[tuple]:
    """Each file as a text of its own, (form, (file,)); a bad record among its first is told when it is read."""
    tally, texts, some = Tally(skip=True), [], False
    for file in files:
        lines = list(islice((line for row in _rows(file, column, tally) for line in row.split("\n")), SAMPLED))
        texts.append((survey(lines, sentences, "row" if _suffix(file) in JSON + PARQUET else "text"), (file,)))
        some |= any(map(str.strip, lines))
    if tally.bad and not some:
        raise ValueError(tally.bad[0])
    return texts


def _paths(name: str, sentences: str) -> tuple:
    """(column, *texts) of a file, folder or glob, sorted.  ValueError says what can be given instead."""
    named = re.fullmatch(r"(.+):([^:/*]+)", name) if not Path(name).expanduser().exists() else None
    place, column = named.groups() if named else (name, "text")
    path = Path(place).expanduser()
    found = [path] if path.exists() else map(Path, glob.glob(str(path), recursive=True))
    if path.is_dir():
        found = [inside for inside in path.rglob("*") if _suffix(inside) in TEXT + JSON + PARQUET]
    if not (found := sorted(filter(Path.is_file, found))):
        raise ValueError(f"source {name}: no such file or match, or a folder without text; write PATH[:COLUMN] of text, JSON "
                         "lines, Parquet (.gz, .zst, .bz2), wikitext:CONFIG, bookcorpus, bookcorpusopen, hf:NAME[:CONFIG]:COLUMN")
    return column, *_surveyed(found, column, sentences)


def _hub(source: str, sentences: str) -> tuple:
    """(column, (form, files)) of a name that HUB matches; the names of files that are not here hold the commit."""
    import datasets
    from huggingface_hub import HfApi

    kind, names, split, revision = HUB.fullmatch(source).groups()
    homes = {"bookcorpus": "bookcorpus/bookcorpus", "bookcorpusopen": "lucadiliello/bookcorpusopen"}
    names, split = (names or homes.get(kind, "")).split(":"), split or "train"
    column = names.pop() if kind == "hf" else "text"
    if kind == "wikitext" and len(names) == 1:
        names = ["Salesforce/wikitext", *names]
    elif names == [homes["bookcorpus"]]:  # its main branch is a loading script
        revision = revision or "refs/convert/parquet"
    if not 1 <= len(names) <= 2 or not all(names):
        raise ValueError(f"source {source}: write hf:NAME[:CONFIG]:COLUMN, wikitext:[NAME:]CONFIG or bookcorpus[:NAME[:CONFIG]]")
    name, config = os.path.expanduser(names[0]), names[-1] if len(names) == 2 else None
    try:
        if not (local := os.path.isdir(name)):  # asked once: load_dataset_builder asks again for half a minute
            HfApi().dataset_info(name, revision=revision, timeout=10)
        try:
            files = datasets.load_dataset_builder(name, config, revision=revision).config.data_files
        except ValueError:  # its README.md lists no configurations: they are folders
            files = datasets.load_dataset_builder(name, data_dir=config, revision=revision).config.data_files
        if split not in files:
            raise ValueError(f"no split {split!r}; name one of {', '.join(map(str, files))} as @SPLIT")
        files = tuple(sorted(map(Path if local else str, files[split])))
        if other := {*map(_suffix, files)} - {*JSON, *PARQUET}:
            raise ValueError(f"its files are {', '.join(sorted(other))}")
        (form, _), = _surveyed(files[:1], column, "prose" if kind == "bookcorpusopen" else sentences)
    except Exception as error:  # the network's, the hub's, datasets': each raises its own
        raise ValueError(f"source {source}: {name} cannot be opened: {type(error).__name__}: {error!s:.300} (NAME can be a "
                         "folder of Parquet files; #refs/convert/parquet at the end takes the hub's own Parquet copy)") from error
    return column, ({"wikitext": Form("wikitext"), "bookcorpus": Form("lines", "run")}.get(kind, form), files)


@dataclass(frozen=True)
class Source:
    """A source that was looked at; nothing is read whole yet."""

    name: str  # as given, without the weight
    weight: float
    texts: tuple[tuple[Form, tuple[Path | str, ...]], ...] = ()  # each one text over files
    column: str = "text"

    @staticmethod
    def opened(given: str, sentences: str = "auto") -> "Source":
        """Look at the first lines of each file.  ValueError says what can be given instead."""
        name, weight = given, 1.0
        if (found := re.fullmatch(r"(.+)=([-+]?\d*\.?\d+|nan|inf)", given)) and not Path(given).expanduser().exists():
            name, weight = found[1], float(found[2])
        if not 0 < weight <= 255:
            raise ValueError(f"source {given}: a weight must be above 0 and at most 255 (SOURCE=2 takes it twice)")
        column, *texts = (_hub if HUB.fullmatch(name) else _paths)(name, sentences)
        return Source(name, weight, tuple(texts), column)

    @property
    def files(self) -> tuple[tuple[Path, Form], ...]:
        """Those on this machine, each with what it was taken for."""
        return tuple((file, form) for form, files in self.texts for file in files if isinstance(file, Path))

    @property
    def bytes(self) -> int | None:
        return sum(path.stat().st_size for path, _ in self.files) or None

    def stated(self) -> dict:
        """For the manifest; sha256 is over the names of the files, below what all share, and their sizes."""
        top = os.path.commonpath([path.parent for path, _ in self.files]) if self.files else ""
        names = [(os.path.relpath(path, top), path.stat().st_size) for path, _ in self.files] or self.texts[0][1]
        forms = Counter(str(form) for form, files in self.texts for _ in files)
        verdicts = [f"{number} file{'s' * (number > 1)}: {form}" for form, number in sorted(forms.items())]
        return {"name": self.name, "weight": self.weight, "files": len(names), "bytes": self.bytes,
                "verdicts": verdicts, "sha256": hashlib.sha256(json.dumps(names).encode()).hexdigest()}

    def __str__(self) -> str:
        return f"{self.name}: {'; '.join(self.stated()['verdicts'])}" + f" (weight {self.weight:g})" * (self.weight != 1)

    def documents(self, tally: Tally) -> Iterator[Document]:
        """Documents in order, the same at every call.  ValueError on a bad record, unless the tally is to skip it."""
        document = None
        for form, files in self.texts:
            rows = chain.from_iterable(_rows(file, self.column, tally) for file in files)
            for document in documents_in(form, rows, tally):
                yield document
        if document is None:
            raise ValueError(f"source {self.name}: no document in it; leave it out")


def documents(source: str, sentences: str = "auto") -> Iterator[list[str]]:
    """Documents as lists of sentences, in the order of the source; empty ones are left out."""
    return filter(None, (document.sentences() for document in Source.opened(source, sentences).documents(Tally())))
