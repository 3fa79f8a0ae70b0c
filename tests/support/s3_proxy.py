"""A forwarding HTTP/1.1 proxy on loopback that injects faults between an S3 client and an S3 server.

    with FaultProxy(server) as proxy:
        proxy.add(Fault("PUT", r"/blobs/", SLOW_DOWN, times=2))
        client = server.at(proxy.endpoint_url).client()

Requests are forwarded with their Host and everything else that is signed unchanged, so signatures stay valid.
Bodies are streamed in pieces. `proxy.requests`, `proxy.bytes_up` and `proxy.bytes_down` tell what was moved.

`FaultProxy(server, conditional_writes=True)` makes of either server one with atomic conditional writes, which
neither has by itself: rclone ignores the conditions, and moto looks first and writes later. With
`verifies_sha256=True` it refuses a body that does not have the SHA-256 sent with it, which neither server does.
"""

import base64
import contextlib
import hashlib
import hmac
import os
import re
import select
import socket
import socketserver
import struct
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from fnmatch import fnmatchcase
from io import BufferedReader
from typing import Any, Self, TypeVar
from urllib.parse import unquote, urlsplit
from xml.sax.saxutils import escape

from botocore.exceptions import BotoCoreError, ClientError

from tests.support.s3_servers import S3Server

PIECE_BYTES = 256 * 1024
TICK_S = 0.05  # how often a slow body sends something
CONTINUE_WAIT_S = 1.0  # as long as botocore waits for a server's word on whether it wants the body
DRAIN_S = 2.0
SHA256_HEADER = "x-amz-checksum-sha256"


@dataclass(frozen=True)
class ResetConnection:
    """Reset the client's connection (RST): before forwarding, or after that many bytes of a body.

    After n bytes of the request body the server's connection is reset too, so the server sees a client that
    died. After n bytes of the response body the server has done its work.
    """

    after_request_bytes: int | None = None
    after_response_bytes: int | None = None


@dataclass(frozen=True)
class Answer:
    """Answer as S3 does, in XML and without forwarding. A HEAD gets the status and the headers only.

    `region` goes into `x-amz-bucket-region` and `<Region>`; `skew_s` moves the Date header and `<ServerTime>`.
    A body that the client holds back until "100 Continue" is not asked for; any other is read first.
    """

    status: int
    code: str
    message: str = "injected"
    region: str | None = None
    skew_s: float = 0.0
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class DropAnswer:
    """Forward the request, let the server finish, then reset: the client cannot know that it was done."""


@dataclass(frozen=True)
class TruncateBody:
    """Declare the response's full length, send its first `keep` bytes, and close."""

    keep: int


@dataclass(frozen=True)
class ShortenBody:
    """Send only the first `keep` bytes of the response with a Content-Length that agrees: HTTP sees nothing wrong."""

    keep: int


@dataclass(frozen=True)
class AlterResponseBody:
    """Flip the lowest bit of the byte at `offset` of the response body."""

    offset: int


@dataclass(frozen=True)
class AlterRequestBody:
    """Flip the lowest bit of the byte at `offset` of the request body on its way to the server."""

    offset: int


@dataclass(frozen=True)
class WrongEtag:
    """Answer with another ETag header. ETags inside XML bodies stay."""

    etag: str = '"00000000000000000000000000000000"'


@dataclass(frozen=True)
class Trickle:
    """Let a body through at `bytes_per_second` for `seconds`, then at full speed; 0 bytes per second is a stall.

    The response's body, or with `upload` the request's. What stands in sockets' buffers is not slowed.
    """

    bytes_per_second: float
    seconds: float
    upload: bool = False


@dataclass(frozen=True)
class Delay:
    """Wait for `seconds` before forwarding or answering."""

    seconds: float


@dataclass(frozen=True, init=False)
class DropRequestHeaders:
    """Forward without the headers of these names (shell patterns), to imitate a server that ignores them.

    Where a dropped header is signed, the request is signed again: the proxy must have been given an `S3Server`.
    """

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)


@dataclass(frozen=True, init=False)
class DropResponseHeaders:
    """Answer without the headers of these names (shell patterns), such as "x-amz-checksum-*"."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)


Action = (
    ResetConnection
    | Answer
    | DropAnswer
    | TruncateBody
    | ShortenBody
    | AlterResponseBody
    | AlterRequestBody
    | WrongEtag
    | Trickle
    | Delay
    | DropRequestHeaders
    | DropResponseHeaders
)
_A = TypeVar("_A")

SLOW_DOWN = Answer(503, "SlowDown", "Please reduce your request rate.")
INTERNAL_ERROR = Answer(500, "InternalError", "We encountered an internal error. Please try again.")
ACCESS_DENIED = Answer(403, "AccessDenied", "Access Denied")
NO_SUCH_BUCKET = Answer(404, "NoSuchBucket", "The specified bucket does not exist")


def clock_skewed(seconds: float = 3600.0) -> Answer:
    """Return the refusal of a server whose clock is `seconds` ahead of the client's."""
    message = "The difference between the request time and the current time is too large."
    return Answer(403, "RequestTimeTooSkewed", message, skew_s=seconds)


def permanent_redirect(region: str) -> Answer:
    """Return the answer of a server that has the bucket in another region."""
    message = "The bucket you are attempting to access must be addressed using the specified endpoint."
    return Answer(301, "PermanentRedirect", message, region=region)


def wrong_region(region: str) -> Answer:
    """Return the refusal of a request that was signed for another region than `region`."""
    message = f"The authorization header is malformed; the region is wrong; expecting '{region}'"
    return Answer(400, "AuthorizationHeaderMalformed", message, region=region)


@dataclass(frozen=True)
class Fault:
    """What happens to which requests.

    `methods` is "GET", "GET|HEAD" or "*"; `pattern` is searched in path and query as sent (percent-encoded).
    Of the matching requests the first `after` pass, then every `every`-th is hit, `times` of them or all.
    """

    methods: str
    pattern: str
    action: Action
    times: int | None = None
    every: int = 1
    after: int = 0

    def matches(self, method: str, target: str) -> bool:
        """Tell whether a request is meant, its turn aside."""
        return _matches(self.methods, self.pattern, method, target)


@dataclass
class Exchange:
    """One request as the proxy saw it; the numbers grow while it runs, and are final when the client has its answer.

    The bytes are those of the bodies as received from and sent to the client. `status` is what the client was
    sent, None where it was sent nothing. `actions` are the faults that were due.
    """

    method: str
    target: str
    actions: tuple[Action, ...] = ()
    status: int | None = None
    request_body_bytes: int = 0
    response_body_bytes: int = 0

    @property
    def path(self) -> str:
        """The path without the query, percent-encoded as sent."""
        return self.target.partition("?")[0]


@dataclass
class _Turns:
    """How often a fault's requests came, and how often it hit."""

    fault: Fault
    seen: int = 0
    hits: int = 0


class FaultProxy:
    """A proxy before `upstream`, a server or its URL; a context manager. Clients use `endpoint_url` in its place.

    With `conditional_writes` the proxy itself judges `If-None-Match: *` and `If-Match` of a PUT and of a
    CompleteMultipartUpload, as S3 does: before the body is asked for, and again when it has arrived (in a
    temporary file), when no other conditional write of that key can come between. Needs an `S3Server`.

    Several faults may hit one request: an `Answer` or a reset ends it, changes of headers and bodies add up.
    Leaving the context closes all connections, and raises what went wrong inside the proxy, such as a body
    that was too short for the fault that should alter it. A server that is not there is seen as a reset.
    """

    def __init__(
        self, upstream: S3Server | str, *, conditional_writes: bool = False, verifies_sha256: bool = False
    ) -> None:
        self.origin = upstream if isinstance(upstream, S3Server) else None
        assert self.origin or not conditional_writes, "conditional writes need the server's credentials"
        split = urlsplit(self.origin.endpoint_url if self.origin else str(upstream))
        self.upstream = (split.hostname or "", split.port or 80)
        self.client: Any = self.origin.client() if self.origin and conditional_writes else None
        self.verifies_sha256 = verifies_sha256
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._key_locks: dict[str, threading.Lock] = {}
        self._turns: list[_Turns] = []
        self._exchanges: list[Exchange] = []
        self._errors: list[Exception] = []
        self._sockets: set[socket.socket] = set()
        self._server: _Server | None = None

    def __enter__(self) -> Self:
        self._server = _Server(self)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._server
        self.stopping.set()
        self._server.shutdown()
        with self._lock:
            sockets = list(self._sockets)
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
        if self._errors and kind is None:
            raise self._errors[0]

    @property
    def endpoint_url(self) -> str:
        """The proxy's own address."""
        assert self._server
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, *faults: Fault) -> None:
        """Let these faults hit from now on; each counts its own requests, from the next one."""
        with self._lock:
            self._turns += [_Turns(fault) for fault in faults]

    def clear(self) -> None:
        """Take all faults away."""
        with self._lock:
            self._turns.clear()

    def hits(self, fault: Fault) -> int:
        """Return how many requests `fault` has hit since it was added."""
        with self._lock:
            return sum(turns.hits for turns in self._turns if turns.fault == fault)

    @property
    def requests(self) -> list[Exchange]:
        """All requests since the start or `forget`, in the order of arrival."""
        with self._lock:
            return list(self._exchanges)

    def requests_of(self, methods: str, pattern: str = "") -> list[Exchange]:
        """Return the requests that a `Fault` of these `methods` and `pattern` would match."""
        return [each for each in self.requests if _matches(methods, pattern, each.method, each.target)]

    def forget(self) -> None:
        """Empty the log and set the counters to 0."""
        with self._lock:
            self._exchanges.clear()

    @property
    def bytes_up(self) -> int:
        """Bytes of request bodies that clients sent."""
        return sum(each.request_body_bytes for each in self.requests)

    @property
    def bytes_down(self) -> int:
        """Bytes of response bodies that clients were sent."""
        return sum(each.response_body_bytes for each in self.requests)

    def _begin(self, method: str, target: str) -> Exchange:
        exchange = Exchange(method, target)
        with self._lock:
            actions = []
            for turns in self._turns:
                fault = turns.fault
                if not fault.matches(method, target):
                    continue
                turns.seen += 1
                turn = turns.seen - fault.after
                if turn > 0 and turn % fault.every == 0 and (fault.times is None or turns.hits < fault.times):
                    turns.hits += 1
                    actions.append(fault.action)
            exchange.actions = tuple(actions)
            self._exchanges.append(exchange)
        return exchange

    def _key_lock(self, path: str) -> threading.Lock:
        with self._lock:
            return self._key_locks.setdefault(path, threading.Lock())

    def _refusal(self, path: str, head: "_Head") -> Answer | None:
        """Return what S3 answers where a write's conditions do not hold now."""
        bucket, _, key = unquote(path.lstrip("/")).partition("/")
        try:
            etag = self.client.head_object(Bucket=bucket, Key=key)["ETag"]
        except BotoCoreError as error:
            raise ConnectionAbortedError("the server did not answer") from error
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                raise
            etag = None
        expected = head.value("If-Match")
        if expected and etag is None:
            return Answer(404, "NoSuchKey", "The specified key does not exist.")
        if (expected and expected.strip('"') != etag.strip('"')) or (head.value("If-None-Match") and etag):
            message = "At least one of the pre-conditions you specified did not hold"
            return Answer(412, "PreconditionFailed", message)
        return None

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self._errors.append(error)

    def _opened(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._sockets.add(connection)
        if self.stopping.is_set():
            raise ConnectionAbortedError("the proxy ends")

    def _closed(self, connection: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(connection)


class _Server(socketserver.ThreadingTCPServer):
    request_queue_size = 128
    daemon_threads = False  # server_close then waits for them: no error of theirs is missed

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # `_Connection.handle` has told the proxy


@dataclass(frozen=True)
class _Head:
    """The start line and the headers of a message, in their order."""

    start: str
    headers: tuple[tuple[str, str], ...]

    def value(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name.lower()), "")

    def without(self, *patterns: str) -> "_Head":
        kept = [
            pair
            for pair in self.headers
            if not any(fnmatchcase(pair[0].lower(), pattern.lower()) for pattern in patterns)
        ]
        return replace(self, headers=tuple(kept))

    def having(self, name: str, value: str) -> "_Head":
        return replace(self, headers=(*self.without(name).headers, (name, value)))

    def encoded(self) -> bytes:
        lines = [self.start, *(f"{name}: {value}" for name, value in self.headers), "", ""]
        return "\r\n".join(lines).encode("latin-1")


@dataclass
class _Body:
    """A body on its way: `length` in bytes where it was declared, chunked, or (neither) until the connection ends."""

    reader: BufferedReader
    chunked: bool
    length: int | None
    trailer: bytes = field(default=b"", init=False)  # known when `pieces` is exhausted

    def pieces(self) -> Iterator[bytes]:
        """Yield the content as it comes. Raises `ConnectionError` where it ends too early."""
        if not self.chunked:
            yield from self._some(self.length)
            return
        while size := int(self._line().partition(b";")[0], 16):
            yield from self._some(size)
            self._line()
        while (line := self._line()).strip():
            self.trailer += line

    def _some(self, count: int | None) -> Iterator[bytes]:
        while count is None or count > 0:
            piece = self.reader.read1(PIECE_BYTES if count is None else min(count, PIECE_BYTES))
            if not piece and count is None:
                return
            if not piece:
                raise ConnectionAbortedError("the body ended too early")
            count = None if count is None else count - len(piece)
            yield piece

    def _line(self) -> bytes:
        line = self.reader.readline(65_536)
        if not line.endswith(b"\n"):
            raise ConnectionAbortedError("the body ended too early")
        return line


class _Connection(socketserver.StreamRequestHandler):
    """One client's connection: its requests one after the other, each over a server connection of its own."""

    server: _Server
    connection: socket.socket
    rfile: BufferedReader
    rbufsize = PIECE_BYTES

    def handle(self) -> None:
        self.proxy = self.server.proxy
        try:
            self.proxy._opened(self.connection)
            while self._exchange():
                pass
        except OSError:
            _reset(self.connection)
        except Exception as error:
            self.proxy._failed(error)
            _reset(self.connection)
        finally:
            self.proxy._closed(self.connection)

    def _exchange(self) -> bool:
        """Serve one request; tell whether the connection stays open."""
        head = _read_head(self.rfile)
        if head is None:
            return False
        method, target, version = head.start.split(" ", 2)
        exchange = self.proxy._begin(method, target)
        keep = version == "HTTP/1.1" and head.value("Connection").lower() != "close"
        body = _Body(self.rfile, "chunked" in head.value("Transfer-Encoding").lower(), _length(head) or 0)
        if delay := _of(exchange.actions, Delay):
            self.proxy.stopping.wait(delay.seconds)
        reset = _of(exchange.actions, ResetConnection)
        if reset and reset.after_request_bytes is None and reset.after_response_bytes is None:
            raise ConnectionResetError("a reset that was asked for")
        if answer := _of(exchange.actions, Answer):
            return self._answer(answer, exchange, head, body) and keep
        conditional = method in ("PUT", "POST") and (head.value("If-None-Match") == "*" or head.value("If-Match"))
        conditional = bool(self.proxy.client) and bool(conditional)
        if conditional or (self.proxy.verifies_sha256 and head.value(SHA256_HEADER)):
            return self._write_if(head, body, exchange, conditional=conditional) and keep
        return self._send_on(head, body, self._request_pieces(body, exchange), exchange) and keep

    def _answer(self, answer: Answer, exchange: Exchange, head: _Head, body: _Body) -> bool:
        held_back = _expects_continue(head)
        for piece in () if held_back else body.pieces():
            exchange.request_body_bytes += len(piece)
        self._send_answer(answer, exchange, close=held_back)
        if held_back:
            self._drain()
        return not held_back

    def _send_answer(self, answer: Answer, exchange: Exchange, *, close: bool = False) -> None:
        content = b"" if exchange.method == "HEAD" else _error_xml(answer, exchange)
        headers = [("Date", formatdate(time.time() + answer.skew_s, usegmt=True)), ("x-amz-request-id", "INJECTED")]
        headers += [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))]
        headers += [("x-amz-bucket-region", answer.region)] if answer.region else []
        headers += [("Connection", "close")] if close else []
        exchange.status = answer.status
        exchange.response_body_bytes = len(content)
        start = f"HTTP/1.1 {answer.status} {answer.code}"
        self.connection.sendall(_Head(start, (*headers, *answer.headers)).encoded() + content)

    def _write_if(self, head: _Head, body: _Body, exchange: Exchange, *, conditional: bool) -> bool:
        """Forward a write whose conditions hold, and refuse any other; tell whether the connection stays open."""
        if conditional and (refusal := self.proxy._refusal(exchange.path, head)):
            return self._answer(refusal, exchange, head, body)
        if _expects_continue(head):
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        with tempfile.TemporaryFile() as file:
            found = hashlib.sha256()
            for piece in self._request_pieces(body, exchange):
                file.write(piece)
                found.update(piece)
            file.seek(0)
            expected = head.value(SHA256_HEADER) if self.proxy.verifies_sha256 else ""
            if expected and expected != base64.b64encode(found.digest()).decode():
                self._send_answer(Answer(400, "BadDigest", "The SHA256 you specified did not match."), exchange)
                return True
            # Only now: a slow upload must not keep a quick one from being the first.
            with self.proxy._key_lock(exchange.path):
                if conditional and (refusal := self.proxy._refusal(exchange.path, head)):
                    self._send_answer(refusal, exchange)
                    return True
                pieces = iter(lambda: file.read(PIECE_BYTES), b"")
                return self._send_on(head.without("Expect"), body, pieces, exchange)

    def _send_on(self, head: _Head, body: _Body, pieces: Iterable[bytes], exchange: Exchange) -> bool:
        """Forward a request with the content `pieces` in the framing of `body`; tell whether to stay open."""
        with socket.create_connection(self.proxy.upstream) as upstream:
            try:
                self.proxy._opened(upstream)
                return self._forward(upstream, head, body, pieces, exchange)
            except BaseException:
                _reset(upstream)  # it must not take a half request for a whole one
                raise
            finally:
                self.proxy._closed(upstream)

    def _forward(
        self, upstream: socket.socket, head: _Head, body: _Body, pieces: Iterable[bytes], exchange: Exchange
    ) -> bool:
        with upstream.makefile("rb", PIECE_BYTES) as reader:
            upstream.sendall(self._request_head(head, exchange).encoded())
            answer = self._wait_for_continue(upstream, reader) if _expects_continue(head) else None
            if answer is None:
                answer = _send_request_body(upstream, reader, body, pieces)
            early = answer is not None
            while answer is None:
                answer = _final_head(reader)
            kept = self._send_response(answer, reader, exchange, close=early)
        if early:
            self._drain()
        return kept and not early

    def _request_head(self, head: _Head, exchange: Exchange) -> _Head:
        forwarded = head
        for action in exchange.actions:
            if isinstance(action, DropRequestHeaders):
                forwarded = forwarded.without(*action.names)
        signed = _signed_headers(head)
        present = {name.lower() for name, _ in forwarded.headers}
        if dropped := {name.lower() for name, _ in head.headers} & signed - present:
            if self.proxy.origin is None:
                raise ValueError(f"{sorted(dropped)} cannot be dropped without the server's credentials: it is signed")
            forwarded = _signed_again(forwarded, signed - dropped, self.proxy.origin.secret_access_key)
        return forwarded if "connection" in signed else forwarded.having("Connection", "close")

    def _wait_for_continue(self, upstream: socket.socket, reader: BufferedReader) -> _Head | None:
        """Ask the client for its body unless the server has answered without wanting it; return that answer."""
        if select.select([upstream], [], [], CONTINUE_WAIT_S)[0] and (answer := _final_head(reader)):
            return answer
        self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return None

    def _request_pieces(self, body: _Body, exchange: Exchange) -> Iterator[bytes]:
        """Yield the request's content as the server shall see it."""
        pieces = _counted(body.pieces(), exchange, "request_body_bytes")
        if alter := _of(exchange.actions, AlterRequestBody):
            pieces = _flipped(pieces, alter.offset)
        for action in exchange.actions:
            if isinstance(action, Trickle) and action.upload:
                pieces = _slowed(pieces, action, self.proxy.stopping)
        reset = _of(exchange.actions, ResetConnection)
        limit = reset.after_request_bytes if reset else None
        yield from _limited(pieces, limit)
        if limit is not None:
            raise ConnectionResetError("a reset that was asked for")

    def _send_response(self, answer: _Head, reader: BufferedReader, exchange: Exchange, *, close: bool) -> bool:
        """Send the server's answer on; tell whether the connection can stay open."""
        status = int(answer.start.split(" ")[1])
        bodiless = exchange.method == "HEAD" or status in (204, 304)
        length = 0 if bodiless else _length(answer)
        chunked = not bodiless and "chunked" in answer.value("Transfer-Encoding").lower()
        body = _Body(reader, chunked, None if chunked else length)
        actions = exchange.actions
        if _of(actions, DropAnswer):
            for _ in body.pieces():
                pass
            raise ConnectionResetError("a reset that was asked for")
        close = close or (length is None and not chunked)
        head = answer.without("Connection", "Keep-Alive")
        head = head.having("Connection", "close") if close else head
        pieces = body.pieces()
        limit: int | None = None
        ending: ResetConnection | TruncateBody | ShortenBody | None = None
        for action in actions:
            if isinstance(action, WrongEtag):
                head = head.having("ETag", action.etag)
            elif isinstance(action, DropResponseHeaders):
                head = head.without(*action.names)
            elif isinstance(action, AlterResponseBody):
                pieces = _flipped(pieces, action.offset)
            elif isinstance(action, Trickle) and not action.upload:
                pieces = _slowed(pieces, action, self.proxy.stopping)
            elif isinstance(action, TruncateBody | ShortenBody):
                if length is not None and length <= action.keep:
                    raise ValueError(f"{action} cannot happen: the body has {length} bytes")
                limit, ending = action.keep, action
            elif isinstance(action, ResetConnection):
                limit, ending = action.after_response_bytes, action
        if isinstance(ending, ShortenBody) and not chunked:
            head = head.having("Content-Length", str(ending.keep))
        exchange.status = status
        self.connection.sendall(head.encoded())
        for piece in _counted(_limited(pieces, limit), exchange, "response_body_bytes"):
            self.connection.sendall(_chunk(piece) if chunked else piece)
        if isinstance(ending, ResetConnection):
            raise ConnectionResetError("a reset that was asked for")
        if isinstance(ending, TruncateBody):
            return False
        if chunked:
            self.connection.sendall(b"0\r\n" + body.trailer + b"\r\n")
        return not close

    def _drain(self) -> None:
        """Take what the client still sends: closing over unread bytes would reset, and lose the answer."""
        deadline = time.monotonic() + DRAIN_S
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(DRAIN_S)
            while self.rfile.read1(PIECE_BYTES) and time.monotonic() < deadline:
                pass


def _send_request_body(
    upstream: socket.socket, reader: BufferedReader, body: _Body, pieces: Iterable[bytes]
) -> _Head | None:
    """Stream a request's content in the framing of `body`; return the server's answer where it came before the end."""
    for piece in pieces:
        if select.select([upstream], [], [], 0)[0] and (answer := _final_head(reader)):
            return answer
        try:
            upstream.sendall(_chunk(piece) if body.chunked else piece)
        except OSError:
            return _final_head(reader)  # a server that refuses says so and closes
    if body.chunked:
        upstream.sendall(b"0\r\n" + body.trailer + b"\r\n")
    return None


def _matches(methods: str, pattern: str, method: str, target: str) -> bool:
    return (methods == "*" or method in methods.split("|")) and re.search(pattern, target) is not None


def _of(actions: Iterable[object], kind: type[_A]) -> _A | None:
    return next((action for action in actions if isinstance(action, kind)), None)


def _read_head(reader: BufferedReader) -> _Head | None:
    """Read up to the empty line; None where the connection ended instead."""
    lines = []
    while line := reader.readline(65_536):
        text = line.decode("latin-1").rstrip("\r\n")
        if text:
            lines.append(text)
        elif lines:
            pairs = (line.partition(":") for line in lines[1:])
            return _Head(lines[0], tuple((name, value.strip()) for name, _, value in pairs))
    return None


def _final_head(reader: BufferedReader) -> _Head | None:
    """Read the head of an answer; None where it is a provisional one (1xx). Raises where there is no answer."""
    head = _read_head(reader)
    if head is None:
        raise ConnectionAbortedError("the server closed without an answer")
    return None if head.start.split(" ")[1].startswith("1") else head


def _length(head: _Head) -> int | None:
    text = head.value("Content-Length")
    return int(text) if text else None


def _expects_continue(head: _Head) -> bool:
    return head.value("Expect").lower() == "100-continue"


def _chunk(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def _counted(pieces: Iterable[bytes], exchange: Exchange, counter: str) -> Iterator[bytes]:
    for piece in pieces:
        # Before it is passed on: a client that has its answer must find the number complete.
        setattr(exchange, counter, getattr(exchange, counter) + len(piece))
        yield piece


def _flipped(pieces: Iterable[bytes], offset: int) -> Iterator[bytes]:
    start = 0
    for piece in pieces:
        if start <= offset < start + len(piece):
            altered = bytearray(piece)
            altered[offset - start] ^= 1
            yield bytes(altered)
        else:
            yield piece
        start += len(piece)
    if start <= offset:
        raise ValueError(f"byte {offset} cannot be altered: the body has {start}")


def _limited(pieces: Iterable[bytes], limit: int | None) -> Iterator[bytes]:
    if limit is None:
        yield from pieces
        return
    start = 0
    for piece in pieces:
        if start + len(piece) > limit:
            if limit > start:
                yield piece[: limit - start]
            return
        yield piece
        start += len(piece)
    if start < limit:
        raise ValueError(f"a fault after {limit} bytes cannot happen: the body has {start}")


def _slowed(pieces: Iterable[bytes], trickle: Trickle, stopping: threading.Event) -> Iterator[bytes]:
    ends = time.monotonic() + trickle.seconds
    due = 0.0  # bytes, fractions of them too: the rate may be below one byte per tick
    for piece in pieces:
        rest = piece
        while rest and (left := ends - time.monotonic()) > 0 and not stopping.is_set():
            stopping.wait(min(TICK_S, left))
            due += trickle.bytes_per_second * TICK_S
            if count := min(len(rest), int(due)):
                yield rest[:count]
            rest, due = rest[count:], due - count
        if rest:
            yield rest


def _reset(connection: socket.socket) -> None:
    # A linger time of 0 makes closing an RST; the struct's fields are shorts on Windows.
    linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        # Files made of a socket keep it open past its close method.
        socket.close(connection.detach())


def _error_xml(answer: Answer, exchange: Exchange) -> bytes:
    elements = {"Code": answer.code, "Message": answer.message, "Resource": exchange.path, "RequestId": "INJECTED"}
    if answer.region:
        elements |= {"Region": answer.region, "Endpoint": f"s3.{answer.region}.amazonaws.com"}
    if answer.skew_s:
        server_time = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + answer.skew_s))
        elements |= {"ServerTime": server_time, "MaxAllowedSkewMilliseconds": "900000"}
    inside = "".join(f"<{name}>{escape(text)}</{name}>" for name, text in elements.items())
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{inside}</Error>'.encode()


def _signed_headers(head: _Head) -> set[str]:
    found = re.search(r"SignedHeaders=([^,\s]+)", head.value("Authorization"))
    return set(found[1].split(";")) if found else set()


def _signed_again(head: _Head, signed: set[str], secret_access_key: str) -> _Head:
    """Sign a request anew (AWS Signature Version 4) over the headers `signed`, at its old time and scope."""
    method, target, _ = head.start.split(" ", 2)
    path, _, query = target.partition("?")
    parameters = "&".join(sorted(each if "=" in each else f"{each}=" for each in query.split("&") if each))
    names = sorted(signed)
    headers = "".join(f"{name}:{' '.join(head.value(name).split())}\n" for name in names)
    payload = head.value("x-amz-content-sha256")
    canonical = "\n".join([method, path, parameters, headers, ";".join(names), payload])
    authorization = head.value("Authorization")
    credential = re.search(r"Credential=([^,\s]+)", authorization)
    assert credential, authorization
    scope = credential[1].partition("/")[2]
    digest = hashlib.sha256(canonical.encode("latin-1")).hexdigest()
    to_sign = "\n".join(["AWS4-HMAC-SHA256", head.value("x-amz-date"), scope, digest])
    key = f"AWS4{secret_access_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    value = f"AWS4-HMAC-SHA256 Credential={credential[1]}, SignedHeaders={';'.join(names)}, Signature={signature}"
    return head.having("Authorization", value)
