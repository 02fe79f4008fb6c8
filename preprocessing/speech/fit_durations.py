"""Fit the durations of phonemes to speech of flite and write ``durations.json``."""

import json
from pathlib import Path

import numpy as np

from preprocessing.speech.flite import VOICES, speak
from preprocessing.speech.frontend import duration_features
from preprocessing.speech.sentences import compose_sentence

SENTENCES = 400
_RIDGE = 1.0


def fit(sentences: int = SENTENCES, seed: int = 0) -> dict[str, float]:
    """Return the weight of each feature of the linear model of the logarithm of seconds."""
    rng = np.random.default_rng(seed)
    rows: list[list[str]] = []
    targets: list[float] = []
    for i in range(sentences):
        spoken = speak(compose_sentence(rng), VOICES[i % len(VOICES)])
        for phrase in _phrases(spoken.phonemes):
            names = [name for name, _, _ in phrase]
            rows += [duration_features(names, k) for k in range(len(names))]
            targets += [float(np.log(max(end - start, 0.01))) for _, start, end in phrase]
    names = sorted({name for row in rows for name in row})
    number = {name: i for i, name in enumerate(names)}
    design = np.zeros((len(rows), len(names)))
    for i, row in enumerate(rows):
        design[i, [number[name] for name in row]] = 1
    weights = np.linalg.solve(design.T @ design + _RIDGE * np.eye(len(names)), design.T @ np.asarray(targets))
    error = design @ weights - np.asarray(targets)
    print(f"{len(rows)} phonemes, rms error of the logarithm {error.std():.3f}, of the mean {np.std(targets):.3f}")
    return {name: round(float(w), 4) for name, w in zip(names, weights, strict=True)}


def _phrases(phonemes: tuple[tuple[str, float, float], ...]) -> list[list[tuple[str, float, float]]]:
    """Split phonemes at gaps, which were pauses."""
    phrases: list[list[tuple[str, float, float]]] = []
    for item in phonemes:
        if not phrases or item[1] - phrases[-1][-1][2] > 1e-3:
            phrases.append([])
        phrases[-1].append(item)
    return phrases


if __name__ == "__main__":
    Path(__file__).with_name("durations.json").write_text(json.dumps(fit(), indent=0) + "\n")
