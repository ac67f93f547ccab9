"""The bench: side-by-side measurements of the programs against what one would take instead, as ratios.

In goes a command (``python -m bench crawl``); out come a table, and the figures with their plot, in bench/latest/ or,
to be published, in bench/results/. A rate by itself says more about the machine than about the program, so everything
is measured next to its peers, on the same input, in one run; the runs are interleaved (A B C, B C A, ...), so that a
busy minute hits all alike; a figure is the median with the smallest and the largest beside it; what counts is the
ratio. It never happens here that traffic leaves 127.0.0.0/8, that a child or a temporary folder outlives its run
(SIGKILL excepted), or that a missing peer stops the others: it is left out, with a note. That a shared machine repeats
itself is not promised.
"""
