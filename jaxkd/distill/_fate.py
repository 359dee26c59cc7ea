"""Ends the processes of a run together.

Without this module, the others wait in a collective operation for a process that has ended, until
JAX's heartbeat times out and aborts them with a page of log, or for ever. JAX 0.7 to 0.12 offer
nothing else: the `missed_heartbeat_callback` of its client is no argument of
`jax.distributed.initialize` and cannot be a function of Python. With `jax_enable_recoverability`,
JAX 0.10 still aborts the others when the primary process ends.

Every process is therefore connected to the primary one, at the port of JAX's coordinator. The
connections of JAX's own clients are forwarded there as well, so that they do not notice that the
primary process ends before this module does. A process that ends closes its connection, after which
the primary process tells the others. They print one line and end.
"""

import abc
import atexit
import contextlib
import os
import socket
import sys
import threading
import time

import jax

from jaxkd.distill import _relay
from jaxkd.runs import RunError

MESSAGE = (
    "error: another process of this run has ended: start the same command again, on the remaining "
    "hosts if need be"
)
GRACE_SECONDS = 1.0
"""Time in which a process may come to an error of its own, since an error often occurs in all."""
CONSEQUENCE_SECONDS = 3.0
"""Time in which an error of a collective operation is found to be due to another process."""
GOODBYE_SECONDS = 10.0
"""Longest time that a process stays for the sake of others after its own end."""
POLL_SECONDS = 0.05

# What a connection begins with. JAX's clients begin with "PRI ", as HTTP/2 does.
_HELLO = b"KD1 "
# What a process tells the primary one at its end.
_DONE, _FAILED = b"d", b"f"
# What the primary process tells: another one has failed, or is gone, or all may leave.
_OTHER_FAILED, _OTHER_GONE, _LEAVE = b"F", b"G", b"L"


class Fate(abc.ABC):
    """What this process knows of the end of the others."""

    def __init__(self) -> None:
        """Starts with all processes running."""
        self._status: int | None = None
        self._other_failed = threading.Event()
        self._other_gone = threading.Event()
        self._may_leave = threading.Event()
        self._ending = threading.Lock()

    @abc.abstractmethod
    def announce(self, end: bytes) -> None:
        """Tells the primary process that this one has come to its end."""

    def wait_for_goodbye(self) -> None:  # noqa: B027  (only the primary process has to)
        """Waits until the others have received all that JAX sends them at the end."""

    def tell(self, message: bytes) -> None:
        """Takes a message of the primary process, or what its silence says."""
        if self._may_leave.is_set():
            return
        if message == _LEAVE:
            self._may_leave.set()
            return
        if message != _OTHER_FAILED:
            self._other_gone.set()
        if not self._other_failed.is_set():
            self._other_failed.set()
            _relay.start_thread(self._end_after_grace)

    def start(self) -> None:
        """Forgets an error that was caught."""
        self._status = None

    def fail(self, error: BaseException) -> None:
        """Notes that an error ends this process, unless another process is the cause."""
        if self._status is not None or (isinstance(error, SystemExit) and not error.code):
            return
        is_own = isinstance(error, (RunError, OSError, KeyboardInterrupt, SystemExit))
        # An operation that is cut off raises errors of several types.
        if not is_own and self._other_failed.wait(CONSEQUENCE_SECONDS):
            self._end()
        self._status = 130 if isinstance(error, KeyboardInterrupt) else 1
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            self._status = error.code

    def leave(self) -> None:
        """Ends this process together with the others, before JAX waits for them."""
        # An error that was caught nowhere; Python 3.11 knows it under its older name.
        if getattr(sys, "last_exc", getattr(sys, "last_value", None)) is not None:
            self._status = 1 if self._status is None else self._status
        self.announce(_DONE if self._status is None else _FAILED)
        try:
            self._wait_for_others()
        except KeyboardInterrupt:
            os._exit(130)
        jax.distributed.shutdown()
        self.wait_for_goodbye()

    def _wait_for_others(self) -> None:
        started = time.monotonic()
        # Without a limit if all is well: the primary process may evaluate the models for minutes.
        # Whether another one is gone by then, `tell` sees.
        while not self._may_leave.wait(POLL_SECONDS):
            if self._status is None:
                continue
            is_late = time.monotonic() - started > GOODBYE_SECONDS
            if self._other_gone.is_set() or is_late:
                # JAX would wait for those that are gone.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(self._status)

    def _end_after_grace(self) -> None:
        # A process that failed as well ends with its own message.
        if not self._may_leave.wait(GRACE_SECONDS) and self._status is None:
            self._end()

    def _end(self) -> None:
        # Never released, so that only one thread prints.
        self._ending.acquire()
        # Nothing else ends a thread that is blocked in a collective operation. Nothing is lost,
        # because checkpoints are complete or do not count.
        os.write(2, f"{MESSAGE}\n".encode())
        os._exit(1)


class _Secondary(Fate):
    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection = connection
        _relay.start_thread(self._listen)

    def announce(self, end: bytes) -> None:
        _send(self._connection, end)

    def _listen(self) -> None:
        while message := _receive(self._connection, 1):
            self.tell(message)
        self.tell(_OTHER_GONE)


class _Primary(Fate):
    def __init__(self, num_others: int) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._num_others = num_others
        self._connections: list[socket.socket] = []
        self._ends: list[bytes] = []
        self._all_closed = threading.Event()

    def add(self, connection: socket.socket) -> None:
        """Listens to another process until that has ended."""
        with self._lock:
            self._connections.append(connection)
        while message := _receive(connection, 1):
            self.announce(message)
        with self._lock:
            self._connections.remove(connection)
            self._tell_all(_OTHER_GONE)
            if not self._connections:
                self._all_closed.set()

    def announce(self, end: bytes) -> None:
        with self._lock:
            self._ends.append(end)
            if end == _FAILED:
                self._tell_all(_OTHER_FAILED)
            # Where some have failed and others not, the latter end first.
            if len(self._ends) > self._num_others and len(set(self._ends)) == 1:
                self._tell_all(_LEAVE)

    def wait_for_goodbye(self) -> None:
        self._all_closed.wait(GOODBYE_SECONDS)

    def _tell_all(self, message: bytes) -> None:
        for connection in self._connections:
            _send(connection, message)
        self.tell(message)


def join(
    coordinator: str, num_processes: int, process_id: int, *, timeout: float, silence: float
) -> tuple[Fate, str]:
    """Connects this process to the primary one, or lets the others connect to it.

    Args:
        coordinator: Address and port of the primary process.
        num_processes: Number of processes.
        process_id: Index of this process.
        timeout: Seconds to wait for the primary process.
        silence: Seconds after which a silent machine counts as gone.

    Returns:
        The fate, and the address of JAX's coordinator as this process has to see it.

    Raises:
        OSError: If the address cannot be used or reached.
    """
    host, _, port = coordinator.rpartition(":")
    address = (host.strip("[]"), int(port))
    if process_id == 0:
        return _serve(address[1], num_processes - 1, silence)
    connection = _relay.connect(address, timeout)
    _relay.keep_alive(connection, silence)
    connection.sendall(_HELLO)
    listener = socket.create_server(("127.0.0.1", 0))
    _relay.serve(listener, lambda client: _relay.forward(client, _relay.connect(address, timeout)))
    return _Secondary(connection), f"127.0.0.1:{listener.getsockname()[1]}"


def _serve(port: int, num_others: int, silence: float) -> tuple[Fate, str]:
    """Listens at the port of the coordinator, in place of JAX's, which gets a private one."""
    private = ("127.0.0.1", _relay.find_free_port())
    primary = _Primary(num_others)

    def handle(connection: socket.socket) -> None:
        _relay.keep_alive(connection, silence)
        first = _receive(connection, len(_HELLO))
        if first == _HELLO:
            primary.add(connection)
            return
        service = _relay.connect(private, silence)
        service.sendall(first)
        _relay.forward(connection, service)

    _relay.serve(_relay.listen_everywhere(port), handle)
    return primary, f"127.0.0.1:{private[1]}"


def end_together(fate: Fate) -> None:
    """Lets this process leave together with the others when Python ends."""
    # Python calls this before what was registered earlier, such as JAX's wait for all processes.
    atexit.register(fate.leave)


def _send(connection: socket.socket, message: bytes) -> None:
    # Whoever reads from the connection notices that it has ended.
    with contextlib.suppress(OSError):
        connection.sendall(message)


def _receive(connection: socket.socket, count: int) -> bytes:
    """Returns `count` bytes, or none if the connection has ended."""
    content = b""
    try:
        while len(content) < count:
            part = connection.recv(count - len(content))
            if not part:
                return b""
            content += part
    except OSError:
        return b""
    return content
