"""A site over HTTP, to this machine alone: for browsers that may not open files, and through SSH tunnels."""

from __future__ import annotations

import functools
import sys
import webbrowser
from collections.abc import Callable
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from saezoo.errors import SaezooError
from saezoo.features.site import is_site


def serve(folder: Path, note: Callable[[str], None], *, port: int = 0, browser: bool = True) -> None:
    """Serve the site on 127.0.0.1 until Ctrl-C; `port` 0: any that is free. SaezooError if there is no site, or the
    port is taken."""
    if not is_site(folder):
        raise SaezooError(f"{folder} is no site of saezoo; write one first")
    try:
        server = _Server(("127.0.0.1", port), functools.partial(Handler, folder=folder))
    except (OSError, OverflowError) as error:
        raise SaezooError(f"port {port} cannot be used: {error}; choose another, or none") from None
    with server:
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        note(f"{folder} at {address} (end with Ctrl-C)")
        try:
            if browser:
                webbrowser.open(address)
            server.serve_forever()
        except KeyboardInterrupt:
            return


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a reader who went on before all was there
            super().handle_error(request, client_address)


class Handler(SimpleHTTPRequestHandler):
    """Files of one folder, none of other places that links lead to; no lists of files."""

    def __init__(self, *args: Any, folder: Path) -> None:
        self._folder = folder.resolve()
        super().__init__(*args, directory=str(self._folder))

    def send_head(self) -> Any:
        """The file, open; or None, and an error is sent."""
        # A page elsewhere can give its own name this address; what it reads then names that other host.
        host, _, _ = self.headers.get("Host", "").partition(":")
        if host not in ("127.0.0.1", "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        if not self._is_inside(self.translate_path(self.path)):
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def _is_inside(self, path: str) -> bool:
        try:
            return Path(path).resolve().is_relative_to(self._folder)
        except (OSError, ValueError):  # no path at all: null bytes, a name too long
            return False

    def list_directory(self, path: Any) -> None:
        """An error is sent."""
        self.send_error(HTTPStatus.NOT_FOUND)

    def end_headers(self) -> None:
        """Those of every answer."""
        self.send_header("Cache-Control", "no-cache")  # a site written again has the same names
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: stderr is for what the user should read."""
