"""`setup --wheel`: what is refused before anything changes, what is installed, and that no part of a file ever is.

Wheels of a few small files play the engine; a server on this machine the web.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import urllib.parse
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import build_wheels
import pytest

from cacheroute import files
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.install import engine_build, engine_source, engine_wheel, processor, tools
from support.cli import cacheroute as run
from support.cli import sentence
from support.environments import of_python, with_cacheroute

HERE = f"linux_{platform.machine()}"
OURS: dict[str, Any] = {
    "key": "k" * 20,
    "patches": engine_source.patches(),
    "sdist": engine_source.SDIST_SHA256,
    "portable": True,
    "processor": [],
}


def wheel(
    folder: Path, record: dict[str, Any] | None = OURS, *, version: str = "", tag: str = HERE, name: str = "", of: str = ""
) -> Path:
    """`name`: of the file; `of`: of the package; `record`: None for a stock one."""
    folder.mkdir(exist_ok=True)
    version, of = version or engine_build.LOCAL_VERSION, of or "llama_cpp_python"
    path = folder / (name or f"{of}-{version}-py3-none-{tag}.whl")
    info = f"{of}-{version}.dist-info"
    content = {
        "llama_cpp/__init__.py": f'__version__ = "{version}"\n',
        **({} if record is None else {"llama_cpp/cacheroute_engine.json": json.dumps(record)}),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {of}\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: py3-none-{tag}\n",
    }
    content[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in (*content, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as file:
        for inside, text in content.items():
            file.writestr(inside, text)
    return path


def checksum(path: Path, text: str = "") -> None:
    path.with_name(path.name + ".sha256").write_text(text or f"{files.sha256(path)}  {path.name}\n")


@pytest.fixture
def installed(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the wheels that were given to pip; nothing of ours or of others is installed here."""
    names: list[str] = []
    monkeypatch.setattr(engine_build, "check_replaces_nothing", lambda: None)
    monkeypatch.setattr(engine_build, "installed_record", dict)
    monkeypatch.setattr(engine_build, "install", lambda path, progress: names.append(path.name))
    return names


def refused(path: Path | str, installed: list[str], **options: Any) -> str:
    with pytest.raises(UsageError) as failure:
        engine_wheel.ensure(str(path), **options)
    assert installed == [] and "\n" not in str(failure.value) and failure.value.exit_code == 2
    return str(failure.value)


# --- checksums


def test_a_checksum_may_be_given_or_lie_beside_it(tmp_path: Path, installed: list[str]) -> None:
    path = wheel(tmp_path)
    right = files.sha256(path)
    assert engine_wheel.ensure(str(path), sha256_hex=right.upper())[1] == f"sha256 {right}"
    checksum(path)
    assert engine_wheel.ensure(str(path))[1] == f"sha256 {right}"
    checksum(path, f"{right}\n")
    assert engine_wheel.ensure(f"file://{urllib.parse.quote(str(path))}")[1] == f"sha256 {right}"
    assert installed == [path.name] * 3


def test_without_one_a_file_of_this_disk_is_installed_and_that_is_said(tmp_path: Path, installed: list[str]) -> None:
    path = wheel(tmp_path)
    assert engine_wheel.ensure(str(path))[1] == f"sha256 {files.sha256(path)}, which nothing was there to compare with"
    assert installed == [path.name]


def test_a_wrong_checksum(tmp_path: Path, installed: list[str]) -> None:
    path = wheel(tmp_path)
    assert "is damaged, or not the file that was meant" in refused(path, installed, sha256_hex="0" * 64)
    checksum(path, "0" * 64)
    assert "is damaged" in refused(path, installed)
    checksum(path, "no checksum at all")
    assert "does not begin with a sha256" in refused(path, installed)
    for wrong in ("", "0" * 63, "g" * 64):
        assert "64 hexadecimal digits" in refused(path, installed, sha256_hex=wrong)


# --- what it is


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"tag": "linux_riscv64"}, "is for linux_riscv64, and this is Linux on"),
        ({"tag": "manylinux_2_99_x86_64"}, "is for manylinux_2_99_x86_64"),
        ({"tag": "win_amd64"}, "is for win_amd64"),
        ({"tag": "macosx_11_0_arm64"}, "is for macosx_11_0_arm64"),
        ({"version": "0.3.36+cacheroute.1"}, "is the engine 0.3.36+cacheroute.1, not the"),
        ({"version": "0.3.1", "record": None}, "is a stock llama-cpp-python 0.3.1, without the expert hook"),
        ({"record": {**OURS, "patches": {}}}, "was built with other patches"),
        ({"record": {**OURS, "sdist": "0" * 64}}, "was built with other patches"),
        ({"record": [1]}, "is a stock llama-cpp-python"),
        ({"of": "numpy", "version": "2.0"}, "is a wheel of numpy, not of the engine"),
        (
            {"record": {**OURS, "portable": False, "processor": ["avx2", "of_next_year"]}},
            "compiled for a processor with of_next_year",
        ),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the sentences name Linux")
def test_one_for_something_else_is_refused(
    made: dict[str, Any], said: str, tmp_path: Path, installed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "features", lambda root=None: {"avx2"})
    assert said in refused(wheel(tmp_path, **made), installed)


def test_what_is_no_wheel_is_refused(tmp_path: Path, installed: list[str]) -> None:
    cut, path = tmp_path / "cut.whl", wheel(tmp_path)
    cut.write_bytes(path.read_bytes()[:-50])
    assert "is no whole wheel" in refused(cut, installed)
    cut.write_bytes(path.read_bytes().replace(b"__version__", b"__Version__"))
    assert "__init__.py is damaged" in refused(cut, installed)
    with zipfile.ZipFile(cut, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", "a" * 999)
    cut.write_bytes(cut.read_bytes()[:31] + b"\xff" * 5 + cut.read_bytes()[36:])
    assert "is no whole wheel" in refused(cut, installed), "compressed data that cannot be unpacked"
    cut.write_bytes(b"")
    assert "is no whole wheel" in refused(cut, installed)
    assert "is no URL" in refused("http://[::1/x.whl", installed)
    with zipfile.ZipFile(cut, "w") as file:
        file.writestr("a.txt", "a")
    assert "is no whole wheel" in refused(cut, installed)
    assert "cannot be read: it is a directory" in refused(tmp_path, installed)
    assert "There is no file" in refused(tmp_path / "gone.whl", installed)
    assert "--wheel is empty; give the path" in refused(" ", installed)
    assert "give its path, or file:///PATH" in refused("file://a/b.whl", installed)
    for url in ("ftp://a/b.whl", "git+ssh://a/b.whl"):
        assert f"{url} cannot be downloaded from here: only https://" in refused(url, installed, sha256_hex="0" * 64)


def test_a_native_one_of_this_processor_and_any_name_is_taken(
    tmp_path: Path, installed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "features", lambda root=None: {"avx2", "fma"})
    path = wheel(tmp_path, {**OURS, "portable": False, "processor": ["avx2"]}, name="from the net (1).whl")
    engine_wheel.ensure(str(path))
    assert installed == [f"llama_cpp_python-{engine_build.LOCAL_VERSION}-py3-none-{HERE}.whl"]


def test_the_same_one_is_not_installed_again(tmp_path: Path, installed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build, "installed_record", lambda: OURS)
    engine_wheel.ensure(str(wheel(tmp_path)))
    assert installed == []


@pytest.mark.parametrize(
    ("system", "android", "libc", "runs"),
    [
        ("linux", False, ("glibc", "2.36"), "any linux manylinux_2_35 manylinux2014 manylinux_2_36"),
        ("linux", False, ("", ""), "any linux musllinux_1_2"),
        ("linux", True, ("libc", ""), "any linux android_24"),
        ("android", True, ("", ""), "any linux android_24"),
        ("darwin", False, ("", ""), "any macosx_11_0"),
        ("win32", False, ("", ""), "any"),
    ],
)
def test_platforms(system: str, android: bool, libc: tuple[str, str], runs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(engine_wheel, "is_android", lambda: android)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    kinds = "linux manylinux_2_35 manylinux2014 manylinux_2_36 manylinux_2_37 musllinux_1_2 macosx_11_0 win"
    tags = {kind: f"{kind}_arm64" for kind in kinds.split()} | {"any": "any", "android_24": "android_24_arm64_v8a"}
    assert {kind for kind, tag in tags.items() if engine_wheel.runs_here(tag)} == {*runs.split()}
    assert not engine_wheel.runs_here("linux_x86_64") and not engine_wheel.runs_here("nonsense")


def test_without_a_compiler_the_one_that_is_here_serves(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> Path:
        raise AssertionError("nothing is built")

    monkeypatch.setenv("PATH", "")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(engine_build, "installed_state", lambda: engine_build.EngineState("patched", engine_build.LOCAL_VERSION))
    monkeypatch.setattr(engine_build, "installed_record", lambda: OURS)
    monkeypatch.setattr(engine_build, "build", build)
    assert engine_build.to_compile() is None and engine_build.ensure().kind == "patched"
    monkeypatch.setattr(engine_build, "installed_record", lambda: {**OURS, "patches": {}})
    with pytest.raises(CacherouteError, match="compiler found"):
        engine_build.ensure()


def test_it_waits_for_no_build(tmp_path: Path, installed: list[str], own_cache: Path) -> None:
    killed = own_cache / "engine" / ".wheel-killed"
    killed.mkdir(parents=True)
    os.utime(killed, (0, 0))
    with tools.workdir(tools.PlainProgress()):  # as another process that compiles
        engine_wheel.ensure(str(wheel(tmp_path)))
    assert installed and not killed.exists()


# --- from the web


class Server(BaseHTTPRequestHandler):
    """Says that there is more to come, and sends less."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(b"P" * 1000)

    def log_message(self, *_: object) -> None:
        pass


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the files in tmp_path/web."""
    (tmp_path / "web").mkdir()
    yield from served(functools.partial(Quiet, directory=str(tmp_path / "web")))


def served(handler: Any) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_from_a_url(tmp_path: Path, web: str, installed: list[str]) -> None:
    path = wheel(tmp_path / "web")
    url = f"{web}/{path.name.replace('+', '%2B')}?signed=yes"
    assert "There is no checksum for" in refused(url, installed) and "404" in refused(url, installed)
    assert engine_wheel.ensure(url, sha256_hex=files.sha256(path))[1] == f"sha256 {files.sha256(path)}"
    checksum(path)
    engine_wheel.ensure(url)
    checksum(path, "0" * 64)
    with pytest.raises(UsageError, match="is damaged"):
        engine_wheel.ensure(url)
    named = path.rename(tmp_path / "web" / "für.whl")
    engine_wheel.ensure(f"{web}/für.whl?signed=ja#ü", sha256_hex=files.sha256(named))
    assert installed == [path.name] * 3
    with pytest.raises(CacherouteError, match=r"gone\.whl cannot be downloaded: the server answers 404"):
        engine_wheel.ensure(f"{web}/gone.whl", sha256_hex="0" * 64)
    with pytest.raises(CacherouteError, match="cannot be downloaded"):
        engine_wheel.ensure("http://127.0.0.1:9/a.whl", sha256_hex="0" * 64)


def test_a_part_of_a_file_is_never_installed(own_cache: Path, installed: list[str]) -> None:
    for address in served(Server):
        with pytest.raises(CacherouteError, match=r"came only in part, 1000 of 100000 bytes|more expected"):
            engine_wheel.ensure(f"{address}/a.whl", sha256_hex="0" * 64)
    assert installed == [] and [*(own_cache / "engine").iterdir()] == [], "nor kept"


# --- the command


def test_the_command(tmp_path: Path) -> None:
    """Into an environment of its own: it says what it compared, and takes the place of no other engine unasked."""
    python = with_cacheroute(of_python(tmp_path / "venv"))
    path = wheel(tmp_path / "wheels", version=engine_build.LOCAL_VERSION)
    code = (
        "import sys; from cacheroute.install import engine_wheel as w, engine_build as e\n"
        "needs = lambda call: call[-1].startswith('llama-cpp-python==')\n"  # the second call, for what it depends on
        "e.run = lambda call, real=e.run: (0, '') if needs(call) else real(call)\n"
        "state, said = w.ensure(sys.argv[1]); print(state.kind, said[:7], e.installed_record()['key'])"
    )
    env = {"CACHEROUTE_CACHE": str(tmp_path / "cache"), "PATH": ""}
    done = subprocess.run([python, "-c", code, path], capture_output=True, text=True, env=env, check=False)
    assert done.stdout == f"patched sha256  {'k' * 20}\n", done.stderr
    with zipfile.ZipFile(wheel(tmp_path / "other", None, version="0.3.1", tag="any")) as file:
        file.extractall(tmp_path / "site")
    stock = {"PYTHONPATH": str(tmp_path / "site"), "CACHEROUTE_CACHE": str(tmp_path / "cache2")}
    assert "llama-cpp-python 0.3.1 is installed here" in sentence(run("setup", "--no-demo", "--wheel", path, env=stock), 2)
    assert not (tmp_path / "cache2").exists()


@pytest.mark.parametrize("more", [["--sdist", __file__], ["--portable"], ["--jobs", "2"], ["--check", "0.3.1"]])
def test_a_wheel_compiles_nothing(more: list[str]) -> None:
    assert "--wheel compiles nothing" in sentence(run("setup", "--wheel", "a.whl", *more), 2)
    assert "--sha256 is the checksum of --wheel" in sentence(run("setup", "--sha256", "0" * 64), 2)


# --- how they are made


def test_neither_time_nor_order_nor_rights_are_in_the_bytes(tmp_path: Path) -> None:
    one, two = wheel(tmp_path / "one"), tmp_path / "two.whl"
    with zipfile.ZipFile(one) as file, zipfile.ZipFile(two, "w", zipfile.ZIP_DEFLATED) as other:
        for name in reversed(file.namelist()):
            entry = zipfile.ZipInfo(name, (2020, 2, 2, 2, 2, 2))
            entry.external_attr = 0o100600 << 16
            other.writestr(entry, file.read(name))
    for source, to in ((one, "a.whl"), (two, "b.whl")):
        build_wheels.normalised(source, tmp_path / to)
    assert (tmp_path / "a.whl").read_bytes() == (tmp_path / "b.whl").read_bytes()
    shutil.copy(tmp_path / "a.whl", tmp_path / one.name)
    read = engine_wheel._read(tmp_path / one.name, "it")
    assert (read.file_name, read.record) == (one.name, OURS)
