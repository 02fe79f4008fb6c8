"""Random generators as pure functions of (seed, stream, index).

``index`` is a sample number, or a step number for draws that shape control flow. Draws do not depend on rank or world
size, so no generator state is saved.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mfcore.device import to_device_of

# Sample numbers by purpose. Training counts samples from 0; the ranges below never meet it or each other.
PADDING_SAMPLE = -1  # row that makes rank shards of an evaluation equal and does not count
VALIDATION_SAMPLE_OFFSET = 1 << 40  # held-out clips of evaluations and sweeps; real statistics of the study
STUDY_SCORE_SAMPLE_OFFSET = 1 << 41  # clips of the study with scored continuations
STUDY_HISTORY_SAMPLE_OFFSET = 1 << 42  # clips of the study on which history use is measured
STUDY_MUTUAL_SEED_OFFSET = 1000  # added to a study seed after the joint network: other clips


def generator(seed: int, stream: str, index: int) -> torch.Generator:
    """Return the CPU generator of draw number ``index`` in ``stream``."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal_rows(seed: int, stream: str, samples: Sequence[int] | Tensor, like: Tensor) -> Tensor:
    """Return standard normal noise like ``like``. Row i depends on ``samples[i]`` only."""
    rows = [torch.randn(like.shape[1:], generator=generator(seed, stream, int(i))) for i in samples]
    return to_device_of(torch.stack(rows), like, like.dtype)


def uniform_rows(seed: int, stream: str, samples: Sequence[int] | Tensor, *shape: int) -> Tensor:
    """Return uniform numbers in [0, 1), (len(samples), *shape). Row i depends on ``samples[i]`` only."""
    return torch.stack([torch.rand(shape, generator=generator(seed, stream, int(i))) for i in samples])
