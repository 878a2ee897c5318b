"""Faults of a model that show when it loads or is asked: chat templates, and what llama.cpp refuses."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable

from faults.runner import Case, Outcome, Place, in_process

RAW = ("--raw", "-p", "the", "-n", "2", "-c", "256", "-t", "1", "-s", "5")
NAMES_RAW = r"The model's chat template cannot be used \(.*{}.*\); --raw continues the text without it"
UNPARSABLE = "{% for m in messages %}{% brand_new_tag %}{{ m.content }}{% endfor %}"


def with_strings(place: Place, **values: str) -> str:
    """The tiny model with other or further strings in its metadata (__ for a dot in a key), at the front of the header."""
    data = place.tiny.read_bytes()
    magic, version, n_tensors, n_keys = struct.unpack_from("<4sIQQ", data)
    added = b""
    for name, value in values.items():
        key, text = name.replace("__", ".").encode(), value.encode()
        added += struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(text)) + text
    n_bytes = len(added)
    pad = -n_bytes % 32  # tensor data stay aligned: one more key fills up to it
    if pad:
        fill = (pad - (8 + 1 + 4 + 8)) % 32
        added += struct.pack("<Q", 1) + b"x" + struct.pack("<IQ", 8, fill) + b" " * fill
    header = struct.pack("<4sIQQ", magic, version, n_tensors, n_keys + len(values) + bool(pad))
    return str(place.file("m.gguf", header + added + data[struct.calcsize("<4sIQQ") :]))


def _chat(template: str) -> Callable[[Place], list[str]]:
    def words(place: Place) -> list[str]:
        model = with_strings(place, tokenizer__chat_template=template)
        return ["generate", "-m", model, "-p", "the", "-n", "2", "-c", "256", "-t", "1"]

    return words


def _template(name: str, template: str, reason: str) -> Case:
    return Case(name, _chat(template), 1, NAMES_RAW.format(reason))


def _untouched(*words: str) -> Callable[[Place], list[str]]:
    """A command that needs no template, with one that cannot be parsed."""
    return lambda place: [*words, "-m", with_strings(place, tokenizer__chat_template=UNPARSABLE)]


def _library(place: Place) -> Outcome:
    from contextlib import closing

    from cacheroute import CacherouteError, Llama

    model = with_strings(place, tokenizer__chat_template=UNPARSABLE)
    with closing(Llama(model, n_ctx=256, verbose=False)) as llm:
        try:
            llm.create_chat_completion([{"role": "user", "content": "the"}], max_tokens=1)
        except CacherouteError as e:
            said = str(e)
    with closing(Llama(model, n_ctx=256, verbose=False, chat_format="chatml")) as llm:
        llm.create_chat_completion([{"role": "user", "content": "the"}], max_tokens=1)
    return Outcome(0, "", said)


def _without_tensor(place: Place) -> list[str]:
    data = place.tiny.read_bytes()
    model = place.file("m.gguf", data.replace(b"output_norm.weight", b"output_nurm.weight"))
    return ["generate", "-m", str(model), *RAW]


def _unknown_tokenizer(place: Place) -> list[str]:
    data = place.tiny.read_bytes()
    key = b"tokenizer.ggml.model" + struct.pack("<I", 8)
    at = data.index(key) + len(key)
    (n,) = struct.unpack_from("<Q", data, at)
    model = place.file("m.gguf", data[: at + 8] + b"brandnew"[:n].ljust(n, b"w") + data[at + 8 + n :])
    return ["generate", "-m", str(model), *RAW]


def _cache_that_cannot_be_written(place: Place) -> Outcome:
    from cacheroute.engine import stores

    stores._said.clear()
    place.monkeypatch.setattr(stores, "measure", lambda *_: {stores.DIRECT: 2.0, stores.BUFFERED: 1.0})
    outcome = in_process(["generate", "-m", str(place.tiny), *RAW, "--budget", "50%", "--io", "auto"])
    assert "is kept in" not in outcome.stderr
    return outcome


def _without_threads(*more: str) -> Callable[[Place], list[str]]:
    """Python's own: those of the core are refused in cases_system.py."""

    def words(place: Place) -> list[str]:
        def refused(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        place.monkeypatch.setattr(threading.Thread, "start", refused)
        return ["generate", "-m", str(place.tiny), *RAW, *more]

    return words


CASES: list[Case] = [
    Case("no thread to fetch weights ahead", _without_threads("--budget", "50%"), 0, stdout=True, more=True),
    Case("no thread to watch the memory", _without_threads("--io", "buffered"), 1, r"^cacheroute: No thread can be started: "),
    _template("a template with an unknown tag", UNPARSABLE, "brand_new_tag"),
    _template("a template that is cut short", "{% for m in messages %}{{ m.content }}", "TemplateSyntaxError"),
    _template("a template that refuses", "{{ raise_exception('A system message is needed') }}", "A system message is needed"),
    _template("a template that lacks a variable", "{{ tools.functions.keys() }}{{ messages[0].content }}", "UndefinedError"),
    _template("a template that renders nothing", "{# nothing #}", "it renders nothing"),
    _template("a template that divides by zero", "{{ 1 // 0 }}", "ZeroDivisionError"),
    _template("a template that reaches for what it must not", "{{ ''.__class__.__mro__ }}", "SecurityError"),
    _template("a template with control characters", "{{ raise_exception('a\x1b[31mb') }}", r"a\\x1b\[31mb"),
    _template("a template of two lines of complaint", "{{ raise_exception('one\ntwo') }}", "one two"),
    Case("generate --raw needs no template", _untouched("generate", *RAW), 0, stdout=True, more=True),
    Case("trace needs no template", _untouched("trace", "-p", "the", "-o", "t", "-t", "1"), 0, more=True),
    Case(
        "bench needs no template",
        _untouched("bench", *["-p", "8", "-n", "4", "-r", "1", "-t", "1", "--routing", "original"]),
        0,
        stdout=True,
        more=True,
    ),
    Case(
        "eval needs no template",
        _untouched("eval", *["perplexity", "--limit", "32", "--chunk", "32", "-t", "1", "--routing", "max-rank:m=8"]),
        0,
        stdout=True,
        more=True,
        env={"CACHEROUTE_CACHE": "{dir}/c"},
    ),
    Case("a library's user may choose another format", _library, 0, r"template cannot be used .*; give a chat_format"),
    Case("a tokenizer that llama.cpp does not know", _unknown_tokenizer, 1, r"cannot load .*m\.gguf: .*unknown tokenizer: 'bran"),
    Case("a model without a tensor", _without_tensor, 1, r"cannot load .*m\.gguf: .*output_norm"),
    Case(
        "a cache that cannot be written",
        _cache_that_cannot_be_written,
        0,
        r"--io auto reads buffered .*io\.json cannot be written\.",
        stdout=True,
        more=True,
        env={"CACHEROUTE_CACHE": "/proc/nope"},
    ),
]
