"""Students: their first weights, their projections."""

import pytest
import torch
from safetensors.torch import load_file
from test_encoder import batch, bert
from transformers import AutoModel, AutoTokenizer

from finetune.distill import with_projection
from pretrain.encoder import trace
from pretrain.objective import TERMS, distil, weighted
from pretrain.recipe import Recipe, Shape
from pretrain.student import build_student, export, first_weights


def test_a_student_is_drawn_from_seed_and_name():
    teacher, shape = bert(), Shape(layers=2, hidden=16, intermediate=24, heads=4)
    torch.manual_seed(5)
    one = build_student("tiny4", shape, teacher, [1, 3], init="random", recipe=Recipe())
    torch.manual_seed(6)
    same = build_student("tiny4", shape, teacher, [1, 3], init="random", recipe=Recipe())
    other = build_student("tiny6", shape, teacher, [1, 3], init="random", recipe=Recipe())
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        if name.endswith("query.weight"):
            assert not torch.equal(a, c) and abs(a.std().item() - 0.02) < 0.004


def test_copied_layers_are_the_mapped_ones():
    teacher, shape = bert(), Shape(layers=2, hidden=32, intermediate=48, heads=4)
    assert first_weights("s", shape, teacher.config, "teacher") == "teacher"
    student = build_student("s", shape, teacher, [1, 3], init="teacher", recipe=Recipe())
    assert not [*student.projection.parameters()]
    for mine, theirs in ((0, 0), (1, 2)):
        for a, b in zip(student.encoder.encoder.layer[mine].parameters(), teacher.encoder.layer[theirs].parameters(),
                        strict=True):
            assert torch.equal(a, b)
    ids, segments, real = batch()
    assert torch.equal(student(ids, segments, real).hidden[1], trace(teacher.train(False), ids, segments, real).hidden[1])


def test_hidden_states_are_projected_to_the_teachers_width():
    shapes = [Shape(layers=2, hidden=hidden, intermediate=24, heads=4) for hidden in (16, 32)]
    narrow, wide = (build_student("s", shape, bert(), [1, 3], init="random", recipe=Recipe()).eval() for shape in shapes)
    rows = batch()
    own, got = trace(narrow.encoder, *rows), narrow(*rows)
    for mine, projected in zip(own.hidden, got.hidden, strict=True):
        assert torch.equal(narrow.projection(mine), projected) and projected.shape[-1] == 32
    assert (narrow.projection.bias == 0).all() and abs(narrow.projection.weight.std().item() - 0.02) < 0.004
    assert not [*wide.projection.parameters()]
    assert torch.equal(wide(*rows).hidden[2], trace(wide.encoder, *rows).hidden[2])


def test_each_hidden_state_may_have_a_projection_of_its_own(tmp_path, tokenizer_folder):
    """All begin alike where the student is fitted; a task student takes them over from the exported folder."""
    teacher, shape, new = bert().eval(), Shape(layers=2, hidden=16, intermediate=24, heads=4), batch(8, 31)
    each = build_student("s", shape, teacher, [1, 3], "projected", Recipe(projection="each"), rows=calibration()).eval()
    first = each.projection[0].weight.clone()
    assert len(each.projection) == 3 and all(torch.equal(linear.weight, first) for linear in each.projection)
    for n, linear in enumerate(each.projection):
        torch.nn.init.normal_(linear.weight)
        assert torch.equal(each(*new).hidden[n], linear(trace(each.encoder, *new).hidden[n]))
    export(tmp_path / "s", each, dict(each.named_parameters()), AutoTokenizer.from_pretrained(tokenizer_folder))
    found = load_file(tmp_path / "s/projection.safetensors")
    assert set(found) == {f"{n}.{part}" for n in range(3) for part in ("weight", "bias")}
    student = with_projection(AutoModel.from_pretrained(tmp_path / "s"), tmp_path / "s", 32, 0)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(student.projection, each.projection, strict=True))


def test_groups_copy_their_last_layer():
    teacher, shape = bert(), Shape(layers=3, hidden=32, intermediate=48, heads=4)
    student = build_student("s", shape, teacher, [(1, 2), (), (3,)], init="teacher", recipe=Recipe())
    for mine, theirs in ((0, 1), (1, 1), (2, 2)):
        copied, source = student.encoder.encoder.layer[mine], teacher.encoder.layer[theirs]
        assert torch.equal(copied.output.dense.weight, source.output.dense.weight)


def test_gradient_checkpointing_changes_no_gradient():
    teacher, shape = bert(), Shape(layers=2, hidden=16, intermediate=24, heads=4)
    rows, gradients = batch(), []
    with torch.no_grad():
        t = trace(teacher.eval(), *rows)
    for again in (False, True):
        recipe = Recipe(gradient_checkpointing=again, qk=1.0)
        student = build_student("s", shape, teacher, [1, 3], init="random", recipe=recipe).train()
        assert student.encoder.is_activation_checkpointing == again
        weighted(distil(student(*rows), t, rows[2], [1, 3], recipe.weights), recipe.weights).sum().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def loss(student, teacher, layers, rows) -> float:
    student.eval()
    with torch.no_grad():
        terms = distil(student(*rows), trace(teacher, *rows), rows[2], layers)
        return weighted(terms, dict.fromkeys(TERMS, 1.0)).mean().item()


def calibration(rows: int = 64):
    return batch(rows, 40)


def test_a_student_of_the_teachers_shape_is_projected_onto_the_teacher():
    """Every target is then a linear function of what it is regressed on: what is left is what the ridge, 1 %, takes, squared."""
    teacher, shape = bert().eval(), Shape(layers=3, hidden=32, intermediate=48, heads=4)
    new = batch(8, 31)
    random = build_student("s", shape, teacher, [1, 2, 3], init="random", recipe=Recipe())
    fitted = build_student("s", shape, teacher, [1, 2, 3], init="projected", recipe=Recipe(), rows=calibration())
    assert loss(fitted, teacher, [1, 2, 3], new) < 1e-3 * loss(random, teacher, [1, 2, 3], new)


def test_projected_students_begin_closer_to_the_teacher():
    """On rows they were not fitted to: than copied layers where some are left out, and than random weights where narrower."""
    teacher, new = bert().eval(), batch(8, 31)
    for shape, other in ((Shape(layers=2, hidden=32, intermediate=48, heads=4), "teacher"),
                         (Shape(layers=2, hidden=16, intermediate=24, heads=4), "random")):
        assert first_weights("s", shape, teacher.config, "auto") == "projected"
        one, two = (build_student("s", shape, teacher, [1, 3], init=init, recipe=Recipe(), rows=calibration())
                    for init in (other, "projected"))
        assert loss(two, teacher, [1, 3], new) < 0.8 * loss(one, teacher, [1, 3], new)
        again = build_student("s", shape, teacher, [1, 3], init="projected", recipe=Recipe(), rows=calibration())
        assert all(torch.equal(a, b) for a, b in zip(two.parameters(), again.parameters(), strict=True))


def test_what_cannot_be_projected():
    teacher = bert().config
    for layers, hidden, intermediate, heads in ((2, 48, 48, 4), (2, 32, 64, 4), (2, 16, 24, 2), (4, 16, 24, 4)):
        shape = Shape(layers=layers, hidden=hidden, intermediate=intermediate, heads=heads)
        assert first_weights("s", shape, teacher, "auto") == "random"
        for wanted in ("projected", "teacher"):
            with pytest.raises(ValueError, match=f"student s: init={wanted} needs a BERT teacher .* write init=auto"):
                first_weights("s", shape, teacher, wanted)
    narrow = Shape(layers=2, hidden=16, intermediate=48, heads=4)
    assert first_weights("s", narrow, teacher, "auto") == first_weights("s", narrow, teacher, "projected") == "projected"
    with pytest.raises(ValueError, match="of the same widths"):
        first_weights("s", narrow, teacher, "teacher")
