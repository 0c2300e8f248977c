"""Whole builds: the same bytes from any number of workers, what is held out stays out, and what bad input is told."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import shards.build
from shards import block, look
from shards.pairs import cut_documents, draw_rows
from shards.store import SHARD_BYTES, Store, held_out_documents, plan
from shards.tokenizer import open_tokenizer
from tests.conftest import exit_code, generated_documents, save_tokenizer

main, look_at = partial(exit_code, shards.build.main), partial(exit_code, look.main)


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


EVERY = np.ones(2000, bool)


def sums(manifest):
    return [shard.sha256 for shard in manifest.shards + manifest.held_out]


def files(out):
    """sha256 of every file of a finished build."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def test_any_number_of_workers_and_processes_writes_the_same_bytes(built, tmp_path, text_folder, tokenizer_folder):
    """Three workers; two processes at once, ranks of a launcher as it happens."""
    words = [str(text_folder), "--tokenizer", str(tokenizer_folder), "--shards=4", "--held-out=0.1", "--row-length=64"]
    code = "import sys, shards.store, shards.build; shards.store.PIECE_CHARS = 2000; shards.build.main(sys.argv[1:])"
    ranks = [subprocess.Popen([sys.executable, "-c", code, *words, "--workers=1", "--out", str(tmp_path / "ranks"),
                               f"--local_rank={rank}"], env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"})
             for rank in range(2)]
    three = [sys.executable, "-m", "shards.build", *words, "--workers=3", "--out", str(tmp_path / "three")]
    assert subprocess.run(three, capture_output=True, check=False).returncode == 0
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert files(tmp_path / "three") == files(tmp_path / "ranks") == files(built)
    assert len(block.read_manifest(built).shards) == 4 and {"manifest.json", "vocabulary.npy"} < files(built).keys()


def test_another_seed_gives_other_rows(built, tmp_path, text_folder, tokenizer_folder):
    other = build(tmp_path, text_folder, tokenizer=tokenizer_folder, shards=4, held_out=0.1, row_length=64, seed=1)
    assert not set(sums(other)) & set(sums(block.read_manifest(built)))


def test_the_manifest_states_what_came_out(built):
    manifest = block.read_manifest(built)
    whole = block.Block.joined([block.read_shard(built, shard) for shard in manifest.shards])
    counts = manifest.counts
    assert manifest.rows == len(whole.lengths) and manifest.tokens == len(whole.ids)
    assert counts["documents"] == 60 and counts["held_out_documents"] == held_out_documents(EVERY[:60], 0.1, 0).sum() >= 1
    assert counts["random_next"] == whole.is_random.mean()
    assert counts["masked"] == len(whole.mask_ids) / 3 / len(whole.ids)
    assert counts["mean_length"] == whole.lengths.mean()
    assert counts["random_of_one"] == 1 and 0.4 < counts["random_of_several"] < 0.6
    assert counts["sources"] == [{"name": str(manifest.settings["sources"][0]["name"]), "weight": 1.0, "share": 1.0}]
    assert whole.lengths.max() <= 64 and 0.12 < counts["masked"] < 0.16
    assert manifest.tokenizer["vocab_size"] > whole.ids.max() and manifest.settings["seed"] == 0


def test_a_vocabulary_file_says_what_ids_are(built, tokenizer_folder):
    manifest, data = block.read_manifest(built), (built / "vocabulary.npy").read_bytes()
    flags, vocabulary = np.load(built / "vocabulary.npy"), open_tokenizer(str(tokenizer_folder))
    assert hashlib.sha256(data).hexdigest() == manifest.vocabulary and len(flags) == vocabulary.size
    for bit, expected in ((1, vocabulary.special), (2, vocabulary.begins_word), (4, vocabulary.may_replace)):
        assert ((flags & bit > 0) == expected).all()


def test_weights_repeat_and_thin_sources(tmp_path, tokenizer_folder):
    for number, count in enumerate((80, 50, 200)):
        text = "\n\n".join("\n".join(document) for document in generated_documents(count, seed=number))
        (tmp_path / f"{number}.txt").write_text(text)
    manifest = build(tmp_path / "out", tmp_path / "0.txt", f"{tmp_path}/1.txt=2.5", f"{tmp_path}/2.txt=0.25",
                     tokenizer=tokenizer_folder, held_out=0)
    store = {}
    for number, weight in enumerate((1, 2.5, 0.25)):
        alone = build(tmp_path / f"alone-{number}", tmp_path / f"{number}.txt", tokenizer=tokenizer_folder, held_out=0)
        store[number] = weight * alone.counts["tokens"]
    counts = manifest.counts
    assert [source["weight"] for source in counts["sources"]] == [1, 2.5, 0.25]
    assert counts["documents"] + counts["dropped_thinned"] == 330 and 120 < counts["dropped_thinned"] < 180
    for number, source in enumerate(counts["sources"]):
        assert source["share"] == pytest.approx(store[number] / sum(store.values()), abs=0.05)
    once = build(tmp_path / "once", f"{tmp_path}/0.txt=2", tmp_path / "1.txt", tokenizer=tokenizer_folder, held_out=0)
    twice = [2 * store[0], store[1] / 2.5]
    assert [source["share"] for source in once.counts["sources"]] == [tokens / sum(twice) for tokens in twice]
    assert manifest.tokens == pytest.approx(1.25 * sum(store.values()), rel=0.15)


def test_dedup_drops_documents_whose_normalized_text_was_seen(tmp_path, tokenizer_folder):
    documents = generated_documents(30)
    text = "\n\n".join("\n".join(document) for document in documents)
    (tmp_path / "a.txt").write_text(text)
    again = "\n\n".join("  ".join(document).upper() for document in documents[:12])  # other case, spacing, lines
    (tmp_path / "b.txt").write_text(again + "\n\nA new one . It is short .\n\nA new one . It is short .\n")
    both = [tmp_path / "a.txt", tmp_path / "b.txt"]
    manifest = build(tmp_path / "dedup", *both, tokenizer=tokenizer_folder, sentences="lines", dedup=True)
    assert manifest.counts["dropped_duplicate"] == 13 and manifest.counts["documents"] == 31
    assert manifest.counts["sources"][1]["share"] < 0.1
    every = build(tmp_path / "every", *both, tokenizer=tokenizer_folder, sentences="lines")
    assert "dropped_duplicate" not in every.counts and every.counts["documents"] == 44


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
    is_held = held_out_documents(EVERY[:60], 0.1, 0)
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
    held = held_out_documents(EVERY[:count], share, 7)
    assert len(held) == count and least <= held.sum() <= max(1, 3 * share * count)
    if share * count > 5:  # more documents change nothing for those before
        assert (held_out_documents(EVERY[:count + 50], share, 7)[:count] == held).all()
    there = np.arange(count) % 2 == 0
    assert not (held_out_documents(there, share, 7) & ~there).any()


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
    assert look_at([str(built), "--verify"]) == 0
    assert "OK: " in capsys.readouterr().out
    path = built / "train-00002.tar"
    data = path.read_bytes()
    try:
        path.unlink() if damage is None else path.write_bytes(damage(data))
        assert look_at([str(built), "--verify"]) == 1
        error = capsys.readouterr().err
        assert "train-00002.tar" in error and says in error and error.count("\n") == 1
    finally:
        path.write_bytes(data)


def test_look_shows_a_row_as_text(built, capsys, tokenizer_folder, tmp_path):
    assert look_at([str(built), "--row", "train-00001:3"]) == 0
    shown = capsys.readouterr().out
    text, *sets = ["".join(shown.splitlines()[1:3]), *shown.splitlines()[3:]]
    assert text.count("[SEP]") == 2 and "[MASK]" not in text and ("B follows A" in shown or "random B" in shown)
    assert len({line[8:] for line in sets}) == 3 and all("[CLS]" in line and "[MASK]" in line for line in sets)
    other = save_tokenizer(tmp_path, tokenizer_class="PreTrainedTokenizerFast", mask_token="[unused1]")
    for words, says in ((["--row", "train-00001:99999"], "give SHARD:N, such as train-00000:0 to train-00000:"),
                        (["--row", "train-00001:0", "--tokenizer", str(other)], "not the one of these shards")):
        assert look_at([str(built), *words]) == 1
        assert says in capsys.readouterr().err


def test_look_finds_rows_far_into_a_large_shard(tmp_path, tokenizer_folder, capsys):
    text = "\n\n".join("\n".join(document) for document in generated_documents(160))
    (tmp_path / "a.txt").write_text(text)
    manifest = build(tmp_path / "out", tmp_path / "a.txt", tokenizer=tokenizer_folder)
    assert manifest.tokens > 2**16  # lengths are uint16: sums of them must not be
    assert look_at([str(tmp_path / "out"), "--row", f"train-00000:{manifest.rows - 1}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("[CLS]") == 4 and "\nset 0   " in shown


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


def test_bad_records_are_skipped_counted_and_named(tmp_path, tokenizer_folder, capsys):
    good = "\n\n".join("\n".join(document) for document in generated_documents(8)).encode()
    (tmp_path / "a.txt").write_bytes(good + b"\n\nA bad \xff line .\nA good one .\n")
    words = [str(tmp_path / "a.txt"), "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "out"), "--workers=1"]
    assert main(words) == 2
    assert "0xff" in (error := capsys.readouterr().err) and "--on-error skip" in error
    assert main([*words, "--on-error=skip"]) == 0
    counts = block.read_manifest(tmp_path / "out").counts
    assert counts["bad_records"] == 1 and counts["documents"] == 9
    assert len(counts["bad"]) == 1 and f"{tmp_path}/a.txt: line " in counts["bad"][0]
    shown = capsys.readouterr().out
    assert "bad records: 1" in shown and f"left out: {counts['bad'][0]}" in shown


ERRORS = [
    (["SOURCE", "--row-length=4"], "--row-length 4: must be between 8 and 8,192"),
    (["SOURCE", "--held-out=1"], "--held-out 1.0: must be between 0 and 0.9"),
    (["SOURCE", "--mask-sets=0"], "--mask-sets 0: must be between 1"),
    (["SOURCE", "--workers=0"], "--workers 0: must be between 1"),
    (["SOURCE", "--seed=-1"], "--seed -1: must be between 0"),
    (["SOURCE", "--shards=1000"], "--shards 1000: the documents fill at most"),
    (["SOURCE", "--rows=1"], "unrecognized arguments: --rows=1"),
    (["SOURCE", "SOURCE"], "given more than once; name it once"),
    (["SOURCE", "--tokenizer=./nothing"], "no such folder; give a folder that holds tokenizer.json"),
    (["ONE"], "to train on: 1, but random second segments need two at least; give more text, or --one-segment"),
    (["BAD"], " 3,001"),  # its line
]


@pytest.mark.parametrize("words, says", ERRORS, ids=[says[:30] for _, says in ERRORS])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, text_folder, tokenizer_folder, capsys, words, says):
    (tmp_path / "one.txt").write_text("A sentence.\nAnother one.\n")
    (tmp_path / "bad.txt").write_bytes(b"A sentence.\n" * 3000 + b"\xff\n")
    names = {"SOURCE": str(text_folder), "ONE": str(tmp_path / "one.txt"), "BAD": str(tmp_path / "bad.txt")}
    out = tmp_path / "out"
    words = [names.get(word, word) for word in words]
    words = ["--tokenizer", str(tokenizer_folder), "--out", str(out), "--workers=1", *words]
    code = main(words)
    error = capsys.readouterr().err
    assert code == 2 and says in error and error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists()


def test_a_folder_of_another_build_is_refused_and_one_of_this_is_shared(tmp_path, text_folder, tokenizer_folder, capsys,
                                                                        monkeypatch):
    words = [str(text_folder), "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path), "--workers=1"]
    (tmp_path / "train-00007.tar").write_bytes(b"of another program")
    assert main(words) == 2
    assert "holds shards without a manifest" in capsys.readouterr().err
    (tmp_path / "train-00007.tar").unlink()
    with monkeypatch.context() as patched:
        patched.setattr("shards.build._make_shard", lambda *task: open(tmp_path / "nothing"))
        assert main(words) == 2
    assert "No such file" in capsys.readouterr().err
    for _ in range(2):  # what is refused leaves the other's store
        assert main([*words, "--seed=1"]) == 2
        error = capsys.readouterr().err
        assert "seed: 0 there, 1 here" in error and f"remove {tmp_path}/.store" in error
    with open(tmp_path / ".store" / "settings.json", "rb") as alive:
        fcntl.flock(alive, fcntl.LOCK_SH)  # as another process that shares the work
        assert main(words) == 0 and main(words) == 0
        assert "already built" in capsys.readouterr().out and (tmp_path / ".store").exists()
    assert main(words) == 0  # and so is what a build leaves that was killed after its manifest
    assert sorted(files(tmp_path)) == ["held-00000.tar", "manifest.json", "train-00000.tar", "vocabulary.npy"]


def test_of_two_builds_that_begin_at_once_with_other_settings_one_is_refused(tmp_path, text_folder, tokenizer_folder, capsys,
                                                                             monkeypatch):
    seen = []

    def look(out, settings, look=shards.build._is_built):
        seen.append(look(out, settings))
        if len(seen) == 1:  # now the other one begins
            (out / ".store").mkdir(parents=True)
            block.write_json(out / ".store" / "settings.json", vars(settings) | {"seed": 7})
        return seen[-1]

    monkeypatch.setattr("shards.build._is_built", look)
    assert main([str(text_folder), "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "out"), "--workers=1"]) == 2
    assert "seed: 7 there, 0 here" in capsys.readouterr().err and (tmp_path / "out" / ".store" / "settings.json").exists()


def test_a_piece_that_went_with_its_join_is_not_made_again(tmp_path):
    (tmp_path / "locks").mkdir()
    make = partial(shards.build._make, tmp_path, tmp_path / "plan.json", lambda file: None)
    assert make(tmp_path / "0.npz") is True
    (tmp_path / "plan.json").touch()
    assert make(tmp_path / "0.npz") is None


def test_shards_are_about_16_mb_without_a_number():
    """The estimate in the plan, against rows that were really drawn."""
    settings = SimpleNamespace(row_length=128, one_segment=False, mask_sets=3, shards=None)
    sentences, documents = np.arange(0, 40_000_001, 25), np.arange(0, 1_600_001, 50)
    store = Store(np.zeros(1, np.uint16), sentences, documents, documents)
    first, last = plan(settings, np.diff(sentences[documents]), np.zeros(0, int), 2)["train-00000"]
    rng = np.random.Generator(np.random.PCG64(0))
    spans, _ = draw_rows(store, cut_documents(store, first, last, 125, False, rng), 125, rng)
    tokens = (spans[1] - spans[0] + spans[3] - spans[2] + 3).sum()
    assert 0.7 < tokens * 3.35 / SHARD_BYTES < 1.4  # 2 bytes an id and 3 sets of 15 % of 3 bytes


def test_every_planned_shard_has_documents_of_its_kind():
    """Whatever stands before, between and behind them in the store."""
    rng = np.random.Generator(np.random.PCG64(0))
    settings = SimpleNamespace(one_segment=False, mask_sets=3, shards=4)
    for _ in range(200):
        of_train, tokens = rng.random(40) < rng.random(), rng.integers(1, 10 ** rng.integers(1, 6), 40)
        train, held = tokens * of_train, tokens * ~of_train
        if of_train.sum() < 4 or train.max() > train.sum() // 5:
            continue
        for name, (first, last) in plan(settings, train, held, 2).items():
            assert (train if name.startswith("train") else held)[first:last].any()


def test_the_manifest_is_plain_json(built):
    assert json.loads((built / "manifest.json").read_text())["format"] == block.FORMAT


def test_a_process_that_comes_as_the_others_end_takes_their_shards(built, text_folder, tokenizer_folder, monkeypatch, capsys):
    """The store is removed before the process has a hold on it, once with the manifest there and once without."""
    import shards.build as module

    out, share, times = built.with_name("raced"), module._share, []

    def raced(folder, *rest):
        times.append(folder)
        if len(times) < 3:
            if len(times) == 2:
                share(folder, *rest)
            open(folder / ".store/locks/settings.json", "ab")  # of a store that is gone
        return share(folder, *rest)

    monkeypatch.setattr(module, "_share", raced)
    words = [str(text_folder), "--tokenizer", str(tokenizer_folder), "--shards=4", "--held-out=0.1", "--row-length=64"]
    assert main([*words, "--workers=1", "--out", str(out)]) == 0 and len(times) == 2, capsys.readouterr().err
    assert not (out / ".store").exists() and (out / "manifest.json").exists()
