"""The served page: measured outputs are the model's, edits are judged and saved, and other requests are refused."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import coar
from coar.errors import RunError, SettingsError
from coar.explorer.content import gather
from coar.explorer.server import LARGEST, serve_page
from coar.explorer.source import Source
from coar.pipeline import load_pipeline
from tests import oracles
from tests.pages import content, numbers
from tests.synthetic import linear, make, weights
from tests.test_cli import TINY

ABLATED = [0, 5, 20, 47]


@pytest.fixture(scope="module")
def place(digits, tmp_path_factory):
    """A pipeline and a run of two layers of the digits' net, with a fit; read only."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "tiny.py").write_text(TINY.replace('include="layer2.*"', 'include=["conv1", "layer2.conv1"]'))
    study = load_pipeline(folder / "tiny.py").study()
    run = coar.collect(study, folder / "tiny.zarr", masks=60, test_masks=4, device="cpu", progress=False)
    coar.fit(run, progress=False)
    return folder


@pytest.fixture(scope="module")
def source(place):
    return load_pipeline(place / "tiny.py").source(coar.Run.open(place / "tiny.zarr"))


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The reports folder of the server."""
    return tmp_path_factory.mktemp("served") / "reports"


@pytest.fixture(scope="module")
def served(place, source, reports):
    """A server of the page, in a thread."""
    server = serve_page(coar.Run.open(place / "tiny.zarr"), reports, source, device="cpu")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server, path, given=None, *, method="POST", token=None, body=None, **headers):
    """Send a request as the page does, except for what is given; return status, headers and content."""
    host = f"127.0.0.1:{server.server_port}"
    sent = {"Host": host, "Origin": f"http://{host}", "Content-Type": "application/json"} | headers
    content = json.dumps(given).encode() if body is None else body
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, f"/{token or server.token}/{path}", skip_host=True)
    for name, value in {"Content-Length": str(len(content)), **sent}.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(content)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_measured_outputs_are_those_of_the_ablated_model(served, place, source):
    study, run = source.study, coar.Run.open(place / "tiny.zarr")
    status, _, answer = ask(served, "measure", {"components": ABLATED})
    assert status == 200
    chosen = [(run.components[row], float(run.replacements[row])) for row in ABLATED]
    constants = {(component.site, component.position): value for component, value in chosen}
    expected = oracles.replaced_outputs(study.model, study.examples.inputs, study.examples.targets, constants)
    np.testing.assert_allclose(numbers(json.loads(answer)["output"]), expected, rtol=1e-4, atol=1e-4)


def test_the_page_is_served_with_its_data(served, place):
    status, headers, page = ask(served, "", method="GET", body=b"")
    assert status == 200
    shown = content(page.decode())
    assert shown["live"]
    assert shown["components"]["names"] == list(coar.Run.open(place / "tiny.zarr").components.names)
    assert "connect-src 'self'" in page.decode()
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert headers["Cache-Control"] == "no-store"
    assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")


def test_a_judged_edit_has_the_accuracies_of_the_edited_model(served, source, reports):
    _, _, answer = ask(served, "judge", {"components": ABLATED})
    table = json.loads(answer)["table"]
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
    status, _, _ = ask(served, "save", {"components": ABLATED, "name": "judged"})
    assert status == 200
    edited = coar.load_weights(source.study.model.__class__(), reports / "judged/edit.safetensors").eval()
    judge = source.judge()
    for name, net in (("before", source.study.model), ("after", edited)):
        right = net(judge.inputs).argmax(1) == judge.targets
        assert rows["all"][f"accuracy_{name}"] == pytest.approx(right.float().mean().item(), abs=1e-6)
        assert rows["7"][f"accuracy_{name}"] == pytest.approx(right[judge.targets == 7].float().mean().item(), abs=1e-6)
    assert rows["all"]["examples"] == len(judge)


def test_a_saved_edit_loads_applies_and_is_undone(served, source, place, reports):
    status, _, answer = ask(served, "save", {"components": ABLATED, "name": "mine"})
    files = [Path(file) for file in json.loads(answer)["files"]]
    assert status == 200
    assert [file.parent for file in files] == [reports / "mine"] * len(files)
    edit = coar.Edit.load(reports / "mine/edit.json")
    names = coar.Run.open(place / "tiny.zarr").components.names
    assert [component.name for component in edit.components] == [names[row] for row in ABLATED]
    restored = edit.undo(edit.apply(source.study.model)).state_dict()
    assert all(torch.equal(value, restored[name]) for name, value in source.study.model.state_dict().items())
    status, _, answer = ask(served, "save", {"components": [1], "name": "mine"})
    assert status == 422
    assert "exists; choose another name" in json.loads(answer)["error"]
    assert coar.Edit.load(reports / "mine/edit.json") == edit


def test_a_saved_edit_is_on_the_page_as_the_next_page_has_it(place, source, tmp_path):
    run = coar.Run.open(place / "tiny.zarr")
    server = serve_page(run, tmp_path, source, device="cpu")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    status, _, answer = ask(server, "save", {"components": ABLATED, "name": "by-hand"})
    task = json.loads(answer)["task"]
    served = content(ask(server, "", method="GET", body=b"")[2].decode())
    server.shutdown()
    server.server_close()
    thread.join()
    assert status == 200
    assert served["edits"]["tasks"] == [task]
    later = gather(run, tmp_path, source=source)["edits"]
    assert task.pop("judge") == later["judge"]
    assert [task] == later["tasks"]


REFUSED = {
    "wrong token": ({"token": "x" * 32}, 403, "wrong token"),
    "another origin": ({"Origin": "http://evil.example"}, 403, "another origin"),
    "no origin": ({"Origin": None}, 403, "another origin"),
    "another host": ({"Host": "evil.example", "Origin": "http://evil.example"}, 421, "another host"),
    "not JSON by its type": ({"Content-Type": "text/plain"}, 415, "must be JSON"),
    "not JSON": ({"body": b"{"}, 400, "not JSON"),
    "nested deeply": ({"body": b"[" * 100_000}, 400, "not JSON"),
    "too large": ({"Content-Length": str(LARGEST + 1)}, 413, "more than 1,000,000 bytes"),
    "a negative length": ({"Content-Length": "-1"}, 411, "length"),
    "a list": ({"given": [1]}, 400, "must have components"),
    "more than is asked for": ({"given": {"components": [1], "path": "/tmp"}}, 400, "must have components"),
    "no list": ({"given": {"components": 3}}, 400, "whole numbers"),
    "a fraction": ({"given": {"components": [1.5]}}, 400, "whole numbers"),
    "a boolean": ({"given": {"components": [True]}}, 400, "whole numbers"),
    "no component": ({"given": {"components": []}}, 422, "no component"),
    "a component twice": ({"given": {"components": [1, 1]}}, 422, "twice"),
    "a text that is none": ({"path": "complete", "given": {"components": [1], "text": 3}}, 400, "text must be a text"),
    "no text": ({"path": "read", "given": {"components": [1]}}, 400, "must have components and text"),
    "a text without a tokenizer": ({"path": "read", "given": {"components": [1], "text": "a"}}, 422, "no tokenizer"),
    "beyond the last": ({"given": {"components": [48]}}, 422, "which has 48, counted from 0"),
    "before the first": ({"given": {"components": [-1]}}, 422, "not on the page"),
    "another request": ({"path": "measure/../save"}, 404, "no such request"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_requests_that_are_refused(served, kind):
    options, expected, words = REFUSED[kind]
    options = {"path": "measure", "given": {"components": [1]}} | options
    status, _, answer = ask(served, options.pop("path"), **options)
    assert status == expected
    assert words in json.loads(answer)["error"]


@pytest.mark.parametrize("name", ["../mine", "a/b", "", ".", "a b", "x" * 41, "mine\n", "C:mine"])
def test_nothing_is_written_elsewhere(served, reports, name):
    before = sorted(reports.parent.rglob("*"))
    status, _, answer = ask(served, "save", {"components": [1], "name": name})
    assert status == 422
    assert "up to 40 letters" in json.loads(answer)["error"]
    assert sorted(reports.parent.rglob("*")) == before


def test_another_machine_cannot_reach_the_page(served):
    """The socket is bound to the loopback address alone."""
    assert served.socket.getsockname()[0] == "127.0.0.1"


def test_pages_that_are_refused(served):
    for path, options, expected in (
        ("", {"token": "wrong"}, 403),
        ("", {"Host": "evil.example"}, 421),
        ("other", {}, 404),
    ):
        status, _, answer = ask(served, path, method="GET", body=b"", **options)
        assert status == expected
        assert b"<" not in answer


def test_a_run_without_a_fit_and_a_taken_port_are_refused(served, place, source, tmp_path):
    bare = make(tmp_path / "r.zarr", linear(weights()), masks=20)
    with pytest.raises(RunError, match="has no fit, so nothing can be predicted"):
        serve_page(bare, tmp_path, source)
    with pytest.raises(SettingsError, match=f"port {served.server_port} of 127.0.0.1 is taken; choose another port"):
        serve_page(coar.Run.open(place / "tiny.zarr"), tmp_path, source, port=served.server_port)


def test_a_pipeline_without_judging_examples_measures_and_does_not_judge(place, source, tmp_path):
    server = serve_page(coar.Run.open(place / "tiny.zarr"), tmp_path, Source(source.study), device="cpu")
    assert server.live.measure([1])["output"]["shape"] == [len(source.study.examples)]
    with pytest.raises(SettingsError, match="no judging examples"):
        server.live.judge([1])
    server.server_close()


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
@pytest.mark.parametrize("browser", [True, False], ids=["with a browser", "without one"])
def test_the_command_prints_the_address_and_stops_with_an_interrupt(place, tmp_path, browser):
    """Where no browser is found it says how to reach the page from another machine."""
    shutil.copytree(place / "tiny.zarr", tmp_path / "tiny.zarr")
    words = ["explore", str(tmp_path / "tiny.zarr"), "--pipeline", str(place / "tiny.py"), "--device", "cpu"]
    command = [sys.executable, "-u", "-c", "from coar.cli import main; main()", *words, "--out", str(tmp_path / "out")]
    bare = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")}
    environment = bare | ({"BROWSER": "firefox"} if browser else {"PATH": ""})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        port, token = process.stdout.readline().split("127.0.0.1:")[1].split("/")[:2]
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=20)
        connection.request("GET", f"/{token}/")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert "stopped" in rest
    assert (f"ssh -L {port}:127.0.0.1:{port} " in rest) == ("'coar report' writes the page" in rest) == (not browser)
