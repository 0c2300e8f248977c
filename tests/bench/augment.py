"""Rows a second of augmentation with a masked LM: in batches, as finetune/augment.py asks it, and one word at a time.

    python tests/bench/augment.py --mlm DIR --data QNLI_FOLDER [--rows 100] [--rounds 3]

One at a time is the reference code's way (arXiv 1909.10351, data_augmentation.py), without its gradients: a pass for each
word of each row, the head over every position.  Both find the 15 likeliest words of the very same words and take turns
within a round; the ratio is the median of the rounds'."""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers.utils import logging  # noqa: E402

from finetune.augment import likely, open_mlm, places, whole_words  # noqa: E402
from finetune.data import load  # noqa: E402
from shards.tokenizer import auto_tokenizer  # noqa: E402

K = 15


@torch.inference_mode()
def one_at_a_time(model, name: str, asked: list[tuple]) -> dict:
    """What `likely` gives, word by word; a text that stands in two rows is asked twice."""
    tokenizer, words, answers = auto_tokenizer(name), whole_words(name), {}
    allowed = torch.tensor(list(words), device=model.device)
    for text, start, end, word in asked:
        if word not in words.values():
            continue
        masked = f"{text[:start]}{tokenizer.mask_token}{text[end:]}"
        batch = tokenizer(masked, text, return_tensors="pt").to(model.device)
        at = (batch.input_ids[0] == tokenizer.mask_token_id).nonzero()[0, 0]
        best = model(**batch).logits[0, at][allowed].topk(K).indices
        answers[text, start, end, word] = [words[number] for number in allowed[best].sort().values.tolist()]
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mlm", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = open_mlm(given.mlm).to("cuda" if torch.cuda.is_available() else "cpu")
    pairs = load(given.data, count=given.rows)[0]
    asked = [place for pair in pairs for words in places(pair, []) for place in words]
    ways = {"batched": lambda: likely(model, set(asked), K),
            "one at a time": lambda: one_at_a_time(model, given.mlm, asked)}
    speeds, answers = {way: [] for way in ways}, {}
    for _ in range(given.rounds):
        for way, ask in ways.items():
            begin = time.perf_counter()
            answers[way] = ask()
            speeds[way].append(len(pairs) / (time.perf_counter() - begin))
    same = sum(answers["batched"][key] == words for key, words in answers["one at a time"].items())
    print(f"{len(pairs)} rows, {len(answers['batched']):,} words, {torch.get_num_threads()} thread(s), {model.device}: "
          + ", ".join(f"{way} {statistics.median(speed):.1f} rows/s" for way, speed in speeds.items())
          + f"; ratio {statistics.median(a / b for a, b in zip(*speeds.values())):.2f} "
          f"({', '.join(f'{a / b:.2f}' for a, b in zip(*speeds.values()))}); the same {K} words for {same:,} of "
          f"{len(answers['one at a time']):,}")


if __name__ == "__main__":
    main()
