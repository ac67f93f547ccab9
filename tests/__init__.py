"""The tests: one file for each module, by its name. test_all.py is the entry."""
