"""Every setting of the objective through the real launchers: the same on 1 and 2 ranks, and over a resume."""

import shutil

import pytest
from runs import SETTINGS, SMALL, assert_same_run, launch, learned, metrics

ALL = ["layer_weights=inverse", "relation_heads=6", "layer_map=2:2-3", "lanes=4", "cosine=0.5", "qk=1", "vv=1",
       "normalize=padded", "mask=dynamic", "gradient_checkpointing=true",
       "init=projected"]


def test_every_setting_on_one_rank_and_two_and_over_a_resume(inputs, tmp_path):
    command = [*inputs, "--student", SMALL, *SETTINGS, *ALL]
    said = launch(*command, "--out", tmp_path / "one")
    assert "init=projected, like teacher layers [(), (2, 3)], () without a layer loss" in said
    launch(*command, "--out", tmp_path / "two", ranks=2, form="deepspeed")
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert {"embedding", "hidden/2", "attention/2", "cosine/2", "qk/2", "vv/2"} <= set(one[6])
    assert "hidden/1" not in one[6]
    for step in one:
        for name, value in learned(one[step]).items():  # only the order of float32 sums differs; it grows over six updates
            assert two[step][name] == pytest.approx(value, rel=1e-3), (step, name)
    shutil.copytree(tmp_path / "one", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-6")
    (tmp_path / "again" / "checkpoints" / "latest").unlink()
    assert "goes on from" in launch(*command, "--out", tmp_path / "again")
    assert_same_run(tmp_path / "one", tmp_path / "again")


@pytest.mark.parametrize("settings, says", [
    (["relation_heads=5"], "relation_heads=5 does not divide both widths, 12 of student .* and 24 of the teacher; .* such as 12"),
    (["steps=a"], "steps=a: must be a valid integer"),
    (["init=teacher"], "init=teacher needs a BERT teacher of the same widths, .* write init=auto"),
    (["normalize=rows"], "normalize=rows: must be 'row' or 'padded'"),
    (["embedding=0", "hidden=0", "attention=0"], "every term's weight is 0"),
    (["layer_weights=1,2"], "layer_weights='1,2': there are equal, inverse, and 3 numbers"),
    (["layer_map=1:9"], r"layer_map='1:9': cannot use '1:9'; write each student layer \(1 to 2\)")], ids=str)
def test_settings_that_do_not_go_together_are_said(settings, says, shards_folder, teacher_folder):
    from argparse import Namespace

    from pretrain.plan import Plan

    given = Namespace(settings=settings, student=[SMALL], shards=shards_folder, engine=None,
                      teacher=str(teacher_folder), teacher_dtype="fp32", gpus=None)
    with pytest.raises(ValueError, match=says):
        Plan(given)
