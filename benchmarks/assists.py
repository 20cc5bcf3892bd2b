"""What an instruction costs that KVM's emulator lacks and the emulation assist finishes, against a plain exit.

Where guest ring 0 is emulated (`trivmm doctor` says so); elsewhere KVM executes them, and there is nothing to measure.
A guest in ring 0 goes round a loop with one such instruction; with a write of the diagnostic port instead, which C
serves too; and with neither, which is taken off both.

``python benchmarks/assists.py [--runs N] [--json]``. They take turns in each run.
"""

from __future__ import annotations

import sys
import time

from results import Figure, median, parser_for, show

from trivmm.hypervisor.kvm.ring0 import look_at_ring0
from trivmm.testing.longmode import CODE, DATA, PORT, LongMode, long_mode

LOOPS = 10_000
BATCH = 1000
PLAIN = "plain exit"
BODIES = {
    "loop": b"",
    PLAIN: bytes.fromhex("e680"),  # out %al, $0x80
    "STAC": bytes.fromhex("0f01cb"),
    "POPCNT": bytes.fromhex("f3480fb8c3"),
    "SSE, registers": bytes.fromhex("660ffec1"),  # paddd %xmm1, %xmm0
    "SSE, memory": bytes.fromhex("660ffe07"),  # paddd (%rdi), %xmm0
    "CMPXCHG16B": bytes.fromhex("f0480fc70f"),  # lock cmpxchg16b (%rdi)
}


def seconds(guest: LongMode, body: bytes, loops: int) -> float:
    back = 256 - len(body) - 4
    loop = body + b"\xff\xc9" + (b"\x75" + bytes((back,)) if back >= 128 else b"\x0f\x85" + _near(body))  # dec ecx; jnz
    guest.memory.write(CODE, loop + bytes((0xE6, PORT, 0xF4)))
    guest.put_registers(rip=CODE, rcx=loops, rdi=DATA, rbx=0)
    guest.cpu._changed()
    began = time.perf_counter()
    guest.run()
    return time.perf_counter() - began


def _near(body: bytes) -> bytes:
    return (-(len(body) + 8)).to_bytes(4, "little", signed=True)


def one_run(guest: LongMode) -> dict[str, float]:
    """Microseconds each, without the loop's."""
    took = {name: seconds(guest, body, LOOPS) for name, body in BODIES.items()}
    each = {name: (value - took["loop"]) / LOOPS * 1e6 for name, value in took.items() if name != "loop"}
    batch = seconds(guest, BODIES["SSE, registers"] * BATCH, LOOPS // BATCH)
    return each | {f"SSE, {BATCH} in a row": batch / LOOPS * 1e6}


def main() -> None:
    arguments = parser_for(__doc__, runs=7).parse_args()
    if not look_at_ring0().emulated:
        sys.exit("KVM executes guest ring 0 here: nothing is assisted")
    with long_mode() as guest:
        one_run(guest)  # from its first assisted instruction on, exits bring the registers
        runs = [one_run(guest) for _ in range(arguments.runs)]
    figures = []
    for name in runs[0]:
        micros = median([run[name] for run in runs])
        if name == PLAIN:
            figures.append(Figure(name, micros, "us"))
            continue
        figures.append(Figure(f"{name}, a second", 1e6 / micros, "/s", aim=20_000, note=f"{micros:.2f} us each"))
        figures.append(Figure(f"{PLAIN} / {name}", median([run[PLAIN] / run[name] for run in runs]), aim=0.4))
    show("instructions that the emulation assist finishes", figures, as_json=arguments.json)


if __name__ == "__main__":
    main()
