"""The tests: one file for each module, by its name; ``helpers/`` has what several files need.

In comes the code as it is; ``pytest test_all.py`` runs everything, ``pytest tests/test_frontier.py`` one file.
Servers are real and on loopback, clocks are fake, processes are killed for real. test_planted.py plants bugs, to see
that the tests notice.

Never here: a sleep, or a bound of time on work (a limit of 60 s only catches a hang); a network beyond loopback; an
assertion on how a sentence reads.

``absent`` comes first: it stands in for packages that are not there, also in the processes that tests start.
"""

from tests import absent as absent
