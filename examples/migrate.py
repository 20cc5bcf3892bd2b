"""Move a VM live between two owners in one program, and watch it do so.

In real life the two blocks live in two processes, and the URL names a socket that both can reach.
"""

import tempfile

import trio

from trivmm import CpusConfig, MemoryConfig, MigrationProgress, PayloadConfig, VmConfig, open_incoming, open_vm
from trivmm.guest import probe_cmdline, probe_path


def show(progress: MigrationProgress) -> None:
    print(f"  {progress.phase.value:10} round {progress.round}  {progress.bytes_sent >> 10} KiB sent")


async def main() -> None:
    payload = PayloadConfig(str(probe_path()), probe_cmdline(cpus=1, rate=100, cycle="rng"))
    config = VmConfig(payload, cpus=CpusConfig(1), memory=MemoryConfig(64 << 20))
    with tempfile.TemporaryDirectory() as folder:
        async with open_vm(config) as vm, open_incoming(f"unix:{folder}/m.sock") as incoming:
            await vm.boot()
            with trio.fail_after(120):
                await vm.wait_for_console("PROBE ready")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(incoming.receive)
                report = await vm.migrate_to(incoming.url, downtime_ms=1000, on_progress=show)
            print(f"moved; downtime {report.downtime.total_ms:.1f} ms")
            with trio.fail_after(120):
                await incoming.vm.wait_for_console("PROBE t=")
            print("running there:", incoming.vm.state.value)


if __name__ == "__main__":
    trio.run(main)
