"""HTTP for the children: one way to the registry for metadata and blobs, with its TLS, proxy and token.

urllib3 underneath; its exceptions do not leave this file. It follows redirects and asks once: what is
tried again, resumed or believed is decided elsewhere.

Redirects: within the registry's own origin with its credentials; to any other `https` without them (no
token, no client certificate); to `http` elsewhere never. What comes is checked by digest in any case.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import SplitResult, urljoin, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError, LocationValueError
from urllib3.util import Timeout, make_headers

from edge_agent.config import Registry
from edge_agent.update.network_faults import described
from edge_agent.update.watchdog import Watchdog
from edge_agent.update.watched import watched
from edge_contract.errors import Reason, StorageFault, TransferFailed

Response = urllib3.BaseHTTPResponse
_CHUNK_BYTES = 64 << 10
_REDIRECTS = 5
_MOVED = frozenset({301, 302, 303, 307, 308})
_PORTS = {"http": 80, "https": 443}
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_NEVER_S = float("inf")


class Streams(Protocol):
    """Something that gives bodies by URL: a registry, or a copy of one."""

    def stream(self, url: str) -> Iterator[bytes]:
        """The body, piece by piece. Raises TransferFailed; `HttpStatus` for what is refused or not there."""


class Client:
    """GET, for one registry. Used by one thread."""

    def __init__(self, registry: Registry) -> None:
        """Raises TransferFailed when the token or a TLS file cannot be used: it may be mended any time."""
        self.base = registry.url.rstrip("/")
        self._registry = registry
        self._origin = _origin(urlsplit(self.base))
        self._token = _token(registry)
        self._pools: dict[tuple[str, bool], urllib3.PoolManager] = {}
        self._watchdog = Watchdog()
        self._pool(self.base, own=True)  # a certificate that cannot be read is told now

    def get(self, url: str, headers: Mapping[str, str], ends_s: float = _NEVER_S) -> Response:
        """The answer after redirects, whatever its status, with its body unread. Raises TransferFailed.

        Status line and headers of each have `timeout_s` and `low_speed_s`, and until `ends_s` (monotonic).
        To be read by `read` within `reading`.
        """
        try:
            return self._get(url, headers, ends_s)
        except BaseException:
            self._watchdog.release()
            raise

    def _get(self, url: str, headers: Mapping[str, str], ends_s: float) -> Response:
        begun = url
        for _ in range(_REDIRECTS + 1):
            response = self._ask(url, headers, ends_s)
            target = response.headers.get("Location", "")
            if response.status not in _MOVED or not target:
                return response
            response.close()
            url = self._follow(url, target)
        raise TransferFailed(
            Reason.REGISTRY_UNREACHABLE,
            f"{shown(begun)} leads through more than {_REDIRECTS} redirects",
            "correct the web server or the proxy, or name the last address in [registry] url",
        )

    def stream(self, url: str) -> Iterator[bytes]:
        """The body of a 200, piece by piece, as it was sent. Raises TransferFailed; `HttpStatus` for others.

        For small files, which are not resumed.
        """
        response = self.get(url, {"Accept-Encoding": "identity"})
        with self.reading(url, response):
            if response.status != 200:
                raise HttpStatus(url, response.status)
            while chunk := self.read(url, response):
                yield chunk

    @contextmanager
    def reading(self, url: str, response: Response) -> Iterator[None]:
        """While the body is read: translates what breaks; keeps a connection that was read to its end."""
        try:
            with _closing(url, response):
                yield
        finally:
            self._watchdog.release()

    def read(self, url: str, response: Response, ends_s: float = _NEVER_S) -> bytes:
        """What has come of the body, waiting for the first byte of it; empty at its end.

        Raises TransferFailed when it takes as long as headers may.
        """
        self._watchdog.until(self._patience_s(ends_s))
        try:
            chunk = response.read1(_CHUNK_BYTES, decode_content=False)
        except HTTPError as e:
            if self._watchdog.bitten:
                raise _dripping(url) from e
            raise
        self._watchdog.rest()
        if self._watchdog.bitten:
            raise _dripping(url)
        return chunk

    def _patience_s(self, ends_s: float) -> float:
        return min(ends_s, time.monotonic() + self._registry.timeout_s + self._registry.low_speed_s)

    def _ask(self, url: str, headers: Mapping[str, str], ends_s: float) -> Response:
        own = _origin(urlsplit(url)) == self._origin
        credentials = {"Authorization": f"Bearer {self._token}"} if own and self._token else {}
        pool = self._pool(url, own=own)
        try:
            self._watchdog.begin(self._patience_s(ends_s))
        except RuntimeError as e:  # Python's word for "too many tasks"
            raise StorageFault(
                Reason.STORAGE_FAULT, f"no thread can be made now: {e}", "free memory or raise TasksMax"
            ) from e
        try:
            response = pool.request(
                "GET", url, headers={**headers, **credentials}, preload_content=False, redirect=False
            )
        except (HTTPError, ValueError) as e:  # a name with an empty label is a UnicodeError
            raise _dripping(url) if self._watchdog.bitten else unreachable(url, e) from e
        self._watchdog.rest()
        if self._watchdog.bitten:  # cut off, headers look whole
            response.close()
            raise _dripping(url)
        return response

    def _follow(self, source: str, location: str) -> str:
        try:
            target = urljoin(source, location)
            parts = urlsplit(target)
            origin = _origin(parts)
        except ValueError as e:
            raise TransferFailed(
                Reason.REGISTRY_UNREACHABLE,
                f"{shown(source)} redirects to what is no address ({e})",
                "correct the redirects of the registry's web server or of what stands before it",
            ) from e
        if parts.scheme == "https" or origin == _origin(urlsplit(source)):
            return target
        raise TransferFailed(
            Reason.REGISTRY_UNREACHABLE,
            f"{shown(source)} redirects to {shown(target)}, which is not followed",
            "a login page of the network looks like this; else let the web server redirect to https only",
        )

    def _pool(self, url: str, *, own: bool) -> urllib3.PoolManager:
        proxy = proxy_of(url)
        pool = self._pools.get((proxy, own))
        if pool is None:
            pool = self._pools[(proxy, own)] = self._make_pool(url, proxy, own=own)
        return pool

    def _make_pool(self, url: str, proxy: str, *, own: bool) -> urllib3.PoolManager:
        timeout = Timeout(connect=self._registry.timeout_s, read=self._registry.timeout_s)
        plain = urlsplit(url).scheme == "http" and not self._registry.tls_ca + self._registry.tls_cert
        context = None if plain else _tls(self._registry, own=own)  # reading all authorities takes its time
        if not proxy:
            direct = urllib3.PoolManager(timeout=timeout, retries=False, ssl_context=context)
            return watched(direct, self._watchdog)
        parts = urlsplit(proxy)
        login = f"{parts.username}:{parts.password or ''}" if parts.username else None
        try:
            through = urllib3.ProxyManager(
                parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(),
                proxy_headers=make_headers(proxy_basic_auth=login),
                proxy_ssl_context=_tls(self._registry, own=False) if parts.scheme == "https" else None,
                timeout=timeout,
                retries=False,
                ssl_context=context,
            )
        except (LocationValueError, ValueError) as e:
            raise unreachable(url, e) from e
        return watched(through, self._watchdog)


class HttpStatus(TransferFailed):
    """An answer with another status than 200."""

    def __init__(self, url: str, status: int) -> None:
        super().__init__(
            Reason.REGISTRY_UNREACHABLE,
            f"{shown(url)} answered {status}",
            "check the registry's URL, and what its web server logs",
        )
        self.status = status


@contextmanager
def _closing(url: str, response: Response) -> Iterator[None]:
    try:
        yield
    except HTTPError as e:
        response.close()
        raise unreachable(url, e) from e
    except BaseException:
        response.close()
        raise
    response.release_conn()


def _dripping(url: str) -> TransferFailed:
    return TransferFailed(
        Reason.REGISTRY_UNREACHABLE,
        f"{shown(url)} cannot be fetched: the answer comes too slowly to be one",
        "the device tries again by itself; check the registry and the network, or raise [registry] timeout_s",
    )


def unreachable(url: str, error: Exception) -> TransferFailed:
    """A network's fault by its name."""
    what, next_step = described(error)
    proxy = shown(proxy_of(url))
    through = f" through the proxy {proxy}" if proxy else ""
    return TransferFailed(
        Reason.REGISTRY_UNREACHABLE, f"{shown(url)} cannot be fetched{through}: {what}", next_step
    )


def proxy_of(url: str) -> str:
    """The proxy that the environment names for `url`, or empty.

    `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, in either case of letters, as curl reads them.
    """
    parts = urlsplit(url)
    proxies = getproxies_environment()
    found = proxies.get(parts.scheme) or proxies.get("all") or ""
    if not found or proxy_bypass(parts.netloc.rpartition("@")[2], proxies):
        return ""
    return found if "://" in found else f"http://{found}"


def _tls(registry: Registry, *, own: bool) -> ssl.SSLContext:
    """The system's authorities, or those of `tls_ca`; our certificate for our registry alone."""
    try:
        context = ssl.create_default_context(cafile=registry.tls_ca or None)
        if own and registry.tls_cert:
            context.load_cert_chain(registry.tls_cert, registry.tls_key or None, password="")
    except (OSError, ValueError) as e:  # an SSLError is an OSError
        named = ", ".join(f for f in (registry.tls_ca, registry.tls_cert, registry.tls_key) if f)
        raise TransferFailed(
            Reason.BAD_CONFIG,
            f"the TLS files of [registry] cannot be used ({named}): {e}",
            "put PEM files there that this user can read, the key without a password",
        ) from e
    return context


def _token(registry: Registry) -> str:
    if not registry.token_file:
        return ""
    parts = urlsplit(registry.url)
    problem = ""
    try:
        token = Path(registry.token_file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeError) as e:
        problem = str(e)
    else:
        if not token or any(not sign.isprintable() or sign.isspace() for sign in token):
            problem = "it must hold one line, the token alone"
        elif parts.scheme != "https" and parts.hostname not in _LOOPBACK:
            problem = "it would travel readable: the registry's URL is not https"
    if problem:
        raise TransferFailed(
            Reason.BAD_CONFIG,
            f"the token in {registry.token_file} cannot be used: {problem}",
            "correct the file or [registry] url and token_file",
        )
    return token


def _origin(parts: SplitResult) -> tuple[str, str, int]:
    return parts.scheme, parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0)


def shown(url: str) -> str:
    """A URL for people: without what may be secret in it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
