"""Sends the example's test images to the device on this machine, over and over, until Ctrl-C.

A new version is on probation until it has answered enough requests; this is where they come from.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
from itertools import cycle
from pathlib import Path

try:
    import numpy as np
except ImportError as e:
    sys.exit(f"traffic: {e.name} is missing. Install the extra: pip install 'edgeward[optimizer]'")

IMAGES = Path(__file__).parent.parent / "fashion_mnist" / "test.npz"
REPORT_EVERY_S = 5.0


def ask(line: http.client.HTTPConnection, model: str, image: np.ndarray) -> str:
    """One inference; empty when it was answered, else why not."""
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, *image.shape], "data": image.ravel().tolist()}
    body = json.dumps({"inputs": [tensor]})
    try:
        line.request("POST", f"/v2/models/{model}/infer", body, {"Content-Type": "application/json"})
        answer = line.getresponse()
        told = answer.read()
    except (OSError, http.client.HTTPException) as e:
        line.close()  # the next request opens it anew
        return str(e)
    return "" if answer.status == 200 else f"{answer.status} {told.decode(errors='replace')}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="traffic.py", description=__doc__)
    parser.add_argument("--model", default="fashion", help="its name (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1:8080", help="the device (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second (default: %(default)s)")
    arguments = parser.parse_args()
    line = http.client.HTTPConnection(arguments.host, timeout=10)
    answered, failed, why, report_at = 0, 0, "", time.monotonic() + REPORT_EVERY_S
    for image in cycle(np.load(IMAGES)["image"]):
        problem = ask(line, arguments.model, image)
        answered, failed, why = answered + (not problem), failed + bool(problem), problem or why
        if time.monotonic() >= report_at:
            print(f"{answered} answered, {failed} not{f' (last: {why})' if failed else ''}", flush=True)
            answered, failed, why, report_at = 0, 0, "", time.monotonic() + REPORT_EVERY_S
        time.sleep(1.0 if problem else 1.0 / arguments.rate)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(0)
