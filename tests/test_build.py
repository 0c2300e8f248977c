"""Whole builds: the same bytes from any number of workers, what is held out stays out, and what bad input is told."""

import fcntl
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from shards import block, look
from shards.build import SHARD_BYTES, held_out_documents, main
from shards.pairs import draw_rows
from shards.store import Store
from tests.conftest import generated_documents, save_tokenizer


def build(out, *sources, tokenizer, **options):
    """Run the command in this process -> Manifest."""
    words = [f"--{name.replace('_', '-')}{'' if value is True else f'={value}'}" for name, value in options.items()]
    code = main([*map(str, sources), "--tokenizer", str(tokenizer), "--out", str(out), *({"--workers=1", *words})])
    assert code == 0
    return block.read_manifest(out)


@pytest.fixture(scope="module")
def built(tmp_path_factory, text_folder, tokenizer_folder):
    out = tmp_path_factory.mktemp("shards") / "out"
    build(out, text_folder, tokenizer=tokenizer_folder, shards=4, held_out=0.1, row_length=64)
    return out


def sums(manifest):
    return [shard.sha256 for shard in manifest.shards + manifest.held_out]


def test_any_number_of_workers_writes_the_same_bytes(built, tmp_path, text_folder, tokenizer_folder):
    command = [sys.executable, "-m", "shards.build", str(text_folder), "--tokenizer", str(tokenizer_folder), "--out",
               str(tmp_path / "three"), "--shards=4", "--held-out=0.1", "--row-length=64", "--workers=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    here, there = block.read_manifest(built), block.read_manifest(tmp_path / "three")
    assert here == there and len(here.shards) == 4
    assert sorted(p.name for p in (tmp_path / "three").iterdir()) == sorted(
        ["manifest.json", *(shard.name for shard in here.shards + here.held_out)])


def test_another_seed_gives_other_rows(built, tmp_path, text_folder, tokenizer_folder):
    other = build(tmp_path, text_folder, tokenizer=tokenizer_folder, shards=4, held_out=0.1, row_length=64, seed=1)
    assert not set(sums(other)) & set(sums(block.read_manifest(built)))


def test_the_manifest_states_what_came_out(built):
    manifest = block.read_manifest(built)
    parts = [block.read_shard(built, shard) for shard in manifest.shards]
    whole, counts = block.Block.joined(parts), manifest.counts
    assert manifest.rows == whole.rows and manifest.tokens == len(whole.ids)
    assert counts["documents"] == 60 and counts["held_out_documents"] == held_out_documents(60, 0.1, 0).sum() >= 1
    assert counts["random_next"] == pytest.approx(whole.is_random.mean(), abs=1e-5)
    assert counts["masked"] == pytest.approx(len(whole.mask_ids) / 3 / len(whole.ids), abs=1e-5)
    assert counts["mean_length"] == pytest.approx(whole.lengths.mean(), abs=1e-4)
    assert whole.lengths.max() <= 64 and 0.12 < counts["masked"] < 0.16
    assert manifest.tokenizer["vocab_size"] > whole.ids.max() and manifest.settings["seed"] == 0


def text_of(tokenizer, block):
    """One string of pieces a row, special tokens removed, for looking up sentences."""
    rows = np.split(block.ids.astype(int), np.cumsum(block.lengths.astype(int))[:-1])
    return [" ".join(tokenizer.id_to_token(i) for i in row if i > 4) for row in rows]


def test_held_out_sentences_are_in_no_training_row(built, tokenizer_folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    manifest = block.read_manifest(built)
    train = "\n".join(t for shard in manifest.shards for t in text_of(tokenizer, block.read_shard(built, shard)))
    held = "\n".join(t for shard in manifest.held_out for t in text_of(tokenizer, block.read_shard(built, shard)))
    documents = generated_documents()
    is_held = held_out_documents(60, 0.1, 0)
    found = {(bool(kept), where): 0 for kept in (True, False) for where in ("train", "held")}
    for document, kept in zip(documents, is_held, strict=True):
        for sentence in document:
            tokens = tokenizer.encode(sentence, add_special_tokens=False).tokens
            if len(tokens) < 8:
                continue
            sentence = " ".join(tokens)
            found[bool(kept), "train"] += sentence in train
            found[bool(kept), "held"] += sentence in held
    assert found[True, "train"] == 0 and found[False, "held"] == 0
    assert found[True, "held"] > 5 and found[False, "train"] > 100


@pytest.mark.parametrize("count, share, least", [(2, 0.9, 0), (3, 0.001, 1), (1000, 0.01, 2), (1000, 0.0, 0)])
def test_held_out_documents_are_drawn_by_number(count, share, least):
    held = held_out_documents(count, share, 7)
    assert len(held) == count and least <= held.sum() <= max(1, 3 * share * count)
    if share * count > 5:  # more documents change nothing for those before
        assert (held_out_documents(count + 50, share, 7)[:count] == held).all()


def test_webdataset_reads_the_shards(built):
    import webdataset

    manifest = block.read_manifest(built)
    files = [str(built / shard.name) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(files, shardshuffle=False).decode())
    assert sum(len(sample["lengths.npy"]) for sample in samples) == manifest.rows
    here = block.read_shard(built, manifest.shards[0])
    assert (np.concatenate([s["ids.npy"] for s in samples])[:len(here.ids)] == here.ids).all()


def test_no_worker_loads_torch():
    check = "import sys, shards.build, shards.store, shards.look; assert not {'torch', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("damage, says", [
    (lambda data: data[:-600], "bytes, but the manifest says"),
    (lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:], "sha256 is not the manifest's"),
    (None, "missing, but the manifest lists it"),
])
def test_look_verifies_and_names_the_bad_shard(built, capsys, damage, says):
    assert look.main([str(built), "--verify"]) == 0
    assert "OK: " in capsys.readouterr().out
    path = built / "train-00002.tar"
    data = path.read_bytes()
    try:
        path.unlink() if damage is None else path.write_bytes(damage(data))
        assert look.main([str(built), "--verify"]) == 1
        error = capsys.readouterr().err
        assert "train-00002.tar" in error and says in error and error.count("\n") == 1
    finally:
        path.write_bytes(data)


def test_look_shows_a_row_as_text(built, capsys, tokenizer_folder, tmp_path):
    assert look.main([str(built), "--row", "train-00001:3", "--mask-set", "2"]) == 0
    shown = capsys.readouterr().out
    assert "[CLS]" in shown and "[MASK]" in shown and "B follows A" in shown or "random B" in shown
    other = save_tokenizer(tmp_path, tokenizer_class="PreTrainedTokenizerFast", mask_token="[unused1]")
    for words, says in ((["--row", "train-00001:99999"], "give SHARD:N, with train-00000:0.."),
                        (["--row", "train-00001:0", "--mask-set", "3"], "sets 0 to 2"),
                        (["--row", "train-00001:0", "--tokenizer", str(other)], "not the one of these shards")):
        assert look.main([str(built), *words]) == 1
        assert says in capsys.readouterr().err


def test_look_finds_rows_far_into_a_large_shard(tmp_path, tokenizer_folder, capsys):
    text = "\n\n".join("\n".join(document) for document in generated_documents(160))
    (tmp_path / "a.txt").write_text(text)
    manifest = build(tmp_path / "out", tmp_path / "a.txt", tokenizer=tokenizer_folder)
    assert manifest.tokens > 2**16  # lengths are uint16: sums of them must not be
    assert look.main([str(tmp_path / "out"), "--row", f"train-00000:{manifest.rows - 1}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("[CLS]") == 2 and "\nset 0   " in shown


def test_one_sentence_of_5000_words_is_not_cut_by_the_tokenizer(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "cut", truncation=16)
    (tmp_path / "a.txt").write_text("A b.\n\n" + "ba " * 4999 + "ba .\n\nC d.\n")
    manifest = build(tmp_path / "out", tmp_path / "a.txt", tokenizer=tokenizer, held_out=0)
    assert manifest.counts["tokens"] == 5001 + 3 + 3
    assert manifest.rows == 3 and manifest.counts["truncated_tokens"] >= 5001 - 125


def test_special_tokens_spoken_by_the_text_are_text(tmp_path, tokenizer_folder):
    (tmp_path / "a.txt").write_text("Da [SEP] de [MASK] di.\n\nBa [PAD] be.\n\nFa <unk> fe.\n")
    manifest = build(tmp_path / "out", tmp_path / "a.txt", tokenizer=tokenizer_folder, held_out=0)
    ids = block.read_shard(tmp_path / "out", manifest.shards[0])
    assert not np.isin(ids.ids, [0, 4]).any()  # no [PAD], no [MASK]
    assert (ids.ids == 3).sum() == 2 * manifest.rows  # no [SEP] but ours
    assert manifest.counts["unknown_tokens"] == 1 + 6  # <unk>, and brackets, which this vocabulary does not have


def test_one_segment_rows_and_token_masks(tmp_path, text_folder, tokenizer_folder):
    manifest = build(tmp_path, text_folder / "part-0.txt", tokenizer=tokenizer_folder, one_segment=True,
                     masking="token", mask_sets=1, row_length=300)
    rows = block.Block.joined([block.read_shard(tmp_path, shard) for shard in manifest.shards])
    assert (rows.first == rows.lengths).all() and not rows.is_random.any()
    assert (rows.mask_counts[0] == np.maximum(1, np.rint(rows.lengths * 0.15))).all()
    assert rows.mask_positions.dtype == np.uint16 and manifest.counts["random_next"] == 0


def test_a_second_build_says_so_and_other_settings_are_an_error(built, text_folder, tokenizer_folder, capsys):
    words = [str(text_folder), "--tokenizer", str(tokenizer_folder), "--out", str(built), "--held-out=0.1",
             "--shards=4"]
    before = (built / "manifest.json").stat().st_mtime_ns
    assert main([*words, "--row-length=64", "--workers=2"]) == 0
    assert "already built with these settings" in capsys.readouterr().out
    assert main([*words, "--row-length=32", "--seed=3"]) == 2
    assert "row_length: 64 there, 32 here; seed: 0 there, 3 here" in capsys.readouterr().err
    assert (built / "manifest.json").stat().st_mtime_ns == before


ERRORS = [
    (["pyton-docs"], "did you mean python-docs"),
    (["SOURCE", "--row-length=4"], "--row-length 4: must be between 8 and 8,192"),
    (["SOURCE", "--held-out=1"], "--held-out 1.0: must be between 0 and 0.9"),
    (["SOURCE", "--mask-sets=0"], "--mask-sets 0: must be between 1"),
    (["SOURCE", "--workers=0"], "--workers 0: must be 1 or more"),
    (["SOURCE", "--seed=-1"], "--seed -1: must be between 0"),
    (["SOURCE", "--shards=1000"], "--shards 1000: the documents fill at most"),
    (["SOURCE", "--rows=1"], "unrecognized arguments: --rows=1"),
    (["SOURCE", "SOURCE"], "given more than once; name it once"),
    (["SOURCE", "--tokenizer=./nothing"], "no such folder; give a folder that holds tokenizer.json"),
    (["ONE"], "to train on: 1, but random second segments need two at least; give more text, or --one-segment"),
    (["BAD"], "line 3,001, byte 36,000: not UTF-8 (0xff)"),
]


@pytest.mark.parametrize("words, says", ERRORS, ids=[says[:30] for _, says in ERRORS])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, text_folder, tokenizer_folder, capsys, words, says):
    (tmp_path / "one.txt").write_text("A sentence.\nAnother one.\n")
    (tmp_path / "bad.txt").write_bytes(b"A sentence.\n" * 3000 + b"\xff\n")
    names = {"SOURCE": str(text_folder), "ONE": str(tmp_path / "one.txt"), "BAD": str(tmp_path / "bad.txt")}
    out = tmp_path / "out"
    words = [names.get(word, word) for word in words]
    words = ["--tokenizer", str(tokenizer_folder), "--out", str(out), "--workers=1", *words]
    try:
        code = main(words)
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2 and says in error and error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists()


def test_a_build_locks_its_folder_and_clears_what_a_killed_one_left(tmp_path, text_folder, tokenizer_folder, capsys):
    words = [str(text_folder), "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path), "--workers=1"]
    (tmp_path / "train-00007.tar").write_bytes(b"of a killed build")
    assert main(words) == 2
    assert "holds shards without a manifest" in capsys.readouterr().err
    (tmp_path / ".store").mkdir()
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert main(words) == 2
    assert "another build is writing there" in capsys.readouterr().err and (tmp_path / ".store").exists()
    os.close(handle)
    assert main(words) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["held-00000.tar", "manifest.json", "train-00000.tar"]


def test_shards_are_about_16_mb_without_a_number():
    """The estimate in the plan, against bytes that were really written."""
    from shards.build import Settings, _plan

    settings = Settings(sources=[], tokenizer="", sentences="auto", row_length=128, one_segment=False, masking="token",
                        mask_sets=3, held_out=0, shards=None, seed=0)
    sentences = np.arange(0, 40_000_001, 25)
    store = Store(np.zeros(1, np.uint16), sentences, np.arange(0, len(sentences), 50))
    tasks = _plan(settings, store, np.zeros(len(store.documents) - 1, bool))
    rows = draw_rows(store, np.arange(len(store.documents) - 1), *tasks[0][2:], 128, False,
                     np.random.Generator(np.random.PCG64(0)))
    tokens = (rows.a_end - rows.a_start + rows.b_end - rows.b_start + 3).sum()
    assert 0.7 < tokens * 3.35 / SHARD_BYTES < 1.4  # 2 bytes an id and 3 sets of 15 % of 3 bytes


def test_the_manifest_is_plain_json(built):
    assert json.loads((built / "manifest.json").read_text())["format"] == block.FORMAT
