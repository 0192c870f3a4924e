"""`jsfdd watch`: figures of a run that is being written, and the server that shows them."""

import http.client
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_report import write_run

from jsfdd.commands.cli import main
from jsfdd.report.live import read_live, seconds_left
from jsfdd.report.live_page import render_live
from jsfdd.report.serve import make_server


def _note(run: Path, step: int, steps: int = 40, **figures) -> None:
    """One more line in both logs, as a training writes them."""
    run.mkdir(parents=True, exist_ok=True)
    timing = {"step": step, "steps": steps, "seconds": 5.0, "compiling": 0.0, "tokens_per_second": 812.5}
    with (run / "metrics.jsonl").open("a") as metrics, (run / "timings.jsonl").open("a") as timings:
        metrics.write(json.dumps({"step": step, "epoch": 0, "loss": 3.0 - step / 20}) + "\n")
        if figures:
            metrics.write(json.dumps({"step": step, "epoch": 0} | figures) + "\n")
        timings.write(json.dumps(timing) + "\n")


def test_a_training_is_read_as_far_as_its_lines_are_whole(tmp_path):
    run = tmp_path / "draft"
    (run / "checkpoints").mkdir(parents=True)
    (training,) = read_live(run).trainings
    assert training.step == 0 and training.loss is None and not training.finished
    _note(run, 10, probe={"tau": 1.4})
    _note(run, 20, probe={"tau": 1.3}, held_out={"loss": 2.0, "acceptance": 0.25})
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 30, "lo')  # still being written
    live = read_live(run)
    (training,) = live.trainings
    assert (training.step, training.steps, training.loss) == (20, 40, 2.0)
    assert (training.tau, training.best_tau, training.tokens_per_second) == (1.3, 1.4, 812.5)
    assert training.seconds_left == 10.0 and live.doing == "training draft: step 20 of 40, 10 s left"
    assert training.curve == ([10, 20], [2.5, 2.0]) and training.tau_curve == ([10, 20], [1.4, 1.3])
    assert json.loads(json.dumps(live.to_json()))["trainings"][0]["loss"] == 2.0


def test_the_pace_is_of_the_last_lines_and_without_compiling():
    slow = [{"step": 10, "seconds": 900.0}]
    lines = slow + [{"step": 10 * i, "seconds": 5.0, "compiling": 3.0} for i in range(2, 8)]
    assert seconds_left(lines, 100) == 30 * 2.0 / 10


def test_a_run_says_what_it_does_now(tmp_path):
    run = tmp_path / "<b>run"
    run.mkdir()
    for name, value in (("run", {}), ("config", {"arms": ["full", "random"]})):
        (run / f"{name}.json").write_text(json.dumps(value))
    assert read_live(run).doing == "loading the target"
    (run / "seconds.json").write_text(json.dumps({"load": 2.0, "score": 60.0, "hidden": 0.0, "soft_targets": 9.0}))
    assert read_live(run).doing == "about to train"
    _note(run / "arms" / "full", 40)
    _note(run / "arms" / "random", 10)
    live = read_live(run)
    assert live.doing == "training random: step 10 of 40, 15 s left" and not live.finished
    page = render_live(live)
    assert (
        "<b>run" not in page
        and "&lt;b&gt;run" in page
        and "<td>60.0</td>" in page
        and 'alt="Loss: full from 1.00 to 1.00; random from' in page
    )
    _note(run / "arms" / "random", 40)
    assert read_live(run).doing == "evaluating"


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: None, "no such directory"),
        (lambda path: path.write_text("x"), "not a directory"),
        (lambda path: path.mkdir(), "no run in it"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, capsys, make, words):
    make(tmp_path / "it")
    assert main(["watch", str(tmp_path / "it")]) == 2
    assert f"{tmp_path / 'it'}: {words}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file, text, words",
    [
        ("arms/full/metrics.jsonl", "5\n", r"metrics.jsonl:1: 5 is not an object"),
        ("arms/full/metrics.jsonl", '{"step": 1, "probe": 3}\n', r"metrics.jsonl: probe.tau is None"),
        ("arms/full/timings.jsonl", '{"step": 1, "steps": 1e400, "seconds": 2.0}\n', r"timings.jsonl:1: steps is inf"),
        ("arms/full/timings.jsonl", '{"seconds": 2.0}\n', r"timings.jsonl:1: step is None"),
        ("config.json", "{}", "config.json: arms is None"),
        ("config.json", '{"arms": "full"}', "config.json: arms is 'full'"),
        ("seconds.json", '{"load": "a"}', "seconds.json: load is 'a'"),
    ],
)
def test_files_of_other_versions_and_damaged_ones_are_named(tmp_path, file, text, words):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"arms": ["full"]}')
    _note(tmp_path / "arms/full", 10)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_live(tmp_path)


def test_a_training_without_rates_or_with_a_loss_that_is_none_any_more(tmp_path):
    (tmp_path / "timings.jsonl").write_text('{"step": 10, "seconds": 2.0}\n')
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": NaN}\n')
    live = read_live(tmp_path)
    assert live.doing.endswith(": step 10") and "NaN" not in render_live(live)
    assert json.loads(json.dumps(live.to_json(), allow_nan=False))["trainings"][0]["loss"] is None


def _get(port: int, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.mark.slow
def test_the_page_follows_a_training_and_ends_with_the_report(tmp_path, capsys):
    run = tmp_path / "draft"
    _note(run, 10)
    command = [sys.executable, "-m", "jsfdd.commands.cli", "watch", str(run), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as watch:
        try:
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", watch.stderr.readline())[1])
            status, page = _get(port, "/")
            assert status == 200 and "training draft: step 10 of 40" in page.lower() and "<td>2.500</td>" in page
            for step in (20, 30, 40):
                _note(run, step)
                numbers = json.loads(_get(port, "/numbers.json")[1])
                assert numbers["trainings"][0]["step"] == step and numbers["trainings"][0]["loss"] == 3.0 - step / 20
            assert "Finished." in _get(port, "/live")[1] and numbers["finished"]
            assert _get(port, "/", "example.com:80")[0] == 403  # another site's name for this address
            assert _get(port, "/../metrics.jsonl")[0] == 404
            (run / "timings.jsonl").write_text("{\n")
            assert _get(port, "/live")[0] == 503
            assert main(["watch", str(run), "--port", str(port)]) == 2
            assert f"--port {port}: another program listens there" in capsys.readouterr().err
        finally:
            watch.send_signal(signal.SIGINT)
        begin = time.monotonic()
        assert watch.wait(20) == 130 and time.monotonic() - begin < 5


def test_hosts_without_a_port_and_browsers_that_leave(tmp_path, capfd):
    _note(tmp_path, 10)
    with make_server(tmp_path, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert [_get(server.server_port, "/live", host)[0] for host in ("127.0.0.1", "LOCALHOST:1")] == [200, 200]
        refused = ("127.0.0.1.example.com:1", "example.com", ":1")
        assert [_get(server.server_port, "/live", host)[0] for host in refused] == [403] * 3
        request = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n".encode()
        for requests in (0, 20):
            with socket.create_connection(server.server_address) as browser:
                browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
                browser.sendall(requests * request)
        assert _get(server.server_port, "/live")[0] == 200
        time.sleep(0.2)
        server.shutdown()
    assert "Traceback" not in capfd.readouterr().err


def test_a_finished_run_is_shown_as_its_report(tmp_path):
    run = write_run(tmp_path / "run", num_samples=20, num_prompts=5)
    (run / "run.json").write_text("{}")
    with make_server(run, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        status, page = _get(server.server_port, "/")
        server.shutdown()
    assert status == 200 and "<h2>What it cost</h2>" in page
