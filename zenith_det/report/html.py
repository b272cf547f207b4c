"""Pages that hold all they need: one HTML file, no network, no script.

Text is escaped here and nowhere else: what goes in is plain text, but for :class:`Html`.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zenith_det import opencv as cv2
from zenith_det.files import write_whole
from zenith_det.report.figures import Picture
from zenith_det.report.pictures import ByteImage


class Html(str):
    """Text that is HTML already."""


#: Follows the reader's light or dark setting; prints black on white; figures and tables side by side where
#: there is room, tables scroll sideways where there isn't.
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #595959; --paper: #ffffff; --panel: #f5f6f8;
  --line: #d5d8dd; --accent: #0b66a8; --good: #00694c; --bad: #a84300; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9e9e9; --soft: #b0b4ba; --paper: #16181c;
  --panel: #202329; --line: #3b4048; --accent: #6cb8ec; --good: #4fd3a6; --bad: #ff9d5c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 20px 16px 60px; overflow-x: clip; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0.3em 0 0.2em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2em 0 0.5em; padding-top: 0.6em; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4em 0 0.4em; }
p, li { max-width: 78ch; }
a { color: var(--accent); }
nav { margin: 0.8em 0; font-size: 0.92rem; }
nav a { margin-right: 1em; white-space: nowrap; }
.soft, figcaption, caption { color: var(--soft); font-size: 0.88rem; }
.verdict { background: var(--panel); border-left: 5px solid var(--accent); padding: 10px 16px; margin: 16px 0;
  border-radius: 3px; font-size: 1.06rem; }
.verdict p { margin: 0.3em 0; }
.warn { border-left-color: var(--bad); }
.scroll { overflow-x: auto; margin: 0.8em 0; }
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 6px; }
caption span { display: block; max-width: min(78ch, calc(100vw - 40px)); position: sticky; left: 0; }
th, td { padding: 5px 12px 5px 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; }
th.text, td.text { text-align: left; }
th[colspan] { padding-top: 8px; }
td.wrap { white-space: normal; min-width: 16em; overflow-wrap: anywhere; }
tr.mark td { background: var(--panel); }
tr > :first-child { position: sticky; left: 0; background: var(--paper); }
tr.mark > :first-child { background: var(--panel); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 18px 28px; }
.cells { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 160px), 1fr)); gap: 10px; }
figure { margin: 0; min-width: 0; max-width: 640px; break-inside: avoid; }
figure.wide { max-width: 760px; }
figure svg, figure img { display: block; width: 100%; height: auto; }
figure svg { overflow: visible; }
.cells img { border-radius: 3px; }
.cells.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 16px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0.6em 0; padding: 0; list-style: none;
  font-size: 0.9rem; }
.legend li { display: flex; align-items: center; gap: 6px; }
.legend svg { width: 38px; height: 12px; flex: none; }
pre { background: var(--panel); padding: 10px 12px; border-radius: 3px; font-size: 0.82rem; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 32em; }
details > summary { cursor: pointer; margin: 0.6em 0; }
.good { color: var(--good); } .bad { color: var(--bad); }
@media print { :root { --ink: #000; --soft: #444; --paper: #fff; --panel: #fff; --line: #bbb; }
  main { max-width: none; padding: 0; } nav { display: none; } pre { max-height: none; }
  .scroll { overflow: visible; } h2 { break-after: avoid; } table { font-size: 0.72rem; } }
"""


@dataclass
class Page:
    """A page in the making.

    Attributes:
        title: of the page, and its heading.
        subtitle: a line below.
    """

    title: str
    subtitle: str = ""
    _sections: list[tuple[str, str, str]] = field(default_factory=list)
    _lead: list[str] = field(default_factory=list)

    def lead(self, *parts: str) -> None:
        """Add to what stands before the first section."""
        self._lead += [_text(part) for part in parts]

    def section(self, title: str, *parts: str) -> None:
        """Add a section; without parts there is none."""
        kept = [_text(part) for part in parts if part]
        if kept:
            self._sections.append((f"s{len(self._sections) + 1}", title, "\n".join(kept)))

    def render(self) -> str:
        """The whole page."""
        links = " ".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in self._sections)
        sections = "\n".join(
            f'<section id="{name}" aria-labelledby="{name}h"><h2 id="{name}h">{escape(title)}</h2>\n{body}\n</section>'
            for name, title, body in self._sections
        )
        subtitle = f'<p class="soft">{escape(self.subtitle)}</p>' if self.subtitle else ""
        # The icon: without one, browsers ask a server for it.
        return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(self.title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(self.title)}</h1>
{subtitle}
</header>
{chr(10).join(self._lead)}
<nav aria-label="Sections">{links}</nav>
{sections}
</main>
</body>
</html>
"""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        return write_whole(Path(path), self.render())


def escape(text: object) -> str:
    """Text as HTML; a number and its percent sign stay together."""
    return html.escape(str(text)).replace(" %", "&nbsp;%")


def _text(part: str) -> str:
    return part if isinstance(part, Html) else str(paragraph(part))


def paragraph(text: str, kind: str = "") -> Html:
    """A paragraph; ``kind`` is a CSS class."""
    return Html(f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>")


def heading(text: str) -> Html:
    """A heading within a section."""
    return Html(f"<h3>{escape(text)}</h3>")


def verdict(lines: Sequence[str], *, warn: bool = False) -> Html:
    """What matters most, set off from the rest."""
    body = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return Html(f'<div class="verdict{" warn" if warn else ""}">{body}</div>')


def bullets(lines: Sequence[str]) -> Html:
    """A list; nothing for none."""
    return Html("<ul>" + "".join(f"<li>{_inline(line)}</li>" for line in lines) + "</ul>" if lines else "")


def _inline(text: str) -> str:
    return text if isinstance(text, Html) else escape(text)


def table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    text_columns: Sequence[int] = (0,),
    wrap_columns: Sequence[int] = (),
    marked: Sequence[int] = (),
    groups: Sequence[tuple[str, int]] = (),
) -> Html:
    """A table that scrolls sideways where it is too wide; nothing without rows.

    Args:
        text_columns: set left, as words are; numbers are set right.
        wrap_columns: may break into lines.
        marked: rows with another background.
        groups: headings above the header, each with how many columns it stands over.
    """
    if not rows:
        return Html("")

    def cell(tag: str, column: int, content: Any) -> str:
        kinds = ["text"] * (column in text_columns) + ["wrap"] * (column in wrap_columns and tag == "td")
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        scope = ' scope="col"' if tag == "th" else ""
        return (
            f"<{tag}{scope}{kind}>{_inline(content) if isinstance(content, str) else escape(content)}</{tag}>"
        )

    above = "".join(
        f'<th scope="colgroup" colspan="{span}" class="text">{escape(t)}</th>' for t, span in groups
    )
    head = (f"{above}</tr><tr>" if groups else "") + "".join(
        cell("th", n, name) for n, name in enumerate(header)
    )
    body = "\n".join(
        f"<tr{' class=mark' if number in marked else ''}>"
        + "".join(cell("td", n, content) for n, content in enumerate(row))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    # Focusable: a keyboard can scroll it.
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption><span>{escape(caption)}</span></caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(picture: Picture, caption: str = "", *, wide: bool = False) -> Html:
    """A drawing, sharp at any size."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Html(f"<figure{' class=wide' if wide else ''}>{picture.inline_svg()}{below}</figure>")


def photo(image: ByteImage, alt: str, caption: str = "", *, width: int = 420, quality: int = 82) -> Html:
    """A photograph, or a drawing on one, as JPEG.

    Args:
        image: BGR uint8 (H, W, 3).
        alt: what it shows, for who can't see it.
        width: pixels at most.
    """
    if image.shape[1] > width:
        height = max(1, round(image.shape[0] * width / image.shape[1]))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    data = base64.b64encode(encoded.tobytes()).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    size = f'width="{image.shape[1]}" height="{image.shape[0]}"'
    return Html(
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{escape(alt)}" {size}>{below}</figure>'
    )


def grid(parts: Sequence[str], kind: str = "grid") -> Html:
    """Parts beside one another, as many as there is room for; ``kind`` "cells" for small ones."""
    kept = [part for part in parts if part]
    return Html(f'<div class="{kind}">{"".join(kept)}</div>' if kept else "")


def folded(title: str, content: str) -> Html:
    """Something long that opens on a click."""
    return Html(f"<details><summary>{escape(title)}</summary>{_text(content)}</details>")


def code(text: str) -> Html:
    """Text as it stands in a file or a terminal."""
    return Html(f"<pre>{escape(text)}</pre>")


def legend(entries: Sequence[tuple[str, str, str]]) -> Html:
    """What colours and dashes stand for.

    Args:
        entries: (label, colour, SVG dash array, "" for a whole line).
    """
    items = []
    for label, color, dashes in entries:
        dash = f' stroke-dasharray="{dashes}"' if dashes else ""
        items.append(
            f'<li><svg viewBox="0 0 38 12" aria-hidden="true"><line x1="1" y1="6" x2="37" y2="6" '
            f'stroke="{color}" stroke-width="3"{dash}/></svg>{escape(label)}</li>'
        )
    return Html(f'<ul class="legend">{"".join(items)}</ul>')
