"""Names of the files in a run directory, a checkpoint and an exported folder."""

METADATA_FILE = "model.json"
RUN_FILE = "run.json"
OUTCOME_FILE = "outcome.json"

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
HUB_WEIGHTS = "model"  # model.safetensors, or its shards
INDEX_FILE = "model.safetensors.index.json"
CARD_FILE, CARD_TEXT_FILE = "card.json", "README.md"
TRAINING_FILE = "training.json"
PLOT_FILE = "frontier.png"
"""Names in an exported folder (``mfctl export``)."""
