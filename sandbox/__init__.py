"""Simulated peers on loopback, for demos, tests and measurements: ``python -m sandbox --help``.

In come a seed and what shall go wrong; out come sites with 90 ways to misbehave (``sites``, ``faults``), upstream
APIs, services that log and their metadata API (``logs``), exchanges (``exchanges``, ``markets``) and a Kafka broker
(``broker``). Each says what it sent, so that a client's counts can be held against it.

Never here: an import of the programs or their rooms, for a misreading would be made twice; an address outside of
127.0.0.0/8; a socket, thread or task that is left after ``stop()``.
"""
