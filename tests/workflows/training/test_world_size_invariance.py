"""Results do not depend on the number of ranks: uneven shards, row kinds, resume, non-finite numbers."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mfcore.objectives.losses import LossTerm, StepInfo
from mfcore.types import AVBatch
from tests.helpers.gloo_processes import run_on
from tests.helpers.linear_network import SelfTaught
from tests.helpers.toy_training_run import Toy, TwoRounds, largest_error, toy_run
from workflows.training.engines.base import NonFiniteError
from workflows.training.loop import TrainingInterrupted

SOME = ("torch",)  # engine of the ordinary tests: importing DeepSpeed takes seconds. "0" to "3" are ZeRO stages
ALL = ("torch", "0", "1", "2", "3")


class KindsOfRows(SelfTaught):
    """Objective like the mutual stage: terms are means over row kinds, the fake score learns from some rows only."""

    def __call__(self, models, batch: AVBatch, info: StepInfo) -> dict[str, list[LossTerm]]:
        terms = super().__call__(models, batch, info)
        kind = batch.samples % 4
        flow, own = terms["student"]
        some = replace(flow, values=flow.values[kind < 3], level=None)
        fake = replace(terms["fake"][0], values=terms["fake"][0].values[kind == 3])
        return {"student": [some, own], "fake": [fake]}


ROWS = Toy(root="", kind="torch", steps=5, batch=24, unit=4, objective=KindsOfRows)
UNEVEN = Toy(root="", kind="torch", steps=5, batch=11)
MICRO = replace(UNEVEN, micro=2)
TWICE = replace(MICRO, objective=TwoRounds)


def _at(toy: Toy, folder: Path, name: str, **changes) -> Toy:
    return replace(toy, root=str(folder / name), **changes)


def _many(toys: list[Toy]):
    """Run several toys in one start of processes."""
    torch.set_num_threads(1)
    return [toy_run(toy) for toy in toys]


def _on_two(folder: str, kinds: Sequence[str], uneven: list[Toy]):
    """Run everything for two processes in one start.

    Per engine: stopped by a loss, by a gradient, with two skipped steps (one is the first), and with one too many. Then
    ``uneven``.
    """
    torch.set_num_threads(1)
    bad = {}
    for kind in kinds:
        toy = Toy(root="", kind=kind, steps=5, batch=4)
        bad[kind] = [
            toy_run(replace(toy, root=f"{folder}/{kind}-loss", bad={7: "loss"})),
            toy_run(replace(toy, root=f"{folder}/{kind}-gradient", bad={6: "gradient"})),
            toy_run(replace(toy, root=f"{folder}/{kind}-skip", bad={3: "loss", 10: "gradient"}, skip=2)),
            toy_run(replace(toy, root=f"{folder}/{kind}-spent", bad={3: "loss", 10: "gradient"}, skip=1)),
        ]
    return bad, _many(uneven)


def _everywhere(folder: Path, kinds: Sequence[str]) -> list[Toy]:
    """Return uneven runs under several engines."""
    return [_at(toy, folder, f"{i}-{k}", kind=k) for i, toy in enumerate((UNEVEN, MICRO, ROWS, TWICE)) for k in kinds]


@pytest.fixture(scope="module", params=[SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def on_two(request, tmp_path_factory):
    """Return the engines and the results of both ranks; only the second rank has bad samples."""
    folder, kinds = tmp_path_factory.mktemp("two"), request.param
    return kinds, run_on(2, _on_two, str(folder), kinds, _everywhere(folder, kinds))


@pytest.mark.timeout(400)
def test_a_non_finite_number_on_one_rank_stops_both_before_the_step(on_two):
    kinds, on_ranks = on_two
    for kind, (bad, _) in itertools.product(kinds, on_ranks):
        by_loss, by_gradient, _, spent = bad[kind]
        for result, step, words in (
            (by_loss, 1, "rank 1: the loss fm/audio on clips clip-6, clip-7 (samples 6..7)"),
            (by_gradient, 1, "rank 1: the gradient of student on clips clip-6, clip-7"),
            (spent, 2, "1 such steps were skipped before"),
        ):
            assert isinstance(result.error, NonFiniteError), kind
            assert f"stage audio, step {step}: not finite: rank 1" in str(result.error)
            assert words in str(result.error)
            assert max(result.losses) == step, "no step after it"


def test_a_skipped_step_is_the_same_in_every_engine(on_two):
    kinds, on_ranks = on_two
    reference = on_ranks[0][0]["torch"][2]
    assert not reference.losses[1] and not reference.losses[3], "a skipped step has no losses"
    for kind, (bad, _) in itertools.product(kinds, on_ranks):
        result = bad[kind][2]
        assert result.error is None and result.progress.skipped == 2, kind
        for name, weights in result.weights.items():
            for key, value in weights.items():
                assert torch.isfinite(value).all()
                torch.testing.assert_close(value, reference.weights[name][key], rtol=1e-5, atol=1e-6)


def test_a_skipped_step_changes_no_weight(tmp_path):
    toy = Toy(root=str(tmp_path / "a"), kind="torch", steps=1, batch=4, bad={0: "loss"}, skip=1)
    result = toy_run(toy)
    before = toy_run(replace(toy, root=str(tmp_path / "b"), skip=0))
    assert isinstance(before.error, NonFiniteError)
    for name, weights in result.weights.items():
        assert all(torch.equal(value, before.weights[name][key]) for key, value in weights.items())


def test_further_updates_of_the_fake_score_precede_the_student(tmp_path):
    """The optimizer state counts each update."""
    once = toy_run(Toy(root=str(tmp_path / "once"), kind="torch", steps=1, batch=4))
    twice = toy_run(Toy(root=str(tmp_path / "twice"), kind="torch", steps=1, batch=4, objective=TwoRounds))
    assert twice.losses[1].pop("grad_norm/fake") != once.losses[1].pop("grad_norm/fake")
    assert twice.losses == once.losses
    for name in ("student", "ema"):
        assert all(torch.equal(w, twice.weights[name][key]) for key, w in once.weights[name].items())
    assert any(not torch.equal(w, twice.weights["fake"][key]) for key, w in once.weights["fake"].items())


def test_a_non_finite_number_in_a_further_round_does_not_change_the_student(tmp_path):
    toy = Toy(root=str(tmp_path / "a"), kind="torch", steps=1, batch=4, objective=TwoRounds, bad={2: "second round"})
    result = toy_run(replace(toy, skip=1))
    stopped = toy_run(replace(toy, root=str(tmp_path / "b")))
    assert result.progress is not None and result.progress.skipped == 1
    assert isinstance(stopped.error, NonFiniteError) and "the loss fake/audio on clips clip-0" in str(stopped.error)
    start = toy_run(replace(toy, root=str(tmp_path / "c"), bad={0: "loss"}))
    assert all(torch.equal(w, start.weights["student"][key]) for key, w in result.weights["student"].items())


def test_resume_in_one_process_is_bit_equal(tmp_path):
    whole = toy_run(Toy(root=str(tmp_path / "whole"), kind="torch"))
    part = Toy(root=str(tmp_path / "part"), kind="torch", until=7)
    first = toy_run(part)
    assert isinstance(first.error, TrainingInterrupted)
    assert "stopped after step 7 of 12 (rank 0: requested)" in str(first.error)
    second = toy_run(replace(part, until=None, seed=50))
    assert {**first.losses, **second.losses} == whole.losses
    for name, weights in whole.weights.items():
        assert all(torch.equal(value, second.weights[name][key]) for key, value in weights.items())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Return the same runs on one process."""
    folder = tmp_path_factory.mktemp("one")
    return [toy_run(_at(toy, folder, str(i))) for i, toy in enumerate((UNEVEN, MICRO, ROWS, TWICE))]


def _check_uneven(kinds, on_ranks, one) -> None:
    for results in on_ranks:
        assert len(results) == 4 * len(kinds)
        for i, result in enumerate(results):
            assert result.error is None
            assert largest_error(result, one[i // len(kinds)]) < 1e-5, (i // len(kinds), kinds[i % len(kinds)])


def test_uneven_shards_give_equal_results(on_two, one):
    """11 rows, in passes of about 2, and 6 cycles of 4 kinds of rows."""
    kinds, on_ranks = on_two
    _check_uneven(kinds, [results for _, results in on_ranks], one)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [3, 4])
def test_uneven_shards_give_equal_results_on_more_processes(one, tmp_path, world):
    _check_uneven(ALL, run_on(world, _many, _everywhere(tmp_path, ALL)), one)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("toy", [UNEVEN, ROWS], ids=["uneven", "kinds of rows"])
def test_a_run_of_two_processes_resumes_on_one_three_and_four(tmp_path, toy):
    whole = toy_run(_at(toy, tmp_path, "whole", steps=12))
    zero = ("1", "2", "3")
    worlds = (1, 2, 3, 4)
    halves = [_at(toy, tmp_path, f"{k}-{w}", kind=k, steps=12, until=6) for k in zero for w in worlds]
    for results in run_on(2, _many, halves):
        assert all(isinstance(result.error, TrainingInterrupted) for result in results)
    for w in worlds:
        rests = [_at(toy, tmp_path, f"{k}-{w}", kind=k, steps=12, seed=50) for k in zero]
        for results in run_on(w, _many, rests):
            for result in results:
                assert result.error is None
                error = largest_error(result, whole, first=7)
                print(f"world 2 -> {w}: largest relative error {error:.1e}")
                assert error < 1e-5
