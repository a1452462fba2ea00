"""The processes of a job meet at the coordinator's port before jax takes it: who is missing can be told, and so can a port
that nobody can reach. jax itself would wait in silence."""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator

from configs.schema import ConfigError

TOLD = 30.0  # seconds of waiting after which it is told
LIMIT = 300.0
HINT = "start the command on all workers (--worker=all)"
GREETING = b"podwright"


class NotJoined(ConnectionError):
    """The job is not complete; the sentence says who is missing."""


def gather(address: str, count: int, index: int) -> None:
    """Returns on all processes once all are there, with the port of `address` (host:port, of process 0) free again.

    Raises NotJoined after five minutes, ConfigError if the port or the process's number is taken.
    """
    if count > 1:
        (expect if index == 0 else attend)(address, count, index)


def expect(address: str, count: int, index: int) -> None:
    """Process 0 waits for the others."""
    port, began = int(address.rpartition(":")[2]), time.monotonic()
    joined: dict[int, socket.socket] = {}
    told = False
    try:
        server = socket.create_server(("", port), backlog=count)
    except OSError as error:
        raise ConfigError(f"the coordinator's port {port} cannot be used: {error.strerror}: give another") from None
    with server, contextlib.ExitStack() as connections:
        server.settimeout(0.2)
        while len(joined) < count - 1:
            with contextlib.suppress(TimeoutError):
                connection, (caller, *_) = server.accept()
                connections.enter_context(connection)
                connection.settimeout(2.0)
                with contextlib.suppress(OSError, ValueError):  # a port scanner, for example
                    greeting, number = connection.recv(64).split()
                    if greeting == GREETING:
                        if int(number) in joined and alive(joined[int(number)]):
                            raise ConfigError(
                                f"two processes say they are process {int(number)}, one of them on {caller}"
                            )
                        joined[int(number)] = connection
            waited = time.monotonic() - began
            missing = ", ".join(str(i) for i in range(1, count) if i not in joined)
            if missing and waited > LIMIT:
                raise NotJoined(f"processes {missing} of {count} never joined: {HINT}")
            if missing and waited > TOLD and not told:
                told = True
                tell(f"{len(joined) + 1} of {count} hosts joined after {TOLD:.0f} s; missing: {missing}; {HINT}")
        for connection in joined.values():
            with contextlib.suppress(OSError):
                connection.sendall(b"go")
                connection.recv(1)  # until it has hung up, so that the port is free at once


def attend(address: str, count: int, index: int) -> None:
    """Another process waits for process 0, and with it for the rest."""
    host, _, port = address.rpartition(":")
    began, told, reached = time.monotonic(), False, False
    while True:
        waited = time.monotonic() - began
        nobody = f"nothing listens at {address}, where process 0 should"
        if waited > LIMIT:
            raise NotJoined("process 0 waits for others that never joined" if reached else f"{nobody}: {HINT}")
        if waited > TOLD and not told and not reached:
            told = True
            tell(f"{nobody}, after {TOLD:.0f} s: {HINT}, and let the network pass port {port}")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=2.0) as connection:
            connection.sendall(GREETING + b" %d" % index)
            reached = True
            connection.settimeout(LIMIT)
            if connection.recv(2) == b"go":
                return
        time.sleep(0.2)


def alive(connection: socket.socket) -> bool:
    """Whether the other end still holds it; it sends nothing more."""
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        connection.settimeout(2.0)


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Where jax finds the other hosts itself, that they are waited for is all that can be told."""
    sentence = f"still waiting for the other hosts after {TOLD:.0f} s: {HINT}, and let the network pass jax's port"
    timer = threading.Timer(TOLD, tell, [sentence])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def tell(sentence: str) -> None:
    print(f"podwright: {sentence}", file=sys.stderr, flush=True)
