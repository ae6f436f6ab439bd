"""A real nginx on the loopback, and a network between it and a device that is cut again and again.

Debian has it in the package nginx-light. Where it is not installed, the tests that need it are skipped.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

CONFIG = """\
{user}daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
worker_processes 2;
events {{ worker_connections 1024; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {served};
    }}
}}
"""
START_S = 20.0


class Nginx:
    """A running server."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def requests(self) -> list[str]:
        """Lines of the access log."""
        return (self.folder / "access.log").read_text().splitlines()


def find_nginx() -> str | None:
    """Where it is."""
    return shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")


@contextmanager
def serving(served: Path, folder: Path) -> Iterator[Nginx]:
    """Serve the files below `served`; logs and temporary files go to `folder`."""
    program = find_nginx()
    if program is None:
        pytest.skip("nginx is not installed (Debian: apt-get install nginx-light): no update over a real server")
    folder.mkdir(parents=True)
    port = free_port()
    config = folder / "nginx.conf"
    user = "user root;\n" if os.geteuid() == 0 else ""  # it would take another one, who may not read test folders
    config.write_text(CONFIG.format(user=user, folder=folder.resolve(), served=served.resolve(), port=port))
    with subprocess.Popen([program, "-c", str(config.resolve()), "-p", str(folder)], stderr=subprocess.PIPE) as process:
        try:
            _wait_for(port, process)
            yield Nginx(folder, port)
        finally:
            process.terminate()
            process.wait(timeout=START_S)


@contextmanager
def cut_every(port: int, most_bytes: int) -> Iterator[str]:
    """A way to the server that ends each connection once it has carried so many bytes; yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    is_over = threading.Event()

    def accept() -> None:
        while not is_over.is_set():
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_carry, args=(client, port, most_bytes), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        is_over.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=START_S)


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _carry(client: socket.socket, port: int, most_bytes: int) -> None:
    with client, socket.create_connection(("127.0.0.1", port)) as server:

        def ask() -> None:
            with suppress(OSError):
                while data := client.recv(65536):
                    server.sendall(data)

        threading.Thread(target=ask, daemon=True).start()
        left = most_bytes
        with suppress(OSError):
            while left and (data := server.recv(min(left, 65536))):
                client.sendall(data)
                left -= len(data)
            client.shutdown(socket.SHUT_RDWR)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            message = process.stderr.read().decode() if process.stderr else ""
            raise AssertionError(f"nginx ended with {process.returncode}: {message}")
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError("nginx does not listen")
