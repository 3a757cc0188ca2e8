"""Readers of the status endpoint, many in one process: `python -m tests.bench.readers HOST PORT READERS STUCK`.

Each opens a WebSocket and subscribes to everything. Readers take what comes, and answer pings; stuck ones subscribe,
and never read again. It prints `ready` when all readers have their first picture, goes on until its standard input
ends, and then prints how many messages and bytes came since, and how many connections the endpoint had ended.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import sys
from typing import Final

from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, TextMessage

READ: Final = 1 << 16
HEAD: Final = 300
"""Characters of a message that are looked at."""
HANDSHAKE_TIME: Final = 30.0
"""Seconds that the endpoint has to answer a handshake."""
SNAPSHOT: Final = re.compile(r'\{"id":1,"type":"snapshot",[^{]*"more":false')
"""The last part of one."""
TOPICS: Final = ("instance", "overlay", "resources", "jobs", "events", "log")


class Reader:
    """One WebSocket that reads."""

    def __init__(self, host: str, port: int) -> None:
        self.sock = socket.create_connection((host, port), HANDSHAKE_TIME)
        self.messages = self.bytes = 0
        self.begun = False
        """Whether it has its first picture."""
        self._head = ""
        self._websocket = Connection(ConnectionType.CLIENT)
        self.sock.sendall(
            f"GET /ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Protocol: fluxres.status.v1\r\n\r\n".encode()
        )
        head = b""
        while b"\r\n\r\n" not in head:
            more = self.sock.recv(READ)
            if not more:
                raise ConnectionError(f"the endpoint closed: {head!r}")
            head += more
        answer, _, rest = head.partition(b"\r\n\r\n")
        if b" 101 " not in answer.partition(b"\r\n")[0]:
            raise ConnectionError(f"the endpoint refused: {answer!r} {rest!r}")
        self._websocket.receive_data(rest)
        subscribe = json.dumps({"type": "subscribe", "id": 1, "topics": TOPICS})
        self.sock.sendall(self._websocket.send(Message(data=subscribe)))

    def read(self) -> bool:
        """Take what has come; returns False at the end."""
        try:
            data = self.sock.recv(READ)
        except ConnectionError:
            data = b""
        if not data:
            return False
        self.bytes += len(data)
        self._websocket.receive_data(data)
        for event in self._websocket.events():
            if isinstance(event, Ping):
                self.sock.sendall(self._websocket.send(event.response()))
            elif isinstance(event, CloseConnection):
                return False
            elif isinstance(event, TextMessage | BytesMessage):  # a piece of one
                self._head += str(event.data)[: HEAD - len(self._head)]
                if event.message_finished:
                    self.messages += 1
                    self.begun = self.begun or SNAPSHOT.match(self._head) is not None
                    self._head = ""
        return True


def main() -> int:
    """Read until standard input ends."""
    host, port, readers, stuck = sys.argv[1], *map(int, sys.argv[2:])
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    still = [Reader(host, port) for _ in range(stuck)]
    reading = [Reader(host, port) for _ in range(readers)]
    for reader in reading:
        selector.register(reader.sock, selectors.EVENT_READ, reader)
    gone = 0
    ready = False
    while True:
        if not ready and all(reader.begun for reader in reading):
            print("ready", flush=True)
            ready = True
            for reader in reading:
                reader.messages = reader.bytes = 0
        for key, _ in selector.select():
            if key.data is None:
                total = sum(reader.messages for reader in reading), sum(reader.bytes for reader in reading)
                print(json.dumps({"messages": total[0], "bytes": total[1], "gone": gone, "stuck": len(still)}))
                return 0
            if not key.data.read():
                selector.unregister(key.fileobj)
                gone += 1


if __name__ == "__main__":
    sys.exit(main())
