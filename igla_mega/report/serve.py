"""Serve the page of a run live: the page and its new data, and nothing else."""

import contextlib
import errno
import ipaddress
import json
import socket
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from igla_mega.config.errors import ConfigError
from igla_mega.report.page import Page, policy

DEFAULT_PORT = 8400
PORTS_TRIED = 50
"""Number of ports tried after one that is in use."""
REQUEST_SECONDS = 30.0
"""Time after which a connection is closed that is idle, or has not sent its whole request."""
MAX_CONNECTIONS = 64


class PageServer(ThreadingHTTPServer):
    """HTTP server of `/` (the page) and `/data?since=...` (its new data) for requests to this host's own name."""

    daemon_threads = True

    def __init__(self, page: Page, host: str, port: int):
        self.page = page
        self.lock = threading.Lock()
        self.host = host
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # The base class resolves the host's own name, which may take minutes where there is no name service.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.host, self.server_address[1]

    def process_request(self, request, client_address) -> None:
        """Start a thread for a connection, or close it if there are too many."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request, client_address) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):  # not when the browser disconnects
            print(f"a request failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_port}/"

    def knows(self, named: str | None) -> bool:
        """Return True if a Host header is acceptable: an IP address, `localhost`, or the name given with --host.

        A foreign site can make its own name resolve to this machine (DNS rebinding), but none of these.
        The port is ignored: a tunnel may use a different one.
        """
        try:
            name = urlsplit(f"//{named or ''}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return bool(name) and name in ("localhost", self.host.lower())
        return True


class _Handler(BaseHTTPRequestHandler):
    """Handler of the requests for the page."""

    server: PageServer
    server_version, sys_version = "igla-mega", ""
    timeout = REQUEST_SECONDS

    def setup(self) -> None:
        super().setup()
        # `timeout` bounds each read and the whole answer, but not the sum of the reads: a client that sends a byte now
        # and then would keep its place, and 64 of them all places.
        self._deadline = threading.Timer(REQUEST_SECONDS, self._disconnect)
        self._deadline.daemon = True
        self._deadline.start()

    def parse_request(self) -> bool:
        """Read the request; False if it is malformed."""
        parsed = super().parse_request()
        self._deadline.cancel()
        return parsed

    def finish(self) -> None:
        self._deadline.cancel()
        super().finish()

    def _disconnect(self) -> None:
        with contextlib.suppress(OSError):  # the client has closed it meanwhile
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        """Answer a request for the page or its new data."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.knows(hosts[0]):
            self._answer(403, "text/plain", b"This server accepts only its own address as Host; see --host.\n")
            return
        path, query = self.path.partition("?")[::2]
        if path == "/":
            with self.server.lock:
                self.server.page.update()
                page = self.server.page.html(live=True)
            self._answer(200, "text/html; charset=utf-8", page.encode())
        elif path == "/data":
            since = (parse_qs(query).get("since") or [""])[0].split(",")
            with self.server.lock:
                self.server.page.update()
                news = self.server.page.news(since[: len(self.server.page.runs)])
            self._answer(200, "application/json", json.dumps(news, allow_nan=False, separators=(",", ":")).encode())
        else:
            self._answer(404, "text/plain", b"Not found. The page is at /.\n")

    do_HEAD = do_GET

    def _answer(self, status: int, kind: str, content: bytes) -> None:
        """Send a response with headers that keep other sites from embedding or reading it."""
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("Content-Security-Policy", f"{policy(live=True)}; frame-ancestors 'none'"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args) -> None:
        """Log nothing: an open page polls every two seconds."""


def open_server(folders: Sequence[Path], host: str = "127.0.0.1", port: int = DEFAULT_PORT) -> PageServer:
    """Open the server of the page; port 0 selects a free one.

    Raises:
        ConfigError: a folder is not that of a run, the port is in use or not permitted, or the host is not an address
            of this machine.
    """
    host = host.strip("[]")
    if not host:
        raise ConfigError("--host: is empty. Use 127.0.0.1, or 0.0.0.0 to listen on every address of this machine.")
    page = Page(folders)
    try:
        return PageServer(page, host, port)
    except (TypeError, ValueError):  # raised by the resolver for a name that cannot be encoded
        raise ConfigError(
            f"--host {host}: is not a host name.\n  Use 127.0.0.1, and a tunnel from other machines."
        ) from None
    except OSError as error:
        raise ConfigError(_why(error, host, port)) from None


def serve(folders: Sequence[Path], host: str = "127.0.0.1", port: int = DEFAULT_PORT) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ConfigError: as `open_server`.
    """
    try:
        with open_server(folders, host, port) as server:
            print(f"{', '.join(map(str, folders))}: {server.url}  (Ctrl-C stops it)", flush=True)
            if not _is_loopback(server.host):
                print(f"note: everyone who can reach {server.host} can read this page: it has no password.", flush=True)
            server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        print("\nstopped", flush=True)


def _why(error: OSError, host: str, port: int) -> str:
    """Return the error text for a server that could not be opened."""
    if error.errno == errno.EADDRINUSE:
        free = _free_port(host, port)
        remedy = f"Use the next free one: --port {free}." if free else "Use any free one: --port 0."
        return f"--port {port}: already in use on {host}.\n  {remedy}"
    if error.errno == errno.EACCES:
        return (
            f"--port {port}: not permitted for this user: ports below 1024 are reserved.\n  Use --port {DEFAULT_PORT}."
        )
    return (
        f"--host {host}: {error.strerror}: not an address of this machine.\n"
        "  Use 127.0.0.1, and a tunnel from other machines."
    )


def _free_port(host: str, port: int) -> int | None:
    """Return the next free port after `port`; None if there is none among the next ones."""
    for candidate in range(port + 1, min(port + 1 + PORTS_TRIED, 65536)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
            try:
                one.bind((host, candidate))
            except OSError:
                continue
            return candidate
    return None


def _is_loopback(host: str) -> bool:
    """Return True if only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
