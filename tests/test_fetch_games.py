import hashlib
import importlib.util
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CONTENT = b"a story" * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()


def load_script():
    path = Path(__file__).resolve().parents[1] / "scripts" / "fetch_games.py"
    spec = importlib.util.spec_from_file_location("fetch_games", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fetch_games = load_script()


class Server(ThreadingHTTPServer):
    """Serves one behaviour for each path; counts the requests."""

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
        answer = getattr(self, "answer_" + name.removesuffix(".z5"), None)
        if answer is None:
            self.send_error(404)
        else:
            answer()

    def log_message(self, *_):
        pass

    def send(self, content: bytes, announced: int | None = None):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if announced is None else announced))
        self.end_headers()
        self.wfile.write(content)

    def answer_good(self):
        self.send(CONTENT)

    def answer_also(self):
        self.send(CONTENT)

    def answer_wrong(self):
        self.send(b"<html>something else</html>")

    def answer_short(self):
        self.send(CONTENT[:100], announced=len(CONTENT))

    def answer_flaky(self):
        if len(self.server.requests) < 3:
            self.send_error(503)
        else:
            self.send(CONTENT)

    def answer_huge(self):
        self.send(b"x" * (2 << 20))

    def answer_stalls(self):
        self.server.released.wait(30)

    def answer_drips(self):
        self.send(b"", announced=len(CONTENT))
        while not self.server.released.wait(0.1):
            self.wfile.write(b"x")


@pytest.fixture
def server(monkeypatch):
    names = ["good", "also", "wrong", "short", "flaky", "huge", "stalls", "drips", "missing"]
    monkeypatch.setattr(fetch_games, "supported_games", lambda: {f"{name}.z5": MD5 for name in names})
    monkeypatch.setattr(fetch_games.time, "sleep", lambda _: None)  # the pause between two tries
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def run(server, folder: Path, *arguments: str) -> int:
    return fetch_games.main([*arguments, "--to", str(folder), "--base-url", server.url, "--timeout", "0.5"])


def test_good_file_is_fetched_once(server, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert run(server, folder, "good.z5") == 0
    assert (folder / "good.z5").read_bytes() == CONTENT
    assert (folder / "good.z5").stat().st_mode & 0o777 == 0o644
    assert "good.z5: fetched" in capsys.readouterr().out
    assert run(server, folder, "good.z5") == 0
    assert "already there" in capsys.readouterr().out
    assert server.requests == ["/suite/good.z5"]
    assert [file.name for file in folder.iterdir()] == ["good.z5"]


def test_wrong_file_is_replaced_by_a_right_one(server, tmp_path):
    (tmp_path / "good.z5").write_bytes(b"another release")
    assert run(server, tmp_path, "good.z5") == 0
    assert (tmp_path / "good.z5").read_bytes() == CONTENT


def test_wrong_checksum_is_not_kept(server, tmp_path, capsys):
    (tmp_path / "wrong.z5").write_bytes(b"what was there")
    assert run(server, tmp_path, "wrong.z5") == 2
    message = capsys.readouterr().err
    assert MD5 in message
    assert hashlib.md5(b"<html>something else</html>").hexdigest() in message
    assert (tmp_path / "wrong.z5").read_bytes() == b"what was there"
    assert [file.name for file in tmp_path.iterdir()] == ["wrong.z5"]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("name", "words", "requests"),
    [
        ("missing.z5", "404", 1),
        ("short.z5", "6900 bytes too early", 3),
        ("huge.z5", "no story file", 3),
        ("stalls.z5", "timed out", 3),
        ("drips.z5", "not finished after 0.5 s", 3),
    ],
)
def test_failures(server, tmp_path, capsys, name, words, requests):
    began = time.monotonic()
    assert run(server, tmp_path, name) == 2
    assert time.monotonic() - began < 5
    message = capsys.readouterr().err
    assert words in message
    assert f"{server.url}/{name}" in message
    assert "--base-url" in message
    assert not list(tmp_path.iterdir())
    assert len(server.requests) == requests


def test_server_that_recovers(server, tmp_path):
    assert run(server, tmp_path, "flaky.z5") == 0
    assert len(server.requests) == 3


def test_one_failure_does_not_stop_the_others(server, tmp_path, capsys):
    assert run(server, tmp_path, "wrong.z5", "good.z5", "nonsense.z5", "also.z5") == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["also.z5", "good.z5"]
    assert capsys.readouterr().err.count("error:") == 2


def test_all_asks_for_every_name(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_games, "supported_games", lambda: {"good.z5": MD5, "also.z5": MD5})
    assert run(server, tmp_path, "--all") == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["also.z5", "good.z5"]


def test_nobody_answers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fetch_games.time, "sleep", lambda _: None)
    with Server() as closed:
        url = closed.url
    arguments = ["zork1.z5", "--to", str(tmp_path), "--base-url", url]
    assert fetch_games.main(arguments) == 2
    assert "refused" in capsys.readouterr().err
    assert fetch_games.main([*arguments[:-1], "not a url"]) == 2
    assert "not a url/zork1.z5" in capsys.readouterr().err


def test_folder_that_cannot_be_written(server, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(server, tmp_path / "file", "good.z5") == 2
    assert "--to DIR" in capsys.readouterr().err


def test_names(capsys):
    assert fetch_games.main(["zork4.z5"]) == 2
    assert "Did you mean 'zork" in capsys.readouterr().err
    assert fetch_games.main(["--list"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == 57
    assert "zork1.z5" in names


@pytest.mark.parametrize("arguments", [[], ["--all", "zork1.z5"], ["zork1.z5", "--tries", "0"], ["zork1.z5", "--nope"]])
def test_bad_command_lines(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        fetch_games.main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_default_folder_is_the_one_that_games_are_looked_up_in(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch_games._parse(["zork1.z5"]).to == tmp_path / "priorzero" / "games"
