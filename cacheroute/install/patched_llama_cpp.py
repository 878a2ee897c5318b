"""The patched llama-cpp-python underneath: whether it is installed and patched, and where its libraries are."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from types import ModuleType

from cacheroute.errors import CacherouteError
from cacheroute.install import engine_build

_SETUP = "run `cacheroute setup` to build and install the patched one"


@functools.cache
def module() -> ModuleType:
    """The patched `llama_cpp` module. Raises CacherouteError when it is missing, stock, or patched for another cacheroute."""
    advice = engine_build.installed_state().advice
    if advice:
        raise CacherouteError(f"{advice[0].upper()}{advice[1:]}.")
    try:
        import llama_cpp
    except (RuntimeError, OSError) as e:
        raise CacherouteError(f"llama-cpp-python cannot be loaded ({e}); {_SETUP}.") from None
    if not hasattr(llama_cpp.llama_cpp._lib, "llama_set_expert_hook"):
        raise CacherouteError(f"llama-cpp-python {llama_cpp.__version__} is a stock build without the expert hook; {_SETUP}.")
    module: ModuleType = llama_cpp
    return module


def shared_library(name: str) -> ctypes.CDLL:
    """One of the libraries that llama-cpp-python carries ("ggml-base"), without loading libllama."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise CacherouteError(f"llama-cpp-python is not installed; {_SETUP}.")
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    for suffix in (".so", ".dylib"):
        if (folder / f"lib{name}{suffix}").exists():
            try:
                return ctypes.CDLL(str(folder / f"lib{name}{suffix}"))
            except OSError as e:
                raise CacherouteError(f"lib{name} cannot be loaded ({e}); {_SETUP}.") from None
    raise CacherouteError(f"lib{name} is missing from {folder}; {_SETUP}.")
