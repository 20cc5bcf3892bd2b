"""One ioctl by its name, with the kernel's refusal as a :class:`HypervisorError`. Stateless."""

from __future__ import annotations

import os
from typing import Any

from trivmm._native import ffi, lib
from trivmm.errors import HypervisorError

__all__ = ["kvm_call"]


def kvm_call(
    fd: int, name: str, argument: int | bytes | bytearray | Any = 0, *, allow: tuple[int, ...] = (), hint: str = ""
) -> int:
    """The ioctl's result, or ``-errno`` where that errno is in ``allow``.

    ``argument``: an int goes as it is, bytes by address (a bytearray is filled), anything else is a cffi pointer.

    :raises HypervisorError: on any other failure; ``hint`` is its remedy.
    """
    # `held` keeps the buffer export alive across the call: a cast pointer does not.
    held: Any = argument
    if isinstance(argument, int):
        pointer = ffi.cast("void *", argument)
    elif isinstance(argument, bytes | bytearray):
        held = ffi.from_buffer("uint8_t[]", argument)
        pointer = ffi.cast("void *", held)
    else:
        pointer = argument
    result = int(lib.tv_ioctl(fd, getattr(lib, name), pointer))
    del held
    if result < 0 and -result not in allow:
        raise HypervisorError(name, os.strerror(-result), hint, errno=-result)
    return result
