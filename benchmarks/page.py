"""Size of a page, and its time to load and to predict in Chromium, with the CPU time of the page's process.

    python benchmarks/page.py reports/digits-mean/index.html [more pages]

Needs Chromium and the package playwright. Each page is opened in a fresh context; times are medians of five.
"""

import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import CDPSession, Page, expect, sync_playwright

TIMES = 5
CLOCK = "performance.now()"


def cpu_seconds(session: CDPSession) -> float:
    """CPU time of the page's main thread since the session began."""
    metrics = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    return float(metrics["TaskDuration"])


def drawn(page: Page) -> None:
    """Wait until every chart of the view is drawn."""
    expect(page.locator(".chart:not([data-drawn])")).to_have_count(0, timeout=60_000)


def measure(browser: Any, file: Path) -> dict[str, float]:
    """Open a page, predict, which draws the first charts, and predict again; seconds of each."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    session = context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(file.resolve().as_uri(), timeout=120_000)
    page.wait_for_selector("html[data-ready]", timeout=120_000)
    entry = page.evaluate(
        "(({domContentLoadedEventEnd, duration}) => [domContentLoadedEventEnd, duration])"
        "(performance.getEntriesByType('navigation')[0])"
    )
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? NaN")
    began = page.evaluate(CLOCK)
    page.evaluate("window.location.hash = 'whatif'")
    page.wait_for_selector("main[data-view=whatif]")
    page.get_by_role("button", name="Add strongest").click()
    page.wait_for_selector(".big strong")
    drawn(page)
    first = page.evaluate(CLOCK) - began
    cpu = cpu_seconds(session)
    began = page.evaluate(CLOCK)
    page.get_by_label("Strongest", exact=True).fill("20")
    page.get_by_role("button", name="Add strongest").click()
    expect(page.locator("main h2").first).to_have_text("20 components ablated")
    drawn(page)
    again = page.evaluate(CLOCK) - began
    context.close()
    return {
        "DOMContentLoaded": entry[0] / 1000,
        "first paint": paint / 1000,
        "first what-if": first / 1000,
        "CPU up to here": cpu,
        "next what-if": again / 1000,
    }


def main() -> None:
    """Print one line of size and one of times for each page."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        for name in sys.argv[1:]:
            file = Path(name)
            found = [measure(browser, file) for _ in range(TIMES)]
            print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")
            for key in found[0]:
                print(f"  {key:25}{statistics.median(one[key] for one in found):6.2f} s")
        browser.close()


if __name__ == "__main__":
    main()
