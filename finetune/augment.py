"""TinyBERT's augmentation (arXiv 1909.10351, Algorithm 1): new rows, in which some words stand for likely or near ones."""

import re
from collections.abc import Callable, Iterator
from functools import partial

import pandas
import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.neighbors import NearestNeighbors
from transformers import AutoModelForMaskedLM

from finetune.data import Pair
from finetune.distill import logits
from pretrain.encoder import longest_row, opened
from shards.block import chance
from shards.tokenizer import auto_tokenizer, open_tokenizer

BATCH = 64  # masked texts in one pass; in float32: in 16 bit the likeliest words would depend on it
GLOVE_WORDS = 100_000  # read of a longer file, the most frequent first: TinyBERT's number
open_mlm: Callable[[str], torch.nn.Module] = partial(opened, AutoModelForMaskedLM, dtype=torch.float32)  # with its head
STOP = ENGLISH_STOP_WORDS | {"did", "does", "doing", "having", "just", "shall"}


def places(pair: Pair, special: list[str]) -> list[list[tuple[str, int, int, str]]]:
    """(text, start, end, word) of the question's and the sentence's words of three or more lower-case letters, not in STOP."""
    pattern = "|".join([*map(re.escape, special), r"[\w'’-]+"])  # a compound is one word, so it stays
    found = [[(text, *match.span(), match[0]) for match in re.finditer(pattern, text)] for text in pair[:2]]
    names = {place[3].lower() for words in found for place in words[1:] if not place[3].islower()}
    return [[place for place in words if len(word := place[3]) > 2 and word.isalpha() and word.islower()
             and word not in STOP and word not in names] for words in found]


def whole_words(name: str) -> dict[int, str]:
    """The pieces of a vocabulary that are words of lower-case letters, by ascending id."""
    pieces = sorted((number, token.lstrip("\u2581\u0120")) for token, number in auto_tokenizer(name).get_vocab().items())
    fit = (vocabulary := open_tokenizer(name)).begins_word & vocabulary.may_replace
    return {number: word for number, word in pieces if fit[number] and word.isalpha() and word.islower()}


@torch.inference_mode()
def likely(model: torch.nn.Module, asked: set[tuple], k: int) -> dict[tuple, list[str]]:
    """The model's k likeliest whole words for each (text, start, end, word) where the word is one piece within its length."""
    tokenizer, words, answers = auto_tokenizer(model.name_or_path), whole_words(model.name_or_path), {}
    mask, single, allowed = tokenizer.mask_token, {*words.values()}, torch.tensor(list(words), device=model.device)
    asked = sorted((one for one in asked if one[3] in single and mask not in one[0]), key=lambda one: (len(one[0]), one))
    for some in (asked[n:n + BATCH] for n in range(0, len(asked), BATCH)):  # read: the text masked, then the text
        batch = tokenizer([f"{text[:start]}{mask}{text[end:]}" for text, start, end, _ in some], [text for text, *_ in some],
                          truncation=True, max_length=longest_row(model.config), padding=True, return_token_type_ids=True,
                          return_tensors="pt").to(model.device)
        rows, at = (batch.input_ids == tokenizer.mask_token_id).nonzero(as_tuple=True)
        with model.base_model.register_forward_hook(  # the head sees the masked positions alone
                lambda _, __, out: type(out)(out.last_hidden_state[rows, at][:, None])):  # noqa: B023
            best = allowed[logits(model, batch)[:, 0, allowed].topk(min(k, len(words))).indices].sort().values
        answers |= {some[n]: [words[number] for number in row] for n, row in zip(rows.tolist(), best.tolist(), strict=True)}
    return answers


def read_glove(path: str) -> pandas.DataFrame:
    """Words and their vectors from a text file, a word and its numbers on each line, as GloVe's are.  ValueError for another."""
    try:  # the lines to skip hold more than the first: words with a space in them, of which glove.840B has some
        table = pandas.read_csv(path, sep=" ", header=None, index_col=0, quoting=3, nrows=GLOVE_WORDS,
                                dtype={0: str}, keep_default_na=False, on_bad_lines="skip").astype("float32")
        if table.shape[1] < 2 or not table.notna().all(axis=None):
            raise ValueError(f"{table.shape[1]} numbers in its first line, and not all of them in all others")
    except (OSError, ValueError) as error:
        raise ValueError(f"glove {path}: {error}; each line must be a word and its numbers, as in glove.6B.300d.txt") from None
    return table[~table.index.duplicated()]


def near(known: pandas.DataFrame, choice: pandas.DataFrame, k: int) -> dict[str, list[str]]:
    """The k words of `choice` nearest to each known one by the cosine of their vectors, without the word itself."""
    nearest = NearestNeighbors(n_neighbors=min(k + 1, len(choice)), metric="cosine").fit(choice.to_numpy())
    best = nearest.kneighbors(known.to_numpy(), return_distance=False) if len(known) else ()
    return {word: [other for other in choice.index[row] if other != word][:k] for word, row in zip(known.index, best)}


def new_rows(pairs: list[Pair], found: list, options: dict[tuple, list[str]], settings, seed: int) -> Iterator[tuple[int, Pair]]:
    """(origin's number, row with its label), each once and none of the given; `found`: each row's places, options: theirs."""
    seen = {pair[:2] for pair in pairs}
    for row, (pair, sides) in enumerate(zip(pairs, found, strict=True)):
        for side, (text, places) in enumerate(zip(pair[:2], sides, strict=True)):
            words = [(*place[1:3], options[place]) for place in places if place in options]
            for draws in chance(seed, row, side).random((settings.augment, len(words), 2)):
                changed = text
                for (start, end, choice), (hit, pick) in reversed([*zip(words, draws, strict=True)]):  # so that starts stay true
                    if hit < settings.augment_p:
                        changed = changed[:start] + choice[int(pick * len(choice))] + changed[end:]
                new = pair._replace(**{Pair._fields[side]: changed})
                if new[:2] not in seen:
                    seen.add(new[:2])
                    yield row, new


def augmented(pairs: list[Pair], teacher: torch.nn.Module, settings, seed: int, mlm: str | None,
              glove: str | None = None) -> tuple:
    """Numbers of origins, new rows with their origins' labels, where the words came from."""
    tokenizer, k = auto_tokenizer(teacher.name_or_path), settings.augment_k
    found = [places(pair, tokenizer.all_special_tokens) for pair in pairs]
    asked = {place for sides in found for words in sides for place in words}
    by_mlm = likely(open_mlm(mlm).to(teacher.device), asked, k) if mlm else {}
    rest = sorted({word for *_, word in asked - by_mlm.keys()})
    if glove:
        table = read_glove(glove)
        known, choice = table[table.index.isin(rest)], table[[word.isalpha() and word.islower() for word in table.index]]
    else:
        table_VD, words = teacher.get_input_embeddings().weight.detach().float().cpu().numpy(), whole_words(teacher.name_or_path)
        means = [table_VD[tokenizer(word, add_special_tokens=False).input_ids].mean(0) for word in rest]  # of a word's pieces
        choice = pandas.DataFrame(table_VD[[*words]], [*words.values()])
        known = pandas.DataFrame(means, rest, choice.columns)
    close = near(known, choice, k)
    by_neighbours = {place: close[place[3]] for place in asked - by_mlm.keys() if close.get(place[3])}
    if not (rows := list(new_rows(pairs, found, by_mlm | by_neighbours, settings, seed))):
        raise ValueError(f"augment={settings.augment}: no word of these rows may be changed; write augment=0")
    return *map(list, zip(*rows, strict=True)), {"words_by_mlm": len(by_mlm), "words_by_neighbours": len(by_neighbours)}
