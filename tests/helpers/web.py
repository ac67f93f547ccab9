"""A web of loopback addresses, and which process asks it: for those that are to be killed."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil

AnyPage = tuple[int, dict[str, str], str]


class Web:
    """A web of loopback addresses: pages are functions of (host, path); what was asked for, and when."""

    def __init__(self, page: Callable[[int, str], AnyPage]) -> None:
        self.log: list[tuple[float, str, str]] = []
        self.client = threading.local()
        """``port``: of whom the page is for that is being made."""
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def do_GET(self) -> None:
                host = self.headers["Host"].partition(":")[0]
                web.log.append((time.monotonic(), host, self.path))
                web.client.port = self.client_address[1]
                status, headers, body = page(int(host.rpartition(".")[2]), self.path)
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    for name, value in ({"Content-Type": "text/html"} | headers).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(body.encode())))
                    self.end_headers()
                    self.wfile.write(body.encode())

            def log_message(self, *args: Any) -> None: ...

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 256
            block_on_close = False

            def handle_error(self, *args: Any) -> None: ...

        self._server = Server(("0.0.0.0", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def url(self, host: int, path: str) -> str:
        return f"http://127.0.2.{host}:{self.port}{path}"

    def paths(self) -> Counter[str]:
        return Counter(path for _, _, path in self.log)

    def __enter__(self) -> Web:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def shares_helpers(parent: int) -> list[psutil.Process]:
    """Those that run; the newest last."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(parent).children()
        return [one for one in found if is_alive(one) and "resource_tracker" not in " ".join(one.cmdline())]
    return []


def shares_client(parent: int, port: int) -> psutil.Process | None:
    """The helper that has a connection from ``port``."""
    for one in shares_helpers(parent):
        with contextlib.suppress(psutil.Error):
            if port in {connection.laddr.port for connection in one.net_connections()}:
                return one
    return None


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
