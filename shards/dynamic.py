"""Dynamic masks: new ones in each pass, yet a pure function of (seed, pass, row)."""

import io
from pathlib import Path

import numpy as np

from shards.block import BLOCK_ROWS, Manifest, read_checked

GAMMA = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(state: np.ndarray) -> np.ndarray:
    """The next output of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014); uint64."""
    z = state + GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class DynamicMasks:
    """Masks rows by the build's own rules, with what it left of its vocabulary; ValueError where it left none."""

    def __init__(self, folder: str | Path, manifest: Manifest, seed: int):
        if not manifest.vocabulary:
            raise ValueError(f"mask=dynamic, but {folder} has no vocabulary.npy; build the shards again, or write mask=none")
        flags = np.load(io.BytesIO(read_checked(folder, "vocabulary.npy", manifest.vocabulary)), allow_pickle=False)
        self.special, self.begins_word, self.may_replace = ((flags & bit) > 0 for bit in (1, 2, 4))
        self.mask, self.row_length, self.seed = manifest.tokenizer["mask"], manifest.row_length, np.array([seed], np.uint64)
        self.whole_word = manifest.settings["masking"] == "whole-word"

    def apply(self, ids: np.ndarray, lengths: np.ndarray, epochs: np.ndarray, numbers: np.ndarray) -> None:
        """Mask padded rows (R, L) in place.  A row's chances, three for each position, follow from its pass and number, (R,)."""
        from shards.pairs import masked, words  # here: only these masks need the build's libraries
        keys = splitmix64(splitmix64(splitmix64(self.seed) + epochs.astype(np.uint64)) + numbers.astype(np.uint64))
        for start in range(0, len(ids), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            row, position = np.nonzero(np.arange(ids.shape[1]) < lengths[part, None])
            flat, row = ids[part][row, position], row + start

            def draw(purpose: int, where: np.ndarray) -> np.ndarray:
                count = (3 * position[where] + purpose).astype(np.uint64)
                return (splitmix64(keys[row[where]] + count * GAMMA) >> np.uint64(32)).astype(np.uint32)

            found = words(flat, lengths[part], self, self.whole_word)
            counts, where, new = masked(found, flat, lengths[part], self, draw, self.row_length)
            ids[start + np.repeat(np.arange(len(counts)), counts), where] = new
