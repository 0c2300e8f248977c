"""From a teacher and a general student to a QNLI model: the folders teacher, layers and student, then the report."""

import hashlib
import itertools
import json
import platform
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from finetune import data, distill, report
from finetune.distill import fit, half, mean
from pretrain.encoder import load_teacher, model_config
from pretrain.objective import TERMS, layer_map
from shards.block import write
from shards.tokenizer import auto_tokenizer


def sums(name: str | Path) -> dict[str, str] | str:
    """What tells two models apart: the sha256 of each file of a folder but its record; a hub name stands for itself."""
    files = sorted(path for path in Path(name).glob("*") if path.is_file() and path.name != "stage.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} or str(name)


def stage(folder: Path, inputs: dict, make: Callable[[Path], dict]) -> dict:
    """What stage.json in a folder says: inputs, figures, sha256 of each file.

    Where the folder is not there, not whole or of other inputs, `make(part)` fills an empty one and gives its figures.
    """
    why, record = "a file is missing or changed", folder / "stage.json"
    found = json.loads(record.read_text()) if record.exists() else {}
    if found and found["files"] == sums(folder):
        old = found["inputs"]
        if old == inputs:
            print(f"{folder.name}: {folder} is there, whole and from the same inputs; skipped", flush=True)
            return found
        why = ", ".join(f"{key} was {old.get(key)}, is {inputs.get(key)}" if len(str(old.get(key))) < 40 else f"another {key}"
                        for key in sorted(old | inputs) if old.get(key) != inputs.get(key))
    print(f"{folder.name}: makes {folder}{f', again ({why})' if folder.exists() else ''}", flush=True)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    part.mkdir(parents=True)
    try:
        record = {"inputs": inputs, "figures": make(part), "files": sums(part)}
    except BaseException:
        shutil.rmtree(part)
        raise
    (part / "stage.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if folder.exists():  # nothing is deleted
        free = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.{n}").exists())
        print(f"  the old one is now {folder.rename(folder.with_name(f'{folder.name}.{free}'))}")
    part.rename(folder)
    return record


class Run:
    """What every stage is given, read and checked, and how each one fills its folder."""

    def __init__(self, given: Namespace, settings):
        """ValueError for anything a person got wrong, before a model trains."""
        self.given, self.settings, self.out, self.seed = given, settings, Path(given.out), given.seed
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out {given.out}: is a file; give a folder")
        pair = given.student, given.student if settings.method == "gold" else given.teacher
        distill.check_two(*pair, settings.length)
        self.layers = layer_map(settings.layer_map, *(model_config(name).num_hidden_layers for name in pair))
        train, self.dev = data.load(given.data)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed)).tolist()
        self.train = [train[n] for n in order[:settings.rows]]
        self.data = hashlib.sha256(json.dumps([self.train, self.dev]).encode()).hexdigest()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(f"{given.data}: {len(self.train):,} of {len(train):,} training rows, {len(self.dev):,} dev rows", flush=True)

    def stage(self, folder: str, name: str, make: Callable[[Path], dict], **models) -> dict:
        """OUT/folder, made out of the rows, the seed, the settings of the stage `name` and these models' sums."""
        return stage(self.out / folder, {"data": self.data, "seed": self.seed, **self.settings.of(name), **models}, make)

    def opened(self, name: str | Path) -> tuple:
        """A model as a classifier, its tokenizer, the training and dev rows in its ids."""
        tokenizer = auto_tokenizer(str(name))
        rows = (data.Rows(tokenizer, pairs, self.settings.length) for pairs in (self.train, self.dev))
        return distill.open_classifier(name, self.seed, self.device), tokenizer, *rows

    def classify(self, stage: str, source: str | Path, loss: Callable, part: Path) -> dict:
        """A classifier trained by a loss, or a teacher that is one already; the epoch that is best on dev rows is kept."""
        model, tokenizer, train, dev = self.opened(source)
        names = distill.output_names(model_config(str(source)))
        accuracy = partial(mean, lambda batch: distill.logits(model, batch).argmax(-1) == batch.labels, dev, self.device)
        if names == distill.UNNAMED and accuracy() < 0.5:
            print("  its outputs have no names, and on dev rows LABEL_1 must be entailment: taken so")
            distill.reorder(model, [1, 0])
        given = stage == "teacher" and names
        if given:
            print(f"  {source} is a QNLI model already: not trained")
        curve = [] if given else fit(model, partial(loss, model), train, self.settings, stage, self.seed, accuracy)
        distill.save(model, tokenizer, part)
        return {"dev_accuracy": accuracy(), "epochs": curve}

    def imitate_layers(self, part: Path) -> dict:
        """The student's encoder, and a projection where the widths differ, trained to compute what OUT/teacher computes."""
        model, tokenizer, train, dev = self.opened(self.given.student)
        teacher = load_teacher(str(self.out / "teacher"), half(), self.device)
        student = distill.with_projection(model, self.given.student, teacher.config.hidden_size, self.seed)
        print(f"  student layers 1 to {len(self.layers)} imitate the teacher's layers {', '.join(map(str, self.layers))}")
        loss = partial(distill.layer_loss, teacher, self.layers, {term: getattr(self.settings, term) for term in TERMS}, student)
        curve = fit(student, loss, train, self.settings, "layers", self.seed, partial(mean, loss, dev, self.device))
        distill.save(model, tokenizer, part)
        if student.projection is not None:
            save_file(student.projection.state_dict(), part / "projection.safetensors")
        return {"epochs": curve}

    def imitate_predictions(self, part: Path) -> dict:
        """OUT/layers with a head, trained to answer what OUT/teacher answers."""
        teacher = distill.open_classifier(self.out / "teacher", self.seed, self.device, half())
        loss = partial(distill.prediction_loss, teacher.requires_grad_(False), self.settings.temperature)
        return self.classify("predictions", self.out / "layers", loss, part)

    def report(self, records: dict[str, dict]) -> str:
        """OUT/report.json and report.md; measured again where a model or the rows are others than the report's."""
        found = json.loads((self.out / "report.json").read_text()) if (self.out / "report.json").exists() else {}
        if found.get("stages") == records:
            print(f"report: {self.out / 'report.json'} is of these models and rows; skipped")
            return report.text(found)
        print("report: accuracy and speed", flush=True)
        device = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), float32"
        if self.device.type == "cuda":
            device = f"{torch.cuda.get_device_name(self.device)}, bfloat16 autocast"
        names = {name: f"{name} {Path(getattr(self.given, name)).name}" for name in records if name != "layers"}
        opened = {full: distill.open_classifier(self.out / name, self.seed, self.device) for name, full in names.items()}
        dev = data.Rows(auto_tokenizer(str(self.out / "student")), self.dev, self.settings.length)
        found = {"models": report.figures(opened, dev), "data": self.given.data, "device": device, "train_rows": len(self.train),
                 "dev_rows": len(self.dev), "seed": self.seed, "settings": asdict(self.settings), "stages": records}
        for name, content in (("report.md", report.text(found)), ("report.json", json.dumps(found, indent=2) + "\n")):
            write(self.out / name, content.encode())
        return report.text(found)


def run_all(given: Namespace, settings) -> str:
    """Every stage that is not there yet; gives the text of the report."""
    run = Run(given, settings)
    if settings.method == "gold":
        make = partial(run.classify, "gold", given.student, distill.gold_loss)
        return run.report({"student": run.stage("student", "gold", make, model=sums(given.student))})
    make = partial(run.classify, "teacher", given.teacher, distill.gold_loss)
    teacher = run.stage("teacher", "teacher", make, model=sums(given.teacher))
    if (reached := teacher["figures"]["dev_accuracy"]) < settings.min_teacher:
        raise ValueError(f"teacher {given.teacher}: dev accuracy {reached:.1%} is below min_teacher={settings.min_teacher}: a "
                         "student would learn its mistakes. Train it longer (teacher_epochs=, teacher_lr=), give another one, "
                         "or write min_teacher=0")
    layers = run.stage("layers", "layers", run.imitate_layers, teacher=teacher["files"], model=sums(given.student))
    student = run.stage("student", "predictions", run.imitate_predictions, teacher=teacher["files"], layers=layers["files"])
    return run.report({"teacher": teacher, "layers": layers, "student": student})
