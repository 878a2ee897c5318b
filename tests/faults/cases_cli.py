"""Faults of the command line: arguments, numbers, streams, folders, text, results. Chat templates and loading: cases_load.py."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from faults.runner import Case, Outcome, Place, in_process

RAW = "generate --raw -p the -n 2 -c 256 -t 1 -s 5 -m {tiny}"
HUGE = 2**32
NOT_TEXT = "caf\udce9"  # a byte that is no UTF-8, as Python has it in sys.argv


def _usage(name: str, words: str, sentence: str) -> Case:
    return Case(name, words, 2, sentence)


def _words(words: str) -> Callable[[Place], list[str]]:
    """With bytes that are no UTF-8."""
    return lambda place: [w.format(tiny=place.tiny, not_text=NOT_TEXT) for w in words.split()]


NUMBERS = [
    _usage("a seed that C would wrap", f"{RAW} -s {HUGE}", r"--seed is at most 4294967294, not 4294967296"),
    _usage("the seed that llama.cpp takes for a random one", f"{RAW} -s {HUGE - 1}", r"--seed is at most 4294967294"),
    _usage("a seed below -1", f"{RAW} -s -2", r"Invalid value for '-s'"),
    _usage("a context that C would wrap to 0", f"{RAW} -c {HUGE}", r"--ctx-size is at most 2147483647"),
    _usage("a context beyond 64 bits", f"{RAW} -c 99999999999999999999", r"--ctx-size is at most"),
    _usage("a context beyond memory", f"{RAW} -c 2147483647", r"2147483647 tokens takes [\d.]+ GiB .* free: give at most \d+"),
    _usage("a negative context", f"{RAW} -c -1", r"Invalid value for '-c'"),
    _usage("a context beyond memory for trace", "trace -m {tiny} -o t -c 2147483647", r"GiB of memory .* with -c"),
    _usage("a context beyond memory for bench", "bench -m {tiny} -p 2000000000 -n 1", r"GiB of memory .* with -p and -n"),
    _usage("a chunk beyond memory", "eval perplexity -m {tiny} --chunk 2147483647", r"GiB of memory .* with --chunk"),
    _usage("a chunk that C would wrap", f"eval perplexity -m {{tiny}} --chunk {HUGE}", r"--chunk is at most"),
    _usage("a chunk of tune that C would wrap", f"tune -m {{tiny}} --chunk {HUGE}", r"--chunk is at most"),
    _usage("more tokens than C counts", f"{RAW} -n {HUGE}", r"--n-predict is at most"),
    _usage("tokens below -2", f"{RAW} -n -3", r"Invalid value for '-n'"),
    _usage("threads by the hundred thousand", f"{RAW} -t 100000", r"Invalid value for '-t'"),
    _usage("threads that C would wrap", f"{RAW} -t 99999999999", r"Invalid value for '-t'"),
    _usage("no threads", f"{RAW} -t 0", r"Invalid value for '-t'"),
    _usage("a number that is none", f"{RAW} -n many", r"Invalid value for '-n'"),
    _usage("a number of six thousand digits", f"{RAW} -n {'9' * 6000}", r"'-n'"),
    _usage("a temperature that is nan", f"{RAW} --temp nan", r"--temp"),
    _usage("a temperature without end", f"{RAW} --temp inf", r"--temp is a number, not inf"),
    _usage("a probability that is nan", f"{RAW} --top-p nan", r"--top-p"),
    _usage("a penalty that is nan", f"{RAW} --repeat-penalty nan", r"--repeat-penalty"),
    _usage("k likeliest beyond C", f"{RAW} --top-k {HUGE}", r"--top-k is at most"),
    _usage("a flash whose speed is nan", f"{RAW} --flash-mbps nan", r"--flash-mbps"),
    _usage("a flash without limit", f"{RAW} --flash-mbps inf", r"--flash-mbps is a number, not inf"),
    _usage("a flash of no speed", f"{RAW} --flash-mbps 0", r"'--flash-mbps'"),
    _usage("more to prefetch than C counts", f"{RAW} --prefetch {HUGE}", r"--prefetch is at most"),
    _usage(
        "a list to prefetch that C would wrap", f"bench -m {{tiny}} --prefetch 0,{HUGE}", r"--prefetch is a number of experts"
    ),
    _usage("a budget of more digits than a number has", f"{RAW} --budget {'9' * 400}", r"does not fit a model of 32 experts"),
    _usage("a share of more digits than a number has", f"{RAW} --budget {'9' * 400}%", r"more than all experts"),
    _usage("a negative budget", f"{RAW} --budget=-5", r"'-5' is not a budget"),
    _usage("a budget that is nan", f"{RAW} --budget nan", r"'nan' is not a budget"),
    _usage("a parameter that is nan", f"{RAW} --routing cache-prior:lambda=nan", r"lambda is a number, not nan"),
    _usage(
        "a parameter twice",
        f"{RAW} --routing cache-prior:lambda=0.1:lambda=0.2",
        r"cache-prior has lambda twice; its form is cache-prior:lambda=",
    ),
    _usage("a parameter of prompts twice", f"{RAW} --prompt-routing keep:cover=0.9:cover=0.8", r"keep has cover twice"),
    _usage("a parameter without end", f"{RAW} --routing max-rank:m=inf", r"m is a number, not inf"),
    _usage("a limit that C would wrap", f"eval perplexity -m {{tiny}} --limit {HUGE}", r"--limit is at most"),
    _usage("a seed of simulate below 0", "simulate t --shuffle -s -1", r"Invalid value for '-s'"),
    _usage("a seed of tune that C would wrap", f"tune -m {{tiny}} -s {HUGE}", r"--seed is at most"),
    _usage("workers by the thousand", "eval perplexity -m {tiny} --workers 100000", r"Invalid value for '--workers'"),
    _usage("a layer beyond C", f"plot t --layer {HUGE}", r"--layer is at most"),
    Case("a budget of more bytes than numbers are", f"{RAW} --budget {'9' * 400}GiB", 0, stdout=True, more=True),
]

COMMAND_LINE = [
    _usage("a command that does not exist", "gnrate", r"gnrate.*See `cacheroute --help`"),
    _usage("an option that does not exist", "generate --no-such-option", r"--no-such-option.*See `cacheroute generate --help`"),
    _usage("an option without its value", "generate -m", r"'-m' requires an argument"),
    _usage("an argument too many", "inspect {tiny} b", r"b belongs to no option\. See `cacheroute inspect --help`"),
    _usage("a missing argument", "simulate", r"FILE.*See `cacheroute simulate --help`"),
    _usage("an output that does not exist", "generate -o xml -m {tiny}", r"There is no output 'xml'"),
    _usage("an output of inspect that does not exist", "inspect -o xml {tiny}", r"There is no output 'xml'"),
    _usage("a model without a name", "generate -m '' -p the", r"The model has no name: .*-m"),
    _usage("a model of blanks", "generate -m ' ' -p the", r"The model has no name"),
    _usage("nothing to inspect", "inspect ''", r"The model has no name"),
    _usage("a trace of a model without a name", "trace -m '' -o t", r"The model has no name"),
    _usage("nothing to pull", "pull ''", r"The model has no name: `cacheroute models` lists what can be downloaded\.$"),
    *(
        _usage(f"an empty name of a file for {words}", f"{words} ''", rf"{name} is empty; name a file, or leave it out\.$")
        for words, name in (
            ("generate -m {tiny} -p the --prompt-cache", "--prompt-cache"),
            ("generate -m {tiny} -f", "--file"),
            ("generate -m {tiny} -p the --grammar-file", "--grammar-file"),
            ("generate -m {tiny} -p the --warm-start", "--warm-start"),
            ("chat -m {tiny} --load", "--load"),
            ("trace -m {tiny} -o", "--output"),
            ("plot rows.json -o", "--output"),
        )
    ),
    _usage("an empty name of a file with a sign", "generate -p the --prompt-cache=", r"--prompt-cache is empty"),
    _usage("an empty name of a trace", "simulate ''", r"FILE is empty; name a file\.$"),
    _usage("an empty name of a file to plot", "plot ''", r"FILES? is empty; name a file\.$"),
    _usage("an empty name of a file of prompts", "generate --prompts ''", r"The name of a file is empty"),
    _usage("a file of a schema without a name", "generate -p the -j @", r"The name of a file is empty"),
    _usage("a model on this disk to pull", "pull {tiny}", r"is a file on this disk already, with nothing to download"),
    _usage("two texts for a trace", "trace -m {tiny} -o t -p a -f b", r"-p or with -f"),
    _usage("an empty text for a trace", "trace -m {tiny} -o t -p ''", r"The text is empty"),
    _usage("control characters in an argument", "inspect 'a\x1b[31mb.gguf'", r"no file a\\x1b\[31mb\.gguf"),
    _usage("a line end in an argument", "inspect 'a\nb.gguf'", r"no file a\\nb\.gguf"),
]

TEXT = [
    Case(
        "a prompt on the command line that is no UTF-8", _words("generate --raw -m {tiny} -p {not_text}"), 2, r"caf\\xe9 .*UTF-8"
    ),
    Case(
        "a text of trace that is no UTF-8", _words("trace -m {tiny} -o t -p {not_text}"), 2, r"caf\\xe9 is not UTF-8", leaves=()
    ),
    Case("a file name that is no UTF-8", _words("inspect {not_text}.gguf"), 2, r"caf\\xe9\.gguf is not UTF-8"),
    Case("a model's name that is no UTF-8", _words("generate -m {not_text} -p the"), 2, r"not UTF-8"),
    Case("a folder of tasks that is no UTF-8", _words("eval task x --tasks {not_text}"), 2, r"not UTF-8"),
    Case("a pipe that is no UTF-8", "generate --raw -m {tiny}", 2, r"standard input is not UTF-8", stdin=b"caf\xe9"),
    Case("half a letter in a pipe", "generate --raw -m {tiny}", 2, r"standard input is not UTF-8", stdin="é".encode()[:1]),
    Case(
        "a file that is no UTF-8",
        lambda p: ["generate", "--raw", "-m", str(p.tiny), "-f", str(p.file("t", b"caf\xe9"))],
        2,
        r"/t is not UTF-8 text",
    ),
    Case(
        "a text of bench that is no UTF-8",
        lambda p: ["bench", "-m", str(p.tiny), "-p", "8", "-n", "1", "-f", str(p.file("t", b"\xff\xfe"))],
        2,
        r"/t is not UTF-8 text",
    ),
    Case("a folder as a prompt", "generate -m {tiny} -f {dir}", 2, r"cannot be read \(Is a directory\)"),
    Case("a prompt without end", "generate -m {tiny} -f /dev/zero", 2, r"/dev/zero has more than 64 MiB"),
    Case("no prompt at all", "generate -m {tiny}", 2, r"The prompt is empty; give one with -p, -f or a pipe"),
    Case("a prompt that is not there", "generate -m {tiny} -f nothing.txt", 2, r"nothing\.txt cannot be read"),
]


def _without_home(place: Place) -> None:
    """As for a user id that passwd does not know."""
    place.monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for name in ("HOME", "XDG_CACHE_HOME", "CACHEROUTE_CACHE", "HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS"):
        place.monkeypatch.delenv(name, raising=False)


def _homeless(words: str) -> Callable[[Place], list[str]]:
    def prepare(place: Place) -> list[str]:
        _without_home(place)
        return [w.format(tiny=place.tiny) for w in words.split()]

    return prepare


def _nobody(variable: str, words: str) -> Case:
    return Case(
        f"{variable} of a user that does not exist",
        words,
        2,
        rf"{variable}=~nosuchuser/x cannot be found: there is no user nosuchuser; write the whole path",
        env={"CACHEROUTE_CACHE": "{dir}/c", variable: "~nosuchuser/x"},
    )


FOLDERS = [
    Case("no home for the demo model", _homeless("generate -p Hi -n 1"), 1, r"no home folder .*CACHEROUTE_CACHE"),
    Case("no home for the list of models", _homeless("models"), 1, r"no home folder .*CACHEROUTE_CACHE"),
    Case("no home for scores", _homeless("eval perplexity -m {tiny} --chunk 32 --limit 8"), 1, r"no home folder"),
    Case("no home, and none is needed", _homeless("inspect {tiny}"), 0, stdout=True),
    Case("no home to generate, and none is needed", _homeless(RAW), 0, stdout=True, more=True),
    Case("a home that cannot be known, in a path", _homeless("inspect ~/m.gguf"), 2, r"no home folder and HOME is not set"),
    _usage("a model of a user that does not exist", "inspect ~nosuchuser/m.gguf", r"there is no user nosuchuser"),
    _nobody("HF_HUB_CACHE", "models"),
    _nobody("HF_HOME", "models"),
    _nobody("OLLAMA_MODELS", "models"),
    _nobody("CACHEROUTE_CACHE", "generate -p Hi"),
]


def _shell(name: str, command: str, line: str, code: int, sentence: str, **more: object) -> Case:
    return Case(name, command, code, sentence, shell=line, **more)  # type: ignore[arg-type]


CLOSED = r"Standard output is closed; send it to"
FULL = r"Standard output cannot be written \(No space left on device\)"
STREAMS = [
    _shell("stdout closed under generate", RAW, "{cacheroute} </dev/null >&-", 1, CLOSED),
    _shell("stdout closed under models", "models", "{cacheroute} >&-", 1, CLOSED),
    _shell("stdout closed under help", "--help", "{cacheroute} >&-", 1, CLOSED),
    _shell("stdout full under generate", RAW, "{cacheroute} </dev/null >/dev/full", 1, FULL, more=True),
    _shell("stdout full under json", f"{RAW} -o json", "{cacheroute} </dev/null >/dev/full", 1, FULL, more=True),
    _shell("stdout full under inspect", "inspect {tiny}", "{cacheroute} >/dev/full", 1, FULL),
    _shell("stdout full under the version", "--version", "{cacheroute} >/dev/full", 1, FULL),
    _shell("stderr closed", RAW, "{cacheroute} </dev/null 2>&-", 0, "", stdout=True),
    _shell("stdin closed", RAW, "{cacheroute} <&-", 0, "", stdout=True, more=True),
    _shell("a terminal that knows no letters", "routing", "PYTHONIOENCODING=ascii {cacheroute}", 0, "", stdout=True),
    _shell(
        "stdin that nobody closes",
        RAW,
        "sleep 4 | {cacheroute}",
        0,
        r"waiting for the end of standard input",
        stdout=True,
        more=True,
    ),
    _shell("a pipe beside -p", RAW, "echo of | {cacheroute}", 0, r"3 bytes of standard input follow", stdout=True, more=True),
    _shell(
        "the loop of a shell",
        RAW,
        "printf 'the\\na of\\n' >l; while read -r x; do {cacheroute} >>out; echo $x; done <l 2>err; head -1 err >&2",
        0,
        r"something else has begun to read: it is left alone",
        stdout=True,
    ),
]


def _trace_on_full_disk(place: Place) -> list[str]:
    from cacheroute.trace import trace_file

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    begin = trace_file.TraceWriter.__init__

    def init(self: trace_file.TraceWriter, *args: object, **kwargs: object) -> None:
        begin(self, *args, **kwargs)  # type: ignore[arg-type]
        self._file.close()
        self._file = Full()  # type: ignore[assignment]

    place.monkeypatch.setattr(trace_file.TraceWriter, "__init__", init)
    return ["trace", "-m", str(place.tiny), "-p", "the", "-o", "a.trace", "-t", "1"]


def _full_after_write(place: Place) -> None:
    """fsync tells that the disk is full, as some filesystems do."""

    def fsync(number: int) -> None:
        raise OSError(28, "No space left on device")

    place.monkeypatch.setattr(os, "fsync", fsync)


def _profile_on_full_disk(place: Place) -> list[str]:
    _full_after_write(place)
    return ["trace", "-m", str(place.tiny), "-p", "the", "-o", "a.trace", "-t", "1", "--save-profile", "p.json"]


def _old_profile_stays(place: Place) -> Outcome:
    place.file("p.json", "old")
    outcome = in_process([*_profile_on_full_disk(place), "--force"])
    assert (place.folder / "p.json").read_text() == "old"
    return outcome


def _plot_on_full_disk(place: Place) -> list[str]:
    row = {"budget": "50%", "routing": "original", "eviction": "lru", "budget_experts": 2, "layer": None, "shuffled": False}
    rates = {"miss_rate": 0.5, "missed_mib_per_token": 1.0, "swap_rate": 0.0, "drop_rate": 0.0, "lost_mass": 0.0}
    file = place.file("rows.json", json.dumps([row | rates | {"lifetime_tokens": 1.0, "model": "m", "tokens": 5}]))
    _full_after_write(place)
    return ["plot", str(file), "-o", "a.svg"]


def _results_on_full_disk(place: Place) -> list[str]:
    _full_after_write(place)
    return ["frontier", "f.jsonl", "-m", str(place.tiny), "--chunk", "32", "--limit", "8", "--routing", "max-rank:m=8", "-t", "1"]


def _not_a_folder(place: Place) -> Path:
    return place.file("c", "a file where a folder should be")


_WRITERS = {
    "a trace": ("trace", "-m", "{tiny}", "-p", "the", "-t", "1", "--max-tokens", "2", "--force", "-o", "o.svg"),
    "a profile": ("trace", "-m", "{tiny}", "-p", "the", "-t", "1", "-o", "t", "--force", "--save-profile", "o.svg"),
    "a figure": ("plot", "rows.json", "--force", "-o", "o.svg"),
}


_IN_ITS_PLACE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (os.mkfifo, r"it is a pipe; give the name"),
    "a link to itself": (lambda path: path.symlink_to(path.name), r"it is a link to o\.svg, which leads"),
}


def _written_to(what: str, words: tuple[str, ...]) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        make, _ = _IN_ITS_PLACE[what]
        make(place.folder / "o.svg")
        place.file("rows.json", "[]")
        return [word.format(tiny=place.tiny) for word in words]

    return command


def _measured_links(place: Place) -> list[str]:
    cache = place.folder / "cache"
    cache.mkdir()
    for name in ("io.json", "drive.json", "compute.json"):
        (cache / name).symlink_to(name)
    place.monkeypatch.setenv("CACHEROUTE_CACHE", str(cache))
    return [*RAW.format(tiny=place.tiny).split(), "--budget", "50%"]


RESULTS = [
    Case(
        "a trace on a full disk",
        _trace_on_full_disk,
        1,
        r"a\.trace\.part cannot be written \(No space left",
        more=True,
        leaves=(),
    ),
    Case("a task profile on a full disk", _profile_on_full_disk, 1, r"p\.json cannot be written", more=True, leaves=("a.trace",)),
    Case("a task profile that stays", _old_profile_stays, 1, r"p\.json cannot be", more=True, leaves=("a.trace", "p.json")),
    Case("a figure on a full disk", _plot_on_full_disk, 1, r"a\.svg cannot be written", more=True, leaves=("rows.json",)),
    Case("results on a full disk", _results_on_full_disk, 1, r"f\.jsonl cannot be written", more=True, leaves=()),
    Case("a trace where no folder is", "trace -m {tiny} -p the -o no/a.trace -t 1", 2, r"no/a\.trace\.part cannot be", more=True),
    Case("a trace that exists", lambda p: ["trace", "-m", str(p.tiny), "-o", str(p.file("t", ""))], 2, r"/t exists; --force"),
    Case(
        "a cache folder that is a file",
        lambda p: [_not_a_folder(p).name and "eval", "perplexity", "-m", str(p.tiny), "--chunk", "32", "--limit", "8"],
        0,
        r"/c/scores/.* cannot be written .*; scores are not kept",
        stdout=True,
        more=True,
        env={"CACHEROUTE_CACHE": "{dir}/c"},
    ),
    Case("a figure of a kind that is none", "plot t -o a.gif", 2, r"neither a \.png nor a \.svg"),
    *(
        Case(f"{name} to {what}", _written_to(what, words), 2, rf"o\.svg cannot be written: {said}")
        for what, (_, said) in _IN_ITS_PLACE.items()
        for name, words in _WRITERS.items()
    ),
    Case("measurements that are links to themselves", _measured_links, 0, stdout=True, more=True),
]


def _renamed(place: Place, name: str) -> Path:
    """The tiny model with another general.name of the same length."""
    content = place.tiny.read_bytes()
    from cacheroute.model import gguf_file

    old = str(gguf_file.read(place.tiny).metadata["general.name"]).encode()
    new = name.encode()[: len(old)].ljust(len(old))
    return place.file("m.gguf", content.replace(old, new, 1))


def _escapes(place: Place) -> Outcome:
    outcome = in_process(["inspect", str(_renamed(place, "a\x1b[1m\n\x07"))])
    assert r"a\x1b[1m\n\x07" in outcome.stdout and "\x1b" not in outcome.stdout
    return outcome


def _escapes_in_a_profile(place: Place) -> list[str]:
    content = {"format": "cacheroute-task-profile", "version": 1, "model": "a\x1b[2Jb", "architecture": "x", "n_expert": 2}
    file = place.file("p.json", json.dumps(content | {"layers": [0], "tokens": 1, "uses": [[1, 0]]}))
    return ["generate", "-m", str(place.tiny), "--raw", "-p", "the", "-c", "256", "--warm-start", str(file)]


def _escapes_in_a_list(place: Place) -> Outcome:
    folder = place.folder / "hub" / "models--a--b" / "snapshots" / "1"
    folder.mkdir(parents=True)
    shutil.copy(place.tiny, folder / "x\x1b[1m.gguf")
    outcome = in_process(["models"])
    assert "x\\x1b[1m.gguf" in outcome.stdout and "\x1b" not in outcome.stdout
    return outcome


NAMES = [
    Case("control characters in a model's name", _escapes, 0, stdout=True),
    Case("control characters in a task profile", _escapes_in_a_profile, 2, r"a\\x1b\[2Jb"),
    Case(
        "control characters in a list of models",
        _escapes_in_a_list,
        0,
        stdout=True,
        more=True,
        env={"HF_HUB_CACHE": "{dir}/hub", "CACHEROUTE_CACHE": "{dir}/c", "OLLAMA_MODELS": "{dir}/o"},
    ),
]


def _copied(*words: str) -> Callable[[Place], list[str]]:
    """A command on a copy of the tiny model, m.gguf in the folder of the case."""

    def of(place: Place) -> list[str]:
        model = place.file("m.gguf", place.tiny.read_bytes())
        return [*(word.format(dir=place.folder) for word in words), "-m", str(model), "-p", "the"]

    return of


CASES: list[Case] = [
    Case(
        "a trace into its own model", _copied("trace", "-o", "{dir}/m.gguf", "--force"), 2, r"would replace .*m\.gguf, which this"
    ),
    Case(
        "a trace and a profile in one file",
        "trace -m {tiny} -p the -o {dir}/t --save-profile {dir}/t",
        2,
        r"would replace .*t, which this command needs; write to another file",
    ),
    Case(
        "a prompt longer than a context of 20",
        "generate -m {tiny} --raw -n 2 -c 20 -t 1 -p " + "'" + "the " * 40 + "'",
        2,
        r"does not fit the context of 20; give a larger one with -c",
    ),
    *NUMBERS,
    *COMMAND_LINE,
    *TEXT,
    *FOLDERS,
    *STREAMS,
    *RESULTS,
    *NAMES,
]
