"""`cacheroute pull` against a stand-in of the hub on this machine: resume, checksums, shards, and error messages."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cacheroute.errors import CacherouteError, UsageError
from cacheroute.model import catalogue, pull

pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MB = 1000**2


class Hub(ThreadingHTTPServer):
    """The parts of the hub that a download needs. `files` by "owner/repo" and name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.wrong: set[str] = set()  # names that are sent with a wrong byte
        self.cut: list[int] = []  # bytes after which the next transfers are cut off
        self.stall: threading.Event | None = None  # a cut transfer waits for it instead
        self.stalled = threading.Event()
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.tokens: set[str | None] = set()
        self.status: int | None = None  # answer everything with it
        self.gated = False

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def ranges(self) -> list[str | None]:
        """The Range of every transfer of a GGUF, in order."""
        return [r for method, path, r in self.requests if method == "GET" and ".gguf" in path]


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Range")))
        hub.tokens.add(self.headers.get("Authorization"))
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.*)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        repository = (info or file)[1] if info or file else ""  # type: ignore[index]
        if hub.status:
            self.reply(hub.status, b"")
        elif hub.gated:
            self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        elif repository not in hub.files:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif info:
            siblings = [self.sibling(name, data) for name, data in hub.files[repository].items()]
            body = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        elif file and file[2] in hub.files[repository]:
            self.send_file(file[2], hub.files[repository][file[2]])
        else:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})

    @staticmethod
    def sibling(name: str, data: bytes) -> dict[str, object]:
        if not name.endswith(".gguf"):
            return {"rfilename": name, "size": len(data), "blobId": "0" * 40}
        lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {"rfilename": name, "size": len(data), "blobId": "0" * 40, "lfs": lfs}

    def send_file(self, name: str, data: bytes) -> None:
        hub = self.server
        digest = hashlib.sha256(data).hexdigest()
        start = int(m[1]) if (m := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        headers = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(data)),
            "ETag": f'"{digest}"',
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if name in hub.wrong:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if self.command == "GET" and hub.cut:
            cut = hub.cut.pop(0)
            self.reply(206 if start else 200, body, headers, send=cut)
            if hub.stall:
                hub.stalled.set()
                hub.stall.wait(20)
            self.close_connection = True
            self.connection.close()
        else:
            self.reply(206 if start else 200, body, headers)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, send: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:send])
            self.wfile.flush()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # the library waits a second before it takes up a transfer again
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    yield server
    if server.stall:
        server.stall.set()
    server.shutdown()
    thread.join()
    server.server_close()


def data_of(size: int, seed: int = 1) -> bytes:
    return b"GGUF" + hashlib.shake_128(bytes([seed])).digest(1000) * (size // 1000)


def partial(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("hub/models--*/blobs/*.incomplete"))


def test_a_model_of_the_catalogue_is_fetched_and_found(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = catalogue.load_catalogue()["olmoe-1b-7b"]
    data = data_of(2000)
    hub.files[entry.repository] = {entry.file: data, "README.md": b"hello"}
    with pytest.raises(CacherouteError, match="cacheroute pull olmoe-1b-7b"):
        catalogue.resolve("olmoe-1b-7b")
    path = pull.pull("olmoe-1b-7b")
    assert path.read_bytes() == data and path == catalogue.resolve("olmoe-1b-7b")
    assert path.resolve().name == hashlib.sha256(data).hexdigest()  # the hub's own layout
    import huggingface_hub

    assert huggingface_hub.try_to_load_from_cache(entry.repository, entry.file, cache_dir=tmp_path / "hub") == str(path)
    out, err = capsys.readouterr()
    assert out == "" and entry.file in err
    assert pull.pull("olmoe-1b-7b") == path and len(hub.ranges()) == 1  # once is enough


def test_all_shards_are_fetched(hub: Hub, tmp_path: Path) -> None:
    names = [f"Q4/m-Q4_K_M-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    hub.files["me/m-GGUF"] = {name: data_of(3000, seed) for seed, name in enumerate(names)}
    path = pull.pull("hf:me/m-GGUF:Q4/m-Q4_K_M-00002-of-00003.gguf")
    assert path.name == "m-Q4_K_M-00001-of-00003.gguf"
    for name in names:
        assert (path.parent.parent / name).read_bytes() == hub.files["me/m-GGUF"][name]
    assert catalogue.resolve("hf:me/m-GGUF:Q4_K_M") == path
    del hub.files["me/m-GGUF"][names[2]]
    with pytest.raises(UsageError, match="has 2 shards"):
        pull.pull("hf:me/m-GGUF")


def test_an_interrupted_transfer_is_resumed(hub: Hub, tmp_path: Path) -> None:
    data = data_of(25 * MB)
    hub.files["me/m-GGUF"] = {"m.gguf": data}
    hub.cut = [15 * MB]
    path = pull.pull("hf:me/m-GGUF")
    assert path.read_bytes() == data
    first, second = hub.ranges()
    assert first is None and second is not None and re.fullmatch(r"bytes=[1-9]\d*-", second)
    assert partial(tmp_path) == []


def test_an_interrupted_pull_is_resumed_by_another_process(hub: Hub, tmp_path: Path) -> None:
    data = data_of(25 * MB)
    hub.files["me/m-GGUF"] = {"m.gguf": data}
    hub.cut, hub.stall = [15 * MB], threading.Event()
    command = [sys.executable, "-m", "cacheroute", "pull", "hf:me/m-GGUF"]
    run = subprocess.Popen(command, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert hub.stalled.wait(20)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not (partial(tmp_path) and partial(tmp_path)[0].stat().st_size):
            time.sleep(0.02)
        with pytest.raises(CacherouteError, match="Another `cacheroute pull`"):
            pull.pull("hf:me/m-GGUF")
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=20)
    finally:
        run.kill()
    assert run.returncode == 130 and out == ""
    assert "run the same command to resume" in err and "Traceback" not in err
    (left,) = partial(tmp_path)
    have = left.stat().st_size
    assert 0 < have < len(data) and left.read_bytes() == data[:have]

    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == data
    assert hub.ranges()[-1] == f"bytes={have}-"
    assert "resuming" in done.stderr and partial(tmp_path) == []


def test_a_wrong_checksum_is_refused_and_deletes_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.files["me/m-GGUF"] = {"m.gguf": data_of(5000)}
    hub.wrong = {"m.gguf"}
    for _ in range(2):  # the second time without a transfer
        with pytest.raises(CacherouteError, match=r"m\.gguf arrived damaged.*delete that file and pull again") as e:
            pull.pull("hf:me/m-GGUF")
    (left,) = partial(tmp_path)
    assert str(left) in str(e.value) and left.stat().st_size == len(hub.files["me/m-GGUF"]["m.gguf"])
    assert len(hub.ranges()) == 1
    assert catalogue.hub_file("me/m-GGUF", "m.gguf") is None  # it cannot be taken for the model
    hub.wrong.clear()
    left.unlink()
    assert pull.pull("hf:me/m-GGUF").read_bytes() == hub.files["me/m-GGUF"]["m.gguf"]


def test_a_pattern_that_matches_nothing_or_too_much_lists_the_files(hub: Hub) -> None:
    hub.files["me/m-GGUF"] = {
        "m-Q4_K_M.gguf": data_of(2000),
        "m-Q8_0.gguf": data_of(3000),
        "mmproj.gguf": b"GGUF",
        "README.md": b"",
    }
    for name in ("hf:me/m-GGUF:Q5_K_M", "hf:me/m-GGUF"):
        with pytest.raises(UsageError, match=r"m-Q4_K_M\.gguf \(\d\.\d kB\), m-Q8_0\.gguf") as e:
            pull.pull(name)
        assert "mmproj" not in str(e.value)
    hub.files["me/empty"] = {"README.md": b""}
    with pytest.raises(UsageError, match="no GGUF"):
        pull.pull("hf:me/empty")
    assert hub.ranges() == []


def test_refusals_are_one_sentence(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"There is no repository me/none at http.*HF_TOKEN"):
        pull.pull("hf:me/none")
    with pytest.raises(UsageError, match="did you mean qwen3-30b-a3b"):
        pull.pull("qwen3-30b")
    with pytest.raises(UsageError, match="cacheroute setup"):
        pull.pull("demo")
    hub.files["me/m-GGUF"] = {"m.gguf": data_of(2000)}
    hub.gated = True
    with pytest.raises(CacherouteError, match="is gated: accept its terms"):
        pull.pull("hf:me/m-GGUF")
    hub.gated, hub.status = False, 418
    with pytest.raises(CacherouteError, match="418"):
        pull.pull("hf:me/m-GGUF")
    hub.status = None
    monkeypatch.setattr(pull.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(CacherouteError, match="make room, or set HF_HUB_CACHE"):
        pull.pull("hf:me/m-GGUF")


def test_without_a_network_downloaded_models_still_work(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["me/m-GGUF"] = {"m.gguf": data_of(2000)}
    path = pull.pull("hf:me/m-GGUF")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert pull.pull("hf:me/m-GGUF") == path
    with pytest.raises(CacherouteError, match=r"me/other could not be fetched from http://127\.0\.0\.1:9"):
        pull.pull("hf:me/other")


def test_the_token_is_sent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["me/m-GGUF"] = {"m.gguf": data_of(2000)}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull.pull("hf:me/m-GGUF")
    assert hub.tokens == {"Bearer hf_secret"}


def test_without_the_extra_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CacherouteError, match=r"run `\S+ -m pip install huggingface_hub`"):
        pull.pull("hf:me/m-GGUF")
