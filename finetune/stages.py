"""From a teacher and a general student to a QNLI model: the folders teacher, layers and student, then the report."""

import hashlib
import importlib.util
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

from finetune import augment, data, distill, report
from finetune.distill import DEVICE, each_row, half
from finetune.qnli import METHODS
from pretrain.encoder import check_trace, longest_row, model_config
from pretrain.objective import TERMS, layer_map
from pretrain.recipe import did_you_mean
from pretrain.student import Student
from shards.block import write, write_json
from shards.tokenizer import auto_tokenizer, plain


OURS = ("stage.json", "README.md")  # in a stage's folder beside the model


def sums(name: str | Path) -> dict[str, str] | str:
    """What tells two models apart: the sha256 of each file of a folder but OURS; a hub name stands for itself."""
    files = sorted(path for path in [Path(name), *Path(name).glob("*")] if path.is_file() and path.name not in OURS)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} or str(name)


def stage(folder: Path, inputs: dict, make: Callable[[Path], dict] | None) -> dict:
    """What stage.json in a folder says: inputs, figures, sha256 of each file.

    Where that is not there, not whole or of other inputs, `make(part)` fills a folder and gives its figures; None: ValueError."""
    why, record = "a file is missing or changed" if folder.exists() else "it is not there", folder / "stage.json"
    found = json.loads(record.read_text()) if record.exists() else {}
    if found and found["files"] == sums(folder):
        old = found["inputs"]
        if old == inputs:
            print(f"{folder.name}: {folder} is there, whole and from the same inputs; skipped", flush=True)
            return found
        changes = {key: (old.get(key), inputs.get(key)) for key in sorted(old | inputs) if old.get(key) != inputs.get(key)}
        why = ", ".join("{} was {}, is {}".format(key, *both) if len(str(both)) < 60 else f"another {key}"
                        for key, both in changes.items())
    if not make:
        raise ValueError(f"stages: {folder} cannot be used ({why}); name its stage too, or leave --stages out")
    print(f"{folder.name}: makes {folder}{f', again ({why})' if folder.exists() else ''}", flush=True)
    part = folder.with_name(f"{folder.name}.{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:8]}.part")
    for other in {*folder.parent.glob(f"{folder.name}.*part")} - {part}:  # of a killed run of other inputs
        shutil.rmtree(other)
    part.mkdir(parents=True, exist_ok=True)
    try:
        figures = make(part)
    except Exception:  # but a killed or interrupted run goes on from its resume.pt
        shutil.rmtree(part)
        raise
    (part / "resume.pt").unlink(missing_ok=True)
    record = {"inputs": inputs, "figures": figures, "files": sums(part)}
    (part / "stage.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if folder.exists():  # nothing is deleted
        free = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.{n}").exists())
        print(f"  the old one is now {folder.rename(folder.with_name(f'{folder.name}.{free}'))}")
    part.rename(folder)
    return record


def predict(name: str, pairs: list[data.Pair], length: int = 512) -> list[tuple[str, float]]:
    """The label that a classifier finds likeliest for each pair, and how probable it finds it."""
    config = model_config(name)
    labels = tuple(config.id2label[n] for n in sorted(config.id2label))
    if distill.output_names(config, labels) is None:
        raise ValueError(f"model {name}: is no classifier; give the folder of one, such as runs/qnli/student")
    model = distill.open_classifier(name, 0, DEVICE, labels=labels)
    rows = data.Rows(auto_tokenizer(name), pairs, min(length, longest_row(config)))
    best = each_row(partial(distill.logits, model), rows, DEVICE).softmax(-1).max(-1)
    return [(labels[n], share) for n, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


class Run:
    """What every stage is given, read and checked, and how each one fills its folder."""

    def __init__(self, given: Namespace, settings):
        """ValueError for anything a person got wrong, before a model trains."""
        self.given, self.settings, self.out, self.seed, self.records = given, settings, Path(given.out), given.seed, {}
        self.columns, self.labels = tuple(given.columns.split(",")), tuple(given.labels.split(","))
        if len(self.columns) not in (2, 3) or len({*self.labels}) < 2:
            raise ValueError(f"columns {given.columns}, labels {given.labels}: write one or two texts' columns and the label's, "
                             "and two labels or more, such as --columns text,label --labels no,yes")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out {given.out}: is a file; give a folder")
        self.plan = [name for name in METHODS[settings.method] if name != "augment" or settings.augment]
        self.wanted = given.stages.split(",") if given.stages else self.plan
        for name in set(self.wanted) - {*self.plan}:
            raise ValueError(f"stages: {name!r} is none of this run{did_you_mean(name, self.plan)}; there are "
                             f"{', '.join(self.plan)} (augment with augment=20)")
        for path, opened in ((given.mlm, augment.open_mlm), (given.glove, augment.read_glove)):
            if path and "augment" not in self.plan:
                raise ValueError(f"{path}: --mlm and --glove are for the augmentation; write augment=20, or leave them out")
            opened(path) if path else None  # now, and once more when it is needed: an error is told before anything trains
        for name in given.compare:
            if distill.output_names(model_config(name), self.labels) is None:
                raise ValueError(f"compare {name}: is no classifier with the labels {given.labels}; give one that is")
        pair = given.student, given.student if settings.method == "gold" else given.teacher
        distill.check_two(*pair, settings.length)
        self.layers = layer_map(settings.layer_map, *(model_config(name).num_hidden_layers for name in pair))
        train, self.dev = data.load(given.data, self.columns, self.labels)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed)).tolist()
        self.train = [train[n] for n in order[:settings.rows]]
        self.data = hashlib.sha256(json.dumps([self.train, self.dev]).encode()).hexdigest()
        print(f"{given.data}: {len(self.train):,} of {len(train):,} training rows, {len(self.dev):,} dev rows", flush=True)

    def run(self) -> str:
        """Every stage that is wanted and not there yet; gives the text of the report, nothing where it is not wanted."""
        for name in self.plan[:1 + max(map(self.plan.index, self.wanted))]:
            for number in range(self.given.seeds if name in ("layers", "predictions", "gold") else 1):
                text = self.report() if name == "report" else self.make(name, number)
        return text or ""

    def make(self, name: str, number: int) -> None:
        """A stage's folder, made out of the rows, its seed and settings, the folders before it and the models it is given."""
        given, tag = self.given, f"-{number + 1}" if number else ""
        folder, before = (name if name in ("teacher", "augment", "layers") else "student") + tag, f"layers{tag}"
        source = given.teacher if name == "teacher" else (
            str(self.out / before) if name == "predictions" and before in self.records else given.student)
        models = {"mlm": given.mlm, "glove": given.glove} if name == "augment" else {"model": source}
        self.seed = given.seed + number
        inputs = {"data": self.data, "seed": self.seed, **self.settings.of(name)}
        inputs |= {other: self.records[other]["files"] for other in ("teacher", "augment") if other in self.records}
        inputs |= {key: sums(model) for key, model in models.items() if model}
        make = self.augment if name == "augment" else partial(self.fit, name, source)
        self.records[folder] = stage(self.out / folder, inputs, make if name in self.wanted else None)
        reached = self.records[folder]["figures"].get("dev_accuracy")
        if name == "teacher" and reached < self.settings.min_teacher:
            raise ValueError(f"teacher {given.teacher}: dev accuracy {reached:.1%} is below "
                             f"min_teacher={self.settings.min_teacher}: a student would learn its mistakes. Train it longer "
                             "(teacher_epochs=, teacher_lr=), give another one, or write min_teacher=0")
        if name == "augment":
            self.train = data.read(self.out / folder / "train.tsv", self.columns, self.labels)

    def opened(self, name: str) -> tuple:
        """A classifier, one whose outputs have no names tried both ways, and the dev rows in its ids."""
        model = distill.open_classifier(name, self.seed, DEVICE, labels=self.labels)
        rows = data.Rows(auto_tokenizer(name), self.dev, min(self.settings.length, longest_row(model.config)))
        unnamed = distill.output_names(model_config(name), self.labels) == []
        if unnamed and len(self.labels) == 2 and self.accuracy(model, rows) < 0.5:
            print(f"  {name}: its outputs have no names, and on dev rows LABEL_1 must be {self.labels[0]}: taken so")
            distill.reorder(model, [1, 0])
        return model, rows

    def mean(self, rows: data.Rows, function: Callable) -> float:
        """Of what a function of a batch gives for each row, computed as training computes."""
        return each_row(function, rows, DEVICE, low=True).double().mean().item()

    def accuracy(self, model, rows: data.Rows) -> float:
        """The share of rows that a classifier is right about."""
        return self.mean(rows, lambda batch: distill.logits(model, batch).argmax(-1) == batch.labels)

    def teacher(self) -> Student:
        """OUT/teacher as a classifier in eval mode, without gradients."""
        model = distill.open_classifier(self.out / "teacher", self.seed, DEVICE, half(), self.labels).requires_grad_(False)
        return Student(model, model.config.hidden_size)

    def augment(self, part: Path) -> dict:
        """train.tsv: the training rows, then the new ones under the numbers of their origins, labelled by OUT/teacher."""
        teacher, name, train, given = self.teacher().encoder, str(self.out / "teacher"), self.train, self.given
        origins, new, figures = augment.augmented(train, teacher, name, self.settings, self.seed, given.mlm, given.glove)
        rows = data.Rows(auto_tokenizer(name), [*train, *new], self.settings.length)
        said = each_row(lambda batch: distill.logits(teacher, batch).argmax(-1), rows, DEVICE, low=True).long()
        old, labels = said[:len(train)], said[len(train):]
        pairs = [pair._replace(label=label) for pair, label in zip(new, labels.tolist(), strict=True)]
        numbered = zip([*range(len(train)), *origins], [*train, *pairs], strict=True)
        lines = [(number, *pair[:len(self.columns) - 1], self.labels[pair.label]) for number, pair in numbered]
        write(part / "train.tsv", data.tsv([("index", *self.columns), *lines]))
        return figures | {"rows": len(new), "other_label": (labels != old[origins]).double().mean().item(),
                          "teacher_not_gold": (old != rows.labels[:len(train)]).double().mean().item()}

    def fit(self, stage: str, source: str, part: Path) -> dict:
        """A trained classifier, or a teacher that is one already: the epoch best on dev rows, of layers the last."""
        settings, layered = self.settings, stage == "layers" or (stage, self.settings.method) == ("predictions", "joint")
        model, dev = self.opened(source)
        train = data.Rows(dev.tokenizer, self.train, settings.length)
        known = stage == "teacher" and distill.output_names(model_config(source), self.labels) is not None
        terms = (*TERMS, "soft", "hard") if stage == "predictions" else TERMS
        weights = {term: getattr(settings, term) for term in terms} if layered else {"soft" if terms != TERMS else "hard": 1.0}
        teacher = self.teacher() if layered or "soft" in weights else None
        student = distill.with_projection(model, source, (teacher.encoder if layered else model).config.hidden_size, self.seed)
        if layered:
            check_trace(teacher.encoder)
            print(f"  student layers 1 to {len(self.layers)} imitate the teacher's layers {', '.join(map(str, self.layers))}")
        loss = partial(distill.imitation, weights, teacher, self.layers, settings, student)
        if known:
            print(f"  {source} is a model of these labels already: not trained")
        measure = partial(self.mean, dev, loss) if stage == "layers" else partial(self.accuracy, model, dev)
        curve = [] if known else distill.fit(
            student, loss, train, settings, stage, self.seed, measure, layered, part / "resume.pt")
        model.save_pretrained(part)  # transformers leaves the attention's name out of config.json
        plain(dev.tokenizer).save_pretrained(part)  # with no truncation or padding stored in it
        if stage == "layers" and student.projection is not None:
            save_file(student.projection.state_dict(), part / "projection.safetensors")
        return {"epochs": curve} | ({} if stage == "layers" else {"dev_accuracy": self.accuracy(model, dev)})

    def report(self) -> str:
        """OUT/report.json, report.md and more; measured again where a model or the rows are others than the report's."""
        path, made_of = self.out / "report.json", {"stages": self.records, "compared": [*map(sums, self.given.compare)]}
        found = json.loads(path.read_text()) if path.exists() else {}
        if {key: found.get(key) for key in made_of} == made_of:
            print(f"report: {path} is of these models and rows; skipped")
            return report.text(found)
        print("report: accuracy and speed", flush=True)
        device = (f"{torch.cuda.get_device_name()}, bfloat16 autocast" if DEVICE.type == "cuda" else
                  f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), float32")
        own = {name: f"{name} {Path(getattr(self.given, name.partition('-')[0])).name}" for name in self.records
               if name.startswith(("teacher", "student"))}
        places = {full: str(self.out / name) for name, full in own.items()} | {name: name for name in self.given.compare}
        lines, shares = report.figures({full: self.opened(place) for full, place in places.items()}, own.get("teacher"))
        first = {name: shares[own[name]] for name in ("teacher", "student") if name in own}
        answers = report.answers(self.dev, first, self.labels)
        students = [line["accuracy"] for line in lines if line["model"] in own.values()][-self.given.seeds:]
        found = {"models": lines, **report.errors(answers, [*first]), "students": students, "data": self.given.data,
                 "device": device, "train_rows": len(self.train), "dev_rows": len(self.dev), "seed": self.given.seed,
                 "settings": asdict(self.settings), **made_of}
        wrong = answers[answers.right != " and ".join(first)].reset_index()
        write(self.out / "errors.tsv", data.tsv([wrong.columns, *wrong.itertuples(index=False)]))
        write(self.out / "report.md", report.text(found).encode())
        if importlib.util.find_spec("matplotlib"):  # of the extra `export`
            from finetune.page import page

            write(self.out / "report.html", page(found, answers).encode())
        write(self.out / "student" / "README.md", report.card(found, self.given).encode())
        if (test := Path(self.given.data).expanduser() / "test.tsv").is_file():  # for GLUE's server
            said = predict(str(self.out / "student"), data.read(test, self.columns[:-1], ()), self.settings.length)
            write(self.out / "QNLI.tsv", data.tsv([("index", "prediction"), *((n, label) for n, (label, _) in enumerate(said))]))
        write_json(path, found)
        return report.text(found)
