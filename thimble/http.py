"""What serve.py says in HTTP: errors, who may connect, and how a connection is read and closed.

Nothing here knows of models or of OpenAI's API, except that errors have its shape.
"""
import asyncio
import contextlib
import hmac
import http
import ipaddress
import json
import re
import socket
import sys
import time

import h11
import uvicorn
from starlette.exceptions import HTTPException
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from thimble.files import UserError

HEAD_BYTES = 16_384  # longest head of a request: its first line and its headers
AHEAD_BYTES = 65_536  # how much a client may send of its next requests while one is being answered
LINGER_SECONDS = 1.0  # see Unread


# ---- responses
class Unread(Response):
    """The response to a request whose body is not read to its end; it closes the connection.

    To close at once would reset the connection, and a client that is still sending would never see the response. So
    what it sends is discarded for a while (RFC 9112, section 9.6).
    """

    async def __call__(self, scope, receive, send):
        headers = [*self.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while (await receive()).get("more_body"):  # until the end of the body or of the connection
                    pass
        await send({"type": "http.response.body"})


def reply(body, status=200, headers=None, kind=Response):
    # json.dumps escapes everything outside ASCII, so that nothing can break the framing
    return kind(json.dumps(body), status, headers, "application/json")


class ApiError(Exception):
    """An error in the shape of OpenAI's API; `param` is the field of the request that is to blame."""

    TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error"}

    def __init__(self, status, message, param=None, code=None, headers=None, unread=False):
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.unread = unread  # a part of the request's body has not been read
        kind = self.TYPES.get(status, "invalid_request_error")
        # cut, since a message may quote the request
        self.body = {"error": {"message": message[:300], "type": kind, "param": param, "code": code}}

    def response(self):
        kind = Unread if self.unread else Response
        return reply(self.body, self.status, self.headers, kind)


async def respond(request, e):
    """The response to any exception, as Starlette's handler."""
    if isinstance(e, HTTPException):
        e = ApiError(e.status_code, e.detail, headers=e.headers)
    elif isinstance(e, UserError):
        e = ApiError(400, str(e))
    elif not isinstance(e, ApiError):
        e = ApiError(500, "internal server error; see the server's log")
    return e.response()


# ---- around all routes
def is_loopback(host):
    """Whether a host name or address, IPv6 without brackets, always means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI middleware: who may connect, and one line in the log and one count for each request."""

    def __init__(self, app, server):
        self.app = app
        self.server = server

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start = time.monotonic()
        status = 499  # nginx's number for a client that closed the connection before a response

        async def watch(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            error = self.refuse(scope)
            app = error.response() if error else self.app
            await app(scope, receive, watch)
        except Exception:
            status = 500  # Starlette's outermost handler sends it
            raise
        finally:
            # other paths share one count: a client could fill the memory with their names
            path = scope["path"] if scope["path"] in self.server.paths else "other"
            self.server.requests[path, status] += 1
            if self.server.cfg.log:
                self.log(scope, status, time.monotonic() - start)

    def log(self, scope, status, seconds):
        client = scope.get("client") or ["-"]
        path = json.dumps(scope["path"][:100])  # quoted ASCII: no path can forge a line
        left = ", client disconnected" if scope.get("gone") else ""
        line = f"{client[0]} {scope['method']:.10} {path} {status} {1000 * seconds:.0f} ms{left}"
        print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)

    def refuse(self, scope):
        """The ApiError for a request that may not be answered, or None."""
        headers = dict(reversed(scope["headers"]))  # where a name comes twice, the first one counts
        host = headers.get(b"host", b"").decode("latin-1").lower()
        hostname = re.sub(r":\d{1,5}$", "", host).strip("[]")
        # A web page may point a name of its own at 127.0.0.1 (DNS rebinding): then the browser takes us for its origin,
        # but sends that name.
        if self.server.local and not is_loopback(hostname):
            return ApiError(403, "this server accepts only requests to localhost; check the Host header", code="host")
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin.partition("://")[2] != host and origin not in self.server.origins:
            return ApiError(403, "requests from web pages of another origin need --allow_origin", code="origin")
        # the page asks for the key itself, and a load balancer that watches /health has none
        if self.server.key and scope["path"] not in ("/", "/health"):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            # compare_digest takes the same time wherever the two differ, so that a key cannot be found byte by byte
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.server.key):
                return ApiError(401, "missing or wrong API key in the Authorization header", code="invalid_api_key",
                                headers={"WWW-Authenticate": "Bearer"})
        return None


# ---- connections
class StrictConnection(h11.Connection):
    """h11's parser without what other parsers may read in another way.

    A proxy in front of us that finds the end of a request elsewhere takes a part of it for another request, or the
    other way round: so one client's bytes could pass as another's request (request smuggling).
    """

    def next_event(self):
        before = b""
        if self.their_state is h11.IDLE:  # not within a body, where copying it for each chunk would be quadratic
            before = self.trailing_data[0]
        event = super().next_event()
        if isinstance(event, h11.Request):
            head = before[:len(before) - len(self.trailing_data[0])]
            self.check(head, event)
        return event

    def check(self, head, request):
        """RemoteProtocolError where RFC 9112 allows a server to refuse what h11 accepts."""
        if len(head) > HEAD_BYTES:  # h11 applies its limit only to a head of which a part is still missing
            raise h11.RemoteProtocolError("the head of the request is too long", error_status_hint=431)
        names = [name for name, _ in request.headers]
        if b"transfer-encoding" in names and b"content-length" in names:  # section 6.1
            raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding in the same request")
        if b"transfer-encoding" in names and request.http_version < b"1.1":  # section 6.1
            raise h11.RemoteProtocolError("Transfer-Encoding needs HTTP/1.1")
        if re.search(rb"\n[ \t]", head):  # section 5.2
            raise h11.RemoteProtocolError("a header is folded over several lines")
        if re.search(rb"(?<!\r)\n", head):  # section 2.2
            raise h11.RemoteProtocolError("a line of the head ends with LF instead of CR LF")


class Protocol(H11Protocol):
    """uvicorn's own, with deadlines for complete headers and for a client that stops reading, with a strict parser,
    and with an eye on the end of the connection while a request is being answered.
    """

    seconds = 10.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.conn = StrictConnection(h11.SERVER, HEAD_BYTES)
        self.ended = False  # the client has closed its sending side and waits for answers

    def connection_made(self, transport):
        super().connection_made(transport)
        self.deadline = self.loop.call_later(self.seconds, self.close_idle)

    def connection_lost(self, exc):
        self.deadline.cancel()
        super().connection_lost(exc)

    def on_response_complete(self):
        super().on_response_complete()
        # the connection stays open for another request, which has the same time to arrive
        self.deadline.cancel()
        self.deadline = self.loop.call_later(self.seconds, self.close_idle)
        if self.ended and not self.is_answering():
            self.transport.close()

    def is_answering(self):
        return self.cycle is not None and not self.cycle.response_complete

    def close_idle(self):
        if not self.is_answering():
            self.transport.abort()  # close() would wait until the client has read what was sent

    def data_received(self, data):
        super().data_received(data)
        # uvicorn stops reading once a part of the next request is here, and so would not see the connection's end
        if self.conn.their_state is h11.DONE:
            if len(self.conn.trailing_data[0]) > AHEAD_BYTES:
                self.transport.abort()
            self.flow.resume_reading()

    def eof_received(self):
        """-> whether to keep the connection. TCP does not say if the client still reads or has closed it as well."""
        if not self.is_answering() or self.cycle.more_body:
            return False
        if self.cycle.scope["http_version"] == "1.0":  # such a client would not understand the first probe
            return False
        self.ended = True
        self.probe(0.02)
        return True

    def probe(self, seconds):
        """Write something harmless, now and after `seconds`, twice as many, and so on, until the answer is complete.

        A closed connection replies to the first probe with a reset, and then the second one fails.
        """
        if self.transport.is_closing() or not self.is_answering():
            return
        part = None
        if not self.cycle.response_started:
            # a client has to skip it even if it did not ask for it (RFC 9110, section 15.2)
            part = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
        elif "filler" in self.cycle.scope:
            part = h11.Data(data=self.cycle.scope["filler"])
        if part and not self.flow.write_paused:
            self.transport.write(self.conn.send(part))
        self.loop.call_later(seconds, self.probe, 2 * seconds)

    def pause_writing(self):
        super().pause_writing()
        self.stuck = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        self.stuck.cancel()

    def send_400_response(self, msg):
        """What is not HTTP gets an error in JSON like all others."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # a response is on its way already
            self.transport.close()
            return
        error = sys.exception()  # uvicorn calls this where it handles h11's error
        status = error.error_status_hint
        body = json.dumps(ApiError(status, f"not valid HTTP: {error}").body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
                   (b"connection", b"close")]
        reason = http.HTTPStatus(status).phrase.encode()
        head = h11.Response(status_code=status, reason=reason, headers=headers)
        for part in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part))
        self.transport.close()


class Uvicorn(uvicorn.Server):
    """Runs a Server. On SIGTERM it lets running answers finish and ends with exit code 0."""

    def __init__(self, cfg, server):
        protocol = type("Protocol", (Protocol,), {"seconds": cfg.client_seconds})
        super().__init__(uvicorn.Config(
            server.app, cfg.host.strip("[]"), cfg.port, loop="asyncio", http=protocol, ws="none", lifespan="off",
            log_level="error", access_log=False, server_header=False, backlog=1024,
            proxy_headers=False,  # with X-Forwarded-For a client could write any address into the log
            timeout_graceful_shutdown=int(cfg.drain_seconds) + 2))  # the engine has ended all texts 2 s earlier
        self.ours = server

    async def startup(self, sockets=None):
        # not earlier: the event loop exists only now, and the number of the port where it was 0
        self.ours.engine.start(asyncio.get_running_loop())
        await super().startup(sockets)
        if self.should_exit:
            return
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        if ":" in host:
            host = f"[{host}]"
        key = " (API key required)" if self.ours.key else ""
        print(f"{self.ours.name} on http://{host}:{port}{key}", file=sys.stderr, flush=True)

    def handle_exit(self, sig, frame):
        # a second signal ends the answers at once
        seconds = 0 if self.should_exit else self.ours.cfg.drain_seconds
        self.ours.engine.stop_at = time.monotonic() + seconds
        self.should_exit = True


def listen(cfg):
    """The socket, opened here so that a port in use ends in a UserError."""
    host = cfg.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, cfg.port), backlog=1024, family=family)
    except OSError as e:
        why = e.strerror.partition(" (")[0]
        raise UserError(f"--host={cfg.host} --port={cfg.port}: {why}; --port=0 takes any free port") from None
