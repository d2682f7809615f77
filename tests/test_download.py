"""Downloads from a real server that misbehaves."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pytest
from test_cache import full_disk

from lit_offrl.data import sources
from lit_offrl.data.download import download, host_answers, secure
from lit_offrl.data.sources.d4rl import D4RL_FILES, known_digests
from lit_offrl.errors import UserError

CONTENT = np.random.default_rng(0).bytes(3_000_000)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append(asked)
        if server.status != 200:
            self.send_error(server.status)
            return
        same = server.versions[0] == self.headers.get("If-Range")
        begin = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.knows_ranges and same else 0
        body = server.content[begin:]
        if asked and server.knows_ranges and not body:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header(server.version_header, server.versions[0])
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(server.content) - 1}/{len(server.content)}")
        self.end_headers()
        sent = body if server.drops <= 0 else body[: server.bytes_per_drop]
        server.drops -= 1
        self.wfile.write(sent)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    content = CONTENT
    status = 200
    knows_ranges = True
    drops = 0  # how many connections break after `bytes_per_drop` bytes
    bytes_per_drop = 1_000_000
    version_header = "ETag"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str | None] = []
        self.versions = ['"one"']
        self.url = f"http://127.0.0.1:{self.server_port}/folder/data.hdf5"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_arrives(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    download(server.url, tmp_path / "new" / "data.hdf5")
    assert (tmp_path / "new" / "data.hdf5").read_bytes() == CONTENT
    assert names(tmp_path / "new") == ["data.hdf5"]
    assert server.requests == [None]
    assert "data.hdf5: 100%" in capsys.readouterr().err


def test_it_goes_on_where_the_connection_broke(server: Server, tmp_path: Path):
    server.drops = 1
    download(server.url, tmp_path / "data.hdf5")
    assert (tmp_path / "data.hdf5").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=1000000-"]


def test_a_later_call_goes_on_too(server: Server, tmp_path: Path):
    server.drops, server.bytes_per_drop = 3, 500_000
    (tmp_path / "other.hdf5").write_bytes(b"finished")
    with pytest.raises(UserError, match=r"broke after 1500000 of 3000000 bytes.*try again.*put the file into") as error:
        download(server.url, tmp_path / "data.hdf5")
    assert "\n" not in str(error.value)
    assert server.url in str(error.value)
    assert names(tmp_path) == ["data.hdf5.part", "data.hdf5.part.version", "other.hdf5"]
    assert (tmp_path / "other.hdf5").read_bytes() == b"finished"
    download(server.url, tmp_path / "data.hdf5")
    assert (tmp_path / "data.hdf5").read_bytes() == CONTENT
    assert names(tmp_path) == ["data.hdf5", "other.hdf5"]
    assert server.requests[-1] == "bytes=1500000-"


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path):
    server.drops, server.knows_ranges = 1, False
    download(server.url, tmp_path / "data.hdf5")
    assert (tmp_path / "data.hdf5").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=1000000-"]


def test_a_part_that_is_already_whole(server: Server, tmp_path: Path):
    (tmp_path / "data.hdf5.part").write_bytes(CONTENT)
    download(server.url, tmp_path / "data.hdf5")
    assert (tmp_path / "data.hdf5").read_bytes() == CONTENT


def test_a_part_that_is_too_long_starts_again(server: Server, tmp_path: Path):
    (tmp_path / "data.hdf5.part").write_bytes(CONTENT + b"more")
    download(server.url, tmp_path / "data.hdf5")
    assert (tmp_path / "data.hdf5").read_bytes() == CONTENT


@pytest.mark.parametrize("header", ["ETag", "Last-Modified"])
def test_a_part_of_another_version_starts_again(server: Server, tmp_path: Path, header: str):
    server.drops, server.bytes_per_drop, server.version_header = 3, 500_000, header
    with pytest.raises(UserError, match="broke after"):
        download(server.url, tmp_path / "data.hdf5")
    server.content, server.versions[0] = CONTENT[::-1], '"two"'
    download(server.url, tmp_path / "data.hdf5")
    assert (tmp_path / "data.hdf5").read_bytes() == CONTENT[::-1]


def test_a_part_of_which_nothing_is_known_starts_again(server: Server, tmp_path: Path):
    (tmp_path / "data.hdf5.part").write_bytes(b"x" * 1000)
    download(server.url, tmp_path / "data.hdf5")
    assert (tmp_path / "data.hdf5").read_bytes() == CONTENT


def test_a_file_that_is_not_the_known_one_is_refused(server: Server, tmp_path: Path):
    known = hashlib.sha256(CONTENT).hexdigest()
    server.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(UserError, match=r"has the digest .*, not the known"):
        download(server.url, tmp_path / "data.hdf5", len(CONTENT), known)
    server.content = CONTENT[:-1]
    with pytest.raises(UserError, match="has 2,999,999 bytes, not the known 3,000,000"):
        download(server.url, tmp_path / "data.hdf5", len(CONTENT), known)
    assert names(tmp_path) == []
    server.content = CONTENT
    download(server.url, tmp_path / "data.hdf5", len(CONTENT), known)
    assert names(tmp_path) == ["data.hdf5"]


def test_known_digests_are_those_of_files_of_d4rl():
    assert len(known_digests()) == 97
    assert set(known_digests()) < set(D4RL_FILES.values())
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for _, digest in known_digests().values())


def test_https_is_used_where_the_host_has_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lit_offrl.data.download.host_answers", lambda url: "with.example" in url)
    assert secure("http://with.example/a.hdf5") == "https://with.example/a.hdf5"
    assert secure("http://without.example/a.hdf5") == "http://without.example/a.hdf5"
    assert secure("https://without.example/a.hdf5") == "https://without.example/a.hdf5"
    assert secure("http://with.example:8000/a.hdf5") == "http://with.example:8000/a.hdf5"


@pytest.mark.parametrize("status", [404, 403, 503])
def test_a_file_that_is_not_there(server: Server, tmp_path: Path, status: int):
    server.status = status
    with pytest.raises(UserError, match=f"answers {status} .* is missing: put the file into") as error:
        download(server.url, tmp_path / "data.hdf5")
    assert "\n" not in str(error.value)
    assert names(tmp_path) == []


def test_a_full_disk(server: Server, tmp_path: Path):
    with full_disk(100_000), pytest.raises(UserError, match="could not be downloaded to"):
        download(server.url, tmp_path / "data.hdf5")
    assert not (tmp_path / "data.hdf5").exists()
    download(server.url, tmp_path / "data.hdf5")
    assert (tmp_path / "data.hdf5").read_bytes() == CONTENT


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be downloaded to"):
        download(server.url, tmp_path / "file" / "data.hdf5")


def test_a_host_that_does_not_answer(tmp_path: Path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/data.hdf5"
        begin = time.monotonic()
        with pytest.raises(UserError, match="cannot be reached: put the file into"):
            download(url, tmp_path / "data.hdf5")
    assert not host_answers("http://no-such-host.invalid/data.hdf5")
    assert time.monotonic() - begin < 10
    assert names(tmp_path) == []


def test_several_processes_want_the_same_file(server: Server, tmp_path: Path):
    threads = [threading.Thread(target=download, args=(server.url, tmp_path / "data.hdf5")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "data.hdf5").read_bytes() == CONTENT
    assert names(tmp_path) == ["data.hdf5"]
    assert server.requests == [None]


def test_a_d4rl_dataset_comes_from_a_mirror(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with h5py.File(tmp_path / "source.hdf5", "w") as file:
        file["observations"] = np.arange(30.0).reshape(10, 3)
        file["actions"] = np.zeros((10, 2))
        file["rewards"] = np.arange(10.0)
        file["terminals"] = np.zeros(10, bool)
        file["timeouts"] = np.arange(10) == 4
    server.content = (tmp_path / "source.hdf5").read_bytes()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "datasets"))
    monkeypatch.setenv("LIT_OFFRL_D4RL_URL", f"http://127.0.0.1:{server.server_port}/mirror")
    for _ in range(2):
        transitions, info = sources.load("relocate-human-v1")
        assert transitions.rewards.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert info.path == tmp_path / "datasets" / "relocate-human-v1.hdf5"
    assert info.metadata["url"].endswith("/mirror/hand_dapg_v1/relocate-human-v1.hdf5")
    assert server.requests == [None], "downloaded once"
    with pytest.raises(UserError, match="not the known 152,756,557"):
        sources.load("hopper-medium-v2")
