"""Versions at load: a library or a hook that was built from another cacheroute is refused in one sentence."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from cacheroute import Llama
from cacheroute.engine import hook
from cacheroute.errors import CacherouteError
from cacheroute.files import packaged
from cacheroute.native import bindings
from cacheroute.native.counters import CCounters, Counters
from support.hook_abi import CCallback, CHook


def library(tmp_path: Path, body: str) -> Path:
    """A shared library of these C definitions, and of every function that the bindings name and the body does not."""
    source, built = tmp_path / "other.c", tmp_path / "other.so"
    rest = "".join(f"int {name}(void) {{ return 0; }}\n" for name in bindings._SIGNATURES if name not in body)
    source.write_text(body + rest)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(built), str(source)], check=True)
    return built


@pytest.mark.parametrize("body", ["int cr_abi_matches(void) { return 0; }\n", "int cr_abi_matches_not;\n"], ids=["other", "old"])
def test_another_library_is_refused(tmp_path: Path, body: str) -> None:
    with pytest.raises(CacherouteError, match=r"was built from another version of cacheroute; install cacheroute again"):
        bindings.load(library(tmp_path, body))


def test_each_size_and_the_version_count() -> None:
    structs = (bindings.Routing, bindings.Shape, bindings.RouterWeights, CCounters, bindings.Tensor, bindings.Progress)
    right = [bindings.ABI_VERSION, *map(ctypes.sizeof, structs)]
    assert bindings.lib.cr_abi_matches(*right)
    for i in range(len(right)):
        wrong = [n + 8 * (j == i) for j, n in enumerate(right)]
        assert not bindings.lib.cr_abi_matches(*wrong)


def test_counters_are_those_of_the_header() -> None:
    header = packaged("native/cacheroute.h")
    if header is None:
        pytest.skip("not a checkout")
    struct = header.read_text().partition("struct cr_counters {")[2].partition("};")[0]
    lines = [line.split(";")[0].split() for line in struct.splitlines() if line.strip().startswith(("uint64_t", "double"))]
    declared = [line[:2] for line in lines]
    types = {"int": "uint64_t", "float": "double"}
    assert declared == [[types[str(f.type)], f.name] for f in fields(Counters)]


def test_an_engine_of_another_version_refuses_the_hook(tiny: Path) -> None:
    llm = Llama(str(tiny), budget="50%", n_ctx=64, n_threads=1, verbose=False)
    ours = CHook.of(CCallback(0), CCallback(0))
    attach = hook._api.llama_set_expert_hook
    for field in ("version", "hook_bytes", "event_bytes"):
        other = CHook.from_buffer_copy(ours)
        setattr(other, field, getattr(other, field) + 1)
        assert not attach(llm._ctx.ctx, ctypes.addressof(other))
    llm.eval([5, 6])  # the hook that was there is still there
    assert llm.stats().prefill.tokens == 2


def test_a_refused_hook_is_one_sentence(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = Llama(str(tiny), budget="50%", n_ctx=64, n_threads=1, verbose=False)
    monkeypatch.setattr(hook._api, "llama_set_expert_hook", lambda context, address: False)
    with pytest.raises(CacherouteError, match=r"built from different versions; run `cacheroute setup`\.$"):
        llm.configure(routing="cache-prior:lambda=0.2")
    monkeypatch.undo()
    assert str(llm.routing) == "original"
