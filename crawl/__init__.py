"""The scraper and crawler: everything that both drivers share.

In comes a list of URLs with options; out come a row for each distinct URL, counts, and an exit code. The decisions
are pure: ``frontier`` says which URL goes next and when, ``core`` what an answer means, ``lease`` what a worker of
many may do. Around them are the HTTP clients, the command line, the journal, helper processes, and the tables of a
shared crawl.

Never here: a request that the frontier has not cleared to send; a body, wait or match without a bound; an answer that
raises instead of becoming a row; a choice between threads and tasks, which is the drivers' (crawl_threads.py,
crawl_async.py).
"""
