"""Habits of other tools, and names that are mistyped: they work, or are met with what was meant."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer

from cacheroute import CacherouteError, Llama, UsageError
from cacheroute.cli import app, habits
from cacheroute.cli import options as shared
from cacheroute.errors import did_you_mean
from cacheroute.model import catalogue, experts, gguf_file
from cacheroute.routing import budget as budgets
from cacheroute.routing import strategies
from faults.runner import Outcome, in_process
from support.cli import cacheroute, sentence

RUN = ["--raw", "-p", "the", "-n", "2", "-c", "256", "-t", "1", "-s", "5", "--no-stdin"]


def wrong(*words: object, code: int = 2) -> str:
    """The one sentence of a command line that fails."""
    outcome = in_process([str(word) for word in words])
    lines = outcome.stderr.splitlines()
    assert outcome.code == code and len(lines) == 1 and outcome.stdout == "", outcome
    return lines[0].removeprefix("cacheroute: ")


def right(*words: object) -> Outcome:
    outcome = in_process([str(word) for word in words])
    assert outcome.code == 0, outcome
    return outcome


def test_the_nearest_name() -> None:
    assert did_you_mean("Bug_det", ["budget", "routing"]) == "did you mean budget?"
    assert did_you_mean("zzz", ["budget"], "there is budget.") == "there is budget."


def test_words_that_belong_to_no_option_are_met_with_it() -> None:
    for words in (["generate", "a b.gguf"], ["plan", "a b.gguf"], ["bench", "a b.gguf", "-p", "8"]):
        assert wrong(*words).startswith("a b.gguf belongs to no option; did you mean -m 'a b.gguf'?")
    assert "did you mean -m m.gguf?" in wrong("generate", "m.gguf") and "did you mean -m hf:a/b:c?" in wrong("plan", "hf:a/b:c")
    assert "a prompt is given with -p, in quotes" in wrong("generate", "Why", "so", "late?")


# ---- commands


def test_commands_of_other_tools_that_work(tiny: Path) -> None:
    outputs = [right(word).stdout for word in ("list", "ls", "models")]
    listed = [sorted(line.split()[0] for line in o.splitlines() if line) for o in outputs]  # the rest changes with free memory
    assert listed[0] == listed[1] == listed[2] != []
    assert right("show", tiny).stdout == right("inspect", tiny).stdout


def test_run_answers_a_prompt_and_else_is_a_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ["generate", "chat", "models"]
    for typed in (True, False):
        monkeypatch.setattr(habits.prompt, "on_terminal", lambda typed=typed: typed)
        assert habits.command(["run", "demo", "Hello", "there", "-n", "5"], known) == [
            *("generate", "-m", "demo", "-p", "Hello there", "-n", "5")
        ]
        assert habits.command(["run", "-m", "demo", "--prompt=Hi"], known) == ["generate", "-m", "demo", "--prompt=Hi"]
        assert habits.command(["run", "demo"], known) == ["chat" if typed else "generate", "-m", "demo"]
    assert habits.command(["run"], ["run"]) == ["run"], "a command of that name comes first"


def test_run_works(tiny: Path) -> None:
    done = right("run", tiny, "the", *RUN[:1], *RUN[3:])
    assert done.stdout and f"run: cacheroute generate -m {tiny} -p the --raw" in done.stderr
    assert done.stdout == right("generate", "-m", tiny, *RUN).stdout


def test_commands_that_do_not_exist(tiny: Path) -> None:
    assert wrong("ps").startswith("A model is loaded only while a command runs") and "`cacheroute models`" in wrong("ps")
    assert wrong("rm", tiny) == f"No command deletes models, as other programs may use them: {tiny} is {tiny}."
    assert "is not one on this disk" in wrong("rm", "no-such-model") and "-o json" in wrong("rm")
    assert tiny.exists()
    assert wrong("genrate") == "There is no command genrate; did you mean generate? See `cacheroute --help`."
    assert "did you mean --help?" in wrong("help")
    assert wrong("pl") == "pl may be plan or plot; write more of it."
    assert wrong("s").startswith("s may be ") and "no command 5" in wrong("5")
    assert wrong("xyzzy") == "There is no command xyzzy. See `cacheroute --help`."


def test_options_of_llama_cpp_that_change_nothing_here(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--no-mmap", "--mlock", "-ot", "exps=CPU", "-b", "512", "--jinja", "-ub", "64"]
    assert habits.arguments("cacheroute generate", words, options()) == ["-ub", "64"]
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" changes nothing: ")[0] for line in said] == ["--no-mmap", "--mlock", "-ot", "-b", "--jinja"]


def test_a_model_and_a_number_without_their_names() -> None:
    assert wrong("plan", "demo").startswith("demo belongs to no option; a model is given with -m")
    assert "did you mean cache-prior:lambda=0.1?" in wrong("generate", "-p", "x", "--routing", "cache-prior:0.1")
    assert "did you mean lambda?" in wrong("generate", "-p", "x", "--routing", "cache-prior:lamda=0.1")


def test_the_beginning_of_a_command_is_enough(tiny: Path) -> None:
    assert right("i", tiny, "-o", "json").stdout == right("inspect", tiny, "-o", "json").stdout
    known = ["generate", "chat", "plan", "plot", "eval", "models"]
    assert [habits.command([w, "x"], known)[0] for w in ("g", "gen", "c", "pla", "e", "m")] == [
        "generate", "generate", "chat", "plan", "eval", "models",
    ]  # fmt: skip
    assert habits.command(["ls"], known) == ["models"], "a name of another tool comes first"


def test_the_beginning_of_a_command_of_eval_is_enough() -> None:
    group = typer.main.get_command(app).commands["eval"]
    found = [group.resolve_command(typer.Context(group), [w, "x"]) for w in ("lo", "perp", "prom", "t", "mmlu", "lo,mmlu")]
    commands = [("long", ["x"]), ("perplexity", ["x"]), ("prompt", ["x"]), ("task", ["x"])]
    assert [(name, rest) for name, _, rest in found] == [*commands, ("task", ["mmlu", "x"]), ("task", ["lo,mmlu", "x"])]
    assert wrong("eval", "p", "-n", "5") == "p may be perplexity or prompt; write more of it."
    empty = "The name of the command is empty, perhaps because a variable is not set. See `cacheroute --help`."
    assert wrong("eval", "") == wrong("") == empty


# ---- options


def test_more_threads_than_processors_are_mentioned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shared, "cores", lambda: 2)
    for given in ({}, {"threads": None}, {"threads": 2}, {"threads": 99, "quiet": True}, {"threads": 9, "scheduler": "a:1"}):
        shared.say_threads(given)
    assert capsys.readouterr().err == ""
    shared.say_threads({"threads": 99})
    assert capsys.readouterr().err.startswith("-t 99: 2 processors are here for them; ")
    monkeypatch.setattr(shared, "cores", lambda: 1)
    shared.say_threads({"threads": 2})
    assert capsys.readouterr().err.startswith("-t 2: 1 processor is here for them; ")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["generate", "--bugdet", "5"], "There is no option --bugdet; did you mean --budget? See `cacheroute generate --help`."),
        (["generate", "-prompt", "Hi"], "There is no option -prompt; did you mean --prompt?"),
        (["generate", "-sis", "Hi"], "There is no option -sis; did you mean -sys?"),
        (["generate", "--promt=Hi"], "There is no option --promt; did you mean --prompt?"),
        (["generate", "-mu", "on", "-p", "Hi"], "There is no option -mu here."),
        (["eval", "perplexity", "--chnk", "5"], "did you mean --chunk? See `cacheroute eval perplexity --help`."),
        (["bench", "--rooting", "original"], "did you mean --routing?"),
        (["eval", "prompt", "--limit", "5"], "There is no option --limit; did you mean --places?"),
        (["eval", "long", "--limit=5"], "There is no option --limit; did you mean --places?"),
        (["eval", "perplexity", "--places", "5"], "There is no option --places; did you mean --limit?"),
        (["generate", "-p", "a", "-p", "b"], "-p is given 2 times; write one text, or many with --prompts."),
        (["generate", "-p", "a", "--prompt", "b"], "-p is given 2 times"),
        (["generate", "-n", "-3", "-p", "a"], "Invalid value for '-n'"),
        (
            ["generate", "-cnv", "-m", "demo"],
            "-cnv: `generate` answers one prompt; `cacheroute chat -m demo` holds a conversation.",
        ),
        (["generate", "-i", "-hf", "a/b"], "`cacheroute chat -hf a/b` holds a conversation."),
        (["generate", "-hf", "a/b", "-m", "demo"], "Two models are named, demo and hf:a/b; give one."),
        (["generate", "-hf"], "-hf names a repository"),
        (["generate", "-hff", "x.gguf"], "-hf OWNER/REPO:FILE"),
        (["generate", "-hf", "nobody/nothing", "-p", "Hi"], "run `cacheroute pull hf:nobody/nothing`."),
        (["generate", "-c", "4kk", "-p", "Hi"], "Invalid value for '-c'"),
    ],
)
def test_options_that_are_not_meant(words: list[str], meant: str) -> None:
    said = wrong(*words)
    assert meant in said and said.count("did you mean") <= 1


def options() -> dict[str, object]:
    import typer

    from cacheroute.cli import app

    command = typer.main.get_command(app)
    return habits.options_of(command.commands["generate"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "become"),
    [
        (["-hf", "a/b:Q4_K_M"], ["--model", "hf:a/b:Q4_K_M"]),
        (["--hf-repo=a/b"], ["--model", "hf:a/b"]),
        (["-ngl", "99", "-p", "Hi"], ["-p", "Hi"]),
        (["--n-gpu-layers=99", "--cpu-moe"], []),
        (["-fa", "-p", "Hi"], ["-p", "Hi"]),
        (["-fa", "on", "-p", "Hi"], ["-p", "Hi"]),
        (["--flash-attn=auto", "Hi"], ["Hi"]),
        (["-c", "4k"], ["-c", "4096"]),
        (["-c32K"], ["-c32768"]),
        (["--ctx_size=4k", "--ctx_size", "512"], ["--ctx-size=4096", "--ctx-size", "512"]),
        (["--top_k", "5", "--temperature", "0.5"], ["--top-k", "5", "--temp", "0.5"]),
        (["-p", "-ngl", "-n5"], ["-p", "-ngl", "-n5"]),  # a value is a value
        (["-p", "--ctx_size 4k"], ["-p", "--ctx_size 4k"]),
        (["-no-cnv", "-st", "-n", "0"], ["--raw", "-n", "0"]),
        (["-p", "a", "--", "-ngl"], ["-p", "a", "--", "-ngl"]),
        (["-h"], ["-h"]),
        (["-m"], ["-m"]),
    ],
)
def test_options_that_mean_the_same(words: list[str], become: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert habits.arguments("cacheroute generate", words, options()) == become
    said = capsys.readouterr().err
    assert ("changes nothing: experts run on the CPU" in said) == (bool({"-ngl", "--n-gpu-layers=99"} & set(words[:1])))
    assert ("changes nothing: prompts are computed with flash" in said) == (words[0] in ("-fa", "--flash-attn=auto"))


def test_options_of_other_tools_work(tiny: Path) -> None:
    plain = right("generate", "-m", tiny, *RUN)
    other = right("generate", "-m", tiny, *RUN, "-ngl", "99", "--ctx_size", "256", "-st")
    assert plain.stdout == other.stdout
    assert "-ngl changes nothing" in other.stderr
    assert (
        right("generate", "-m", tiny, *RUN[:4], "-2", *RUN[5:]).stdout
        == right("generate", "-m", tiny, *RUN[:4], "-1", *RUN[5:]).stdout
    )
    assert right("generate", "-m", tiny, *RUN[:4], "0", *RUN[5:]).stdout == "\n"


def test_a_terminal_without_a_prompt_is_told_of_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    from cacheroute.cli import prompt

    monkeypatch.setattr(prompt, "on_terminal", lambda: True)
    assert wrong("generate") == "The prompt is empty; give one with -p, -f or a pipe; `cacheroute chat` holds a conversation."


def test_standard_input_can_be_left_alone(tiny: Path) -> None:
    with_it = cacheroute("generate", "-m", tiny, *RUN[:-1], stdin=" of")
    without = cacheroute("generate", "-m", tiny, *RUN, stdin=" of")
    alone = cacheroute("generate", "-m", tiny, *RUN[:-1])
    assert "3 bytes of standard input follow the prompt; --no-stdin leaves them out" in with_it.stderr
    assert without.stdout == alone.stdout != with_it.stdout
    assert "The prompt is empty" in sentence(cacheroute("generate", "--no-stdin", stdin="the"), 2)


# ---- names


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--routing", "cache-piror:lambda=0.1"], "There is no routing 'cache-piror'; did you mean cache-prior?"),
        (["--routing", "Original"], "did you mean original?"),
        (["--routing", "nonsense"], "there are original, pruning"),
        (["--eviction", "soft-lfru"], "There is no eviction 'soft-lfru'; did you mean soft-lfu?"),
        (["--eviction", "fifo"], "there are lru, lfu, score, soft-lfu."),
        (["--prompt-routing", "kepe:cover=0.9"], "did you mean keep?"),
    ],
)
def test_names_of_routings_and_evictions(tiny: Path, words: list[str], meant: str) -> None:
    assert meant in wrong("generate", "-m", tiny, *RUN, *words)


def test_names_of_models(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(tiny, tmp_path / "tiny.gguf")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    near = f"There is no file {tmp_path / 'tyni.gguf'}; did you mean {tmp_path / 'tiny.gguf'}?"
    assert wrong("inspect", tmp_path / "tyni.gguf") == near
    assert "did you mean demo?" in wrong("inspect", "dmeo")
    for name in ("qwen3-30b-a3b", "hf:a/b", "a/b", "a/b:Q4_K_M"):
        said = wrong("inspect", name)
        assert "is not on this disk: run `cacheroute pull " in said and "hf:hf:" not in said, "one exit code for what is not here"
    there = tmp_path / "hub" / "models--me--tiny" / "snapshots" / "1"
    there.mkdir(parents=True)
    shutil.copy(tiny, there / "tiny-F16.gguf")
    assert catalogue.resolve("me/tiny") == catalogue.resolve("me/tiny:F16") == there / "tiny-F16.gguf"
    assert json.loads(right("inspect", "me/tiny:f16", "-o", "json").stdout)["experts"] == 32


@pytest.mark.parametrize("size", ["8G", "8GB", "8GiB", "8g", "8 GB", "0.5", "1.0", "50%"])
def test_sizes_of_a_budget(tiny: Path, size: str) -> None:
    layout = experts.layout(gguf_file.read(tiny))
    assert budgets.parse(size, layout).capacity == (16 if size in ("0.5", "50%") else 32)


def test_shares_in_python(tiny: Path) -> None:
    layout = experts.layout(gguf_file.read(tiny))
    assert budgets.parse(0.5, layout) == budgets.parse("50%", layout) == budgets.parse(16, layout)
    assert budgets.parse(1.0, layout) == budgets.parse("all", layout)
    for nothing in (0.0, 0.01, 1.5, True):
        with pytest.raises(UsageError):
            budgets.parse(nothing, layout)


# ---- Python


@pytest.mark.engine
def test_arguments_of_the_class(tiny: Path) -> None:
    with pytest.raises(UsageError, match=r"^Llama has no argument 'bugdet'; did you mean budget\?$"):
        Llama(str(tiny), bugdet=0.5)
    with pytest.raises(UsageError, match=r"did you mean n_ctx\?"):
        Llama(str(tiny), n_cxt=512)
    with pytest.raises(UsageError, match=r"Llama has no argument 'xyzzy'; help\(cacheroute\.Llama\)"):
        Llama(str(tiny), xyzzy=1)
    with closing(Llama(tiny, budget=0.5, n_ctx=64, verbose=False, use_extra_bufts=True)) as llm:
        assert llm.budget.capacity == 16
        llm.configure(budget=0.25)
        assert llm.budget.capacity == 8


@pytest.mark.engine
def test_names_of_models_in_python(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with closing(Llama("demo", n_ctx=64, verbose=False)) as llm:
        assert llm.layout.paths[0] == demo_model and llm.model_path == str(demo_model)
    for name, said in (("qwen3-30b-a3b", "run `cacheroute pull qwen3-30b-a3b`"), ("dmeo", "did you mean demo"), ("", "no name")):
        with pytest.raises(UsageError, match=said):
            Llama(name)
    shutil.copy(tiny, tmp_path / "demo")  # a path comes first, as ever
    with closing(Llama("demo", n_ctx=64, verbose=False)) as llm:
        assert llm.layout.n_expert == 32 and llm.model_path == "demo"


@pytest.mark.engine
@pytest.mark.parametrize("asked", [{"n_gpu_layers": -1}, {"n_gpu_layers": 20}, {"main_gpu": 1}, {"tensor_split": [0.5, 0.5]}])
def test_a_gpu_is_not_passed_over(tiny: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(asked))}=.* asks for a GPU, .*: leave it out.$"):
        Llama(str(tiny), n_ctx=64, verbose=False, **asked)
    with closing(Llama(str(tiny), n_ctx=64, verbose=False, n_gpu_layers=0, tensor_split=None)) as llm:
        assert llm.n_ctx() == 64


@pytest.mark.engine
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"routing": 3}, "routing is a text, a Routing, or None, not 3"),
        ({"eviction": None}, "eviction is a text, not None"),
        ({"prompt_routing": None}, "prompt_routing is a text or a PromptRouting"),
        ({"prefetch": 1.5}, "prefetch is a whole number, not 1.5"),
        ({"prefetch": "2"}, "prefetch is a whole number, not '2'"),
        ({"budget": [1]}, "budget is a text such as"),
        ({"prompt_progress": 3}, "prompt_progress is a function or None"),
        ({"budget_changed": 3}, "budget_changed is a function or None"),
        ({"n_ctx": "512"}, "n_ctx is a whole number of at least 0"),
        ({"type_k": 99}, r"type_k=99 is no type for keys and values: 0 \(F32\)"),
        ({"vocab_only": True}, "vocab_only leaves out the experts"),
    ],
)
def test_an_argument_of_another_type_is_refused_in_a_sentence(tiny: Path, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Llama(str(tiny), **{"n_ctx": 64, "verbose": False} | asked)


@pytest.mark.engine
def test_configure_takes_no_other_types_either_and_nothing_changes(tiny: Path) -> None:
    with closing(Llama(str(tiny), budget=8, n_ctx=64, verbose=False)) as llm:
        for asked in ({"routing": 3}, {"eviction": None}, {"prompt_routing": None}, {"prefetch": 1.5}):
            with pytest.raises(UsageError, match=f"^{next(iter(asked))} is "):
                llm.configure(**asked)
        assert llm.budget.capacity == 8 and llm.routing == strategies.Routing("original")
        with pytest.raises(UsageError, match="give a prompt that is not empty"):
            llm.sample()


@pytest.mark.engine
@pytest.mark.parametrize("made", [None, b"no GGUF", "tiny"])
def test_what_is_no_adapter_is_refused(tiny: Path, tmp_path: Path, made: bytes | str | None) -> None:
    adapter = tiny if made == "tiny" else tmp_path / "adapter.gguf"
    if isinstance(made, bytes):
        adapter.write_bytes(made)
    with pytest.raises(CacherouteError, match=f"^llama.cpp cannot load the LoRA adapter {adapter}: "):
        Llama(str(tiny), n_ctx=64, verbose=False, lora_path=str(adapter))
