"""Federated pre-training of Mixture-of-Experts language models without full replicas."""

import os

__version__ = "0.1.0"

# Read when those packages are imported. Their bars fill logs, and a console has lines of ours.
for _name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(_name, "1")
