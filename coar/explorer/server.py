"""The page of a run, served to this machine, with requests that measure, judge and save."""

import errno
import json
import secrets
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from coar.attributions import Attributions
from coar.errors import CoarError, RunError, SettingsError
from coar.explorer.content import default_fit, gather
from coar.explorer.live import LiveModel
from coar.explorer.page import page_of
from coar.explorer.part import part_of
from coar.explorer.source import Source
from coar.store.run import Run

LOOPBACK = ("127.0.0.1", "localhost")
LARGEST = 1_000_000  # bytes of a request
CONNECTIONS = 16  # at once
PATIENCE = 10.0  # seconds to wait for the rest of a request
WORDS = {"save": "name", "read": "text", "complete": "text"}  # by request: what it takes besides components
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def serve_page(
    run: Run,
    folder: Path,
    source: Source,
    *,
    fit: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    device: str = "auto",
) -> "PageServer":
    """Return a server of a run's page, with the model behind it; `serve_forever` starts it.

    Args:
        run: The run.
        folder: Its reports folder, into which edits are saved.
        source: The pipeline.
        fit: Name of the fit; by default the best one.
        host: The address to listen on.
        port: The port; 0 for any free one.
        device: Where to compute.

    Raises:
        RunError: When the run has no fit.
        SettingsError: When the port is taken, or see `LiveModel`.
    """
    name = fit or default_fit(run)
    if name is None:
        raise RunError(f"{run.path} has no fit, so nothing can be predicted; run 'coar fit' first")
    attributions = Attributions.open(run, name)
    live = LiveModel(run, source, attributions, part_of(attributions), folder, device=device)
    content = gather(run, folder, fit=name, source=source)
    return PageServer({**content, "live": {"texts": live.reads_texts}}, live, host=host, port=port)


class PageServer(ThreadingHTTPServer):
    """Serves one page under an address that holds a random token, and answers its requests.

    An edit that is saved is on the page that is sent from then on.

    Every request must name this server as its host, and a request that computes or writes must come from the page's own
    origin: another site that is open in the browser can do neither.

    Args:
        content: What the page shows.
        live: The model behind it.
        host: The address to listen on; another machine can reach the page only with an address other than the default.
        port: The port; 0 for any free one.

    Attributes:
        url: The address of the page.
        hosts: The names by which a request may call this server; None for any, if other machines can reach it.

    Raises:
        SettingsError: When the port is taken, or the address is not one of this machine.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, content: dict[str, Any], live: LiveModel, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.page, self.live = page_of(content).encode(), live
        self._content = content
        self.token = secrets.token_urlsafe(24)
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "is taken" if taken else f"cannot be used ({error})"
            raise SettingsError(f"port {port} of {host} {reason}; choose another port, or 0 for any free one") from None
        self.hosts = {f"{name}:{self.server_port}" for name in LOOPBACK} if host in LOOPBACK else None
        self.url = f"http://{host}:{self.server_port}/{self.token}/"

    def save(self, components: list[int], name: str) -> dict[str, Any]:
        """Save an edit by hand, see `LiveModel.save`, and put it on the page."""
        saved = self.live.save(components, name)
        self._content["edits"]["tasks"].append(saved["task"])
        self.page = page_of(self._content).encode()
        return saved

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, or close the connection when there are too many."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection, and count it as free again."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


class _RefusedError(Exception):
    """A request that is not answered, with the status and the reason."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    """Answers requests of the page."""

    server: PageServer
    timeout = PATIENCE
    server_version, sys_version = "coar", ""

    def do_GET(self) -> None:
        """Send the page."""
        try:
            if self._path() != "":
                raise _RefusedError(HTTPStatus.NOT_FOUND, "there is only the page")
        except _RefusedError as refusal:
            self._send(refusal.status, "text/plain; charset=utf-8", str(refusal).encode())
            return
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)

    def do_POST(self) -> None:
        """Measure, judge or save, and send the result, or the reason why not, as JSON."""
        try:
            status, answer = HTTPStatus.OK, self._answer(self._path())
        except _RefusedError as refusal:
            status, answer = refusal.status, {"error": str(refusal)}
        except CoarError as error:
            status, answer = HTTPStatus.UNPROCESSABLE_ENTITY, {"error": str(error)}
        self._send(status, "application/json", json.dumps(answer, allow_nan=False).encode())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Log nothing: addresses hold the token."""

    def _path(self) -> str:
        """Return the path after the token; refuse another host and a wrong token."""
        if self.server.hosts is not None and self.headers.get("Host") not in self.server.hosts:
            raise _RefusedError(HTTPStatus.MISDIRECTED_REQUEST, "the request names another host")
        _, token, rest = [*self.path.split("?")[0].split("/", 2), "", ""][:3]
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            raise _RefusedError(HTTPStatus.FORBIDDEN, "the address has a wrong token; open the one that was printed")
        return rest

    def _answer(self, path: str) -> dict[str, Any]:
        if self.headers.get("Origin") != f"http://{self.headers.get('Host')}":
            raise _RefusedError(HTTPStatus.FORBIDDEN, "the request comes from another origin")
        answers: dict[str, Callable[..., dict[str, Any]]] = {
            "measure": self.server.live.measure,
            "judge": self.server.live.judge,
            "save": self.server.save,
            "read": self.server.live.read,
            "complete": self.server.live.complete,
        }
        if path not in answers:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "there is no such request")
        return answers[path](**self._given(WORDS.get(path)))

    def _given(self, word: str | None) -> dict[str, Any]:
        """Return the request's content: numbers of components, and a text by its name where one is expected."""
        if self.headers.get_content_type() != "application/json":
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the content must be JSON")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "the length of the content must be stated")
        if int(length) > LARGEST:
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the content has more than {LARGEST:,} bytes")
        try:
            given = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "the content is not JSON") from None
        names = {"components"} if word is None else {"components", word}
        if not isinstance(given, dict) or given.keys() != names:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, f"the content must have {' and '.join(sorted(names))}")
        components = given["components"]
        if not isinstance(components, list) or not all(type(one) is int for one in components):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "components must be a list of whole numbers")
        if word is not None and not isinstance(given[word], str):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, f"{word} must be a text")
        return given

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
