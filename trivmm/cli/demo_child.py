"""A VMM process that ends with the demo that started it, even when that is killed and can end nobody any more.

``python -m trivmm.cli.demo_child PARENT [option …]`` is ``trivmm [option …]``, to which the kernel sends SIGTERM when
its parent's thread ends (``PR_SET_PDEATHSIG``, prctl(2)). A parent that was gone before that is seen by its number.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

__all__ = ["child_command"]

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def child_command(options: Sequence[str]) -> list[str]:
    """How this process's main thread starts one."""
    return [sys.executable, "-P", "-m", __name__, str(os.getpid()), *options]


def start() -> int:
    """Gives the exit code."""
    parent, options = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # refused, the child is only not told
    if os.getppid() != parent:
        return 0

    from trivmm.cli import main

    return main(options)


if __name__ == "__main__":
    raise SystemExit(start())
