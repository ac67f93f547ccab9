"""The log pipeline's parts: its command line and its demo are in ingest_logs.py.

In come datagrams (RFC 5424, RFC 3164, JSON, plain text); out go rows with metadata into PostgreSQL, each once.
``parse`` makes events of a datagram, ``intake`` reads the socket, ``enrich`` asks the metadata API, ``store`` writes
batches, ``pipeline`` connects them in one process, ``workers`` runs several.

Never here: an intake that waits for the database or for metadata; a queue without a bound; an event that is in none
of the counts; a bad line that fails others.
"""
