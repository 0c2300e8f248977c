"""QNLI's rows: question, sentence, whether the sentence answers it; read, tokenized, cut into batches."""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas
import torch
from transformers import BatchEncoding

from pretrain.recipe import did_you_mean

LABELS = ("entailment", "not_entailment")  # GLUE's order; a model's output n stands for LABELS[n]
POOL = 50  # batches; rows are sorted by length within so many, so an epoch's order stays random


class Pair(NamedTuple):
    """A row of QNLI (label 0 is entailment: the sentence answers the question) or of another task: one text or two."""

    question: str
    sentence: str
    label: int


def read(path: Path, columns: tuple = Pair._fields, labels: tuple = LABELS) -> list[Pair]:
    """The rows of a .csv, a .parquet, or a file in GLUE's layout (fields between tabs, quotes having no meaning).

    `columns` are the names of one or two texts and of the label.  ValueError names file and line, or row.  Without labels the
    columns are texts, and a file without a header holds them alone."""
    if not path.exists() or path.is_dir():
        raise ValueError(f"{path}: no such file; a QNLI folder holds train.tsv and dev.tsv as GLUE has them")
    unit, first = ("row", 1) if path.suffix in (".csv", ".parquet") else ("line", 2)
    try:
        if path.suffix == ".parquet":
            table = pandas.read_parquet(path).astype("string").fillna("")
            header, rows = [*table], table.to_numpy().tolist()
        else:
            text = io.StringIO(path.read_bytes().decode("utf-8-sig") or "\n", newline="\n")
            style = {} if path.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            header, *rows = csv.reader(text, **style)
    except (ValueError, csv.Error) as error:
        why = f"not UTF-8 ({error.reason} at byte {error.start})" if isinstance(error, UnicodeDecodeError) else error
        raise ValueError(f"{path}: {why}") from None
    if not labels and 0 < len(header) <= len(columns) and not {*columns} & {*header}:
        columns, header, rows, first = columns[:len(header)], columns[:len(header)], [header, *rows], 1
    for column in columns:
        if column not in header:
            raise ValueError(f"{path}: no column {column!r}{did_you_mean(column, header)} (its header has {', '.join(header)})")
    if not rows:
        raise ValueError(f"{path}: a header and no rows")
    pairs, places = [], [header.index(column) for column in columns]
    for number, fields in enumerate(rows, start=first):
        where = f"{path}, {unit} {number}"
        if len(fields) != len(header):
            raise ValueError(f"{where}: {len(fields)} fields between tabs, the header has {len(header)}")
        texts = [fields[place] for place in places]
        label = texts.pop() if labels else None
        if labels and label not in labels:
            raise ValueError(f"{where}: {f'unknown label {label!r}' if label else 'no label'}; write {' or '.join(labels)}")
        for column, text in zip(columns, texts, strict=False):
            if not text.strip():
                raise ValueError(f"{where}: an empty {column}")
        pairs.append(Pair(*texts, *[""] * (2 - len(texts)), labels.index(label) if labels else 0))
    return pairs


def tsv(rows: Iterable[Iterable]) -> bytes:
    """A header and rows in GLUE's layout; a text's tabs and line ends become spaces."""
    return "".join("\t".join(re.sub(r"[\t\r\n]", " ", str(field)) for field in row) + "\n" for row in rows).encode()


def load(source: str, columns: tuple = Pair._fields, labels: tuple = LABELS) -> tuple[list[Pair], list[Pair]]:
    """Training and dev rows of `glue`, or of a folder with train.tsv and dev.tsv (or .csv, or .parquet)."""
    if (folder := Path(source).expanduser()).is_dir():
        kind = next((kind for kind in (".csv", ".parquet") if (folder / f"train{kind}").is_file()), ".tsv")
        return tuple(read(folder / f"{split}{kind}", columns, labels) for split in ("train", "dev"))
    if source != "glue":
        raise ValueError(f"data {source!r}: no such folder; give one with train.tsv and dev.tsv, or glue")
    try:
        import datasets  # here: it takes a second, and only this source needs it

        splits = datasets.load_dataset("nyu-mll/glue", "qnli")
    except Exception as error:  # the hub's client lets errors of a dozen types through, most with many lines
        why = f"the hub did not give nyu-mll/glue ({f'{type(error).__name__}: {error}'.strip().splitlines()[0][:120]})"
        raise ValueError(f"data glue: {why}. With no network give --data FOLDER with GLUE's train.tsv and dev.tsv") from error
    names = splits["train"].features["label"].names  # by name: another copy of GLUE may number them otherwise
    return tuple([Pair(row["question"], row["sentence"], labels.index(names[row["label"]])) for row in splits[split]]
                 for split in ("train", "validation"))


class Rows:
    """A split as token ids: `[CLS] question [SEP] sentence [SEP]` in at most `length` tokens, the longer text cut first."""

    def __init__(self, tokenizer, pairs: list[Pair], length: int):
        # All said outright: some folders store truncation and padding (all-MiniLM-L6-v2: 128) that would act in silence.
        first, second = ([text for text in texts] for texts in zip(*(pair[:2] for pair in pairs), strict=True))
        encoded = tokenizer(first, second if any(second) else None, padding=False, truncation="longest_first", max_length=length,
                            return_token_type_ids=True)
        self.tokenizer, self.labels = tokenizer, torch.tensor([pair.label for pair in pairs])
        self.fields = {**encoded, "labels": self.labels, "rows": range(len(pairs))}

    def batch(self, rows: list[int]) -> BatchEncoding:
        """`input_ids`, `token_type_ids`, `attention_mask` (B, L), `labels`, `rows` (B,); L a multiple of 8 for fused kernels."""
        return self.tokenizer.pad({name: [values[n] for n in rows] for name, values in self.fields.items()},
                                  padding_side="right", pad_to_multiple_of=8, return_tensors="pt")

    def batches(self, size: int, order: torch.Generator) -> Iterator[BatchEncoding]:
        """Every row once in an order drawn from the generator, rows of like length together."""
        drawn = torch.randperm(len(self.labels), generator=order).tolist()
        pools = [sorted(drawn[n:n + POOL * size], key=lambda row: len(self.fields["input_ids"][row]))
                 for n in range(0, len(drawn), POOL * size)]
        cuts = [rows[n:n + size] for rows in pools for n in range(0, len(rows), size)]
        return (self.batch(cuts[n]) for n in torch.randperm(len(cuts), generator=order).tolist())
