"""Pause and resume a VM; a vCPU that does not stop in time is named and the VM runs on."""

import trio

from trivmm import CpusConfig, MemoryConfig, PauseTimeout, PayloadConfig, VmConfig, open_vm
from trivmm.guest import probe_cmdline, probe_path


async def main() -> None:
    payload = PayloadConfig(str(probe_path()), probe_cmdline(cpus=1, rate=100))
    async with open_vm(VmConfig(payload, cpus=CpusConfig(1), memory=MemoryConfig(64 << 20))) as vm:
        await vm.boot()
        with trio.fail_after(120):
            await vm.wait_for_console("PROBE ready")
        for _ in range(3):
            try:
                await vm.pause()
            except PauseTimeout as late:
                print("rolled back:", late.diagnosis)
                continue
            print("paused:", vm.state.value, vm.info()["vcpus"])
            await vm.resume()
        print("running:", vm.state.value)


if __name__ == "__main__":
    trio.run(main)
