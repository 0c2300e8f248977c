"""From a teacher and a general student to a QNLI model: teacher, layers, student, report."""

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
    train: list[data.Pair]
    dev: list[data.Pair]
    device: torch.device

    def inputs(self, name: str, **more) -> dict:
        """What the output of a stage depends on."""
        return {"data": data.fingerprint(self.train, self.dev), "seed": self.seed, **self.settings.of(name), **more}

    def rows(self, tokenizer) -> tuple[data.Rows, data.Rows]:
        return tuple(data.tokenize(tokenizer, pairs, self.settings.length) for pairs in (self.train, self.dev))

    def classifier(self, name: str | Path, purpose: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        return models.open_classifier(str(name), models.seed_of(self.seed, purpose, "head"), dtype).to(self.device)

    def fit(self, stage: str, model: nn.Module, loss: Loss, rows: data.Rows, measure, **more) -> list[dict]:
        return fit(model, loss, rows, self.settings, stage, self.seed, measure, **more)


def _by_gold(run: Run, stage: str, source: str, part: Path, epochs: int | None = None) -> dict:
    """Fine-tune a model on the labels of the data; the best epoch on dev rows is kept."""
    tokenizer = auto_tokenizer(source)
    train, dev = run.rows(tokenizer)
    model = run.classifier(source, stage).eval()
    if models.output_names(model_config(source)) == models.UNNAMED and accuracy(model, dev) < 0.5:
        print("  its outputs have no names, and on dev rows LABEL_1 must be entailment: taken so")
        models.reorder(model, [1, 0])
    curve = run.fit(stage, model, gold_loss(model), train, lambda: {"dev_accuracy": accuracy(model, dev)},
                    epochs=epochs, best="dev_accuracy")
    models.save(model, tokenizer, part)
    return {"dev_accuracy": accuracy(model, dev), "epochs": curve}


def teacher_stage(run: Run) -> dict:
    """OUT/teacher: the teacher fine-tuned, or the given QNLI model.  ValueError where it knows too little."""
    def make(part: Path) -> dict:
        known = models.output_names(model_config(run.teacher)) is not None
        if known:
            print(f"  {run.teacher} is a QNLI model already: not trained", flush=True)
        return _by_gold(run, "teacher", run.teacher, part, epochs=0 if known else None)

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
        torch.manual_seed(models.seed_of(run.seed, "layers", "projection"))
        student = Student(model.base_model, teacher_width)
    if student.projection is not None:
        found = models.take_projection(run.student, student.projection)
        print(f"  projection {model.config.hidden_size} -> {teacher_width}: "
              f"{'from general distillation' if found else 'new, drawn from the seed'}")
    return student.to(run.device)


def layers_stage(run: Run, teacher: dict) -> dict:
    """OUT/layers: the student's encoder after imitating the fine-tuned teacher's layers on the task's rows."""
    def make(part: Path) -> dict:
        tokenizer = auto_tokenizer(run.student)
        train, dev = run.rows(tokenizer)
        master = load_teacher(str(run.out / "teacher"), half(run.device), run.device)
        model = run.classifier(run.student, "layers")
        student = _student(run, model, master.config.hidden_size)
        layers = layer_map(run.settings.layer_map, model.config.num_hidden_layers, master.config.num_hidden_layers)
        print(f"  student layers 1 to {len(layers)} imitate the teacher's layers {', '.join(map(str, layers))}")
        loss = layer_loss(student.eval(), master, layers, run.settings.weights)
        before = mean_loss(loss, dev, run.device)
        curve = run.fit("layers", student, loss, train, lambda: {"dev_loss": mean_loss(loss, dev, run.device)})
        models.save(model, tokenizer, part)
        if student.projection is not None:
            save_file(student.projection.state_dict(), part / "projection.safetensors")
        return {"dev_loss_before": before, "epochs": curve}

    after = {"teacher": teacher["files"], "model": models.identity(run.student)}
    return stage(run.out / "layers", run.inputs("layers", **after), make)


def predictions_stage(run: Run, teacher: dict, layers: dict) -> dict:
    """OUT/student: the encoder of OUT/layers with a head, after imitating the teacher's predictions."""
    def make(part: Path) -> dict:
        tokenizer = auto_tokenizer(str(run.out / "layers"))
        train, dev = run.rows(tokenizer)
        master = run.classifier(run.out / "teacher", "teacher", half(run.device)).eval().requires_grad_(False)
        model = run.classifier(run.out / "layers", "predictions")
        loss = prediction_loss(model, master, run.settings.temperature)
        curve = run.fit("predictions", model, loss, train, lambda: {"dev_accuracy": accuracy(model, dev)},
                        best="dev_accuracy")
        models.save(model, tokenizer, part)
        return {"dev_accuracy": accuracy(model, dev), "epochs": curve}

    after = {"teacher": teacher["files"], "layers": layers["files"]}
    return stage(run.out / "student", run.inputs("predictions", **after), make)


def report_stage(run: Run, records: dict[str, dict]) -> str:
    """OUT/report.json and report.md; measured again where a model or the rows are others than the report's."""
    names = {name: f"{name} {Path(getattr(run, name)).name}" for name in ("teacher", "student") if name in records}
    key = {"dev": data.fingerprint(run.dev), "models": {name: records[name]["files"] for name in names}}
    if (text := report.written(run.out, key)) is not None:
        print(f"report: {run.out / 'report.json'} is of these models and rows; skipped")
        return text
    print("report: accuracy and speed", flush=True)
    opened = {full: run.classifier(run.out / name, "report").eval() for name, full in names.items()}
    dev = data.tokenize(auto_tokenizer(str(run.out / "student")), run.dev, run.settings.length)
    return report.write(run.out, {
        "models": report.figures(opened, dev, names.get("teacher")), "data": run.source, "seed": run.seed,
        "train_rows": len(run.train), "dev_rows": len(run.dev),
        "settings": asdict(run.settings), "device": report.device_line(run.device),
        "stages": {name: {"seconds": r["seconds"], **r["figures"]} for name, r in records.items()}, "made_from": key})


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
        return report_stage(run, {"student": stage(out / "student", inputs, partial(_by_gold, run, "gold", student))})
    records = {"teacher": teacher_stage(run)}
    records["layers"] = layers_stage(run, records["teacher"])
    records["student"] = predictions_stage(run, records["teacher"], records["layers"])
    return report_stage(run, records)
