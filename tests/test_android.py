"""What `doctor` says on a phone: each trap, forced by files that a phone would have."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import pytest

from cacheroute.errors import CacherouteError
from cacheroute.install import android, checkup, engine_build, machine, patched_llama_cpp, processor
from cacheroute.install.engine_build import EngineState
from support import programs

BIG = "fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm asimddp sve i8mm bf16"
LITTLE = "fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm asimddp"
OLD = "fp asimd evtstrm aes crc32"
PROPS = {"ro.build.version.sdk": "34", "ro.build.version.release": "14"}


def phone(root: Path, *cores: str, free_gib: float = 4.0) -> Path:
    """A folder that looks like a phone's root, with a core for each list of features."""
    for name, content in {
        "system/bin/app_process": "",
        "proc/cpuinfo": "".join(f"processor\t: {i}\nFeatures\t: {words}\n\n" for i, words in enumerate(cores)),
        "proc/meminfo": f"MemTotal: {8 << 20} kB\nMemAvailable: {int(free_gib * (1 << 20))} kB\n",
        "proc/self/mountinfo": (
            "1 1 0:1 / / rw - ext4 /dev/root rw\n"
            "2 1 0:2 / /data rw - f2fs /dev/data rw\n"
            "3 1 0:3 / /storage/emulated rw - fuse /dev/fuse rw\n"
            "4 1 0:4 / /mnt/my\\040card rw - exfat /dev/card rw\n"
        ),
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("cores", "arch"),
    [
        ((BIG, BIG), "armv8.2-a+dotprod+fp16+i8mm"),
        ((LITTLE, BIG), "armv8.2-a+dotprod+fp16"),
        ((OLD,), "armv8-a"),
        ((OLD, BIG), "armv8-a"),
        ((), "armv8-a"),
    ],
)
def test_flags_are_those_of_all_cores(cores: tuple[str, ...], arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """i8mm where one core lacks it is SIGILL, armv8-a where all have more is slow."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert processor.arm_arch(phone(tmp_path, *cores)) == arch
    assert processor.native_defines(tmp_path) == {"GGML_NATIVE": "OFF", "GGML_CPU_ARM_ARCH": arch}
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert processor.native_defines(tmp_path) == processor.NATIVE


@pytest.mark.parametrize("word", ["+dotprod+fp16+i8mm", "armv8-a "])
def test_the_flags_are_part_of_the_key(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = engine_build.recipe()["settings"]
    monkeypatch.setattr(processor, "native_defines", lambda: {"GGML_CPU_ARM_ARCH": word})
    assert engine_build.recipe()["settings"] == [*before, {"GGML_CPU_ARM_ARCH": word}]
    assert engine_build.recipe(portable=True)["settings"] != before


def test_an_engine_without_dotprod_or_i8mm_is_told(tmp_path: Path) -> None:
    root = phone(tmp_path, BIG)
    slow = checkup._features({"NEON"}, root)
    assert slow.state == "warn" and slow.found.endswith("does not use DOTPROD, MATMUL_INT8, FP16_VA")
    fast = checkup._features({"NEON", "FP16_VA", "MATMUL_INT8", "DOTPROD"}, root)
    assert fast.state == "ok", "SVE is left out on purpose"


def found(root: Path, **props: str) -> dict[str, tuple[str, str, str]]:
    checks = android.checks(root, lambda name: (PROPS | {"ro.build.version.sdk": props.pop("sdk", "34")} | props).get(name, ""))
    return {c.name: (c.state, c.found, c.advice) for c in checks}


def test_the_phantom_process_killer(tmp_path: Path) -> None:
    root = phone(tmp_path, BIG)
    state, said, advice = found(root)["signal 9"]
    assert state == "warn" and "phantom process killer: signal 9" in said and "termux-wake-lock" in advice
    assert "Disable child process restrictions" in advice and "settings_enable_monitor_phantom_procs false" in advice
    assert found(root, sdk="30")["signal 9"][0] == "ok"
    assert found(root, sdk="")["signal 9"][0] == "warn", "not known"
    assert found(root, **{android._SWITCH: "false"})["signal 9"][:2] == ("ok", "the phantom process killer is switched off")
    assert found(tmp_path / "elsewhere") == {}


def test_a_python_that_calls_itself_android(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = phone(tmp_path, BIG)
    assert found(root)["system"][1] == f"Android 14, Python {sys.version_info[0]}.{sys.version_info[1]}"
    monkeypatch.setattr(sys, "platform", "android")
    assert found(root)["system"][1].endswith("calls itself android, which the patched engine knows and others refuse")
    assert machine.is_android(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/storage/emulated/0/models/m.gguf", "m.gguf is on shared storage"),
        ("/sdcard/m.gguf", "m.gguf is on shared storage"),
        ("/storage/1234-ABCD/m.gguf", "m.gguf is on shared storage"),
        ("/mnt/my card/m.gguf", "m.gguf is on a filesystem (exfat)"),
        ("/data/data/com.termux/files/home/m.gguf", ""),
        ("/storages/m.gguf", ""),
    ],
)
def test_shared_storage(path: str, said: str, tmp_path: Path) -> None:
    check = android.storage(Path(path), phone(tmp_path, BIG))
    assert (check.found if check else "").startswith(said) and bool(check) == bool(said)
    assert not check or (check.state == "warn" and "move it" in check.advice)


def test_the_link_that_termux_makes_is_followed(tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir()
    link = tmp_path / "storage" / "shared"
    link.symlink_to("/storage/emulated/0")
    check = android.storage(link / "m.gguf", phone(tmp_path / "root", BIG))
    assert check and "shared storage" in check.found


def test_elsewhere_a_place_is_told_by_its_filesystem_alone(tmp_path: Path) -> None:
    root = phone(tmp_path, BIG)
    (root / "system/bin/app_process").unlink()
    assert android.storage(Path("/sdcard/m.gguf"), root) is None
    check = android.storage(Path("/storage/emulated/m.gguf"), root)
    assert check and "(fuse)" in check.found
    assert android.filesystem(Path("/data/x"), root) == "f2fs" and android.filesystem(Path("/x"), tmp_path / "no") == ""


def test_too_little_memory_for_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build, "installed_state", lambda: EngineState("missing"))
    monkeypatch.setattr(machine, "is_android", lambda root=None: True)
    engine, memory = checkup._engine(phone(tmp_path / "small", BIG, free_gib=1.0))
    assert engine.state == "fail" and memory.name == "build" and memory.state == "warn"
    assert memory.found == "1.0 GiB free, and one compiler takes up to 1.4 GiB" and "--wheel" in memory.advice
    [engine] = checkup._engine(phone(tmp_path / "large", BIG, free_gib=3.0))
    assert engine.state == "fail"


def test_an_engine_of_another_processor_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading it could end this process with SIGILL, before anything is said."""

    def load() -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(engine_build, "installed_state", lambda: EngineState("patched", engine_build.LOCAL_VERSION))
    monkeypatch.setattr(engine_build, "installed_record", lambda: {"portable": False, "processor": ["asimddp", "i8mm"]})
    monkeypatch.setattr(checkup.patched_llama_cpp, "module", load)
    [check] = checkup._engine(phone(tmp_path, LITTLE))
    assert check.state == "fail" and "compiled for a processor with MATMUL_INT8, which this one lacks" in check.found
    assert "cacheroute setup" in check.advice
    monkeypatch.undo()
    monkeypatch.setattr(engine_build, "installed_record", lambda: {"portable": False, "processor": ["of_next_year"]})
    patched_llama_cpp.module.cache_clear()
    with pytest.raises(CacherouteError, match=r"^The engine was compiled for a processor with of_next_year, "):
        patched_llama_cpp.module()


def test_an_engine_without_openmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build, "uses_openmp", lambda: False)
    here = next(c for c in checkup._engine(Path("/")) if c.name == "OpenMP")
    monkeypatch.setattr(machine, "is_android", lambda root=None: True)
    there = next(c for c in checkup._engine(Path("/")) if c.name == "OpenMP")
    assert here.state == there.state == "warn"
    assert "libgomp" in here.advice and there.advice.startswith("`pkg upgrade clang`")


def test_a_property_that_cannot_be_asked_for_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert android.getprop("ro.build.version.sdk") == ""
    programs.write(tmp_path / "getprop", "echo 34\n")
    assert android.getprop("ro.build.version.sdk") == "34"


def test_findings_are_json_too(tmp_path: Path) -> None:
    """As `doctor -o json` prints them."""
    checks = [*android.checks(phone(tmp_path, BIG), lambda name: PROPS.get(name, ""))]
    assert json.loads(json.dumps([vars(check) for check in checks]))[1]["name"] == "signal 9"
