"""A broker for tests of clients: a thread with a Unix socket that speaks fluxres.wire.

A handler takes a request and returns its replies: payloads, or errnos (with or without a text) as errors.
`cut` closes every connection that there is, `stop` does so and the listening socket as well; `start` listens
again.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from fluxres.wire.codec import decode, encode
from fluxres.wire.framing import FrameDecoder, frame
from fluxres.wire.messages import Message, MessageFlag, response_to
from fluxres.wire.payload import WireMap, pack, unpack_map

Answer = WireMap | int | tuple[int, str]
Handler = Callable[[Message, WireMap], Iterable[Answer]]


class FakeBroker:
    """Answers by topic; `seen` lists the requests, in order of arrival."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uri = f"local://{path}"
        self.welcome = b"\0"
        self.handlers: dict[str, Handler] = {}
        self.seen: list[tuple[str, WireMap]] = []
        self.messages: list[Message] = []
        self._connections: dict[int, tuple[socket.socket, FrameDecoder]] = {}
        self._wake = socket.socketpair()
        self._cut = False
        self._ending = False
        self.start()

    def __enter__(self) -> FakeBroker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.stop()
        for each in self._wake:
            each.close()

    def on(self, topic: str, *answers: Answer) -> None:
        """Answer `topic` so, each time."""
        self.handlers[topic] = lambda _message, _payload: answers

    def start(self) -> None:
        """Listen, in a thread."""
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        new = self.path.with_name(f"{self.path.name}.next")
        self._listening.bind(str(new))
        self._listening.listen()
        new.rename(self.path)  # as a broker does: there is no moment without a socket
        self._ending = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop as a killed broker does: the socket's name stays."""
        self._ending = True
        self._wake[0].send(b"x")
        self._thread.join(10)
        assert not self._thread.is_alive()

    def cut(self) -> None:
        """Close all connections, and go on listening (takes effect before anything that comes later)."""
        self._cut = True
        self._wake[0].send(b"x")

    def _run(self) -> None:
        while not self._ending:
            sockets = [self._listening, self._wake[1], *(each for each, _ in self._connections.values())]
            for ready in select.select(sockets, [], [], 10)[0]:
                if ready is self._wake[1]:
                    ready.recv(16)
                elif ready is self._listening:
                    self._accept()
                elif ready.fileno() in self._connections:
                    self._serve(ready)
            if self._cut or self._ending:
                self._cut = False
                for connection, _ in self._connections.values():
                    connection.close()
                self._connections.clear()
        self._listening.close()

    def _accept(self) -> None:
        connection, _ = self._listening.accept()
        connection.sendall(self.welcome)
        self._connections[connection.fileno()] = (connection, FrameDecoder())

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            data = connection.recv(65536)
            if data:
                for body in self._connections[connection.fileno()][1].feed(data):
                    self._answer(connection, decode(body))
                return
        del self._connections[connection.fileno()]
        connection.close()

    def _answer(self, connection: socket.socket, message: Message) -> None:
        payload = unpack_map(message.payload)
        self.seen.append((message.topic, payload))
        self.messages.append(message)
        handler = self.handlers.get(message.topic)
        answers: Iterable[Answer] = handler(message, payload) if handler else [(errno.ENOSYS, "no such service")]
        if message.flags & MessageFlag.NORESPONSE:
            return
        for answer in answers:
            if isinstance(answer, dict):
                response = response_to(message, payload=pack(answer))
            else:
                number, text = answer if isinstance(answer, tuple) else (answer, "")
                response = response_to(message, payload=text.encode(), errnum=number)
            if self._cut:
                return
            connection.sendall(frame(encode(response)))
