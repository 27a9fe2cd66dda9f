"""Pages of our own with their texts, a gold set of what news articles seldom have: lists, tables, code, definitions."""

from __future__ import annotations

from html import escape

AROUND = ("article", "main", "div")  # the element that the text lies in
_MENU = '<ul><li><a href="/">Home page</a></li><li><a href="/about">About us</a></li></ul>'
_FISH = ("mackerel", "herring", "cod", "plaice")
_CODE = "def tide(hour):\n    if hour < 6:\n        return 'low'\n    return 'high'"
KINDS: dict[str, tuple[str, str]] = {  # HTML and its text
    "sentences": (
        "<ul>" + "".join(f"<li>The boat for {f} leaves the quay before dawn.</li>" for f in _FISH) + "</ul>",
        "\n".join(f"The boat for {f} leaves the quay before dawn." for f in _FISH),
    ),
    "short items": ("<ul>" + "".join(f"<li>{f}</li>" for f in _FISH) + "</ul>", "\n".join(_FISH)),
    "steps": (
        "<ol>" + "".join(f"<li>Tie the {r} rope to the ring on the wall.</li>" for r in ("bow", "stern")) + "</ol>",
        "\n".join(f"Tie the {r} rope to the ring on the wall." for r in ("bow", "stern")),
    ),
    "links": (
        "<ul>" + "".join(f'<li><a href="/{f}">how {f} was fished here</a></li>' for f in _FISH) + "</ul>",
        "\n".join(f"how {f} was fished here" for f in _FISH),
    ),
    "table": (
        "<table>" + "".join(f"<tr><th>{f}</th><td>{n} kg landed</td></tr>" for n, f in enumerate(_FISH)) + "</table>",
        "\n".join(f"{f} {n} kg landed" for n, f in enumerate(_FISH)),
    ),
    "code": (f"<pre><code>{escape(_CODE)}</code></pre>", _CODE),
    "definitions": (
        "<dl><dt>quay</dt><dd>A wall where boats are tied.</dd><dt>buoy</dt><dd>A float in the channel.</dd></dl>",
        "quay\nA wall where boats are tied.\nbuoy\nA float in the channel.",
    ),
}


def own_pages() -> dict[tuple[str, str], tuple[bytes, str]]:
    """(HTML, its text) by kind of content and by the element around it."""
    prose = [
        f"The harbour of town {n} is built of stone, and it has kept the fishing boats safe in every winter since "
        "then, as the people who live beside it like to tell."
        for n in range(4)
    ]
    made = {}
    for around in AROUND:
        for kind, (html, text) in KINDS.items():
            before, after = ("".join(f"<p>{p}</p>" for p in part) for part in (prose[:2], prose[2:]))
            inside = f"<{around}><h1>The harbour</h1>{before}{html}{after}</{around}>"
            page = f"<html><body><nav>{_MENU}</nav>{inside}<footer>{_MENU}</footer></body></html>"
            made[kind, around] = page.encode(), "\n".join(["The harbour", *prose[:2], text, *prose[2:]])
    return made
