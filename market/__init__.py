"""The market pipeline's parts: the command line is in market_pipeline.py.

In come the exchanges' WebSocket frames; out go trades in one form, their rolling figures and dead letters, into
Kafka. ``trade``, ``adapter``, ``feeds`` and ``stats`` are pure: a frame's meaning, and the figures. ``connect`` keeps
a connection, ``kafka`` publishes (by a ``producer``), ``consumers`` read, ``workers`` computes in processes; ``flow``,
``analyse`` and ``replay`` are the three ways through the program.

Never here: a trade dropped for want of room; a gap or repetition that is patched instead of labelled; a frame passed
over in silence; a figure computed in the event loop.
"""
