"""Check the direction of effects after ``mfctl study --quick``, a few CPU minutes of training."""

import pytest

from workflows.study.config import study_preset
from workflows.study.results_table import EARLY, LATE, ResultTable
from workflows.study.scheduler import load_costs, load_scores, run_tasks, select_methods

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> ResultTable:
    out = tmp_path_factory.mktemp("quick")
    methods = select_methods(["quick"], [0])
    outcome = run_tasks(study_preset("quick"), out, methods, workers=2, device="cpu", minutes=None)
    assert outcome.done and not outcome.failed
    return ResultTable(load_scores(out), load_costs(out))


@pytest.mark.parametrize("window", [EARLY, LATE])
def test_one_few_step_call_beats_one_euler_step(table, window):
    few = table.get("frechet", "mutual", "few", steps=1, window=window).mean
    assert few < 0.6 * table.get("frechet", "teacher_forcing", "multi", steps=1, window=window).mean


def test_four_few_steps_keep_identity_better_than_four_euler_steps(table):
    few = table.get("identity_error", "mutual", "few", steps=4, window=LATE).mean
    assert few < 0.8 * table.get("identity_error", "teacher_forcing", "multi", steps=4, window=LATE).mean


def test_literal_reading_ignores_history(table):
    """Its pose correlation is lower, and another clip's history is nearly as good."""
    ours, literal = (table.get("lag1", m, "few", steps=4, window=LATE).mean for m in ("mutual", "literal"))
    assert literal < 0.95 < ours
    for modality in ("video", "audio"):
        assert table.history_use("literal", modality).mean < 0.9 * table.history_use("mutual", modality).mean
    frechet = {m: table.get("frechet", m, "few", steps=4, window=LATE).mean for m in ("mutual", "literal")}
    assert frechet["mutual"] < 0.8 * frechet["literal"]
