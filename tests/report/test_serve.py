import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from report_runs import append, small_run, train_entry

from igla_mega.config.errors import ConfigError
from igla_mega.report import serve
from igla_mega.report.serve import open_server


@pytest.fixture
def served(tmp_path):
    with open_server([small_run(tmp_path)], port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server, tmp_path
        server.shutdown()


def ask(server, path, *, host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    if host != "":
        connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
    connection.endheaders()
    answer = connection.getresponse()
    return answer, answer.read()


def test_the_page_and_what_is_new_are_served_and_nothing_else(served):
    server, folder = served
    answer, page = ask(server, "/")
    assert answer.status == 200 and b'"live":true' in page
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff" and "Python" not in answer.headers["Server"]
    news = json.loads(ask(server, "/data?since=")[1])
    append(folder / "metrics.jsonl", train_entry(201))
    later = json.loads(ask(server, f"/data?since={news['runs'][0]['since']}")[1])
    assert later["runs"][0]["first"] == 200 and later["runs"][0]["rows"]["rows"] == 1
    for path in (
        "/metrics.jsonl",
        "/../metrics.jsonl",
        "/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/report.html",
        "/data/x",
    ):
        assert ask(server, path)[0].status == 404, path
    assert ask(server, "/", method="POST")[0].status == 501
    answer, content = ask(server, "/", method="HEAD")
    assert answer.status == 200 and content == b""


@pytest.mark.parametrize(
    "host", ["", "evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "[::1", "a b"]
)
def test_a_name_of_elsewhere_is_not_answered(served, host):
    for path in ("/", "/data"):
        answer, content = ask(served[0], path, host=host)
        assert answer.status in (400, 403) and b"loss" not in content


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1:9", "[::1]:80", "10.0.0.7"])
def test_its_own_addresses_are_answered_also_behind_a_tunnel(served, host):
    assert ask(served[0], "/data", host=host)[0].status == 200


def test_a_port_in_use_is_refused_with_the_next_free_one(tmp_path):
    folder = small_run(tmp_path)
    with open_server([folder], port=0) as first:
        port = first.server_port
        with pytest.raises(
            ConfigError, match=rf"--port {port}: already in use on 127.0.0.1.\n  .*--port (\d+)"
        ) as refusal:
            open_server([folder], port=port)
        free = int(str(refusal.value).rstrip(".").rsplit(" ", 1)[1])
        with open_server([folder], port=free) as second:
            assert second.server_port == free


def test_a_host_that_is_not_this_machines_is_refused(tmp_path):
    folder = small_run(tmp_path)
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1: .*not an address of this machine"):
        open_server([folder], host="192.0.2.1", port=0)
    for host in ("no such host", "", "[]", "a..b", "a\0b", "x" * 300):
        with pytest.raises(ConfigError, match="--host"):
            open_server([folder], host=host, port=0)


def test_a_server_outlives_browsers_that_go_away_in_the_middle(served):
    server, _ = served
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.server_port)) as one:
            one.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert ask(server, "/data")[0].status == 200


def test_clients_that_send_a_byte_now_and_then_do_not_hold_all_places(served, monkeypatch):
    monkeypatch.setattr(serve, "REQUEST_SECONDS", 0.5)
    server, _ = served
    slow = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(serve.MAX_CONNECTIONS + 10)]
    stop = threading.Event()

    def drip():
        while not stop.wait(0.1):
            for one in slow:
                with contextlib.suppress(OSError):
                    one.sendall(b"G")

    dripping = threading.Thread(target=drip, daemon=True)
    dripping.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if ask(server, "/data")[0].status == 200:
                break
        time.sleep(0.1)
    else:
        pytest.fail("no place became free")
    stop.set()
    dripping.join()
    for one in slow:
        one.close()


def command(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "igla_mega", "report", *map(str, words)], text=True, stdout=-1, stderr=-1
    )


def test_ctrl_c_ends_the_server_without_a_traceback(tmp_path):
    process = command(small_run(tmp_path), "--serve", "--port", "0")
    line = process.stdout.readline()
    assert "http://127.0.0.1:" in line
    os.kill(process.pid, signal.SIGINT)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and said.strip() == "stopped" and errors == ""


def test_the_verb_takes_several_runs_after_compare(tmp_path):
    runs = [small_run(tmp_path / name, steps=20) for name in ("a", "b", "c")]
    process = command(runs[0], "--compare", runs[1], runs[2])
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and said.strip() == str(runs[0] / "report.html"), errors
    page = (runs[0] / "report.html").read_text()
    assert all(f'"name":"{name}"' in page for name in "abc")


def test_a_mistake_of_the_user_is_words_and_exit_code_2(tmp_path):
    process = command(tmp_path / "absent")
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "no such folder" in errors and "Traceback" not in errors and said == ""
