"""Builds ``trivmm._native`` (cffi, API mode) from every ``.c`` and ``.cdef`` file of this folder.

One subsystem is one ``NAME.c``, with ``NAME.h`` for other C files and ``NAME.cdef`` for what Python may call.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# Order matters to cffi only where one .cdef names a struct of another.
FIRST = ["assist.cdef", "image.cdef", "limit.cdef", "line.cdef", "memory.cdef", "park.cdef", "ring.cdef", "worker.cdef"]


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _cdefs() -> list[Path]:
    every = sorted(HERE.glob("*.cdef"))
    return sorted(every, key=lambda path: (path.name not in FIRST, path.name))


ffibuilder = FFI()
for _cdef in _cdefs():
    ffibuilder.cdef(_cdef.read_text(encoding="utf-8"))

ffibuilder.set_source(
    "trivmm._native",
    "\n".join(f'#include "{path.name}"' for path in sorted(HERE.glob("*.h"))),
    sources=[_relative(path) for path in sorted(HERE.glob("*.c"))],
    include_dirs=[_relative(HERE)],
    depends=[_relative(path) for path in sorted(HERE.glob("*.h"))],
    extra_compile_args=["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    libraries=["pthread", "dl"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
