"""Pretrained text encoder: UMT5 or T5 through transformers, from a local folder.

Letters: L tokens of a caption or words of a transcript, D width, s subwords.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.codecs.base import TextCodec
from mfcore.codecs.pretrained import (
    compute_device,
    compute_dtype,
    locate_weights,
    model_folder,
    model_kind,
    read_config,
    weights_digest,
)
from mfcore.errors import UserInputError

_KINDS = ("umt5", "t5")
_MAX_TOKENS = 512  # per caption, as in Wan; longer captions are truncated
_BATCH_WORDS = 64  # words of a transcript per forward pass


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """Weights and width; see :func:`t5_config_from_folder`."""

    width: int
    weights: str  # digest of configuration, tensors and tokenizer
    folder: str = ""  # last known folder of the weights; does not change the vectors


def t5_config_from_folder(folder: str) -> T5Config:
    """Return the configuration of the encoder in ``folder``. Raises ValueError without one.

    Model and tokenizer are in ``folder``, or in ``text_encoder/`` and ``tokenizer/``.
    """
    path = model_folder(folder, "text_encoder", _KINDS, "UMT5 or T5 encoder")
    files = [p for p in _tokenizer_folder(folder).iterdir() if p.suffix in (".json", ".model") and p.is_file()]
    width = int(read_config(path / "config.json")["d_model"])
    return T5Config(width=width, weights=weights_digest(path, [p for p in files if "token" in p.name]), folder=folder)


def _tokenizer_folder(folder: str) -> Path:
    subfolder = Path(folder, "tokenizer")
    return subfolder if subfolder.is_dir() else Path(folder)


class T5TextEncoder(TextCodec):
    """Text encoder with pretrained vectors, not normalized.

    A caption has one vector per token, in context. A word of a transcript is encoded alone, as the mean over its
    subwords, so words may be added while a model streams.
    """

    def __init__(self, config: T5Config, device: torch.device | str | None = None) -> None:
        self.config = config
        self.id = f"t5-v1/d{config.width}/{config.weights}"
        self.width = config.width
        self.device = compute_device(device)

    @cached_property
    def _folder(self) -> str:
        return locate_weights(
            self.config.weights, self.config.folder, lambda f: t5_config_from_folder(f).weights, self.id
        )

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of transformers."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(_tokenizer_folder(self._folder)), local_files_only=True)

    @cached_property
    def model(self) -> Any:
        """Encoder of transformers on the device. Raises ValueError if it is not found."""
        from transformers import T5EncoderModel, UMT5EncoderModel
        from transformers.utils import logging

        logging.disable_progress_bar()

        path = model_folder(self._folder, "text_encoder", _KINDS, "UMT5 or T5 encoder")
        kind: Any = UMT5EncoderModel if model_kind(read_config(path / "config.json")) == "umt5" else T5EncoderModel
        model: Any = kind.from_pretrained(
            str(path), dtype=compute_dtype(self.device), local_files_only=True, use_safetensors=True
        )
        return model.to(self.device).eval().requires_grad_(False)

    def load(self) -> None:
        """Load the weights. Raises ValueError if they are not found."""
        assert self.tokenizer
        assert self.model

    def tokenize(self, text: str) -> list[str]:
        """Return the subwords of a text."""
        return list(self.tokenizer.tokenize(text))

    def encode(self, words: Sequence[str]) -> Float[Tensor, "L D"]:
        """Return one float32 vector per word of a transcript, independent of its position.

        Raises ValueError for an empty word.
        """
        if any(not word.strip() for word in words):
            raise UserInputError("a transcript or caption has an empty word: remove it")
        unique = list(dict.fromkeys(words))
        parts = [unique[i : i + _BATCH_WORDS] for i in range(0, len(unique), _BATCH_WORDS)]
        vectors: list[Tensor] = []
        for part in parts:
            vectors.extend(self._means(part))
        vector_of = dict(zip(unique, vectors, strict=True))
        return torch.stack([vector_of[word] for word in words]) if words else torch.zeros(0, self.width)

    def encode_caption(self, caption: str) -> Float[Tensor, "L D"]:
        """Return one float32 vector per token of a caption, including the end token; none for an empty caption."""
        if not caption.strip():
            return torch.zeros(0, self.width)
        batch = self.tokenizer([caption], truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
        return self._states(batch)[0].cpu()

    def encode_empty(self) -> Float[Tensor, "1 D"]:
        """Return the float32 vector of the end token alone: the empty prompt of pretrained networks."""
        return self._states(self.tokenizer([""], return_tensors="pt"))[0].cpu()

    def _means(self, words: Sequence[str]) -> Float[Tensor, "L D"]:
        """Return the mean over the subwords of each word, without the end token."""
        batch = self.tokenizer(list(words), padding=True, return_tensors="pt")
        states = self._states(batch)
        kept = batch["attention_mask"].bool() & (batch["input_ids"] != self.tokenizer.eos_token_id)
        weight = kept.to(states.device, torch.float32)[..., None]
        return ((states * weight).sum(1) / weight.sum(1).clamp(min=1)).cpu()

    @torch.inference_mode()
    def _states(self, batch: Any) -> Float[Tensor, "b s D"]:
        ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
        states: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states.float().clone()
