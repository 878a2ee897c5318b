"""`cacheroute doctor`: each check on machines that have the trouble, and the command on this one."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from cacheroute.engine import storage, stores
from cacheroute.errors import CacherouteError
from cacheroute.install import checkup, engine_build, machine
from cacheroute.install.check import Check
from cacheroute.model import experts, gguf_file
from support import tiny_models
from support.cli import cacheroute
from support.expert_file import on_a_disk

doctor = importlib.import_module("cacheroute.cli.doctor")

CPU = "flags\t\t: fpu avx2 fma f16c avx512f avx512_vnni\n"
ALL_USED = {"AVX2", "FMA", "F16C", "AVX512", "AVX512_VNNI"}


def machine_of(root: Path, **files: str) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_features_that_the_engine_does_not_use_are_named(tmp_path: Path) -> None:
    root = machine_of(tmp_path, proc__cpuinfo=CPU)
    assert checkup._features(ALL_USED, root).state == "ok"
    lacks = checkup._features({"AVX2", "FMA", "F16C"}, root)
    assert lacks.state == "warn" and lacks.found.endswith("does not use AVX512, AVX512_VNNI") and "setup" in lacks.advice
    phone = machine_of(tmp_path / "phone", proc__cpuinfo="Features\t: fp asimd asimddp i8mm\n")
    assert "MATMUL_INT8" in checkup._features({"NEON", "DOTPROD"}, phone).found
    new = machine_of(tmp_path / "new", proc__cpuinfo=CPU.replace("\n", " avx_vnni\n"))
    assert checkup._features(ALL_USED, new).state == "ok", "the wider one is used"
    assert checkup._features(ALL_USED - {"AVX512", "AVX512_VNNI"}, new).found.endswith("AVX512, AVX512_VNNI, AVX_VNNI")
    assert checkup._features(ALL_USED, tmp_path / "nowhere").state == "warn"


@pytest.mark.parametrize(
    "after, state, word",
    [
        ("100 0 0 1000 0 0 0 0 0 0", "ok", "0%"),
        ("900 0 0 1000 0 0 0 0 0 0", "warn", "100%"),
        ("110 0 0 1000 0 0 0 50 0 0", "warn", "stolen"),
        ("not what it was", "warn", "not known"),
    ],
)
def test_other_load_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str, state: str, word: str) -> None:
    cpu = f"cpu{machine.own_cores()[0]}"
    stat = machine_of(tmp_path, proc__stat=f"{cpu} 100 0 0 900 0 0 0 0 0 0\n") / "proc/stat"
    monkeypatch.setattr(checkup.time, "sleep", lambda _: stat.write_text(f"{cpu} {after}\n"))
    if word == "100%":
        stat.write_text(f"{cpu} 100 0 0 1000 0 0 0 0 0 0\n")
    found = checkup._load(tmp_path)
    assert (found.state, word in found.found) == (state, True), found


def test_memory_and_scheduling(tmp_path: Path) -> None:
    info = "MemTotal: {} kB\nMemAvailable: {} kB\n"
    root = machine_of(tmp_path, proc__meminfo=info.format(8 << 20, 6 << 20))
    assert checkup._memory(root) == Check("memory", "ok", "6.0 GiB free of 8.0 GiB")
    root = machine_of(tmp_path, proc__meminfo=info.format(8 << 20, 1 << 18))
    assert checkup._memory(root).state == "warn"
    assert checkup._scheduling(tmp_path).state == "warn"
    machine_of(tmp_path, proc__stat=f"cpu 1 2\ncpu{machine.own_cores()[0]} 1 2\n")
    assert checkup._scheduling(tmp_path).state == "ok"


def test_an_engine_that_is_missing_or_stock_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for state in (engine_build.EngineState("missing"), engine_build.EngineState("stock", "0.3.36")):
        monkeypatch.setattr(engine_build, "installed_state", lambda state=state: state)
        [check] = checkup._engine(Path("/"))
        assert check.state == "fail" and check.advice.startswith("run `cacheroute setup")


def test_a_cache_that_cannot_be_written_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEROUTE_CACHE", "/proc/nope")
    monkeypatch.setattr(checkup.os, "access", lambda *_: False)
    assert checkup._cache().state == "fail"


def test_packages_that_are_missing_are_named() -> None:
    assert checkup._extras(lambda _: None).found.startswith("not installed: huggingface_hub (for pull), ")
    assert checkup._extras(lambda _: True).advice == ""
    assert "pip install NAME" in checkup._extras(lambda name: name == "pip").advice
    assert checkup._extras(lambda _: None).advice.startswith("`uv pip install --python "), "without pip"


def test_storage_is_measured_without_a_model_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_models.write("qwen3moe", on_a_disk(tmp_path) / "tiny.gguf", shards=2)
    layout = experts.layout(gguf_file.read(path))
    readings = {r.io: r for r in storage.measure(layout)}
    assert set(readings) == {"direct", "buffered"}
    assert readings["buffered"].mb_per_s > 0 and readings["buffered"].ms > 0 and not readings["buffered"].left_bytes
    real = stores.new_store

    def no_direct(io: str, arguments: stores.Arguments, names: Sequence[str]) -> int:
        if io == "direct":
            raise CacherouteError("the filesystem has no direct reads.")
        return real(io, arguments, names)

    monkeypatch.setattr(stores, "new_store", no_direct)
    refused = {r.io: r.refused for r in storage.measure(layout)}
    assert refused == {"buffered": "", "direct": "the filesystem has no direct reads"}


@pytest.mark.engine
def test_the_command_tells_and_fails_when_something_does(tmp_path: Path) -> None:
    path = tiny_models.write("qwen3moe", on_a_disk(tmp_path) / "tiny.gguf")
    done = cacheroute("doctor", "-m", path, "-o", "json")
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 0 and done.stderr == ""
    assert {"cacheroute", "engine", "processor", "OpenMP", "cores", "load", "memory", "cache", "model", "buffered reads"} <= set(
        found
    )
    assert found["engine"]["state"] == "ok"
    text = cacheroute("doctor", "-m", path)
    begun = [line for line in text.stdout.splitlines() if not line.startswith("      ")]
    assert len(begun) == len(found) and all(line[:4].strip() in ("ok", "warn") for line in begun)
    assert all(len(line) <= 80 or len(line.split()[-1]) > 70 for line in text.stdout.splitlines()), "a long path stays whole"
    layout = experts.layout(gguf_file.read(path))
    assert ("--io auto" in found) == (stores.remembered(layout) is not None)
    gone = cacheroute("doctor", "-m", tmp_path / "nothing.gguf")
    assert gone.returncode in (1, 2) and gone.stderr.count("\n") == 1


def test_what_auto_has_been_decided_to_is_told_and_doubted() -> None:
    same = doctor._remembered("buffered", {"direct": 2.0, "buffered": 1.0})
    assert (same.state, same.advice) == ("ok", "") and "buffered, decided when" in same.found
    other = doctor._remembered("buffered", {"direct": 1.0, "buffered": 2.0})
    assert other.state == "warn" and "direct is faster now" in other.found and other.advice.endswith("io.json to decide anew")
    assert doctor._remembered("buffered", {"buffered": 1.0}).state == "ok"
