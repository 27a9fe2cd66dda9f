"""Links to web pages, and the polite fetcher that archives the pages.

In: Reddit's submissions. Out: links that people voted for, and WARC files of their pages. Start with `fetch.py`; the
crawl of one task is in `crawl.py`, the choice of links in `links.py`.
"""
