"""The page of a sweep in MLflow: the parent run describes the frontier, also after the sweep was extended."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from workflows.evaluation.mlflow_report import log_sweep_to_mlflow

mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")


def setting(steps: int, sync: float) -> Any:
    row = {"label": "talker", "mode": "few", "steps": steps, "nfe": steps, "guidance": 1.0, "seed": 0, "window": "all"}
    name = f"talker-few-{steps:02d}"
    return {"digest": "d", "name": name, "key": name, "samples": [], "rows": [row | {"metrics": {"sync": sync}}]}


def test_the_parent_run_describes_the_frontier(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "results.json").write_text("[]")
    store: Any = SimpleNamespace(folder=tmp_path, path=tmp_path / "results.json")
    facts: Any = {"dataset": "faces", "clips": 2}
    for results in ([setting(4, 0.5)], [setting(4, 0.5), setting(8, 0.75)]):  # the second call extends the sweep
        parent = log_sweep_to_mlflow(results, [], store, uri=uri, name="sweep", facts=facts)
    text = mlflow.MlflowClient(uri).get_run(parent).data.tags["mlflow.note.content"]
    assert "| talker | few | 4 | 4 | 0 | 0.5 |" in text
    assert "| talker | few | 8 | 8 | 0 | 0.75 |" in text
