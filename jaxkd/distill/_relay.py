"""Connections between the processes of a run, and their forwarding."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable

RETRY_SECONDS = 0.2
"""Time between two attempts to connect."""


def connect(address: tuple[str, int], timeout: float) -> socket.socket:
    """Connects to an address at which another process may not listen yet.

    Raises:
        OSError: If it does not listen within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection(address, timeout=timeout)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_SECONDS)
        else:
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection


def find_free_port() -> int:
    """Returns a port of this machine alone that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def listen_everywhere(port: int) -> socket.socket:
    """Listens at a port on all networks of this machine, as JAX's coordinator does."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def keep_alive(connection: socket.socket, seconds: float) -> None:
    """Lets the system end a connection whose other machine has been silent for some seconds.

    A process that ends closes its connections, but a machine that loses its power or its network
    does not. The other system answers, not its process, which may be busy for minutes.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": seconds / 2,
        "TCP_KEEPINTVL": seconds / 6,
        "TCP_KEEPCNT": 3,
        # For bytes that were sent and not acknowledged, in milliseconds.
        "TCP_USER_TIMEOUT": 1000 * seconds,
    }
    for name, value in options.items():
        # Not every system has all of them.
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(1, int(value)))


def serve(listener: socket.socket, handle: Callable[[socket.socket], None]) -> None:
    """Handles each connection to a listener in a thread of its own, without waiting for it."""

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            start_thread(handle, connection)

    start_thread(accept)


def forward(client: socket.socket, service: socket.socket) -> None:
    """Copies what two connections send, until the client ends.

    The client is not told that the service has ended: JAX's would end its process at once, with a
    page of log.
    """
    start_thread(_copy, service, client)
    _copy(client, service)
    with contextlib.suppress(OSError):
        # Unlike `close`, it also ends the other thread's wait.
        service.shutdown(socket.SHUT_RDWR)


def start_thread(function: Callable[..., None], *arguments: object) -> None:
    """Calls a function in a thread that does not keep the process alive."""
    threading.Thread(target=function, args=arguments, daemon=True).start()


def _copy(source: socket.socket, target: socket.socket) -> None:
    # An error says that one of them has ended.
    with contextlib.suppress(OSError):
        while content := source.recv(2**16):
            target.sendall(content)
