"""One WebSocket of the status endpoint: its handshake, its keepalive, and its end.

    handshake --> talking --client closes, or is gone--> ended
                          --it breaks the protocol-----> closed 1002, 1003, 1007, 1009
                          --it makes no sense----------> closed 1008
                          --it does not read, or does not answer a ping--> dropped
                          --incarnation ends-----------> closed 1012: come again
                          --broker shuts down----------> closed 1001
                          --a fault of ours------------> closed 1011, and logged

trio-websocket reads a head of our own making, which says what the client's did as far as we have checked it; what the
client sent after its head follows. Source: RFC 6455.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream
from wsproto.utilities import LocalProtocolError

from fluxres.status.access import BEARER_PROTOCOL
from fluxres.status.asks import MAX_MESSAGE
from fluxres.status.conversation import Conversation, Goodbye
from fluxres.status.http import BadRequest, Exchange, Request, handshake
from fluxres.status.messages import SUBPROTOCOL
from fluxres.status.stream import CLOSE_FRAME

if TYPE_CHECKING:
    from fluxres.status.endpoint import Attached, Endpoint
    from fluxres.status.stream import ConnectionStream

PING_EVERY: Final = 20.0
PONG_WITHIN: Final = 20.0
"""Seconds between two pings, and for the answer to one."""
CLOSE_GRACE: Final = 2.0
"""Seconds that a client has to answer that we close."""
LAST_WORDS: Final = 0.2
"""Seconds for saying so where the broker shuts down."""
GOING_AWAY: Final = 1001
FAULT: Final = 1011
RESTART: Final = 1012
MAX_REASON: Final = 100
"""Bytes of a reason (RFC 6455 has room for 123)."""
_WRONG: Final = frozenset({1002, 1007, 1009})
"""What a client did wrong, for which the library ends the connection."""
_GONE: Final = (ConnectionClosed, LocalProtocolError, trio.BrokenResourceError, trio.ClosedResourceError)


def choose(request: Request) -> str | None:
    """The subprotocol that is spoken; None where the client names none. Raises BadRequest where we know none of it."""
    offered = [word for word in request.words("sec-websocket-protocol") if not word.startswith(BEARER_PROTOCOL)]
    if not offered:
        return None
    if SUBPROTOCOL not in offered:
        raise BadRequest(400, f"cannot open a WebSocket: the subprotocol that is spoken here is {SUBPROTOCOL}")
    return SUBPROTOCOL


async def serve_websocket(
    endpoint: Endpoint, it: Attached, stream: ConnectionStream, request: Request, exchange: Exchange
) -> None:
    """Talk over `stream`, from which `request` was read, until one of both has enough. Raises BadRequest."""
    subprotocol = choose(request)
    stream.again(handshake(request), exchange.trailing)
    try:
        async with trio.open_nursery() as nursery:
            opening = await wrap_server_stream(nursery, stream, message_queue_size=1, max_message_size=MAX_MESSAGE)
            socket = await opening.accept(subprotocol=subprotocol)
            stream.go_on()
            await _talk_and_close(endpoint, it, socket, stream)
            await _say_why(socket, stream)
            nursery.cancel_scope.cancel()
    except* _GONE:
        pass  # the client is, which is its right


async def _talk_and_close(
    endpoint: Endpoint, it: Attached, socket: WebSocketConnection, stream: ConnectionStream
) -> None:
    end = None
    try:
        end = await _talk(endpoint, it, socket, stream)
    finally:
        if end is None:
            with trio.CancelScope(deadline=trio.current_time() + LAST_WORDS, shield=True):
                await socket.aclose(GOING_AWAY, "the broker is shut down")
    with trio.move_on_after(CLOSE_GRACE):
        await socket.aclose(end.code, end.reason)


async def _talk(endpoint: Endpoint, it: Attached, socket: WebSocketConnection, stream: ConnectionStream) -> Goodbye:
    """Have the conversation; why it is over."""
    end = Goodbye(RESTART, "the broker begins anew")
    with endpoint.hanging_on(it):
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_keep_alive, socket)
                await Conversation(endpoint, it, receive=socket.get_message, send=stream.send_text).run()
        except* Goodbye as group:
            end = _goodbye(group)
        except* _GONE:
            end = Goodbye(GOING_AWAY, "")  # by the client: there is nothing to close any more
        except* Exception as group:
            endpoint.complaints.say("fault", f"WebSocket ended by {group.exceptions[0]!r}", error=group)
            end = Goodbye(FAULT, "the broker failed here: its log says why")
    return Goodbye(GOING_AWAY, "the broker is shut down") if it.state() == "shutdown" else end


async def _keep_alive(socket: WebSocketConnection) -> None:
    """Find out that a client is gone that does not say so. Raises ConnectionClosed, Goodbye."""
    while True:
        await trio.sleep(PING_EVERY)
        with trio.move_on_after(PONG_WITHIN) as patience:
            await socket.ping()
        if patience.cancelled_caught:
            raise Goodbye(GOING_AWAY, f"no answer to a ping for {PONG_WITHIN:g} s")


async def _say_why(socket: WebSocketConnection, stream: ConnectionStream) -> None:
    """Tell a client what it did wrong, where the library has only stopped to listen."""
    closed = socket.closed
    if closed is not None and closed.code in _WRONG and not stream.said_goodbye:
        await stream.say_last(close_frame(closed.code, closed.reason or ""))


def close_frame(code: int, reason: str) -> bytes:
    """A WebSocket close frame of a server (RFC 6455 §5.5.1)."""
    payload = struct.pack("!H", code) + reason.encode()[:MAX_REASON]
    return CLOSE_FRAME + bytes([len(payload)]) + payload


def _goodbye(error: BaseException) -> Goodbye:
    """The one in an exception group."""
    if isinstance(error, BaseExceptionGroup):
        return _goodbye(error.exceptions[0])
    assert isinstance(error, Goodbye)
    return error
