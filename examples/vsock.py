"""Say what stands on stdin to a port of a guest, and show what it answers. ``python examples/vsock.py SOCKET PORT``

SOCKET is the path of ``--vsock cid=3,socket=SOCKET``. Standard library only.
"""

import shutil
import socket
import sys
import threading


def say() -> None:
    with guest.makefile("wb") as stream:
        shutil.copyfileobj(sys.stdin.buffer, stream)
    guest.shutdown(socket.SHUT_WR)


with socket.socket(socket.AF_UNIX) as guest, guest.makefile("rb") as answer:
    guest.connect(sys.argv[1])
    guest.sendall(b"CONNECT %d\n" % int(sys.argv[2]))
    if not answer.readline().startswith(b"OK "):  # it ends without a word when the guest does not listen there
        sys.exit(f"port {sys.argv[2]}: refused")
    threading.Thread(target=say, daemon=True).start()
    shutil.copyfileobj(answer, sys.stdout.buffer)
