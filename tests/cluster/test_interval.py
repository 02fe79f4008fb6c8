"""Compare the simulation of docs/guides/scaling.md with the closed forms of Young and Daly."""

import pytest

from tests.helpers.checkpoint_interval_simulation import Fleet, best, daly, expected, lost, simulate

PLAIN = Fleet(mtbf=3600.0, pause=20.0, written=0.0, restart=120.0)


@pytest.mark.parametrize("interval", [100.0, 360.0, 1500.0])
def test_mean_time_equals_dalys_formula(interval: float) -> None:
    work = 100 * PLAIN.mtbf
    mean = sum(simulate(PLAIN, interval, work, seed) for seed in range(40)) / 40
    assert mean == pytest.approx(expected(PLAIN, interval, work), rel=0.02)


def test_without_failures_only_pauses_cost() -> None:
    calm = Fleet(mtbf=1e12, pause=20.0, written=50.0, restart=120.0)
    assert simulate(calm, 100.0, 1000.0, 0) == pytest.approx(1000 + 9 * 20)
    assert simulate(calm, 10.0, 30.0, 0) == pytest.approx(10 + 20 + 10 + 20 + 20 + 10), (
        "a save waits for the previous one"
    )


@pytest.mark.parametrize("pause", [20.0, pytest.param(2.0, marks=pytest.mark.slow)])
def test_best_interval_equals_dalys_formula(pause: float) -> None:
    fleet = Fleet(mtbf=3600.0, pause=pause, written=0.0, restart=120.0)
    assert best(fleet, runs=3) == pytest.approx(daly(pause, fleet.mtbf), rel=0.45), "the optimum is flat"
    assert lost(fleet, best(fleet, runs=3)) == pytest.approx(lost(fleet, daly(pause, fleet.mtbf)), rel=0.02)


def test_dalys_interval_equals_youngs_for_short_saves() -> None:
    assert daly(1.0, 1e6) == pytest.approx((2 * 1.0 * 1e6) ** 0.5, rel=0.002)


def test_background_writing_loses_more_per_failure_but_does_not_block() -> None:
    later = Fleet(mtbf=3600.0, pause=20.0, written=100.0, restart=120.0)
    more = lost(later, 400.0) - lost(PLAIN, 400.0)
    assert more == pytest.approx(100.0 / 3600.0 * (1 - lost(PLAIN, 400.0)), rel=0.25)
