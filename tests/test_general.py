"""General distillation through the real launcher: runs, resumes, ranks, students, what it leaves, what it refuses."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import generated_documents
from runs import NAMES, ROOT, SAME, SETTINGS, SMALL, assert_same_run, launch, learned, metrics, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.general import options
from pretrain.plan import Plan
from pretrain.recipe import Recipe, override, parse_student
from shards.build import build


AUTO = ["init=auto", "dropout=0.1"]  # first weights fitted to the teacher's


@pytest.fixture(scope="module")
def two_ranks(inputs, tmp_path_factory) -> Path:
    """A straight run of 6 steps on 2 ranks by the real launcher, two students, dropout on, checkpoints at 3 and 6."""
    out = tmp_path_factory.mktemp("two") / "run"
    launch(*inputs, "--student", SMALL, "--student", SAME, "--out", out, *SETTINGS, *AUTO, ranks=2, form="deepspeed")
    return out


def test_what_a_run_leaves(two_ranks, one_rank):
    from transformers import AutoModel, AutoTokenizer

    run = json.loads((two_ranks / "run.json").read_text())
    assert run["machine"]["ranks"] == 2 and run["settings"]["steps"] == 6 and "torch" in run["versions"] and run["command"]
    assert sorted(metrics(two_ranks)) == list(range(7))
    alone = metrics(one_rank)[6]
    for figure in ("rows", "loss", "embedding", "hidden/2", "attention/1", "lr", "grad_norm", "rows/s", "tokens/s", "data_wait",
                   "held_out/loss"):
        assert figure in alone
    assert alone["held_out/loss"] < metrics(one_rank)[0]["held_out/loss"]
    board = EventAccumulator(str(one_rank / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("1 health/loss")] == [1, 2, 3, 4, 5, 6]
    for name in NAMES:
        folder = two_ranks / "students" / name
        model = AutoModel.from_pretrained(folder)
        assert model.config.num_hidden_layers == 2 and AutoTokenizer.from_pretrained(folder).mask_token == "[MASK]"
        assert all(torch.equal(model.state_dict()[k], v) for k, v in weights(two_ranks, name).items())
    assert (two_ranks / "students" / NAMES[0] / "projection.safetensors").exists()
    assert not (two_ranks / "students" / NAMES[1] / "projection.safetensors").exists()


def test_a_resumed_run_is_the_straight_one_bit_for_bit(two_ranks, inputs, tmp_path):
    """The newest checkpoint is damaged by one byte: the one before it is taken; dropout goes on as it would have."""
    out = tmp_path / "run"
    shutil.copytree(two_ranks, out)
    for file in (out / "checkpoints/step-6").rglob("*optim_states.pt"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        break
    said = launch(*inputs, "--student", SMALL, "--student", SAME, "--out", out, *SETTINGS, *AUTO, ranks=2, form="bash")
    assert "damaged (its sha256 is another)" in said and "goes on from" in said
    assert_same_run(two_ranks, out, NAMES)
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars(f"1 health/{NAMES[0]}/loss")] == [1, 2, 3, 4, 5, 6]


def test_ranks_and_micro_batches_change_the_loss_by_rounding_only(one_rank, two_ranks_in_pieces):
    """Two ranks, four micro batches each, against one rank in one piece."""
    one, two = metrics(one_rank), metrics(two_ranks_in_pieces[0])
    for step in range(1, 7):  # 1e-5: the project's bound for a change of the engine file
        for name in ("loss", "embedding", "hidden/2", "attention/1"):
            assert two[step][name] == pytest.approx(one[step][name], rel=1e-5)
    assert two[0]["held_out/loss"] == pytest.approx(one[0]["held_out/loss"], rel=1e-6)


def test_a_student_beside_another_ends_bit_for_bit_where_it_ends_alone(two_ranks, inputs, tmp_path):
    """With dropout too: each student has a random state of its own."""
    launch(*inputs, "--student", SAME, "--out", tmp_path / "run", *SETTINGS, *AUTO, ranks=2, form="deepspeed")
    alone, beside = weights(tmp_path / "run", NAMES[1]), weights(two_ranks, NAMES[1])
    assert all(torch.equal(alone[k], beside[k]) for k in alone)


def test_the_same_command_again_and_fresh(inputs, one_rank, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(one_rank, out)
    arguments = [*inputs, "--student", SMALL, "--out", out, *SETTINGS]
    assert "all 6 steps are done" in launch(*arguments)
    refused = launch(*arguments, "lr=2e-3", expect=2)
    assert "error: checkpoint" in refused and "lr was 0.001, is 0.002" in refused and "--fresh" in refused
    (tmp_path / "run.1").mkdir()  # of a --fresh before
    launch(*arguments, "lr=2e-3", "--fresh")
    assert learned(metrics(tmp_path / "run.2")[6]) == learned(metrics(one_rank)[6]) != learned(metrics(out)[6])
    assert (tmp_path / "run.2/checkpoints/latest").exists()


def test_the_literal_command(tokenizer_folder, teacher_folder, tmp_path):
    """`deepspeed launch/general.sh`, no option at all, in a folder that has the default shards and teacher."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 29500)) == 0:
            pytest.skip("DeepSpeed's default port 29500, which the literal command uses, is taken by another run")
    for name in ("launch", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("\n".join(document) for document in generated_documents(6)) + "\n")
    build([str(text)], str(tokenizer_folder), tmp_path / "data/shards", workers=1, sentences="auto", row_length=48,
          one_segment=False, masking="whole-word", mask_sets=1, held_out=0, shards=1, seed=0, dedup=False)
    (tmp_path / "bert-base-uncased").symlink_to(teacher_folder)
    done = subprocess.run(["deepspeed", "launch/general.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                               "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "data/shards/manifest.json").read_text())["rows"]
    steps = -(-3 * rows // 256)
    assert sorted(metrics(tmp_path / "runs/general"))[-1] == steps
    assert (tmp_path / "runs/general/students/tiny4/model.safetensors").exists()


def test_a_bad_input_ends_every_rank_and_leaves_nothing(inputs, tmp_path):
    said = launch(*inputs, "--student", "tiny5", "--out", tmp_path / "run", ranks=2, form="deepspeed", expect=2)
    assert said.count("error: ") == 1 and "unknown student 'tiny5'; did you mean 'tiny6'?" in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_help_answers_without_torch():
    done = subprocess.run(["bash", "launch/general.sh", "--help"], cwd=ROOT, capture_output=True, text=True, check=True,
                          env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert "--teacher" in done.stdout and "warmup" in done.stdout


def engine_file(folder: Path, **content) -> str:
    path = folder / "engine.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}, **content}))
    return str(path)


BAD = [
    (["--student", "tiny44"], "unknown student 'tiny44'; did you mean 'tiny4'?"),
    (["--student", "tiny4:layer=3"], "--student tiny4:layer=3: unknown setting 'layer'; did you mean 'layers'?"),
    (["--student", "tiny4:layers=x"], "layers=x: must be a valid integer, .*; write such as layers=4"),
    (["--student", "tiny4:hidden=100"], "hidden=100 does not divide over heads=12; write hidden=96"),
    (["--student", "tiny4:heads=6,hidden=300"], "6 heads, the teacher 12: .* write --student .*:heads=12"),
    (["--student", "tiny4:layers=9"], "9 layers is deeper than its teacher; write layers=4 or fewer"),
    (["--student", "tiny4", "--student", "tiny4"], "--student tiny4 --student tiny4: one is given twice"),
    (["--teacher-dtype", "fp61"], "--teacher-dtype: invalid choice: 'fp61' .*fp16"),
    (["lrr=1"], "unknown setting 'lrr'; did you mean 'lr'?"),
    (["lr=fast"], "lr=fast: must be a valid number, .*; write such as lr=0.0001"),
    (["deterministic=maybe"], "deterministic=maybe: must be a valid boolean, .*; write such as deterministic=false"),
    (["keep_every=-1"], "keep_every=-1: must be greater than or equal to 0; write such as keep_every=0"),
    (["lr=-1"], "lr=-1: must be greater than or equal to 0"),
    (["lr=nan"], "lr=nan: must be a finite number"),
    (["steps=0"], "steps=0: must be greater than 0; write such as steps=100"),
    (["beta2=1"], "beta2=1: must be less than 1"),
    (["dropout=1"], "dropout=1: must be less than 1; write such as dropout=0.0"),
    (["hidden=0", "embedding=0", "attention=0"], "every term's weight is 0: .*write attention=1"),
    (["mask=maybe"], "mask=maybe: must be 'precomputed', 'dynamic' or 'none'"),
    (["layer_map=unifrom"], "layer_map='unifrom'; did you mean 'uniform'"),
    (["warmup=2.5"], "warmup=2.5: a share of the steps"),
    (["batch=10", "lanes=4"], "batch=10 does not divide over lanes=4; write such as batch=8"),
    (["--studnet", "tiny4"], "unrecognized arguments: --studnet.*see bash launch/general.sh --help"),
    (["init=projected", "--student", "tiny4"], "student tiny4: init=projected needs a BERT teacher at least as wide"),
    (["init=teacher", "--student", "tiny4"], "init=teacher needs a BERT teacher of the same widths, .*; write init=auto"),
    (["fast"], "'fast' is no setting; write key=value"),
    (["--teacher", "./no/such/teacher"], "model './no/such/teacher': no such folder"),
    (["--teacher", "no-such-model"], "not a folder here, and the hub did not give it .*on a networked machine: hf download"),
    (["--shards", "nowhere"], "no shards in nowhere .*make shards with: python -m shards.build"),
    (["--engine", "ds_configs/cpv.json"], "ds_configs/cpv.json: no such file; did you mean 'ds_configs/cpu.json'?"),
]


@pytest.mark.parametrize("given, says", BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_bad_option_says_what_to_write(given, says, inputs, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=says) as error:
        Plan(options([*inputs, *given]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content, says", [
    ({"optimizer": {}}, "'optimizer' does not belong there; write it in the recipe"),
    ({"gradient_clipping": 1.0}, r"write it in the recipe \(clip=\)"),
    ({"tensorboard": {}}, "'tensorboard' is decided by the run"),
    ({"train_batch_size": 8}, r"write it in the recipe \(batch=\)"),
    ({"gradient_cliping": 1.0}, "'gradient_cliping' is decided by the run, or DeepSpeed would ignore it in silence"),
    ({"zero_optimisation": {}}, "in silence; did you mean 'zero_optimization'?"),
    ({"zero_optimization": {"stage": 3}}, r"needs stage 2 \(or 1\)"),
    ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "zero_optimization.overlap_com: .*; did you mean 'overlap_comm'"),
    ({"bf16": {"enabled": "perhaps"}}, "bf16.enabled: "),
    ({"data_types": {"grad_acum_dtype": "fp32"}}, "data_types is .*; write {'grad_accum_dtype': 'fp32'}"),
    ({"zero_optimization": 2}, "zero_optimization: Input should be a valid dictionary"),
    ({"train_micro_batch_size_per_gpu": 0}, "the most rows held at once, 1 or more"),
    ({"train_micro_batch_size_per_gpu": "many"}, "needs train_micro_batch_size_per_gpu"),
    pytest.param({"fp16": {"enabled": True}}, "needs a GPU.*ds_configs/cpu.json",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
])
def test_an_engine_file_is_checked_key_by_key(content, says, inputs, tmp_path):
    with pytest.raises(ValueError, match=says) as error:
        Plan(options([*inputs, "--student", SMALL, "--engine", engine_file(tmp_path, **content)]))
    assert "\n" not in str(error.value)


def test_biases_and_layer_norms_alone_have_one_axis():
    """By which the engine keeps them from weight decay."""
    from transformers import BertConfig, BertModel

    from pretrain.recipe import Recipe, Shape
    from pretrain.student import build_student

    teacher = BertModel(BertConfig(vocab_size=11, hidden_size=24, num_hidden_layers=2, num_attention_heads=12,
                                   intermediate_size=48), add_pooling_layer=False)
    shape = Shape(layers=2, hidden=12, intermediate=24)
    student = build_student("s", shape, teacher, [1, 2], init="random", recipe=Recipe())
    for name, parameter in student.named_parameters():
        assert (parameter.ndim == 1) == (name.endswith("bias") or "LayerNorm" in name), name


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "ds_configs").glob("*.json")))
def test_every_file_of_ds_configs_is_accepted_where_it_belongs(name):
    from pretrain.engine import read_engine_file

    read_engine_file(ROOT / "ds_configs" / name, "cpu" if "cpu" in name else "cuda")


@pytest.mark.parametrize("damage, says", [
    ("missing", "train-00001.tar: missing, but the manifest lists it"),
    ("truncated", r"train-00001.tar: [\d,]+ bytes, but the manifest says"),
])
def test_a_bad_shard_is_found_before_training(damage, says, inputs, shards_folder, tmp_path):
    copy = tmp_path / "shards"
    shutil.copytree(shards_folder, copy)
    shard = copy / "train-00001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    if damage == "missing":
        shard.unlink()
    with pytest.raises(ValueError, match=says):
        Plan(options(["--shards", str(copy), *inputs[2:]]))


@pytest.mark.faults
def test_a_damaged_shard_ends_all_ranks_with_its_name(inputs, shards_folder, tmp_path):
    copy = tmp_path / "shards"
    shutil.copytree(shards_folder, copy)
    data = bytearray((copy / "train-00002.tar").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "train-00002.tar").write_bytes(data)
    said = launch("--shards", copy, *inputs[2:], "--student", SMALL, "--out", tmp_path / "run", *SETTINGS, ranks=2,
                  form="deepspeed", expect=2)
    assert said.count("error: ") == 1 and "train-00002.tar: its sha256 is not the manifest's" in said
    assert "Traceback" not in said


def test_another_tokenizer_is_refused(inputs, teacher_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(teacher_folder, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"lowercase":true', '"lowercase":false').replace(
        '"lowercase": true', '"lowercase": false'))
    (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text().replace(
        '"do_lower_case": true', '"do_lower_case": false'))
    with pytest.raises(ValueError, match="the shards were built with the tokenizer of .*teacher .* has another"):
        Plan(options([*inputs, "--teacher", str(other)]))


def test_an_exported_tokenizer_neither_cuts_nor_pads(tmp_path):
    """all-MiniLM-L6-v2 stores a truncation of 128, which a student must not inherit."""
    from conftest import save_tokenizer

    from shards.tokenizer import auto_tokenizer

    auto_tokenizer(str(save_tokenizer(tmp_path / "given", truncation=8))).save_pretrained(tmp_path / "student")
    stored = json.loads((tmp_path / "student/tokenizer.json").read_text())
    assert stored["truncation"] is None and stored["padding"] is None


def test_the_rate_rises_and_falls_by_the_step_number():
    recipe = override(Recipe(), ["steps=10", "warmup=2", "lr=1.0"])
    assert [round(recipe.rate(step), 3) for step in range(10)] == [0.5, 1.0, 1.0, .875, .75, .625, .5, .375, .25, .125]
    assert override(recipe, ["warmup=0"]).rate(0) == 1.0
    assert override(Recipe(), ["warmup=0.1", "steps=1_000"]).steps == 1000


def test_first_weights_are_the_teachers_as_far_as_they_fit(inputs):
    whole, wider = SAME.replace("layers=2", "layers=4"), SAME.replace("intermediate=48", "intermediate=96")
    plan = Plan(options([*inputs, *(f"--student={shape}" for shape in (SMALL, SAME, whole, wider))]))
    assert list(plan.inits.values()) == ["projected", "projected", "teacher", "random"]
    assert list(plan.layers.values()) == [[2, 4], [2, 4], [1, 2, 3, 4], [2, 4]]


def test_a_student_name_is_a_folder_name():
    assert parse_student("tiny4:layers=3,hidden=24")[0] == "tiny4-layers-3-hidden-24"
