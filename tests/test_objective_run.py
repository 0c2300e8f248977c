"""Every setting of the objective through the real launchers: the same on 1 and 2 ranks, and over a resume."""

import json
import math
import shutil

import pytest
from runs import NAMES, SETTINGS, SMALL, assert_same_run, launch, learned, metrics

from pretrain.checkpoint import differences

ALL = ["layer_weights=balanced", "relation_heads=6", "layer_map=2:2-3", "lanes=4", "cosine=0.5", "qk=1", "vv=1", "mlm=0.2",
       "soft_mlm=0.1", "temperature=3", "normalize=padded", "mask=dynamic", "gradient_checkpointing=true", "init=projected"]


@pytest.fixture(scope="module")
def of_two_lengths(shards_folder, teacher_folder, tokenizer_folder, text_folder, tmp_path_factory) -> list:
    """Shards of rows of 48, then of 64; a teacher with a masked-LM head."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from shards.build import build

    longer, teacher = tmp_path_factory.mktemp("longer") / "shards", tmp_path_factory.mktemp("head") / "teacher"
    build([str(text_folder)], str(tokenizer_folder), longer, workers=1, sentences="auto", row_length=64, one_segment=False,
          masking="token", mask_sets=1, held_out=0.1, shards=2, seed=1, dedup=False)
    shutil.copytree(tokenizer_folder, teacher)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForMaskedLM(BertConfig.from_pretrained(teacher_folder)).save_pretrained(teacher)
    return ["--shards", shards_folder, "--shards", longer, "--teacher", teacher, "--teacher-dtype", "fp32", "--student", SMALL]


def test_every_setting_on_one_rank_and_over_a_resume_on_one_and_two(of_two_lengths, tmp_path):
    """Two phases too, of four steps and of two, the resume within the first; what comes out is a masked LM."""
    from transformers import BertForMaskedLM

    command = [*of_two_lengths, *SETTINGS, *ALL, "steps=4,2"]
    said = launch(*command, "--out", tmp_path / "one")
    assert "init=projected, like teacher layers [(), (2, 3)], () without a layer loss" in said
    assert "4 steps = " in said and ", then 2 steps = " in said
    one = metrics(tmp_path / "one")
    assert {"embedding", "hidden/2", "attention/2", "cosine/2", "qk/2", "vv/2", "mlm", "soft_mlm"} <= set(one[6])
    assert "hidden/1" not in one[6]
    weights = dict.fromkeys(("embedding", "hidden/2", "attention/2", "qk/2", "vv/2"), 1.0)
    weights |= {"cosine/2": 0.5, "mlm": 0.2, "soft_mlm": 0.1}
    most = sum(weight * math.log(one[6][name] + 1e-3) for name, weight in weights.items())
    assert most - 1 < one[6]["loss"] < most  # a mean of rows' logarithms is less than a logarithm of their mean, here a little
    for step in (tmp_path / "one/checkpoints/step-6", tmp_path / "one/checkpoints/latest"):
        step.rename(tmp_path / step.name)
    for name in ("again", "two"):
        shutil.copytree(tmp_path / "one", tmp_path / name)
    assert "goes on from" in launch(*command, "--out", tmp_path / "again")
    assert_same_run(tmp_path / "one", tmp_path / "again")
    said = launch(*command, "--out", tmp_path / "two", ranks=2, form="deepspeed")
    assert "goes on from" in said and "through DeepSpeed's universal checkpoint" in said
    for step in (4, 5, 6):
        for name, value in learned(one[step]).items():  # only the order of float32 sums differs; it grows over three updates
            assert metrics(tmp_path / "two")[step][name] == pytest.approx(value, rel=1e-3), (step, name)
    _, found = BertForMaskedLM.from_pretrained(tmp_path / "one/students" / NAMES[0], output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]


def test_phases_read_one_stream_after_the_other(of_two_lengths, tmp_path):
    """steps=3,3 goes on as a run over the second shards alone would: the same rows, from its first on."""
    command = [*of_two_lengths, *SETTINGS, "lr=0", "save_every=6"]  # nothing moves: losses tell the rows
    launch(*command, "--out", tmp_path / "both", "steps=3,3")
    launch(*command[2:], "--out", tmp_path / "second", "steps=3")
    both, second = metrics(tmp_path / "both"), metrics(tmp_path / "second")
    for step in (1, 2, 3):
        assert both[3 + step]["loss"] == second[step]["loss"] != both[step]["loss"]
    assert both[6]["held_out/loss"] == second[3]["held_out/loss"] != both[3]["held_out/loss"]
    settings = [json.loads((tmp_path / out / "run.json").read_text())["settings"] for out in ("both", "second")]
    assert "steps_before was [3], is None" in differences(*settings)  # no other run goes on from it


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_compiled_layers_learn_what_the_others_learn(one_rank, inputs, tmp_path):
    launch(*inputs, "--student", SMALL, "--out", tmp_path / "run", *SETTINGS, "compile=true",
           variables={"CC": "cc", "CXX": "c++"})
    plain, compiled = metrics(one_rank), metrics(tmp_path / "run")
    assert any(learned(compiled[step]) != learned(plain[step]) for step in plain)  # the kernels are others
    for step in plain:
        for name, value in learned(plain[step]).items():  # and round otherwise, which grows over six updates
            assert compiled[step][name] == pytest.approx(value, rel=1e-3), (step, name)


@pytest.mark.parametrize("settings, says", [
    (["relation_heads=5"], "relation_heads=5 does not divide both widths, 12 of student .* and 24 of the teacher; .* such as 12"),
    (["steps=a"], "steps=a: must be a valid integer"),
    (["steps=3,4"], "steps=3,4: write a number for each of 1 --shards, as 9"),
    (["steps=3,0"], "steps=3,0: must"),
    (["mlm=1", "mask=none"], "mlm= and soft_mlm= are of masked words, mask=none leaves none; write mask=precomputed or dynamic"),
    (["temperature=0"], "temperature=0: must be greater than 0"),
    (["init=teacher"], "init=teacher needs a BERT teacher of the same widths, .* write init=auto"),
    (["normalize=rows"], "normalize=rows: must be 'row' or 'padded'"),
    (["embedding=0", "hidden=0", "attention=0"], "every term's weight is 0"),
    (["layer_weights=1,2"], "layer_weights='1,2': there are equal, inverse, balanced, and 3 numbers"),
    (["layer_map=1:9"], r"layer_map='1:9': cannot use '1:9'; write each student layer \(1 to 2\)")], ids=str)
def test_settings_that_do_not_go_together_are_said(settings, says, shards_folder, teacher_folder):
    from argparse import Namespace

    from pretrain.plan import Plan

    given = Namespace(settings=settings, student=[SMALL], shards=[shards_folder], engine=None,
                      teacher=str(teacher_folder), teacher_dtype="fp32", gpus=None)
    with pytest.raises(ValueError, match=says):
        Plan(given)
