"""A ring of idle connections between ranks: the end of a process shows at once at its neighbours.

The kernel closes a process's connections however it ends, so nothing has to be sent while all is
well. A rank that ends in order says so first.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
from contextlib import suppress
from typing import Any

_BYE = b"\x01"


class Links:
    """The connections of one rank to the ranks before and after it.

    Where none can be made (closed ports between hosts), there is none, and nothing is noticed.
    """

    def __init__(self, store: Any, rank: int, ranks: int, one_host: bool) -> None:
        self.store, self.after = store, (rank + 1) % ranks
        self.before: int | None = (rank - 1) % ranks
        self.tried = False
        self.open: dict[socket.socket, int] = {}
        self.ready = selectors.DefaultSelector()
        self.server = socket.create_server(("localhost" if one_host else "", 0))
        self.ready.register(self.server, selectors.EVENT_READ)
        self.token = secrets.token_hex(16)
        where = {"host": socket.gethostname(), "port": self.server.getsockname()[1]}
        store.set(f"link/{rank}", json.dumps({**where, "token": self.token}))
        # a child that lives on must not keep them open
        os.register_at_fork(after_in_child=self.close)

    def lost(self, seconds: float) -> int | None:
        """A neighbour that ended without a word; None if there was none for some time."""
        if not self.tried and self.store.check([f"link/{self.after}"]):
            self.tried = True
            with suppress(OSError):
                self._connect(json.loads(self.store.get(f"link/{self.after}")))
        for key, _ in self.ready.select(seconds):
            link = key.fileobj
            assert isinstance(link, socket.socket)
            if link is self.server:
                with suppress(OSError):
                    self._accept()
                continue
            self.ready.unregister(link)
            try:
                word = link.recv(1)
            except OSError:
                word = b""
            if word != _BYE:
                return self.open[link]
        return None

    def _connect(self, there: dict[str, Any]) -> None:
        host = "localhost" if there["host"] == socket.gethostname() else there["host"]
        link = socket.create_connection((host, there["port"]), 5.0)
        link.sendall(there["token"].encode())
        self._keep(link, self.after)

    def _accept(self) -> None:
        link, _ = self.server.accept()
        link.settimeout(1.0)
        word = link.recv(len(self.token), socket.MSG_WAITALL)
        if self.before is None or not secrets.compare_digest(word, self.token.encode()):
            link.close()
            return
        self._keep(link, self.before)
        self.before = None
        self.ready.unregister(self.server)
        self.server.close()

    def _keep(self, link: socket.socket, rank: int) -> None:
        # a host that is gone is noticed within a minute
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        link.settimeout(None)
        self.open[link] = rank
        self.ready.register(link, selectors.EVENT_READ)

    def leave(self) -> None:
        """Tell the neighbours that this rank ends in order, and close."""
        for link in self.open:
            with suppress(OSError):
                link.sendall(_BYE)
        self.close()

    def close(self) -> None:
        """Close the connections."""
        for link in (self.server, *self.open):
            with suppress(OSError):
                link.close()
        self.ready.close()
