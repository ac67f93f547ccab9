"""The tests: one file for each module, by its name. test_all.py is the entry.

``absent`` comes first: it stands in for packages that are not there, also in the processes that tests start.
"""

from tests import absent as absent
