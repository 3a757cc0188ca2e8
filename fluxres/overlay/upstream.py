"""The link to the parent: join it, stay joined, and panic when it is lost.

    CONNECTING --connected--> HELLO --welcome--> JOINED --lost, kiss of death--> SubtreePanic
        ^  '----back-off-------'  '--refused, a person has to mend it--> Refusal
        '------refused for now----'--answer lost--> SubtreePanic

A hello is sent once for an incarnation: where its answer is lost the parent may have joined us, and only a new
incarnation can tell the two apart. Until then connecting is tried again for ever, with back-off and full jitter.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from random import Random
from typing import Final

import trio

from fluxres.base.errors import ProtocolError, Refusal
from fluxres.overlay.control import DISCONNECT, HEARTBEAT, HELLO, REFUSED, WELCOME, reason_of
from fluxres.overlay.errors import ConnectError, ParentLost
from fluxres.overlay.hello import RETRYABLE, Hello, Welcome, check_welcome
from fluxres.overlay.link import Link
from fluxres.overlay.settings import TbonSettings
from fluxres.overlay.transport import Connection, Transport
from fluxres.wire.codec import decode, encode
from fluxres.wire.messages import Message, MessageType, control

log = logging.getLogger("fluxres.overlay")

BACKOFF_MIN: Final = 0.02
BACKOFF_MAX: Final = 0.25
"""Seconds between two tries to reach the parent, doubled from the one to the other, with full jitter."""
BACKOFF_REFUSED: Final = 5.0
"""The longest pause where the parent can be reached, and refuses us for now."""


class Upstream:
    """The parent's side of one incarnation.

    `take` gets every message of the link but the kiss of death. `left` is told why the link is lost, and what the
    children are to be told: of a panic that began further up, where it began.
    """

    def __init__(
        self,
        *,
        parent: int,
        hello: Hello,
        transport: Transport,
        settings: TbonSettings,
        random: Random,
        joined: Callable[[Link], None],
        left: Callable[[Link, str, str], None],
        take: Callable[[Link, Message], None],
    ) -> None:
        self._parent = parent
        self._hello = hello
        self._transport = transport
        self._settings = settings
        self._random = random
        self._joined = joined
        self._left = left
        self._take = take
        self._lost_because = ""
        self._passed_on = ""
        """The reason that the parent's kiss of death gave."""
        self.link: Link | None = None

    async def run(self, task_status: trio.TaskStatus[Welcome] = trio.TASK_STATUS_IGNORED) -> None:
        """Join, report the welcome, and serve. Raises SubtreePanic when the link ends, Refusal where it cannot be."""
        backoff, told = BACKOFF_MIN, ""
        while True:
            try:
                connection = await self._transport.connect(self._parent)
            except ConnectError as error:
                why, bound = f"waiting for the parent, rank {self._parent}: {error}", BACKOFF_MAX
            else:
                why = f"cannot join rank {self._parent}: {await self._attempt(connection, task_status)}"
                bound = BACKOFF_REFUSED
            if why != told:  # once, not at every try
                log.warning("%s", why)
                told = why
            await trio.sleep(self._random.uniform(0, min(backoff, bound)))  # full jitter
            backoff = min(2 * backoff, BACKOFF_REFUSED)

    def lose(self, why: str) -> None:
        """Declare the parent lost."""
        if self.link is not None and not self._lost_because:
            self._lost_because = why
            self.link.close()

    async def _attempt(self, connection: Connection, task_status: trio.TaskStatus[Welcome]) -> str:
        """Say hello over a connection; returns why it is refused for now."""
        refusal = ""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            try:
                match await self._say_hello(connection):
                    case str(refusal):
                        pass
                    case (welcome, rest):
                        await self._serve(connection, welcome, rest, task_status)
            finally:
                connection.close()
                nursery.cancel_scope.cancel()
        return refusal

    async def _say_hello(self, connection: Connection) -> tuple[Welcome, list[bytes]] | str:
        """The parent's welcome and what came with it; why, where it refuses for now or the connection never stood."""
        with trio.move_on_after(self._settings.connect_timeout) as opening:
            try:
                await connection.handshake()
            except ConnectError as error:
                return str(error)
        if opening.cancelled_caught:
            return f"no handshake within {self._settings.connect_timeout:g}s"
        connection.send(encode(control(HELLO, payload=self._hello.encode())))
        try:
            frames = await self._await_answer(connection)
            return self._answered(decode(frames[0]), frames[1:])
        except ProtocolError as error:
            raise ParentLost(f"the parent, rank {self._parent}, gave no proper answer: {error}") from error

    async def _await_answer(self, connection: Connection) -> list[bytes]:
        """The answer and what came with it. A parent that is not online itself yet sends heartbeats until it is."""
        while True:
            with trio.move_on_after(self._settings.timeout) as silence:
                frames = await connection.receive()
            if silence.cancelled_caught:
                why = f"it has been silent for {self._settings.timeout:g}s after our hello"
                raise ParentLost(f"the parent, rank {self._parent}, is lost: {why}")
            if not frames:
                raise ParentLost(f"the parent, rank {self._parent}, is lost: it closed the connection at our hello")
            while frames and _is_heartbeat(decode(frames[0])):
                del frames[0]
            if frames:
                return frames

    def _answered(self, answer: Message, rest: list[bytes]) -> tuple[Welcome, list[bytes]] | str:
        if answer.type is MessageType.CONTROL and answer.control == REFUSED:
            why = f"refused: {reason_of(answer)}"
            if answer.matchtag not in RETRYABLE:
                raise Refusal(f"cannot join rank {self._parent}: {why} ({os.strerror(answer.matchtag)})")
            return why
        if answer.type is not MessageType.CONTROL or answer.control != WELCOME:
            raise ProtocolError(f"cannot take a {answer.type.name.lower()} for the answer to a hello")
        welcome = Welcome.decode(answer.payload)
        wrong = check_welcome(welcome, parent_rank=self._parent, instance=self._hello.instance)
        if wrong is not None:
            raise Refusal(f"cannot join rank {self._parent}: {wrong}")
        return welcome, rest

    async def _serve(
        self, connection: Connection, welcome: Welcome, frames: list[bytes], task_status: trio.TaskStatus[Welcome]
    ) -> None:
        """Be joined, until the link is lost. Always raises."""
        link = self.link = Link(connection, id=welcome.uuid, rank=welcome.rank)
        self._joined(link)
        why = "the connection has ended"
        try:
            task_status.started(welcome)
            while frames or (frames := await connection.receive()):
                for body in frames:
                    message = link.decode(body)
                    if message.type is MessageType.CONTROL and message.control == DISCONNECT:
                        self._passed_on = reason_of(message)
                        self.lose(f"it has cut us off: {self._passed_on}")
                        break
                    self._take(link, message)
                frames = []
        except ProtocolError as error:
            why = str(error)
        finally:
            why = self._lost_because or why
            self.link = None
            self._left(link, why, self._passed_on or f"subtree panic at rank {self._hello.rank}: {why}")
        raise ParentLost(f"the parent, rank {welcome.rank}, is lost: {why}")


def _is_heartbeat(message: Message) -> bool:
    return message.type is MessageType.CONTROL and message.control == HEARTBEAT
