MODEL = "model.json"
RECORD = "run.json"
OUTCOME = "outcome.json"
