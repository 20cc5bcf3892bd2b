"""Every test, and every process that a test starts, runs the installed package: never the tree pytest was called in.

It hears Ctrl-C, too: a script that runs pytest in its background has SIGINT ignored for it and all that it starts.
"""

from __future__ import annotations

import os
import signal

os.environ["PYTHONSAFEPATH"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
