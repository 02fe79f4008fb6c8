"""Random draws: rows depend on (seed, stream, sample) only, and streams are independent."""

import pytest
import torch

from mfcore.rng import generator, normal_rows, uniform_rows


def test_a_row_depends_on_its_sample_number_only():
    like = torch.empty(4, 5, 3)
    whole = normal_rows(1, "a", [7, 8, 9, 10], like)
    assert torch.equal(normal_rows(1, "a", torch.tensor([10, 8]), like[:2]), whole[[3, 1]])
    assert torch.equal(uniform_rows(1, "a", [3, 4], 6)[1], uniform_rows(1, "a", [4], 6)[0])


def test_seed_stream_and_number_each_change_the_draws():
    like = torch.empty(1, 8)
    draws = [normal_rows(s, name, [i], like) for s in (0, 1) for name in ("a", "b") for i in (0, 1, 11)]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == len(draws)
    # names and numbers are separated: ("a1", 1) is not ("a", 11)
    assert not torch.equal(normal_rows(0, "a1", [1], like), normal_rows(0, "a", [11], like))


def test_streams_and_neighboring_samples_are_uncorrelated():
    like = torch.empty(400, 50)  # 20000 numbers: correlation of 0 within 0.035 at five standard deviations
    rows = torch.stack(
        [
            normal_rows(0, "flow", range(400), like).flatten(),
            normal_rows(0, "history", range(400), like).flatten(),
            normal_rows(0, "flow", range(1, 401), like).flatten(),
            normal_rows(1, "flow", range(400), like).flatten(),
        ]
    )
    off = torch.corrcoef(rows) - torch.eye(4)
    assert float(off.abs().max()) < 0.035
    assert rows.mean(1).tolist() == pytest.approx([0.0] * 4, abs=0.035)
    assert rows.std(1).tolist() == pytest.approx([1.0] * 4, abs=0.025)


def test_drawing_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    generator(0, "a", 0)
    normal_rows(0, "a", [1], torch.empty(1, 3))
    assert torch.equal(before, torch.random.get_rng_state())
