"""A portable engine: which CPU kernels it has, how they are told to the build, and which of them is taken."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from cacheroute import files
from cacheroute.errors import CacherouteError
from cacheroute.install import engine_build, patched_llama_cpp, variants

SDIST = files.cache_dir() / "sdist" / f"llama_cpp_python-{engine_build.VERSION}.tar.gz"
CMAKE = "vendor/llama.cpp/ggml/src/CMakeLists.txt"


@pytest.mark.parametrize(
    "platform, first, n",
    [
        ("linux-x86_64", "x64", 5),
        ("linux-aarch64", "armv8.0", 3),
        ("android-24-arm64_v8a", "armv8.0", 3),
        ("macosx-14.0-arm64", None, 0),
        ("linux-riscv64", None, 0),
    ],
)
def test_each_platform_has_its_own(platform: str, first: str | None, n: int) -> None:
    found = variants.of(platform)
    assert len(found) == n and next(iter(found), None) == first
    assert variants.defines(platform)["GGML_NATIVE"] == "OFF"
    assert ("GGML_BACKEND_DL" in variants.defines(platform)) == bool(n) == bool(variants.cmake_include(platform))


def test_the_first_needs_nothing_and_no_two_are_the_same() -> None:
    """What runs everywhere comes first; by their features llama.cpp scores them."""
    for platform in ("linux-x86_64", "linux-aarch64"):
        features = [frozenset(v.partition("=")[2].split("+")) for v in variants.of(platform)]
        assert features[0] == {""} and len(set(features)) == len(features)


@pytest.mark.skipif(not SDIST.exists(), reason="the pinned sdist is not in the cache: build the engine first")
def test_features_are_those_that_llama_cpp_has() -> None:
    """One that it does not know would be left out in silence."""
    with tarfile.open(SDIST, "r|gz") as tar:
        text = next(
            tar.extractfile(m).read().decode()  # type: ignore[union-attr]
            for m in tar
            if m.name.partition("/")[2] == CMAKE
        )
    known = set(re.findall(r"\w+", " ".join(re.findall(r"ggml_add_cpu_backend_variant\(\S+([^)]*)\)", text))))
    for platform in ("linux-x86_64", "linux-aarch64"):
        for variant in variants.of(platform):
            assert set(filter(None, variant.partition("=")[2].split("+"))) <= known


def test_only_a_portable_recipe_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_platform", lambda: "linux-x86_64")
    before = [engine_build.key_of(engine_build.recipe(portable)) for portable in (False, True)]
    monkeypatch.setattr(variants, "_X86", ("x64",))
    after = [engine_build.key_of(engine_build.recipe(portable)) for portable in (False, True)]
    assert before[0] == after[0] and before[1] != after[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(patched_llama_cpp, "_libraries", lambda: tmp_path)
    return tmp_path


def library(folder: Path, name: str, score: int) -> None:
    source = folder / f"{name}.c"
    source.write_text(f"int ggml_backend_score(void) {{ return {score}; }}\nint which(void) {{ return {score}; }}\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(folder / f"lib{name}.so"), str(source)], check=True)


def test_the_one_with_the_best_score_is_taken(folder: Path) -> None:
    with pytest.raises(CacherouteError, match=r"^libggml-cpu is missing from "):
        patched_llama_cpp.cpu_library()
    library(folder, "ggml-cpu-armv8.0", 0)
    with pytest.raises(CacherouteError, match=r"^none of ggml-cpu-armv8\.0 runs on this processor; run `cacheroute setup`"):
        patched_llama_cpp.cpu_library()
    for name, score in (("armv8.2", 7), ("armv8.6", 23), ("armv9", 0)):
        library(folder, f"ggml-cpu-{name}", score)
    assert patched_llama_cpp.cpu_library().which() == 23


def test_a_native_engine_has_one(folder: Path) -> None:
    library(folder, "ggml-cpu", 5)
    assert patched_llama_cpp.cpu_library().which() == 5


@pytest.mark.engine
def test_nothing_is_loaded_from_the_current_folder(tmp_path: Path) -> None:
    """llama.cpp looks there for kernels, and anybody may have written what is there (patches/0008)."""
    if not list(patched_llama_cpp._libraries().glob("libggml-cpu-*.so")):
        pytest.skip("a native engine looks for none")
    source = tmp_path / "evil.c"
    source.write_text(
        "#include <stdio.h>\nint ggml_backend_score(void) { return 1 << 30; }\n"
        '__attribute__((constructor)) static void loaded(void) { fclose(fopen("loaded", "w")); }\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(tmp_path / "libggml-cpu-evil.so"), str(source)], check=True)
    code = "import llama_cpp; llama_cpp.llama_backend_init(); print(llama_cpp.llama_print_system_info())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "CPU" in done.stdout and not (tmp_path / "loaded").exists()
