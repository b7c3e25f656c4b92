"""An S3 server on this machine, and a proxy before it that throttles, stalls and cuts connections."""

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEYS = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "not-so-secret", "AWS_REGION": "us-east-1"}
LIMIT = 60  # seconds for the server to start


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def s3_server(log):
    """Run the server of moto, and yield its port."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            deadline = time.monotonic() + LIMIT
            while not answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the S3 server did not start:\n{log.read_text()}")
                time.sleep(0.05)
            yield port
        finally:
            process.kill()


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def make_bucket(port: int, name: str) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{name}", method="PUT")
    urllib.request.urlopen(request, timeout=10).close()


def check_keys(port: int, *, after: float) -> None:
    """Have the server refuse unknown keys once it has answered so many requests."""
    url = f"http://127.0.0.1:{port}/moto-api/reset-auth"
    request = urllib.request.Request(url, data=str(after).encode(), headers={"Content-Type": "text/plain"})
    urllib.request.urlopen(request, timeout=10).close()


def use(monkeypatch, port: int, **changes) -> None:
    """Point the environment at a server, as a user would."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **changes}.items():
        monkeypatch.setenv(name, value)


class Proxy:
    """Passes requests on to a server, except where a fault is due.

    Attributes:
        port: Where it listens.
        faults: Called with method, path and a count of requests; returns `throttle`, `stall`, `cut` or None.
        served: How often each fault was served.
    """

    def __init__(self, behind: int) -> None:
        self.faults = lambda method, path, count: None
        self.served = {"throttle": 0, "stall": 0, "cut": 0, "deny": 0}
        self._count = 0
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy.pass_on(self, behind)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any  # noqa: N815

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def pass_on(self, handler, behind: int) -> None:
        with self._lock:
            self._count += 1
            fault = self.faults(handler.command, handler.path, self._count)
            if fault:
                self.served[fault] += 1
        length = int(handler.headers.get("Content-Length") or 0)
        if fault == "cut":
            handler.rfile.read(length // 2)
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        body = handler.rfile.read(length)
        if fault == "stall":
            time.sleep(5)
            handler.close_connection = True
            return
        if fault in ("throttle", "deny"):
            code, word = (503, "SlowDown") if fault == "throttle" else (403, "AccessDenied")
            self.answer(handler, code, [], f"<Error><Code>{word}</Code></Error>".encode())
            return
        connection = http.client.HTTPConnection("127.0.0.1", behind, timeout=30)
        connection.request(handler.command, handler.path, body, dict(handler.headers))
        reply = connection.getresponse()
        self.answer(handler, reply.status, reply.getheaders(), reply.read())
        connection.close()

    @staticmethod
    def answer(handler, code, headers, body) -> None:
        handler.send_response(code)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "content-length", "connection", "server", "date"):
                handler.send_header(name, value)
        size = {name.lower(): value for name, value in headers}.get("content-length", len(body))
        handler.send_header("Content-Length", size if handler.command == "HEAD" else len(body))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
