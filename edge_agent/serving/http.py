"""The routes: Open Inference Protocol v2 and its repository extension, metrics, statistics. Raw ASGI.

One `App` per side: clients may infer and look; only the control socket may load, unload and read
statistics. No framework: on small requests it would cost more than the model.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_agent.config import Serving
from edge_agent.serving import metrics, rusage
from edge_agent.serving.admission import Workers
from edge_agent.serving.call import Call
from edge_agent.serving.models import ModelSet
from edge_agent.serving.version import Version
from edge_agent.serving.web import (
    ClientGone,
    Receive,
    Request,
    Response,
    Scope,
    Send,
    decode,
    error_response,
    json_response,
    send_response,
)
from edge_agent.stats import ServingStats
from edge_contract.console import distribution_version
from edge_contract.errors import EdgewardError, Reason, RequestRejected
from edge_contract.manifest import Digest

HEADER_LENGTH = "inference-header-content-length"
_BINARY = "application/octet-stream"
_PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tflite": "tflite_flatbuffer"}
_SMALL_BODY_BYTES = 64 << 10

_log = logging.getLogger("edge_agent.serving")


@dataclass(slots=True)
class Service:
    """What the two apps share."""

    config: Serving
    models: ModelSet
    workers: Workers
    pid: int
    started_ms: int
    rejected: Counter[Reason] = field(default_factory=Counter)
    stopping: bool = False


Names = Mapping[str, str]
Handler = Callable[[Service, Request, Names], Awaitable[Response]]


class Route(NamedTuple):
    """A path, the method it takes, who handles it, and whether only the control socket may."""

    path: re.Pattern[str]
    method: str
    handler: Handler
    control: bool = False


class App:
    """An ASGI application over a `Service`. Every request gets an answer; every error is JSON."""

    def __init__(self, service: Service, *, control: bool) -> None:
        self._service = service
        self._control = control

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        request = Request(scope, receive, self._service.config.request_timeout_s)
        try:
            response = await self._answer(request)
        except ClientGone:
            return
        await send_response(send, response)

    async def _answer(self, request: Request) -> Response:
        try:
            route, names = self._route(request.scope["method"], request.scope["path"])
            return await route.handler(self._service, request, names)
        except EdgewardError as e:
            return self._refuse(e)
        except ClientGone:
            raise
        except Exception as e:  # noqa: BLE001 - the outermost one: a client gets an answer, whatever it is
            # A mistake in this program: one line for the log, nothing of it for the client.
            where = traceback.extract_tb(e.__traceback__)[-1]
            _log.error("%s: %r at %s:%s", request.scope["path"], e, Path(where.filename).name, where.lineno)
            return self._refuse(
                RequestRejected(
                    500,
                    Reason.INFERENCE_FAILED,
                    "the inference process made a mistake on this request",
                    "see its log, and report it",
                )
            )

    def _refuse(self, error: EdgewardError) -> Response:
        self._service.rejected[error.reason] += 1
        return error_response(error)

    def _route(self, method: str, path: str) -> tuple[Route, Names]:
        allowed = []
        for route in _ROUTES:
            match = route.path.fullmatch(path)
            if match is None:
                continue
            if method == route.method or (method == "HEAD" and route.method == "GET"):
                if route.control and not self._control:
                    raise RequestRejected(
                        403,
                        Reason.NOT_ALLOWED,
                        f"{path} is for this device's control process alone",
                        "change what the device serves with edge-fleet deploy",
                    )
                return route, {k: v for k, v in match.groupdict().items() if v is not None}
            allowed.append(route.method)
        if allowed:
            raise RequestRejected(
                405, Reason.NOT_ALLOWED, f"{path} does not take {method}", f"use {' or '.join(allowed)}"
            )
        raise RequestRejected(
            404,
            Reason.NOT_FOUND,
            f"there is nothing at {path}",
            "use the paths of the Open Inference Protocol",
        )


async def _server_metadata(_service: Service, _request: Request, _names: Names) -> Response:
    extensions = ["binary_tensor_data", "model_repository"]
    return json_response({"name": "edgeward", "version": distribution_version(), "extensions": extensions})


async def _live(_service: Service, _request: Request, _names: Names) -> Response:
    return json_response({"live": True})


async def _ready(service: Service, _request: Request, _names: Names) -> Response:
    if service.stopping or not service.models.ready():
        raise RequestRejected(
            503,
            Reason.MODEL_NOT_READY,
            "not every model is ready",
            "POST /v2/repository/index says which one, and why",
        )
    return json_response({"ready": True})


async def _metrics(service: Service, _request: Request, _names: Names) -> Response:
    text = metrics.render(
        service.models.counters(),
        rejected=service.rejected,
        waiting=service.workers.waiting,
        running=service.workers.running,
        started_ms=service.started_ms,
    )
    return Response(200, text.encode(), metrics.CONTENT_TYPE)


async def _stats(service: Service, _request: Request, _names: Names) -> Response:
    versions = [counters.snapshot() for counters, _ in service.models.counters()]
    return json_response(ServingStats(service.pid, service.started_ms, versions, rusage.private_bytes()))


async def _model_metadata(service: Service, _request: Request, names: Names) -> Response:
    manifest = _find(service, names).manifest
    return json_response(
        {
            "name": manifest.name,
            "versions": [manifest.version],
            "platform": _PLATFORMS[manifest.runtime],
            "inputs": manifest.inputs,
            "outputs": manifest.outputs,
        }
    )


async def _model_ready(service: Service, _request: Request, names: Names) -> Response:
    return json_response({"name": _find(service, names).manifest.name, "ready": True})


async def _infer(service: Service, request: Request, names: Names) -> Response:
    body = await request.body(service.config.max_body_bytes)
    header_length = _header_length(request)
    version = service.models.pin(names["name"], names.get("version"))
    call = Call(version, body, header_length)
    try:
        encoded = await service.workers.run(call, version.release, service.config.request_timeout_s)
    except RequestRejected as e:
        call.gave_up(e.reason)
        raise
    if encoded.header_length is None:
        return Response(200, encoded.body)
    return Response(200, encoded.body, _BINARY, ((HEADER_LENGTH, str(encoded.header_length)),))


class _IndexBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ready: bool = False


class _LoadParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    digest: Digest | None = None
    original: bool = False  # not from its prepared form, which may have decayed on the disk


class _LoadBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    parameters: _LoadParameters = _LoadParameters()


class _UnloadParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    unload_dependents: bool = False  # the protocol's; no model here has dependents


class _UnloadBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    parameters: _UnloadParameters = _UnloadParameters()


async def _index(service: Service, request: Request, _names: Names) -> Response:
    wanted = decode(await request.body(_SMALL_BODY_BYTES), _IndexBody)
    return json_response([e for e in service.models.index() if e["state"] == "READY" or not wanted.ready])


async def _load(service: Service, request: Request, names: Names) -> Response:
    wanted = decode(await request.body(_SMALL_BODY_BYTES), _LoadBody)
    parameters = wanted.parameters
    version = await service.models.load(names["name"], parameters.digest, original=parameters.original)
    manifest = version.manifest
    return json_response({"name": manifest.name, "version": manifest.version, "digest": version.digest})


async def _unload(service: Service, request: Request, names: Names) -> Response:
    decode(await request.body(_SMALL_BODY_BYTES), _UnloadBody)
    await service.models.unload(names["name"])
    return json_response({})


def _find(service: Service, names: Names) -> Version:
    return service.models.find(names["name"], names.get("version"))


def _header_length(request: Request) -> int | None:
    text = request.header(HEADER_LENGTH)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise RequestRejected(
            400,
            Reason.BAD_INPUT,
            "Inference-Header-Content-Length is not a number",
            "set it to the length of the JSON part in bytes",
        )
    return int(text)


def _route(method: str, path: str, handler: Handler, *, control: bool = False) -> Route:
    pattern = path.replace("{model}", r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?")
    return Route(re.compile(pattern), method, handler, control)


_REPOSITORY_MODEL = r"/v2/repository/models/(?P<name>[^/]+)"
_ROUTES = (
    _route("POST", "{model}/infer", _infer),
    _route("GET", "{model}/ready", _model_ready),
    _route("GET", "{model}", _model_metadata),
    _route("GET", "/v2/?", _server_metadata),
    _route("GET", "/v2/health/live", _live),
    _route("GET", "/v2/health/ready", _ready),
    _route("GET", "/metrics", _metrics),
    _route("POST", "/v2/repository/index", _index),
    _route("POST", _REPOSITORY_MODEL + "/load", _load, control=True),
    _route("POST", _REPOSITORY_MODEL + "/unload", _unload, control=True),
    _route("GET", "/edgeward/v1/stats", _stats, control=True),
)
