"""QNLI's rows: question, sentence, whether the sentence answers it; read, tokenized, cut into batches."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
import torch
from pyarrow import csv, parquet
from transformers import BatchEncoding
from transformers.trainer_pt_utils import get_length_grouped_indices

from pretrain.recipe import did_you_mean

LABELS = ("entailment", "not_entailment")  # GLUE's order; a model's output n stands for LABELS[n]


class Pair(NamedTuple):
    """A row of QNLI (label 0 is entailment: the sentence answers the question) or of another task: one text or two."""
    question: str
    sentence: str
    label: int


def read(path: Path, columns: tuple = Pair._fields, labels: tuple = LABELS) -> list[Pair]:
    """The rows of a .csv, a .parquet or any other file (tabs, no quotes): one or two texts, a label; ValueError names the row."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a QNLI folder holds train.tsv and dev.tsv as GLUE has them")
    header = path.suffix != ".parquet"
    try:
        if header:
            layout = (csv.ParseOptions(newlines_in_values=True) if path.suffix == ".csv" else
                      csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False))
            at_once = csv.ReadOptions(use_threads=False, block_size=1 + path.stat().st_size)  # so that errors name the row
            table = csv.read_csv(path, at_once, layout, csv.ConvertOptions(column_types=dict.fromkeys(columns, pyarrow.string())))
        else:
            table = parquet.read_table(path)
        if missing := [column for column in columns if column not in table.column_names]:
            raise ValueError(f"no column {missing[0]!r}{did_you_mean(missing[0], table.column_names)} in {table.column_names}")
        if not table.num_rows:
            raise ValueError("a header and no rows")
        pairs, fields = [], [table[column].cast(pyarrow.string()).fill_null("").to_pylist() for column in columns]
        for number, (*texts, label) in enumerate(zip(*fields, strict=True), start=1 + header):  # a header is row 1
            if label not in labels:
                wrong = f"unknown label {label!r}" if label else "no label"
                raise ValueError(f"row {number}: {wrong}; write {' or '.join(labels)}")
            if empty := [column for column, text in zip(columns, texts, strict=False) if not text.strip()]:
                raise ValueError(f"row {number}: an empty {empty[0]}")
            pairs.append(Pair(*texts, *[""] * (2 - len(texts)), labels.index(label)))
        return pairs
    except (ValueError, KeyError, NotImplementedError) as error:  # KeyError: a name that stands twice; the last: lists, say
        raise ValueError(f"{path}: {error}") from None


def tsv(rows: Iterable[Iterable]) -> bytes:
    """A header and rows in GLUE's layout; a text's tabs and line ends become spaces."""
    return "".join("\t".join(re.sub(r"[\t\r\n]", " ", str(field)) for field in row) + "\n" for row in rows).encode()


def load(source: str, columns: tuple = Pair._fields, labels: tuple = LABELS, seed: int = 0,
         count: int | None = None) -> tuple[list[Pair], list[Pair], str]:
    """Of `glue`, or a folder with train.tsv and dev.tsv (or .csv, or .parquet): so many training rows (None: all) in an order
    drawn by the seed, the dev rows, and a sum that tells both from others."""
    if (folder := Path(source).expanduser()).is_dir():
        kind = next((kind for kind in (".csv", ".parquet") if (folder / f"train{kind}").is_file()), ".tsv")
        train, dev = (read(folder / f"{split}{kind}", columns, labels) for split in ("train", "dev"))
    elif source != "glue":
        raise ValueError(f"data {source!r}: no such folder; give one with train.tsv and dev.tsv, or glue")
    else:
        try:
            import datasets  # here: it takes a second, and only this source needs it
            splits = datasets.load_dataset("nyu-mll/glue", "qnli")
        except Exception as error:  # the hub's client lets errors of a dozen types through, most with many lines
            why = f"the hub did not give nyu-mll/glue ({f'{type(error).__name__}: {error}'.strip().splitlines()[0][:120]})"
            raise ValueError(f"data glue: {why}. With no network give --data FOLDER with GLUE's train.tsv and dev.tsv") from error
        names = splits["train"].features["label"].names  # by name: another copy of GLUE may number them otherwise
        train, dev = ([Pair(row["question"], row["sentence"], labels.index(names[row["label"]])) for row in splits[split]]
                      for split in ("train", "validation"))
    used = [train[n] for n in torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()[:count]]
    print(f"{source}: {len(used):,} of {len(train):,} training rows, {len(dev):,} dev rows", flush=True)
    return used, dev, hashlib.sha256(json.dumps([used, dev]).encode()).hexdigest()[:16]


class Rows:
    """A split as token ids: `[CLS] question [SEP] sentence [SEP]` in at most `length` tokens, the longer text cut first."""

    def __init__(self, tokenizer, pairs: list[Pair], length: int):
        # All said outright: some folders store truncation and padding (all-MiniLM-L6-v2: 128) that would act in silence.
        first, second, labels = map(list, zip(*pairs, strict=True))
        encoded = tokenizer(first, second if any(second) else None, padding=False, truncation="longest_first", max_length=length,
                            return_token_type_ids=True)
        self.tokenizer, self.labels = tokenizer, torch.tensor(labels)
        self.fields = {**encoded, "labels": self.labels, "rows": range(len(pairs))}

    def batch(self, rows: list[int]) -> BatchEncoding:
        """`input_ids`, `token_type_ids`, `attention_mask` (B, L), `labels`, `rows` (B,); L a multiple of 8 for fused kernels."""
        return self.tokenizer.pad({name: [values[n] for n in rows] for name, values in self.fields.items()},
                                  padding_side="right", pad_to_multiple_of=8, return_tensors="pt")

    def batches(self, size: int, order: torch.Generator) -> Iterator[BatchEncoding]:
        """Every row once in an order drawn from the generator, rows of like length together."""
        drawn = get_length_grouped_indices([len(ids) for ids in self.fields["input_ids"]], size, generator=order)
        cuts = [drawn[n:n + size] for n in range(0, len(drawn), size)]
        return (self.batch(cuts[n]) for n in torch.randperm(len(cuts), generator=order).tolist())
