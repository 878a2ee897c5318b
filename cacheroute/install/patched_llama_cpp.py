"""The patched llama-cpp-python underneath: whether it is installed and patched, and where its libraries are."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

from cacheroute.errors import CacherouteError
from cacheroute.install import engine_build, processor

_SETUP = "run `cacheroute setup` to build and install the patched one"


@functools.cache
def module() -> ModuleType:
    """The patched `llama_cpp` module. Raises CacherouteError when it is missing, stock, or patched for another cacheroute."""
    _limit_spinning()
    advice = engine_build.installed_state().advice
    if advice:
        raise CacherouteError(f"{advice[0].upper()}{advice[1:]}.")
    lacking = processor.missing(engine_build.installed_record())
    if lacking:  # an environment that was copied here: the first kernel would end the process with SIGILL
        raise CacherouteError(
            f"The engine was compiled for a processor with {', '.join(lacking)}, which this one lacks; {_SETUP}."
        )
    try:
        import llama_cpp
    except (RuntimeError, OSError) as e:
        raise CacherouteError(f"llama-cpp-python cannot be loaded ({e}); {_SETUP}.") from None
    if not hasattr(llama_cpp.llama_cpp._lib, "llama_set_expert_hook"):
        raise CacherouteError(f"llama-cpp-python {llama_cpp.__version__} is a stock build without the expert hook; {_SETUP}.")
    _speak_on_abort()
    # today's enum ggml_log_level: llama-cpp-python has an older one, prints warnings as errors and hides errors
    levels = llama_cpp._logger.GGML_LOG_LEVEL_TO_LOGGING_LEVEL
    levels.update({1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR})
    internals = llama_cpp._internals
    for made in (internals.LlamaModel, internals.LlamaContext, internals.LlamaBatch, internals.LlamaSampler):
        made._exit_stack = ExitStack()  # of one whose making Ctrl-C has ended: it has none of its own to close
    internals.LlamaModel.sampler = None
    module: ModuleType = llama_cpp
    return module


# What OpenMP's libraries read once, when they are loaded: rounds of libgomp's spinning, milliseconds of libomp's.
_SPINNING = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}


def _limit_spinning() -> None:
    """Lets threads of llama.cpp that wait for each other sleep soon: one that spins takes the processor, beside other load, from
    the one that it waits for. What the user has set stays; where another package has loaded the library before, so does that.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in _SPINNING.items():
            os.environ.setdefault(name, value)


_AbortCallback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@functools.cache
def _speak_on_abort() -> Any:
    """From now on an assertion of llama.cpp that fails ends the process with a sentence and 1, and not with SIGABRT.

    The sentence goes to what is stderr now: llama-cpp-python sends stderr nowhere while it loads a model. Kept by the cache.
    """
    try:
        stderr = os.dup(2)
    except OSError:
        return None

    def speak(message: bytes) -> None:
        said = message.decode("utf-8", "replace").replace("\n", " ")
        _, _, said = said.rpartition("/")
        sentence = f"llama.cpp gave up at {said}: the model is damaged, or one that this llama.cpp cannot run."
        os.write(stderr, f"cacheroute: {sentence}\n".encode())
        os._exit(1)

    callback = _AbortCallback(speak)
    shared_library("ggml-base").ggml_set_abort_callback(callback)
    return callback


def shared_library(name: str) -> ctypes.CDLL:
    """One of the libraries that llama-cpp-python carries ("ggml-base"), without loading libllama."""
    _limit_spinning()
    folder = _libraries()
    for suffix in (".so", ".dylib"):
        if (folder / f"lib{name}{suffix}").exists():
            try:
                return ctypes.CDLL(str(folder / f"lib{name}{suffix}"))
            except OSError as e:
                raise CacherouteError(f"lib{name} cannot be loaded ({e}); {_SETUP}.") from None
    raise CacherouteError(f"lib{name} is missing from {folder}; {_SETUP}.")


def cpu_library() -> ctypes.CDLL:
    """libggml-cpu; of a portable engine's several the one that llama.cpp takes here, by the same score."""
    names = sorted(path.stem.removeprefix("lib") for path in _libraries().glob("libggml-cpu-*.so"))
    if not names:
        return shared_library("ggml-cpu")
    best = max((shared_library(name) for name in names), key=lambda library: int(library.ggml_backend_score()))
    if not best.ggml_backend_score():
        raise CacherouteError(f"none of {', '.join(names)} runs on this processor; {_SETUP}.")
    return best


def _libraries() -> Path:
    """The folder of llama-cpp-python's libraries."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise CacherouteError(f"llama-cpp-python is not installed; {_SETUP}.")
    return Path(spec.submodule_search_locations[0]) / "lib"
