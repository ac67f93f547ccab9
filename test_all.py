"""The one entry to the tests: ``pytest test_all.py`` runs all that is in tests/, one file for each module.

``pytest test_all.py::NAME`` runs the tests of that name, ``-k`` and ``-n`` work as ever: conftest.py sees to it.
"""
