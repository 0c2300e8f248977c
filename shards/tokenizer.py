"""The vocabulary of a build: what rows need to know of a tokenizer, and a fingerprint that two folders can share."""

import hashlib
import json
import re
import string
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors

# Changing a letter here changes every fingerprint: case, accents, digits, punctuation, other scripts, odd spacing.
PROBE = "The Quick brown-fox can't  pay 1,234.50 for naïve café — unbelievably! ありがとう Привет 😀 [x]\tEnd."
# Pieces without a text of their own: spare ones of BERT, T5 and fairseq, and SentencePiece's single bytes.
UNUSED = re.compile(r"[\[<](unused_?|extra_id_)\d+[\]>]|madeupword\d+|<0x[0-9A-F]{2}>")
ROLES = ("pad", "cls", "sep", "mask")


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """A fast tokenizer as workers take it: text to rebuild it from, and one bool an id for each property."""
    name: str  # as it was given: a folder, a SentencePiece file or a hub name
    json: str = field(repr=False)  # for tokenizers.Tokenizer.from_str; truncation and padding are off, all but `unk` special
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

    def stated(self) -> dict:
        """What the manifest says of the tokenizer."""
        return {key: getattr(self, key) for key in ("fingerprint", "name", *ROLES)} | {"vocab_size": self.size}


def _fast(slow):
    """The fast form of a Python tokenizer over a SentencePiece model.  ValueError where a probe gets other ids."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SentencePieceExtractor, SpmConverter
    extractor = SentencePieceExtractor(slow.vocab_file)
    pieces, trained, rules = extractor.proto.pieces, extractor.proto.trainer_spec, extractor.proto.normalizer_spec
    if trained.model_type not in (trained.UNIGRAM, trained.BPE):
        raise ValueError("its SentencePiece model has words or characters, not unigram or BPE pieces")
    model = extractor.extract(None)
    backend = SpmConverter.build_tokenizer_from_spm_proto(extractor.proto, model["vocab"], model.get("merges"))
    steps = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    blanks = {"^ +| +$": "", " {2,}": " "} if rules.remove_extra_whitespaces else {}
    steps += [normalizers.Replace(Regex(old), new) for old, new in (blanks | {" ": "\u2581"}).items()]
    steps += [normalizers.Prepend("\u2581")] if rules.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence(steps)
    own, control = ([piece.piece for piece in pieces if piece.type == kind] for kind in (4, 3))  # a user's; <s> and such
    if own:  # what a user defined is cut out of the text first, then found whole
        longest_first = sorted(map(re.escape, own), key=len, reverse=True)
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(longest_first)), "isolated")
    if own and trained.model_type == trained.BPE:
        backend.model.ignore_merges = True
    after = slow.convert_ids_to_tokens(range(len(pieces), len(slow)))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (*control, *after)])
    for text in (PROBE, f"  {' a'.join(own)}{''.join(own)}b {PROBE.lower()} "):
        ours, its = backend.encode(text).ids, slow.encode(text, add_special_tokens=False)
        gap = sum(pieces[number].score for number in ours) - sum(pieces[number].score for number in its)
        if ours != its and (trained.model_type == trained.BPE or abs(gap) > 1e-3):  # else a tie: SentencePiece adds in float32
            raise ValueError("its SentencePiece model has no fast form with the same ids")
    if slow.cls_token and slow.sep_token:
        sep, cls = (slow.sep_token, slow.sep_token_id), (slow.cls_token, slow.cls_token_id)
        backend.post_processor = processors.BertProcessing(sep, cls)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **slow.special_tokens_map)


def plain(tokenizer):
    """The same tokenizer without stored truncation and padding (all-MiniLM-L6-v2's: 128), so that it saves none either."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for key in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)  # what other programs left in tokenizer_config.json
    return tokenizer


def auto_tokenizer(name: str):
    """The fast transformers tokenizer, plain, of a folder or SentencePiece file (never over the network) or a hub name."""
    path = Path(name).expanduser()
    here, is_file = path.exists(), path.suffix == ".model"
    instead = "give a folder that holds tokenizer.json, a SentencePiece FILE.model, or a hub name such as bert-base-uncased"
    if path.is_file() != is_file or not here and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise ValueError(f"tokenizer {name}: no such {'file' if is_file else 'folder'}; {instead}")
    from transformers import AutoTokenizer  # here, because it loads torch
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
    stored = [path] if is_file else [*path.glob("*.model"), *path.glob("tokenizer.json"), *path.glob("vocab.*")]
    bare = [file.suffix for file in stored] == [".model"]
    try:
        with suppress(Exception if bare else ()):
            tokenizer = AutoTokenizer.from_pretrained(str(path) if here else name, local_files_only=here)
            # a class that reads other files (BertTokenizer) knows five tokens; the general one loses the first space
            reads = tokenizer.vocab_files_names.get("vocab_file")
            bare = bare and (reads != stored[0].name or type(tokenizer).__name__ == "TokenizersBackend")
        if bare:  # the roles that have no piece get the ids after the last one
            tokenizer = SentencePieceBackend(vocab_file=str(stored[0]))
            known, model = tokenizer.get_vocab(), tokenizer.sp_model
            roles = {f"{role}_token": f"<{role}>" if f"<{role}>" in known else f"[{role.upper()}]" for role in ROLES}
            tokenizer.add_special_tokens(roles | {"unk_token": model.id_to_piece(model.unk_id())})
        return plain(tokenizer if tokenizer.is_fast else _fast(tokenizer))
    except Exception as error:  # transformers lets errors of a dozen types through, most with many lines
        reason = str(error).strip().split("\n")[0][:200]
        wrong = "holds no tokenizer" if here else "no such folder, nor a hub name that can be reached"
        raise ValueError(f"tokenizer {name}: {wrong} ({type(error).__name__}: {reason}); {instead}") from error


def fingerprint(tokenizer) -> str:
    """sha256 of what a fast tokenizer, which it makes plain, does: (id, token) pairs, special ids, the ids of a fixed text."""
    probe = plain(tokenizer).backend_tokenizer.encode(PROBE, add_special_tokens=False).ids
    pairs = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    roles = {role: getattr(tokenizer, f"{role}_token_id") for role in ROLES}
    return hashlib.sha256(json.dumps([pairs, roles, probe]).encode()).hexdigest()


def open_tokenizer(name: str) -> Vocabulary:
    """Open a folder, SentencePiece file or hub name.  ValueError, one line, says what to give instead."""
    tokenizer = auto_tokenizer(str(name))
    backend, roles = tokenizer.backend_tokenizer, {role: getattr(tokenizer, f"{role}_token_id") for role in ROLES}
    if missing := [role for role, number in roles.items() if number is None]:
        raise ValueError(f"tokenizer {name}: no {' and no '.join(missing)} token; name one in its "
                         f"tokenizer_config.json ({json.dumps(missing[0] + '_token')}), or give a BERT-like tokenizer")
    tokens = [backend.id_to_token(number) or "" for number in range(max(tokenizer.get_vocab().values()) + 1)]
    special = np.isin(np.arange(len(tokens)), [n for n, added in backend.get_added_tokens_decoder().items() if added.special])
    model = json.loads(backend.to_str())
    for token in model["added_tokens"]:
        token["special"] = token["content"] != tokenizer.unk_token  # what a text itself says is text, but for the unknown token
    if (model["pre_tokenizer"] or {}).get("type") == "ByteLevel":
        model["pre_tokenizer"]["add_prefix_space"] = True  # sentences are laid end to end: a word begins each
    if prefix := model["model"].get("continuing_subword_prefix"):  # WordPiece marks what continues a word,
        begins = np.array([not token.startswith(prefix) for token in tokens])
    else:  # SentencePiece and byte-level BPE what begins one; so does punctuation alone, as in BERT, but no digits or bytes
        begins = np.array(max(([token.startswith(mark) for token in tokens] for mark in "\u2581\u0120"), key=sum))
        alone = [set(token) <= set(string.punctuation) for token in tokens]
        begins = begins | alone if begins.any() else ~begins  # whole words bear no mark
    in_use = np.array([bool(token) and not UNUSED.fullmatch(token) for token in tokens])
    return Vocabulary(
        name=str(name), json=json.dumps(model), size=len(tokens), **roles, unk=tokenizer.unk_token,
        fingerprint=fingerprint(tokenizer), special=special, begins_word=begins | special, may_replace=in_use & ~special)
