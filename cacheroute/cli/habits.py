"""Habits of other tools (llama.cpp, Ollama): what they type means the same here, or is met with the command that does it.

Also the name that was meant where a command or an option is mistyped. Works on the words of a command line, before they are
parsed; what a command does with its options is not known here.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from cacheroute.cli import prompt
from cacheroute.cli.terminal import say
from cacheroute.errors import CacherouteError, UsageError, did_you_mean

# ---- commands

_ALIASES = {"list": "models", "ls": "models", "show": "inspect"}


def command(words: Sequence[str], known: Sequence[str]) -> list[str]:
    """The words of a command line, beginning with a known command, of which the beginning is enough.

    Raises UsageError, which names what does it here."""
    name, *rest = words
    if name in known:
        return [name, *rest]
    if name in _ALIASES:
        return [_ALIASES[name], *rest]
    if name == "run":
        return _run(rest)
    if name == "ps":
        raise UsageError(
            "A model is loaded only while a command runs, so there is no list; `cacheroute models` lists those on this disk."
        )
    if name in ("rm", "delete"):
        raise UsageError(_removal(rest))
    if whole := beginning(name, known):
        return [whole, *rest]
    meant = did_you_mean(name, [*known, *_ALIASES, "run", "--help", "--version"])
    raise UsageError(f"There is no command {name}{f'; {meant}' if meant else '.'} See `cacheroute --help`.")


def beginning(name: str, known: Sequence[str]) -> str:
    """The command that begins so, as g for generate on a phone; "" if there is none. Raises UsageError if there are several."""
    if not name.strip():
        raise UsageError("The name of the command is empty, perhaps because a variable is not set. See `cacheroute --help`.")
    begins = sorted(command for command in known if command.startswith(name)) if name.isalpha() else []
    if len(begins) > 1:
        raise UsageError(f"{name} may be {', '.join(begins[:-1])} or {begins[-1]}; write more of it.")
    return begins[0] if begins else ""


def _run(rest: list[str]) -> list[str]:
    """`run MODEL [PROMPT]` as Ollama has it: a prompt, here or in a pipe, is answered; without one it is a conversation."""
    n = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    (model, *text), options = rest[:n] or [""], rest[n:]
    own = [*(["-m", model] if model else []), *(["-p", " ".join(text)] if text else []), *options]
    typed = {word.partition("=")[0] for word in own}
    asks = typed & {"-p", "--prompt", "-f", "--file", "--prompts"} or not prompt.on_terminal()
    words = ["generate" if asks else "chat", *own]
    say(f"run: cacheroute {shlex.join(words)}")
    return words


def _removal(names: Sequence[str]) -> str:
    """What to do in place of `rm NAME`, with the file's path where it is known."""
    from cacheroute.model import catalogue

    where = "; `cacheroute models -o json` has the paths"
    if names:
        try:
            path = catalogue.resolve(names[0])
            where = f": {names[0]} is {path}"
            where += " (`hf cache` frees it)" if "models--" in str(path) else ""
            where += " (`ollama rm` frees it)" if names[0].startswith("ollama:") else ""
        except CacherouteError:
            where = f", and {names[0]} is not one on this disk; `cacheroute models` lists them"
    return f"No command deletes models, as other programs may use them{where}."


# ---- options

_SAME = {"--temperature": "--temp", "--predict": "--n-predict", "-no-cnv": "--raw", "--no-conversation": "--raw"}
_MODELS = ("-hf", "-hfr", "--hf-repo")
_ON_CPU = "experts run on the CPU here, from memory or read when they are needed"
_LOADED = "experts are read when they are needed, all else is loaded; --budget all loads everything"
_PASSES = "a pass over a prompt is as long as memory allows, or as -ub says"
_TEMPLATE = "the model's own chat template is what is used"
_FLASH = "prompts are computed with flash attention, tokens decoded without, as is faster"
# Options that change nothing here: the values that may follow (None: any), and why
_IDLE: dict[str, tuple[tuple[str, ...] | None, str]] = {
    **dict.fromkeys(("-ngl", "--n-gpu-layers", "--gpu-layers", "-ncmoe", "--n-cpu-moe"), (None, _ON_CPU)),
    **dict.fromkeys(("-ot", "--override-tensor"), (None, _ON_CPU)),
    **dict.fromkeys(("-b", "--batch-size"), (None, _PASSES)),
    **dict.fromkeys(("--mmap", "--no-mmap", "--mlock"), ((), _LOADED)),
    "--jinja": ((), _TEMPLATE),
    **dict.fromkeys(("-cmoe", "--cpu-moe"), ((), _ON_CPU)),
    **dict.fromkeys(("-fa", "--flash-attn"), (("on", "off", "auto", "1", "0"), _FLASH)),
}
_TALK = ("-i", "-if", "-cnv", "--interactive", "--interactive-first", "--conversation")
_ONE_TURN = ("-st", "--single-turn")
# Options of llama.cpp that would be read as a letter and its value: -mm as the model "m", and so on
_OTHERS = "-fit -fitc -fitt -jinja -lcd -lcs -lm -lv -lzm -md -mg -mli -mm -mmdev -mmu -mu -ofreq -otd -pps -ptc -rea"
# What one command calls so is called otherwise in another: how much of a text or a task is measured
_AMOUNTS = ("--limit", "--places", "--chunks")
_MODEL = re.compile(r".*?\.gguf(?= |$)|(hf|ollama):\S+", re.IGNORECASE)
_KILO = re.compile(r"(\d{1,9})[kK]")


def arguments(path: str, words: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """The words after a command with the options that it knows; `options`: its parameters by each of their names. `path`: of the
    command, as in "cacheroute generate".

    Raises UsageError where an option of another tool cannot be meant here, and where a dash is missing.
    """
    name = path.rpartition(" ")[2]
    out: list[str] = []
    rest = deque(words)
    model = repository = ""
    while rest:
        word = rest.popleft()
        if word == "--":
            return [*out, word, *rest]
        option, equals, value = word.partition("=")
        option = _SAME.get(_dashes(option), _dashes(option))
        if not word.startswith("-") or word == "-":
            out.append(word)
        elif option in options:
            if _takes_value(options[option]) and not equals and rest:
                equals, value = "=", rest.popleft()
                out += [option, _value(option, value, options)]
            else:
                out.append(option + equals + _value(option, value, options))
            model = value if option in ("-m", "--model") else model
        elif option in _MODELS and "--model" in options:
            value = value if equals else rest.popleft() if rest else ""
            if not value or value.startswith("-"):
                raise UsageError(f"{option} names a repository: {option} OWNER/REPO or OWNER/REPO:FILE.")
            repository = value if value.startswith("hf:") else f"hf:{value}"
            out += ["--model", repository]
        elif option in ("-hff", "--hf-file"):
            raise UsageError(f"{option}: write the file behind the repository, as in -hf OWNER/REPO:FILE.")
        elif option in _IDLE and "--model" in options:
            values, why = _IDLE[option]
            if not equals and rest and (values is None or rest[0] in values):
                rest.popleft()
            say(f"{option} changes nothing: {why}.")
        elif option in _TALK and name in ("generate", "chat"):
            if name == "generate":
                raise UsageError(f"{option}: `generate` answers one prompt; `{_chat(words)}` holds a conversation.")
        elif option in _ONE_TURN and name == "generate":
            pass
        elif option in _OTHERS.split():
            raise UsageError(f"There is no option {option} here. See `{path} --help`.")
        elif not word.startswith("--") and len(option) > 2 and f"-{option}" in options:
            raise no_option(option, options, path)
        else:
            out.append(_attached(word, options))
    if model and repository:
        raise UsageError(f"Two models are named, {model} and {repository}; give one.")
    return out


def options_of(command: Any) -> dict[str, Any]:
    """The options of a typer command by each of their names."""
    own = [p for p in command.params if p.param_type_name == "option"]
    return {name: p for p in own for name in (*p.opts, *p.secondary_opts)}


def not_a_number(parameter: Any, words: Sequence[str]) -> str:
    """The word that was read as the letter of an option and a value, and the value is none: -sis, for -s. "" if there is none."""
    letters = [o for o in getattr(parameter, "opts", ()) if len(o) == 2]
    return next((w for w in words for o in letters if w.startswith(o) and w[1:].replace("-", "").isalpha() and len(w) > 2), "")


def no_word(words: str, options: Mapping[str, Any]) -> str:
    """What to say of words that belong to no option, with what was meant where that is known."""
    said, model = f"{words} belongs to no option", _MODEL.match(words)
    if model and "--model" in options:
        return f"{said}; did you mean -m {shlex.quote(model[0])}?"
    if "--prompt" in options and _takes_value(options["--prompt"]):
        return f"{said}; a prompt is given with -p, in quotes"
    if "--model" in options and not getattr(options["--model"], "hidden", False):
        return f"{said}; a model is given with -m"
    return said


def no_option(option: str, options: Mapping[str, Any], path: str) -> UsageError:
    """The error for an option that does not exist, with the one that was meant."""
    twin = f"-{option}" if f"-{option}" in options else ""
    if not twin and _dashes(option) in _AMOUNTS:
        twin = next((name for name in _AMOUNTS if name in options), "")
    meant = f"did you mean {twin}?" if twin else did_you_mean(option, [name for name in options if len(name) > 2])
    return UsageError(f"There is no option {option}{f'; {meant}' if meant else '.'} See `{path} --help`.")


def _dashes(option: str) -> str:
    """--ctx_size as --ctx-size."""
    return option.replace("_", "-") if option.startswith("--") else option


def _takes_value(parameter: Any) -> bool:
    return not getattr(parameter, "is_flag", False) and not getattr(parameter, "count", False)


def _value(option: str, value: str, options: Mapping[str, Any]) -> str:
    """A context of 4k tokens has 4096."""
    match = _KILO.fullmatch(value) if options[option].name == "ctx_size" else None
    return str(1024 * int(match[1])) if match else value


def _attached(word: str, options: Mapping[str, Any]) -> str:
    """-c4k as -c4096."""
    option, value = word[:2], word[2:]
    return option + _value(option, value, options) if option in options and value else word


def _chat(words: Sequence[str]) -> str:
    """`chat` with the model that is named."""
    named = next(([a, b] for a, b in itertools.pairwise(words) if a in ("-m", "--model", *_MODELS)), [])
    return shlex.join(["cacheroute", "chat", *named])
