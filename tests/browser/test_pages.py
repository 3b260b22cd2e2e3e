"""Every built page in a real browser: complete, quiet, accessible, no wider than the screen, and usable by everybody.

The browser is Debian's chromium, driven by Playwright (``make browser`` installs both). ``make test`` builds two pages
and looks at these; ``make check`` builds and looks at all.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FEW = ("book/03_attacks", "book/glossary")
# width, colours, whether the screen is touched
SCREENS = {
    "laptop": (1280, "light", False),
    "laptop, dark": (1280, "dark", False),
    "phone": (390, "light", True),
    "phone, dark": (390, "dark", True),
}
# Images that did not load, formulas that failed, boxes whose content is cut off or sticks out of the page, columns of a
# table that are too narrow for any word, and directives that were not understood.
LOOK = r"""() => {
  const wide = document.documentElement.clientWidth, article = document.querySelector("article") ?? document.body;
  const sticks = [], told = e => `${e.tagName}.${e.className}: ${e.scrollWidth} > ${e.clientWidth}`;
  if (document.documentElement.scrollWidth > wide + 1) sticks.push(told(document.documentElement));
  for (const e of article.querySelectorAll("pre, table, img, mjx-container, p, dl, figure, fieldset")) {
    if (e.getClientRects().length && e.getBoundingClientRect().right > wide + 1
        && !e.parentElement.closest("[tabindex], .cell_output pre, mjx-container, .sig")) sticks.push(told(e));
  }
  for (const e of article.querySelectorAll("mjx-container:not([display])")) {
    const block = e.closest("p, li, dd, td, th, figcaption");
    if (block && e.getClientRects().length
        && e.getBoundingClientRect().right > block.getBoundingClientRect().right + 1) sticks.push(told(e));
  }
  return {
    sticks,
    squeezed: [...article.querySelectorAll("td, th")].filter(e => {
      const font = parseFloat(getComputedStyle(e).fontSize);
      const longest = Math.max(...e.innerText.split(/\s/).map(word => word.length));
      return e.getClientRects().length && longest > 3 && e.clientWidth < 1.6 * font;
    }).map(e => e.innerText.slice(0, 60)),
    raw: [...article.querySelectorAll("p, li, dd")].map(e => e.textContent).filter(t => /(`{3}|:{3,}) ?{/.test(t)),
    unnamed: [...document.querySelectorAll("img:not([alt]), img[alt='']")].map(e => e.outerHTML.slice(0, 200)),
    unloaded: [...document.querySelectorAll("img")]
      .filter(e => e.complete && !e.naturalWidth).map(e => e.src.slice(0, 200)),
    formulas: [...document.querySelectorAll("mjx-merror, .problematic")].map(e => e.textContent),
    titles: document.querySelectorAll("h1").length,
    description: document.querySelector("meta[name=description]")?.content ?? null,
  };
}"""
# What paper would lose: boxes that scroll on a screen, or reach beyond the page.
PRINTED = """() => [...(document.querySelector("article") ?? document.body).querySelectorAll("*")]
  .filter(e => e.getClientRects().length && !e.closest("svg, .math, mjx-container"))
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
    || (getComputedStyle(e).overflowX != "visible" && e.clientWidth > 1 && e.scrollWidth > e.clientWidth + 1))
  .map(e => `${e.tagName}.${e.className}: ${e.scrollWidth} > ${e.clientWidth}`)"""
PAPER = 718  # the width of A4 in pixels, less margins
AUDIT = "() => axe.run(document, {preload: false, resultTypes: ['violations']}).then(found => found.violations)"


@pytest.fixture(scope="session")
def browser():
    """A browser; tests that use it are skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: run make browser")
    if CHROMIUM is None:
        pytest.skip("no chromium on the path: run make browser")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def axe():
    """The script of axe-core, which checks accessibility."""
    package = pytest.importorskip("axe_playwright_python", reason="no axe: run make browser")
    (script,) = Path(package.__file__).parent.rglob("axe*.js")
    return script.read_text("utf-8")


def built(folder: Path, *options: str | Path) -> Path:
    """The pages of the book, built in a folder with its settings."""
    command = [Path(sys.executable).with_name("jupyter-book"), "build", "-q", *options]
    command += ["--path-output", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    site = folder / "_build" / "html"
    assert (site / f"{FEW[0]}.html").is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    return site


@pytest.fixture(scope="session")
def few_pages(tmp_path_factory) -> Path:
    """A small site of two pages."""
    folder = tmp_path_factory.mktemp("site")
    toc = {"format": "jb-book", "root": FEW[1], "chapters": [{"file": FEW[0]}]}
    (folder / "_toc.yml").write_text(yaml.safe_dump(toc))
    return built(folder, "--toc", folder / "_toc.yml")


@pytest.fixture(scope="session")
def all_pages(tmp_path_factory) -> Path:
    """The whole site: that in the folder ``ROBUSTOOD_SITE``, else one that is built now."""
    if given := os.environ.get("ROBUSTOOD_SITE"):
        return Path(given)
    return built(tmp_path_factory.mktemp("site"))


def pages(site: Path) -> list[Path]:
    """The pages that a reader reads; no copies of the library's source, and no page that only leads to another."""
    found = sorted(site.rglob("*.html"))
    read = [
        page for page in found if not {"_modules", "_static"} & set(page.relative_to(site).parts)
    ]
    return [page for page in read if 'http-equiv="Refresh"' not in page.read_text("utf-8")]


@contextmanager
def opened(browser, page: Path, screen: str) -> Generator[tuple]:
    """A page on a screen, and what went wrong meanwhile: messages of the console, requests to elsewhere."""
    width, scheme, touched = SCREENS[screen]
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=touched
    )
    tab, faults = context.new_page(), []
    tab.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("requestfailed", lambda asked: faults.append(f"failed: {asked.url}"))
    tab.on(
        "request",
        lambda a: None if a.url.startswith(("file:", "data:", "blob:")) else faults.append(a.url),
    )
    tab.goto(page.as_uri(), wait_until="load")
    tab.evaluate("() => window.MathJax?.startup?.promise")
    yield tab, faults
    context.close()


def looked_at(browser, axe: str, page: Path, screen: str) -> list[str]:
    """All faults of a page."""
    with opened(browser, page, screen) as (tab, faults):
        seen = tab.evaluate(LOOK)
        tab.evaluate(axe)
        for broken in tab.evaluate(AUDIT):
            if broken["impact"] in ("serious", "critical"):
                first = broken["nodes"][0]["html"][:200]
                faults.append(f"axe: {broken['id']} ({len(broken['nodes'])} times), first {first}")
        for kind in ("sticks", "squeezed", "raw", "unnamed", "unloaded", "formulas"):
            faults += [f"{kind}: {each}" for each in seen[kind]]
        if seen["titles"] != 1:
            faults.append(f"{seen['titles']} headings of the first level")
        if seen["description"] is not None and len(seen["description"]) < 15:
            faults.append(f"description: {seen['description']!r}")
    return faults


@pytest.mark.parametrize("screen", ["laptop", "phone, dark"])
@pytest.mark.parametrize("name", FEW)
def test_two_pages_have_no_faults(browser, axe, few_pages, name, screen):
    assert not looked_at(browser, axe, few_pages / f"{name}.html", screen)


@pytest.mark.slow
@pytest.mark.parametrize("screen", SCREENS)
def test_no_page_has_faults(browser, axe, all_pages, screen):
    found = {page.name: looked_at(browser, axe, page, screen) for page in pages(all_pages)}
    assert len(found) > 40
    assert not {name: faults for name, faults in found.items() if faults}


def test_a_fault_is_found(browser, axe, few_pages, tmp_path):
    """The check sees what it is there for: faults of each kind, planted into a good page."""
    page = (
        (few_pages / f"{FEW[1]}.html")
        .read_text("utf-8")
        .replace("../_static", f"{few_pages}/_static")
    )
    planted = (
        '<img src="data:,"><h1>Again</h1><pre style="width:3000px">wide</pre><script>nothing.at.all</script>'
        '<a href="#x"></a><img alt="elsewhere, unreachable" src="http://127.0.0.1:9/x.png"><p>```{quiz} Why?</p>'
        '<table><tr><td style="display:block;width:1em;overflow-wrap:anywhere">squeezed</td></tr></table>'
        '<p style="width:5em"><mjx-container style="display:inline-block;width:9em">long</mjx-container></p>'
    )
    (tmp_path / "page.html").write_text(
        page.replace("<article", f"{planted}<article").replace("</article>", f"{planted}</article>")
    )
    faults = "\n".join(looked_at(browser, axe, tmp_path / "page.html", "laptop"))
    for kind in (
        "sticks: MJX",
        "squeezed: squeezed",
        "raw: ```{quiz",
        "sticks",
        "unnamed",
        "headings",
        "nothing is not defined",
        "axe: ",
        "127.0.0.1",
    ):
        assert kind in faults, (kind, faults)


def cut_off(browser, page: Path) -> list[str]:
    """What would be missing from a printed page."""
    with opened(browser, page, "laptop") as (tab, _):
        tab.set_viewport_size({"width": PAPER, "height": 1000})
        tab.emulate_media(media="print")
        return tab.evaluate(PRINTED)


def test_paper_loses_nothing(browser, few_pages, tmp_path):
    for name in FEW:
        assert not cut_off(browser, few_pages / f"{name}.html")
    text = (few_pages / f"{FEW[0]}.html").read_text("utf-8")
    sheet = re.search(r"<link[^>]*_static/custom.css[^>]*>", text)
    without = text.replace(sheet[0], "").replace("../_static", f"{few_pages}/_static")
    (tmp_path / "page.html").write_text(without)
    assert cut_off(browser, tmp_path / "page.html"), (
        "without our style, long lines of code are cut off"
    )


@pytest.mark.slow
def test_paper_loses_nothing_of_any_page(browser, all_pages):
    found = {page.name: cut_off(browser, page) for page in pages(all_pages)}
    assert not {name: cut for name, cut in found.items() if cut}


# --- what a reader moves


def moved(picture) -> str:
    return picture.get_attribute("src")


@pytest.mark.parametrize("screen", ["laptop", "phone"])
def test_the_figure_follows_keyboard_mouse_and_finger(browser, few_pages, screen):
    with opened(browser, few_pages / f"{FEW[0]}.html", screen) as (tab, faults):
        figure = tab.locator(".explore").first
        picture = figure.locator("img")
        for slider in figure.locator("input[type=range]").all():
            slider.scroll_into_view_if_needed()
            start, before, box = slider.input_value(), moved(picture), slider.bounding_box()
            slider.focus()
            tab.keyboard.press("Home")
            low, shown = moved(picture), slider.get_attribute("aria-valuetext")
            tab.keyboard.press("End")
            assert moved(picture) != low and slider.get_attribute("aria-valuetext") != shown, before
            press = tab.touchscreen.tap if SCREENS[screen][2] else tab.mouse.click
            press(box["x"] + 3, box["y"] + box["height"] / 2)
            assert moved(picture) == low, "a press at the left end is the first value"
            assert box["height"] >= 24 and box["width"] >= 100, "large enough for a finger"
            slider.fill(start)  # at a radius of 0 the others would show nothing
        buttons = figure.locator("input[type=radio]").all()
        assert len(buttons) > 1
        for button in [*buttons[1:], buttons[0]]:  # the first one is chosen at the start
            before, label = moved(picture), button.locator("xpath=..")
            (label.tap if SCREENS[screen][2] else label.click)()
            assert button.is_checked() and moved(picture) != before
        assert not faults


def test_an_answer_of_the_quiz_unfolds_by_key_and_by_click(browser, few_pages):
    with opened(browser, few_pages / f"{FEW[0]}.html", "laptop") as (tab, faults):
        first, second = tab.locator(".quiz details").all()[:2]
        assert not first.locator(".quiz-why").is_visible()
        first.locator("summary").focus()
        tab.keyboard.press("Enter")
        assert first.locator(".quiz-why").is_visible()
        second.locator("summary").click()
        assert second.locator(".quiz-why").is_visible() and not faults


# --- links


class Links(HTMLParser):
    """The targets that a page refers to, and the places that it has."""

    def __init__(self, page: Path):
        super().__init__()
        self.targets: set[str] = set()
        self.places: set[str] = set()
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        held = dict(attrs)
        self.places |= {held[key] for key in ("id", "name") if held.get(key)}
        self.targets |= {held[key] for key in ("href", "src") if held.get(key)}


@pytest.mark.slow
def test_every_internal_link_leads_to_a_place(all_pages):
    own = [page for page in all_pages.rglob("*.html") if "_static" not in page.parts]
    known = {page: Links(page) for page in own}
    dead = []
    for page, links in known.items():
        for target in links.targets:
            if urlsplit(target).scheme or target.startswith("//"):
                continue
            path, place = urldefrag(target)
            file = (page.parent / unquote(path.split("?")[0])).resolve() if path else page
            places = known[file].places if file in known else ()
            if not file.exists() or (place and places and unquote(place) not in places):
                dead.append((page.name, target))
    assert not dead
    assert sum(len(links.targets) for links in known.values()) > 1000


@pytest.mark.slow
def test_a_page_is_light_before_its_figures(all_pages):
    """At most 2.5 MB of text, style, script and fonts a chapter; figures come on top."""
    for page in sorted((all_pages / "book").glob("[0-9]*.html")):
        text = page.read_text("utf-8")
        words = len(re.sub(r"data:image/[^\"']*|\"[A-Za-z0-9+/=]{200,}\"", "", text))
        files = {urldefrag(t)[0].split("?")[0] for t in Links(page).targets}
        loaded = [page.parent / f for f in files if f.endswith((".js", ".css", ".woff2"))]
        size = words + sum(file.stat().st_size for file in loaded if file.is_file())
        assert size <= 2.5e6, (page.name, size)
