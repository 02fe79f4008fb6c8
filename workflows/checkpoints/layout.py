METADATA_FILE = "model.json"
RUN_FILE = "run.json"
OUTCOME_FILE = "outcome.json"
