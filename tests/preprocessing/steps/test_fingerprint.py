"""Fingerprints of clips with little audio."""

import numpy as np
import pytest

from preprocessing.records import Clip, Source
from preprocessing.steps.fingerprint import FINGERPRINT_PARTS, fingerprint


@pytest.mark.parametrize("samples", [0, 1, 10, 63, 64, 1000])
def test_short_audio_has_a_fingerprint(samples):
    sound = np.sin(np.arange(samples, dtype=np.float32))
    clip = Clip(source=Source(uri="", size=0, fingerprint=""), span=(0, 1), frames=None, waveform=sound)
    found = fingerprint(clip, 16000).fingerprint
    assert found is not None
    assert len(found) == sum(FINGERPRINT_PARTS.values())
