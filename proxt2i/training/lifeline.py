"""The ranks' lifeline: when one dies or fails, all end at once, and one of them says which it was and why.

Without it the others wait in a collective operation for a rank that is gone: ten minutes and more. Rank 0 listens on a TCP
port; every rank, rank 0 too, keeps one connection to it from a thread, and sends lines of text:

    hello TOKEN RANK HOST PID   when it connects; the hub answers "ready NAME OF RANK 0" to all once all are there
    leave STATUS REPORT         it has failed (or was told to stop): all are to end with STATUS, and REPORT says why (JSON)
    bye                         it is done; the hub answers "bye" to all once all are

A connection that ends without a goodbye is a rank that died: killed, out of memory, a crash. The hub then prints who it was, and
"end STATUS" to the others ends them where they stand; a checkpoint is whole or not there at all, so that is safe. When the hub goes
away, rank 0 died. There are no heartbeats: a rank may compile or save for hours. Keep-alive finds a host that has vanished.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field

from proxt2i.signals import STOP_SIGNALS

FAILED = 1  # exit status of every rank when one failed
START_S = 120.0  # all ranks must have connected after this long: they have just met, so they are there or dead
GRACE_S = 1.0  # a dead rank makes collectives fail in the others: wait this long for the cause before an effect is reported
ANSWER_S = 10.0  # how long a failed rank waits for the hub
DIED = "died without a word (killed? out of memory?)"
MAX_LINE = 1 << 17
STORE_KEY = "proxt2i/lifeline"

_line: _Line | None = None  # this process's; none on a single rank


def start(rank: int, world_size: int, store) -> None:
    """Connect this rank; returns when all have. `store`: of the process group. RuntimeError when that fails."""
    global _line
    if world_size == 1:
        return
    if rank == 0:
        hub = _Hub(world_size)
        threading.Thread(target=hub.run, name="lifeline hub", daemon=True).start()
        store.set(STORE_KEY, f"{hub.port} {hub.token}")
    port, token = store.get(STORE_KEY).decode().split()
    _line = _Line(rank, int(port), token)
    for number in STOP_SIGNALS:
        signal.signal(number, _on_signal)


def goodbye() -> None:
    """This rank is done. Returns when all are: launchers end the others as soon as one exits with another status than 0."""
    global _line
    if _line is not None:
        _line.goodbye()
        _line = None
        for number in STOP_SIGNALS:  # from such a launcher, to ranks that have done all they had to
            signal.signal(number, signal.SIG_IGN)


def leave(status: int, report: str) -> None:
    """End all ranks with exit status `status`; the hub prints `report` if it is the first. Returns only when it cannot be reached."""
    if _line is not None:
        _line.leave(status, report)


def whoami(rank: int) -> str:
    return f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"


def _on_signal(number: int, frame) -> None:
    """Outside the training steps, where there is nothing to save."""
    report = f"stopped by signal {number} ({signal.Signals(number).name}) before or after the training steps; all that was saved is whole"
    leave(128 + number, report)
    _say(report)
    os._exit(128 + number)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a closed terminal must not keep a rank from ending
        print(f"\n{text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# One rank's end.


class _Line:
    def __init__(self, rank: int, port: int, token: str):
        self.rank, self._hub_name = rank, "rank 0"
        self._ready, self._over = threading.Event(), threading.Event()
        try:
            self._socket = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=START_S)
        except OSError as error:
            raise RuntimeError(f"{whoami(rank)} cannot connect to rank 0 at {os.environ['MASTER_ADDR']}:{port}: {error}") from None
        self._socket.settimeout(None)
        _keep_alive(self._socket)
        _closed_in_children(self._socket)
        self._send(f"hello {token} {rank} {socket.gethostname()} {os.getpid()}")
        threading.Thread(target=self._listen, name="lifeline", daemon=True).start()
        if not self._ready.wait(2 * START_S):
            raise RuntimeError(f"{whoami(rank)} waited {2 * START_S:.0f} s for the other ranks")

    def goodbye(self) -> None:
        self._send("bye")
        self._over.wait()

    def leave(self, status: int, report: str) -> None:
        self._send(f"leave {status} {json.dumps(report[-MAX_LINE // 8:])}")
        self._over.wait(ANSWER_S)  # _listen ends the process

    def _send(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the hub is gone: _listen notices
            self._socket.sendall(line.encode() + b"\n")

    def _listen(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("r") as lines:
            for line in lines:
                word, *rest = line.split()
                if word == "ready":
                    self._hub_name = " ".join(rest)
                    self._ready.set()
                elif word == "bye":
                    self._over.set()
                    self._socket.close()
                    return
                elif word == "end":
                    os._exit(int(rest[0]))
        if self.rank == 1 or os.environ.get("LOCAL_RANK") == "0":  # once a machine is enough
            _say(f"error: {self._hub_name} {DIED}")
        os._exit(FAILED)


# ---------------------------------------------------------------------------------------------------------------------
# Rank 0's hub.


@dataclass
class _Peer:
    socket: socket.socket
    rank: int | None = None  # until it has said hello
    name: str = ""
    received: bytes = b""
    left: bool = False  # said bye, or that it failed
    since: float = field(default_factory=time.monotonic)


class _Hub:
    """`run` is the body of a thread of rank 0, on sockets that never block."""

    def __init__(self, world_size: int):
        self.world_size, self.token = world_size, secrets.token_hex(16)
        self._listener = _listener(os.environ["MASTER_ADDR"])
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.PollSelector()  # epoll's would be shared with children
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._peers: dict[int, _Peer] = {}  # by rank, of those that have said hello
        self._started, self._is_ready = time.monotonic(), False
        self._verdict: tuple[int, str] | None = None  # status, report
        self._decide_at = float("inf")

    def run(self) -> None:
        while not self._is_over():
            for key, _ in self._selector.select(timeout=0.2 if self._verdict or not self._is_ready else 5.0):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
                if time.monotonic() >= self._decide_at:
                    break
            self._check_time()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()

    def _is_over(self) -> bool:
        """All have said bye; or the verdict is due, which ends this process too."""
        if time.monotonic() >= self._decide_at:
            status, report = self._verdict
            _say(report)
            for rank in sorted(self._peers, reverse=True):  # rank 0 last
                self._tell(self._peers[rank], f"end {status}")
            time.sleep(1.0)  # rank 0's own thread ends the process long before
            os._exit(status)
        if self._is_ready and self._verdict is None and all(peer.left for peer in self._peers.values()):
            for rank in sorted(self._peers, reverse=True):  # rank 0 last: its process may end at once, and this thread with it
                self._tell(self._peers[rank], "bye")
            return True
        return False

    def _check_time(self) -> None:
        now = time.monotonic()
        if not self._is_ready and now - self._started > START_S:
            missing = [str(rank) for rank in range(self.world_size) if rank not in self._peers]
            self._decide(FAILED, f"error: rank {', '.join(missing)} did not join within {START_S:.0f} s", now)
        for key in list(self._selector.get_map().values()):
            if key.data is not None and key.data.rank is None and now - key.data.since > 10:
                self._close(key.data)  # a stranger

    def _decide(self, status: int, report: str, when: float) -> None:
        """The earliest to decide wins."""
        if when < self._decide_at:
            self._verdict, self._decide_at = (status, report), when

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            _keep_alive(connection)
            _closed_in_children(connection)
            self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))

    def _read(self, peer: _Peer) -> None:
        try:
            received = peer.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        peer.received += received
        *lines, peer.received = peer.received.split(b"\n")
        for line in lines:
            self._handle(peer, line.decode(errors="replace"))
        too_long = len(peer.received) > (MAX_LINE if peer.rank is not None else 256)
        if (not received or too_long) and peer.socket.fileno() >= 0:
            self._close(peer)
            if peer.rank is not None and not peer.left:
                self._decide(FAILED, f"error: {peer.name} {DIED}", time.monotonic())

    def _handle(self, peer: _Peer, line: str) -> None:
        word, *rest = line.split(" ", 2)
        if peer.rank is None:
            self._welcome(peer, line)
        elif word == "bye":
            peer.left = True
        elif word == "leave":
            peer.left = True
            self._decide(int(rest[0]), json.loads(rest[1]), time.monotonic() + GRACE_S)

    def _welcome(self, peer: _Peer, line: str) -> None:
        words = line.split()
        known = len(words) == 5 and words[0] == "hello" and hmac.compare_digest(words[1].encode(), self.token.encode())
        if not known:
            self._close(peer)
            return
        peer.rank, peer.name = int(words[2]), f"rank {words[2]} ({words[3]}, process {words[4]})"
        self._peers[peer.rank] = peer
        if len(self._peers) == self.world_size:
            self._is_ready = True
            for other in self._peers.values():
                self._tell(other, f"ready {self._peers[0].name}")

    def _tell(self, peer: _Peer, line: str) -> None:
        with contextlib.suppress(OSError):
            peer.socket.send(line.encode() + b"\n")

    def _close(self, peer: _Peer) -> None:
        self._selector.unregister(peer.socket)
        peer.socket.close()


# ---------------------------------------------------------------------------------------------------------------------
# Sockets.


def _listener(address: str) -> socket.socket:
    """On a free port: of the loopback interface if that is where the ranks meet, else of all interfaces."""
    family, _, _, _, found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    is_loopback = found[0].startswith("127.") or found[0] == "::1"
    listener = socket.create_server((found[0] if is_loopback else "", 0), family=family, backlog=1024)
    listener.setblocking(False)
    _closed_in_children(listener)
    return listener


def _keep_alive(connection: socket.socket) -> None:
    """A host that has vanished is noticed after a minute; a busy one answers, since the kernel does it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 60_000)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _closed_in_children(connection: socket.socket) -> None:
    """A loader process that outlives its rank must not keep the rank's connection open."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=connection.close)
