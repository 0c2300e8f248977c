"""`python launch/predict.py MODEL [FILE|-]`: what a classifier says of rows from a file or standard input, as they come.

    python launch/predict.py runs/qnli/student test.tsv > said.tsv
    printf 'Who wrote it?\\tNobody knows who wrote it.\\n' | python launch/predict.py runs/qnli/student/onnx/model-int8.onnx

A line a row: its number from 0, the label, its probability.  A file has a header, its columns go by name (.csv, .parquet, any
other: tabs, no quotes).  Standard input is lines of tabs; a first line that names all the columns is a header, without one the
fields go by place.  At a row that cannot be read it ends with exit code 2; what it said of those before it is right.
"""

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

if __package__ in (None, ""):  # started as a script: python puts launch/ on the path, not the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from pyarrow import parquet, string
from torch import nn
from transformers import AutoModelForSequenceClassification

from finetune.data import Pair, Rows
from finetune.distill import BATCH, each_row, logits
from pretrain.encoder import longest_row, model_config, opened
from pretrain.recipe import did_you_mean
from shards.tokenizer import auto_tokenizer

MOST = 512  # tokens of a row, where a model reads more


class OnnxClassifier(nn.Module):
    """An .onnx file that answers like a classifier of transformers, on as many threads as torch has."""

    def __init__(self, path: Path, parameters: int = 0):
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise ValueError(f"model {path}: onnxruntime is not installed; pip install -e '.[export]'") from None
        folder = next((folder for folder in path.parents[:2] if (folder / "config.json").is_file()), None)
        if folder is None:
            raise ValueError(f"model {path}: no config.json in its folder or the one above; leave it where it was made")
        self.config, self.folder, self.path, self.count = model_config(str(folder)), folder, path, parameters
        self.device, self.name_or_path = torch.device("cpu"), str(path.parent)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # else idle threads slow whatever comes next
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class for each status
            raise ValueError(f"model {path}: does not open as ONNX ({str(error).strip().splitlines()[0][:200]})") from error

    def forward(self, **inputs: torch.Tensor) -> SimpleNamespace:
        """Its logits (B, labels)."""
        given = {name: value.numpy() for name, value in inputs.items()}
        return SimpleNamespace(logits=torch.from_numpy(self.session.run(["logits"], given)[0]))

    def num_parameters(self) -> int:
        return self.count

    def get_memory_footprint(self) -> int:
        return self.path.stat().st_size


def open_model(name: str) -> tuple:
    """A classifier in eval mode, on the GPU where there is one and it is no .onnx file, and its tokenizer."""
    if name.endswith(".onnx"):
        if not (path := Path(name)).is_file():
            raise ValueError(f"model {name}: no such file; python launch/handover.py runs/qnli makes one")
        return (model := OnnxClassifier(path.resolve())), auto_tokenizer(str(model.folder))
    if "ForSequenceClassification" not in " ".join(model_config(name).architectures or ()):
        raise ValueError(f"model {name}: is no classifier; give the folder of one, such as runs/qnli/student")
    model = opened(AutoModelForSequenceClassification, name, dtype=torch.float32).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), auto_tokenizer(name)


def of_table(path: Path, columns: tuple) -> Iterator[tuple[int, tuple]]:
    """The rows of a Parquet file, numbered from 1."""
    table = parquet.ParquetFile(path)
    check(columns, table.schema_arrow.names)
    parts = ([part[column].cast(string()).fill_null("").to_pylist() for column in columns]
             for part in table.iter_batches(BATCH, columns=list(columns)))
    return enumerate(chain.from_iterable(zip(*part, strict=True) for part in parts), start=1)


def of_lines(lines: Iterable[str], columns: tuple, layout: dict, bare: bool) -> Iterator[tuple[int, tuple]]:
    """The rows of a text, numbered from 1, its header being row 1; `bare`: it may have none."""
    rows = enumerate(csv.reader(lines, **layout), start=1)
    _, header = number, first = next(rows, (1, []))
    if bare and not {*columns} <= {*first}:
        rows, header = chain([(number, first)] if first else [], rows), columns
    check(columns, header)
    places = [header.index(column) for column in columns]
    for number, fields in rows:
        if len(fields) != len(header):
            raise ValueError(f"row {number}: {len(fields)} fields, and not {len(header)} ({', '.join(header)})")
        yield number, tuple(fields[place] for place in places)


def check(columns: tuple, header: Iterable[str]) -> None:
    """ValueError where a column is not in the header, or twice."""
    header = list(header)
    for column in columns:
        if header.count(column) != 1:
            wrong = "stands twice" if column in header else f"is not there{did_you_mean(column, header)}"
            raise ValueError(f"column {column!r} {wrong} (its header has {', '.join(header)}); write --columns")


def texts(source: str, columns: tuple) -> Iterator[tuple]:
    """Each row's texts.  ValueError names the source and the row."""
    path, number = Path(source), 0
    if source != "-" and (path.is_dir() or not path.exists()):
        raise ValueError(f"{source}: no such file; give a .tsv, .csv or .parquet file, or - for standard input")
    quoted = path.suffix == ".csv"
    layout = {"strict": True} if quoted else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    try:
        with nullcontext(sys.stdin.buffer) if source == "-" else open(path, "rb") as file:
            rows = of_table(path, columns) if path.suffix == ".parquet" else of_lines(
                io.TextIOWrapper(file, "utf-8-sig", newline="" if quoted else None), columns, layout, bare=source == "-")
            for number, row in rows:
                if empty := [column for column, text in zip(columns, row, strict=True) if not text.strip()]:
                    raise ValueError(f"row {number}: an empty {empty[0]}")
                yield row
        if not number:
            raise ValueError("no rows")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: after row {number}: no UTF-8 ({error.reason})") from None
    except (ValueError, csv.Error, NotImplementedError) as error:
        after = f"after row {number}: " if isinstance(error, csv.Error) else ""
        raise ValueError(f"{'standard input' if source == '-' else source}: {after}{error}") from None


def predictions(model: nn.Module, tokenizer, rows: Iterable[tuple], length: int) -> Iterator[tuple[str, float]]:
    """(label, probability) of each row of one text or two, a batch at a time."""
    rows = iter(rows)
    while some := [Pair(*row, *[""] * (2 - len(row)), 0) for row in islice(rows, BATCH)]:
        shares = each_row(partial(logits, model), Rows(tokenizer, some, length), model.device).softmax(-1)
        best = shares.max(-1)
        yield from zip((model.config.id2label[n] for n in best.indices.tolist()), best.values.tolist(), strict=True)


def predict(given: argparse.Namespace) -> None:
    """A line a row to standard output."""
    columns = tuple(given.columns.split(","))
    if len(columns) not in (1, 2) or not all(columns):
        raise ValueError(f"columns {given.columns}: name one or two, such as --columns question,sentence")
    model, tokenizer = open_model(given.model)
    longest = min(MOST, longest_row(model.config))
    if not 8 <= (length := given.length or longest) <= longest:
        raise ValueError(f"length {length}: write --length from 8 to {longest}")
    for number, (label, share) in enumerate(predictions(model, tokenizer, texts(given.file, columns), length)):
        print(number, label, f"{share:.4f}", sep="\t", flush=number % BATCH == BATCH - 1)


def main(argv: list[str] | None = None) -> int:
    """What a person got wrong is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="launch/predict.py", description="What a classifier says of each row.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a classifier, or an .onnx file of handover.py")
    parser.add_argument("file", metavar="FILE", nargs="?", default="-", help="tabs, .csv or .parquet; -: standard input, tabs")
    parser.add_argument("--columns", default="question,sentence", help="of the rows: one text or two")
    parser.add_argument("--length", type=int, help=f"most tokens of a row; None: all that the model reads, {MOST} at most")
    try:
        predict(parser.parse_args(argv))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
