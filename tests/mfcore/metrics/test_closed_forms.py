"""Metrics against closed forms and planted values."""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d
from scipy.special import erf

from mfcore.metrics.av_sync import motion_energy, sound_envelope, sync_offset
from mfcore.metrics.continuity import lag_one_correlation, pooled_lag_one_correlation, seam_energy, step_energy
from mfcore.metrics.distributions import entropy_ratio, mode_entropy
from mfcore.metrics.frechet import frechet_bias, frechet_distance, frechet_interval
from mfcore.metrics.identity import identity_error, identity_similarity
from mfcore.metrics.speech import edit_distance
from mfcore.metrics.windows import TimeWindow, parse_windows


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# sync


def mouth(times: np.ndarray) -> np.ndarray:
    """Return a smooth aperiodic opening, 0 to 1, defined at all times."""
    return (
        sum(0.25 * (1 + np.sin(2 * np.pi * f * times + p)) for f, p in ((1.3, 0.4), (2.1, 2), (3.7, 1), (4.6, 5))) / 2
    )


@pytest.mark.parametrize("lag", [0.0, 0.037, -0.12, 0.4])
def test_sync_finds_a_planted_lag(lag: float):
    a = mouth(np.arange(0, 10, 1 / 24))
    b = 3 * mouth(np.arange(0, 10, 1 / 100) - lag) + 1
    found = sync_offset(a, 24, b, 100, max_lag=0.5)
    assert abs(found.offset_sec - lag) < 0.002
    assert found.correlation > 0.99


def test_sync_of_video_and_audio_with_a_planted_lag():
    times = np.arange(0, 8, 1 / 24)
    frames = np.zeros((len(times), 32, 32, 3), np.uint8)
    beats = np.array([0.6, 1.3, 2.4, 2.9, 4.1, 5.5, 6.2, 7.1])
    moved = erf((times[:, None] - beats) / 0.06 / np.sqrt(2)).sum(1)  # its speed peaks at the beats
    frames[:, 8:24, 8:24] = (100 + 12 * moved)[:, None, None, None]
    at = np.arange(8 * 16000) / 16000
    loud = np.exp(-0.5 * ((at[:, None] - beats - 0.1) / 0.06) ** 2).sum(1)
    sound = loud * np.sin(2 * np.pi * 300 * at)
    found = sync_offset(motion_energy(frames), 24, sound_envelope(sound, 16000, 100), 100, max_lag=0.5)
    assert abs(found.offset_sec - 0.1) < 0.005
    assert found.correlation > 0.9


def test_sync_of_unrelated_envelopes_is_weak():
    a, b = gaussian_filter1d(rng().standard_normal((2, 2000)), 2)
    assert sync_offset(a, 100, b, 100, max_lag=0.5).correlation < 0.3


def test_sync_is_antisymmetric():
    a, b = mouth(np.arange(0, 6, 0.02)), mouth(np.arange(0, 6, 0.02) - 0.06)
    forth, back = sync_offset(a, 50, b, 50, max_lag=0.3), sync_offset(b, 50, a, 50, max_lag=0.3)
    assert forth.offset_sec == pytest.approx(-back.offset_sec, abs=1e-6)


@pytest.mark.parametrize("flat", [np.ones(200), np.zeros(0), np.ones(1)])
def test_sync_of_a_flat_envelope_is_zero(flat: np.ndarray):
    assert sync_offset(flat, 24, rng().standard_normal(200), 24, max_lag=0.5) == (0.0, 0.0)


def test_sync_rejects_rates_of_zero():
    with pytest.raises(ValueError, match="positive rates"):
        sync_offset(np.ones(5), 0, np.ones(5), 24, max_lag=0.5)


def test_motion_energy_belongs_to_its_frame():
    frames = np.zeros((9, 4, 4, 3), np.uint8)
    frames[4] = 10  # one flash: the change is centred on it
    assert motion_energy(frames) == pytest.approx([0, 0, 0, 5, 10, 5, 0, 0, 0])


def test_sound_envelope_is_the_level():
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    envelope = sound_envelope(tone, 16000, 100)
    assert len(envelope) == 100
    assert envelope == pytest.approx(0.5 / np.sqrt(2), rel=0.01)


# Frechet distance


def standardised(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Return samples with mean exactly 0 and covariance exactly the identity."""
    x = rng(seed).standard_normal((n, d))
    x -= x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T


def test_frechet_of_a_set_with_itself_is_zero():
    x = rng().standard_normal((50, 8))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    few = x[:4]  # fewer samples than features: singular covariances
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)


def test_frechet_of_a_shift_is_its_square():
    x = rng().standard_normal((100, 5))
    shift = np.array([1.0, -2, 0, 0.5, 3])
    assert frechet_distance(x, x + shift) == pytest.approx(shift @ shift, rel=1e-9)


def test_frechet_of_two_gaussians():
    # |m|^2 + sum (s_i - t_i)^2 where the covariances commute.
    s, t = np.array([1.0, 2, 0.1]), np.array([0.5, 3, 0.7])
    turn = np.linalg.qr(rng(1).standard_normal((3, 3)))[0]
    a = standardised(200, 3) * s @ turn
    b = standardised(300, 3, seed=2) * t @ turn + 0.3
    assert frechet_distance(a, b) == pytest.approx(3 * 0.09 + np.square(s - t).sum(), rel=1e-9)


def test_frechet_of_covariances_that_do_not_commute():
    # tr (A^1/2 B A^1/2)^1/2 = sqrt(tr AB + 2 sqrt(det AB)) for 2 x 2.
    mix = np.array([[1.0, 0.8], [0.0, 0.6]])
    a, b = standardised(100, 2), standardised(100, 2, seed=1) @ mix
    other = mix.T @ mix
    expected = 2 + np.trace(other) - 2 * np.sqrt(np.trace(other) + 2 * np.sqrt(np.linalg.det(other)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_with_full_shrinkage_depends_on_variances_only():
    mix = np.array([[1.0, 0.8], [0.0, 0.6]])
    a, b = standardised(100, 2), standardised(100, 2, seed=1) @ mix
    assert frechet_distance(a, b, shrinkage=1.0) == pytest.approx(0, abs=1e-9)  # both columns have variance 1


def test_frechet_interval_has_its_nominal_coverage():
    """60 clips of two rows, 90% intervals; the estimate's own bias costs some of the coverage."""
    covered = 0
    for seed in range(40):
        a, b = (list(rng(2 * seed + i).standard_normal((60, 2, 3)) + i) for i in (0, 1))
        interval = frechet_interval(a, b, draws=60)
        assert interval.low < interval.value < interval.high
        covered += interval.low < 3 < interval.high
    assert covered >= 30
    assert interval == frechet_interval(a, b, draws=60)


def test_frechet_interval_draws_clips_not_rows():
    """Rows that repeat within a clip add nothing: the interval is as wide as with one row per clip."""
    a, b = rng(1).standard_normal((30, 1, 2)), rng(2).standard_normal((30, 1, 2))
    once, often = (frechet_interval(list(a.repeat(n, 1)), list(b.repeat(n, 1)), draws=200) for n in (1, 10))
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.35)


def test_frechet_bias_is_the_distance_of_equal_distributions():
    """Two sets of one distribution: the whole distance is bias."""
    draws = [(rng(s).standard_normal((60, 1, 6)), rng(1000 + s).standard_normal((60, 1, 6))) for s in range(12)]
    value = np.mean([frechet_distance(a[:, 0], b[:, 0]) for a, b in draws])
    bias = np.mean([frechet_bias(list(a), list(b)) for a, b in draws])
    assert bias == pytest.approx(value, rel=0.25)
    assert np.isnan(frechet_bias([np.zeros((5, 2))] * 3, [np.zeros((5, 2))] * 9))


@pytest.mark.parametrize(
    "wrong", [np.zeros((1, 3)), np.zeros(3), np.zeros((5, 2)), np.full((5, 3), np.nan), np.zeros((0, 3))]
)
def test_frechet_rejects_invalid_features(wrong: np.ndarray):
    with pytest.raises(ValueError):
        frechet_distance(wrong, np.ones((4, 3)))


# continuity


def chain(a: float, border: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a unit-variance Gaussian chain with correlation ``a`` inside chunks and ``border`` across borders."""
    noise = rng().standard_normal(4000 * 8)
    chunk = np.repeat(np.arange(4000), 8)
    x = np.empty_like(noise)
    x[0] = noise[0]
    for k in range(1, len(x)):
        r = a if chunk[k] == chunk[k - 1] else border
        x[k] = r * x[k - 1] + np.sqrt(1 - r * r) * noise[k]
    return x, chunk


def test_seam_energy_of_linear_gaussian_chains():
    # E (x_k - x_{k-1})^2 = 2 (1 - r) for correlation r.
    for border in (0.95, 0.85, 0.0):
        x, chunk = chain(0.95, border)
        assert seam_energy(x, chunk) == pytest.approx((1 - border) / 0.05, rel=0.06)
        assert step_energy(x)[np.diff(chunk) == 0].mean() == pytest.approx(0.1, rel=0.05)


def test_seam_energy_of_frames():
    frames = np.zeros((8, 4, 4, 3), np.uint8)
    frames[:] = np.array([0, 2, 4, 6, 250, 252, 254, 252])[:, None, None, None]
    assert seam_energy(frames, np.arange(8) // 4) == pytest.approx(244**2 / 4)  # no uint8 wrap-around
    assert seam_energy(frames * 0, np.arange(8) // 4) == 1


@pytest.mark.parametrize("chunk", [np.zeros(8, int), np.arange(8), np.zeros(3, int)])
def test_seam_energy_rejects_invalid_chunks(chunk: np.ndarray):
    with pytest.raises(ValueError):
        seam_energy(np.zeros(8), chunk)


def test_lag_one_correlation_of_chains():
    for a in (0.95, 0.5, 0.0):
        x, _ = chain(a, a)
        assert lag_one_correlation(x.reshape(16, -1)) == pytest.approx(a, abs=0.02)
    assert np.isnan(lag_one_correlation(np.ones((2, 5))))
    with pytest.raises(ValueError):
        lag_one_correlation(np.ones(5))


def test_lag_one_correlation_of_several_coordinates_and_lengths():
    """Each coordinate about its own mean, weighted by its variance: 0.9 and 0.1 of nine parts and one make 0.82."""
    slow, fast = chain(0.9, 0.9)[0], chain(0.1, 0.1)[0]
    both = np.stack([3 * slow / slow.std() + 100, fast / fast.std() - 100], axis=1)
    cut = len(both) // 3
    assert pooled_lag_one_correlation([both[:cut], both[cut:], both[:1]]) == pytest.approx(0.82, abs=0.02)
    assert np.isnan(pooled_lag_one_correlation([both[:1]]))


# speech


@pytest.mark.parametrize(
    ("heard", "spoken", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(heard: str, spoken: str, distance: int):
    assert edit_distance(heard, spoken) == edit_distance(spoken, heard) == distance


def test_edit_distance_equals_the_plain_dynamic_program():
    draw = rng(3)
    for _ in range(200):
        heard = [f"w{i}" for i in draw.integers(0, 5, draw.integers(0, 12))]
        spoken = [f"w{i}" for i in draw.integers(0, 5, draw.integers(0, 12))]
        assert edit_distance(heard, spoken) == plain_edit_distance(heard, spoken)
        heard, spoken = "".join(heard), "".join(spoken)
        assert edit_distance(heard, spoken) == plain_edit_distance(heard, spoken)


def plain_edit_distance(heard: Sequence[str], spoken: Sequence[str]) -> int:
    """Return the Levenshtein distance by its recurrence, row by row."""
    row = list(range(len(spoken) + 1))
    for i, unit in enumerate(heard, start=1):
        diagonal, row[0] = row[0], i
        for j, wanted in enumerate(spoken, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (unit != wanted))
    return row[-1]


# identity, windows, choices


def test_identity():
    reference = np.array([1.0, 0, 0, 0])
    windows = np.array([[1.0, 0, 0, 0], [1, 2, 0, 0], [2, 0, 0, 0]])
    assert identity_error(windows, reference) == pytest.approx([0, 1, 0.5])
    assert identity_similarity(windows, reference) == pytest.approx([1, 1 / np.sqrt(5), 1])
    for metric in (identity_error, identity_similarity):
        with pytest.raises(ValueError, match="identity needs"):
            metric(windows, reference[:2])


def test_windows():
    first, second, rest = parse_windows("0-5, 5-15.5,60-")
    assert [w.name for w in (first, second, rest)] == ["0-5", "5-15.5", "60-"]
    assert first.slice(24, 1000) == slice(0, 120)
    assert second.slice(24, 1000) == slice(120, 372)
    assert rest.slice(24, 1000) == slice(1000, 1000)
    assert TimeWindow(start=0.1).slice(30, 10) == slice(3, 10)  # 0.1 * 30 is above 3 in floating point


def test_adjacent_windows_partition_the_values():
    windows = parse_windows("0-5,5-15,15-25,25-")
    rate = 15.625
    taken = [i for w in windows for i in range(600)[w.slice(rate, 600)]]
    assert taken == list(range(600))


@pytest.mark.parametrize("text", ["", "5", "5-5", "9-5", "-5", "a-b", "0-5;5-10"])
def test_windows_reject_invalid_text(text: str):
    with pytest.raises(ValueError, match="window"):
        parse_windows(text)


def test_entropy():
    assert mode_entropy(np.arange(8).repeat(500), 8) == pytest.approx(np.log(8))
    assert mode_entropy([3] * 50, 8) == 0
    assert mode_entropy([0] * 900 + [1] * 100, 2) == pytest.approx(-0.9 * np.log(0.9) - 0.1 * np.log(0.1) + 1 / 2000)
    assert entropy_ratio([0, 1] * 200, np.arange(4).repeat(100), 4) == pytest.approx(0.5, abs=0.01)
    assert np.isnan(entropy_ratio([0, 1], [0, 0], 4))


def test_entropy_correction_helps_small_samples():
    draws = [mode_entropy(rng(seed).integers(0, 8, 40), 8) for seed in range(200)]
    assert np.mean(draws) == pytest.approx(np.log(8), abs=0.03)  # 0.09 too low without


@pytest.mark.parametrize("wrong", [[], [8], [-1]])
def test_entropy_rejects_invalid_choices(wrong: list[int]):
    with pytest.raises(ValueError, match="0 .. 7"):
        mode_entropy(wrong, 8)
