"""From a teacher and a general student to a QNLI model: teacher, layers, student, report."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from finetune import data, models, report
from finetune.distill import Loss, fit, gold_loss, half, layer_loss, prediction_loss
from finetune.score import accuracy, mean_loss
from finetune.settings import Settings
from finetune.stage import stage
from pretrain.encoder import Student, load_teacher, model_config
from pretrain.objective import TERMS, layer_map
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
    train: list[data.Pair]
    dev: list[data.Pair]
    device: torch.device

    def inputs(self, stage: str, **more) -> dict:
        """What the output of a stage depends on."""
        return {"data": data.fingerprint(self.train, self.dev), "seed": self.seed, **self.settings.of(stage), **more}

    def rows(self, tokenizer) -> tuple[data.Rows, data.Rows]:
        return tuple(data.tokenize(tokenizer, pairs, self.settings.length) for pairs in (self.train, self.dev))

    def classifier(self, name: str | Path, purpose: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """In eval mode; new weights from (seed, purpose)."""
        return models.open_classifier(str(name), models.seed_of(self.seed, purpose), dtype).to(self.device).eval()


def _train(run: Run, stage: str, source: str, loss_of: Callable[[nn.Module], Loss], part: Path, **more) -> dict:
    """Train a classifier by a loss and save it; the epoch that is best on dev rows is kept."""
    tokenizer = auto_tokenizer(source)
    train, dev = run.rows(tokenizer)
    model = run.classifier(source, stage)
    if models.output_names(model_config(source)) == models.UNNAMED and accuracy(model, dev) < 0.5:
        print("  its outputs have no names, and on dev rows LABEL_1 must be entailment: taken so")
        models.reorder(model, [1, 0])
    curve = fit(model, loss_of(model), train, run.settings, stage, run.seed,
                lambda: {"dev_accuracy": accuracy(model, dev)}, best="dev_accuracy", **more)
    models.save(model, tokenizer, part)
    return {"dev_accuracy": accuracy(model, dev), "epochs": curve}


def teacher_stage(run: Run) -> dict:
    """OUT/teacher: the teacher fine-tuned, or the given QNLI model.  ValueError where it knows too little."""
    given = models.output_names(model_config(run.teacher)) is not None
    if given:
        print(f"{run.teacher} is a QNLI model already: not trained")
    make = partial(_train, run, "teacher", run.teacher, gold_loss, epochs=0 if given else run.settings.teacher_epochs)
    record = stage(run.out / "teacher", run.inputs("teacher", model=models.identity(run.teacher)), make)
    reached = record["figures"]["dev_accuracy"]
    if reached < run.settings.min_teacher:
        raise ValueError(f"teacher {run.teacher}: dev accuracy {reached:.1%} is below min_teacher="
                         f"{run.settings.min_teacher}: a student would learn its mistakes. Train it longer "
                         "(teacher_epochs=, teacher_lr=), give another one, or write min_teacher=0")
    return record


def _student(run: Run, model: nn.Module, teacher_width: int) -> Student:
    """The classifier's encoder, and the projection of its general distillation where it fits, else a drawn one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(models.seed_of(run.seed, "projection"))
        student = Student(model.base_model, teacher_width)
    if student.projection is not None:
        found = models.take_projection(run.student, student.projection)
        print(f"  projection {model.config.hidden_size} -> {teacher_width}: "
              f"{'from general distillation' if found else 'new, drawn from the seed'}")
    return student.to(run.device).eval()


def _imitate(run: Run, part: Path) -> dict:
    """Train the student's encoder, and a projection where the widths differ, to compute what OUT/teacher computes."""
    tokenizer = auto_tokenizer(run.student)
    train, dev = run.rows(tokenizer)
    teacher = load_teacher(str(run.out / "teacher"), half(run.device), run.device)
    model = run.classifier(run.student, "layers")
    student = _student(run, model, teacher.config.hidden_size)
    layers = layer_map(run.settings.layer_map, model.config.num_hidden_layers, teacher.config.num_hidden_layers)
    print(f"  student layers 1 to {len(layers)} imitate the teacher's layers {', '.join(map(str, layers))}")
    loss = layer_loss(student, teacher, layers, {term: getattr(run.settings, term) for term in TERMS})
    before = mean_loss(loss, dev, run.device)
    curve = fit(student, loss, train, run.settings, "layers", run.seed,
                lambda: {"dev_loss": mean_loss(loss, dev, run.device)})
    models.save(model, tokenizer, part)
    if student.projection is not None:
        save_file(student.projection.state_dict(), part / "projection.safetensors")
    return {"dev_loss_before": before, "epochs": curve}


def student_stages(run: Run, teacher: dict) -> dict[str, dict]:
    """OUT/layers: the student's encoder, imitating the teacher's.  OUT/student: with a head, imitating its answers."""
    inputs = run.inputs("layers", teacher=teacher["files"], model=models.identity(run.student))
    layers = stage(run.out / "layers", inputs, partial(_imitate, run))

    def make(part: Path) -> dict:
        wanted = run.classifier(run.out / "teacher", "teacher", half(run.device)).requires_grad_(False)
        return _train(run, "predictions", str(run.out / "layers"),
                      lambda model: prediction_loss(model, wanted, run.settings.temperature), part)

    inputs = run.inputs("predictions", teacher=teacher["files"], layers=layers["files"])
    return {"layers": layers, "student": stage(run.out / "student", inputs, make)}


def report_stage(run: Run, records: dict[str, dict]) -> str:
    """OUT/report.json and report.md; measured again where a model or the rows are others than the report's."""
    names = {name: f"{name} {Path(getattr(run, name)).name}" for name in ("teacher", "student") if name in records}
    key = {"dev": data.fingerprint(run.dev), "models": {name: records[name]["files"] for name in names}}
    found = report.read(run.out)
    if found.get("made_from") == key:
        print(f"report: {run.out / 'report.json'} is of these models and rows; skipped")
        return report.text(found)
    print("report: accuracy and speed", flush=True)
    opened = {full: run.classifier(run.out / name, "report") for name, full in names.items()}
    dev = data.tokenize(auto_tokenizer(str(run.out / "student")), run.dev, run.settings.length)
    return report.write(run.out, {
        "models": report.figures(opened, dev, names.get("teacher")), "data": run.source, "train_rows": len(run.train),
        "dev_rows": len(run.dev), "seed": run.seed, "settings": asdict(run.settings), "made_from": key,
        "device": report.device_line(run.device),
        "stages": {name: {"seconds": r["seconds"], **r["figures"]} for name, r in records.items()}})


def run_all(teacher: str, student: str, source: str, out: Path, settings: Settings, seed: int) -> str:
    """Every stage that is not there yet; gives the text of the report.  ValueError for anything a person got wrong."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out {out}: is a file; give a folder")
    gold = settings.method == "gold"
    models.check_two(student if gold else teacher, student, settings.length)
    if not gold:  # said before the teacher trains
        layer_map(settings.layer_map, model_config(student).num_hidden_layers, model_config(teacher).num_hidden_layers)
    train, dev = data.load(source, seed)
    run = Run(teacher, student, source, out, settings, seed, data.drawn(train, settings.rows, seed), dev,
              torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"{source}: {len(run.train):,} of {len(train):,} training rows, {len(dev):,} dev rows", flush=True)
    if gold:
        inputs = run.inputs("gold", model=models.identity(student))
        records = {"student": stage(out / "student", inputs, partial(_train, run, "gold", student, gold_loss))}
    else:
        records = {"teacher": teacher_stage(run)}
        records |= student_stages(run, records["teacher"])
    return report_stage(run, records)
