"""Boot a PVH kernel and wait for what it prints. ``python examples/boot.py [KERNEL] [TEXT] [CMDLINE]``

Without arguments: the bundled probe guest.
"""

import sys

import trio

from trivmm import CpusConfig, MemoryConfig, PayloadConfig, VmConfig, open_vm
from trivmm.guest import probe_cmdline, probe_path


async def main(kernel: str, text: str, cmdline: str) -> None:
    config = VmConfig(PayloadConfig(kernel, cmdline), cpus=CpusConfig(1), memory=MemoryConfig(64 << 20))
    async with open_vm(config) as vm:
        await vm.boot()
        with trio.fail_after(120):
            said = await vm.wait_for_console(text)
        print(said.text.decode(errors="replace"))


if __name__ == "__main__":
    given = sys.argv[1:]
    defaults = [str(probe_path()), "PROBE ready", probe_cmdline(cpus=1)]
    trio.run(main, *(given + defaults[len(given) :]))
