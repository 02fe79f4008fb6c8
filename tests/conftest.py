"""What every test starts with: no telemetry, few threads, shapes checked, and no use of the user's own runs."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side

from workflows.utils.environment import CWD_ENV, apply_defaults

apply_defaults()
for name in (CWD_ENV, "MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
    os.environ.pop(name, None)
