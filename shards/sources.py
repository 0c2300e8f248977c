"""Names of sources -> documents.  README.md says what each kind of source is."""

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

from shards.corpus import SAMPLED, Form, Tally, documents_in, survey

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
TEXT, JSON, PARQUET = (".txt", ".tokens", ".raw"), (".jsonl", ".ndjson", ".json"), (".parquet",)  # taken from a folder
BUFFER, BATCH = 2**16, 128  # bytes, and rows of Parquet, held at once: a row may be a book
HUB = re.compile(r"(hf|wikitext|bookcorpus|bookcorpusopen)(?::([^@#]+))?(?:@([^@#]+))?(?:#(.+))?")
HOMES = dict(wikitext="Salesforce/wikitext", bookcorpus="bookcorpus/bookcorpus", bookcorpusopen="lucadiliello/bookcorpusopen")
FORMS = {"wikitext": Form("wikitext"), "bookcorpus": Form("lines", "run")}  # known, whatever the first lines look like


def _suffix(file) -> str:
    return next((suffix for suffix in reversed(Path(file).suffixes) if suffix not in CODECS), "")


def _rows(file: Path | str, column: str, tally: Tally) -> Iterator[str]:
    """Lines of a text file without their ends, or rows of another; an empty one for one that is bad."""
    before, local, kind, codec = tally.read, isinstance(file, Path), _suffix(file), CODECS.get(Path(file).suffix)
    try:
        with fsspec.open(str(file), "rb") as opened:
            raws = io.BufferedReader(pyarrow.input_stream(opened, codec), BUFFER) if codec else opened
            if kind in PARQUET:
                table = ParquetFile(opened, buffer_size=BUFFER, pre_buffer=False)
                types = {field.name: str(field.type) for field in table.schema_arrow}
                if types.get(column) not in ("string", "large_string"):
                    raise ValueError(f"{file}: no text in column {column!r}; name one of {types}")
                cells = (batch.column(0) for batch in table.iter_batches(BATCH, columns=[column]))
                raws = chain.from_iterable(some.cast(pyarrow.large_binary()).to_pylist() for some in cells)
            for number, raw in enumerate(raws, 1):
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


def _of_path(name: str) -> tuple[str, list[tuple[Path]]]:
    """(column, files) of a file, folder or glob, sorted, each a text of its own."""
    named = None if Path(name).expanduser().exists() else re.fullmatch(r"(.+):([^:/*]+)", name)
    place, column = named.groups() if named else (name, "text")
    path = Path(place).expanduser()
    inside = [file for file in path.rglob("*") if _suffix(file) in TEXT + JSON + PARQUET]  # none in what is no folder
    found = inside or ([path] if path.exists() else map(Path, glob.glob(str(path), recursive=True)))
    if not (files := sorted(filter(Path.is_file, found))):
        raise ValueError(f"source {name}: no such file or match, or a folder without text; write PATH[:COLUMN] of text, JSON "
                         "lines, Parquet (.gz, .zst, .bz2), wikitext:CONFIG, bookcorpus, bookcorpusopen, hf:NAME[:CONFIG]:COLUMN")
    return column, [(file,) for file in files]


def _of_hub(source: str, kind: str, given: str | None, split: str | None, revision: str | None) -> tuple[str, list[tuple]]:
    """(column, files) of the parts of HUB, one text over all; the names of files that are not here hold the commit."""
    import datasets
    from huggingface_hub import HfApi
    names, split = given.split(":") if given else [], split or "train"
    column = names.pop() if kind == "hf" and names else "text"
    if kind in HOMES and len(names) == (kind == "wikitext"):
        names.insert(0, HOMES[kind])
    if not 1 <= len(names) <= 2 or not all(names):
        raise ValueError(f"source {source}: write hf:NAME[:CONFIG]:COLUMN, wikitext:[NAME:]CONFIG or bookcorpus[:NAME[:CONFIG]]")
    if names == [HOMES["bookcorpus"]]:  # its main branch is a loading script
        revision = revision or "refs/convert/parquet"
    name, config = os.path.expanduser(names[0]), names[1] if len(names) == 2 else None
    try:
        if not (local := os.path.isdir(name)):  # asked once: load_dataset_builder asks again for half a minute
            HfApi().dataset_info(name, revision=revision, timeout=10)
        try:
            files = datasets.load_dataset_builder(name, config, revision=revision).config.data_files
        except ValueError:  # its README.md lists no configurations: they are folders
            files = datasets.load_dataset_builder(name, data_dir=config, revision=revision).config.data_files
        if split not in files:
            raise ValueError(f"no split {split!r}; name one of {', '.join(map(str, files))} as @SPLIT")
        if other := {*map(_suffix, files[split])} - {*JSON, *PARQUET}:
            raise ValueError(f"its files are {', '.join(sorted(other))}")
    except Exception as error:  # the network's, the hub's, datasets': each raises its own
        raise ValueError(f"source {source}: {name} cannot be opened: {type(error).__name__}: {error!s:.300} (NAME can be a "
                         "folder of Parquet files; #refs/convert/parquet at the end takes the hub's own Parquet copy)") from error
    return column, [tuple(sorted(map(Path if local else str, files[split])))]


@dataclass(frozen=True)
class Source:
    """A source that was looked at; nothing is read whole yet."""
    name: str  # as given, without the weight
    weight: float
    column: str
    texts: tuple[tuple[Form, tuple[Path | str, ...]], ...]  # each one text over files
    files: tuple[tuple[Path, Form], ...]  # those on this machine, each with what it was taken for
    bytes: int | None  # of them, None where there are none

    @staticmethod
    def opened(given: str, sentences: str = "auto") -> "Source":
        """Look at the first lines of each text.  ValueError says what can be given instead."""
        found = None if Path(given).expanduser().exists() else re.fullmatch(r"(.+)=([-+]?\d*\.?\d+|nan|inf)", given)
        name, weight = (found[1], float(found[2])) if found else (given, 1.0)
        if not 0 < weight <= 255:
            raise ValueError(f"source {given}: a weight must be above 0 and at most 255 (SOURCE=2 takes it twice)")
        hub = HUB.fullmatch(name)
        column, parts = _of_hub(name, *hub.groups()) if hub else _of_path(name)
        kind, tally, texts, empty = hub and hub[1], Tally(skip=True), [], True
        for files in parts:
            lines = list(islice((line for row in _rows(files[0], column, tally) for line in row.split("\n")), SAMPLED))
            ends = "row" if _suffix(files[0]) in JSON + PARQUET else "text"
            form = FORMS.get(kind) or survey(lines, "prose" if kind == "bookcorpusopen" else sentences, ends)
            texts.append((form, files))
            empty = empty and not any(map(str.strip, lines))
        if tally.bad and empty:  # a bad record among good ones is told when it is read
            raise ValueError(tally.bad[0])
        here = tuple((file, form) for form, files in texts for file in files if isinstance(file, Path))
        return Source(name, weight, column, tuple(texts), here, sum(file.stat().st_size for file, _ in here) or None)

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

    def documents(self, tally: Tally) -> Iterator[tuple[Form, list[str]]]:
        """Documents in order, the same at every call.  ValueError on a bad record, unless the tally is to skip it."""
        units = None
        for form, files in self.texts:
            rows = chain.from_iterable(_rows(file, self.column, tally) for file in files)
            for units in documents_in(form, rows, tally):
                yield form, units
        if units is None:
            raise ValueError(f"source {self.name}: no document in it; leave it out")
