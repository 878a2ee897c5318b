"""The OpenAI API and the page over one model: routes, keys, limits, streams. Computes nothing: the worker does.

On Starlette and not on llama-cpp-python's own server, since that one loads the stock model class from settings of its own, waits
behind a lock without a limit, keeps on computing a prompt or an unstreamed answer for a client that has left, takes any model's
name for its own, needs the scores of the whole context in memory for logprobs, and shows a client the text of every exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cacheroute.serve import metrics, prompts, requests, responses
from cacheroute.serve.failures import ApiError, failed
from cacheroute.serve.prompts import Task
from cacheroute.serve.responses import Answer
from cacheroute.serve.worker import Job, Piece, Report, Worker

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

_T = TypeVar("_T")
_OPEN = ("/", "/health")  # without a key
_SECONDS_OF_A_BODY = 60.0
_SECONDS_BETWEEN_SIGNS = 10.0  # of life in a stream, while there is no text
_MAX_DISCARDED = 64 * 1024 * 1024  # bytes of a body that is too large, so that its client hears why
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Limits:
    """`body`: bytes of a request; `seconds`: it may take, waiting included; `waiting`: requests that may wait."""

    body: int
    seconds: float
    waiting: int


@dataclass(frozen=True)
class Access:
    """`key` "": none is asked for, and then `hosts` are the names by which the server may be called, None: any.

    A page of the internet that has its name resolved to 127.0.0.1 is thus refused. A request without a name is from no browser.
    """

    key: str = ""
    hosts: tuple[str, ...] | None = None

    def check(self, request: Request) -> None:
        """Raises ApiError for a request that may not be answered."""
        if self.key:
            given = request.headers.get("authorization", "")
            scheme, _, key = given.partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.key.encode()):
                what = "The API key is wrong." if given else "An API key is needed: send it as `Authorization: Bearer KEY`."
                raise ApiError(401, what, code="invalid_api_key")
        elif (
            self.hosts is not None
            and "host" in request.headers
            and (name := _host_name(request.headers["host"])) not in self.hosts
        ):
            raise ApiError(403, f"This server is not called {name!r}; with --api-key it answers to any name.", code="wrong_host")


def _host_name(host: str) -> str:
    return host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0].lower()


class Api:
    """Routes over a worker. `model`: the name by which clients ask for it; `fault` is told of what nobody has foreseen, `line` of
    each request that was answered."""

    def __init__(
        self,
        llm: Llama,
        worker: Worker,
        counted: metrics.Metrics,
        model: str,
        limits: Limits,
        access: Access,
        *,
        fault: Callable[[Exception], None],
        line: Callable[[str], None],
    ) -> None:
        self._llm, self._worker, self._metrics = llm, worker, counted
        self._model, self._limits, self._access = model, limits, access
        self._fault, self._line = fault, line
        self._page = files("cacheroute").joinpath("serve/page.html").read_bytes()
        self._one_prepares = asyncio.Lock()
        self._paths = ["/", "/health", "/metrics", "/v1/models", "/v1/models/{name:path}"]
        self._paths += ["/v1/chat/completions", "/v1/completions"]

    def app(self) -> ASGIApp:
        """For an ASGI server."""
        ends = (self._show_page, self._health, self._show_metrics, self._models, self._one_model, self._chat, self._text)
        routes = [
            Route(path, end, methods=["POST"] if path.endswith("completions") else ["GET"])
            for path, end in zip(self._paths, ends, strict=True)
        ]
        handlers = {ApiError: _shown, HTTPException: _shown_http, ClientDisconnect: _shown_gone, Exception: _shown_fault}
        return _Gate(self, Starlette(routes=routes, exception_handlers=handlers))

    # ---- what can be asked

    async def _show_page(self, _: Request) -> Response:
        return Response(self._page, media_type="text/html", headers=_PAGE_HEADERS)

    async def _health(self, _: Request) -> Response:
        worker = self._worker
        state = {"status": "stopping" if worker.stopping else "ok", "model": self._model}
        return JSONResponse(state | {"running": int(worker.running), "waiting": worker.waiting}, 503 if worker.stopping else 200)

    async def _show_metrics(self, _: Request) -> Response:
        self._metrics.waiting.set(self._worker.waiting)
        self._metrics.running.set(self._worker.running)
        return Response(self._metrics.text(), media_type=metrics.CONTENT_TYPE)

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def _one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_object())

    async def _chat(self, request: Request) -> Response:
        asked = requests.parse(await self._body(request), requests.ChatRequest)
        return await self._answer(request, asked, lambda: prompts.of_chat(self._llm, asked))

    async def _text(self, request: Request) -> Response:
        asked = requests.parse(await self._body(request), requests.TextRequest)
        return await self._answer(request, asked, lambda: prompts.of_text(self._llm, asked))

    # ---- how it is answered

    def _model_object(self) -> dict[str, Any]:
        meta = {"n_ctx": self._llm.n_ctx(), "n_vocab": self._llm.n_vocab()}
        return {"id": self._model, "object": "model", "created": 0, "owned_by": "cacheroute", "meta": meta}

    def _check_model(self, name: str) -> None:
        if name and name != self._model:
            raise ApiError(
                404, f"There is no model {name!r} here; there is {self._model!r}.", code="model_not_found", param="model"
            )

    async def _body(self, request: Request) -> bytes:
        """Raises ApiError for one that is no JSON by its type, too large, or too slow."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # a form of another site's page could send anything else without asking
            raise ApiError(415, "Send the request with `Content-Type: application/json`.")
        limit, length = self._limits.body, request.headers.get("content-length", "")
        too_large = ApiError(413, f"The request has more than {limit} bytes; --max-body allows more.", code="body_too_large")
        if "100-continue" in request.headers.get("expect", "").lower() and length.isdigit() and int(length) > limit:
            raise too_large
        data, n_bytes = bytearray(), 0
        try:
            with anyio.fail_after(min(_SECONDS_OF_A_BODY, self._limits.seconds)):
                async for chunk in request.stream():
                    n_bytes += len(chunk)
                    if n_bytes <= limit:
                        data += chunk
                    elif n_bytes > _MAX_DISCARDED:
                        break
        except TimeoutError:
            raise ApiError(408, "The request's body did not come in time.") from None
        if n_bytes > limit:
            raise too_large
        return bytes(data)

    async def _answer(self, request: Request, asked: requests.Asked, prepare: Callable[[], Task]) -> Response:
        """The response, whole or as a stream, which begins as soon as the request has its place in the queue."""
        self._check_model(asked.model)
        self._worker.check_room()
        async with self._one_prepares:
            job = Job(await anyio.to_thread.run_sync(prepare))
        self._worker.submit(job)
        answer = Answer(self._model, chat=isinstance(asked, requests.ChatRequest))
        if asked.stream:
            return _Stream(
                self._chunks(job, answer, with_usage=asked.stream_options.include_usage), self._worker, job, self._limits
            )
        try:
            with anyio.fail_after(self._limits.seconds):
                whole = await _unless_left(request.receive, lambda: self._whole(job, answer))
        except TimeoutError:
            raise _late(self._limits) from None
        finally:
            self._worker.close(job)
        return JSONResponse(whole)

    async def _whole(self, job: Job, answer: Answer) -> dict[str, Any]:
        texts, probabilities = [], []
        while not isinstance(event := await job.events.get(), Report):
            if isinstance(event, ApiError):
                raise event
            texts.append(event.text)
            probabilities += event.logprobs
        given = None if job.task.n_logprobs is None else probabilities
        return answer.whole("".join(texts), given, event.finish_reason, responses.usage(event))

    async def _chunks(self, job: Job, answer: Answer, *, with_usage: bool) -> AsyncIterator[dict[str, Any] | None]:
        """None: there is nothing yet."""
        for chunk in answer.begin():
            yield chunk
        while True:
            event: Piece | Report | ApiError | None = None
            with anyio.move_on_after(_SECONDS_BETWEEN_SIGNS):
                event = await job.events.get()
            if event is None:
                yield None
            elif isinstance(event, ApiError):
                raise event
            elif isinstance(event, Report):
                yield answer.end(event.finish_reason)
                if with_usage:
                    yield answer.end_usage(responses.usage(event))
                return
            else:
                yield answer.piece(event.text, None if job.task.n_logprobs is None else event.logprobs)

    # ---- around all of it

    def check(self, request: Request) -> None:
        """Raises ApiError for who may not ask."""
        if request.scope["path"] not in _OPEN or not self._access.key:
            self._access.check(request)

    def counted(self, request: Request, status: int) -> None:
        """A request was answered; paths that there are not count as one."""
        path = request.scope["path"]
        known = path if path in self._paths else "/v1/models" if path.startswith("/v1/models/") else "other"
        self._metrics.requests.labels(known, str(status)).inc()
        client = request.client.host if request.client else "?"
        self._line(f"{client} {request.method} {path} {status}")

    def unforeseen(self, error: Exception) -> None:
        """Something that is our fault."""
        self._fault(error)


class _Gate:
    """Around the routes: who may ask, what is counted, and that no exception gets out."""

    def __init__(self, api: Api, app: ASGIApp) -> None:
        self._api, self._app = api, app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, status = Request(scope), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._api.check(request)
            await self._app(scope, receive, sent)
        except ApiError as e:
            if not status:
                await _response(e)(scope, receive, sent)
        except Exception as e:  # Starlette has answered, and passes it on
            self._api.unforeseen(e)
        finally:
            self._api.counted(request, status)


class _Stream(Response):
    """Server-sent events, until they end, the time is over, or the client leaves, which closes the job."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[dict[str, Any] | None], worker: Worker, job: Job, limits: Limits) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._worker, self._job, self._limits = chunks, worker, job, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.move_on_after(self._limits.seconds) as scope_of_time, contextlib.suppress(ClientDisconnect):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await _unless_left(receive, lambda: self._send(send))
            if scope_of_time.cancelled_caught:
                with anyio.move_on_after(1):  # a client that does not read does not hear of it
                    await _event(send, _late(self._limits).body)
        finally:
            self._worker.close(self._job)
        with anyio.move_on_after(1):
            await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Send) -> None:
        try:
            async for chunk in self._chunks:
                if chunk is None:
                    await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
                else:
                    await _event(send, chunk)
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        except ApiError as e:  # too late for a status
            await _event(send, e.body)


async def _event(send: Send, content: dict[str, Any]) -> None:
    data = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def _unless_left(receive: Receive, work: Callable[[], Awaitable[_T]]) -> _T:
    """What `work` gives. Raises ClientDisconnect, after `work` was cancelled, when the client has left before."""
    done: list[_T] = []
    errors: list[Exception] = []
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            done.append(await work())
        except Exception as e:  # a group would wrap it
            errors.append(e)
        group.cancel_scope.cancel()
    if errors:
        raise errors[0]
    if not done:
        raise ClientDisconnect
    return done[0]


def _late(limits: Limits) -> ApiError:
    most = math.ceil(limits.seconds)
    return ApiError(504, f"The answer was not ready within {most} s; ask for fewer tokens.", kind="server_error", code="timeout")


def _response(error: ApiError) -> Response:
    # what is left of the body is not read; after an error that came before it was, the connection is of no use
    more = {"Connection": "close"} if error.status in (401, 403, 408, 413, 415) else {}
    return JSONResponse(error.body, error.status, headers=error.headers | more)


async def _shown(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response(error)


async def _shown_http(request: Request, error: Exception) -> Response:
    """Of the router: 404 and 405."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    what = f"This server has no {path!r}."
    if error.status_code == 405:
        what = f"{path!r} is not asked by {request.method}."
    own = ApiError(error.status_code, what, code="not_found" if error.status_code == 404 else None)
    return JSONResponse(own.body, own.status, headers=error.headers)


async def _shown_gone(_: Request, __: Exception) -> Response:
    """Nobody reads it: the client has left before its answer began. The status is nginx's."""
    return Response(status_code=499)


async def _shown_fault(_: Request, __: Exception) -> Response:
    return _response(failed())
