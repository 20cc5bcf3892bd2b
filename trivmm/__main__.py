"""``trivmm`` and ``python -m trivmm``: the process's first and last moments, when Ctrl-C must not be a traceback."""

from __future__ import annotations

from trivmm.signals import ignore_signals, leave_at_interrupt

__all__ = ["start"]


def start() -> int:
    """The command of ``sys.argv``; gives the exit code of the process, which ends now."""
    leave_at_interrupt()
    from trivmm.cli import main

    code = main()
    ignore_signals()
    return code


if __name__ == "__main__":
    raise SystemExit(start())
