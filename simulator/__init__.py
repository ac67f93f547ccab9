"""Whole crawls under a simulated clock, and who checks them: ``python -m bench simulate``.

In comes a seed; out comes how long the crawl took, by its own clock, or ``checker.Broken`` at the first step that
broke a promise. ``crawls`` plays the crawlers' own ``Frontier`` with made-up pages and workers, ``shared_crawls``
many workers' ``SharedFrontier`` over a model of the tables; ``checker`` keeps books of its own and never looks
inside.

Never here: a real clock, socket, thread or process; randomness that is not the seed's; a second version of a
decision.
"""
