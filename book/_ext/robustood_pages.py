"""Finishing touches to the built pages, where the theme offers no setting.

Each page gets a description for search engines and previews, and an icon. A number and its unit stay in one line, as do
a formula and the comma after it. :data:`REPAIRS` mends what the theme and its extensions write: two title headings
per page, icons loaded three times, and markup that a screen reader cannot use.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

MOST_LETTERS = 200
UNIT = re.compile(r"(?<=\d) (?=(?:%|s|ms|MB|GB)(?!\w))")
# (what the page says, what it should say); the reason stands above each.
REPAIRS = [
    # The icons come as a script of 1.5 MB and again as fonts. The fonts suffice; a page on disk must not preload them.
    (r'<script src="[^"]*/fontawesome/[^"]*"></script>\s*', ""),
    (r'<link rel="preload" as="font"[^>]*>\s*', ""),
    (r'<link rel="preload" as="script" href="[^"]*/fontawesome/[^"]*"[^>]*>\s*', ""),
    # The printed page repeats the title.
    (r'(<div id="jb-print-docs-body" class="onlyprint">\s*)<h1>(.*?)</h1>', r'\1<p class="h1">\2</p>'),
    # A button of the sidebar without a name.
    (r"<summary><span class=\"toctree-toggle\"", '<summary aria-label="Show its pages"><span class="toctree-toggle"'),
    # A signature with one argument a line is a list of descriptions without terms.
    (r"<dl>\n((?:<dd><em class=\"sig-param\">.*</dd>\n)+)</dl>", r'<div class="sig-params">\n\1</div>'),
    (r"<dd>(<em class=\"sig-param\">.*)</dd>", r"<div>\1</div>"),
    # References: roles that are deprecated, or that their content does not fit.
    (r' role="doc-biblioentry"', ""),
    (r'<div role="list" class="citation-list">', '<div class="citation-list">'),
    # What scrolls sideways must be within reach of the keyboard.
    (r'<div class="pst-scrollable-table-container">', '<div class="pst-scrollable-table-container" tabindex="0">'),
    (r'(<div class="leaderboard")>', r'\1 tabindex="0">'),
    # A line must not begin with the comma after a formula, or end with the bracket before it.
    (
        r'(?<!class="joined">)(\(?<span class="math notranslate nohighlight">[^<]*</span>[,.;:?!)]+'
        r'|\(<span class="math notranslate nohighlight">[^<]*</span>)', r'<span class="joined">\1</span>',
    ),
    # From the source back to the page: what two modules export is looked for at the other one's address.
    (r'(href="[^"]*book/api/(\w+)\.html#robustood\.)(?!\2\.)\w+\.', r"\1\2."),
]  # fmt: skip


def description(doctree: nodes.document) -> str:
    """The first words of a page: a chapter's question, otherwise its first paragraph."""
    for paragraph in doctree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        if len(text) > 20:
            return (
                text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS].rsplit(' ', 1)[0]} …"
            )
    return ""


def describe(
    app: Sphinx, page: str, template: str, context: dict[str, str], doctree: nodes.document | None
) -> None:
    """Add a description, and what previews in other places show."""
    if doctree is None:
        return
    about, title = escape(description(doctree)), context["title"].replace('"', "&quot;")
    picture = f"{app.config.html_baseurl}_static/break_and_repair.png"
    context["metatags"] = context.get("metatags", "") + (
        f'\n<meta name="description" content="{about}" />'
        f'\n<meta property="og:title" content="{title}" />'
        f'\n<meta property="og:description" content="{about}" />'
        f'\n<meta property="og:image" content="{picture}" />'
        '\n<meta property="og:type" content="article" />\n'
    )


def join_units(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Put a space that does not break between a number and its unit; code stays as it is."""
    for text in list(doctree.findall(nodes.Text)):
        code = (nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.raw)
        if UNIT.search(text) and not isinstance(text.parent, code):
            text.parent.replace(text, nodes.Text(UNIT.sub("\u00a0", text)))


def repaired(page: str) -> str:
    """A page after all repairs; repairing it again changes nothing."""
    for pattern, replacement in REPAIRS:
        page = re.sub(pattern, replacement, page)
    return page


def repair(app: Sphinx, failed: Exception | None) -> None:
    """Repair every page."""
    if failed or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        before = path.read_text("utf-8")
        if (after := repaired(before)) != before:
            path.write_text(after, "utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-resolved", join_units)
    app.connect("html-page-context", describe)
    app.connect("build-finished", repair)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
