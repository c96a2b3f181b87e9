"""A server that publishes files."""

import http.server
import threading
from types import SimpleNamespace

import pytest


class Site(SimpleNamespace):
    """``files`` by path, the base ``url``, and the paths ``asked`` for."""


@pytest.fixture
def site(monkeypatch):
    """A web server on this machine."""
    monkeypatch.setenv("no_proxy", "*")
    published = Site(files={}, asked=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            published.asked.append(self.path)
            content = published.files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    published.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    yield published
    server.shutdown()
    server.server_close()
    thread.join()
