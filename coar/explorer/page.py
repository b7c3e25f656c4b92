"""The page of a run: one HTML file that holds its style, scripts, charts and data."""

import base64
import hashlib
import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from coar.errors import StorageError
from coar.evaluation import Evaluation
from coar.explorer.content import gather
from coar.explorer.source import Source
from coar.store.run import Run

BASE = ("data", "page", "charts", "live")
VIEWS = ("examples", "example", "component", "whatif", "edits", "evaluation", "language")


def write_page(
    run: Run,
    folder: Path,
    *,
    fit: str | None = None,
    source: Source | None = None,
    evaluation: Evaluation | None = None,
) -> Path:
    """Write the page of a run, with the edits in its reports folder, into that folder; return the file.

    Args:
        run: The run.
        folder: Its reports folder.
        fit: Name of the fit; by default the best one.
        source: The pipeline; without it the page has no pictures, texts and predictions.
        evaluation: The evaluation of the run; by default it is computed.

    Raises:
        RunError: When the run has no fit of that name.
        StorageError: When the file cannot be written.
    """
    text = page_of(gather(run, folder, fit=fit, source=source, evaluation=evaluation))
    file = folder / "index.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error}; free space or choose another folder") from error
    return file


def page_of(content: dict[str, Any]) -> str:
    """Return the page of what `gather` returned.

    Its content security policy allows the scripts in it by their hashes, and no network; a page that is served may send
    requests to its own server.
    """
    # plotly.js is kept as text and started after the first view is there, so that the page shows before that
    charts = _asset("plotly-cartesian.min.js").replace("</script", "<\\/script")
    script = "\n".join(_asset(f"{name}.js") for name in (*BASE, *VIEWS, "main"))
    parts = {
        "POLICY": _policy([script, charts], live="live" in content),
        "TITLE": html.escape(str(content["title"])),
        "STYLE": _asset("page.css"),
        "DATA": _embedded(content),
        "CHARTS": charts,
        "SCRIPT": script,
    }
    pieces = _asset("page.html").split("%%")
    return "".join(piece if i % 2 == 0 else parts[piece] for i, piece in enumerate(pieces))


def _asset(name: str) -> str:
    return files("coar.explorer").joinpath("assets", name).read_text(encoding="utf-8")


def _policy(scripts: list[str], *, live: bool) -> str:
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        f"form-action 'none'" + ("; connect-src 'self'" if live else "")
    )


def _embedded(content: dict[str, Any]) -> str:
    """Return JSON that contains no character with a meaning in HTML."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
