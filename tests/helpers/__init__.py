"""What several test files need: loaded as pytest plugins by the conftest.py at the top, so fixtures need no import.

``base`` has patience and the fake clock; ``crawl``, ``api``, ``logs``, ``market``, ``mechanisms`` and ``postgres``
are for the tests of their room; ``processes`` for those of process pools; ``lock_order`` records in which order locks
are taken.

Never here: a test; a wait without a limit; what only one file needs.
"""
