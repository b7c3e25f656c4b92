"""Screenshots of the default run's page for the documentation, into docs/images.

    make edit
    python docs/screenshots.py

Needs Chromium and the package playwright (`make browser-packages`). The page is served as by `coar explore`, so that
its what-if runs the model.
"""

import os
import shutil
import threading
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

import coar
from coar.explorer.server import serve_page
from coar.pipeline import load_pipeline

RUN, REPORTS, PIPELINE = Path("runs/digits-mean.zarr"), Path("reports/digits-mean"), Path("pipelines/digits.py")
IMAGES = Path(__file__).parent / "images"
SIZE, PHONE = {"width": 1120, "height": 700}, {"width": 390, "height": 844}


def settled(page: Page) -> None:
    """Wait until every chart of the view is drawn."""
    expect(page.locator(".chart:not([data-drawn])")).to_have_count(0, timeout=60_000)
    page.wait_for_timeout(300)


def taken(page: Page, name: str, *, card: str | None = None, height: int | None = None) -> None:
    """Write a screenshot of a card by its heading, or of the upper part of the page."""
    file = IMAGES / f"page-{name}.png"
    if card:
        page.locator(f"section[aria-label='{card}']").screenshot(path=file)
    else:
        page.screenshot(
            path=file, full_page=True, clip={"x": 0, "y": 0, "width": SIZE["width"], "height": height or 700}
        )


def walk(page: Page, removed: str) -> None:
    """Take the screenshots of the walk-through in quickstart.md."""
    page.get_by_role("button", name="that the model gets wrong").click()
    taken(page, "examples", height=640)
    error = page.locator("a[data-example]").filter(has_text="8 read as").first
    error.click()
    page.wait_for_selector("main[data-view=example]")
    settled(page)
    taken(page, "example", height=1060)
    taken(page, "removal", card="Which one would you remove?")
    page.get_by_role("link", name=removed, exact=True).first.click()
    page.wait_for_selector("main[data-view=component]")
    settled(page)
    taken(page, "component", height=1180)
    page.get_by_role("button", name="What if it were ablated?").click()
    page.wait_for_selector("main[data-view=whatif]")
    page.get_by_role("button", name="Judge on other examples").click()
    page.wait_for_selector("table:has(caption:text-is('Judged by the model'))")
    page.get_by_role("button", name="Measure with the model").click()
    page.wait_for_selector("#measured")
    settled(page)
    taken(page, "whatif", height=760)
    taken(page, "measured", card="Measured by the model")


def phone(browser: Browser, url: str, view: str) -> None:
    """Take a screenshot at a phone's width, in the dark scheme."""
    page = browser.new_page(viewport=PHONE, color_scheme="dark", device_scale_factor=2)
    page.goto(url + view, timeout=120_000)
    page.wait_for_selector("html[data-ready]")
    settled(page)
    page.screenshot(path=IMAGES / "page-phone.png")


def main() -> None:
    """Serve the page, and take all screenshots."""
    run = coar.Run.open(RUN)
    server = serve_page(run, REPORTS, load_pipeline(PIPELINE).source(run), device="cpu")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        page = browser.new_page(viewport=SIZE)
        page.goto(server.url, timeout=120_000)
        page.wait_for_selector("html[data-ready]")
        page.add_style_tag(content=".tabs { position: static !important; }")  # it would cover cards
        walk(page, "conv1[2]")
        phone(browser, server.url, "#example/17")
        browser.close()
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    main()
