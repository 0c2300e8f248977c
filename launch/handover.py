"""`python launch/handover.py runs/qnli`: what leaves the QNLI stage, made out of what its report.json tells.

student/onnx/model.onnx, checked against torch, and model-int8.onnx, both in the report; student/README.md, the model's card;
QNLI.tsv for GLUE's server where the data has a test.tsv.  What is there and whole stays."""

import argparse
import json
import logging
import sys
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path

if __package__ in (None, ""):  # started as a script: python puts launch/ on the path, not the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from transformers import AutoModelForSequenceClassification

from finetune import data, report
from finetune.distill import each_row, logits, open_classifier
from finetune.stages import stage, sums
from launch.predict import OnnxClassifier, open_model, predictions, texts
from pretrain.encoder import longest_row, opened
from shards.block import write
from shards.tokenizer import auto_tokenizer

NEEDED = ("onnx", "onnxruntime", "onnxscript")
CPU = torch.device("cpu")
CLOSE = 1e-4  # the largest difference between ONNX's logits and torch's


def finished(out: Path) -> dict:
    """A run's report.json, of the student that lies beside it."""
    if not (path := out / "report.json").is_file():
        raise ValueError(f"{out}: no report.json in it; give the --out of a finished python finetune/qnli.py")
    found = json.loads(path.read_text())
    if "confusion" not in found:
        raise ValueError(f"{path}: of an older version; start finetune/qnli.py again, which writes it anew")
    for name in ("teacher", "student"):
        if name in found["stages"] and found["stages"][name]["files"] != sums(out / name):
            raise ValueError(f"{out / name}: a file is missing or changed since report.json; start finetune/qnli.py again")
    return found


def dev_rows(found: dict, source: str, columns: tuple, labels: tuple) -> list[data.Pair]:
    """The dev rows; ValueError where training and dev rows are not those of the run."""
    _, dev, these = data.load(source, columns, labels, found["seed"], found["settings"]["rows"])
    if these != found["stages"]["student"]["inputs"]["data"]:
        raise ValueError(f"data {source}: other rows than this run had ({found['data']}); give --data FOLDER with those")
    return dev


def export(folder: Path, path: Path) -> None:
    """A classifier's folder as one ONNX file; rows and tokens may be any number."""
    # transformers' own attention: the name under which ours is known means nothing to others
    model = opened(AutoModelForSequenceClassification, str(folder), dtype=torch.float32, attn_implementation="eager").eval()
    names = ["input_ids", "attention_mask", *["token_type_ids"] * (getattr(model.config, "type_vocab_size", 0) >= 2)]
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=longest_row(model.config))}
    ids = torch.arange(10, 26).remainder(model.config.vocab_size).reshape(2, 8)  # no size is 1, which would be taken as fixed
    inputs = dict(zip(names, (ids, torch.ones_like(ids), torch.zeros_like(ids)), strict=False))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torchvision is not there, it would say
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (), path, kwargs=inputs, input_names=names, output_names=["logits"], dynamo=True,
                          dynamic_shapes=dict.fromkeys(names, sizes), external_data=False, verbose=False)


def quantize(path: Path, small: Path) -> None:
    """Weights as 8-bit integers, and activations where a product begins."""
    from onnxruntime.quantization import quantize_dynamic

    logging.disable(logging.WARNING)  # it recommends what is for pictures
    try:
        quantize_dynamic(path, small)
    finally:
        logging.disable(logging.NOTSET)


def make(out: Path, found: dict, source: str, columns: tuple, labels: tuple, part: Path) -> dict:
    """Both ONNX files, checked and measured -> the rows of the table."""
    dev, own = dev_rows(found, source, columns, labels), [name for name in ("teacher", "student") if name in found["stages"]]
    names = dict(zip(own, (line["model"] for line in found["models"]), strict=False))  # they come first in the table
    models = {name: open_classifier(out / name, found["seed"], CPU, labels) for name in own}
    rows = {name: data.Rows(auto_tokenizer(str(out / name)), dev, found["settings"]["length"]) for name in own}
    said_BC = each_row(partial(logits, models["student"]), rows["student"], CPU)
    export(out / "student", path := part.resolve() / "model.onnx")
    count = models["student"].num_parameters()
    exact = OnnxClassifier(path, count)
    gap = (each_row(partial(logits, exact), rows["student"], CPU) - said_BC).abs().max().item()
    if not gap <= CLOSE:  # nan too
        raise ValueError(f"{out / 'student'}: its logits in ONNX differ from torch's by {gap:.3g}, more than {CLOSE}")
    print(f"  {path.name}: its logits differ from torch's by at most {gap:.2g} on {len(dev):,} dev rows", flush=True)
    quantize(path, small := path.with_name("model-int8.onnx"))
    print(f"  {small.name}: {small.stat().st_size / 1e6:.1f} MB of {path.stat().st_size / 1e6:.1f}; now their speed", flush=True)
    compared = {f"{names['student']}, ONNX": exact, f"{names['student']}, ONNX int8": OnnxClassifier(small, count)}
    lines, _ = report.figures({names[name]: (models[name], rows[name]) for name in own}
                              | {name: (model, rows["student"]) for name, model in compared.items()}, names.get("teacher"))
    return {"models": lines, "gap": gap, "threads": torch.get_num_threads()}


def card(found: dict, columns: tuple, labels: tuple) -> str:
    """The README.md of the student's folder: what it is, of what it was made and how, how good it is, how to open it."""
    names, table = found["given"], report.text(found).split("\n\n")
    taught = f"`{names['teacher']}`, which knew the task or was fine-tuned on the same rows" * ("teacher" in found["stages"])
    settings = " ".join(f"{key}={value}" for key, value in found["settings"].items())
    pair = dict(zip(("text", "text_pair"), columns[:-1], strict=False))
    return f"""---
library_name: transformers
pipeline_tag: text-classification
---
# {Path(names['student']).name}, a classifier

It says of {' and '.join(columns[:-1])}: {' or '.join(labels)}.

- Data: `{found['data']}`, {found['train_rows']:,} training rows, {found['dev_rows']:,} dev rows
- Teacher: {taught or "none"}
- General student, which it was before: `{names['student']}`
- Settings: `{settings} seed={found['seed']}`

{table[1]}

{table[2]}

```python
from transformers import pipeline

says = pipeline("text-classification", "path/of/this/folder")
says({json.dumps(pair)}, truncation=True, max_length={found['settings']['length']})
```

`onnx/model.onnx` gives the same logits (within {CLOSE} on all dev rows), `onnx/model-int8.onnx` is smaller; onnxruntime opens
both. Where this was made, `python launch/predict.py MODEL rows.tsv --length {found['settings']['length']}` answers for whole
files, MODEL being this folder or one of the two.
"""


def for_glue(out: Path, test: Path, columns: tuple, length: int) -> bytes:
    """The student's answers in the order of GLUE's index, in the layout that GLUE's server takes."""
    rows = list(texts(str(test), ("index", *columns[:-1])))
    for number, (index, *_) in enumerate(rows, start=2):  # a header is row 1
        if not index.isdecimal():
            raise ValueError(f"{test}: row {number}: index {index!r} is no number")
    model, tokenizer = open_model(str(out / "student"))
    said = predictions(model, tokenizer, (row[1:] for row in rows), length)
    lines = sorted((int(row[0]), label) for row, (label, _) in zip(rows, said, strict=True))
    return data.tsv([("index", "prediction"), *lines])


def merge(found: dict, made: dict, own: int) -> None:
    """The new rows into the report's table; those of its `own` models too where a CPU was measured: all of one run."""
    on_cpu, device = found["device"].startswith("CPU"), f"CPU, {made['threads']} thread(s), float32"
    old, new = ({line["model"]: line for line in lines} for lines in (found["models"], made["models"]))
    kept = {} if on_cpu else {line["model"]: line for line in found["models"][:own]}
    found["models"] = [*(old | new | kept).values()]
    found["device"] = device if on_cpu else f"{found['device'].partition('; ONNX')[0]}; ONNX's beside the teacher on {device}"


def hand_over(given: argparse.Namespace) -> None:
    """Everything, in the order in which it is needed; the report last."""
    if missing := [name for name in NEEDED if not find_spec(name)]:
        raise ValueError(f"{', '.join(missing)}: not installed; pip install -e '.[export]'")
    found = finished(out := Path(given.out))
    columns, labels = (tuple(found["given"][key].split(",")) for key in ("columns", "labels"))
    source, records = given.data or found["data"], found["stages"]
    inputs = {name: records[name]["files"] for name in ("teacher", "student") if name in records}
    made = stage(out / "student" / "onnx", inputs, partial(make, out, found, source, columns, labels))["figures"]
    merge(found, made, len(inputs))
    test = Path(source).expanduser() / "test.tsv"
    files = {"student/README.md": card(found, columns, labels).encode()}
    if labels == data.LABELS and test.is_file():
        files["QNLI.tsv"] = for_glue(out, test, columns, found["settings"]["length"])
    for name, content in files.items():
        write(out / name, content)
        print(f"wrote {out / name}", flush=True)
    print(f"wrote {out}/report.html, report.md and report.json, with the ONNX files\n\n{report.save(out, found)}")


def main(argv: list[str] | None = None) -> int:
    """What a person got wrong is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="launch/handover.py", description="What leaves the QNLI stage.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("out", metavar="OUT", help="the --out of a finished finetune/qnli.py")
    parser.add_argument("--data", help="glue or the folder that the run had; None: by the name that the run had for it")
    try:
        hand_over(parser.parse_args(argv))
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
