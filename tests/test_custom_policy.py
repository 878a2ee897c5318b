"""Policies in Python: they decide, live and simulated alike; a wrong one stops the run with its name and token."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest

from cacheroute import Llama
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.routing import custom_policy, strategies
from cacheroute.trace import trace_file
from cacheroute.trace.simulate import Arm, Replay
from support import tiny_models
from support.cli import invoke
from support.decoding import last_logits
from support.traces import fed

MODULE = """
import numpy as np

class TopK:
    def __init__(self, n_expert, n_used, n_layers):
        self.n_used, self.calls, self.resets = n_used, 0, 0
    def reset(self):
        TopK.n_resets = self.resets = self.resets + 1
    def choose(self, layer, z, mass, resident):
        TopK.n_calls = self.calls = self.calls + 1
        return np.argsort(-z, kind="stable")[: self.n_used][::-1]

class MaxRank(TopK):
    def choose(self, layer, z, mass, resident):
        ranked = np.argsort(-z, kind="stable").tolist()
        near = [e for e in ranked[1:7] if resident[e]]
        return (ranked[:1] + near + [e for e in ranked[1:] if e not in near])[: self.n_used]

class Prints(TopK):
    print("imported")
    def __init__(self, *sizes):
        print("made")
        super().__init__(*sizes)
    def reset(self):
        print("reset")
    def choose(self, *scores):
        print("chosen")
        return super().choose(*scores)

class Late(TopK):
    wrong = [0, 0, 0, 0]
    def choose(self, layer, z, mass, resident):
        good = super().choose(layer, z, mass, resident)
        return good if self.calls < 6 else self.wrong

class Raises(Late):
    @property
    def wrong(self):
        raise ZeroDivisionError("division by zero")

class Short(Late):
    wrong = [0, 1]

class Outside(Late):
    wrong = [0, 1, 2, 99]

class Negative(Late):
    wrong = [0, 1, 2, -1]

class Real(Late):
    wrong = [0.0, 1.0, 2.0, 3.0]

class Nothing(Late):
    wrong = None

class Unmade:
    def __init__(self, *_):
        raise RuntimeError("no")
    def choose(self, *_):
        pass

class NoChoice:
    pass
"""


@pytest.fixture(autouse=True)
def policies(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("policies")
    (folder / "policies_of_the_test.py").write_text(MODULE)
    (folder / "broken_of_the_test.py").write_text("1 / 0")
    example = textwrap.dedent((custom_policy.__doc__ or "").partition("Near`):\n")[2].partition("\n`choose` is")[0])
    (folder / "my_policy.py").write_text(example)
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    path = tiny_models.write("qwen3moe", tmp_path_factory.mktemp("tiny") / "m.gguf")
    return Llama(str(path), io="none", n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)


def run(llm: Llama, name: str) -> np.ndarray:
    """The logits after a prompt and 20 decoded tokens."""
    llm.configure(budget=8, routing=name, io="none")
    llm.eval([3, 4, 5])
    with llm.decoding():
        for token in range(6, 26):
            llm.eval([token])
    return last_logits(llm)


def policy(name: str) -> str:
    return f"python:policies_of_the_test:{name}"


def test_a_policy_that_chooses_the_top_k_gives_the_logits_of_original(model: Llama) -> None:
    expected = run(model, "original")
    np.testing.assert_array_equal(run(model, policy("TopK")), expected)
    stats = model.stats()
    assert stats.decode.swapped == 0 and stats.routing == policy("TopK")
    from policies_of_the_test import TopK  # type: ignore[import-not-found]

    assert TopK.n_calls == 20 * 2  # no prompt tokens
    model.reset()
    assert TopK.n_resets > 0


def test_what_a_policy_prints_is_no_result(model: Llama, capfd: pytest.CaptureFixture[str]) -> None:
    run(model, policy("Prints"))
    model.reset()
    said = capfd.readouterr()
    assert said.out == "" and {"made", "reset", "chosen"} <= set(said.err.split())


def test_a_python_policy_equals_the_native_strategy_live_and_simulated(model: Llama) -> None:
    np.testing.assert_array_equal(run(model, policy("MaxRank")), run(model, "max-rank:m=7:j=1"))
    assert model.stats().decode.swapped > 0
    replay = Replay(fed(True))
    native, custom = (replay.run(Arm("9", strategies.parse(r), "lru"))[0] for r in ("max-rank:m=7:j=1", policy("MaxRank")))
    assert native.swapped == custom.swapped > 0
    assert (native.misses, native.evictions, native.lost_mass) == (custom.misses, custom.evictions, custom.lost_mass)


def test_the_example_runs() -> None:
    row = Replay(fed(False)).run(Arm("9", strategies.parse("python:my_policy:Near"), "lru"))[0]
    assert row.swapped > 0 and row.misses < Replay(fed(False)).run(Arm("9", strategies.parse("original"), "lru"))[0].misses


WRONG = [
    ("Late", r"it chose an expert twice: \[0, 0, 0, 0\]"),
    ("Raises", "ZeroDivisionError: division by zero"),
    ("Short", r"it returned the shape \(2,\), not \(4,\)"),
    ("Outside", r"expert 99 is not within 0\.\."),
    ("Negative", r"expert -1 is not within 0\.\."),
    ("Real", "it returned float64, not whole numbers"),
    ("Nothing", r"it returned the shape \(\), not \(4,\)"),
]


@pytest.mark.parametrize("name, sentence", WRONG)
def test_a_wrong_policy_stops_the_run(model: Llama, name: str, sentence: str) -> None:
    # the sixth call: two layers a token
    with pytest.raises(CacherouteError, match=rf"^{name}\.choose failed at decoded token 3, layer 1: {sentence}"):
        run(model, policy(name))
    with pytest.raises(CacherouteError, match=rf"^{name}\.choose failed"):
        Replay(fed(False)).run(Arm("9", strategies.parse(policy(name)), "lru"))
    run(model, "original")  # the model is whole


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("python:", "is not of the form python:package.module:ClassName"),
        ("python:policies_of_the_test", "is not of the form"),
        ("python:nowhere:A", "nowhere cannot be imported .ModuleNotFoundError"),
        ("python:broken_of_the_test:A", "cannot be imported .ZeroDivisionError"),
        (policy("Gone"), "has no class Gone with a choose"),
        (policy("NoChoice"), "has no class NoChoice with a choose"),
        (policy("np"), "has no class np with a choose"),
    ],
)
def test_an_object_that_is_not_a_policy_is_one_sentence(model: Llama, name: str, sentence: str) -> None:
    before = model.stats().routing
    with pytest.raises(UsageError, match=sentence):
        model.configure(routing=name)
    assert model.stats().routing == before


def test_a_policy_that_fails_to_construct_is_one_sentence(model: Llama) -> None:
    with pytest.raises(CacherouteError, match=r"^Unmade could not be made \(RuntimeError: no\)"):
        model.configure(routing=policy("Unmade"), io="none")
    run(model, "original")


def test_commands_accept_a_policy_and_warn_that_it_is_slower(tmp_path: Path) -> None:
    trace_file.write(tmp_path / "t", fed(False).header, fed(False).records)
    simulated = invoke("simulate", str(tmp_path / "t"), "--routing", policy("TopK"), "-o", "csv")
    assert simulated.exit_code == 0 and "slower" in simulated.stderr, simulated.output
    assert policy("TopK") in simulated.stdout
    failed = invoke("simulate", tmp_path / "t", "--routing", policy("Short"))
    assert failed.exit_code == 1 and failed.stdout == "" and "Short.choose failed at decoded token" in failed.stderr
