"""From exceptions to the one error shape."""

from __future__ import annotations

import json
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from controller.api import wire
from controller.core.model import Refused
from controller.errors import HeadgateError
from controller.ports import StoreError

_REFUSED = {"not_found": 404, "unread": 503, "busy": 409, "guard": 409, "invalid": 422}


class Failed(HeadgateError):
    """A request that the API itself answers with this status and code."""

    def __init__(self, status: int, code: str, message: str, remedy: str) -> None:
        super().__init__(message, remedy)
        self.status = status
        self.code = code


def problem(status: int, code: str, message: str, remedy: str, headers: dict[str, str] | None = None) -> Response:
    """An answer of the one error shape."""
    body = wire.ErrorAnswer(error=wire.Problem.model_construct(code=code, message=message, remedy=remedy))
    # Escaped, for a message may quote what was sent, and that need not be valid Unicode.
    return Response(json.dumps(body.model_dump(warnings=False)), status, headers, "application/json")


def answer_problems(app: FastAPI) -> None:
    """Let everything that goes wrong in this app be answered with the one error shape."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return problem(_REFUSED[error.code], error.code, error.message, error.remedy)

    @app.exception_handler(Failed)
    async def failed(_: Request, error: Failed) -> Response:
        return problem(error.status, error.code, error.message, error.remedy)

    @app.exception_handler(StoreError)
    async def store_failed(_: Request, error: StoreError) -> Response:
        return problem(507, "store_failed", error.message, error.remedy)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        texts = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        return problem(422, "invalid", "; ".join(texts), "/openapi.json describes what is expected")

    @app.exception_handler(HTTPException)
    async def unroutable(request: Request, error: HTTPException) -> Response:
        # Python 3.13 gave 413 another phrase.
        phrase = "too large" if error.status_code == 413 else HTTPStatus(error.status_code).phrase
        code = phrase.lower().replace(" ", "_")
        message = f"{request.method} {request.url.path}: {error.detail}"
        remedy = "/openapi.json of the API lists what there is"
        return problem(error.status_code, code, message, remedy, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return problem(
            500, "internal", f"{type(error).__name__}: {error}", "please report this; the daemon's log says more"
        )
