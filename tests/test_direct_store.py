"""Direct reads: experts in slots of the process's own memory, bit for bit what the file holds.

Pages and counts of single exchanges are in test_store.py, for both ways of reading.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cacheroute import Llama
from cacheroute.engine import stores
from cacheroute.errors import CacherouteError, UsageError
from support import tiny_models
from support.cli import cacheroute
from support.decoding import last_logits
from support.expert_file import LIB, ODD, PAGE, model, on_a_disk, skipped_without_direct_reads
from support.native_router import native_store
from support.systems import LINUX

pytestmark = pytest.mark.skipif(not LINUX, reason="counts pages as Linux does")

Floats = npt.NDArray[np.float32]
N_PROMPT, N_DECODE = 41, 16  # the prompt fills two micro-batches and part of a third
SIZES: dict[str, Any] = {"n_ctx": 128, "n_batch": 64, "n_ubatch": 16, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
HALF: dict[str, Any] = {"budget": "50%", **SIZES}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = on_a_disk(tmp_path_factory.mktemp("direct"))
    probe = folder / "probe"
    probe.write_bytes(bytes(PAGE))
    with skipped_without_direct_reads(), native_store(str(probe), 1, 1, [], "direct"):
        return folder


# ---- the store alone ------------------------------------------------------------------------------


@pytest.mark.parametrize("expert_bytes", [160, 2016, PAGE, ODD, 300 * 1024 + 32])
def test_slots_hold_what_the_file_holds(disk: Path, expert_bytes: int) -> None:
    """After any earlier use of the slot, and for the last expert of the file, with a last page that is not full."""
    rng = np.random.default_rng(expert_bytes)
    with model(disk, n_layers=2, n_tensors=2, n_expert=9, expert_bytes=expert_bytes, io="direct") as m:
        last = m.n_expert - 1
        for step in range(40):
            layer = step % 2
            there = sorted(m.resident[layer])
            absent = [e for e in range(m.n_expert) if e not in there]
            load = rng.permutation(absent)[: rng.integers(0, 4)].tolist()
            if step == 39 and last not in m.resident[1]:
                load = [last]
            evict = [e for e in rng.permutation(there)[: rng.integers(0, 4)].tolist() if e != last or step < 39]
            m.exchange(layer, load, evict)
            assert m.counted() == (m.expected_bytes(),) * 2, f"after exchange {step}"
            for at, experts in enumerate(m.resident):
                for expert in experts:
                    assert m.touch(at, expert) == m.in_file(at, expert), f"expert {expert}, exchange {step}"
        assert last in m.resident[1]


def test_slots_of_evicted_experts_are_reused(disk: Path) -> None:
    """A swap takes no memory from the system, which would have to clear it first, and gives none back."""
    with model(disk, n_tensors=3, expert_bytes=300 * 1024 + 32, io="direct") as m:
        m.exchange(0, load=range(4))
        slots = {m.place(0, e) // PAGE for e in range(4)}
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for step in range(20):
            m.exchange(0, load=[(step + 4) % 8], evict=[step % 8])
        # a fault each page of one expert would be 225
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 200
        assert {m.place(0, e) // PAGE for e in m.resident[0]} == slots


def test_what_is_not_resident_is_read_from_the_file(disk: Path) -> None:
    with model(disk, io="direct") as m:
        m.exchange(0, load=[3])
        assert m.place(0, 3) != m.address + m.starts[0][0] + 3 * m.expert_bytes
        assert m.place(0, 4) == m.address + m.starts[0][0] + 4 * m.expert_bytes
        assert m.touch(0, 4) == m.in_file(0, 4)
        assert LIB.cr_store_find(m.store, m.address) == m.address  # before the experts: nothing of the store's


@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_another_thread_may_ask_what_is_resident(disk: Path, io: str) -> None:
    with model(disk, n_tensors=2, io=io) as m:
        m.resident[0] = set(range(m.n_expert))
        most, stop = m.expected_bytes(), threading.Event()
        m.resident[0] = set()

        def ask() -> int:
            n = 0
            while not stop.is_set():
                assert all(0 <= nbytes <= most for nbytes in m.counted())
                n += 1
            return n

        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask)
            for step in range(100):
                m.exchange(0, load=[step % 8], evict=[(step - 3) % 8] if step > 2 else [])
            stop.set()
            assert asked.result() > 0
        assert m.counted() == (m.expected_bytes(),) * 2


def test_a_filesystem_without_direct_reads_is_one_sentence() -> None:
    with pytest.raises(CacherouteError, match=r"^the filesystem of /proc/version has no direct reads\.$"):
        native_store("/proc/version", 1, 1, [], "direct").__enter__()


# ---- a model --------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3moe": ("qwen3moe", {}),
    "gpt-oss": ("gpt-oss", {}),
    "merged": ("deepseek2", {"merged": True, "quant": "Q8_0"}),
    "split, two sizes": ("qwen3moe", {"shards": 2, "mix": "Q4_K_M", "n_embd": 256, "n_ff": 256, "n_expert": 8, "n_used": 2}),
}


@pytest.fixture(scope="module", params=CASES)
def path(request: pytest.FixtureRequest, disk: Path) -> Path:
    arch, overrides = CASES[request.param]
    return tiny_models.write(arch, disk / f"{request.param}.gguf", **overrides)


@pytest.fixture
def small(disk: Path) -> Path:
    return tiny_models.write("qwen3moe", disk / "small.gguf")


def run(llm: Llama) -> Floats:
    """From a fresh sequence: the logits after a prompt, then after each token decoded on its own; as bits."""
    llm.reset()
    tokens = np.random.default_rng(7).integers(3, llm.n_vocab(), N_PROMPT + N_DECODE).tolist()
    rows = []

    def eval_and_keep(part: list[int]) -> None:
        llm.eval(part)
        rows.append(last_logits(llm).view(np.uint32))
        assert llm.measure_resident() == llm.stats().resident_bytes or llm.io == "none"

    eval_and_keep(tokens[:N_PROMPT])
    with llm.decoding():
        for token in tokens[N_PROMPT:]:
            eval_and_keep([token])
    return np.array(rows)


@pytest.mark.engine
@pytest.mark.parametrize("routing", ["original", "cache-prior:lambda=0.5"])
def test_logits_do_not_depend_on_io(path: Path, routing: str) -> None:
    with contextlib.closing(Llama(str(path), routing=routing, **HALF)) as llm:
        mapped, counted = run(llm), llm.stats()
    with contextlib.closing(Llama(str(path), routing=routing, io="direct", **HALF)) as llm:
        np.testing.assert_array_equal(run(llm), mapped)
        direct = llm.stats()
    assert direct.io == "direct"
    for a, b in ((direct.prefill, counted.prefill), (direct.decode, counted.decode)):
        assert (a.hits, a.misses, a.reads) == (b.hits, b.misses, b.reads)
        assert a.read_bytes == b.read_bytes
        assert a.misses > 0


@pytest.mark.engine
@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_reads_during_compute_change_no_logit(path: Path, io: str) -> None:
    """Under any order of reads and threads; also for a prompt, as its batches need more experts than the budget."""
    with contextlib.closing(Llama(str(path), io="none", **HALF)) as llm:
        unread = run(llm)
    for n_threads in (1, 2):
        threads = {"n_threads": n_threads, "n_threads_batch": n_threads}
        with contextlib.closing(Llama(str(path), budget="25%", io=io, flash_mbps=20, **(SIZES | threads))) as llm:
            np.testing.assert_array_equal(run(llm), unread, err_msg=f"{n_threads} threads")
            assert llm.stats().decode.misses > 0


@pytest.mark.engine
def test_io_can_be_changed_and_changed_back(small: Path) -> None:
    with contextlib.closing(Llama(str(small), budget="25%", **SIZES)) as llm:
        first = run(llm)
        for io in ("direct", "buffered", "direct", "none", "direct", "buffered"):
            llm.configure(budget="25%", io=io)
            assert llm.stats().resident_bytes == 0
            np.testing.assert_array_equal(run(llm), first, err_msg=io)


@pytest.mark.engine
def test_a_file_that_becomes_shorter_is_an_error(small: Path) -> None:
    with contextlib.closing(Llama(str(small), io="direct", **HALF)) as llm:
        llm.eval([5, 6, 7])
        os.truncate(small, small.stat().st_size // 4)
        with pytest.raises(CacherouteError, match=r"failed: the file has become shorter since it was loaded\.$"), llm.decoding():
            for token in range(3, 200):
                llm.eval([token])
        llm.reset()
        with pytest.raises(CacherouteError, match=r"was changed after it was loaded; load the model again\.$"):
            llm.eval([5, 6, 7])


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing measured yet, nothing said; the file of what was."""
    monkeypatch.setenv("CACHEROUTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "_said", set())
    return tmp_path / "cache" / "io.json"


@pytest.mark.engine
def test_auto_is_the_default_measures_once_and_remembers(
    fresh: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened, real = [], stores.new_store
    monkeypatch.setattr(stores, "new_store", lambda io, *more: (opened.append(io), real(io, *more))[1])
    with contextlib.closing(Llama(str(small), **HALF)) as llm:
        measured = llm.io
        assert opened == ["direct", "buffered"], "and one of them is kept, which checks its files once"
        assert llm.resident_bytes == 0 and llm.stats().decode.read_bytes == llm.stats().prefill.read_bytes == 0
        assert measured in ("buffered", "direct") and llm.stats().io == measured
        said = capsys.readouterr().err
        assert bool(said) == (measured == "buffered")
        [(key, kept)] = json.loads(fresh.read_text()).items()
        assert kept == measured
        other = "buffered" if measured == "direct" else "direct"
        fresh.write_text(json.dumps({key: other, "another": "buffered"}))  # what is written there is taken
        llm.configure(budget="50%", io="auto")
        assert llm.io == other and capsys.readouterr().err == ""
        fresh.write_text("not json")
        llm.configure(budget="50%", io="auto")
        assert len(json.loads(fresh.read_text())) == 1


@pytest.mark.engine
def test_auto_reads_directly_unless_that_is_clearly_slower(
    fresh: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for direct, buffered, taken in ((1.0, 2.0, "direct"), (1.1, 1.0, "direct"), (2.0, 1.0, "buffered")):
        fresh.unlink(missing_ok=True)
        monkeypatch.setattr(stores, "measure", lambda *_, d=direct, b=buffered: {"direct": d, "buffered": b})
        with contextlib.closing(Llama(str(small), **HALF)) as llm:
            assert llm.io == taken
    said = f"cacheroute: --io auto reads buffered (direct 2000.00 ms, buffered 1000.00 ms an expert); this is kept in {fresh}.\n"
    assert capsys.readouterr().err == said


@pytest.mark.engine
def test_auto_measures_once_where_its_result_cannot_be_saved(fresh: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.parent.write_text("in the way")
    measured: list[dict[str, float]] = []
    real = stores.measure
    monkeypatch.setattr(stores, "measure", lambda *more: (measured.append(real(*more)), measured[-1])[1])
    for _ in range(2):
        with contextlib.closing(Llama(str(small), io="auto", **HALF)) as llm:
            assert llm.io == stores.faster(measured[0])
    assert len(measured) == 1


@pytest.mark.engine
def test_auto_explains_once_why_it_does_not_read_directly(
    fresh: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = stores.bindings.checked

    def checked(make: Any, *arguments: Any) -> int:
        if make == LIB.cr_store_new and arguments[-1]:
            raise CacherouteError("the filesystem of m.gguf has no direct reads.")
        return real(make, *arguments)

    monkeypatch.setattr(stores.bindings, "checked", checked)
    with contextlib.closing(Llama(str(small), io="auto", **HALF)) as llm:
        assert llm.io == "buffered"
        llm.configure(budget="50%", io="auto")
        assert llm.io == "buffered"
        said = "cacheroute: --io auto reads through the page cache: the filesystem of m.gguf has no direct reads.\n"
        assert capsys.readouterr().err == said
        with pytest.raises(CacherouteError, match="no direct reads"):
            llm.configure(budget="50%", io="direct")  # what was asked for by name is not replaced


@pytest.mark.engine
def test_commands_accept_io_direct(small: Path) -> None:
    texts = []
    for io in ("buffered", "direct"):
        done = cacheroute("generate", "-m", small, "-p", "the house", "-n", 8, "--temp", 0, "-t", 1, "--io", io, "-o", "json")
        assert done.returncode == 0, done.stderr
        assert f'"io": "{io}"' in done.stdout
        texts.append(done.stdout.partition('"text": ')[2].partition('"finish_reason"')[0])
    assert texts[0] == texts[1]
    unknown = cacheroute("generate", "-m", small, "-p", "the", "--io", "fast")
    assert unknown.returncode == 2
    assert unknown.stderr == "cacheroute: There is no io 'fast'; there are auto, direct, buffered, load and none.\n"


@pytest.mark.engine
def test_a_pace_is_a_positive_number(small: Path) -> None:
    for wrong in (-5, 0, float("nan"), float("inf"), True, "x"):
        with pytest.raises(UsageError, match="flash_mbps is a number of MB/s above 0"):
            Llama(str(small), flash_mbps=wrong, **HALF)
    with contextlib.closing(Llama(str(small), flash_mbps=50, **HALF)) as llm:
        with pytest.raises(UsageError, match="not 'x'"):
            llm.flash_mbps = "x"  # type: ignore[assignment]
        assert llm.flash_mbps == 50
