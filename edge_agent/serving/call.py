"""One inference call: decoded, run, encoded and counted in a worker's thread."""

from __future__ import annotations

import time

from edge_agent.serving.codec import Encoded
from edge_agent.serving.decode import decode
from edge_agent.serving.encode import encode
from edge_agent.serving.version import Version
from edge_contract.errors import Reason, RequestRejected


class Call:
    """Run by a worker; `gave_up` is called on the event loop when nobody waits any more.

    A call is counted once: by the worker, or by `gave_up` when its deadline passed.
    """

    def __init__(self, version: Version, body: bytes, header_length: int | None) -> None:
        self._version = version
        self._body = body
        self._header_length = header_length
        self._begun_s = time.perf_counter()
        self._expired = False

    def __call__(self) -> Encoded:
        """The encoded answer. Raises RequestRejected."""
        manifest, counters = self._version.manifest, self._version.counters
        request = decode(self._body, self._header_length, manifest.inputs, manifest.outputs)
        try:
            results = self._version.model.run(request.inputs)
            encoded = encode(manifest.name, manifest.version, request, results, manifest.outputs)
        except RequestRejected as e:
            # A 4xx is the request's own fault here too: FP16 wanted as JSON, text that is not UTF-8.
            if e.status >= 500:
                self._failed(e.reason)
            raise
        except Exception:
            self._failed(Reason.INFERENCE_FAILED)
            raise
        if not self._expired:
            counters.answered(self._elapsed_ms(), results)
        return encoded

    def gave_up(self, reason: Reason) -> None:
        """The caller was refused. A deadline that passed counts against the version, an overload does not."""
        if reason is Reason.DEADLINE_EXCEEDED:
            self._failed(reason)
            self._expired = True

    def _failed(self, reason: Reason) -> None:
        if not self._expired:
            self._version.counters.failed(self._elapsed_ms(), reason)

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self._begun_s) * 1000
