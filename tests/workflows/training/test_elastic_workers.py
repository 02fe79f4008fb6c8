"""Elastic run on two machines: it continues after the loss of one, and grows when another joins."""

import pytest

from tests.helpers import training_driver
from tests.helpers.latent_dataset import write_dataset
from tests.helpers.small_training import SMALL, killed_at
from workflows.tracking.tracker import read_json_lines
from workflows.training.train import train_stage

STEPS = 4000
SETS = (*SMALL, "engine.kind=torch", "data.batch=8", "log_every=1", "eval_every=100000", "checkpoint.every=80")


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_the_run_shrinks_after_a_lost_machine_and_grows_with_a_new_one(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    data = write_dataset(tmp_path / "set")
    sets = (*SETS, "engine.workers=[1,2]", f"steps={STEPS}", "engine.max_failures=5")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        other = cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        process = training_driver.start("audio", data=data, runs_dir=tmp_path / "runs", sets=sets)
        runs = tmp_path / "runs"
        try:
            training_driver.wait_for(runs, f"audio 25/{STEPS} ", process)
            cluster.remove_node(other, allow_graceful=False)
            shrunk = training_driver.wait_for(runs, "on 1 workers", process, 400)
            cluster.add_node(num_cpus=1)
            grown = training_driver.wait_for(runs, "on 2 workers", process, 400)
            print(f"shrunk after {shrunk:.0f} s, grown after {grown:.0f} s")
        finally:
            process.kill()
            process.wait()
    finally:
        cluster.shutdown()
    entries = read_json_lines(runs / "a" / "metrics.jsonl")
    steps = [entry["step"] for entry in entries]
    assert steps == list(range(len(steps))), "no step is lost or logged twice"
    one = (*SETS, "engine.workers=1", f"steps={STEPS}")
    with pytest.raises(KeyboardInterrupt):
        train_stage("audio", data=data, sets=one, runs_dir=tmp_path / "one", run="a", launch=killed_at(len(steps)))
    reference = {e["step"]: e for e in read_json_lines(tmp_path / "one" / "a" / "metrics.jsonl")}
    for entry in entries[1:]:
        expected = reference[entry["step"]]["flow_matching/audio"]
        assert entry["flow_matching/audio"] == pytest.approx(expected, rel=1e-3), "rounding alone differs"
