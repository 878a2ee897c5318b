"""Tuned routings: what is written is read, what does not fit is refused, and each layer gets its own parameters."""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cacheroute import Llama
from cacheroute.errors import UsageError
from cacheroute.model import experts, gguf_file
from cacheroute.native import bindings
from cacheroute.routing import budget as budgets
from cacheroute.routing import strategies, tuned
from cacheroute.routing.tuned import TunedRouting
from cacheroute.trace import simulate
from cacheroute.trace.simulate import Arm
from support.traces import fed

TINY = TunedRouting(
    model="tiny qwen3moe",
    architecture="qwen3moe",
    n_expert=32,
    n_used=4,
    layers=(0, 1),
    strategy="cache-prior",
    parameters=({"lambda": 0.0}, {"lambda": 0.8, "j": 1, "max-loss": 0.5}),
    notes={"made by": "a test"},
)


def test_a_tuned_routing_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    tuned.save(TINY, path)
    assert tuned.load(path) == TINY
    assert [f.name for f in tmp_path.iterdir()] == ["p.json"]
    with pytest.raises(UsageError, match="exists; --force"):
        tuned.save(replace(TINY, strategy="max-rank"), path)
    assert tuned.load(path) == TINY
    tuned.save(replace(TINY, model=""), path, force=True)
    assert tuned.load(path).model == ""


def test_a_table_has_a_short_name() -> None:
    for file, name in ((tuned.DEMO, "tuned"), ("/a/0123456789abcdef-16.json", "tuned"), ("/a/b/mine.json", "tuned:mine")):
        assert tuned.short(f"tuned:{file}") == name
    assert tuned.short("tuned") == "tuned" and tuned.short("max-rank:m=4") == "max-rank:m=4"


def test_the_grammar_knows_tuned_files(tmp_path: Path) -> None:
    tuned.save(TINY, tmp_path / "p.json")
    parsed = strategies.parse_list(f"original,tuned:{tmp_path}/p.json")[1]
    assert str(parsed) == f"tuned:{tmp_path}/p.json" and parsed.lossy
    parsed.check(32, 4, (0, 1), "tiny qwen3moe")
    native = strategies.to_native(parsed, 4, 2)
    assert [(r.strategy, r.lambda_, r.j, r.max_loss) for r in native] == [(4, 0.0, 2, -1.0), (4, 0.8, 1, 0.5)]


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"format": "another"}, "not a tuned routing; `cacheroute tune` writes one"),
        ({"version": 2}, "is of version 2; this cacheroute reads version 1"),
        ({"parameters": [{"lambda": 0.1}]}, "parameters for 1 of 2 layers"),
        ({"parameters": [{"lambda": 0.1}, {"lambda": 3}]}, "layer 1: cache-prior: lambda is at least 0 and at most 1, not 3.0"),
        ({"parameters": [{"lambda": 0.1}, {}]}, "layer 1: cache-prior needs lambda"),
        ({"parameters": [{"lambda": 0.1}, {"lambda": None}]}, "a value that cannot be"),
        ({"strategy": "nothing"}, "layer 0: There is no routing 'nothing'"),
        ({"layers": []}, "parameters for 2 of 0 layers"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, change: dict[str, object], sentence: str) -> None:
    path = tmp_path / "p.json"
    tuned.save(TINY, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=sentence):
        strategies.parse(f"tuned:{path}")


def test_a_missing_or_damaged_tuned_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere cannot be read"):
        strategies.parse(f"tuned:{tmp_path}/nowhere")
    (tmp_path / "x").write_text("{")
    with pytest.raises(UsageError, match="not a tuned routing; `cacheroute tune` writes one"):
        strategies.parse(f"tuned:{tmp_path}/x")


@pytest.mark.parametrize(
    "other, sentence",
    [
        ({"n_used": 2}, "is for a model with 2 layers of 32 experts, 2 used"),
        ({"layers": (0, 2)}, "is for a model with 2 layers"),
        ({"model": "another"}, "is for the model 'another'"),
        ({"parameters": ({"lambda": 0.1}, {"lambda": 0.1, "j": 9})}, "j is at most 4"),
    ],
)
def test_a_tuned_file_of_another_model_is_refused(alone: Path, tmp_path: Path, other: dict[str, object], sentence: str) -> None:
    tuned.save(replace(TINY, **other), tmp_path / "p.json")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=sentence):
        Llama(str(alone), routing=f"tuned:{tmp_path}/p.json", verbose=False)


def test_each_layer_has_its_own_parameters(alone: Path, tmp_path: Path) -> None:
    tuned.save(TINY, tmp_path / "p.json")
    llm = Llama(str(alone), routing=f"tuned:{tmp_path}/p.json", budget=6, n_ctx=64, n_threads=1, verbose=False)
    assert llm.stats().routing == f"tuned:{tmp_path}/p.json"
    with llm.decoding():
        for token in range(3, 40):
            llm.eval([token])
    by_layer = llm.decoded_by_layer()
    assert by_layer[0].swapped == 0 < by_layer[1].swapped


HELD = replace(TINY, parameters=({"lambda": 0.2, "experts": 5}, {"lambda": 0.2, "experts": 11}))


def test_layers_may_share_a_budget_unevenly(alone: Path, tmp_path: Path) -> None:
    tuned.save(HELD, tmp_path / "p.json")
    llm = Llama(str(alone), routing=f"tuned:{tmp_path}/p.json", budget=8, n_ctx=64, n_threads=1, verbose=False)
    llm.eval(list(range(3, 20)))
    with llm.decoding():
        for token in range(3, 30):
            llm.eval([token])
            counts = []
            for layer in range(2):
                mask = (ctypes.c_uint8 * 32)()
                bindings.lib.cr_hook_resident(llm._hook.handle, layer, mask)
                counts.append(sum(mask))
            assert counts[0] == 5 and counts[1] <= 11
    assert counts == [5, 11]
    assert llm.stats().resident_bytes == llm.measure_resident()
    llm.close()


@pytest.mark.parametrize(
    "experts, budget, sentence",
    [
        ((5, 11), 7, "B of experts in memory, and the budget has"),
        ((3, 11), 8, "a layer holds 4 to 32 experts, not 3"),
        ((4, 33), "all", "a layer holds 4 to 32 experts, not 33"),
        ((4.5, 8), 8, "layer 0: experts is a whole number, not 4.5"),
        ((float("inf"), 8), 8, "with a value that cannot be"),
    ],
)
def test_shares_that_do_not_fit_the_budget_are_refused(
    alone: Path, tmp_path: Path, experts: tuple[float, ...], budget: str, sentence: str
) -> None:
    tuned.save(replace(HELD, parameters=tuple({"lambda": 0.2, "experts": n} for n in experts)), tmp_path / "p.json")
    with pytest.raises(UsageError, match=sentence):
        Llama(str(alone), routing=f"tuned:{tmp_path}/p.json", budget=budget, verbose=False)


def test_a_simulation_gives_each_layer_its_experts(tmp_path: Path) -> None:
    own = ({"lambda": 0.2, "experts": 6}, {"lambda": 0.2, "experts": 12})
    tuned.save(replace(TINY, model="made up", n_expert=24, parameters=own), tmp_path / "p.json")
    replay = simulate.Replay(fed(False))
    mixed = replay.run(Arm("9", strategies.parse(f"tuned:{tmp_path}/p.json"), "lru"), per_layer=True)
    for layer, capacity in ((0, "6"), (1, "12")):
        alike = replay.run(Arm(capacity, strategies.parse("cache-prior:lambda=0.2"), "lru"), per_layer=True)
        assert mixed[1 + layer].misses == alike[1 + layer].misses
    with pytest.raises(UsageError, match="the budget has"):
        replay.run(Arm("8", strategies.parse(f"tuned:{tmp_path}/p.json"), "lru"))


def test_a_simulation_accepts_a_tuned_file(tmp_path: Path) -> None:
    of_trace = replace(TINY, model="made up", n_expert=24, parameters=({"lambda": 0.0}, {"lambda": 0.8, "j": 1}))
    tuned.save(of_trace, tmp_path / "p.json")
    rows = simulate.Replay(fed(False)).run(Arm("9", strategies.parse(f"tuned:{tmp_path}/p.json"), "lru"), per_layer=True)
    uniform = simulate.Replay(fed(False)).run(Arm("9", strategies.parse("cache-prior:lambda=0.8:j=1"), "lru"), per_layer=True)
    assert rows[1].swapped == 0 < rows[2].swapped == uniform[2].swapped
    tuned.save(TINY, tmp_path / "other.json")
    with pytest.raises(UsageError, match="is for a model with 2 layers of 32 experts, 4 used"):
        simulate.Replay(fed(False)).run(Arm("9", strategies.parse(f"tuned:{tmp_path}/other.json"), "lru"))


def test_the_demo_models_own_is_packaged(demo_model: Path, own_cache: Path) -> None:
    found = tuned.find(demo_model, "50%")
    assert found.routing == f"tuned:{tuned.DEMO}"
    layout = experts.layout(gguf_file.read(demo_model))
    routing = strategies.parse(found.routing)
    routing.check(layout.n_expert, layout.n_used, layout.indices, layout.model)
    strategies.capacities(routing, budgets.parse("50%", layout), layout)  # raises if it needs more than the budget
    assert found.eviction == tuned.load(tuned.DEMO).notes["eviction"]


def test_the_packaged_one_is_for_its_model_and_budget_only(demo_model: Path, tiny: Path, own_cache: Path) -> None:
    for model, budget in ((demo_model, "25%"), (tiny, "50%")):
        with pytest.raises(UsageError, match="Nothing is tuned"):
            tuned.find(model, budget)


def test_the_users_own_comes_before_the_packaged_one(demo_model: Path, own_cache: Path) -> None:
    layout = experts.layout(gguf_file.read(demo_model))
    own = tuned.path(demo_model, budgets.parse("50%", layout).capacity)
    own.parent.mkdir(parents=True)
    tuned.save(replace(tuned.load(tuned.DEMO), notes={"eviction": "lru"}), own)
    assert tuned.find(demo_model, "50%") == tuned.Settings(f"tuned:{own}", "lru")
