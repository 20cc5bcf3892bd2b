"""The command line: ``trivmm [run] …``, ``trivmm remote …``, ``trivmm doctor``, ``trivmm demo``,
``trivmm fake``, ``trivmm image``.

Exit codes: 0 done; 1 something failed; 2 the user's mistake, one line on stderr; 3 the guest crashed; 130 interrupted.
What ends a process first decides; a demo that is told to end by a signal gives 128 and its number (143 for SIGTERM).
Each command's module is imported when it is used: ``trivmm remote`` never imports trio.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from trivmm.cli.parser import REFUSED, USAGE, UsageError, run_parser
from trivmm.errors import ConfigError, TrivmmError, one_line
from trivmm.signals import interruptible

__all__ = ["EXIT_CRASH", "EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_USAGE", "main", "say_error"]

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_CRASH: Final = 3
EXIT_INTERRUPTED: Final = 130


def say_error(error: object) -> None:
    """One line on stderr."""
    line = " ".join(str(error).splitlines()) or type(error).__name__
    print(f"error: {one_line(line)}", file=sys.stderr, flush=True)


def _is_built() -> bool:
    """The C beside these very files: an editable install lends a copy of the tree the C of another one."""
    found = find_spec("trivmm._native")
    return found is not None and found.origin is not None and Path(found.origin).parent == Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = ("run", arguments)
    if arguments and arguments[0] in ("run", "remote", "doctor", "demo", "fake", "image"):
        command, rest = arguments[0], arguments[1:]
    elif arguments and not arguments[0].startswith("-"):
        say_error(UsageError(f"{arguments[0]}: unknown command; use run, remote, doctor, demo, fake or image"))
        return EXIT_USAGE
    elif not arguments:
        print(USAGE)
        return 0
    if command != "remote" and not _is_built():
        here = Path(__file__).parents[2]
        say_error(f"{here}: not built here; `pip install {here}`, then run trivmm from anywhere else")
        return EXIT_USAGE
    try:
        match command:
            case "remote":
                from trivmm.cli.remote import remote

                interruptible()
                return remote(rest)
            case "doctor":
                from trivmm.cli.doctor import doctor

                interruptible()
                return doctor(rest)
            case "demo":
                from trivmm.cli.demo_command import demo

                return demo(rest)
            case "fake":
                from trivmm.cli.fake import fake

                return fake(rest)
            case "image":
                from trivmm.cli.image import image

                interruptible()
                return image(rest)
            case _:
                run_parser().parse(rest, REFUSED)  # help, and most mistakes, come before trio's import

                from trivmm.cli.run import run

                return run(rest)
    except (UsageError, ConfigError) as error:
        say_error(error)
        return EXIT_USAGE
    except BrokenPipeError:  # our reader went away: nobody is left to be told
        sys.stderr.close()
        return EXIT_FAILED
    except (TrivmmError, OSError) as error:
        say_error(error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
