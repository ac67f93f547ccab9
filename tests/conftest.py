"""Settings that hold for every test."""

from __future__ import annotations

import asyncio
import asyncio.constants
import logging
import signal
from collections.abc import Iterator

import aiohttp.connector
import pytest
from hypothesis import HealthCheck, settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

aiohttp.connector.DefaultResolver = aiohttp.ThreadedResolver  # type: ignore[attr-defined]  # c-ares closes sockets later

asyncio.constants.DEBUG_STACK_DEPTH = 1  # type: ignore[misc]  # of ten each, loops in debug mode take a third longer

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


LOGGERS = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error", "uvicorn.access")]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A program that ran inside of a test has left its own, of signals and of log lines; a server that runs over many
    tests keeps the lines to itself."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    logs = [(logger.level, logger.propagate, logger.handlers[:]) for logger in LOGGERS]
    for logger in LOGGERS:
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    for logger, (level, propagate, writers) in zip(LOGGERS, logs, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers[:] = propagate, writers
