"""Every test, and every process that a test starts, runs the installed package: never the tree pytest was called in."""

from __future__ import annotations

import os

os.environ["PYTHONSAFEPATH"] = "1"
