"""Pages in Chromium, as tests open them, and axe-core, which looks for what keeps people out."""

import contextlib
import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]


@contextlib.contextmanager
def phone():
    """A page in Chromium, as wide as a phone, that keeps what it has asked for and its errors."""
    if CHROMIUM is None or shutil.which("npm") is None:
        pytest.skip("no Chromium, or no npm to fetch what the page is tested with")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(240_000)  # of milliseconds: other tests run beside it
        page.asked, page.errors = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        yield page
        browser.close()


def fetch_axe(folder):
    """The text of axe-core."""
    subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix",
                    str(folder), "axe-core@4.10.3"], check=True)
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


def violations(page, axe):
    """What axe-core finds on a page, in light and in dark."""
    page.evaluate(axe)
    found = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found += page.evaluate("axe.run().then(({ violations }) => violations.map("
                               "(one) => one.id + ': ' + one.nodes[0].html))")
    return found
