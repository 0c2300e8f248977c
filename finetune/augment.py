"""TinyBERT's augmentation (arXiv 1909.10351, Algorithm 1): new rows, in which some words stand for likely or near ones.

Changed are words of three or more lower-case letters and nothing else, so that numbers, names (a capital letter), compounds
and special tokens stay; but none in STOP, and none that is, with a capital, a name elsewhere in its row."""

import csv
import re
from collections.abc import Iterator

import numpy as np
import pandas
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModelForMaskedLM
from transformers.modeling_outputs import BaseModelOutput

from finetune.data import Pair
from finetune.distill import from_file, logits
from pretrain.encoder import longest_row
from shards.tokenizer import auto_tokenizer, open_tokenizer

GLOVE_WORDS = 100_000  # read of a file that has more, the most frequent first: TinyBERT's number
BATCH, POOL = 64, 1_000  # masked texts in one pass; words compared with all others at a time
STOP = frozenset("""about above after again against all also among and any are because been before being below between both but
can cannot could did does doing down during each either few for from further had has have having her here hers him himself his how
into its itself just many may might more most much must myself neither nor not now off once one only other our ours out over own
same shall she should some such than that the their them themselves then there these they this those through too under until upon
very was were what when where whether which while who whom whose why will with within without would you your yours""".split())


def places(pair: Pair, special: list[str]) -> list[list[tuple[str, int, int, str]]]:
    """(text, start, end, word) of every word that may change: of the question's, of the sentence's."""
    pattern = "|".join([*map(re.escape, special), r"[\w'’-]+"])
    found = [[(text, *match.span(), match[0]) for match in re.finditer(pattern, text)] for text in pair[:2]]
    left = STOP.union(place[3].lower() for words in found for place in words[1:] if not place[3].islower())
    return [[place for place in words if len(word := place[3]) > 2 and word.isalpha() and word.islower() and word not in left]
            for words in found]


def whole_words(name: str) -> dict[int, str]:
    """The pieces of a vocabulary that are words of lower-case letters, by ascending id."""
    vocabulary, ids = open_tokenizer(name), auto_tokenizer(name).get_vocab()
    fit = vocabulary.begins_word & vocabulary.may_replace
    words = [(ids[token], token.lstrip("\u2581\u0120")) for token in sorted(ids, key=ids.get) if fit[ids[token]]]
    return {number: word for number, word in words if word.isalpha() and word.islower()}


def open_mlm(name: str) -> nn.Module:
    """A masked language model in eval mode, float32: in 16 bit the likeliest words would depend on the batch."""
    model, info = from_file(AutoModelForMaskedLM, name, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"mlm {name}: its file has no masked-LM head ({missing[0]} is missing), and a random one would say "
                         "random words; give a model that was saved with its head, or leave --mlm out")
    return model.eval()


@torch.inference_mode()
def likely(model: nn.Module, name: str, asked: set[tuple], k: int) -> dict[tuple[str, int], list[str]]:
    """The model's k likeliest whole words for each (text, start, end, word) where the word is one piece, by (text, start).

    It reads the text with that word masked, then the text as it is (so the reference); a word behind its length has no answer."""
    tokenizer, words, answers = auto_tokenizer(name), whole_words(name), {}
    mask, single, allowed = tokenizer.mask_token, {*words.values()}, torch.tensor(list(words), device=model.device)
    asked = sorted((one for one in asked if one[3] in single and mask not in one[0]), key=lambda one: (len(one[0]), one))
    for some in (asked[n:n + BATCH] for n in range(0, len(asked), BATCH)):
        batch = tokenizer([f"{text[:start]}{mask}{text[end:]}" for text, start, end, _ in some], [text for text, *_ in some],
                          truncation=True, max_length=longest_row(model.config), padding=True, return_token_type_ids=True,
                          return_tensors="pt").to(model.device)
        rows, at = (batch.input_ids == tokenizer.mask_token_id).nonzero(as_tuple=True)
        hook = model.base_model.register_forward_hook(  # the head sees the masked positions alone
            lambda _, __, out: BaseModelOutput(out.last_hidden_state[rows, at][:, None]))  # noqa: B023
        best = allowed[logits(model, batch)[:, 0, allowed].topk(min(k, len(words))).indices].sort().values
        hook.remove()
        answers |= {some[n][:2]: [words[number] for number in row] for n, row in zip(rows.tolist(), best.tolist(), strict=True)}
    return answers


def read_glove(path: str) -> dict[str, Tensor]:
    """The vector (width,) float32 of each word of a text file whose lines are a word and its numbers."""
    try:
        table = pandas.read_csv(path, sep=" ", header=None, index_col=0, quoting=csv.QUOTE_NONE, nrows=GLOVE_WORDS,
                                dtype={0: str}, keep_default_na=False, skip_blank_lines=False)
        vectors = table.apply(pandas.to_numeric, errors="coerce").to_numpy(np.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"glove {path}: {error}; each line must be a word and its numbers") from None
    if not vectors.size or not np.isfinite(vectors).all():
        line = 1 + int(np.isfinite(vectors).all(1).argmin())
        raise ValueError(f"glove {path}, line {line}: each line must be a word and as many numbers as the first line has")
    return dict(zip(table.index, torch.tensor(vectors), strict=True))


def near(known: dict[str, Tensor], choice: dict[str, Tensor], k: int) -> dict[str, list[str]]:
    """The k words of `choice` nearest to each known one by the cosine of vectors (width,), without the word itself."""
    wanted, words, answers, table_VD = list(known), list(choice), {}, normalize(torch.stack(list(choice.values())))
    for some in (wanted[n:n + POOL] for n in range(0, len(wanted), POOL)):
        best = (normalize(torch.stack([known[word] for word in some])) @ table_VD.T).topk(min(k + 1, len(words))).indices
        answers |= {word: [words[n] for n in row if words[n] != word][:k] for word, row in zip(some, best.tolist(), strict=True)}
    return answers


def new_rows(pairs: list[Pair], options: list[tuple], settings, seed: int) -> Iterator[tuple[int, Pair]]:
    """(number of the origin, row with its origin's label), each once and none of the given ones.

    A text's draws are its own, from (seed, row, text): they depend on no batch.  Options: (start, end, words) by row, text."""
    seen = {pair[:2] for pair in pairs}
    for row, (pair, sides) in enumerate(zip(pairs, options, strict=True)):
        for side, (text, words) in enumerate(zip(pair[:2], sides, strict=True)):
            for draws in np.random.Generator(np.random.PCG64([seed, row, side])).random((settings.augment, len(words), 2)):
                parts, done = [], 0
                for (start, end, choice), (hit, pick) in zip(words, draws, strict=True):
                    if hit < settings.augment_p:
                        parts, done = [*parts, text[done:start], choice[int(pick * len(choice))]], end
                changed = "".join([*parts, text[done:]])
                texts = (pair.question, changed) if side else (changed, pair.sentence)
                if texts not in seen:
                    seen.add(texts)
                    yield row, Pair(*texts, pair.label)


def augmented(pairs: list[Pair], teacher: nn.Module, name: str, settings, seed: int, mlm: str | None, glove: str | None) -> tuple:
    """Numbers of origins, new rows with their origins' labels, where the words came from; `name` is the teacher's folder."""
    tokenizer, k = auto_tokenizer(name), settings.augment_k
    found = [places(pair, tokenizer.all_special_tokens) for pair in pairs]
    asked = {place for sides in found for words in sides for place in words}
    answers = likely(open_mlm(mlm).to(teacher.device), mlm, asked, k) if mlm else {}
    rest = sorted(word for text, start, _, word in asked if (text, start) not in answers)
    if glove:
        table = read_glove(glove)
        known = {word: table[word] for word in rest if word in table}
        choice = {word: vector for word, vector in table.items() if word.isalpha() and word.islower()}
    else:  # a word of several pieces is their mean
        table_VD = teacher.get_input_embeddings().weight.detach().float().cpu()
        known = {word: table_VD[tokenizer(word, add_special_tokens=False).input_ids].mean(0) for word in dict.fromkeys(rest)}
        choice = {word: table_VD[number] for number, word in whole_words(name).items()}
    close = near(known, choice, k)
    options = [[[(start, end, choice) for text, start, end, word in words
                 if (choice := answers.get((text, start)) or close.get(word))] for words in sides] for sides in found]
    if not (rows := list(new_rows(pairs, options, settings, seed))):
        raise ValueError(f"augment={settings.augment}: no word of these rows may be changed; write augment=0")
    return *map(list, zip(*rows, strict=True)), {
        "mlm": mlm or "no masked LM", "words_by_mlm": len(answers), "neighbours": glove or "the teacher's input embeddings",
        "words_by_neighbours": sum(word in close for word in rest)}
