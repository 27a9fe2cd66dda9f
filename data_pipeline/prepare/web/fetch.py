"""Links -> the pages they lead to, in WARC files, fetched politely (crawl.py).

Hosts are divided among the tasks by their registrable domain, so that no two tasks send requests to the same one, but
for redirects, which the task follows that meets them. State: about 150 bytes for each link of the task, and a few times
fetch.page_mib for each connection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from conf.errors import UserError, of_nature
from data_pipeline.corpus.report import Report
from data_pipeline.prepare.recipe_config import FetchPagesConfig
from data_pipeline.prepare.web import robots
from data_pipeline.prepare.web.crawl import Crawl
from data_pipeline.prepare.web.links import key_of, read_links
from data_pipeline.prepare.web.page_archive import open_archive
from data_pipeline.prepare.web.urls import normalize


def fetch(links: Path, out: Path, task: int, tasks: int, cfg: FetchPagesConfig) -> Report:
    """Fetch this task's share of the links (links.write_links) into the WARC file of the task, or continue that file.

    Returns:
        The outcomes of all links; `given` are the pages with their bytes.

    Raises:
        UserError: the agent has no name, `out` is of another number of tasks, or its file is held, damaged or cannot
            be written.
    """
    robots.token(cfg.agent)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"pages-{task:05d}-of-{tasks:05d}.warc.gz"
    if other := [p.name for p in out.glob("pages-*.warc.gz") if not p.name.endswith(f"-of-{tasks:05d}.warc.gz")]:
        raise UserError(f"{out}: holds {other[0]}, but fetch.files={tasks}: give the number that it was begun with")
    about = {"software": "gradus", "http-header-user-agent": cfg.agent, "task": task, "tasks": tasks}
    try:
        with open_archive(path, about, int(cfg.page_mib * (1 << 20)) + (8 << 20)) as (archive, verdicts):
            crawl = Crawl(cfg, archive)
            done = set()
            for verdict in verdicts:
                if "link" in verdict:
                    crawl.count(verdict)
                    done.add(key_of(verdict["link"]))
            for link in read_links(links):
                url = normalize(link.url)
                if url and task_of(url.host, tasks) == task and url.key not in done:
                    crawl.add(link.url, url.host)
            crawl.run(f"pages {task}")
            return crawl.report
    except OSError as e:
        raise of_nature(
            e, f"{path}: {e.strerror or e}: fix it and run the same command again, no page is lost"
        ) from None


@lru_cache(1 << 16)
def task_of(host: str, tasks: int) -> int:
    """One task for all hosts of a registrable domain, by the list that tldextract carries: none is downloaded."""
    parts = _suffixes()(host)
    domain = f"{parts.domain}.{parts.suffix}" if parts.suffix else host
    return int.from_bytes(hashlib.blake2b(domain.encode(), digest_size=8).digest(), "little") % tasks


@lru_cache(1)
def _suffixes() -> Callable[[str], Any]:
    import tldextract

    return tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
