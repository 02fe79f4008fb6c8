"""Benchmark of the encoder pool: the stand-in takes its time, and the busy share follows from its log."""

import math
import time

import pytest
import torch

from mfcore.types import VIDEO
from preprocessing.config import PreprocessConfig
from preprocessing.pipeline import build_encoders
from workflows.bench.encoder_pool import busy_share, sleeping_encoders


def test_busy_share_covers_the_time_between_first_and_last_clip():
    assert busy_share([(10.0, 11.0), (11.0, 12.0)]) == 1.0
    assert busy_share([(13.0, 14.0), (10.0, 11.0)]) == pytest.approx(0.5)
    assert math.isnan(busy_share([(10.0, 11.0)]))


def test_stand_in_takes_its_time_and_returns_the_latents_of_the_codec(tmp_path):
    config = PreprocessConfig()
    frames = torch.randint(0, 255, (25, 64, 64, 3), dtype=torch.uint8)
    began = time.monotonic()
    latents = sleeping_encoders(config, 0.2, tmp_path / "log").codecs[VIDEO].encode(frames)
    assert time.monotonic() - began >= 0.2
    assert torch.equal(latents, build_encoders(config).codecs[VIDEO].encode(frames))
    assert len((tmp_path / "log").read_text().splitlines()) == 1
