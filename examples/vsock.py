"""Say what stands on stdin to a port of a guest, and show what it answers. ``python examples/vsock.py SOCKET PORT``

SOCKET is the path of ``--vsock cid=3,socket=SOCKET``. Standard library only.
"""

import shutil
import socket
import sys
import threading


def say(guest: socket.socket) -> None:
    with guest.makefile("wb") as stream:
        shutil.copyfileobj(sys.stdin.buffer, stream)
    guest.shutdown(socket.SHUT_WR)


def main(path: str, port: str) -> int:
    with socket.socket(socket.AF_UNIX) as guest, guest.makefile("rb") as answer:
        guest.connect(path)
        guest.sendall(b"CONNECT %d\n" % int(port))
        if not answer.readline().startswith(b"OK "):  # it ends without a word when the guest does not listen there
            print(f"port {port}: refused", file=sys.stderr)
            return 1
        threading.Thread(target=say, args=(guest,), daemon=True).start()
        shutil.copyfileobj(answer, sys.stdout.buffer)
        return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
