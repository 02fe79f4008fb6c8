"""Embedded text codec: words as hashed vectors. No weights, no download, any language.

Letters: L words of a text, D width of a vector.

A word's vector is a pseudo-random direction of its own plus the normalised sum of the directions of its character
n-grams, n = 1 to 4, over the word between boundary marks. Equal words have equal vectors, words that share no letters
are nearly orthogonal (cosine 0 +- 1 / sqrt(D)), similar spellings lie nearer. The mean square over the elements of a
vector is 1.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.codecs.base import TextCodec

_WHOLE = 1.0  # weight of the word as a whole beside its spelling
_LONGEST = 4  # letters of the longest n-gram
_PLACE = 0.5  # weight of the position beside the word
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")  # letters and digits, apostrophes inside


class HashedWordEncoder(TextCodec):
    """Vectors ``(L, width)`` of words; a :class:`mfcore.codecs.base.TextCodec`."""

    def __init__(self, width: int = 64, version: int = 2) -> None:
        """``version`` 1 is that of older datasets: it takes "Hello," for another word than "hello"."""
        if version not in (1, 2):
            raise ValueError(f"version={version} of hashed words: 1 and 2 are known")
        if width < 8:
            raise ValueError(
                f"width={width}: words need at least 8 numbers to differ; 64 serves about a thousand words"
            )
        self.id = f"words-v{version}/d{width}"
        self.width, self.version = width, version

    def tokenize(self, text: str) -> list[str]:
        """Lower-case words in order of appearance; punctuation separates and is dropped."""
        return _WORD.findall(_normal(text))

    def encode(self, words: Sequence[str]) -> Float[Tensor, "L D"]:
        """One float32 vector per word, whatever its place; no word gives an empty tensor. ValueError for an empty word.

        For transcripts, whose words carry times.
        """
        if not words:
            return torch.zeros(0, self.width)
        return torch.stack([self._word(word) for word in words])

    def encode_caption(self, caption: str) -> Float[Tensor, "L D"]:
        """One vector per word of a caption, with its place.

        ``_PLACE`` times a direction of the position is added to each word, so that a network without position embedding
        can tell "red hair, blue wall" from "blue hair, red wall".
        """
        words = self.encode(self.tokenize(caption))
        if not len(words):
            return words
        places = torch.stack([_direction(f"place {i}", self.width) for i in range(len(words))])
        return _unit(words + _PLACE * places)

    def _word(self, word: str) -> Float[Tensor, " D"]:
        word = _normal(word).strip()
        if not word:
            raise ValueError("a transcript or caption has an empty word: remove it")
        if self.version > 1:
            word = _bare(word)
        spelling = torch.stack([_direction(f"gram {gram}", self.width) for gram in _grams(word)]).sum(0)
        return _unit(_WHOLE * _direction(f"word {word}", self.width) + _unit(spelling))


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def _bare(word: str) -> str:
    """Without the punctuation around it, which subtitles have and people who type do not; a lone dash stays."""
    word = word.replace("\u2019", "'")
    inside = [i for i, letter in enumerate(word) if letter.isalnum()]
    return word[inside[0] : inside[-1] + 1] if inside else word


def _grams(word: str) -> Iterator[str]:
    """Every run of 1 to 4 characters of ``^word$``, the marks alone left out."""
    marked = f"^{word}$"
    for n in range(1, _LONGEST + 1):
        for i in range(len(marked) - n + 1):
            if n > 1 or 0 < i < len(marked) - 1:
                yield marked[i : i + n]


def _direction(name: str, width: int) -> Float[Tensor, " D"]:
    """Signs, +1 or -1, read from the bits of a hash of ``name``: the same on every machine and version."""
    raw = b"".join(
        hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=64, salt=part.to_bytes(8, "little")).digest()
        for part in range(-(-width // 512))
    )
    bits = torch.frombuffer(bytearray(raw), dtype=torch.uint8)[:, None].bitwise_right_shift(torch.arange(8)) & 1
    return bits.flatten()[:width].float() * 2 - 1


def _unit(rows: Float[Tensor, "*L D"]) -> Float[Tensor, "*L D"]:
    """Mean square 1."""
    return rows / rows.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
