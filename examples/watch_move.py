"""Start a migration and watch it to its end, with nothing but Python's standard library.

    python watch_move.py /run/vm.sock unix:/run/move.sock

The receiver (``trivmm remote … receive-migration``, ``ch-remote … receive-migration``) must be waiting there. Prints a
line a round, then how it ended; exit code 0 when the VM has moved, 1 when it has not: then it runs where it was.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import time


class Api(http.client.HTTPConnection):
    """HTTP over the VMM's unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(60)
        self.sock.connect(self.path)


def call(path, method, route, body=None):
    """(status, JSON or None)."""
    connection = Api(path)
    try:
        connection.request(method, f"/api/v1/{route}", body=None if body is None else json.dumps(body))
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    return answer.status, json.loads(content) if content else None


def main(path, url):
    status, said = call(path, "PUT", "vm.send-migration", {"destination_url": url})
    if status >= 300:
        print("not accepted:", ": ".join(said))
        return 1
    shown = 0
    while True:
        _, progress = call(path, "GET", "vm.migration-progress")
        for each in progress["rounds"]:
            if each["number"] > shown:
                shown = each["number"]
                print(f"round {shown}: {each['pages']} pages, {each['bytes'] >> 10} KiB in {each['seconds']:.3f} s")
        state, details = next(iter(progress["state"].items()))
        if state == "Finished":
            print(f"moved in {progress['elapsed_s']:.2f} s, downtime {progress['downtime_ms']} ms")
            return 0
        if state != "Ongoing":
            print(f"{state.lower()}: {details['error_msg']}")
            return 1
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
