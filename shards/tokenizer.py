"""The vocabulary of a build: what rows need to know of a tokenizer, and a fingerprint that two folders can share."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

# Changing a letter here changes every fingerprint: case, accents, digits, punctuation, other scripts, odd spacing.
PROBE = "The Quick brown-fox can't  pay 1,234.50 for naïve café — unbelievably! ありがとう Привет 😀 [x]\tEnd."
UNUSED = re.compile(r"[\[<]unused_?\d+[\]>]")
ROLES = ("pad", "cls", "sep", "mask")


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """A fast tokenizer as workers take it: text to rebuild it from, and one bool an id for each property."""

    name: str  # as it was given: a folder or a hub name
    json: str = field(repr=False)  # for tokenizers.Tokenizer.from_str; truncation and padding are off
    size: int  # ids are below this
    pad: int
    cls: int
    sep: int
    mask: int
    unk: str | None  # the token that WikiText's <unk> stands for
    fingerprint: str  # sha256, see fingerprint()
    special: np.ndarray = field(repr=False)  # bool, `size`: never masked, never drawn
    begins_word: np.ndarray = field(repr=False)  # bool, `size`: False where a token continues the word before it
    may_replace: np.ndarray = field(repr=False)  # bool, `size`: may stand in for a masked token


def _backend(tokenizer) -> Tokenizer:
    """A copy of the Rust tokenizer behind a transformers tokenizer that neither cuts nor pads."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer {tokenizer.name_or_path}: only a slow (Python) form; save the fast one as "
                         "tokenizer.json (AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(DIR))")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()  # all-MiniLM-L6-v2's tokenizer.json cuts and pads to 128
    backend.no_padding()
    return backend


def _role_ids(tokenizer) -> dict[str, int | None]:
    return {role: getattr(tokenizer, f"{role}_token_id") for role in ROLES}


def fingerprint(tokenizer) -> str:
    """sha256 of what a tokenizer does: (id, token) pairs, special ids, the ids of a fixed text.

    `tokenizer` is an opened fast transformers tokenizer; its name, folder, truncation and padding do not count.
    """
    backend, roles = _backend(tokenizer), _role_ids(tokenizer)
    pairs = sorted((number, token) for token, number in backend.get_vocab(with_added_tokens=True).items())
    probe = backend.encode(PROBE, add_special_tokens=False).ids
    return hashlib.sha256(json.dumps([pairs, roles, probe]).encode()).hexdigest()


def _begins_word(tokens: list[str], model: dict) -> np.ndarray:
    """bool a token: WordPiece marks what continues (##), SentencePiece and byte-level BPE what begins."""
    prefix = model.get("continuing_subword_prefix")
    if prefix:
        return np.array([not token.startswith(prefix) for token in tokens])
    begins = [np.array([token.startswith(mark) for token in tokens]) for mark in "\u2581\u0120"]
    best = max(begins, key=np.sum)
    return best if best.any() else np.ones(len(tokens), bool)  # a vocabulary of whole words marks nothing


def plain(tokenizer):
    """The same tokenizer without stored truncation and padding (all-MiniLM-L6-v2's: 128), so that it saves none either."""
    if getattr(tokenizer, "is_fast", False):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    for key in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)  # what other programs left in tokenizer_config.json
    return tokenizer


def auto_tokenizer(name: str):
    """The transformers tokenizer of a folder (never over the network) or of a hub name, plain."""
    folder = Path(name).expanduser()
    if not folder.is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1 or folder.exists()):
        raise ValueError(f"tokenizer {name}: no such folder; give a folder that holds tokenizer.json, "
                         "or a hub name such as bert-base-uncased")
    from transformers import AutoTokenizer  # here, because it loads torch

    try:
        if folder.is_dir():
            return plain(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
        return plain(AutoTokenizer.from_pretrained(name))
    except Exception as error:  # transformers lets errors of a dozen types through, most with many lines
        reason = str(error).strip().split("\n")[0][:200]
        wrong = "holds no tokenizer" if folder.is_dir() else "no such folder, nor a hub name that can be reached"
        raise ValueError(f"tokenizer {name}: {wrong} ({type(error).__name__}: {reason}); give a folder that holds "
                         "tokenizer.json, or a hub name such as bert-base-uncased") from error


def open_tokenizer(name: str) -> Vocabulary:
    """Open a folder or hub name through AutoTokenizer.  ValueError, one line, says what to give instead."""
    tokenizer = auto_tokenizer(str(name))
    backend, roles = _backend(tokenizer), _role_ids(tokenizer)
    missing = [role for role, number in roles.items() if number is None]
    if missing:
        raise ValueError(f"tokenizer {name}: no {' and no '.join(missing)} token; name one in its "
                         f"tokenizer_config.json ({json.dumps(missing[0] + '_token')}), or give a BERT-like tokenizer")
    vocabulary = backend.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values()) + 1
    tokens = [""] * size
    for token, number in vocabulary.items():
        tokens[number] = token
    special = np.zeros(size, bool)
    special[[n for n in tokenizer.all_special_ids if n < size]] = True
    special[[n for n, added in backend.get_added_tokens_decoder().items() if added.special]] = True
    model = json.loads(backend.to_str())
    if (model["pre_tokenizer"] or {}).get("type") == "ByteLevel":
        model["pre_tokenizer"]["add_prefix_space"] = True  # sentences are laid end to end: a word begins each
    return Vocabulary(
        name=str(name), json=json.dumps(model), size=size, **roles, unk=tokenizer.unk_token,
        fingerprint=fingerprint(tokenizer), special=special,
        begins_word=_begins_word(tokens, model["model"]) | special,
        may_replace=~special & np.array([bool(token) and not UNUSED.fullmatch(token) for token in tokens]),
    )
