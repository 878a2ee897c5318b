"""`cacheroute plan`: one model, the catalogue, what does not fit; at 80 columns and as JSON."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest

from cacheroute.engine import storage
from cacheroute.errors import UsageError
from cacheroute.files import GIB, MIB
from cacheroute.forecast import kernels, speed
from cacheroute.forecast.kernels import TypeSpeed
from cacheroute.forecast.speed import ComputeSpeed
from cacheroute.model import catalogue, experts, gguf_file, memory_plan
from support import phone, tiny_models
from support.cli import cacheroute, sentence

command = importlib.import_module("cacheroute.cli.plan")
FAST = TypeSpeed(10e9, 100e9)


@pytest.fixture(autouse=True)
def machine(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and drive of fixed speeds, a disk with room, and no models but those of the test."""

    def measure(types: speed.Types, n_threads: int) -> ComputeSpeed:
        own = ({speed.measured_as(t): FAST for t in of} for of in (types.dense, types.experts, types.repacked))
        return ComputeSpeed(n_threads, 1e-6, 1e-11, *own)  # what is not asked for has no speed

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(
        speed, "known", lambda n: ComputeSpeed(n, 1e-6, 1e-11, *({t: FAST for t in kernels.TYPES} for _ in range(3)))
    )
    readings = [storage.Reading("direct", 1000.0, 1.0), storage.Reading("buffered", 800.0, 1.0)]
    monkeypatch.setattr(storage, "measure", lambda _: readings)
    monkeypatch.setattr(command, "free_disk", lambda _: 1000 * GIB)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home" / "hf"))
    for name in ("HF_HUB_CACHE", "OLLAMA_MODELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def run(capsys: pytest.CaptureFixture[str], **options: object) -> tuple[str, str]:
    usual = {"model": None, "budget": None, "ram": None, "flash_mbps": None, "ctx_size": 4096, "threads": None, "output": "text"}
    command.plan(**usual | options)
    return tuple(capsys.readouterr())  # type: ignore[return-value]


def test_one_model_at_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_models.write("qwen3moe", tmp_path / "m.gguf", n_embd=256, n_ff=256)
    header = gguf_file.read(path)
    whole = memory_plan.of(header, experts.layout(header), n_ctx=512, free=128 * MIB)
    ram = f"{(whole.needed(32) + whole.reserve) // MIB - 8}MiB"  # less than all of it takes
    out, err = run(capsys, model=str(path), ram=ram, ctx_size=512, threads=2)
    lines = out.splitlines()
    assert err == "" and all(len(line) <= 80 for line in lines if str(path) not in line)
    for word in ("memory", "budget", "routing", "io", "threads", "least", "suggested", "full", "original", "measured", "assumed"):
        assert any(line.startswith(word) for line in lines), (word, out)
    assert "direct: 1000 MB/s, as measured on this filesystem" in out and "2: as given" in out
    command = " ".join(out.replace("\\\n", "").split("cacheroute generate")[1].split())
    assert command.startswith(f"-m {path} --budget ") and "-t 2 -c 512" in command


def test_a_budget_that_is_given(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In every form, of a model that is here and of one that is not; it is what the command to type has."""
    usual = {"ram": "8GiB", "flash_mbps": 1000.0}
    known = json.loads(run(capsys, model="qwen3-30b-a3b", output="json", **usual)[0])
    assert [b["name"] for b in known["budgets"]] == ["least", "suggested", "full"]
    in_bytes = 2 * GIB // (known["budgets"][0]["expert_bytes"] // 8)
    for budget, n_experts in (("25%", 32), ("16", 16), ("2GiB", in_bytes)):
        found = json.loads(run(capsys, model="qwen3-30b-a3b", budget=budget, output="json", **usual)[0])
        assert [(b["name"], b["fits"]) for b in found["budgets"]] == [("least", True), ("given", True), ("full", False)]
        assert found["budgets"][1]["experts"] == n_experts and found["decisions"][0]["value"] == str(n_experts)
        assert found["decisions"][0]["reason"].startswith("as given"), found["decisions"]
        assert found["routings"][0]["mib_per_token"] > known["routings"][0]["mib_per_token"]
    out, _ = run(capsys, model=str(tiny), budget="50%", ctx_size=512)
    assert "--budget 16 " in out.replace("\\\n", "") and re.search(r"(?m)^full .*\d$", out), "all of it fits as well"
    assert run(capsys, model=str(tiny), budget="auto", ctx_size=512)[0] == run(capsys, model=str(tiny), ctx_size=512)[0]
    most = known["budgets"][1]["experts"]
    with pytest.raises(UsageError, match=rf"needs .* with a budget of 64 experts .* are free: --budget {most} fits\.$"):
        run(capsys, model="qwen3-30b-a3b", budget="50%", **usual)
    with pytest.raises(UsageError, match="every token needs 8: give at least 8"):
        run(capsys, model="qwen3-30b-a3b", budget="2", **usual)
    with pytest.raises(UsageError, match="name it with -m"):
        run(capsys, budget="50%")


def test_json_is_the_forecast(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, model=str(tiny), output="json", flash_mbps=200.0, ctx_size=512)
    found = json.loads(out)
    assert list(found) == [
        "model", "path", "n_expert", "n_used", "n_ctx", "fits", "refusal", "memory", "budgets", "routings", "prompts",
        "decisions", "inputs", "crowded",
    ]  # fmt: skip
    assert (
        found["path"] == str(tiny) and found["fits"] and [b["name"] for b in found["budgets"]] == ["least", "suggested", "full"]
    )
    assert {i["how"] for i in found["inputs"]} <= {"measured", "read", "given", "assumed"}
    assert {d["setting"]: d["value"] for d in found["decisions"]}["io"] == "load"  # all of it fits


def test_the_catalogue_at_80_columns_best_first(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, ram="8GiB", flash_mbps=1000.0)
    lines = out.splitlines()
    assert lines[0].split() == ["MODEL", "GiB", "HERE", "BUDGET", "TOK/S", "LOSSY", "512", "TOKENS"]
    assert len(lines) == 1 + len(catalogue.load_catalogue()) and all(len(line) <= 80 for line in lines)
    names = [line.split()[0] for line in lines[1:]]
    refused = [i for i, line in enumerate(lines[1:]) if " needs " in line]
    assert names.index("glm-4.5-air") in refused and refused == list(range(min(refused), len(names)))
    assert "for 8.0 GiB of memory" in err


def test_the_catalogue_as_json_is_in_the_same_order(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(run(capsys, ram="8GiB", flash_mbps=1000.0, output="json")[0])
    assert {r["name"] for r in rows} == set(catalogue.load_catalogue())
    usable = [r for r in rows if r["fits"] and r["routings"][0]["tokens_per_s"] >= 5]
    assert usable and rows[: len(usable)] == sorted(usable, key=lambda r: -r["nbytes"])


def test_a_drive_that_is_faster_than_this_one_can_be_planned_for(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is measured here is 1000 MB/s."""
    for given in (200.0, 5000.0):
        found = json.loads(run(capsys, model=str(tiny), output="json", flash_mbps=given, ctx_size=512)[0])
        drive = next(i for i in found["inputs"] if "MB/s" in i["detail"])
        assert drive["how"] == "given" and f"{given:.0f} MB/s" in drive["detail"], drive


def test_without_a_drive_there_are_no_speeds(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, model="qwen3-30b-a3b", ram="8GiB")
    row = next(line for line in out.splitlines() if line.startswith("cache-prior:lambda=0.1"))
    assert row.split()[3] == "?" and re.search(r"512 tokens +\? ", out)


def test_a_known_model_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, model="qwen3-30b-a3b", ram="8GB", flash_mbps=800.0)
    assert "cacheroute pull qwen3-30b-a3b" in err and all(len(line) <= 80 for line in out.splitlines())
    assert "not here" in out and "800 MB/s, as given" in out and "assumed" in out


def test_what_does_not_fit_is_refused_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"needs at least .* are free: .*There would fit: "):
        run(capsys, model="mixtral-8x7b", ram="4GiB")
    assert capsys.readouterr().out == ""
    with pytest.raises(command.typer.Exit) as e:
        run(capsys, model="mixtral-8x7b", ram="4GiB", output="json")
    found = json.loads(capsys.readouterr().out)
    assert e.value.exit_code == 2 and not found["fits"] and "needs at least" in found["refusal"]


@pytest.mark.parametrize("ram, free", [("8G", 8 * GIB), ("8GiB", 8 * GIB), ("8GB", 8 * 10**9)])
def test_forms_of_ram(capsys: pytest.CaptureFixture[str], ram: str, free: int) -> None:
    found = json.loads(run(capsys, model="qwen3-30b-a3b", ram=ram, output="json")[0])
    assert found["memory"]["free"] == free


def test_what_cannot_be_is_one_sentence(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "8x" in sentence(cacheroute("plan", "-m", tiny, "--ram", "8x"), 2)
    with pytest.raises(UsageError, match=r"nothing\.gguf"):
        run(capsys, model="nothing.gguf")
    with pytest.raises(UsageError, match="text and json"):
        run(capsys, output="xml")


def test_a_measurement_is_told(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "known", lambda _: None)
    real = speed.measure
    monkeypatch.setattr(speed, "measure", lambda types, n: dataclasses.replace(real(types, n), crowded=True))
    out, err = run(capsys, model=str(tiny), ctx_size=512)
    assert [line.split()[0] for line in err.splitlines()] == ["measuring", "other"] and "it is too slow" in " ".join(out.split())
    assert re.search(r"(?m)^suggested .* \d+ !$", out) and re.search(r"(?m)^original .*\d !", out), out
    out, err = run(capsys, ram="8GiB", flash_mbps=1000.0)
    fast = [line for line in out.splitlines()[1:] if " needs " not in line]
    assert fast and all(re.search(r"\d !", line) for line in fast) and "! behind tok/s: measured while other" in err
    assert all(len(line) <= 80 for line in out.splitlines())


def test_what_the_disk_has_no_room_for_comes_after_what_it_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = catalogue.load_catalogue().values()
    room = sorted(entry.nbytes for entry in entries)[len(entries) // 2]
    monkeypatch.setattr(command, "free_disk", lambda _: room)
    rows = json.loads(run(capsys, ram="64GiB", flash_mbps=1000.0, output="json")[0])
    assert {r["name"]: r["fits_disk"] for r in rows} == {entry.name: entry.nbytes <= room for entry in entries}
    fitting = [r["fits_disk"] for r in rows if r["fits"]]
    assert fitting == sorted(fitting, reverse=True) and {*fitting} == {True, False}
    out, err = run(capsys, ram="64GiB", flash_mbps=1000.0)
    assert sum("no room" in line for line in out.splitlines()) == sum(not r["fits_disk"] for r in rows)
    assert all(len(line) <= 80 for line in out.splitlines()) and "no room: not on this disk" in err
    large = next(r["name"] for r in rows if r["fits"] and not r["fits_disk"])
    assert re.search(r"of disk and .* are free, so that", " ".join(run(capsys, model=large, ram="64GiB")[1].split()))
    assert "There would fit: " in command._instead(64 * GIB, 4096)
    monkeypatch.setattr(command, "free_disk", lambda _: 0)
    assert command._instead(64 * GIB, 4096) == "", "none of them is here"


def test_in_a_phones_window(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_models.write("qwen3moe", tmp_path / "m.gguf", n_embd=256, n_ff=256)
    monkeypatch.setattr(command, "_width", lambda: phone.COLUMNS)
    for model in (str(path), None):
        phone.check(run(capsys, model=model, ctx_size=512, threads=2)[0])
