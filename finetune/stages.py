"""From a teacher and a general student to a QNLI model: teacher, layers, student, report."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from finetune import data, report
from finetune.distill import Training, fit, gold_loss, half, layer_loss, prediction_loss
from finetune.models import (check_two, given_projection, label_order, open_classifier, reorder, save, seed_of, unnamed,
                             weights_of)
from finetune.score import accuracy, mean_loss, score, speeds
from finetune.settings import Settings
from finetune.stage import stage
from pretrain.encoder import Student, load_teacher, model_config
from pretrain.objective import layer_map
from shards.tokenizer import auto_tokenizer


@dataclass(frozen=True)
class Run:
    """What every stage is given."""

    teacher: str
    student: str
    source: str  # of the rows, as it was given
    out: Path
    settings: Settings
    seed: int
    train: data.Pairs
    dev: data.Pairs
    device: torch.device

    def inputs(self, name: str, **more) -> dict:
        """What the output of a stage depends on."""
        return {"data": data.fingerprint(self.train, self.dev), "seed": self.seed, **self.settings.of(name), **more}

    def rows(self, tokenizer) -> tuple[data.Rows, data.Rows]:
        return tuple(data.tokenize(tokenizer, pairs, self.settings.length) for pairs in (self.train, self.dev))

    def training(self, name: str, **more) -> Training:
        s = self.settings
        return Training(name=name, epochs=getattr(s, f"{name}_epochs"), lr=getattr(s, f"{name}_lr"), batch=s.batch,
                        warmup=s.warmup, weight_decay=s.weight_decay, clip=s.clip, seed=self.seed, **more)


def _by_gold(run: Run, name: str, source: str, part: Path) -> dict:
    """Fine-tune a model on the labels of the data."""
    tokenizer = auto_tokenizer(source)
    train, dev = run.rows(tokenizer)
    model = open_classifier(source, seed_of(run.seed, name, "head")).to(run.device)
    curve = fit(model, gold_loss(model), train, run.training(name), lambda: {"dev_accuracy": accuracy(model, dev)},
                best="dev_accuracy")
    save(model, tokenizer, part)
    return {"dev_accuracy": accuracy(model, dev), "epochs": curve}


def _given_teacher(run: Run, part: Path) -> dict:
    """A teacher that knows QNLI already: its outputs in our order, its accuracy on our dev rows."""
    tokenizer = auto_tokenizer(run.teacher)
    _, dev = run.rows(tokenizer)
    model = open_classifier(run.teacher, seed_of(run.seed, "teacher", "head")).to(run.device).eval()
    reached = accuracy(model, dev)
    if unnamed(model_config(run.teacher)) and reached < 0.5:
        print(f"  its labels have no names; LABEL_1 is entailment (dev accuracy {1 - reached:.1%}, else {reached:.1%})")
        reorder(model, [1, 0])
        reached = accuracy(model, dev)
    save(model, tokenizer, part)
    return {"dev_accuracy": reached, "epochs": []}


def teacher_stage(run: Run) -> dict:
    """OUT/teacher: the teacher fine-tuned, or the given QNLI model.  ValueError where it knows too little."""
    order = label_order(model_config(run.teacher))

    def make(part: Path) -> dict:
        if order is None:
            return _by_gold(run, "teacher", run.teacher, part)
        print(f"  {run.teacher} is a QNLI model already: taken as it is")
        return _given_teacher(run, part)

    record = stage(run.out / "teacher", run.inputs("teacher", model=weights_of(run.teacher)), make)
    reached = record["figures"]["dev_accuracy"]
    if reached < run.settings.min_teacher:
        raise ValueError(f"teacher {run.teacher}: dev accuracy {reached:.1%}, below min_teacher={run.settings.min_teacher}; "
                         "a student would learn its mistakes. Train it longer (teacher_epochs=, teacher_lr=), give another "
                         "one, or write min_teacher=0")
    return record


def layers_stage(run: Run, teacher: dict) -> dict:
    """OUT/layers: the student's encoder after imitating the fine-tuned teacher's layers on the task's rows."""
    def make(part: Path) -> dict:
        tokenizer = auto_tokenizer(run.student)
        train, dev = run.rows(tokenizer)
        master = load_teacher(str(run.out / "teacher"), half(run.device), run.device)
        model = open_classifier(run.student, seed_of(run.seed, "layers", "head"))
        student = _student(run, model, master.config.hidden_size)
        s = run.settings
        layers = layer_map(s.layer_map, model.config.num_hidden_layers, master.config.num_hidden_layers)
        print(f"  student layers 1 to {len(layers)} imitate the teacher's layers {', '.join(map(str, layers))}")
        weights = {"embedding": s.embedding, "hidden": s.hidden, "attention": s.attention}
        loss = layer_loss(student, master, layers, weights)
        before = mean_loss(loss, dev, run.device)
        curve = fit(student, loss, train, run.training("layers", constant=True, dropout=False),
                    lambda: {"dev_loss": mean_loss(loss, dev, run.device)})
        save(model, tokenizer, part)
        if student.projection is not None:
            save_file(student.projection.state_dict(), part / "projection.safetensors")
        return {"dev_loss_before": before, "epochs": curve}

    after = {"teacher": teacher["files"], "model": weights_of(run.student)}
    return stage(run.out / "layers", run.inputs("layers", **after), make)


def _student(run: Run, model: nn.Module, teacher_width: int) -> Student:
    """The classifier's encoder, and the projection of its general distillation where it fits, else a drawn one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(run.seed, "layers", "projection"))
        student = Student(model.base_model, teacher_width)
    if student.projection is not None:
        found = given_projection(run.student, student.projection)
        print(f"  projection {model.config.hidden_size} -> {teacher_width}: "
              f"{'from general distillation' if found else 'new, drawn from the seed'}")
    return student.to(run.device)


def student_stage(run: Run, teacher: dict | None, layers: dict | None) -> dict:
    """OUT/student: from OUT/layers by the teacher's predictions, or (no layers) from the student by gold labels."""
    def make(part: Path) -> dict:
        if layers is None:
            return _by_gold(run, "gold", run.student, part)
        tokenizer = auto_tokenizer(str(run.out / "layers"))
        train, dev = run.rows(tokenizer)
        master = open_classifier(str(run.out / "teacher"), run.seed, half(run.device)).to(run.device).eval()
        model = open_classifier(str(run.out / "layers"), run.seed).to(run.device)
        loss = prediction_loss(model, master.requires_grad_(False), run.settings.temperature)
        curve = fit(model, loss, train, run.training("predictions"), lambda: {"dev_accuracy": accuracy(model, dev)},
                    best="dev_accuracy")
        save(model, tokenizer, part)
        return {"dev_accuracy": accuracy(model, dev), "epochs": curve}

    name = "gold" if layers is None else "predictions"
    after = {"model": weights_of(run.student)} if layers is None else {"teacher": teacher["files"], "layers": layers["files"]}
    return stage(run.out / "student", run.inputs(name, method=run.settings.method, **after), make)


def report_stage(run: Run, records: dict[str, dict]) -> str:
    """OUT/report.json and report.md; measured again where a model or the rows are others than the report's."""
    key = {"dev": data.fingerprint(run.dev), **{n: r["files"] for n, r in records.items() if n != "layers"}}
    path = run.out / "report.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("made_from") == key:
        print(f"report: {path} is of these models; skipped")
        return (run.out / "report.md").read_text(encoding="utf-8")
    print("report: accuracy and speed")
    names = {name: f"{name} {Path(getattr(run, name)).name}" for name in ("teacher", "student") if name in records}
    models = {full: open_classifier(str(run.out / name), run.seed).to(run.device).eval() for name, full in names.items()}
    dev = data.tokenize(auto_tokenizer(str(run.out / "student")), run.dev, run.settings.length)
    found = report.lines({full: score(model, dev) for full, model in models.items()},
                         speeds(models, dev, report.SPEED_BATCH), names.get("teacher"))
    return report.write(run.out, {
        "models": found, "data": run.source, "train_rows": len(run.train), "dev_rows": len(run.dev), "seed": run.seed,
        "settings": asdict(run.settings), "device": report.device_line(run.device),
        "stages": {name: {"seconds": r["seconds"], **r["figures"]} for name, r in records.items()}, "made_from": key})


def run_all(teacher: str, student: str, source: str, out: Path, settings: Settings, seed: int) -> str:
    """Every stage that is not there yet; gives the text of the report.  ValueError for anything a person got wrong."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out {out}: is a file; give a folder")
    gold = settings.method == "gold"
    check_two(student if gold else teacher, student, settings.length)
    train, dev = data.load(source, seed)
    run = Run(teacher, student, source, out, settings, seed, train.drawn(settings.rows, seed), dev,
              torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"{source}: {len(run.train):,} training rows of {len(train):,}, {len(dev):,} dev rows; {run.device}", flush=True)
    records = {}
    if not gold:
        layer_map(settings.layer_map, model_config(student).num_hidden_layers, model_config(teacher).num_hidden_layers)
        records["teacher"] = teacher_stage(run)
        records["layers"] = layers_stage(run, records["teacher"])
    records["student"] = student_stage(run, records.get("teacher"), records.get("layers"))
    return report_stage(run, records)
