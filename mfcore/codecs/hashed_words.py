"""Embedded text codec: words as hashed vectors. No weights, no download, any language.

Letters: L words of a text, D width of a vector.

The vector of a word is a pseudo-random direction of the word plus the normalized sum of the directions of its character
n-grams, n = 1 to 4, over the word between boundary marks. Equal words have equal vectors. Words without common letters
are nearly orthogonal (cosine 0 +- 1 / sqrt(D)), similar spellings are closer. The mean square over the elements of a
vector is 1.

An entry ``/hh/`` or ``/hh/hello`` of a transcript is the phoneme ``hh``, at the start of a word in the second form. Its
vector is the pseudo-random direction of the phoneme alone: phonemes are nearly orthogonal, and the word has no effect.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.codecs.base import TextCodec
from mfcore.errors import UserInputError

_WORD_WEIGHT = 1.0  # relative to the n-grams
_MAX_NGRAM = 4  # characters
_POSITION_WEIGHT = 0.5  # relative to the word
_PHONEME = re.compile(r"/([a-z]+)/")
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")  # letters and digits, apostrophes inside


class HashedWordEncoder(TextCodec):
    """Vectors ``(L, width)`` of words."""

    def __init__(self, width: int = 64, version: int = 2) -> None:
        """Version 1, of older datasets, has different vectors for "Hello," and "hello"."""
        if version not in (1, 2):
            raise UserInputError(f"version={version} of hashed words: use 1 or 2")
        if width < 8:
            raise UserInputError(
                f"width={width}: use at least 8 to distinguish words; 64 suffices for about 1000 words"
            )
        self.id = f"words-v{version}/d{width}"
        self.width, self.version = width, version

    def tokenize(self, text: str) -> list[str]:
        """Return the lower-case words in order; punctuation separates words and is dropped."""
        return _WORD.findall(_normalize(text))

    def encode(self, words: Sequence[str]) -> Float[Tensor, "L D"]:
        """Return one float32 vector per word of a transcript, independent of its position.

        Raises ValueError for an empty word.
        """
        if not words:
            return torch.zeros(0, self.width)
        return torch.stack([self._encode_word(word) for word in words])

    def encode_caption(self, caption: str) -> Float[Tensor, "L D"]:
        """Return one vector per word of a caption, including its position.

        ``_POSITION_WEIGHT`` times a direction of the position is added to each word, so that a network without position
        embedding distinguishes "red hair, blue wall" from "blue hair, red wall".
        """
        words = self.encode(self.tokenize(caption))
        if not len(words):
            return words
        positions = torch.stack([_direction(f"place {i}", self.width) for i in range(len(words))])
        return _normalize_rows(words + _POSITION_WEIGHT * positions)

    def _encode_word(self, word: str) -> Float[Tensor, " D"]:
        word = _normalize(word).strip()
        if not word:
            raise UserInputError("a transcript or caption has an empty word: remove it")
        if self.version > 1:
            if phoneme := _PHONEME.match(word):
                return _direction(f"phoneme {phoneme[1]}", self.width)
            word = _strip_punctuation(word)
        spelling = torch.stack([_direction(f"gram {gram}", self.width) for gram in _ngrams(word)]).sum(0)
        return _normalize_rows(_WORD_WEIGHT * _direction(f"word {word}", self.width) + _normalize_rows(spelling))


def _normalize(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def _strip_punctuation(word: str) -> str:
    """Remove the punctuation around a word, which subtitles contain; a single dash stays."""
    word = word.replace("\u2019", "'")
    letters = [i for i, letter in enumerate(word) if letter.isalnum()]
    return word[letters[0] : letters[-1] + 1] if letters else word


def _ngrams(word: str) -> Iterator[str]:
    """Yield all runs of 1 to 4 characters of ``^word$`` except the marks alone."""
    marked = f"^{word}$"
    for n in range(1, _MAX_NGRAM + 1):
        for i in range(len(marked) - n + 1):
            if n > 1 or 0 < i < len(marked) - 1:
                yield marked[i : i + n]


def _direction(name: str, width: int) -> Float[Tensor, " D"]:
    """Return signs, +1 or -1, from the bits of a hash of ``name``: equal on every machine and version."""
    raw = b"".join(
        hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=64, salt=part.to_bytes(8, "little")).digest()
        for part in range(-(-width // 512))
    )
    bits = torch.frombuffer(bytearray(raw), dtype=torch.uint8)[:, None].bitwise_right_shift(torch.arange(8)) & 1
    return bits.flatten()[:width].float() * 2 - 1


def _normalize_rows(rows: Float[Tensor, "*L D"]) -> Float[Tensor, "*L D"]:
    """Scale rows to mean square 1."""
    return rows / rows.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
