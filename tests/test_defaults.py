"""Defaults of options from the environment and from a file: which wins, what is refused, and that both are told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from cacheroute import cli
from cacheroute.cli import defaults
from cacheroute.errors import UsageError

COMMANDS = defaults.options_of_all(typer.main.get_command(cli.app))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes the user's file; gives its path."""

    def write(text: str) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text)
        monkeypatch.setenv("CACHEROUTE_CONFIG", str(path))
        return path

    return write


def chosen(command: str) -> dict[str, Any]:
    found = defaults.chosen(defaults.read(COMMANDS), command, COMMANDS[command])
    return {name: setting.value for name, setting in found.items()}


def run(*words: object) -> int:
    return cli._run([str(word) for word in words])


def test_what_is_nearer_wins(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("generate") == {}
    config('[common]\nbudget = "25%"\ntemp = 0.5\n[generate]\nbudget = "50%"\nn-predict = 7\n')
    assert chosen("generate") == {"budget": "50%", "temp": "0.5", "n_predict": "7"}
    assert chosen("chat") == {"budget": "25%", "temp": "0.5"} and chosen("bench") == {"budget": "25%"}
    monkeypatch.setenv("CACHEROUTE_BUDGET", "60%")
    assert chosen("generate")["budget"] == chosen("bench")["budget"] == "60%", "any variable is before the file"
    monkeypatch.setenv("CACHEROUTE_GENERATE_BUDGET", "70%")
    assert chosen("generate")["budget"] == "70%" and chosen("chat")["budget"] == "60%"
    monkeypatch.setenv("CACHEROUTE_GENERATE_BUDGET", "")
    assert chosen("generate")["budget"] == "60%", "an empty variable sets nothing"


def test_the_command_line_is_before_all(
    config: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config('[inspect]\noutput = "json"\n')
    assert run("inspect", tiny) == 0 and json.loads(capsys.readouterr().out)["experts"] == 32
    assert run("inspect", tiny, "-o", "text") == 0 and capsys.readouterr().out.startswith("model")
    monkeypatch.setenv("CACHEROUTE_INSPECT_OUTPUT", "text")
    assert run("inspect", tiny) == 0 and capsys.readouterr().out.startswith("model")


def test_what_nobody_typed_gives_way(
    config: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting for all commands does not refuse what is typed: its own sentence is for who types both."""
    config("")
    for name, value in (("MODEL", "no-such-model"), ("FLASH_MBPS", "500"), ("WORKERS", "2")):
        monkeypatch.setenv(f"CACHEROUTE_{name}", value)
    assert run("inspect", tiny, "-o", "json") == 0 and json.loads(capsys.readouterr().out)["experts"] == 32
    assert run("inspect", tiny, "-m", "demo") == 2 and "Name one model." in capsys.readouterr().err
    for words in (("tune",), ("eval", "perplexity", "--carry"), ("frontier", "f.jsonl", "--scheduler", "tcp://nowhere:1")):
        assert run(*words, "-m", "no-such-model") == 2
        assert "'no-such-model'" in capsys.readouterr().err, words


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("bench", "--replay", ""), "nothing to replay"),
        (("plan", "--ram", ""), "is not a size"),
        (("frontier", "f.jsonl", "--routing", ""), "name a routing, or leave --routing out"),
        (("eval", "task", ","), "name a task"),
    ],
)
def test_an_empty_value_is_not_an_option_left_out(
    words: tuple[str, ...], reason: str, tiny: Path, config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config("")
    assert run(*words, "-m", tiny) == 2 and reason in capsys.readouterr().err


def test_values_are_read_as_they_would_be_typed(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config('[bench]\nbudget = ["25%", 16]\ncontrol = true\n[setup]\ndemo = false\n[eval.perplexity]\nlimit = 9\n')
    assert chosen("bench") == {"budget": "25%,16", "control": True} and chosen("setup") == {"demo": False}
    assert chosen("eval perplexity") == {"limit": "9"}
    config('[generate]\nstop = ["a", "b,c"]\n[chat]\nsystem = "Be brief."\nreverse-prompt = "x"\n')
    assert chosen("generate") == {"stop": ["a", "b,c"]}, "by any of its long names"
    assert chosen("chat") == {"system": "Be brief.", "stop": ["x"]}
    monkeypatch.setenv("CACHEROUTE_CHAT_STOP", "y")
    monkeypatch.setenv("CACHEROUTE_CHAT_SYSTEM_PROMPT", "No.")
    assert chosen("chat") == {"system": "No.", "stop": ["y"]}, "a variable wins, whatever name the file has"
    config('[chat]\nstop = "x"\n')
    monkeypatch.delenv("CACHEROUTE_CHAT_STOP")
    monkeypatch.setenv("CACHEROUTE_CHAT_REVERSE_PROMPT", "z")
    assert chosen("chat")["stop"] == ["z"]
    config("[generate]\nctx_size = 99\n")
    assert chosen("generate") == {"ctx_size": "99"}


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "[inspect]\noutptu = 'json'\n",
            "[inspect] outptu: `cacheroute inspect` has no such option to set; did you mean output?",
        ),
        ("[inspcet]\noutput = 'json'\n", "[inspcet] output: there is no command 'inspcet'; did you mean inspect?"),
        ("[inspcet]\n", "[inspcet]: there is no command 'inspcet'; did you mean inspect?"),
        ("[eval]\nlimit = 3\n", "[eval] limit: there is no command 'eval'"),
        ("[eval.perplexty]\nlimit = 3\n", "[eval.perplexty] limit: there is no command 'eval perplexty'; did you mean eval perp"),
        ("output = 'json'\n", "output is in no section: put it into [common], or into that of a command"),
        ("[common]\noutput = 'json'\n", "[common] output: [common] has budget, ctx-size, "),
        ("[pull]\nforce = true\n", "[pull] force: `cacheroute pull` has no such option"),
        ("[plot]\nforce = true\n", "[plot] force: `cacheroute plot` has no such option"),
        (
            "[generate]\nn-predict = 2\nn_predict = 3\n",
            "[generate] n_predict: the section sets n-predict already; leave out one.",
        ),
        ("[chat]\nsystem = 'a'\nsystem-prompt = 'b'\n", "[chat] system-prompt: the section sets system already;"),
        ("[inspect]\noutput = ['json']\n", "{file}, [inspect] output is wrong: it is one value; write it without brackets."),
        ("output = \n", "config.toml is not TOML (Invalid value"),
        ("[inspect]\noutput = 'xml'\n", "no output 'xml'; there are text and json (--output is from {file}, [inspect] output)."),
    ],
)
def test_what_is_wrong_in_the_file_is_one_sentence(
    config: Any, tiny: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    path = config(text)
    assert run("inspect", tiny) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said.format(file=path) in err and path.name in err
    assert run("inspect", "--help") == 0, "help helps with it"


@pytest.mark.parametrize(
    "command, text, said",
    [
        ("generate", "temp = [1]", "it is one value"),
        ("generate", "temp = []", "it is one value"),
        ("generate", "budget = ['25%']", "it is one value"),
        ("generate", "stop = [['a']]", "without lists or tables in it"),
        ("generate", "stop = [{a = 1}]", "without lists or tables in it"),
        ("bench", "repetitions = [3]", "it is one value"),
        ("bench", "budget = [['25%', '50%'], '75%']", "without lists or tables in it"),
    ],
)
def test_a_list_is_taken_where_several_values_are(config: Any, command: str, text: str, said: str) -> None:
    config(f"[{command}]\n{text}\n")
    with pytest.raises(UsageError, match=said):
        chosen(command)
    assert chosen("chat") == {}, "which has no part in it"


def test_a_sentence_on_something_else_is_not_blamed_on_a_number() -> None:
    setting, blamed = defaults.Setting, defaults.blamed
    where = "CACHEROUTE_GENERATE_TEMP"
    settings = {"temp": setting("--temp", "0", where), "ctx_size": setting("--ctx-size", "99999", "CACHEROUTE_CTX_SIZE")}
    settings["routing"] = setting("--routing", "cache-prior:lambda=9", "CACHEROUTE_ROUTING")
    ctx = SimpleNamespace(meta={defaults.META: settings}, get_parameter_source=lambda name: None)
    memory = "m.gguf needs 403 MiB of memory (0 bytes of experts), and 0 bytes are free: no budget fits."
    assert blamed(memory, ctx) == memory
    assert blamed("A context of 99999 tokens takes 3 GiB: give fewer.", ctx).endswith("(--ctx-size is from CACHEROUTE_CTX_SIZE).")
    assert blamed("--temp 0 is too cold.", ctx).endswith(f"(--temp is from {where}).")
    assert blamed("lambda of cache-prior:lambda=9 is at most 1.", ctx).endswith("(--routing is from CACHEROUTE_ROUTING).")


@pytest.mark.parametrize("value", ["many", "1.5", "-3"])
def test_a_value_of_a_wrong_type_names_where_it_is(
    config: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    path = config(f"[generate]\nctx-size = {value if value != 'many' else repr(value)}\n")
    assert run("generate", "-p", "Hi") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"cacheroute: {path}, [generate] ctx-size is wrong: "), err
    monkeypatch.setenv("CACHEROUTE_CTX_SIZE", value)
    assert run("generate", "-p", "Hi") == 2
    assert capsys.readouterr().err.startswith("cacheroute: CACHEROUTE_CTX_SIZE is wrong: ")
    assert run("generate", "-p", "Hi", "-c", value) == 2
    assert "CACHEROUTE_CTX_SIZE" not in capsys.readouterr().err, "what was typed is not blamed on the environment"


def test_a_file_that_is_named_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    for where, said in ((tmp_path / "none.toml", "There is no file"), (tmp_path, "a directory")):
        monkeypatch.setenv("CACHEROUTE_CONFIG", str(where))
        assert run("routing") == 2 and said in capsys.readouterr().err
    monkeypatch.delenv("CACHEROUTE_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert defaults.default_path() == tmp_path / "cacheroute" / "config.toml"
    assert run("routing") == 0, "nobody needs to have one"


def test_names_are_free_of_other_meanings() -> None:
    """What [common] has exists in several commands, and no option's variable is one that means something else."""
    for key in (*defaults._FOR_ALL, *defaults._FOR_ANSWERS):
        assert sum(key in options for options in COMMANDS.values()) >= 2, key
    assert not defaults._variables(COMMANDS) & {*defaults._OTHER_VARIABLES}
    variables = [defaults.variable(command, key) for command, options in COMMANDS.items() for key in options]
    assert len(variables) == len(set(variables))
    assert not {"force", "replace", "help"} & {key for options in COMMANDS.values() for key in options}


def test_what_is_in_effect_is_told(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config('[common]\nbudget = "2GiB"\n[chat]\nsystem-prompt = "Be brief."\n')
    monkeypatch.setenv("CACHEROUTE_CHAT_BUDGET", "50%")
    monkeypatch.setenv("CACHEROUTE_BUGDET", "50%")
    assert defaults.in_effect(defaults.read(COMMANDS), COMMANDS) == [
        "[common] budget = '2GiB' (overridden by CACHEROUTE_CHAT_BUDGET)",
        "[chat] system-prompt = 'Be brief.'",
        "CACHEROUTE_CHAT_BUDGET='50%'",
    ]
    assert defaults.strange_variables(COMMANDS) == ["CACHEROUTE_BUGDET"]
    assert defaults._shown("api-key", "abc") == "(not shown)"


@pytest.mark.engine
def test_doctor_shows_the_file_or_what_is_wrong_with_it(config: Any, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told() -> Any:
        code = run("doctor", "-m", tiny, "-o", "json")
        return code, next(check for check in json.loads(capsys.readouterr().out) if check["name"] == "settings")

    path = config('[generate]\nbudget = "2GiB"\n')
    found = f"{path}; [generate] budget = '2GiB'"
    assert told() == (0, {"name": "settings", "state": "ok", "found": found, "advice": ""})
    config("[generate]\nbugdet = 1\n")
    code, check = told()
    assert code == 1 and check["state"] == "fail" and "did you mean budget?" in check["found"]


@pytest.mark.engine
def test_a_lossy_routing_of_the_file_is_said_at_the_start(
    config: Any, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    words = ("generate", "--raw", "-p", "the", "-n", 2, "-c", 256, "-t", 1, "-m", tiny, "--budget", "50%")
    config('[common]\nrouting = "cache-prior:lambda=0.5"\n')
    assert run(*words) == 0
    said = capsys.readouterr().err
    assert "cache-prior:lambda=0.5 is lossy" in said
    assert "--routing cache-prior:lambda=0.5 is from" in said and "config.toml, [common] routing." in said
    assert run(*words, "--routing", "original") == 0
    said = capsys.readouterr().err
    assert "is from" not in said and "lossy" not in said
    config('[common]\nbudget = "1%"\n')
    assert run(*words[:-2]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "1%" in said and "config.toml, [common] budget" in said
