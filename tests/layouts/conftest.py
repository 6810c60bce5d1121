"""Files as the libraries themselves write them, where those are installed: `.[layouts]`.

They stay offline and quiet.
"""

from __future__ import annotations

import importlib.util
import os

LIBRARIES = ("accelerate", "lightning", "moto", "peft", "s3fs", "torchcontrib", "transformers")
INSTALLED = all(map(importlib.util.find_spec, LIBRARIES))
collect_ignore_glob = [] if INSTALLED else ["test_*.py"]

os.environ |= {
    "ACCELERATE_USE_CPU": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
