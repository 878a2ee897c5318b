"""What is wrong with a request, in OpenAI's form."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that fails: the status, one sentence, and OpenAI's `type`, `code` and `param`. `retry_after`: seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def headers(self) -> dict[str, str]:
        more = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return more | ({"Retry-After": str(self.retry_after)} if self.retry_after else {})


def stopping() -> ApiError:
    """For requests that come, wait or are answered while the server ends."""
    return ApiError(503, "The server is stopping.", kind="server_error", code="stopping", retry_after=10)


def failed() -> ApiError:
    """For what the server did not foresee; its stderr has the reason."""
    return ApiError(500, "The server failed at this request; its own output says why.", kind="server_error")
