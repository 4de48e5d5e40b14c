"""Tests of scripts/fetch_games.py with a local server that misbehaves."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fetch_games
import pytest

CONTENT = b"a story" * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Records the requests. Each path has its own behaviour, see ``Handler``."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/suite"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        name = self.path.removeprefix("/suite/")
        reply = getattr(self, "reply_" + name.removesuffix(".z5"), None)
        if reply is None:
            self.send_error(404)
        else:
            reply()

    def log_message(self, *_):
        pass

    def send(self, content: bytes, announced: int | None = None):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if announced is None else announced))
        self.end_headers()
        self.wfile.write(content)

    def reply_good(self):
        self.send(CONTENT)

    reply_also = reply_good

    def reply_wrong(self):
        self.send(b"<html>something else</html>")

    def reply_short(self):
        self.send(CONTENT[:100], announced=len(CONTENT))

    def reply_flaky(self):
        if len(self.server.requests) < 3:
            self.send_error(503)
        else:
            self.send(CONTENT)

    def reply_huge(self):
        self.send(b"x" * (2 << 20))

    def reply_stalls(self):
        self.server.released.wait(30)

    def reply_drips(self):
        self.send(b"", announced=len(CONTENT))
        while not self.server.released.wait(0.1):
            self.wfile.write(b"x")


@pytest.fixture
def server(monkeypatch):
    names = ["good", "also", "wrong", "short", "flaky", "huge", "stalls", "drips", "missing"]
    monkeypatch.setattr(fetch_games, "supported_games", lambda: {f"{name}.z5": MD5 for name in names})
    monkeypatch.setattr(fetch_games.time, "sleep", lambda _: None)  # no pause between two attempts
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def run(server, folder: Path, *arguments: str, timeout_s: float = 5.0) -> int:
    url = ["--base-url", server.url, "--timeout", str(timeout_s)]
    return fetch_games.main([*arguments, "--to", str(folder), *url])


def test_fetch_games_downloads_a_file_once(server, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert run(server, folder, "good.z5") == 0
    assert (folder / "good.z5").read_bytes() == CONTENT
    assert (folder / "good.z5").stat().st_mode & 0o777 == 0o644
    assert "good.z5: downloaded" in capsys.readouterr().out
    assert run(server, folder, "good.z5") == 0
    assert "already exists" in capsys.readouterr().out
    assert server.requests == ["/suite/good.z5"]
    assert [file.name for file in folder.iterdir()] == ["good.z5"]


def test_fetch_games_replaces_a_file_with_a_wrong_checksum(server, tmp_path):
    (tmp_path / "good.z5").write_bytes(b"another release")
    assert run(server, tmp_path, "good.z5") == 0
    assert (tmp_path / "good.z5").read_bytes() == CONTENT


def test_fetch_games_keeps_no_download_with_a_wrong_checksum(server, tmp_path, capsys):
    (tmp_path / "wrong.z5").write_bytes(b"existing file")
    assert run(server, tmp_path, "wrong.z5") == 2
    message = capsys.readouterr().err
    assert MD5 in message
    assert hashlib.md5(b"<html>something else</html>").hexdigest() in message
    assert (tmp_path / "wrong.z5").read_bytes() == b"existing file"
    assert [file.name for file in tmp_path.iterdir()] == ["wrong.z5"]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("name", "reason", "requests"),
    [
        ("missing.z5", "404", 1),
        ("short.z5", "6900 bytes are missing", 3),
        ("huge.z5", "not a story file", 3),
        ("stalls.z5", "timed out", 3),
        ("drips.z5", "not finished after 0.2 s", 3),
    ],
)
def test_fetch_games_reports_network_failures(server, tmp_path, capsys, name, reason, requests):
    began = time.monotonic()
    timeout_s = 0.2 if name in ("stalls.z5", "drips.z5") else 5.0
    assert run(server, tmp_path, name, timeout_s=timeout_s) == 2
    assert time.monotonic() - began < 5
    message = capsys.readouterr().err
    assert reason in message
    assert f"{server.url}/{name}" in message
    assert "--base-url" in message
    assert not list(tmp_path.iterdir())
    assert len(server.requests) == requests


def test_fetch_games_retries_until_the_server_recovers(server, tmp_path):
    assert run(server, tmp_path, "flaky.z5") == 0
    assert len(server.requests) == 3


def test_fetch_games_downloads_the_other_files_after_a_failure(server, tmp_path, capsys):
    assert run(server, tmp_path, "wrong.z5", "good.z5", "nonsense.z5", "also.z5") == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["also.z5", "good.z5"]
    assert capsys.readouterr().err.count("error:") == 2


def test_fetch_games_downloads_all_files(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_games, "supported_games", lambda: {"good.z5": MD5, "also.z5": MD5})
    assert run(server, tmp_path, "--all") == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["also.z5", "good.z5"]


def test_fetch_games_reports_a_refused_connection_and_a_bad_url(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fetch_games.time, "sleep", lambda _: None)
    with Server() as closed:
        url = closed.url
    arguments = ["zork1.z5", "--to", str(tmp_path), "--base-url", url]
    assert fetch_games.main(arguments) == 2
    assert "refused" in capsys.readouterr().err
    assert fetch_games.main([*arguments[:-1], "not a url"]) == 2
    assert "not a url/zork1.z5" in capsys.readouterr().err


def test_fetch_games_reports_a_folder_that_is_not_writable(server, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(server, tmp_path / "file", "good.z5") == 2
    assert "--to DIR" in capsys.readouterr().err


def test_fetch_games_lists_and_suggests_names(capsys):
    assert fetch_games.main(["zork4.z5"]) == 2
    assert "Did you mean 'zork" in capsys.readouterr().err
    assert fetch_games.main(["--list"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == 57
    assert "zork1.z5" in names


@pytest.mark.parametrize("arguments", [[], ["--all", "zork1.z5"], ["zork1.z5", "--tries", "0"], ["zork1.z5", "--nope"]])
def test_fetch_games_refuses_bad_command_lines(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        fetch_games.main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_fetch_games_default_folder_is_the_cache_folder(server, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch_games.main(["good.z5", "--base-url", server.url]) == 0
    assert (tmp_path / "priorzero" / "games" / "good.z5").is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", "x" * 300)
    assert fetch_games.main(["good.z5", "--base-url", server.url]) == 2
    assert "error: XDG_CACHE_HOME=xxx" in capsys.readouterr().err


def test_fetch_games_expands_the_home_folder(server, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(server, "~/games", "good.z5") == 0 and (tmp_path / "games" / "good.z5").is_file()
