"""From a teacher and a general student to a QNLI model: the folders teacher, layers and student, then the report."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from finetune import augment, data, distill, report
from finetune.qnli import METHODS, Settings
from pretrain.checkpoint import differences
from pretrain.encoder import check_family, longest_row, model_config
from pretrain.engine import join
from pretrain.objective import TERMS, layer_map
from pretrain.ranks import Ranks
from pretrain.recipe import did_you_mean
from pretrain.student import Student
from shards.block import write, write_json
from shards.tokenizer import auto_tokenizer, fingerprint, plain

STATE = "training.pt"  # in a part folder, while its model is trained
OURS = ("stage.json", STATE, "README.md")  # beside a model


def sums(name: str | Path) -> str:
    """What tells two models apart: a sha256 over all files of a folder but OURS; a hub name stands for itself."""
    files = sorted(path for path in [Path(name), *Path(name).glob("*")] if path.is_file() and path.name not in OURS)
    found = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] if files else str(name)


@cache
def met() -> Ranks:
    """This process among those that a launcher started, one for each GPU of the node; all but the first are silent."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"), None)
    if (ranks := join(timeout=86_400)).rank:  # a day: they wait for the first one where it measures alone
        sys.stdout = open(os.devnull, "w")
    return ranks


def stage(folder: Path, inputs: dict, make: Callable[[Path], dict] | None) -> dict:
    """A folder's stage.json; one that is not there, whole and of these inputs is filled by all ranks' `make(part)`, if given."""
    why, record = "a file is missing or changed" if folder.exists() else "it is not there", folder / "stage.json"
    found = json.loads(record.read_text()) if record.exists() else {}
    was = {name: vars(Settings()).get(name) for name in inputs} | found.get("inputs", {})  # a newer setting had its default
    if found and found["files"] == sums(folder) and not (why := differences(was, inputs)):
        print(f"{folder.name}: {folder} is there, whole and from the same inputs; skipped", flush=True)
        return found
    if not make:
        raise ValueError(f"stages: {folder} cannot be used ({why}); name its stage too, or leave --stages out")
    print(f"{folder.name}: makes {folder}{f', again ({why})' if folder.exists() else ''}", flush=True)
    part = folder.with_name(f"{folder.name}.{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:8]}.part")
    if met().rank == 0:
        part.mkdir(parents=True, exist_ok=True)
        for left in {*folder.parent.glob(f"{folder.name}.*.part"), *part.glob("*.part")} - {part}:  # of runs that were killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    met().agree(None)  # all have looked before the first one writes
    try:
        figures = make(part)
    except ValueError:  # what was made is refused; a killed run, or one with a full disk, goes on from its STATE
        if met().rank == 0:
            shutil.rmtree(part)
        raise
    met().agree(None)  # all have read STATE before it goes
    if met().rank == 0:
        (part / STATE).unlink(missing_ok=True)
        write_json(part / "stage.json", {"inputs": inputs, "figures": figures, "files": sums(part)})
        if folder.exists():  # nothing is deleted
            free = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.{n}").exists())
            print(f"  the old one is now {folder.rename(folder.with_name(f'{folder.name}.{free}'))}")
        part.rename(folder)
    met().agree(None)
    return json.loads(record.read_text())


def several(given, settings) -> str:
    """Every stage for given.seeds seeds from given.seed on, each in OUT/seed-S; OUT/seeds.md gets what all of them reached."""
    runs = met().together(lambda: [Run(type(given)(**vars(given) | {"seed": seed, "out": f"{given.out}/seed-{seed}"}), settings)
                                   for seed in range(given.seed, given.seed + given.seeds)])
    for run in runs:
        print(run.run(), flush=True)
    if "report" not in run.wanted:
        return "done"
    text = report.spread([json.loads((run.out / "report.json").read_text()) for run in runs])
    write(Path(given.out) / "seeds.md", text.encode())
    return text


class Run:
    """What every stage is given, read and checked before a model trains, and how each one fills its folder."""

    def __init__(self, given, settings):
        self.given, self.settings, self.out, self.seed, self.records = given, settings, Path(given.out), given.seed, {}
        self.columns, self.labels = tuple(given.columns.split(",")), tuple(given.labels.split(","))
        if len(self.columns) not in (2, 3) or len({*self.labels}) < 2:
            raise ValueError(f"columns {given.columns}, labels {given.labels}: write one or two texts' columns and the label's, "
                             "and two labels or more, such as --columns text,label --labels no,yes")
        if self.out.is_file():
            raise ValueError(f"out {given.out}: is a file; give a folder")
        self.plan = [name for name in METHODS[settings.method] if name != "augment" or settings.augment]
        self.wanted = given.stages.split(",") if given.stages else self.plan
        for name in set(self.wanted) - {*self.plan}:
            raise ValueError(f"stages: {name!r} is none of this run{did_you_mean(name, self.plan)}; there are "
                             f"{', '.join(self.plan)} (augment with augment=20)")
        for name, read in {"mlm": augment.open_mlm, "glove": augment.read_glove}.items():
            if (words := getattr(given, name)) and "augment" not in self.plan:
                raise ValueError(f"{name} {words}: is for the augmentation; write augment=20, or leave it out")
            if words:
                read(words)  # now, and once more when it is needed: an error is told before anything trains
        for name in given.compare:
            if distill.output_names(model_config(name), self.labels) is None:
                raise ValueError(f"compare {name}: is no classifier with the labels {given.labels}; give one that is")
        student, teacher = given.student, given.student if settings.method == "gold" else given.teacher
        s, t = model_config(student), model_config(teacher)
        for name, config in ((student, s), (teacher, t)):
            check_family(name, config)
        if t.num_attention_heads != s.num_attention_heads:
            raise ValueError(f"teacher {teacher} has {t.num_attention_heads} attention heads, student {student} has "
                             f"{s.num_attention_heads}: their scores cannot be compared; give models with as many heads")
        if fingerprint(auto_tokenizer(teacher)) != fingerprint(auto_tokenizer(student)):
            raise ValueError(f"teacher {teacher} and student {student} have different vocabularies; give a student made "
                             "with this teacher's tokenizer, or the teacher it was made from")
        if settings.length > (longest := min(longest_row(t), longest_row(s))):
            raise ValueError(f"length={settings.length}: these models read at most {longest} tokens; write length={longest}")
        self.layers = layer_map(settings.layer_map, s.num_hidden_layers, t.num_hidden_layers)
        self.train, self.dev, self.data = data.load(given.data, self.columns, self.labels, self.seed, settings.rows)
        self.open = partial(distill.open_classifier, seed=self.seed, device=met().device, labels=self.labels)

    def run(self) -> str:
        """Every stage that is wanted and not there yet; gives what a person should see in the end."""
        for name in self.plan[:1 + max(map(self.plan.index, self.wanted))]:
            text = met().first(self.report) if name == "report" else self.make(name)
        return f"\n{text}\n\nThe student is {self.out / 'student'}; transformers opens it by that name." if text else "done"

    def make(self, name: str) -> None:
        """A stage's folder, made out of the rows, the seed, its settings, the folders before it and the models it is given."""
        given, folder = self.given, name if name in ("teacher", "augment", "layers") else "student"
        models = {"teacher": {"model": given.teacher}, "augment": {"mlm": given.mlm, "glove": given.glove}}
        inputs = {"data": self.data, "seed": self.seed, **self.settings.of(name)}
        inputs |= {other: record["files"] for other, record in self.records.items()}
        inputs |= {key: sums(model) for key, model in models.get(name, {"model": given.student}).items() if model}
        make = (lambda part: met().first(partial(self.augment, part))) if name == "augment" else partial(self.fit, name)
        self.records[folder] = record = stage(self.out / folder, inputs, make if name in self.wanted else None)
        if name == "teacher" and (reached := record["figures"]["dev_accuracy"]) < (least := self.settings.min_teacher):
            raise ValueError(f"teacher {given.teacher}: dev accuracy {reached:.1%} is below min_teacher={least}: a student "
                             "would learn its mistakes; change teacher_epochs= or teacher_lr=, or write min_teacher=0")
        if name == "augment":
            self.train = data.read(self.out / folder / "train.tsv", self.columns, self.labels)

    def opened(self, name: str) -> tuple:
        """A classifier, one whose outputs have no names tried both ways, and the dev rows in its ids."""
        model = self.open(name)
        rows = data.Rows(auto_tokenizer(name), self.dev, min(self.settings.length, longest_row(model.config)))
        names = distill.output_names(model_config(name), self.labels)
        if names == [] and len(self.labels) == 2 and distill.judged(model, rows) < 0.5:
            print(f"  {name}: its outputs have no names, and on dev rows LABEL_1 must be {self.labels[0]}: taken so")
            model = self.open(name, swap=True)
        return model, rows

    def augment(self, part: Path) -> dict:
        """train.tsv: the training rows, then the new ones under the numbers of their origins, labelled by OUT/teacher."""
        teacher, given, count = self.open(self.out / "teacher"), self.given, len(self.train)
        origins, new, figures = augment.augmented(self.train, teacher, self.settings, self.seed, given.mlm, given.glove)
        rows = data.Rows(auto_tokenizer(teacher.name_or_path), [*self.train, *new], self.settings.length)
        said = distill.each_row(lambda batch: distill.logits(teacher, batch).argmax(-1), rows, teacher.device, low=True).long()
        labels = [*rows.labels[:count], *said[count:]]
        lines = [(number, *pair[:len(self.columns) - 1], self.labels[label])
                 for number, pair, label in zip((*range(count), *origins), (*self.train, *new), labels, strict=True)]
        write(part / "train.tsv", data.tsv([("index", *self.columns), *lines]))
        return figures | {"rows": len(new), "other_label": (said[count:] != said[origins]).double().mean().item(),
                          "teacher_not_gold": (said != rows.labels)[:count].double().mean().item()}

    def fit(self, stage: str, part: Path) -> dict:
        """A trained classifier, or a teacher that is one already: the epoch best on dev rows, of layers the last."""
        settings, layered = self.settings, stage == "layers" or (stage, self.settings.method) == ("predictions", "joint")
        source = str(self.given.teacher if stage == "teacher" else
                     self.out / "layers" if "layers" in self.records else self.given.student)
        model, dev = self.opened(source)
        known = stage == "teacher" and distill.output_names(model_config(source), self.labels) is not None
        terms = (*TERMS, "soft", "hard") if stage == "predictions" else TERMS
        weights = {term: getattr(settings, term) for term in terms} if layered else {"soft" if terms != TERMS else "hard": 1.0}
        its = self.open(self.out / "teacher") if layered or "soft" in weights else None
        student = distill.with_projection(model, source, (its if layered else model).config.hidden_size, self.seed)
        loss = partial(distill.imitation, weights, its and Student(its, its.config.hidden_size), self.layers, settings, student)
        measure = partial(met().first, partial(distill.judged, model, dev, loss if stage == "layers" else None))
        curve = [] if known else distill.fit(student, loss, data.Rows(dev.tokenizer, self.train, settings.length), settings,
                                             stage, self.seed, measure, part / STATE, layered, met().rank, met().world)
        if met().rank == 0:
            model.save_pretrained(part)  # transformers leaves the attention's name out of config.json
            plain(dev.tokenizer).save_pretrained(part)  # with no truncation or padding stored in it
            if stage == "layers" and (projection := student.projection.state_dict()):
                save_file(projection, part / "projection.safetensors")
        return {"epochs": curve} | ({} if stage == "layers" else {"dev_accuracy": measure()})

    def report(self) -> str:
        """OUT/report.html, report.md, report.json and errors.tsv; measured again where models or rows are not the report's."""
        path, made_of = self.out / "report.json", {"stages": self.records, "compared": [*map(sums, self.given.compare)]}
        found = json.loads(path.read_text()) if path.exists() else {}
        if {key: found.get(key) for key in made_of} == made_of and "confusion" in found:  # older versions wrote none
            print(f"report: {path} is of these models and rows; skipped")
            return report.text(found).partition("\n\n## ")[0]
        print("report: accuracy and speed", flush=True)
        device = (f"{torch.cuda.get_device_name()}, bfloat16 autocast" if met().device.type == "cuda" else
                  f"CPU, {torch.get_num_threads()} thread(s), float32")
        own = {name: f"{name} {Path(getattr(self.given, name)).name}" for name in ("teacher", "student") if name in self.records}
        places = {full: str(self.out / name) for name, full in own.items()} | {Path(n).name: n for n in self.given.compare}
        lines, shares = report.figures({full: self.opened(place) for full, place in places.items()}, own.get("teacher"))
        answers, counted = report.answers(self.dev, {name: shares[full] for name, full in own.items()}, self.labels)
        found = {"models": lines, **counted, "data": self.given.data, "device": device,
                 "train_rows": len(self.train), "dev_rows": len(self.dev), "seed": self.seed, "settings": vars(self.settings),
                 "given": vars(self.given), **made_of}
        wrong = answers[answers.right != " and ".join(own)].reset_index()
        write(self.out / "errors.tsv", data.tsv([wrong.columns, *wrong.itertuples(index=False)]))
        return report.save(self.out, found)
