"""A site over HTTP, to this machine alone: for browsers that may not open files, and through SSH tunnels."""

from __future__ import annotations

import functools
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
        server = ThreadingHTTPServer(("127.0.0.1", port), functools.partial(_Handler, folder=folder))
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


class _Handler(SimpleHTTPRequestHandler):
    """Files of one folder, none of other places that links lead to; no lists of files."""

    def __init__(self, *args: Any, folder: Path) -> None:
        self._folder = folder.resolve()
        super().__init__(*args, directory=str(self._folder))

    def send_head(self) -> Any:
        # A page elsewhere can give its own name this address; what it reads then names that other host.
        host, _, _ = self.headers.get("Host", "").partition(":")
        if host not in ("127.0.0.1", "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        if not Path(self.translate_path(self.path)).resolve().is_relative_to(self._folder):
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def list_directory(self, path: Any) -> None:
        self.send_error(HTTPStatus.NOT_FOUND)

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")  # a site written again has the same names
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: stderr is for what the user should read."""
