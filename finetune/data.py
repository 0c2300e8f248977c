"""QNLI's rows: question, sentence, whether the sentence answers it; read, tokenized, cut into batches.

Letters: B rows, L positions.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from finetune.docpairs import Pair, docs_pairs
from pretrain.recipe import did_you_mean

LABELS = ("entailment", "not_entailment")  # GLUE's order; a model's output n stands for LABELS[n]
COLUMNS = ("question", "sentence", "label")
NAMED = ("glue", "python-docs")
POOL = 50  # batches; rows are sorted by length within so many, so an epoch's order stays random


def drawn(pairs: list[Pair], rows: int | None, seed: int) -> list[Pair]:
    """`rows` of them in a seeded order; all of them, as they stand, where there are no more."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    return pairs if rows is None or rows >= len(pairs) else [pairs[n] for n in order[:rows]]


def fingerprint(*splits: list[Pair]) -> str:
    """sha256 of the rows, in order."""
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()


def read_tsv(path: Path) -> list[Pair]:
    """GLUE's layout: a header, then fields between tabs, quotes having no meaning.  ValueError names file and line."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a QNLI folder holds train.tsv and dev.tsv as GLUE has them")
    try:
        lines = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    header = lines[0].rstrip("\r").split("\t")
    for column in COLUMNS:
        if column not in header:
            raise ValueError(f"{path}: no column {column!r}{did_you_mean(column, header)} "
                             f"(its header has {', '.join(header)})")
    places = [header.index(column) for column in COLUMNS]
    rows = [_row(f"{path}, line {number}", line.rstrip("\r").split("\t"), header, places)
            for number, line in enumerate(lines[1:], start=2)]
    if not rows:
        raise ValueError(f"{path}: a header and no rows")
    return rows


def _row(where: str, fields: list[str], header: list[str], places: list[int]) -> Pair:
    if len(fields) != len(header):
        raise ValueError(f"{where}: {len(fields)} fields between tabs, the header has {len(header)}")
    question, sentence, label = (fields[place] for place in places)
    if label not in LABELS:
        wrong = f"unknown label {label!r}" if label else "no label"
        raise ValueError(f"{where}: {wrong}; write {' or '.join(LABELS)}")
    if not question.strip() or not sentence.strip():
        raise ValueError(f"{where}: an empty {'sentence' if question.strip() else 'question'}")
    return Pair(question, sentence, LABELS.index(label))


def _glue() -> tuple[list[Pair], list[Pair]]:
    try:
        import datasets  # here: it takes a second, and only this source needs it

        splits = datasets.load_dataset("nyu-mll/glue", "qnli")
    except Exception as error:  # the hub's client lets errors of a dozen types through, most with many lines
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:120]
        raise ValueError(f"data glue: the hub did not give nyu-mll/glue ({reason}). With no network give --data "
                         "FOLDER with GLUE's train.tsv and dev.tsv, or --data python-docs") from error

    def pairs(split) -> list[Pair]:
        names = split.features["label"].names  # by name: another copy of GLUE may number them otherwise
        return [Pair(row["question"], row["sentence"], LABELS.index(names[row["label"]])) for row in split]

    return pairs(splits["train"]), pairs(splits["validation"])


def load(source: str, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and dev rows of `glue`, `python-docs` or a folder with train.tsv and dev.tsv."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return read_tsv(folder / "train.tsv"), read_tsv(folder / "dev.tsv")
    if source == "glue":
        return _glue()
    if source == "python-docs":
        return docs_pairs(seed)
    raise ValueError(f"data {source!r}: no such folder{did_you_mean(source, NAMED)} (give a folder with train.tsv and "
                     f"dev.tsv, or {' or '.join(NAMED)})")


@dataclass(frozen=True)
class Batch:
    """Rows beside each other, padded on the right."""

    rows: list[int]  # their numbers in the split
    ids: Tensor  # (B, L) int64
    segments: Tensor  # (B, L) int64: 0 for the question, 1 for the sentence
    real: Tensor  # (B, L) bool, True on tokens
    labels: Tensor  # (B,) int64

    def to(self, device: torch.device) -> "Batch":
        tensors = ("ids", "segments", "real", "labels")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in tensors})


def _padded(rows: list[list[int]], value: int) -> Tensor:
    """(B, L), L a multiple of 8: what fused kernels want."""
    out = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
    return F.pad(out, (0, -out.shape[1] % 8), value=value)


@dataclass(frozen=True)
class Rows:
    """A split as token ids."""

    ids: list[list[int]]
    segments: list[list[int]]
    labels: list[int]
    pad: int

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: list[int]) -> Batch:
        ids = _padded([self.ids[n] for n in rows], self.pad)
        lengths = torch.tensor([len(self.ids[n]) for n in rows])
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        labels = torch.tensor([self.labels[n] for n in rows])
        return Batch(rows, ids, _padded([self.segments[n] for n in rows], 0), real, labels)

    def batches(self, size: int, order: torch.Generator | None = None) -> Iterator[Batch]:
        """Every row once, rows of like length together: drawn from `order`, or the shortest first without one."""
        pools = [list(range(len(self)))]
        if order is not None:
            drawn = torch.randperm(len(self), generator=order).tolist()
            pools = [drawn[n:n + POOL * size] for n in range(0, len(drawn), POOL * size)]
        sorted_pools = [sorted(pool, key=lambda n: len(self.ids[n])) for pool in pools]
        cuts = [pool[n:n + size] for pool in sorted_pools for n in range(0, len(pool), size)]
        if order is not None:
            cuts = [cuts[n] for n in torch.randperm(len(cuts), generator=order).tolist()]
        return map(self.batch, cuts)


def tokenize(tokenizer, pairs: list[Pair], length: int) -> Rows:
    """`[CLS] question [SEP] sentence [SEP]` in at most `length` tokens, the longer of the two cut first."""
    # Both said outright: some folders store truncation and padding (all-MiniLM-L6-v2: 128) that would act in silence.
    encoded = tokenizer([pair.question for pair in pairs], [pair.sentence for pair in pairs], padding=False,
                        truncation="longest_first", max_length=length, return_token_type_ids=True)
    labels = [pair.label for pair in pairs]
    return Rows(encoded["input_ids"], encoded["token_type_ids"], labels, tokenizer.pad_token_id or 0)
