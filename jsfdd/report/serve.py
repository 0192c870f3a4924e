"""The server of `jsfdd watch`: the standard library's, on the loopback interface.

    /               the live page; once the run is finished, its report
    /live           the live page's content alone, with which the page replaces its own every two seconds
    /numbers.json   the same figures as JSON

It answers GET alone, and only where the Host is this machine: a page of another site that a browser has open cannot read it,
not even under a name that resolves to 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import functools
import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from jsfdd.report.live import read_live
from jsfdd.report.live_page import render_live, render_live_page
from jsfdd.report.report import report_page

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class LoopbackServer(ThreadingHTTPServer):
    """A thread for each connection, none of which keeps the command alive."""

    daemon_threads = True
    allow_reuse_address = True


def make_server(run: Path, port: int) -> LoopbackServer:
    """A server of the run's pages, listening; port 0 takes a free one. OSError: the port is taken or not allowed."""
    return LoopbackServer(("127.0.0.1", port), functools.partial(_Handler, run))


class _Handler(BaseHTTPRequestHandler):
    """Answers with the run as its files are now."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds; each connection holds a thread

    def __init__(self, run: Path, *arguments):
        self._run = run
        super().__init__(*arguments)

    def handle(self) -> None:
        """Answer until the browser closes the connection, which it may do in the middle of an answer."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").lower()
        name = host.rpartition(":")[0] or host  # browsers leave port 80 out
        if name not in ("127.0.0.1", "localhost"):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "This server is for 127.0.0.1 alone.\n")
            return
        path = self.path.partition("?")[0]
        if path not in ("/", "/live", "/numbers.json"):
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "There are /, /live and /numbers.json.\n")
            return
        try:
            answer = HTTPStatus.OK, *self._content(path)
        except (ValueError, OSError) as error:  # a file of the run is damaged or was moved away
            answer = HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n"
        self._answer(*answer)

    def _content(self, path: str) -> tuple[str, str]:
        live = read_live(self._run)
        if path == "/numbers.json":
            return "application/json", json.dumps(live.to_json(), allow_nan=False)
        if path == "/live":
            return "text/html", render_live(live)
        return "text/html", report_page(self._run) if live.finished and live.is_run else render_live_page(live)

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        """Nothing: a line for every two seconds would bury the address."""
