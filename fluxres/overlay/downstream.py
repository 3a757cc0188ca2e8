"""The children's side of the overlay: a listener, an admission for each connection, and a subtree scope for each child.

    connection --hello--> HELD --we are online--> judged --accepted--> JOINED --lost--> gone
                                                    '--refused, with errnum and reason--> closed

A hello for a rank that still counts as online is a crash that we did not see: the old incarnation is declared lost, its
RPCs fail, its scope is cancelled, and only then is the new one judged (DESIGN §6). The nursery of a child's connection
is its subtree scope: whatever was started for a rank below that child is cancelled with it.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Final

import trio

from fluxres.base.errors import ProtocolError
from fluxres.overlay.control import DISCONNECT, GOODBYE, HEARTBEAT, HELLO, REFUSED, WELCOME, reason
from fluxres.overlay.errors import ConnectError
from fluxres.overlay.hello import Hello, Known, Refuse, Welcome, judge
from fluxres.overlay.link import Link
from fluxres.overlay.settings import TbonSettings
from fluxres.overlay.transport import Connection, Listener
from fluxres.wire.codec import decode, encode
from fluxres.wire.messages import Message, MessageType, control

log = logging.getLogger("fluxres.overlay")

ACCEPT_PAUSE: Final = 0.1
"""Seconds before a connection is accepted again that could not be."""
MAX_HELD: Final = 4096
"""Connections that may be on their way to a verdict, hellos that wait for us to be online included."""
_HEARTBEAT: Final = encode(control(HEARTBEAT))


class Child:
    """One joined child: its link, and the scopes of what runs on behalf of its subtree."""

    def __init__(self, link: Link, hello: Hello, scope: trio.CancelScope) -> None:
        self.link = link
        self.hello = hello
        self.scopes = {scope}
        self.why = ""
        """Why it is lost; empty while it is not."""
        self.left = False
        """Whether it has said goodbye."""
        self.gone = trio.Event()

    def lose(self, why: str) -> None:
        """Declare the child lost, and cancel its subtree scope."""
        if not self.why:
            self.why = why
            for scope in list(self.scopes):
                scope.cancel()


class Downstream:
    """All children of one incarnation. `joined` and `left` tell of each; `take` gets the messages of their links."""

    def __init__(
        self,
        *,
        hello: Hello,
        children: frozenset[int],
        settings: TbonSettings,
        joined: Callable[[Child], None],
        left: Callable[[Child], None],
        take: Callable[[Link, Message], None],
        is_endpoint: Callable[[str], bool],
    ) -> None:
        self.hello = hello
        self.online: dict[int, Child] = {}
        self._children = children
        self._settings = settings
        self._joined = joined
        self._left = left
        self._take = take
        self._is_endpoint = is_endpoint
        self._known: dict[int, Known] = {}
        self._held = 0
        self._waiting: dict[int, tuple[Connection, trio.CancelScope]] = {}
        """By rank the connections of children whose hello has come while we are not online, and what ends the wait."""
        self._is_open = False

    def open(self, hello: Hello) -> None:
        """We are online, as `hello` says: children may join from now on."""
        self.hello = hello
        self._is_open = True
        for _connection, scope in self._waiting.values():
            scope.cancel()

    async def run(self, listener: Listener) -> None:
        """Accept children until cancelled; every one of them then learns that we are gone."""
        async with trio.open_nursery() as nursery:
            try:
                while True:
                    try:
                        connection = await listener.accept()
                    except ConnectError as error:
                        log.warning("%s", error)
                        await trio.sleep(ACCEPT_PAUSE)
                        continue
                    if self._held >= MAX_HELD:
                        log.warning("refusing %s: %d connections wait already", connection.peer, MAX_HELD)
                        connection.close()
                    else:
                        nursery.start_soon(self._admit, connection, name=f"connection {connection.peer}")
            finally:
                listener.close()

    def say_goodbye(self, why: str) -> None:
        """Give every child the kiss of death, best effort."""
        for child in list(self.online.values()):
            child.link.control(DISCONNECT, payload=reason(why))

    async def _admit(self, connection: Connection) -> None:
        """A connection from its handshake to its end."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            self._held += 1
            try:
                try:
                    hello = await self._hear_hello(connection)
                    await self._hold(connection, hello.rank)
                    refusal = await self._judge(hello)
                finally:
                    self._held -= 1
                if refusal is None:
                    await self._serve(connection, hello, nursery.cancel_scope)
                else:
                    log.warning("refusing rank %d at %s: %s", hello.rank, connection.peer, refusal.text)
                    connection.send(encode(control(REFUSED, refusal.errnum, reason(refusal.text))))
                    await self._let_go(connection)
            except (ConnectError, ProtocolError) as error:
                log.warning("refusing %s: %s", connection.peer, error)
            finally:
                connection.close()
                nursery.cancel_scope.cancel()

    async def _let_go(self, connection: Connection) -> None:
        """Give a refused child the time to read why: it closes then."""
        with trio.move_on_after(self._settings.connect_timeout):
            while await connection.receive():
                pass

    async def _hold(self, connection: Connection, rank: int) -> None:
        """Wait until we are online. Raises ConnectError where the child does not, ProtocolError where it goes on.

        A rank waits once: where it comes again, whoever waited before is gone, or is no better.
        """
        if self._is_open:
            return
        if rank in self._waiting:
            self._waiting[rank][0].close()
        with trio.CancelScope() as scope:
            mine = self._waiting[rank] = (connection, scope)
            try:
                said = await connection.receive()
            finally:
                if self._waiting.get(rank) is mine:
                    del self._waiting[rank]
            if said:
                raise ProtocolError("it went on before it was welcome")
            raise ConnectError("it has not waited for its welcome")

    def keep_waiting(self) -> None:
        """Tell the children that wait for us to be online that we live."""
        for connection, _scope in self._waiting.values():
            connection.send(_HEARTBEAT)

    async def _hear_hello(self, connection: Connection) -> Hello:
        """Raises ConnectError, ProtocolError."""
        with trio.move_on_after(self._settings.connect_timeout):
            await connection.handshake()
            frames = await connection.receive()
            if not frames:
                raise ConnectError("it closed without a hello")
            message = decode(frames[0])
            if message.type is not MessageType.CONTROL or message.control != HELLO:
                raise ProtocolError(f"a {message.type.name.lower()} message came before the hello")
            if len(frames) > 1:
                raise ProtocolError("it went on before it was welcome")
            return Hello.decode(message.payload)
        raise ConnectError(f"no hello within {self._settings.connect_timeout:g}s")

    async def _judge(self, hello: Hello) -> Refuse | None:
        """Whether a child is refused. An older incarnation of it has been undone before it is not."""
        while True:
            verdict = judge(hello, parent=self.hello, children=self._children, known=self._known.get(hello.rank))
            if isinstance(verdict, Refuse):
                return verdict
            if self._is_in_use(hello.uuid):
                return Refuse(errno.ESTALE, f"the uuid {hello.uuid} of rank {hello.rank} is another's")
            older = self.online.get(hello.rank)
            if older is None:
                return None
            older.lose("another incarnation of it has come")
            await older.gone.wait()

    async def _serve(self, connection: Connection, hello: Hello, scope: trio.CancelScope) -> None:
        """A joined child, until it is lost. No checkpoint lies between the verdict and its entry here."""
        child = self.online[hello.rank] = Child(Link(connection, id=hello.uuid, rank=hello.rank), hello, scope)
        self._remember(hello, online=True)
        mine = self.hello
        welcome = Welcome(rank=mine.rank, uuid=mine.uuid, instance=mine.instance, software=mine.software)
        connection.send(encode(control(WELCOME, payload=welcome.encode())))
        self._joined(child)
        why = "the connection has ended"
        try:
            while frames := await connection.receive():
                for body in frames:
                    message = child.link.decode(body)
                    if message.type is MessageType.CONTROL and message.control == GOODBYE:
                        child.left = True
                    else:
                        self._take(child.link, message)
            if child.left:
                why = "it is shut down"
        except ProtocolError as error:
            why = str(error)
        except trio.Cancelled:
            if not child.why:  # we end, and it has not been told by `say_goodbye`
                child.link.control(DISCONNECT, payload=reason(f"subtree panic at rank {mine.rank}"))
            raise
        finally:
            child.lose(why)
            del self.online[hello.rank]
            self._remember(hello, online=False)
            self._left(child)
            child.gone.set()

    def _remember(self, hello: Hello, *, online: bool) -> None:
        self._known[hello.rank] = Known(
            uuid=hello.uuid, statedir=hello.statedir, incarnation=hello.incarnation, online=online
        )

    def _is_in_use(self, uuid: str) -> bool:
        """Whether an endpoint of ours has that name, which is to be unique."""
        return uuid == self.hello.uuid or self._is_endpoint(uuid)

    def disconnect(self, rank: int, why: str) -> bool:
        """Declare a live child dead (flux-core issue 3805); False where it is not online."""
        child = self.online.get(rank)
        if child is None:
            return False
        log.warning("disconnecting rank %d: %s", rank, why)
        child.link.control(DISCONNECT, payload=reason(why))
        child.lose(why)
        return True
