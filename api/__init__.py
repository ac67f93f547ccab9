"""The aggregation API's parts: its routes, start and end are in aggregate_app.py.

In come the configured upstreams and checked parameters; out comes for each source its data, older data, a fallback or
a named error, with its age. ``upstreams`` is the way of a call to one; ``aggregate`` and ``pages`` answer requests,
``middleware`` sees each of them first; ``service`` is one running API, ``bus`` its news for others; ``history`` keeps
results in PostgreSQL; ``telemetry`` and ``report`` say what happened; ``openapi`` describes the routes; ``check`` tries
a configuration.

Never here: a call that blocks the event loop; two calls for one key at a time; a client's text that becomes part of a
host or path; an upstream's error text that reaches a client.
"""
