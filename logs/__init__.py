"""The log pipeline's parts: the command line is in ingest_logs.py.

In come datagrams (RFC 5424, RFC 3164, JSON, plain text); out go rows with metadata into PostgreSQL, each once.
``intake`` reads the socket, ``parse`` makes events of a datagram, ``event_queue`` holds them, ``enrich`` asks the
metadata API, ``seal`` makes batches, ``sink`` is ``store`` as the outlet sees it, ``upkeep`` keeps the
tables; ``pipeline`` connects them in one process, ``workers`` runs several.

Never here: an intake that waits for the database or for metadata; a queue without a bound; an event that is in none
of the counts; a bad line that fails others.
"""
