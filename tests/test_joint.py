"""All that a student is taught at once (method=joint): the sum against its parts, one pass of each model, the run."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_finetune import CPU, imitation, made_up_pairs, rows_of, save_model, save_place
from test_qnli import run

from finetune import distill, qnli
from finetune.qnli import JOINT, Settings
from pretrain.student import Student
from pretrain.objective import TERMS, distil, weighted

SETTINGS = Settings(**JOINT)
WEIGHTS = {name: getattr(SETTINGS, name) for name in (*TERMS, "soft", "hard")}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_folder):
    """A teacher, a narrower student and 40 + 20 rows."""
    return save_place(tmp_path_factory.mktemp("joint"), tokenizer_folder)


@pytest.fixture(scope="module")
def pair(place):
    """A teacher and a student of its width, as classifiers; five rows."""
    teacher, student = (distill.open_classifier(place / "teacher", seed, CPU) for seed in (0, 1))
    with torch.no_grad():  # hidden states that differ by more than rounding
        for parameter in student.parameters():
            parameter.mul_(1.1)
    return teacher, student, rows_of(place / "teacher", made_up_pairs(5, 3)).batch(list(range(5)))


def test_the_weights_are_those_asked_for():
    assert WEIGHTS == {"embedding": 0.3, "hidden": 0.3, "attention": 0.5, "soft": 0.2, "hard": 0.1}
    assert (SETTINGS.temperature, SETTINGS.predictions_lr, SETTINGS.predictions_epochs) == (2.0, 3e-5, 3)
    assert (SETTINGS.batch, SETTINGS.length) == (32, 128)


def test_the_joint_loss_is_the_weighted_sum_of_its_parts(pair):
    teacher, student, batch = pair
    real = batch.attention_mask.bool()
    with torch.no_grad():
        s, t = (Student(model, 24)(batch.input_ids, batch.token_type_ids, real) for model in (student, teacher))
        layers = weighted(distil(s, t, real, [1, 2, 3]), {term: WEIGHTS[term] for term in TERMS}).double()
        s_BC, t_BC = (distill.logits(model, batch).double() for model in (student, teacher))
        joint = imitation(student, batch, WEIGHTS, teacher, [1, 2, 3], SETTINGS)
    s2, t2 = torch.softmax(s_BC / 2, -1), torch.softmax(t_BC / 2, -1)
    soft = (t2 * (t2.log() - s2.log())).sum(-1)
    hard = -torch.softmax(s_BC, -1).log().gather(1, batch.labels[:, None])[:, 0]
    # float32 sums of terms of size 1 against float64 ones: a few units in the seventh digit
    torch.testing.assert_close(joint.double(), layers + 0.2 * soft + 0.1 * hard, rtol=1e-6, atol=0)
    assert (layers > 1e-3).all() and (hard > 0.1).all()


def test_both_models_are_passed_once(pair):
    teacher, student, batch = pair
    calls = []
    hooks = [model.register_forward_hook(lambda model, *_: calls.append(model)) for model in (teacher, student)]
    imitation(student, batch, WEIGHTS, teacher, [1, 2, 3], SETTINGS).mean().backward()
    assert calls == [student, teacher]
    for hook in hooks:
        hook.remove()
    assert not teacher._forward_hooks and not student._forward_hooks
    assert student.classifier.weight.grad.abs().max() > 0 and student.bert.encoder.layer[0].output.dense.weight.grad is not None


def test_predictions_as_tinybert_has_them_are_cross_entropies_meaned_over_labels(pair):
    teacher, student, batch = pair
    settings = Settings(prediction="tinybert", temperature=1.5)
    with torch.no_grad():
        s, t = (torch.softmax(distill.logits(model, batch).double() / 1.5, -1) for model in (student, teacher))
        loss = imitation(student, batch, {"soft": 1.0}, teacher, settings=settings)
    torch.testing.assert_close(loss.double(), -(t * s.log()).mean(-1), rtol=1e-6, atol=0)


def test_a_joint_run_makes_the_student_in_one_stage(place, capsys, tokenizer_folder):
    save_model(place / "other", tokenizer_folder, width=16, layers=2, seed=2)
    out = place / "out"
    assert run(place, out, "method=joint") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "errors.tsv", "report.html", "report.json", "report.md", "student", "teacher"]
    assert not (out / "student" / "projection.safetensors").exists()
    inputs = json.loads((out / "student" / "stage.json").read_text())["inputs"]
    assert {name: inputs[name] for name in WEIGHTS} == WEIGHTS and inputs["temperature"] == 2.0
    figures = json.loads((out / "student" / "stage.json").read_text())["figures"]
    assert figures["epochs"][0].keys() == {"epoch", "loss", "dev_accuracy"}
    written = json.loads((out / "report.json").read_text())
    assert [line["model"] for line in written["models"]] == ["teacher teacher", "student student"]
    assert run(place, out, "method=joint", student="other") == 0  # another student: its stage is made again, the teacher's not
    assert "student: makes" in (said := capsys.readouterr().out) and said.count("skipped") == 1


def test_what_is_given_counts_more_than_what_joint_begins_with(place, monkeypatch):
    seen = []
    monkeypatch.setattr("finetune.stages.Run", lambda _, settings: seen.append(settings) or SimpleNamespace(run=str))
    assert run(place, place / "none", "method=joint", "temperature=1.5", "soft=0.4") == 0
    assert run(place, place / "none") == 0
    assert (seen[0].temperature, seen[0].soft, seen[0].attention) == (1.5, 0.4, 0.5)
    assert (seen[1].temperature, seen[1].attention) == (1.0, 1.0)


def test_errors_are_one_line(place, tmp_path, capsys):
    assert run(place, tmp_path / "out", "prediction=tinybird") == 2
    assert capsys.readouterr().err == (
        "error: prediction=tinybird: must be 'kl' or 'tinybert'; write such as prediction=kl\n")
    assert run(place, tmp_path / "out", "method=joint", "--stages", "layers") == 2
    assert "stages: 'layers' is none of this run" in capsys.readouterr().err
    assert qnli.METHODS["joint"] == ("teacher", "augment", "predictions", "report")
