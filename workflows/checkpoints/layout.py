"""Names of the files in a run directory and a checkpoint."""

METADATA_FILE = "model.json"
RUN_FILE = "run.json"
OUTCOME_FILE = "outcome.json"
