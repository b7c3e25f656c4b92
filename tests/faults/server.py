"""Collects the digits in processes that tests may kill; `Server` starts it, `python -m tests.faults.server` is it.

Importing torch takes seconds and a test kills many processes, so one process imports everything once and forks a child
per request. Threads do not survive a fork: before it, the server runs torch on one thread and never touches a store.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = 24
BLOCKS = {"mask_block": 4, "example_block": 8, "batch_size": 128}  # the pace is fixed, and so is every bit
LIMIT = 120  # seconds after which a wait is a failure


def until(happened, what: str) -> None:
    """Poll until something has happened; the limit only keeps a broken test from hanging."""
    deadline = time.monotonic() + LIMIT
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen in {LIMIT} s")
        time.sleep(0.0005)


def stored_units(path: Path) -> int:
    """Count the chunks of `outputs` in a run that is being written."""
    return sum(file.name.isdigit() for file in path.glob("outputs/c/*/*"))


@dataclass(frozen=True)
class Child:
    """A process that collects.

    Attributes:
        server: What it was forked from.
        pid: Its number.
        log: Where its standard error goes.
    """

    server: "Server"
    pid: int
    log: Path

    def send(self, number: signal.Signals) -> None:
        """Send a signal; the process stays known, though it may have ended, until it is waited for."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Return the exit code: minus the signal's number when one ended it."""
        return self.server.ask({"wait": self.pid})

    def says(self) -> str:
        return self.log.read_text(errors="replace")


class Server:
    """The other end of the pipe to the process that forks."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        command = [sys.executable, "-m", "tests.faults.server"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the server did not start")

    def ask(self, request: dict) -> int:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, path: Path, *calls: dict) -> Child:
        """Collect into a path in a new process, with the settings of each call in turn."""
        log = self._logs / f"{len(list(self._logs.iterdir()))}.log"
        log.touch()
        pid = self.ask({"path": str(path), "calls": [{**BLOCKS, **call} for call in calls], "log": str(log)})
        return Child(self, pid, log)

    def finish(self, path: Path, *calls: dict) -> None:
        """Collect to the end."""
        child = self.start(path, *calls)
        code = child.wait()
        if code != 0:
            raise RuntimeError(f"exit code {code}:\n{child.says()}")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve() -> None:
    import torch

    import coar
    from tests.faults.helpers import digits_study, grouped

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
    study = digits_study(EXAMPLES)
    answer("ready")
    while line := read_line():
        request = json.loads(line)
        if "wait" in request:
            answer(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]))
            continue
        pid = os.fork()
        if pid:
            answer(pid)
            continue
        os.dup2(os.open(request["log"], os.O_WRONLY), sys.stderr.fileno())
        for call in request["calls"]:
            coar.collect(study, request["path"], **grouped({"device": "cpu", **call}))
        return


def read_line() -> bytes:
    """Read one line and no more, since a child must not inherit requests in a buffer."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def answer(value: object) -> None:
    os.write(1, f"{value}\n".encode())


if __name__ == "__main__":
    serve()
