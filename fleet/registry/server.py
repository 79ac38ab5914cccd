"""A development web server for a registry, with Range, If-Range, ETag and HEAD. Starlette does the HTTP.

Only names of the registry's own form are ever looked up, so no request reaches another file. In
production any static web server does: the folder is all there is.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from threading import Thread
from typing import Any

import anyio
import uvicorn
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import Receive, Scope, Send

from edge_contract.canonical import sha256_hex
from edge_contract.errors import InputRejected, Reason
from fleet.registry import trust

_METADATA = re.compile(
    r"metadata/timestamp\.json|root\.json"
    r"|metadata/[1-9][0-9]{0,8}\.(?:root|targets|snapshot"
    r"|(?:models|team-[a-z0-9-]{1,32})(?:\.[0-9]{1,2}-[0-9a-f]{1,8})?)\.json"
)
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{2})/(\1[0-9a-f]{62})")
_FOREVER = "public, max-age=31536000, immutable"
_START_S = 10.0


class RegistryFiles(StaticFiles):
    """Starlette's static files, narrowed to a registry's names and with digests as entity tags."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; Starlette's own refusals become plain answers."""
        if scope["type"] != "http":
            return
        if scope["method"] not in ("GET", "HEAD"):
            await PlainTextResponse("405 read only\n", 405, {"allow": "GET, HEAD"})(scope, receive, send)
            return
        try:
            await super().__call__(scope, receive, send)
        except HTTPException as e:
            await PlainTextResponse(f"{e.status_code} {e.detail}\n", e.status_code)(scope, receive, send)

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Metadata from memory, because it is replaced under its name; the rest from the file."""
        if not _METADATA.fullmatch(path):
            return await super().get_response(path, scope)
        full_path, found = await anyio.to_thread.run_sync(self.lookup_path, path)
        if found is None:
            raise HTTPException(404)
        data = await anyio.Path(full_path).read_bytes()
        headers = {"etag": f'"{sha256_hex(data)}"', "cache-control": "no-cache"}
        response = Response(data, headers=headers, media_type="application/json")
        if self.is_not_modified(response.headers, Headers(scope=scope)):
            return NotModifiedResponse(response.headers)
        return response

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        """Nothing but names of the registry's form; then Starlette's own checks."""
        if _METADATA.fullmatch(path) or _BLOB.fullmatch(path):
            return super().lookup_path(path)
        return "", None

    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        """A blob: its name is its digest and its entity tag, and it never changes."""
        headers = {"etag": f'"{Path(full_path).name}"', "cache-control": _FOREVER}
        response = FileResponse(full_path, status_code, headers, stat_result=stat_result)
        if self.is_not_modified(response.headers, Headers(scope=scope)):
            return NotModifiedResponse(response.headers)
        return response


def serve(
    folder: Path,
    host: str,
    port: int,
    *,
    access_log: bool,
    ready: Callable[[str], None],
    wait: Callable[[], object],
) -> None:
    """Serve until `wait` returns; `ready` gets the URL once requests are taken.

    Port 0 takes a free one. Raises InputRejected: no registry here, or the port is taken.
    """
    if not (folder / "metadata" / "timestamp.json").is_file():
        raise trust.no_registry(folder)
    listener = _listen(host, port)
    config = uvicorn.Config(
        RegistryFiles(directory=folder),
        log_config=_log_to_stderr() if access_log else None,
        log_level=logging.INFO if access_log else logging.WARNING,
        access_log=access_log,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        # The socket listens already: a request made now waits until the server takes it.
        ready(_url(listener))
        wait()
    finally:
        server.should_exit = True
        thread.join(_START_S)
        listener.close()


def _log_to_stderr() -> dict[str, Any]:
    """Uvicorn's own logging, but standard output is for the ready line."""
    config = deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=_family(host), backlog=128)
    except OSError as e:
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{host}:{port} cannot be listened on ({e.strerror or e})",
            "choose another --port or --host, or stop what holds it",
        ) from e


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
