"""What may be wrong with this machine or this installation, as `doctor` tells it. Loads the engine's library, no model."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cacheroute import files
from cacheroute.errors import CacherouteError, pip_install
from cacheroute.files import GIB, size
from cacheroute.install import android, engine_build, engine_source, machine, patched_llama_cpp, processor, versions
from cacheroute.install.check import Check

_EXTRAS = {
    "huggingface_hub": "pull",
    "matplotlib": "plot",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "lm_eval": "eval TASK",
    "distributed": "--scheduler",
    "pyarrow": "Parquet files",
}


def checks(root: Path = Path("/")) -> Iterator[Check]:
    """One after the other, as some take half a second. `root`: where proc and sys are, for tests."""
    yield Check("cacheroute", "ok", f"{files.VERSION}, Python {platform.python_version()}, {platform.platform(terse=True)}")
    yield from android.checks(root)
    yield from _engine(root)
    yield _cores(root)
    yield _load(root)
    yield _scheduling(root)
    yield _memory(root)
    yield _cache()
    place = android.storage(files.cache_dir(), root)
    if place:
        yield place
    yield _extras()


def _engine(root: Path) -> Iterator[Check]:
    state = engine_build.installed_state()
    if state.advice:
        found, _, advice = state.advice.partition(": ")
        yield Check("engine", "fail", found, advice)
        memory = android.build_memory(root)
        if memory:
            yield memory
        return
    lacking = processor.missing(engine_build.installed_record(), root)
    if lacking:  # loading it could end this process
        other = f"it was compiled for a processor with {', '.join(lacking)}, which this one lacks: it ends with SIGILL"
        yield Check("engine", "fail", other, "run `cacheroute setup` here")
        return
    try:
        patched_llama_cpp.module()
        built = set(versions.compiled_features(patched_llama_cpp.cpu_library()))
    except (CacherouteError, OSError, ImportError) as e:
        yield Check("engine", "fail", str(e).rstrip("."), "run `cacheroute setup`")
        return
    key = engine_build.installed_key()
    yield Check(
        "engine", "ok", f"llama-cpp-python {state.version}, {len(engine_source.patch_files())} patches, build {key or '?'}"
    )
    yield _features(built, root)
    openmp = engine_build.uses_openmp()
    if openmp is False:
        how = "`pkg upgrade clang`, which brings libomp" if machine.is_android(root) else "install libgomp or libomp"
        yield Check("OpenMP", "warn", "the engine was built without it", f"{how}, and run `cacheroute setup`")
    else:
        spin = os.environ.get("GOMP_SPINCOUNT") or os.environ.get("OMP_WAIT_POLICY") or "?"
        yield Check("OpenMP", "ok" if openmp else "warn", f"waiting threads spin for {spin} rounds" if openmp else "not known")


def _features(built: set[str], root: Path) -> Check:
    """`built`: what the kernels were compiled for, of a portable engine those that are taken here."""
    words = processor.features(root)
    if not (root / "proc/cpuinfo").exists():
        return Check("processor", "warn", f"{platform.machine()}; its features are not known")
    there = [name for word, name in processor.NAMES.items() if word in words]
    left_out = {"SVE"} if machine.is_android(root) else set()  # as processor.arm_arch() says
    left_out |= {"AVX_VNNI"} if "AVX512_VNNI" in built else set()  # the same at half the width
    missing = [name for name in there if name not in built | left_out]
    found = f"{platform.machine()} with {', '.join(there) or 'nothing special'}"
    if missing:
        return Check("processor", "warn", f"{found}; the engine does not use {', '.join(missing)}", "run `cacheroute setup` here")
    return Check("processor", "ok", f"{found}, all used by the engine")


def _cores(root: Path) -> Check:
    all_cores, big = machine.cores(), machine.big_cores(root)
    found = f"{all_cores} may be used" + (f", {big} of them fast" if big < all_cores else "")
    return Check("cores", "ok", f"{found}; -t is {big} by default")


def _load(root: Path) -> Check:
    """Over a third of a second."""

    def ticks() -> list[int]:
        return [sum(kind) for kind in zip(*machine.processor_ticks(root / "proc/stat"), strict=True)][:8]

    try:
        before = ticks()
        time.sleep(0.35)
        spent = [b - a for a, b in zip(before, ticks(), strict=True)]
    except (OSError, ValueError):
        spent = []
    if len(spent) < 8:
        return Check("load", "warn", "not known")
    whole = max(sum(spent), 1)
    idle, stolen = (spent[3] + spent[4]) / whole, spent[7] / whole
    found = f"{100 * (1 - idle):.0f}% of the processors in use" + (
        f", {100 * stolen:.0f}% stolen by other machines" if stolen > 0.02 else ""
    )
    if stolen > 0.1:
        return Check("load", "warn", found, "speeds measured here are those of a shared machine")
    if idle < 0.5:
        return Check("load", "warn", found, "close what computes; fewer threads (-t) may be faster meanwhile")
    return Check("load", "ok", found)


def _scheduling(root: Path) -> Check:
    """Of compute threads (engine/compute_threads.py)."""
    try:
        told = bool(machine.processor_ticks(root / "proc/stat"))
    except (OSError, ValueError):
        told = False
    if told:
        return Check("scheduling", "ok", "fewer threads compute beside other programs where that is faster")
    return Check("scheduling", "warn", "what other programs take is not known", "beside them try fewer threads with -t")


def _memory(root: Path) -> Check:
    free = machine.available_memory(root)
    if free is None:
        return Check("memory", "warn", "what is free is not known", "give --budget in GiB")
    kernel = machine.memory(root)
    total, unlimited = kernel.get("MemTotal"), kernel.get("MemAvailable")
    if total is None or unlimited is None:
        return Check("memory", "ok", f"{size(free)} free")
    found = f"{size(free)} free of {size(total)}"
    if free < 0.9 * unlimited:
        found += f"; a control group or ulimit leaves that, the machine has {size(unlimited)}"
    small = free < GIB
    return Check("memory", "warn" if small else "ok", found, "free some: little fits into that" if small else "")


def _cache() -> Check:
    try:
        folder = files.cache_dir()
    except CacherouteError as e:
        return Check("cache", "fail", str(e).rstrip("."))
    at = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(at, os.W_OK | os.X_OK):
        return Check("cache", "fail", f"{folder} cannot be written", "set CACHEROUTE_CACHE to a folder that can")
    free = shutil.disk_usage(at).free
    few = free < 2 * GIB
    advice = "building the engine needs 2 GiB; free some, or set CACHEROUTE_CACHE" if few else ""
    return Check("cache", "warn" if few else "ok", f"{folder}, {size(free)} free on its disk", advice)


def _extras(find: Callable[[str], object] = importlib.util.find_spec) -> Check:
    missing = [f"{name} (for {what})" for name, what in _EXTRAS.items() if not find(name)]
    found = "all are here" if not missing else f"not installed: {', '.join(missing)}"
    return Check("packages", "ok", found, f"{pip_install('NAME', find)}, where wanted" if missing else "")
