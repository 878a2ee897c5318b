"""`cacheroute serve`: the OpenAI API on a loaded model, its answers, its counters, its refusals, and the command."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cacheroute import Llama
from cacheroute.cli.serve import _name
from cacheroute.engine import completion
from support import served, tiny_models
from support.cli import invoke
from support.decoding import last_logits
from support.served import HELLO, MODEL, Served

pytestmark = pytest.mark.engine

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]
SETTINGS: dict[str, Any] = dict(budget="50%", n_threads=1, n_threads_batch=1, verbose=False)


@pytest.fixture(scope="module")
def llm(demo_model: Path) -> Iterator[Llama]:
    with contextlib.closing(Llama(str(demo_model), n_ctx=512, **SETTINGS)) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(llm: Llama) -> Iterator[Served]:
    with served.serving(llm, body=100_000) as running:
        yield running


def expected(llm: Llama, prompt: completion.Prompt, n: int, **sampling: Any) -> completion.Completion:
    """What the command line gives for it."""
    run = completion.Completion(llm, prompt, n, 7, sampling)
    for _ in run.pieces():
        pass
    return run


# ---- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_chat_is_answered_as_by_the_command_line(server: Served, llm: Llama, temperature: float) -> None:
    answer = server.chat(QUESTION, max_tokens=16, temperature=temperature, seed=7, model=MODEL)
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    server.until(server.idle)
    sampling = dict(temp=temperature, top_k=40, top_p=0.95, min_p=0.05)
    run = expected(llm, completion.chat_prompt(llm, QUESTION), 16, **sampling)
    (choice,) = answer.json["choices"]
    assert choice["message"] == {"role": "assistant", "content": run.text} and run.text
    assert choice["finish_reason"] == run.finish_reason and choice["index"] == 0 and choice["logprobs"] is None
    assert (answer.json["object"], answer.json["model"]) == ("chat.completion", MODEL) and answer.json["created"] > 1.7e9
    usage = answer.json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(run.prompt.tokens), run.n_tokens)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_has_the_same_text_in_pieces(server: Served) -> None:
    at_once = server.chat(QUESTION, max_tokens=12, temperature=0).json
    whole, usage = at_once["choices"][0], at_once["usage"]
    answer = server.chat(QUESTION, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = answer.events
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == usage["completion_tokens"]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"} and len({(c["id"], c["created"]) for c in chunks}) == 1
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {} and len(deltas) > 6
    assert "".join(d.get("content", "") for d in deltas) == whole["message"]["content"]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + [whole["finish_reason"]]
    assert all("usage" not in c for c in server.chat(QUESTION, max_tokens=1, stream=True).events)


def test_a_text_is_continued(server: Served, llm: Llama) -> None:
    answer = server.text(max_tokens=10, temperature=0)
    stream = server.text(["Once upon a time"], max_tokens=10, temperature=0, stream=True).events
    tokens = completion.raw_prompt(llm, "Once upon a time").tokens
    same = server.text(tokens, max_tokens=10, temperature=0)
    server.until(server.idle)
    run = expected(llm, completion.raw_prompt(llm, "Once upon a time"), 10, temp=0.0)
    assert answer.json["object"] == "text_completion"
    assert answer.json["choices"][0]["text"] == same.json["choices"][0]["text"] == run.text
    assert "".join(c["choices"][0]["text"] for c in stream) == run.text and stream[-1]["choices"][0]["finish_reason"] == "length"
    assert server.text("Hello").json["usage"]["completion_tokens"] <= 16, "OpenAI's default"


def test_stop_strings_end_an_answer_and_are_no_part_of_it(server: Served) -> None:
    text = server.text(max_tokens=20, temperature=0).json["choices"][0]["text"]
    stop = text[5:9]
    for given in (stop, [stop], ["nothing like that", stop, ""]):
        (choice,) = server.text(max_tokens=20, temperature=0, stop=given).json["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text.split(stop)[0], "stop")
    pieces = server.text(max_tokens=20, temperature=0, stop=stop, stream=True).events
    assert "".join(c["choices"][0]["text"] for c in pieces) == text.split(stop)[0]


def test_an_answer_fits_its_schema(server: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 6}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    wanted: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": schema}}
    for seed in range(2):
        (choice,) = server.chat(QUESTION, response_format=wanted, max_tokens=40, seed=seed, temperature=1.5).json["choices"]
        place = json.loads(choice["message"]["content"])
        assert list(place) == ["city", "big"] and isinstance(place["city"], str) and isinstance(place["big"], bool)
    any_object = server.chat(QUESTION, response_format={"type": "json_object"}, max_tokens=8, temperature=0)
    assert any_object.json["choices"][0]["message"]["content"].startswith("{")
    free = server.chat(QUESTION, response_format={"type": "text"}, max_tokens=8, temperature=0)
    assert free.json == free.json | {"object": "chat.completion"} and free.status == 200


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"$ref": "https://localhost/schema.json"},
        {"$ref": "#/nowhere"},
        {"type": "string", "maxLength": 10**9},
        {"type": "string", "pattern": "^((a{0,9}){0,9}){0,9}$"},
        {"type": "string", "minLength": "many"},
        {"type": "array", "items": {"type": "string"}, "minItems": -1},
        {"type": "string", "pattern": "^a{100000}$"},
        {"type": "string", "pattern": "^" + "a" * 2000 + "$"},
        {"type": "string", "pattern": "no anchors"},
        {"type": "string", "pattern": "^[^"},
        {"type": "string", "pattern": "^\\q$"},
        {"enum": ["x" * 1000] * 90},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}},
        {"type": "string", "pattern": "^\0$"},
        {"type": "integer", "minimum": 1000},
        {"type": "array", "items": {"type": "string"}, "minItems": 3, "maxItems": 2},
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused(server: Served, schema: dict[str, Any]) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = server.chat(response_format=asked, max_tokens=4)
    assert answer.status == 400 and answer.error.startswith("The JSON schema cannot be used (")
    assert answer.json["error"]["param"] == "response_format"


def test_logprobs_are_of_the_models_distribution(server: Served, llm: Llama) -> None:
    answer = server.chat(QUESTION, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3, logit_bias={"5": -1}).json
    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(c["token"] for c in content) == answer["choices"][0]["message"]["content"] and len(content) == 6
    server.until(server.idle)
    llm.reset()
    prompt = completion.chat_prompt(llm, QUESTION)
    llm.eval(prompt.tokens)
    for own in content:
        logits = last_logits(llm).astype(np.float64)
        expected = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        best = [int(i) for i in np.argsort(-expected)[:3]]
        assert [t["bytes"] for t in own["top_logprobs"]] == [list(completion.token_bytes(llm, i)) for i in best]
        assert [t["logprob"] for t in own["top_logprobs"]] == pytest.approx(expected[best], abs=1e-3)
        assert own["logprob"] == own["top_logprobs"][0]["logprob"] and own["bytes"] == own["top_logprobs"][0]["bytes"]
        with llm.decoding():
            llm.eval([best[0]])


def test_logprobs_come_with_their_text(server: Served) -> None:
    asked: dict[str, Any] = dict(max_tokens=12, temperature=0)
    whole = server.text(**asked, logprobs=2).json["choices"][0]
    own = whole["logprobs"]
    assert "".join(own["tokens"]) == whole["text"] and len(own["tokens"]) == len(own["token_logprobs"]) == 12
    assert own["text_offset"] == [len("".join(own["tokens"][:i])) for i in range(12)]
    assert all(
        len(top) == 2 and max(top.values()) == p for top, p in zip(own["top_logprobs"], own["token_logprobs"], strict=True)
    )
    chunks = [c["choices"][0] for c in server.text(**asked, logprobs=2, stream=True).events]
    for name in own:
        assert [value for c in chunks if c["logprobs"] for value in c["logprobs"][name]] == own[name]
    assert all("".join(c["logprobs"]["tokens"]) == c["text"] for c in chunks if c["logprobs"])
    stop = whole["text"][8:12]
    stopped = server.text(**asked, logprobs=0, stop=stop).json["choices"][0]
    assert "".join(stopped["logprobs"]["tokens"]).startswith(stopped["text"]) and len(stopped["logprobs"]["tokens"]) < 12
    assert server.text(**asked).json["choices"][0]["logprobs"] is None
    (again, same) = (server.chat(QUESTION, **asked, logprobs=True).json["choices"][0] for _ in range(2))
    assert again == same, "the second prompt is evaluated already"


def test_a_bias_moves_the_choice(server: Served, llm: Llama) -> None:
    (token,) = llm.tokenize(b" Paris", add_bos=False)[:1]
    text = server.text(max_tokens=5, temperature=0, logit_bias={str(token): 100}).json["choices"][0]["text"]
    assert text == completion.token_bytes(llm, token).decode() * 5


def test_parts_of_a_message_are_joined(server: Served, llm: Llama) -> None:
    parts = [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": "of France?"}]
    joined = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts, "name": None}]
    plain = [QUESTION[0], {"role": "user", "content": "What is the capital\nof France?"}]
    one, two = (server.chat(m, max_tokens=4, temperature=0).json for m in (joined, plain))
    assert one["choices"] == two["choices"]


# ---- what is counted ------------------------------------------------------------------------------


def test_usage_has_our_counters(demo_model: Path) -> None:
    lossy: dict[str, Any] = SETTINGS | dict(routing="cache-prior:lambda=0.8", prompt_routing="keep:cover=0.6", budget="25%")
    with (
        contextlib.closing(Llama(str(demo_model), n_ctx=256, **lossy)) as llm,
        served.serving(llm) as server,
    ):
        first = server.chat(QUESTION, max_tokens=12, temperature=0).json
        own, stats = first["usage"]["cacheroute"], llm.stats()
        assert (own["routing"], own["prompt_routing"]) == (str(llm.routing), str(llm.prompt_routing))
        for name in ("miss_rate", "swap_rate", "read_mib_per_token"):
            assert own[name] == getattr(stats.decode, name) > 0
        assert own["prompt_swap_rate"] == stats.prefill.swap_rate > 0 and own["prompt_read_mib"] == stats.prefill.read_mib > 0
        assert own["drop_rate"] == 0 and own["ts"] > 0 and own["queue_s"] >= 0 and own["time_to_first_token_s"] > 0
        assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        told = first["choices"][0]["message"]
        more = [*QUESTION, told, {"role": "user", "content": "And of Spain?"}]
        usage = server.chat(more, max_tokens=4, temperature=0).json["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert usage["prompt_tokens"] > cached > 0
        assert stats.prefill.tokens + usage["prompt_tokens"] - cached == llm.stats().prefill.tokens


def test_metrics_are_for_prometheus(demo_model: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    with contextlib.closing(Llama(str(demo_model), n_ctx=256, **SETTINGS)) as llm, served.serving(llm) as server:
        usage = [server.chat(max_tokens=n, temperature=0).json["usage"] for n in (3, 5)]
        assert server.chat(max_tokens=-1).status == 400 and server.ask("/nowhere").status == 404
        answer = server.ask("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        samples = {
            (s.name, *sorted(s.labels.values())): s.value
            for family in text_string_to_metric_families(answer.body.decode())
            for s in family.samples
        }
        assert samples["cacheroute_generated_tokens_total",] == 8 == sum(u["completion_tokens"] for u in usage)
        assert samples["cacheroute_prompt_tokens_total",] == sum(u["prompt_tokens"] for u in usage)
        assert samples["cacheroute_answers_total", "length"] == 2 and samples["cacheroute_requests_running",] == 0
        path = "/v1/chat/completions"
        assert samples["cacheroute_requests_total", path, "200"] == 2 == 2 * samples["cacheroute_requests_total", path, "400"]
        assert samples["cacheroute_requests_total", "404", "other"] == 1
        stats = llm.stats()
        assert samples["cacheroute_expert_misses_total", "decode"] == stats.decode.misses > 0
        assert samples["cacheroute_expert_read_bytes_total", "prompt"] == stats.prefill.read_bytes > 0
        assert samples["cacheroute_resident_bytes",] == stats.resident_bytes <= samples["cacheroute_budget_bytes",]
        assert samples["cacheroute_first_token_seconds_count",] == samples["cacheroute_queue_seconds_count",] == 2


def test_models_and_health(server: Served) -> None:
    (model,) = server.ask("/v1/models").json["data"]
    assert (model["id"], model["object"], model["meta"]["n_ctx"]) == (MODEL, "model", 512)
    assert server.ask(f"/v1/models/{MODEL}").json == model
    assert server.ask("/v1/models/other").status == 404
    assert server.ask("/health").json == {"status": "ok", "model": MODEL, "running": 0, "waiting": 0}


def test_a_request_is_a_line(server: Served) -> None:
    server.ask("/nowhere?key=secret")
    server.until(lambda: server.lines[-1] == "127.0.0.1 GET /nowhere 404")  # written when the answer is out


# ---- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, words",
    [
        (b"", "The body is no JSON text"),
        (b"{", "The body is no JSON text"),
        (b"[" * 10_000, "The body is no JSON text"),
        (b'{"messages": "\xff"}', "The body is no JSON text"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "The body is no JSON text"),
        (b'{"messages": [], "temperature": NaN}', "The body is no JSON text"),
        (b"[]", "The body is no JSON object."),
        ({}, "The parameter 'messages' is missing."),
        ({"messages": []}, "messages: "),
        ({"messages": "Hello"}, "messages: "),
        ({"messages": [{"role": "queen", "content": "x"}]}, "messages.0.role: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type: Input should be 'text'.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "The parameter 'messages.0.content.0.text' is missing.",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input should be a text, or a list of parts"),
        ({"messages": HELLO, "tools": []}, "This server has no parameter 'tools'."),
        ({"messages": HELLO, "n": 2}, "n: "),
        ({"messages": HELLO, "max_tokens": "5"}, "max_tokens: "),
        ({"messages": HELLO, "max_tokens": -1}, "max_tokens: "),
        ({"messages": HELLO, "max_tokens": 10**30}, "max_tokens: "),
        ({"messages": HELLO, "temperature": 3}, "temperature: "),
        ({"messages": HELLO, "temperature": True}, "temperature: "),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
        ({"messages": HELLO, "stop": ["x"] * 17}, "stop: List should have at most 16 items"),
        ({"messages": HELLO, "stop": ["x", 5]}, "stop.1: Input should be a valid string."),
        ({"messages": HELLO, "stop": 5}, "stop: Input should be a text, or a list of at most 16 texts."),
        ({"messages": HELLO, "logit_bias": {"x": 1}}, "logit_bias names tokens by their numbers"),
        ({"messages": HELLO, "logit_bias": {"999999": 1}}, "logit_bias names tokens by their numbers"),
        ({"messages": HELLO, "logit_bias": {"5": 1, "05": 2}}, "logit_bias names tokens by their numbers"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs needs `logprobs: true` beside it."),
        ({"messages": HELLO, "top_logprobs": 2, "logprobs": False}, "top_logprobs needs `logprobs: true` beside it."),
        ({"messages": HELLO, "stream_options": {"include_usage": True}}, "stream_options needs `stream: true` beside it."),
        ({"messages": HELLO, "stream_options": {}, "stream": False}, "stream_options needs `stream: true` beside it."),
        ({"messages": HELLO, "max_tokens": 2, "max_completion_tokens": 3}, "max_tokens and max_completion_tokens are two limits"),
        (b'{"messages": [], "seed": 1, "seed": 2}', "The body has the key 'seed' twice in one object; leave out one."),
        (b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "The body has the key 'content' twice"),
        (
            {"messages": HELLO, "response_format": {"type": "text", "json_schema": {"schema": {}}}},
            "response_format.json_schema needs",
        ),
        (
            {"messages": HELLO, "response_format": {"type": "text", "schema": {}}},
            "response_format.schema needs `type: json_object`",
        ),
        ({"messages": HELLO, "response_format": {"type": "xml"}}, "response_format.type: "),
        ({"messages": HELLO, "response_format": {"type": "json_schema"}}, "A response_format of json_schema needs"),
        ({"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "The parameter 'resp"),
    ],
)
def test_what_is_wrong_with_a_request_is_one_sentence(server: Served, body: Any, words: str) -> None:
    answer = server.ask("/v1/chat/completions", body)
    assert answer.status == 400 and answer.error.startswith(words), answer.body
    assert answer.json["error"]["type"] == "invalid_request_error"


def test_a_prompt_that_does_not_fit_is_refused(server: Served) -> None:
    for answer in (server.chat([{"role": "user", "content": "word " * 600}]), server.text("word " * 600)):
        assert answer.status == 400 and re.search(r"^The prompt of 6\d\d tokens does not fit the context of 512\.$", answer.error)
        assert answer.json["error"]["code"] == "context_length_exceeded"
    long = server.text("a" * 90_000)  # one word, for the tokenizer
    assert long.status == 400 and "does not fit" in long.error


@pytest.mark.parametrize(
    "prompt, words",
    [
        (["a", "b"], "A request has one prompt"),
        ([10**6], "The model has tokens 0 to"),
        ([[1, 2]], "prompt: Input should be a text, or one list of texts or of tokens."),
        (5, "prompt: Input should be a text, or one list of texts or of tokens."),
        ([1, "a"], "prompt.1: Input should be a valid integer."),
        (["a", 1], "prompt.1: Input should be a valid string."),
        ([True], "prompt.0: Input should be a valid integer."),
        ([1.5], "prompt.0: Input should be a valid integer."),
    ],
)
def test_prompts_that_are_none(server: Served, prompt: Any, words: str) -> None:
    answer = server.text(prompt)
    assert answer.status == 400 and answer.error.startswith(words)


def test_parameters_that_go_with_others_are_taken_with_them(server: Served) -> None:
    null: dict[str, Any] = {"stream_options": None, "top_logprobs": 0, "max_tokens": 2, "max_completion_tokens": 2}
    assert server.chat(**null).status == server.chat(max_tokens=1, logprobs=True, top_logprobs=2).status == 200
    assert server.text(stream_options={"include_usage": True}).status == 400


def test_an_empty_prompt_begins_a_text(server: Served, llm: Llama) -> None:
    answer = server.text("", max_tokens=2)
    assert answer.status == (400 if llm.token_bos() < 0 else 200)


def test_other_models_paths_and_methods(server: Served) -> None:
    answer = server.chat(model="gpt-4o")
    assert (answer.status, answer.error) == (404, f"There is no model 'gpt-4o' here; there is '{MODEL}'.")
    assert server.ask("/v1/embeddings", {"input": "x"}).error == "This server has no '/v1/embeddings'."
    get = server.ask("/v1/chat/completions")
    assert (get.status, get.headers["allow"]) == (405, "POST") and "GET" in get.error
    assert server.ask("/v1/chat/completions", b"{}", Content_Type="text/plain").status == 415


def test_a_body_that_is_too_large_is_refused(server: Served) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 100_000}]}).encode()
    answer = server.ask("/v1/chat/completions", body)
    assert answer.status == 413 and answer.error.startswith("The request has more than 100000 bytes;")
    assert server.ask("/v1/chat/completions", body * 200).status == 413, "a client that sends all of it hears why"
    chunks = (b"x" * 50_000 for _ in range(3))
    import http.client

    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
        connection.request("POST", "/v1/completions", chunks, {"Content-Type": "application/json"}, encode_chunked=True)
        assert connection.getresponse().status == 413


def test_names_of_other_sites_are_refused(server: Served) -> None:
    for name in ("evil.example", "evil.example:8080", "", "[", "127.0.0.1.evil.example"):
        answer = server.ask("/v1/models", Host=name)
        assert answer.status in (400, 403) and (answer.status == 400 or answer.error.startswith("This server is not called"))
    for name in ("localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:80"):
        assert server.ask("/v1/models", Host=name).status == 200


def test_a_client_without_a_name_for_the_server_is_no_browser(server: Served) -> None:
    for path, host, status in (
        ("/health", b"", b"200"),
        ("/v1/models", b"", b"200"),
        ("/health", b"Host: evil.example\r\n", b"403"),
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(b"GET " + path.encode() + b" HTTP/1.0\r\n" + host + b"\r\n")
            assert connection.recv(1000).split()[1] == status


def test_a_key_opens_all_but_the_page_and_the_health(llm: Llama) -> None:
    with served.serving(llm, key="s3cret") as server:
        for path in ("/v1/models", "/metrics", "/nowhere", "/v1/chat/completions"):
            body = {"messages": HELLO, "max_tokens": 1} if "chat" in path else None
            answer = server.ask(path, body)
            assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.error == "An API key is needed: send it as `Authorization: Bearer KEY`."
            for wrong in ("Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "s3cret", "Bearer sch\xf6n"):
                assert server.ask(path, body, Authorization=wrong).error == "The API key is wrong."
            right = server.ask(path, body, Authorization="bearer s3cret", Host="phone.example")
            assert right.status == (404 if path == "/nowhere" else 200)
        assert server.ask("/").status == server.ask("/health").status == 200


def test_a_model_without_a_template_continues_texts(tmp_path: Path) -> None:
    path = tiny_models.write("qwen3moe", tmp_path / "tiny.gguf")
    with contextlib.closing(Llama(str(path), n_ctx=64, **SETTINGS)) as llm, served.serving(llm) as server:
        answer = server.chat()
        assert answer.status == 400 and answer.error.startswith("The model's file has no chat template;")
        assert server.text([5, 6, 7], max_tokens=3).json["usage"]["total_tokens"] <= 6


# ---- the page -------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(server: Served) -> None:
    answer = server.ask("/")
    page = answer.body.decode()
    assert (
        answer.headers["content-type"].startswith("text/html")
        and "connect-src 'self'" in answer.headers["content-security-policy"]
    )
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|@import|innerHTML", page), "no other resource, and text stays text"
    ids = set(re.findall(r'\bid="(\w+)"', page))
    assert set(re.findall(r'\bat\("(\w+)"\)', page)) <= ids and "prefers-color-scheme: dark" in page


# ---- the command ----------------------------------------------------------------------------------


@contextlib.contextmanager
def command(*arguments: object, **env: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """(the process, its port) when it listens."""
    words = [
        sys.executable,
        "-m",
        "cacheroute",
        "serve",
        "--port",
        "0",
        "-c",
        "256",
        "-t",
        "1",
        "--budget",
        "50%",
        *map(str, arguments),
    ]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(words, env={**os.environ, **env}, **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.stderr
            said = ""
            while not (found := re.search(r"listening on http://127\.0\.0\.1:(\d+) ", said)):
                line = process.stderr.readline()
                assert line, said
                said += line
            process.said = said
            yield process, int(found[1])
        finally:
            process.kill()


@pytest.mark.parametrize("number, code, last", [(signal.SIGINT, 130, "cacheroute: Stopped."), (signal.SIGTERM, 0, "")])
def test_a_signal_ends_the_server_and_its_answer(demo_model: Path, number: int, code: int, last: str) -> None:
    with command("--flash-mbps", "1", "--routing", "cache-prior:lambda=0.1") as (process, port):
        assert "cache-prior:lambda=0.1 is lossy" in process.said and "\ndemo: listening on" in process.said
        asked = Served.begin(type("At", (), {"port": port})(), "/v1/completions", {"prompt": "word " * 200, "stream": True})
        with contextlib.closing(asked):
            assert asked.recv(15) == b"HTTP/1.1 200 OK"
            process.send_signal(number)
            rest = b""
            while more := asked.recv(65536):
                rest += more
        assert b'"code":"stopping"' in rest
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors.strip()) == (code, last)


def test_options_of_the_command_are_its_limits(demo_model: Path) -> None:
    with command("--alias", "a", "--queue", 0, "--timeout", 2, "--max-body", 1, "--flash-mbps", 0.01, "-v") as (process, port):
        at = Served(None, None, port)  # type: ignore[arg-type]
        assert [m["id"] for m in at.ask("/v1/models").json["data"]] == ["a"]
        assert at.ask("/v1/completions", {"prompt": "x" * 1_100_000}).status == 413
        with contextlib.closing(at.begin("/v1/completions", {"prompt": "word " * 200, "stream": True})) as first:
            assert first.recv(15) == b"HTTP/1.1 200 OK"
            assert at.ask("/v1/completions", {"prompt": "word"}).status == 429
            rest = b""
            while b'"code":"timeout"' not in rest:
                more = first.recv(65536)
                assert more, rest
                rest += more
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
    assert "/v1/models" in said and "413" in said and "429" in said


def test_a_model_has_the_name_of_its_file() -> None:
    assert _name(None) == "demo" and _name("qwen3-30b-a3b") == "qwen3-30b-a3b"
    assert [_name(text) for text in ("/d/x.gguf", "x.GGUF", r"c:\d\x.gguf")] == ["x"] * 3


def test_settings_that_cannot_be(server: Served) -> None:
    wrong = {
        ("--port", str(server.port)): f"Port {server.port} of 127.0.0.1 cannot be used (",
        ("--host", "no.such.host.invalid"): "Port 8080 of no.such.host.invalid cannot be used (",
        ("--host", "127.0..1"): "Port 8080 of 127.0..1 cannot be used (no name of a host)",
        ("--api-key", "a b"): "without spaces",
        ("--api-key", ""): "for no key leave it out",
    }
    for words, reason in wrong.items():
        done = invoke("serve", *words)
        assert done.exit_code == 2 and reason in done.output and len(done.output.splitlines()) == 1, done.output


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cacheroute.serve.server")
    monkeypatch.delattr("cacheroute.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = invoke("serve")
    assert done.exit_code == 1
    assert done.output.startswith(
        f"cacheroute: `cacheroute serve` needs uvicorn; run `{sys.executable} -m pip install starlette uvicorn "
    )
