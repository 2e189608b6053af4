"""gRPC carries the packets: one bidirectional stream for each session, over mutual TLS or plain text.

What must live here: addresses, credentials, channel options, and gRPC's errors turned into `LinkLost`. What must
not: what a packet means. Plain text is used only where it is asked for by name (`grpc://`), and beyond this machine
only where it is asked for twice.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc

from ..errors import UsageError
from ..wire.packets import MAX_PACKET
from .stream import Dial, LinkLost

__all__ = ["Address", "Listener", "address", "dial", "is_loopback"]

_METHOD = "/housecall.Worker/Session"
_SERVICE, _NAME = "housecall.Worker", "Session"
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_PACKET + 1024),
    ("grpc.max_send_message_length", MAX_PACKET + 1024),
    ("grpc.keepalive_time_ms", 20_000),  # a peer that vanished without a word is noticed within these two
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # else a ping has a minute, whatever keep-alive says
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.lookahead_bytes", 8 << 20),
)
_CLIENT_OPTIONS = (
    *_OPTIONS,
    ("grpc.enable_retries", 0),  # sessions resume by themselves, exactly once
    ("grpc.use_local_subchannel_pool", 1),  # a new dial is a new connection
    ("grpc.enable_http_proxy", 0),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # how long one attempt to connect may take
)
_SERVER_OPTIONS = (
    *_OPTIONS,
    ("grpc.so_reuseport", 0),  # two workers on one port is a mistake, not a load balancer
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_concurrent_streams", 1024),
)


class Address(NamedTuple):
    """Where a worker listens. `secure`: over TLS."""

    host: str
    port: int
    secure: bool = True

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def address(url: str) -> Address:
    """`grpcs://host:port` (mutual TLS) or `grpc://host:port` (plain text) as an address. Raises `UsageError`."""
    scheme, found, rest = url.partition("://")
    host, colon, port = rest.rstrip("/").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not found or scheme not in ("grpc", "grpcs") or not colon or not host or not port.isdigit():
        raise UsageError(f"a worker's address is grpcs://host:port, found {url!r}")
    if not 0 < int(port) < 1 << 16:
        raise UsageError(f"a port is a number from 1 to 65535, found {port} in {url!r}")
    return Address(host, int(port), scheme == "grpcs")


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine, and cannot mean another."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Call:
    """One stream, as the client holds it."""

    def __init__(self, channel: grpc.Channel, outgoing: Iterator[bytes]) -> None:
        self._channel = channel
        self._packets: Any = channel.stream_stream(_METHOD)(outgoing)  # type: ignore[arg-type]  # no serializers

    def __next__(self) -> bytes:
        try:
            return next(self._packets)  # type: ignore[no-any-return]  # no serializers: packets are bytes
        except grpc.RpcError as error:
            raise LinkLost(_reason(error)) from None

    def cancel(self) -> None:
        """End the stream and its connection."""
        self._packets.cancel()
        self._channel.close()


# A part of what gRPC says, and what it means to whoever reads it.
_MEANS = {
    "Hostname Verification Check failed": "its certificate is for other names than the one in this address: use one "
    "that it was invited with (`housecall ca invite --host`)",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is of another authority than the identity that is shown to it",
    "WRONG_VERSION_NUMBER": "what listens there speaks plain text",
}


def _reason(error: Any) -> str:
    details = " ".join(str(error.details() or "no details").split())
    said = f"{error.code().name.lower().replace('_', ' ')}: {details[:300]}"
    return next((f"{means}; {said}" for part, means in _MEANS.items() if part in details), said)


def dial(where: Address, credentials: Callable[[], grpc.ChannelCredentials] | None) -> Dial:
    """How to reach a worker; without credentials in plain text. They are asked for anew for each connection: a
    certificate may have been renewed meanwhile."""
    if where.secure != (credentials is not None):
        raise UsageError(f"{where}: {'grpcs:// needs' if where.secure else 'grpc:// takes no'} credentials")

    def open_stream(outgoing: Iterator[bytes]) -> _Call:
        if credentials is None:
            channel = grpc.insecure_channel(str(where), options=_CLIENT_OPTIONS)
        else:
            channel = grpc.secure_channel(str(where), credentials(), options=_CLIENT_OPTIONS)
        return _Call(channel, outgoing)

    return open_stream


Serve = Callable[[Iterator[bytes], Any], Iterator[bytes]]


class Listener:
    """Accepts streams and hands each to `serve(packets, principal)`.

    `principal` makes one of gRPC's authentication context (name -> values) or raises `PermissionError`. Port 0 takes
    a free one; `address` says which."""

    def __init__(
        self,
        listen: Address,
        serve: Serve,
        credentials: grpc.ServerCredentials | None,
        principal: Callable[[Any], Any],
        *,
        streams: int = 512,
    ) -> None:
        self._serve, self._principal = serve, principal
        self._server = grpc.server(
            ThreadPoolExecutor(streams, thread_name_prefix="housecall-stream"),
            options=_SERVER_OPTIONS,
            maximum_concurrent_rpcs=streams,
        )
        handler: Any = grpc.stream_stream_rpc_method_handler(self._session)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_NAME: handler}),))
        try:
            if credentials is None:
                port = self._server.add_insecure_port(str(listen))
            else:
                port = self._server.add_secure_port(str(listen), credentials)
        except RuntimeError as error:
            why = str(error).partition(";")[0].rstrip(".")
            raise UsageError(
                f"cannot listen on {listen}: {why}. Is the port taken, or the address another machine's?"
            ) from None
        self.address = Address(listen.host, port, listen.secure)
        self._server.start()

    def _session(self, incoming: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            principal = self._principal(context.auth_context())
        except PermissionError as error:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        yield from self._serve(incoming, principal)

    def close(self, grace: float | None = None) -> None:
        """Take no more streams; those that there are have `grace` seconds to end."""
        self._server.stop(grace).wait(None if grace is None else grace + 5.0)
