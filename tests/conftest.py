"""What the tests share: a BERT-like tokenizer and a small corpus, both made here, in a second."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def vocabulary() -> list[str]:
    """About 600 pieces: specials, unused, punctuation, letters, syllables and pairs of them, and ##pieces."""
    rng = np.random.Generator(np.random.PCG64(1))
    pairs = [SYLLABLES[a] + SYLLABLES[b] for a, b in rng.integers(len(SYLLABLES), size=(330, 2))]
    begin = [*LETTERS, *"0123456789", *SYLLABLES, *dict.fromkeys(pairs)]
    inside = [f"##{piece}" for piece in [*LETTERS, *"0123456789", *SYLLABLES]]
    return [*SPECIAL, *(f"[unused{n}]" for n in range(10)), *".,;:!?'\"()-", *begin, *inside]


def save_tokenizer(folder: Path, **tokenizer_settings) -> Path:
    """A WordPiece tokenizer in the layout of a hub folder; `truncation=N` writes it into tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordPiece({t: n for n, t in enumerate(vocabulary())}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    if truncation := tokenizer_settings.pop("truncation", None):
        tokenizer.enable_truncation(truncation)
        tokenizer.enable_padding(length=truncation)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    roles = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512, **roles}
    settings |= tokenizer_settings
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return folder


def generated_documents(count: int = 60, seed: int = 0) -> list[list[str]]:
    """Documents of 1 to 30 sentences of 3 to 25 made-up words."""
    rng = np.random.Generator(np.random.PCG64([seed, count]))
    words = ["".join(rng.choice(SYLLABLES, size=rng.integers(1, 5))) for _ in range(400)]

    def sentence() -> str:
        chosen = rng.choice(words, size=rng.integers(3, 26))
        return f"{' '.join(chosen)} .".capitalize()

    return [[sentence() for _ in range(rng.integers(1, 31))] for _ in range(count)]


def exit_code(main, words: list[str]) -> int:
    """Of a command, run in this process."""
    try:
        return main(words) or 0
    except SystemExit as end:
        return end.code


def documents(source: str, sentences: str = "auto") -> Iterator[list[str]]:
    """Documents of a source as lists of sentences, in its order; empty ones are left out."""
    from shards.corpus import Tally
    from shards.sources import Source

    return filter(None, (form.sentences(units) for form, units in Source.opened(source, sentences).documents(Tally())))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """What AutoTokenizer opens: lower-cased WordPiece, about 600 ids, [PAD] [UNK] [CLS] [SEP] [MASK] = 0 to 4."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """Two text files, 60 documents in all: one sentence a line, blank lines between documents."""
    folder = tmp_path_factory.mktemp("text")
    documents = generated_documents()
    for number, part in enumerate((documents[:40], documents[40:])):
        text = "\n\n".join("\n".join(document) for document in part)
        (folder / f"part-{number}.txt").write_text(text + "\n")
    return folder


@pytest.fixture(scope="session")
def shards_folder(tmp_path_factory, tokenizer_folder, text_folder) -> Path:
    """Three training shards of rows of up to 48 tokens, two mask sets, some documents held out."""
    from shards.build import build

    out = tmp_path_factory.mktemp("data") / "shards"
    build([str(text_folder)], str(tokenizer_folder), out, workers=1, sentences="auto", row_length=48, one_segment=False,
          masking="whole-word", mask_sets=2, held_out=0.05, shards=3, seed=0, dedup=False)
    return out


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, tokenizer_folder) -> Path:
    """A BERT of 4 layers, 24 wide, 12 heads, with random weights large enough that its layers differ."""
    import shutil

    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("hub") / "bert-base-uncased"
    config = BertConfig(vocab_size=len(vocabulary()), hidden_size=24, num_hidden_layers=4, num_attention_heads=12,
                        intermediate_size=48, max_position_embeddings=64, initializer_range=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def one_rank(inputs, tmp_path_factory) -> Path:
    """A straight run of 6 steps on one rank, one student, no dropout, two steps profiled."""
    from runs import SETTINGS, SMALL, launch

    out = tmp_path_factory.mktemp("one") / "run"
    launch(*inputs, "--student", SMALL, "--out", out, *SETTINGS, "profile=2:4")
    return out


@pytest.fixture(scope="session")
def two_ranks_in_pieces(inputs, tmp_path_factory) -> tuple[Path, Path]:
    """The same on two ranks, four micro batches each, ZeRO-1 -> (the run, its engine file)."""
    from runs import SETTINGS, SMALL, launch

    out = tmp_path_factory.mktemp("pieces") / "run"
    engine = out.with_name("engine.json")
    engine.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}))
    launch(*inputs, "--student", SMALL, "--out", out, *SETTINGS, "save_every=2", "--engine", engine, ranks=2, form="deepspeed")
    return out, engine


@pytest.fixture(scope="session")
def inputs(shards_folder, teacher_folder) -> list[str]:
    """The options that every run of general distillation needs here."""
    return ["--shards", str(shards_folder), "--teacher", str(teacher_folder), "--teacher-dtype", "fp32"]


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """Two hosts on one switch, h1 and h2."""
    from hosts import Hosts, lacking

    if why := lacking():
        pytest.skip(why)
    with Hosts(tmp_path_factory.mktemp("hosts") / "etc", 2) as made:
        yield made
