"""The inference process: opens sockets, loads what the disk names, serves, drains, ends. It only composes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time

from edge_agent import sdnotify
from edge_agent.config import Config
from edge_agent.layout import Layout
from edge_agent.serving import deadman, sockets
from edge_agent.serving.admission import Workers
from edge_agent.serving.http import App, Service
from edge_agent.serving.models import ModelSet
from edge_agent.serving.uvicorn_server import Server

_HEARTBEAT_S = 5.0
_EXIT_STUCK = 70

_log = logging.getLogger("edge_agent.serving")


def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests under way and return.

    Raises InputRejected or StorageFault when the sockets cannot be opened.
    """
    _configure_logging()
    listeners = sockets.open_all(config)
    sockets.forget_inherited()
    try:
        busy = asyncio.run(_serve(config, listeners))
    finally:
        listeners.remove_own()
    if busy:
        # A thread is in a run or a load that does not end; joining it would hang this process for ever.
        _log.error("ending although a model's code is still running")
        logging.shutdown()
        os._exit(0)


async def _serve(config: Config, listeners: sockets.Listeners) -> bool:
    """Returns whether a thread is still busy at the end."""
    begun_s = time.monotonic()
    service = Service(
        config.serving,
        ModelSet(Layout(config), config.serving),
        Workers(config.serving.workers, config.serving.max_queue),
        os.getpid(),
        int(time.time() * 1000),
    )
    stop = asyncio.Event()

    def told_to_stop() -> None:
        sdnotify.notify(sdnotify.STOPPING)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told_to_stop)
    if await _load_all(service, stop):
        await _serve_until(stop, service, listeners, begun_s)
    service.workers.close()
    service.models.close()
    _log.info("stopped")
    return service.models.busy or not service.workers.idle()


async def _load_all(service: Service, stop: asyncio.Event) -> bool:
    """Load every model; False when the process is told to stop meanwhile."""
    loading = asyncio.create_task(service.models.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not loading.done():
        loading.cancel()
        await asyncio.wait((loading,))
        return False
    await loading
    return True


async def _serve_until(
    stop: asyncio.Event, service: Service, listeners: sockets.Listeners, begun_s: float
) -> None:
    drain_s = service.config.drain_timeout_s
    servers = {
        Server(App(service, control=False), drain_s): listeners.clients,
        Server(App(service, control=True), drain_s): listeners.control,
    }
    running = [asyncio.create_task(server.run_on(given)) for server, given in servers.items()]
    for server in servers:
        await server.listening.wait()
    heartbeat = asyncio.create_task(_heartbeat(service))
    took_ms = (time.monotonic() - begun_s) * 1000
    _log.info("listening on %s after %.0f ms", listeners.describe(), took_ms)
    sdnotify.notify(sdnotify.READY)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((stopping, *running), return_when=asyncio.FIRST_COMPLETED)
    service.stopping = True
    for server in servers:
        server.stop()
    await asyncio.gather(*running)
    heartbeat.cancel()
    deadman.rest()
    stopping.cancel()


async def _heartbeat(service: Service) -> None:
    """Tell the watchdog that this loop turns and that not every worker hangs.

    Off systemd it is its own watchdog: a process that serves nobody, because its workers all hang or a run
    holds the interpreter, ends and is started again.
    """
    watched_s = sdnotify.watchdog_s()
    period_s = watched_s / 2 if watched_s else _HEARTBEAT_S
    limit_s = 2 * service.config.request_timeout_s
    while True:
        deadman.alive(max(limit_s, 2 * period_s))
        if service.workers.stuck(limit_s):
            _log.error(
                "every worker has been in one run for more than %g s: ending, to be restarted", limit_s
            )
            logging.shutdown()
            os._exit(_EXIT_STUCK)
        sdnotify.notify(sdnotify.WATCHDOG)
        await asyncio.sleep(period_s)


def _configure_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # Its warnings are about clients' mistakes, which clients are told, not the log.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
