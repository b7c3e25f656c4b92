"""Size of a page, and its time to load and to predict in Chromium, with the CPU time of the page's process.

    python benchmarks/page.py reports/digits-mean/index.html [more pages]
    python -m benchmarks.page --synthetic 5000 22720    # examples and components of a run that is made for it

Needs Chromium and the package playwright. Each page is opened in a fresh context; times are medians of five.
A what-if shows its numbers and tables at once, and then its charts. The first what-if begins as soon as the page
answers, so it may have to wait for the start of plotly.js; "opened to charts" is from the request for the page on.
"""

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import CDPSession, sync_playwright

import coar

TIMES = 5
WHAT_IF = """async (count) => {
  const until = async (done) => {
    while (!done()) await new Promise((resolve) => setTimeout(resolve, 5));
  };
  const main = document.getElementById("main");
  const began = performance.now();
  window.location.hash = "whatif";
  await until(() => main.dataset.view === "whatif");
  const strongest = [...main.querySelectorAll("input[type=number]")][0];
  strongest.value = count;
  strongest.dispatchEvent(new Event("change"));
  [...main.querySelectorAll("button")].find((one) => one.textContent === "Add strongest").click();
  await until(() => main.querySelector("h2").textContent.startsWith(`${count} components`));
  const numbers = performance.now() - began;
  await until(() => main.querySelector(".chart[data-drawn]") && !main.querySelector(".chart:not([data-drawn])"));
  return [numbers, performance.now() - began, performance.now()];
}"""  # choose the strongest components; the milliseconds until numbers and until charts are there, and since opening


def cpu_seconds(session: CDPSession) -> float:
    """CPU time of the page's main thread since the session began."""
    metrics = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    return float(metrics["TaskDuration"])


def measure(browser: Any, file: Path) -> dict[str, float]:
    """Open a page, predict, which draws the first charts, and predict again; return seconds of each."""
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
    numbers, first, opened = page.evaluate(WHAT_IF, 10)
    cpu = cpu_seconds(session)
    _, again, _ = page.evaluate(WHAT_IF, 20)
    context.close()
    return {
        "DOMContentLoaded": entry[0] / 1000,
        "first paint": paint / 1000,
        "first what-if, numbers": numbers / 1000,
        "first what-if, charts": first / 1000,
        "opened to charts": opened / 1000,
        "CPU up to here": cpu,
        "next what-if": again / 1000,
    }


def synthetic(folder: Path, examples: int, components: int) -> Path:
    """Make a run with a fit of random weights, and its page; print what the page took."""
    from coar.explorer.page import write_page
    from tests import synthetic as made

    draw = np.random.default_rng(0)
    weights = draw.standard_normal((examples, components), dtype=np.float32)
    metadata = {"label": np.arange(examples) % 10}
    run = made.make(
        folder / "synthetic.zarr",
        lambda masks: np.zeros((len(masks), examples)),
        components=components,
        masks=4,
        blocks=(4, 1000),
        metadata=metadata,
    )
    coar.add_fit(run, "random", weights, np.zeros(examples, dtype=np.float32))
    del weights
    began = time.process_time()
    file = write_page(run, folder, fit="random")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"the page took {time.process_time() - began:.0f} s of processor time; the process at most {memory:.1f} GiB")
    return file


def main() -> None:
    """Print one line of size and one of times for each page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--synthetic", nargs=2, type=int, metavar=("EXAMPLES", "COMPONENTS"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="coar-page-") as folder:
        made = [synthetic(Path(folder), *arguments.synthetic)] if arguments.synthetic else []
        print_all([*arguments.pages, *made])


def print_all(files: list[Path]) -> None:
    """Measure each page and print its size and times."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        for file in files:
            found = [measure(browser, file) for _ in range(TIMES)]
            print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")
            for key in found[0]:
                print(f"  {key:25}{statistics.median(one[key] for one in found):6.2f} s")
        browser.close()


if __name__ == "__main__":
    main()
