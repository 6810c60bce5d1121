"""Files as timm and torchvision write them, where those are installed: `.[timm]`."""

from __future__ import annotations

import importlib.util
import os

INSTALLED = all(map(importlib.util.find_spec, ("timm", "torchvision")))
collect_ignore_glob = [] if INSTALLED else ["test_*.py"]

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
