"""What a second look at ingest_logs found."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import ingest_logs
import log_pipeline
import log_spool
import log_store
import log_workers
from log_pipeline import Ingester
from log_workers import Snapshot, Supervisor
from sandbox_logs import MetadataApi
from test_all import (  # noqa: F401  -- fixtures among them
    LOGS_STORE_NOON,
    PgServer,
    logs_ingest_files,
    logs_ingest_main,
    logs_ingest_pg,
    logs_ingest_process,
    logs_ingest_serials,
    logs_ingest_up,
    logs_pg,
    logs_spool_batch,
    logs_store_batch,
    logs_store_event,
    logs_store_open,
    pg,
    prim_run,
    prim_until,
    prim_until_async,
)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://logs:se?cret@127.0.0.1/logs",
        "postgresql://logs:se/cret@127.0.0.1/logs",
        "postgresql://logs:se#cret@127.0.0.1/logs",
        "postgresql://logs:se[cret@127.0.0.1/logs",
        "postgresql://logs:se\u2100cret@127.0.0.1/logs",
        "postgresql://logs@127.0.0.1:cret/logs",
        "",
        "postgresql://",
    ],
)
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_logs_review_a_database_url_that_cannot_be_read_is_refused_without_showing_it(
    url: str, by: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", url if by == "environment" else "")
    arguments = ("--database", url) if by == "argument" else ()
    assert logs_ingest_main("--listen", "127.0.0.1:0", *arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "error: --database: " in said or (by == "environment" and not url and "error: where to?" in said)
    assert "cret" not in said


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://h",
        "postgres://u@h/d",
        "postgresql://u:p%2Fq@h:5432/d?sslmode=require&application_name=x",
        "postgresql://u:p@one:5432,two:5433,[::1]:5434/d",
        "postgresql://u:p@q@h/d",
        "postgresql://postgres:@/postgres?host=/tmp/a%20b&port=5432",
        "postgresql://%2Fvar%2Frun/d",
        "postgresql:///d",
    ],
)
def test_logs_review_a_database_url_that_can_be_read_is_taken(url: str) -> None:
    ingest_logs.check_database(url)
