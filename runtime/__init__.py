"""What a program that runs on has around it, whatever it does.

In come a program's coroutine, functions, rows or batches; out come its end at a signal, their results, or the promise
that they are kept. ``shell`` leads from ``options`` to the exit code, with ``loop`` (lag, tasks, signals), ``stderr``,
``monitor`` (/metrics, /health) and ``demo``; ``processes`` is a pool that may lose workers; ``postgres`` a pool of
connections that comes back, and ``embedded`` a server for it; ``spool`` batches on disk; ``backlog`` and ``outlet`` are
the way from a bounded queue to a sink.

Never here: anything of URLs, upstreams, log lines or trades; a wait without a limit of time; a write to stderr that a
program waits for.
"""
