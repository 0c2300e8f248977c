"""The objective of a student on all rows of any shards, for example of text it was never trained on.

    python tests/bench/held_out.py --shards DIR --teacher DIR --student FOLDER [--student FOLDER ...]

Prints each term, a mean over rows (unmasked, teacher in float32), and their sum; a line for each student.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import BertModel  # noqa: E402
from transformers.utils import logging  # noqa: E402

from pretrain.encoder import ATTENTION, load_teacher, model_config, trace  # noqa: E402
from pretrain.objective import TERMS, distil, layer_map, weighted  # noqa: E402
from pretrain.student import Student  # noqa: E402
from shards.block import read_manifest, read_shard  # noqa: E402
from shards.stream import Stream  # noqa: E402


def opened(folder: str, teacher) -> tuple[Student, list[int]]:
    from safetensors.torch import load_file

    encoder = BertModel.from_pretrained(folder, attn_implementation=ATTENTION, add_pooling_layer=False)
    student = Student(encoder, teacher.config.hidden_size).eval()
    if student.projection.state_dict():
        student.projection.load_state_dict(load_file(Path(folder) / "projection.safetensors"))
    return student, layer_map("uniform", encoder.config.num_hidden_layers, teacher.config.num_hidden_layers)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", required=True, type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True, action="append")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    manifest = read_manifest(given.shards)
    model_config(given.teacher)
    teacher = load_teacher(given.teacher, torch.float32, torch.device("cpu"))
    students = {folder: opened(folder, teacher) for folder in given.student}
    stream = Stream(manifest, partial(read_shard, given.shards), seed=0, batch=64, lanes=1, mask="none")
    sums, seen = {folder: {} for folder in students}, set()
    for j in range(0, manifest.rows, 64):
        for batch in stream.batches(j, 32):
            fresh = torch.from_numpy(np.array([n not in seen for n in batch.numbers.tolist()]))  # the last wraps around
            seen.update(batch.numbers.tolist())
            ids, segments, real = (torch.from_numpy(x) for x in (batch.ids, batch.segments, batch.real))
            t = trace(teacher, ids, segments, real)
            for folder, (student, layers) in students.items():
                terms = distil(student(ids, segments, real), t, real, layers)
                terms["loss"] = weighted(terms, dict.fromkeys(TERMS, 1.0))
                for name, value in terms.items():
                    sums[folder][name] = sums[folder].get(name, 0.0) + (value * fresh).sum().item()
    for folder, terms in sums.items():
        print(f"{folder} on {len(seen):,} rows: " + ", ".join(f"{k} {v / len(seen):.4f}" for k, v in terms.items()))


if __name__ == "__main__":
    main()
