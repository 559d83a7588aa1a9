# ruff: noqa: UP007, UP017, UP041, UP045 (Python 3.9 does not know the newer forms)
"""A small service to read, run and copy: accounts, and a client for an unreliable API.

A request passes these layers, from the outside to the inside:

    uvicorn          speaks HTTP
    RequestContext   gives the request its id and its line in the log, answers bugs
    BodyLimit        refuses a body that is too large or too slow
    TokenCheck       refuses a request without a valid token, unless its path is public
    FastAPI          finds the route, checks the input against the model of the route
    the route        uses the services and returns a model
    Services         the database, the accounts, the external client and other parts

The sections of this file; nothing is used before it is defined:

    1 Settings          what can be configured
    2 Logging           how records are written, as text or JSON
    3 Errors            what can go wrong, and the one shape of the answers
    4 Database          one method for each SQL statement
    5 External client   retries and a circuit breaker around an API that may fail
    6 Security          passwords, the login throttle, tokens
    7 Middleware        RequestContext, BodyLimit and TokenCheck
    8 Routes            models, dependencies and endpoints
    9 App               start, stop, and how the parts come together

You need not read everything. Follow a login first (`log_in`, `authenticate`,
`find_login`, `RequestContext`), then a call of the external API (`fetch`, `Circuit`,
`get`).
"""

import asyncio
import atexit
import hmac
import json
import logging
import logging.handlers
import math
import os
import queue
import re
import secrets
import sqlite3
import sys
import time
import unicodedata
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import wraps
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, TypeVar, Union, cast
from urllib.parse import quote

import aiosqlite
import anyio
import asyncpg  # type: ignore[import-untyped]
import bcrypt
import databases
import email_validator
import httpx
import jwt
import pybreaker
import pydantic
import tenacity
from databases.core import Connection
from fastapi import APIRouter, Depends, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from fastapi.utils import is_body_allowed_for_status_code
from pydantic import BaseModel, Field, JsonValue, SecretStr
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError, from_json
from pydantic_settings import BaseSettings, SettingsConfigDict
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import ParamSpec

T = TypeVar("T")
P = ParamSpec("P")

# ======================================================================================
# 1 Settings
#
# Environment variables win over the file `.env`. An empty value counts as unset.
# To add a setting, add a field here, a line to `.env.example` and a row to the README.

Seconds = Annotated[float, Field(gt=0, le=3600)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


class StartError(Exception):
    """The service cannot start. The text says why, and contains no secret."""


class Settings(BaseSettings):
    """README.md explains each setting. Raises pydantic.ValidationError."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8-sig",  # some editors write a byte order mark
        env_ignore_empty=True,
        extra="ignore",
        hide_input_in_errors=True,
    )

    environment: Literal["development", "production", "test"] = "development"
    database_url: str = "sqlite:///service.db"
    database_timeout_seconds: Seconds = 5
    jwt_secret: Optional[SecretStr] = None
    jwt_expires_seconds: int = Field(default=86400, ge=1, le=315_360_000)
    bcrypt_rounds: int = Field(default=12, ge=4, le=15)
    login_max_failures: Count = 5
    login_window_seconds: Count = 300
    max_body_bytes: int = Field(default=65536, ge=1, le=2**30)
    external_api_url: Optional[pydantic.AnyHttpUrl] = None
    external_timeout_seconds: Seconds = 2
    external_deadline_seconds: Seconds = 5
    external_attempts: int = Field(default=3, ge=1, le=20)
    breaker_fail_max: Count = 5
    breaker_reset_seconds: Seconds = 30
    log_level: Annotated[LogLevel, pydantic.BeforeValidator(str.upper)] = "INFO"
    log_format: Literal["text", "json"] = "text"

    @pydantic.field_validator("database_url")
    @classmethod
    def check_database_url(cls, value: str) -> str:
        """Refuse what `databases` would misunderstand, without showing a password."""
        is_good = re.fullmatch(r"sqlite:///[^?#]+", value) is not None
        if re.fullmatch("postgresql://[^#]+", value):
            with suppress(ValueError):
                url = databases.DatabaseURL(value)
                has_name = re.fullmatch("[^/@]+", url.database) is not None
                has_host = bool(url.hostname) and url.port != 0
                has_known_options = {"ssl", "max_size"}.issuperset(url.options)
                has_good_size = int(url.options.get("max_size", 1)) > 0
                is_good = has_host and has_name and has_known_options and has_good_size
        if not is_good:
            hint = "use sqlite:///path or postgresql://user:password@host:port/name"
            raise PydanticCustomError("database_url", hint)
        return value

    @pydantic.field_validator("jwt_secret")
    @classmethod
    def check_jwt_secret(cls, value: Optional[SecretStr]) -> Optional[SecretStr]:
        """A key must be as long as its hash (RFC 7518, 3.2), and must not be public."""
        if value is None:
            return None
        key = os.fsencode(value.get_secret_value())
        if len(key) < 32:
            hint = "use 32 bytes or more, for example: openssl rand -hex 32"
            raise PydanticCustomError("jwt_secret", hint)
        try:
            jwt.encode({}, key, algorithm="HS256")  # PyJWT knows public keys
        except jwt.InvalidKeyError:
            hint = "this is a public key or a certificate, which is no secret"
            raise PydanticCustomError("jwt_secret", hint) from None
        return value

    @pydantic.model_validator(mode="after")
    def check_production(self) -> "Settings":
        """Production must not use a secret or an API that the service made up."""
        required = {
            "JWT_SECRET": self.jwt_secret,
            "EXTERNAL_API_URL": self.external_api_url,
        }
        missing = [name for name, value in required.items() if value is None]
        if missing and self.environment == "production":
            hint = f"{', '.join(missing)}: required in production"
            raise PydanticCustomError("missing", hint)
        return self


def load_settings() -> Settings:
    """Read the settings. Raises StartError, which names the wrong variables."""
    try:
        return Settings()
    except pydantic.ValidationError as error:
        mistakes = []
        for item in error.errors():
            names = [str(name).upper() for name in item["loc"]]
            mistakes.append(": ".join([*names, item["msg"]]))
        raise StartError("; ".join(mistakes)) from None
    except (OSError, UnicodeError) as error:
        raise StartError(f".env cannot be read: {type(error).__name__}") from None


# ======================================================================================
# 2 Logging
#
# Every record goes through one queue to one thread, which writes it to stdout. Stdout
# has a reader, for example a terminal or Docker. If the reader stalls, only that thread
# waits, and the service goes on. When the queue is full, new records are dropped and
# counted. To log something, call `logger.info(...)`, or `log_event` for an event that
# has a name. At first reading, skip the classes.

logger = logging.getLogger("service")
current_request_id: ContextVar[str] = ContextVar("current_request_id", default="-")

STDOUT = 1  # the number of its file descriptor
MAX_WAITING_LINES = 10_000

# A terminal or a log reader could take these for the end of a line, or for a command.
CONTROL_NUMBERS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
CONTROL_ESCAPES = {number: f"\\x{number:02x}" for number in CONTROL_NUMBERS}


def format_time(record: logging.LogRecord) -> str:
    """Return the time in UTC, as RFC 3339 writes it."""
    moment = datetime.fromtimestamp(record.created, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object, for machines."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": format_time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": current_request_id.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """Formats a record as one line, for people. A traceback follows in indented lines.

    Control characters are escaped, so that no message can forge another record.
    """

    def format(self, record: logging.LogRecord) -> str:
        lines = [record.getMessage()]
        if record.exc_info:
            lines += self.formatException(record.exc_info).splitlines()
        text = "\n    ".join(line.translate(CONTROL_ESCAPES) for line in lines)
        request_id = current_request_id.get()
        return f"{format_time(record)} {record.levelname:7} [{request_id}] {text}"


log_queue: "queue.Queue[bytes]" = queue.Queue(MAX_WAITING_LINES)


class StdoutListener(logging.handlers.QueueListener):
    """The thread that writes. It runs until the process ends."""

    owner_pid = 0

    @classmethod
    def start_once(cls) -> None:
        """Start the thread, with an empty queue, unless this process has it already.

        A forked child has no thread. It has a copy of its parent's queue, but the
        parent writes those lines.
        """
        global log_queue
        if cls.owner_pid != os.getpid():
            cls.owner_pid = os.getpid()
            log_queue = queue.Queue(MAX_WAITING_LINES)
            cls(log_queue).start()

    def dequeue(self, block: bool) -> Any:
        """Wait a little first, so that the thread wakes up once for many lines."""
        if log_queue.empty():
            time.sleep(0.01)
        return log_queue.get(block)

    def handle(self, record: Any) -> None:
        # print() would take a lock. If the reader stalls, Python would wait for this
        # lock at its exit.
        line: bytes = record
        while line:
            try:
                line = line[os.write(STDOUT, line) :]
            except BlockingIOError:  # under some supervisors
                time.sleep(0.01)
            except OSError:  # the reader has gone away
                return


def wait_until_log_is_written() -> None:
    """Wait for the lines so far, but no longer than a second.

    SIGTERM ends the process at once after the lifespan, so the log may lack the last
    two lines of uvicorn.
    """
    deadline = time.monotonic() + 1
    while log_queue.unfinished_tasks and time.monotonic() < deadline:
        time.sleep(0.002)


atexit.register(wait_until_log_is_written)


class LogQueueHandler(logging.handlers.QueueHandler):
    """Hands a record as a finished line to the thread that writes. It never waits."""

    dropped = 0

    def prepare(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode("utf-8", "backslashreplace")

    def enqueue(self, record: Any) -> None:
        """`record` is the line that `prepare` has returned."""
        StdoutListener.start_once()
        try:
            log_queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def emit(self, record: logging.LogRecord) -> None:
        if self.dropped and not log_queue.full():
            count = self.dropped
            self.dropped = 0
            self.report(f"{count} log records were dropped, because nobody read stdout")
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """A log call with wrong arguments must not harm the request that made it."""
        self.report(f"a log call is wrong: {record.pathname}, line {record.lineno}")

    def report(self, message: str) -> None:
        values = {"name": logger.name, "levelname": "WARNING", "msg": message}
        self.handle(logging.makeLogRecord(values))


def configure_logging(settings: Settings) -> None:
    """Send the records of the service, of uvicorn and of all libraries to one handler.

    Libraries log from WARNING on, because some show the values of SQL at DEBUG.
    """
    is_json = settings.log_format == "json"
    handler = LogQueueHandler(log_queue)
    handler.setFormatter(JsonFormatter() if is_json else TextFormatter())
    root = logging.getLogger()
    others = [old for old in root.handlers if not isinstance(old, LogQueueHandler)]
    root.handlers = [*others, handler]
    root.setLevel(logging.WARNING)
    for name in ("service", "uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
        logging.getLogger(name).setLevel(settings.log_level)
    access_log = logging.getLogger("uvicorn.access")
    access_log.handlers = []
    access_log.propagate = False  # RequestContext logs the requests


def log_event(
    event: str,
    user_id: Optional[str] = None,
    detail: str = "",
    level: int = logging.INFO,
) -> None:
    """Log a stable word for programs, the user concerned, and no secrets."""
    words = [word for word in (event, user_id, detail) if word]
    fields = {"event": event, "user_id": user_id}
    logger.log(level, " ".join(words), extra={"fields": fields})


# ======================================================================================
# 3 Errors
#
#     ServiceError              an error that the client is told about
#         AuthError             who is asking, and may they?
#         ValidationError       the request does not have the right form
#         ExternalServiceError  the external API failed
#
# To report an error, raise a ServiceError with one of the codes in ERRORS. The function
# problem_response builds the answer, in the shape of RFC 9457. The handlers of this
# section send it for routes, and RequestContext sends it for middleware and for bugs.
# To add an error, add a line to ERRORS, raise it, and name its code in the
# `responses=problems(...)` of the route.

PROBLEM_JSON = "application/problem+json"
METHODS = ("DELETE", "GET", "OPTIONS", "PATCH", "POST", "PUT")
UNREADABLE_BODY = "There was an error parsing the body"  # as FastAPI says

# Each code has a status, and a text that tells people what to do next.
ERRORS = {
    "not_authenticated": (401, "Log in and send Authorization: Bearer <token>."),
    "invalid_token": (401, "The token is not valid, or no longer valid. Log in again."),
    "expired_token": (401, "The token has expired. Log in again."),
    "invalid_credentials": (401, "The email or the password is wrong."),
    "wrong_password": (403, "The current password is wrong. Nothing changed."),
    "not_found": (404, "There is nothing at this path. See /docs."),
    "method_not_allowed": (405, "The Allow header names the possible methods."),
    "request_timeout": (408, "The body did not arrive in time. Send it again."),
    "email_taken": (409, "This email already has an account. Log in instead."),
    "body_too_large": (413, "The body is too large."),
    "invalid_request": (422, "The request is not valid. See errors."),
    "too_many_attempts": (429, "Too many failed logins. See Retry-After."),
    "internal_error": (500, "This is a bug. Quote the request id to report it."),
    "external_service_error": (502, "The external service failed. Try again later."),
    "circuit_open": (503, "The external service keeps failing. See Retry-After."),
    "database_unavailable": (
        503,
        "The database cannot answer. A change may have been made or not.",
    ),
    "overloaded": (503, "Too many passwords wait to be checked. Try again."),
    "external_timeout": (504, "The external service did not answer in time."),
}

# Starlette takes Python's phrase as the detail of an HTTPException without a detail.
PHRASES = {status.value: status.phrase for status in HTTPStatus}
TITLES = {  # the phrases of RFC 9110; Python knows these four since 3.13 only
    **PHRASES,
    413: "Content Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}


class FieldError(BaseModel):
    """One mistake in a request."""

    loc: list[Union[int, str]] = Field(description="Where: the path to the field.")
    msg: str = Field(description="What is wrong, for people.")
    type: str = Field(description="What is wrong, for programs.")


def leave_out_default(schema: dict[str, Any]) -> None:
    """Remove the default null: the service leaves out the field instead."""
    schema.pop("default")


class Problem(BaseModel):
    """The body of every error (RFC 9457)."""

    type: str = Field(description="Always about:blank. Programs read `code`.")
    title: str = Field(description="The phrase of the status.")
    status: int
    detail: str = Field(description="What to do next, for people.")
    code: str = Field(description="A stable word, for programs.")
    request_id: str = Field(description="The same as in X-Request-ID and in the log.")
    errors: Union[list[FieldError], SkipJsonSchema[None]] = Field(
        default=None,
        description="Present only with 422.",
        json_schema_extra=leave_out_default,
    )


class ServiceError(Exception):
    """An error that the client is told about.

    `code` is a key of ERRORS. `detail` replaces the text that stands there.
    `retry_after` (seconds) is for the statuses 429 and 503. `errors` must not repeat
    the input.
    """

    def __init__(
        self,
        code: str,
        detail: Optional[str] = None,
        retry_after: Optional[int] = None,
        errors: Optional[list[FieldError]] = None,
    ) -> None:
        super().__init__(code)
        status, text = ERRORS[code]
        self.code = code
        self.status = status
        self.detail = detail or text
        self.errors = errors
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, retry_after))
        if code in ("invalid_token", "expired_token"):  # see RFC 6750, 3
            challenge = 'Bearer realm="service", error="invalid_token"'
            self.headers["WWW-Authenticate"] = challenge


class AuthError(ServiceError):
    """The client has not shown who it is, or it may not do this."""


class ValidationError(ServiceError):
    """The request does not have the right form."""


class ExternalServiceError(ServiceError):
    """The external API failed, or is not called because it keeps failing."""


def problem_response(error: ServiceError) -> Response:
    problem = Problem(
        type="about:blank",
        title=TITLES.get(error.status, "Error"),
        status=error.status,
        detail=error.detail,
        code=error.code,
        request_id=current_request_id.get(),
        errors=error.errors,
    )
    body = problem.model_dump_json(exclude_none=True)
    response = Response(body, error.status, error.headers, PROBLEM_JSON)
    if error.status == 401:
        response.headers.setdefault("WWW-Authenticate", 'Bearer realm="service"')
    if error.status in (429, 503):
        response.headers.setdefault("Retry-After", "1")
    return response


def has_route(scope: Scope, method: str) -> bool:
    """Whether a route has the path of the request, with this method."""
    asked = {**scope, "method": method}
    routes: list[BaseRoute] = scope["app"].routes
    return any(route.matches(asked)[0] is Match.FULL for route in routes)


async def handle_service_error(request: Request, error: ServiceError) -> Response:
    return problem_response(error)


async def handle_validation_error(
    request: Request, error: RequestValidationError
) -> Response:
    """Say where the request is wrong. FastAPI's own answer would repeat the input."""
    mistakes = [
        FieldError(loc=list(item["loc"]), msg=item["msg"], type=item["type"])
        for item in error.errors()
    ]
    content_type = request.headers.get("content-type", "").lower()
    if mistakes[0].loc == ["body"] and "json" not in content_type:
        mistakes[0].msg = "Send JSON, with the header Content-Type: application/json."
    return problem_response(ValidationError("invalid_request", errors=mistakes))


async def handle_http_exception(request: Request, error: HTTPException) -> Response:
    """Answer what FastAPI raises (404, 405), and what a route raises as HTTPException.

    Status, detail (as a text) and headers stay. The code comes from the status: 403 is
    `forbidden`. Without a detail, the title is the detail.
    """
    if error.detail == UNREADABLE_BODY:
        mistake = FieldError(loc=["body"], msg="This is not JSON.", type="json_invalid")
        return problem_response(ValidationError("invalid_request", errors=[mistake]))
    if not is_body_allowed_for_status_code(error.status_code):
        return Response(status_code=error.status_code, headers=error.headers)
    title = TITLES.get(error.status_code, "Error")
    code = re.sub("[^a-z]+", "_", title.lower())
    detail = str(error.detail)
    if detail in ("", PHRASES.get(error.status_code)):  # nobody wrote a detail
        detail = ERRORS[code][1] if error.status_code in (404, 405) else title
    answer = ServiceError("internal_error", detail)  # any code: the next line sets it
    answer.code = code
    answer.status = error.status_code
    answer.headers = dict(error.headers or {})
    return problem_response(answer)


async def handle_wrong_method(request: Request, error: HTTPException) -> Response:
    """Name the methods of all routes with this path. FastAPI names those of one."""
    response = await handle_http_exception(request, error)
    if not has_route(request.scope, request.method):  # otherwise a route has raised it
        methods = [name for name in METHODS if has_route(request.scope, name)]
        # RequestContext adds HEAD to every GET.
        response.headers["Allow"] = ", ".join(methods).replace("GET", "GET, HEAD")
    return response


def problems(*codes: str) -> dict[Union[int, str], dict[str, Any]]:
    """Return the `responses=` of a route: for openapi.json, an example of each error.

    Every route can also give `internal_error`, so you need not name it.
    """
    responses: dict[Union[int, str], dict[str, Any]] = {}
    mistake = FieldError(loc=["body", "email"], msg="Field required", type="missing")
    for code in (*codes, "internal_error"):
        error = ServiceError(code)
        if code == "invalid_request":
            error.errors = [mistake]
        schema = {"$ref": "#/components/schemas/Problem"}
        content = {PROBLEM_JSON: {"schema": schema, "examples": {}}}
        entry = {"description": TITLES[error.status], "content": content}
        examples = responses.setdefault(error.status, entry)["content"][PROBLEM_JSON]
        example = json.loads(bytes(problem_response(error).body))
        examples["examples"][code] = {"summary": error.detail, "value": example}
    return responses


# ======================================================================================
# 4 Database
#
# Raw SQL through `databases`: one method for each statement, with typed arguments and a
# typed result. No transaction spans two statements, and constraints enforce the rules.
# To add a statement, copy `find_login` (a row) or `insert_user` (a write). For many
# rows, use `fetch_all`. The SQL of a write names its values (:email). The SQL of a read
# numbers them ($1), because a read asks the driver directly, which costs much less.
#
# SQLite has two connections, one for reads and one for writes, so that reads go on
# while a write waits for a lock. (In memory, it has one.) PostgreSQL has a pool. At
# first reading, skip what follows the class Database: migrations, and how a database
# is opened.

SCHEMA = Path(__file__).with_name("schema.sql")
ALL_ADDRESSES = "*"  # the row that counts the attempts from everywhere

# With these texts, SQLite says that it cannot be used now. Any other text means that
# our SQL is wrong.
SQLITE_IS_UNAVAILABLE = {
    "attempt to write a readonly database",
    "database disk image is malformed",
    "database is locked",
    "database or disk is full",
    "disk I/O error",
    "file is not a database",
    "interrupted",
    "locking protocol",
    "unable to open database file",
}
# These errors of PostgreSQL, and DataError, mean that our SQL is wrong.
POSTGRES_SQL_ERRORS = (
    asyncpg.SyntaxOrAccessError,
    asyncpg.IntegrityConstraintViolationError,
)
DRIVER_ERRORS = (
    sqlite3.Error,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncio.TimeoutError,
    OSError,
)

# `async with borrow() as connection` lends a connection, and waits for it if necessary.
Borrow = Callable[[], AbstractAsyncContextManager[Connection]]
RunStatement = Callable[[Connection], Awaitable[T]]
RowType = Callable[..., T]  # makes a row from its columns, for example User
AnyRow = dict[str, Any]  # for a row that needs no type of its own


class SqlError(Exception):
    """A statement is wrong, or violates a constraint: a bug."""


@dataclass(frozen=True)
class User:
    """An account, as each request with a token looks it up."""

    id: str
    email: str
    token_version: int  # tokens with another version are no longer valid
    created_at: str  # RFC 3339, UTC


@dataclass(frozen=True)
class Login:
    """The columns that a login needs."""

    user_id: str
    password_hash: str
    token_version: int


@dataclass(frozen=True)
class Attempts:
    """How many logins have been tried in a window of time."""

    attempts: int
    window_ends_at: int  # seconds since 1970


def first_line(error: Exception) -> str:
    """Leave out the other lines, because those of PostgreSQL can quote a row."""
    return str(error).partition("\n")[0]


def find_sql_error(error: Exception) -> Optional[str]:
    """Return what is wrong with our SQL, or None if the database cannot be used now."""
    if isinstance(error, sqlite3.Error) and str(error) not in SQLITE_IS_UNAVAILABLE:
        return f"{type(error).__name__}: {error}"
    if isinstance(error, POSTGRES_SQL_ERRORS):
        return f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, asyncpg.DataError):
        return type(error).__name__  # even the first line quotes the value
    return None


def retrieve_result(task: "asyncio.Task[T]") -> None:
    """Read the result of a task, because asyncio logs an error that nobody reads."""
    if not task.cancelled():
        task.exception()


async def interrupt_sqlite(connection: Connection) -> None:
    """End the statement that SQLite still runs, so that the next one can begin."""
    await connection.raw_connection.interrupt()


async def read_rows(
    connection: Connection, sql: str, values: Sequence[object]
) -> list[dict[str, Any]]:
    """Return all rows. Both drivers know $1 for the first value, $2 for the second.

    On SQLite, this takes one trip to its thread. `databases` would take three, and an
    open cursor between them would hide new writes from other reads.
    """
    driver = connection.raw_connection
    if isinstance(driver, aiosqlite.Connection):
        numbered = {str(number): value for number, value in enumerate(values, 1)}
        return [dict(row) for row in await driver.execute_fetchall(sql, numbered)]
    return [dict(row) for row in await driver.fetch(sql, *values)]


class Database:
    """The statements of the service.

    Each of them raises ServiceError `database_unavailable` if the database is locked,
    full, unreachable or too slow, and SqlError if the statement itself is wrong.
    """

    def __init__(
        self,
        reader: Borrow,
        writer: Borrow,
        timeout: float,
        discard: Callable[[Connection], Awaitable[None]] = interrupt_sqlite,
    ) -> None:
        """`timeout` is in seconds, all waits included.

        `discard` gets a connection that did not answer in time, or that has become
        read-only.
        """
        self.reader = reader
        self.writer = writer
        self.timeout = timeout
        self.discard = discard

    async def run_in_time(self, borrow: Borrow, statement: RunStatement[T]) -> T:
        """Run a statement. Raises asyncio.TimeoutError and the errors of the drivers.

        The statement runs in a task of its own. When the time is over, we do not wait
        for its end: a frozen PostgreSQL does not even answer a cancellation.
        """
        connection: Optional[Connection] = None

        async def borrow_and_run() -> T:
            nonlocal connection
            async with borrow() as connection:
                try:
                    return await statement(connection)
                except asyncpg.ReadOnlySQLTransactionError:  # it is a replica now
                    await self.discard(connection)
                    raise

        task = asyncio.create_task(borrow_and_run())
        task.add_done_callback(retrieve_result)
        await asyncio.wait({task}, timeout=self.timeout)
        if task.done():
            return task.result()
        if connection is None:
            task.cancel()  # it still waits for a connection, so nothing has been done
        else:
            await self.discard(connection)
        raise asyncio.TimeoutError

    async def run(self, borrow: Borrow, statement: RunStatement[T]) -> T:
        """Run a statement. Raises ServiceError and SqlError.

        They are raised outside of `except`. Otherwise their tracebacks would show the
        driver's text, which may quote a row.
        """
        try:
            return await self.run_in_time(borrow, statement)
        except DRIVER_ERRORS as error:
            kind = type(error).__name__
            sql_error = find_sql_error(error)
        if sql_error:
            raise SqlError(sql_error)
        logger.warning("database_unavailable: %s", kind)
        raise ServiceError("database_unavailable")

    async def fetch_all(
        self, row_type: RowType[T], sql: str, *values: object
    ) -> list[T]:
        """Read all rows. Their columns have the names of the row type's fields."""
        rows = await self.run(self.reader, lambda c: read_rows(c, sql, values))
        return [row_type(**row) for row in rows]

    async def fetch_one(
        self, row_type: RowType[T], sql: str, *values: object
    ) -> Optional[T]:
        """Read the only row, or None."""
        rows = await self.fetch_all(row_type, sql, *values)
        return rows[0] if rows else None

    async def write(
        self, row_type: RowType[T], sql: str, /, **values: object
    ) -> Optional[T]:
        """Write, and return the row that RETURNING gives, if any."""
        record = await self.run(self.writer, lambda c: c.fetch_one(sql, values))
        return row_type(**record._mapping) if record else None

    async def insert_user(self, email: str, password_hash: str) -> Optional[User]:
        """Return None if the email is taken. The constraint decides, not a look-up."""
        sql = """
            INSERT INTO users (id, email, password_hash, created_at)
            VALUES (:id, :email, :password_hash, :created_at)
            ON CONFLICT (email) DO NOTHING
            RETURNING id, email, token_version, created_at"""
        return await self.write(
            User,
            sql,
            id=str(uuid.uuid4()),
            email=email,
            password_hash=password_hash,
            created_at=datetime.now(timezone.utc).isoformat(),
        )

    async def find_login(self, email: str) -> Optional[Login]:
        sql = """
            SELECT id AS user_id, password_hash, token_version
            FROM users WHERE email = $1"""
        return await self.fetch_one(Login, sql, email)

    async def find_user(self, user_id: str) -> Optional[User]:
        """Find the user of a token."""
        sql = "SELECT id, email, token_version, created_at FROM users WHERE id = $1"
        return await self.fetch_one(User, sql, user_id)

    async def renew_hash(self, login: Login, new_hash: str) -> None:
        """Store another hash of the same password, if `login` is still up to date."""
        sql = """
            UPDATE users SET password_hash = :new_hash
            WHERE id = :user_id AND token_version = :token_version"""
        await self.write(
            AnyRow,
            sql,
            new_hash=new_hash,
            user_id=login.user_id,
            token_version=login.token_version,
        )

    async def change_password(self, user: User, new_hash: str) -> bool:
        """Store a new password and end all sessions.

        Return False if another request has ended the session of `user` meanwhile.
        """
        sql = """
            UPDATE users
            SET password_hash = :new_hash, token_version = token_version + 1
            WHERE id = :user_id AND token_version = :token_version
            RETURNING id"""
        row = await self.write(
            AnyRow,
            sql,
            new_hash=new_hash,
            user_id=user.id,
            token_version=user.token_version,
        )
        return row is not None

    async def end_sessions(self, user_id: str) -> None:
        """Invalidate every token that the user has got until now."""
        sql = "UPDATE users SET token_version = token_version + 1 WHERE id = :user_id"
        await self.write(AnyRow, sql, user_id=user_id)

    async def count_attempt(
        self, email: str, address: str, now: int, window_ends_at: int
    ) -> Attempts:
        """Count one attempt in the current window, or begin a new window with it."""
        sql = """
            INSERT INTO login_attempts AS old (email, address, attempts, window_ends_at)
            VALUES (:email, :address, 1, :window_ends_at)
            ON CONFLICT (email, address) DO UPDATE SET
                attempts = CASE WHEN old.window_ends_at > :now
                    THEN old.attempts + 1 ELSE 1 END,
                window_ends_at = CASE WHEN old.window_ends_at > :now
                    THEN old.window_ends_at ELSE excluded.window_ends_at END
            RETURNING attempts, window_ends_at"""
        row = await self.write(
            Attempts,
            sql,
            email=email,
            address=address,
            now=now,
            window_ends_at=window_ends_at,
        )
        return cast(Attempts, row)  # the statement always returns a row

    async def forgive_attempts(self, email: str, address: str) -> None:
        """Clear the attempts from the address, and take one back from the total."""
        sql = """
            UPDATE login_attempts
            SET attempts = CASE WHEN address = :total THEN attempts - 1 ELSE 0 END
            WHERE email = :email AND address IN (:address, :total) AND attempts > 0"""
        await self.write(AnyRow, sql, email=email, address=address, total=ALL_ADDRESSES)

    async def delete_ended_windows(self, now: int) -> None:
        sql = "DELETE FROM login_attempts WHERE window_ends_at <= :now"
        await self.write(AnyRow, sql, now=now)

    async def keep_secret(self, name: str, value: str) -> str:
        """Store the value unless there is one. Return the one that is stored."""
        sql = """
            INSERT INTO secrets (name, value) VALUES (:name, :value)
            ON CONFLICT (name) DO UPDATE SET name = excluded.name  -- to return the row
            RETURNING value"""
        row = await self.write(AnyRow, sql, name=name, value=value)
        return str(cast(AnyRow, row)["value"])

    async def ping(self) -> None:
        """Raises ServiceError unless the database answers."""
        await self.fetch_one(AnyRow, "SELECT name FROM secrets WHERE name = ''")


def read_migrations() -> list[tuple[int, str, str]]:
    """Return number, name and SQL of each section of schema.sql.

    Raises StartError if the sections are not numbered 1, 2, 3 and so on.
    """
    # A heading is "-- migration 1: users", for example. The text after it is its SQL.
    heading = re.compile(
        r"^-- *migration +(\d+)[: ]*(.*)$", re.MULTILINE | re.IGNORECASE
    )
    _, *parts = heading.split(SCHEMA.read_text("utf-8"))
    migrations = [
        (int(parts[i]), parts[i + 1], parts[i + 2]) for i in range(0, len(parts), 3)
    ]
    numbers = [number for number, _, _ in migrations]
    if numbers != list(range(1, len(numbers) + 1)):
        raise StartError(f"schema.sql: the migrations have the numbers {numbers}")
    return migrations


async def migrate(connection: Connection, begin_and_lock: str) -> None:
    """Run the sections of schema.sql that this database has not seen, in order.

    `begin_and_lock` opens a transaction and lets in one worker at a time. A section
    runs in such a transaction, together with the INSERT that marks it as done. Raises
    StartError if a section fails. Nothing of it remains then.
    """
    driver = connection.raw_connection
    is_sqlite = isinstance(driver, aiosqlite.Connection)
    run_script = driver.executescript if is_sqlite else driver.execute
    table = "schema_migrations (version BIGINT NOT NULL PRIMARY KEY)"
    await run_script(f"{begin_and_lock}; CREATE TABLE IF NOT EXISTS {table}; COMMIT")
    for number, name, script in read_migrations():
        find_mark = f"SELECT version FROM schema_migrations WHERE version = {number}"
        insert_mark = f"INSERT INTO schema_migrations (version) VALUES ({number})"
        if await connection.fetch_one(find_mark):
            continue
        try:
            await run_script(f"{begin_and_lock}; {insert_mark}; {script}\n; COMMIT")
            logger.info("schema.sql: migration %s has run: %s", number, name)
        except DRIVER_ERRORS as error:
            with suppress(*DRIVER_ERRORS):
                await driver.execute("ROLLBACK")
            if await connection.fetch_one(find_mark):
                continue  # another worker was quicker, so our mark was refused
            place = f"schema.sql, migration {number}: {name}"
            raise StartError(f"{place}: {first_line(error)}") from None


async def open_connection(
    url: databases.DatabaseURL, timeout: float, stack: AsyncExitStack
) -> Connection:
    database = databases.Database(url, timeout=timeout)  # seconds to wait for a lock
    connection = await stack.enter_async_context(database.connection())
    connection.raw_connection.row_factory = sqlite3.Row  # a row knows its columns
    return connection


def lend_to_one(connection: Connection) -> Borrow:
    """Lend a connection to SQLite to one statement at a time."""
    lock = asyncio.Lock()

    @asynccontextmanager
    async def borrow() -> AsyncIterator[Connection]:
        async with lock:
            yield connection

    return borrow


def lend_to_many(connection: Connection) -> Borrow:
    """Lend a connection to SQLite to many reads. Its thread runs them in their order.

    `interrupt_sqlite` ends the read that runs. Reads that wait behind it run later.
    """

    @asynccontextmanager
    async def borrow() -> AsyncIterator[Connection]:
        yield connection

    return borrow


async def open_sqlite(
    url: databases.DatabaseURL, timeout: float, stack: AsyncExitStack
) -> Database:
    is_in_memory = url.database == ":memory:"
    if not is_in_memory:
        Path(url.database).touch(mode=0o600)  # only its owner may read a new file
    writer = lend_to_one(await open_connection(url, timeout, stack))
    # When several workers switch to WAL at once, SQLite does not wait for the lock.
    retry_while_locked = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_message(message="database is locked"),
        wait=tenacity.wait_random(0.01, 0.1),
        stop=tenacity.stop_after_delay(timeout),
        reraise=True,
    )
    async with writer() as connection:
        await migrate(connection, "BEGIN IMMEDIATE")
        await retry_while_locked(connection.fetch_one, "PRAGMA journal_mode = WAL")
        await connection.fetch_one("PRAGMA synchronous = FULL")  # survive a power cut
        await connection.fetch_one("PRAGMA foreign_keys = ON")
    if is_in_memory:  # another connection would have another database
        return Database(writer, writer, timeout)
    reader = lend_to_many(await open_connection(url, timeout, stack))
    return Database(reader, writer, timeout)


async def skip_session_reset(connection: object) -> None:
    """Our statements leave no state in a session, so the pool need not reset it."""


async def open_postgres(
    url: databases.DatabaseURL, timeout: float, stack: AsyncExitStack
) -> Database:
    # The server ends a statement that waits for a lock after we have given it up.
    lock_timeout = {"lock_timeout": f"{math.ceil(timeout * 1000)}ms"}
    pool = databases.Database(
        url,
        min_size=0,
        timeout=timeout,
        server_settings=lock_timeout,
        reset=skip_session_reset,
    )
    await pool.connect()

    async def disconnect() -> None:
        with suppress(*DRIVER_ERRORS):  # a frozen server must not delay our exit
            await asyncio.wait_for(pool.disconnect(), timeout)

    async def discard(connection: Connection) -> None:
        """Cut the connection. Replace all others before they are used again."""
        # The connection may have returned to the pool just now.
        with suppress(AssertionError, asyncpg.InterfaceError):
            connection.raw_connection.terminate()
        backend: Any = pool._backend  # `databases` has no public way to the pool
        await backend._pool.expire_connections()

    stack.push_async_callback(disconnect)
    db = Database(pool.connection, pool.connection, timeout, discard)
    begin_and_lock = "BEGIN; SELECT pg_advisory_xact_lock(7519)"
    await db.run_in_time(db.writer, lambda c: migrate(c, begin_and_lock))
    return db


async def open_database(settings: Settings, stack: AsyncExitStack) -> Database:
    """Open and migrate the database; `stack` closes it.

    Raises StartError, with the path or the host, but without the password.
    """
    url = databases.DatabaseURL(settings.database_url)
    timeout = settings.database_timeout_seconds
    place = url.database
    try:
        if url.scheme == "sqlite":
            return await open_sqlite(url, timeout, stack)
        place = f"{url.hostname}:{url.port or 5432}/{url.database}"
        return await open_postgres(url, timeout, stack)
    except (StartError, *DRIVER_ERRORS) as error:
        reason = first_line(error) or "no answer in time"
        raise StartError(f"DATABASE_URL: cannot use {place}: {reason}") from None


# ======================================================================================
# 5 External client
#
# A call passes four layers: the retries within a deadline, the circuit, one attempt
# with a shorter timeout, and httpx. Near the deadline, an attempt gets less time. It is
# not cancelled, because the circuit ignores cancelled calls and would never open.
#
# The circuit is closed while the API works. Some failures in a row open it: no call is
# made for a while. Then it is half-open: one call, the probe, tries whether the API
# works again. Each process has its own circuit. For a second API, create another
# ExternalClient. To protect any async function, decorate it with a Circuit.

MAX_UPSTREAM_BYTES = 2**20

CircuitState = Literal["closed", "open", "half-open"]


class TransientError(ExternalServiceError):
    """The attempt failed, but another one may succeed."""

    wait_seconds = 0  # what the API asks for in Retry-After


class RejectionError(ExternalServiceError):
    """The API refused our request (4xx). So it works: this is not its failure."""


class Circuit(pybreaker.CircuitBreakerListener):
    """A circuit breaker for coroutines, on top of pybreaker.

    pybreaker counts failures and changes the state, but only for functions that do not
    await. So we await a call first, and then report how it ended. A half-open circuit
    lets only one call through. Cancelled calls do not count. Calls that began before
    the last change of the state do not count. A change of the system's clock does not
    matter.

    There is no lock, because one event loop runs all calls, and nothing is awaited
    between a look at the state and its change. Exceptions in `ignored` count as
    successes.
    """

    def __init__(
        self,
        name: str,
        fail_max: int,
        reset_seconds: float,
        ignored: Sequence[type[Exception]] = (),
    ) -> None:
        self.name = name
        self.reset_seconds = reset_seconds
        self.changed_at = 0.0  # by time.monotonic()
        self.state_changes = 0
        self.is_probing = False
        self.breaker = pybreaker.CircuitBreaker(
            fail_max, exclude=ignored, listeners=[self], throw_new_error_on_trip=False
        )

    def state_change(
        self,
        cb: pybreaker.CircuitBreaker,
        old_state: Optional[pybreaker.CircuitBreakerState],
        new_state: pybreaker.CircuitBreakerState,
    ) -> None:
        """pybreaker calls this when the state changes."""
        self.state_changes += 1
        self.changed_at = time.monotonic()
        detail = f"{self.name} {new_state.name}"
        log_event("circuit_changed", detail=detail, level=logging.WARNING)

    @property
    def state(self) -> CircuitState:
        """An open circuit stays open until a call probes."""
        return cast(CircuitState, self.breaker.current_state)

    @property
    def retry_after_seconds(self) -> int:
        """Seconds until a call may probe, rounded up. 0 unless the circuit is open."""
        seconds = self.changed_at + self.reset_seconds - time.monotonic()
        return max(0, math.ceil(seconds)) if self.state == "open" else 0

    async def call(
        self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Await the function, or raise ExternalServiceError `circuit_open` at once."""
        retry_after = self.retry_after_seconds
        if retry_after > 0 or self.is_probing:
            raise ExternalServiceError("circuit_open", retry_after=retry_after)
        if self.state == "open":
            self.breaker.half_open()
        is_probe = self.state == "half-open"
        self.is_probing = is_probe
        state_changes = self.state_changes  # as they are when the call begins
        try:
            result = await function(*args, **kwargs)
        except Exception as error:
            self.record_outcome(state_changes, error)
            raise
        else:
            self.record_outcome(state_changes, None)
            return result
        finally:
            if is_probe:
                self.is_probing = False

    def record_outcome(self, state_changes: int, error: Optional[Exception]) -> None:
        """Tell pybreaker how a call ended, unless the state has changed meanwhile."""

        def repeat_outcome() -> None:
            if error is not None:
                raise error

        if state_changes == self.state_changes:
            with suppress(Exception):  # `call` raises the error itself
                self.breaker.call(repeat_outcome)

    def __call__(
        self, function: Callable[P, Awaitable[T]]
    ) -> Callable[P, Awaitable[T]]:
        """Decorate an async function."""

        @wraps(function)
        async def protected(*args: P.args, **kwargs: P.kwargs) -> T:
            return await self.call(function, *args, **kwargs)

        return protected


class DemoUpstream:
    """An external API inside the process, so that nothing else is needed to try it."""

    is_failing = False

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = httpx.ByteStream(b'{"message": "Hello from the demo upstream."}')
        return httpx.Response(503 if self.is_failing else 200, stream=body)


def wait_before_retry(call: tenacity.RetryCallState) -> float:
    """Return the seconds that the API asks for, plus a random time ("full jitter").

    Without jitter, clients that failed together would come back together.
    """
    jitter = tenacity.wait_random_exponential(multiplier=0.1, max=1)
    error = call.outcome.exception() if call.outcome else None
    return getattr(error, "wait_seconds", 0) + jitter(call)


class ExternalClient:
    """Fetches JSON from an API that may fail, hang or send nonsense."""

    def __init__(
        self,
        name: str,
        url: str,
        settings: Settings,
        transport: Optional[httpx.AsyncBaseTransport] = None,
    ) -> None:
        """The log shows the name. `transport` can replace the network."""
        self.name = name
        self.url = url
        self.settings = settings
        self.circuit = Circuit(
            name,
            settings.breaker_fail_max,
            settings.breaker_reset_seconds,
            ignored=[RejectionError],
        )
        self.http = httpx.AsyncClient(
            transport=transport,
            trust_env=False,  # do not use the proxies of the environment
            verify=httpx.create_ssl_context(),  # but use its SSL_CERT_FILE
            timeout=None,  # `get` limits the whole attempt
            # A wait for a free connection would count as a failure of the API.
            limits=httpx.Limits(max_connections=None),
            # A cookie that one caller got must not be sent for another.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            event_hooks={"response": [self.check_status]},
        )

    async def fetch(self) -> JsonValue:
        """Return the JSON that the API sends. Raises ExternalServiceError."""
        seconds = self.settings.external_deadline_seconds
        deadline = time.monotonic() + seconds

        def is_worth_a_retry(error: BaseException) -> bool:
            return isinstance(error, TransientError) and self.circuit.state == "closed"

        # Make one for each call: it remembers the attempts.
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(is_worth_a_retry),
            wait=wait_before_retry,
            stop=tenacity.stop_after_attempt(self.settings.external_attempts)
            | tenacity.stop_before_delay(seconds),
            reraise=True,
        )
        data: JsonValue = await retrying(self.circuit.call, self.get, deadline)
        return data

    async def get(self, deadline: float) -> JsonValue:
        """Make one attempt, which ends before the deadline (by time.monotonic()).

        Raises ExternalServiceError; if the status is no success, `check_status` has
        raised it. The log gets a reason, but nothing that the API sent.
        """
        timeout = self.settings.external_timeout_seconds
        headers = {
            "Accept-Encoding": "identity",
            "X-Request-ID": current_request_id.get(),
        }
        error: ExternalServiceError
        try:
            with anyio.fail_after(min(timeout, deadline - time.monotonic())):
                stream = self.http.stream("GET", self.url, headers=headers)
                async with stream as response:
                    body = await self.read(response)
                    data: JsonValue = from_json(body, allow_inf_nan=False)
                    return data
        except TimeoutError:
            reason = "no answer in time"
            error = TransientError("external_timeout")
        except httpx.ConnectError as cause:  # the text is not the API's
            reason = f"ConnectError: {cause}"
            error = TransientError("external_service_error")
        except httpx.TransportError as cause:
            reason = type(cause).__name__
            error = TransientError("external_service_error")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as cause:
            reason = type(cause).__name__
            error = ExternalServiceError("external_service_error")
        self.log_failure(reason)
        raise error

    async def check_status(self, response: httpx.Response) -> None:
        """Raise unless the answer is a success.

        httpx calls this before it reads the address of a redirect, which may be wrong.
        """
        status = response.status_code
        if response.is_success:
            return
        self.log_failure(f"status {status}")
        if status >= 500 or status in (408, 429):
            error = TransientError("external_service_error")
            asked = response.headers.get("Retry-After", "")
            if re.fullmatch("[0-9]{1,9}", asked):
                error.wait_seconds = int(asked)
            raise error
        if status >= 400:
            raise RejectionError("external_service_error")
        raise ExternalServiceError("external_service_error")

    async def read(self, response: httpx.Response) -> bytes:
        """Return the body. Raises ValueError if it is encoded or too large."""
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise ValueError("we asked for a body without encoding")
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MAX_UPSTREAM_BYTES:
                raise ValueError("the body is too large")
        return bytes(body)

    def log_failure(self, reason: str) -> None:
        logger.warning("%s: an attempt failed: %s", self.name, reason)


# ======================================================================================
# 6 Security
#
# A bcrypt hash takes a quarter of a second, so passwords are hashed in threads. The
# throttle limits failed logins; it counts in the database, so all workers share it.
# Tokens are JWTs; a change of the user's token_version ends them early. A password
# cannot be reset: that would need a second way to reach the user.

BCRYPT_HASH = re.compile(
    r"\$2[aby]\$"  # the version
    r"(0[4-9]|1[0-5])\$"  # the cost: not above 15, because 31 would take days
    r"[./A-Za-z0-9]{21}[.Oeu]"  # the salt: its last character has two bits only
    r"[./A-Za-z0-9]{31}"  # the hash
)


class Passwords:
    """Hashes passwords in threads, without holding up other requests."""

    def __init__(self, rounds: int) -> None:
        cores = os.cpu_count() or 1
        self.rounds = rounds
        self.threads = anyio.CapacityLimiter(cores)
        self.free_places = 16 * cores  # with 12 rounds, the last one waits four seconds
        self.decoy = f"$2b${rounds:02}$" + "." * 53  # a hash that no password has

    @contextmanager
    def take_place(self) -> Iterator[None]:
        """Take a place in the queue, or raise ServiceError `overloaded`."""
        if self.free_places == 0:
            raise ServiceError("overloaded", retry_after=2)
        self.free_places -= 1
        try:
            yield
        finally:
            self.free_places += 1

    async def hash(self, password: str) -> str:
        """Raises ServiceError `overloaded`."""
        with self.take_place():
            salt = bcrypt.gensalt(self.rounds)
            return (await self.run(bcrypt.hashpw, password, salt)).decode()

    async def verify(self, password: str, stored_hash: Optional[str]) -> bool:
        """Check a password. The caller must have taken a place.

        A missing, damaged or too expensive hash takes as long as a valid one.
        """
        match = BCRYPT_HASH.fullmatch(stored_hash or "")
        known_hash = match.group() if match else self.decoy
        is_equal = await self.run(bcrypt.checkpw, password, known_hash.encode())
        return is_equal and match is not None

    async def run(
        self, function: Callable[[bytes, bytes], T], password: str, salt_or_hash: bytes
    ) -> T:
        # bcrypt reads 72 bytes at most. The digest has 64, so all characters count. Its
        # key is no secret: it separates these hashes from those of other services.
        key = b"service.py: password"
        digest = hmac.digest(key, password.encode(), "sha256").hex().encode()
        return await anyio.to_thread.run_sync(
            function, digest, salt_or_hash, limiter=self.threads
        )

    def is_outdated(self, stored_hash: str) -> bool:
        """Whether the hash has fewer rounds than we want now (ASVS 11.2.2)."""
        return int(stored_hash.split("$")[2]) < self.rounds


class Accounts:
    """Checks passwords, but no more often than the login throttle allows.

    The first attempt on an email begins a window of time. In this window, the throttle
    counts the attempts from each address, and those from all addresses together.
    """

    def __init__(self, settings: Settings, db: Database, passwords: Passwords) -> None:
        self.max_failures = settings.login_max_failures
        self.window_seconds = settings.login_window_seconds
        self.db = db
        self.passwords = passwords

    async def authenticate(
        self, email: str, password: str, address: str
    ) -> Optional[Login]:
        """Return the account, or None if the email or the password is wrong.

        An attempt counts as a failure from its start, so that many at the same time
        cannot pass the limit together. A success clears the count of its address, and
        takes itself back from the total. Raises ServiceError `too_many_attempts` or
        `overloaded`.
        """
        login = await self.db.find_login(email)
        user_id = login.user_id if login else None
        stored_hash = login.password_hash if login else None
        with self.passwords.take_place():  # before the count: overloaded is no failure
            await self.count_or_refuse(email, address, user_id)
            is_right = await self.passwords.verify(password, stored_hash)
        if login is None or not is_right:
            log_event("login_failed", user_id, level=logging.WARNING)
            return None
        await self.db.forgive_attempts(email, address)
        return login

    async def count_or_refuse(
        self, email: str, address: str, user_id: Optional[str]
    ) -> None:
        """Count an attempt. Raises ServiceError `too_many_attempts` above a limit.

        The address comes first: attempts above its limit do not count in the total.
        """
        limits = [(address, self.max_failures), (ALL_ADDRESSES, 10 * self.max_failures)]
        for source, limit in limits:
            now = int(time.time())
            ends_at = now + self.window_seconds
            counted = await self.db.count_attempt(email, source, now, ends_at)
            if counted.attempts == 1 and counted.window_ends_at == ends_at:
                # A new window has begun, so delete those that have ended.
                await self.db.delete_ended_windows(now)
            if counted.attempts > limit:
                log_event("login_throttled", user_id, level=logging.WARNING)
                seconds_left = counted.window_ends_at - now
                raise ServiceError("too_many_attempts", retry_after=seconds_left)


@dataclass(frozen=True)
class Claims:
    """The content of a token, as far as we use it."""

    user_id: str
    token_version: int


class Tokens:
    """Issues and verifies JWTs (RFC 7519), as RFC 8725 advises."""

    def __init__(self, secret: str, expires_seconds: int) -> None:
        self.secret = os.fsencode(secret)
        self.expires_seconds = expires_seconds

    def issue(self, login: Login) -> str:
        now = int(time.time())
        claims = {
            "iss": "service",
            "aud": "service",
            "sub": login.user_id,
            "iat": now,
            "exp": now + self.expires_seconds,
            "jti": secrets.token_hex(8),
            "ver": login.token_version,
        }
        return jwt.encode(claims, self.secret, algorithm="HS256")

    def verify(self, token: str) -> Claims:
        """Check everything but the user. Raises AuthError."""
        try:
            claims = jwt.decode(
                token,
                self.secret,
                algorithms=["HS256"],
                issuer="service",
                audience="service",
                leeway=2,  # seconds, because the clocks of two hosts may differ
                options={"require": ["iss", "aud", "sub", "iat", "exp", "jti", "ver"]},
            )
            return Claims(str(uuid.UUID(claims["sub"])), claims["ver"])
        except jwt.ExpiredSignatureError:
            raise AuthError("expired_token") from None
        except Exception:  # noqa: BLE001 (a bad token can even cause RecursionError)
            is_pasted_badly = re.search("[\"' ]", token)  # no JWT has one of these
            hint = "Send the access_token without quotes, and Bearer only once."
            raise AuthError(
                "invalid_token", hint if is_pasted_badly else None
            ) from None


@dataclass(frozen=True)
class Services:
    """The parts that live as long as the process. A route gets them as ServicesDep."""

    settings: Settings
    db: Database
    passwords: Passwords
    accounts: Accounts
    tokens: Tokens
    external: ExternalClient
    demo: DemoUpstream


# ======================================================================================
# 7 Middleware
#
# Plain ASGI classes with one job each, from the outside to the inside. To refuse a
# request, they raise a ServiceError, which RequestContext answers. (BaseHTTPMiddleware
# would be shorter, but takes four times as long and breaks context variables.)

BODY_SECONDS = 5  # for a whole body to arrive


def client_address(scope: Scope) -> str:
    """Return the address of the client, or "-" if there is none (on a Unix socket).

    Behind a proxy, uvicorn needs `--forwarded-allow-ips` to know the address. It does
    not check what the proxy says, so we cut the address to 64 characters.
    """
    client = scope.get("client")
    return client[0][:64] if client else "-"


def choose_request_id(headers: Headers) -> str:
    """Keep the id that the client sent, if it is safe to log."""
    sent_id = headers.get("x-request-id", "")
    is_safe = re.fullmatch(r"[A-Za-z0-9._-]{1,128}", sent_id) is not None
    return sent_id if is_safe else secrets.token_hex(16)


def asks_upgrade(scope: Scope, headers: Headers) -> bool:
    """Whether uvicorn would take the body of this request for the next request.

    HTTP/2 and HTTP/3 know no upgrade. Servers call them "2" and "3". A version "2.0"
    can only come from an HTTP/1 request with a wrong number.
    """
    asks = "upgrade" in headers or scope["method"] == "CONNECT"
    return asks and scope["http_version"] not in ("2", "3")


def log_access(scope: Scope, status: int, seconds: float, user: Optional[User]) -> None:
    """Log a request, with its path as it was sent, but without its query string."""
    # Servers need not tell the raw path (ASGI). Then we encode the path again.
    raw_path = scope.get("raw_path") or quote(scope["path"]).encode()
    fields = {
        "method": scope["method"],
        "path": raw_path.decode("ascii", "backslashreplace"),
        "status": status,
        "duration_ms": round(seconds * 1000, 2),
        "client": client_address(scope),
        "user_id": user.id if user else None,
    }
    message = "%(method)s %(path)s %(status)s %(duration_ms)s ms"
    logger.info(message, fields, extra={"fields": fields})


class RequestContext:
    """Gives a request its id and its line in the log, and answers the remaining errors.

    The handlers of section 3 answer the errors of routes. RequestContext answers the
    errors that another middleware raises, and bugs. It gives each request a state, in
    which TokenCheck leaves the user.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started_at = time.perf_counter()
        status = 0
        sent_headers = Headers(scope=scope)
        request_id = choose_request_id(sent_headers)
        current_request_id.set(request_id)
        is_head = scope["method"] == "HEAD"
        must_close = asks_upgrade(scope, sent_headers)

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=list(message.get("headers", [])))
                headers["X-Request-ID"] = request_id
                headers.setdefault("Cache-Control", "no-store")
                if must_close:
                    headers["Connection"] = "close"
                message = {**message, "headers": headers.raw}
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        inner_scope = {**scope, "state": {**scope.get("state", {})}}
        if is_head:  # FastAPI has no HEAD for GET routes
            inner_scope["method"] = "GET"
        try:
            await self.app(inner_scope, receive, send_with_headers)
        except Exception as error:
            if not isinstance(error, ServiceError):
                logger.exception("unhandled error")
                error = ServiceError("internal_error")
            if not status:  # otherwise the answer has begun already
                await problem_response(error)(inner_scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - started_at
            log_access(scope, status, seconds, inner_scope["state"].get("user"))


class BodyLimit:
    """Reads the whole body, within five seconds, and refuses more than `max_bytes`."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.may_have_body(scope):
            await self.app(scope, receive, send)
            return
        try:
            with anyio.fail_after(BODY_SECONDS):
                body = await self.read(receive)
        except TimeoutError:
            raise ServiceError("request_timeout") from None
        messages: list[Message] = [{"type": "http.request", "body": body}]

        async def repeat() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, repeat, send)

    def may_have_body(self, scope: Scope) -> bool:
        """HTTP/1 announces a body in a header (RFC 9112). Later versions need not."""
        headers = Headers(scope=scope)
        is_announced = "content-length" in headers or "transfer-encoding" in headers
        return is_announced or scope["http_version"] >= "2"

    async def read(self, receive: Receive) -> bytes:
        """Raises ServiceError, also `request_timeout` for a client that has left."""
        body = bytearray()
        has_more = True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ServiceError("request_timeout")
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                raise ServiceError("body_too_large")
            has_more = message.get("more_body", False)
        return bytes(body)


class TokenCheck:
    """Lets a request pass only with a valid token, unless its path is public.

    A dependency would come too late: a bad token would get 404 on an unknown path, and
    422 with a broken body, instead of 401. So this middleware finds the user, and
    `CurrentUser` hands the user to the route. A test that replaces dependencies still
    needs a real token. Without any token, an unknown path is 404 (see `check`).
    """

    def __init__(self, app: ASGIApp, public_routes: Sequence[BaseRoute]) -> None:
        self.app = app
        self.public_routes = public_routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self.is_public(scope):
            try:
                await self.check(scope)
            except AuthError as error:
                if error.code != "not_authenticated":
                    log_event("token_refused", None, error.code, logging.WARNING)
                raise
        await self.app(scope, receive, send)

    def is_public(self, scope: Scope) -> bool:
        """Whether a public route has this path, and no protected route answers."""
        matches = [route.matches(scope)[0] for route in self.public_routes]
        if Match.FULL in matches:
            return True
        # A public route has this path, but not the method. A protected one may have it.
        return Match.PARTIAL in matches and not has_route(scope, scope["method"])

    async def check(self, scope: Scope) -> None:
        """Find the user of the token, if there is one. Raises ServiceError."""
        services: Services = scope["app"].state.services
        values = Headers(scope=scope).getlist("authorization")
        if len(values) > 1:
            raise AuthError("invalid_token")
        scheme, _, token = "".join(values).partition(" ")
        if scheme.lower() != "bearer":  # RFC 6750, 2.1
            if has_route(scope, scope["method"]):
                raise AuthError("not_authenticated")
            return  # no route matches, so FastAPI will answer 404 or 405
        claims = services.tokens.verify(token.strip(" "))
        user = await services.db.find_user(claims.user_id)
        if user is None or user.token_version != claims.token_version:
            raise AuthError("invalid_token")
        scope["state"]["user"] = user


# ======================================================================================
# 8 Routes
#
# A route checks its input by a model, uses the services, and returns a model. To add
# one, write the models and the function, and name the errors that it can give.
#
# Every route needs a token, unless its router is one of PUBLIC_ROUTERS. A route that
# needs a token must ask for `CurrentUser`, or /docs shows it as public. `create_app`
# needs the name of each new router. TokenCheck does not protect WebSocket routes.

BODY_ERRORS = ("request_timeout", "body_too_large", "invalid_request")
PASSWORD_ERRORS = ("database_unavailable", "overloaded")
TOKEN_ERRORS = (
    "not_authenticated",
    "invalid_token",
    "expired_token",
    "database_unavailable",
)

public_auth = APIRouter(prefix="/api/v1/auth", tags=["auth"])
auth = APIRouter(prefix="/api/v1/auth", tags=["auth"])
external = APIRouter(prefix="/api/v1/external", tags=["external"])
demo = APIRouter(prefix="/demo", tags=["demo"])
health = APIRouter(prefix="/health", tags=["health"])
PUBLIC_ROUTERS = (public_auth, demo, health)

# ---- dependencies; they are async, because FastAPI runs others in threads ----


async def get_services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


async def get_address(request: Request) -> str:
    return client_address(request.scope)


class TokenUser(HTTPBearer):
    """Hands over the user that TokenCheck has found.

    TokenCheck protects the route. HTTPBearer only draws the locks in /docs.
    """

    async def __call__(self, request: Request) -> User:  # type: ignore[override]
        user: Optional[User] = getattr(request.state, "user", None)
        if user is None:  # a public route asks for its user
            raise AuthError("not_authenticated")
        return user


token_user = TokenUser(
    scheme_name="token",
    bearerFormat="JWT",
    description="Paste the access_token of a login, without quotes and without Bearer.",
)

ServicesDep = Annotated[Services, Depends(get_services)]
AddressDep = Annotated[str, Depends(get_address)]
CurrentUser = Annotated[User, Security(token_user)]

# ---- emails and passwords ----

MIN_PASSWORD_LENGTH = 8  # as ASVS 6.2.1; NIST SP 800-63B asks for 15 without MFA
MAX_PASSWORD_LENGTH = 128

# We check the syntax only. The library also refuses names such as ada@host.local, and
# only an empty list can stop it.
email_validator.SPECIAL_USE_DOMAIN_NAMES.clear()


def normalise_email(value: str) -> str:
    """Return the one spelling in which an address is stored and compared.

    (pydantic's EmailStr takes "Ada <ada@example.com>", and keeps capital letters.)
    """
    try:
        checked = email_validator.validate_email(value, check_deliverability=False)
    except email_validator.EmailNotValidError:  # its text repeats parts of the value
        raise PydanticCustomError("email", "This is not an email address.") from None
    return unicodedata.normalize("NFC", checked.normalized.lower())


def normalise_password(value: object) -> object:
    """Make a composed and a decomposed letter the same (NFC).

    Refuse a surrogate, because UTF-8 cannot encode it.
    """
    # NFC can make a text four times shorter, but no more. So a longer one is too long
    # anyway, and 64 kB of accents would keep NFC busy for seconds.
    if isinstance(value, str) and len(value) <= 4 * MAX_PASSWORD_LENGTH:
        value = unicodedata.normalize("NFC", value)
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise PydanticCustomError("unicode", "This is not valid Unicode.")
    return value


Email = Annotated[
    str,
    Field(
        max_length=254,
        examples=["ada@example.com"],
        json_schema_extra={"format": "email"},
    ),
    pydantic.AfterValidator(normalise_email),
]
Password = Annotated[
    str,
    Field(examples=["correct horse battery staple"]),
    pydantic.BeforeValidator(normalise_password),
]
NewPassword = Annotated[
    str,
    Field(
        min_length=MIN_PASSWORD_LENGTH,
        max_length=MAX_PASSWORD_LENGTH,
        examples=["correct horse battery staple"],
    ),
    pydantic.BeforeValidator(normalise_password),
]

# ---- accounts ----


class UserRegister(BaseModel):
    email: Email
    password: NewPassword


class UserLogin(BaseModel):
    email: Email
    password: Password


class PasswordChange(BaseModel):
    current_password: Password
    new_password: NewPassword


class UserResponse(BaseModel):
    model_config = pydantic.ConfigDict(from_attributes=True)

    id: uuid.UUID
    email: str = Field(examples=["ada@example.com"])
    created_at: datetime


class TokenResponse(BaseModel):
    access_token: str = Field(examples=["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln"])
    token_type: Literal["bearer"]
    expires_in: int = Field(description="Seconds.", examples=[86400])


@public_auth.post(
    "/register",
    status_code=201,
    responses=problems("email_taken", *PASSWORD_ERRORS, *BODY_ERRORS),
)
async def register(new_user: UserRegister, services: ServicesDep) -> UserResponse:
    """Create an account."""
    password_hash = await services.passwords.hash(new_user.password)
    user = await services.db.insert_user(new_user.email, password_hash)
    if user is None:
        raise ServiceError("email_taken")
    log_event("user_registered", user.id)
    return UserResponse.model_validate(user)


@public_auth.post(
    "/login",
    responses=problems(
        "invalid_credentials", "too_many_attempts", *PASSWORD_ERRORS, *BODY_ERRORS
    ),
)
async def log_in(
    credentials: UserLogin, address: AddressDep, services: ServicesDep
) -> TokenResponse:
    """Exchange email and password for a token."""
    login = await services.accounts.authenticate(
        credentials.email, credentials.password, address
    )
    if login is None:
        raise AuthError("invalid_credentials")
    if services.passwords.is_outdated(login.password_hash):
        with suppress(ServiceError):  # if this fails, the next login tries again
            new_hash = await services.passwords.hash(credentials.password)
            await services.db.renew_hash(login, new_hash)
    log_event("login_succeeded", login.user_id)
    token = services.tokens.issue(login)
    expires_in = services.settings.jwt_expires_seconds
    return TokenResponse(access_token=token, token_type="bearer", expires_in=expires_in)


@auth.get("/me", responses=problems(*TOKEN_ERRORS))
async def show_account(user: CurrentUser) -> UserResponse:
    """Return the account that the token belongs to."""
    return UserResponse.model_validate(user)


@auth.put(
    "/password",
    status_code=204,
    responses=problems(
        "wrong_password",
        "too_many_attempts",
        *PASSWORD_ERRORS,
        *TOKEN_ERRORS,
        *BODY_ERRORS,
    ),
)
async def change_password(
    change: PasswordChange,
    user: CurrentUser,
    address: AddressDep,
    services: ServicesDep,
) -> None:
    """Replace the password and end every session, this one too."""
    current = change.current_password
    login = await services.accounts.authenticate(user.email, current, address)
    if login is None:
        raise AuthError("wrong_password")
    new_hash = await services.passwords.hash(change.new_password)
    if not await services.db.change_password(user, new_hash):
        raise AuthError("invalid_token")  # another request has just ended this session
    log_event("password_changed", user.id)


@auth.post("/logout", status_code=204, responses=problems(*TOKEN_ERRORS))
async def log_out(user: CurrentUser, services: ServicesDep) -> None:
    """End every session: all tokens issued until now stop working."""
    await services.db.end_sessions(user.id)
    log_event("logged_out", user.id)


# ---- the external API ----


class ExternalData(BaseModel):
    data: JsonValue = Field(examples=[{"message": "Hello from the demo upstream."}])


class CircuitStatus(BaseModel):
    state: CircuitState = Field(examples=["closed"])
    failures: int = Field(description="Failed attempts in a row.", examples=[0])
    fail_max: int = Field(description="This many open the circuit.", examples=[5])
    retry_after_seconds: int = Field(
        description="Seconds until a call may probe. 0 unless open.", examples=[0]
    )


class DemoSwitch(BaseModel):
    failing: bool = Field(strict=True, description="Whether every call fails.")


@external.get(
    "/data",
    responses=problems(
        *TOKEN_ERRORS, "external_service_error", "circuit_open", "external_timeout"
    ),
)
async def fetch_external_data(user: CurrentUser, services: ServicesDep) -> ExternalData:
    """Call the external API, with retries, a deadline and a circuit breaker."""
    return ExternalData(data=await services.external.fetch())


@external.get("/status", responses=problems(*TOKEN_ERRORS))
async def show_circuit(user: CurrentUser, services: ServicesDep) -> CircuitStatus:
    """Return the state of the circuit in the process that answers."""
    circuit = services.external.circuit
    return CircuitStatus(
        state=circuit.state,
        failures=circuit.breaker.fail_counter,
        fail_max=circuit.breaker.fail_max,
        retry_after_seconds=circuit.retry_after_seconds,
    )


@demo.put("/upstream", status_code=204, responses=problems(*BODY_ERRORS))
async def switch_demo_upstream(switch: DemoSwitch, services: ServicesDep) -> None:
    """Make the demo upstream fail, or heal it, to watch the circuit.

    Let it fail and fetch external data twice: the circuit opens. Heal it, wait for
    BREAKER_RESET_SECONDS and fetch again: the circuit closes.
    """
    services.demo.is_failing = switch.failing


# ---- health ----


class Health(BaseModel):
    status: Literal["ok"]


@health.get("/live", responses=problems())
async def check_liveness() -> Health:
    """The process answers."""
    return Health(status="ok")


@health.get("/ready", responses=problems("database_unavailable"))
async def check_readiness(services: ServicesDep) -> Health:
    """The process and its database answer."""
    await services.db.ping()
    return Health(status="ok")


# ======================================================================================
# 9 App
#
# The lifespan opens what lives as long as the process, and closes it after the last
# answer. After SIGTERM, uvicorn still answers the requests that have begun. None of
# them can hang for long: a body, a statement and an external call have their time
# limits, and the number of passwords that wait for a thread is limited, too.

DESCRIPTION = """\
Accounts with tokens, and a client for an external API that may fail.

To try it, register an account and log in. Copy the `access_token` from the answer,
click **Authorize** and paste it. Then everything with a lock works.
"""
TAGS = [
    {"name": "auth", "description": "Register, log in and out, change the password."},
    {"name": "external", "description": "Call the external API, look at its circuit."},
    {"name": "demo", "description": "Make the demo upstream fail, or heal it."},
    {"name": "health", "description": "For monitors and load balancers."},
]


async def choose_secret(settings: Settings, db: Database) -> str:
    """Return the key that signs tokens. Raises StartError."""
    if settings.jwt_secret is not None:
        return settings.jwt_secret.get_secret_value()
    random_secret = secrets.token_hex(32)
    if settings.environment == "test":
        return random_secret
    logger.warning("JWT_SECRET is not set: development uses one kept in the database")
    try:
        return await db.keep_secret("jwt_secret", random_secret)
    except ServiceError as error:
        raise StartError(f"DATABASE_URL: cannot keep a secret: {error.code}") from None


async def open_services(settings: Settings, stack: AsyncExitStack) -> Services:
    """Create all parts; `stack` closes those that were opened. Raises StartError."""
    db = await open_database(settings, stack)
    secret = await choose_secret(settings, db)
    passwords = Passwords(settings.bcrypt_rounds)
    upstream = DemoUpstream()
    url = "http://demo/"
    transport: Optional[httpx.AsyncBaseTransport] = httpx.MockTransport(upstream)
    if settings.external_api_url is not None:
        url = str(settings.external_api_url)
        transport = None
    try:
        client = ExternalClient("external", url, settings, transport)
    except OSError as error:
        raise StartError(f"SSL_CERT_FILE cannot be used: {error}") from None
    await stack.enter_async_context(client.http)
    return Services(
        settings=settings,
        db=db,
        passwords=passwords,
        accounts=Accounts(settings, db, passwords),
        tokens=Tokens(secret, settings.jwt_expires_seconds),
        external=client,
        demo=upstream,
    )


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.start_error = None
    try:
        async with AsyncExitStack() as stack:
            app.state.services = await open_services(app.state.settings, stack)
            yield
    except StartError as error:
        app.state.start_error = f"not started: {error}"
        raise
    finally:
        wait_until_log_is_written()


class Service(FastAPI):
    """FastAPI, with a short report of a failed start and a complete openapi.json."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give the server the sentence of a StartError, not Starlette's traceback."""

        async def send_sentence(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed":
                sentence = self.state.start_error or message["message"]
                message = {**message, "message": sentence}
            await send(message)

        is_lifespan = scope["type"] == "lifespan"
        await super().__call__(scope, receive, send_sentence if is_lifespan else send)

    def openapi(self) -> dict[str, Any]:
        """Add `Problem`, and say of public operations that they need no token.

        FastAPI itself documents models of `responses=` as application/json only.
        """
        document = super().openapi()
        for operations in document["paths"].values():
            for operation in operations.values():
                operation.setdefault("security", [])
        schemas = document["components"]["schemas"]
        problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(problem.pop("$defs"))
        schemas["Problem"] = problem
        return document


def create_app(settings: Optional[Settings] = None) -> FastAPI:
    """Put the parts together. Raises StartError if a setting is wrong."""
    settings = settings or load_settings()
    configure_logging(settings)
    app = Service(
        title="service",
        version="1.0.0",
        description=DESCRIPTION,
        openapi_tags=TAGS,
        lifespan=lifespan,
        redirect_slashes=False,  # it would redirect to whatever the Host header says
        swagger_ui_oauth2_redirect_url=None,
        generate_unique_id_function=lambda route: route.name,
        exception_handlers={  # never for Exception: it would run outside RequestContext
            ServiceError: handle_service_error,
            RequestValidationError: handle_validation_error,
            HTTPException: handle_http_exception,
            405: handle_wrong_method,
        },
    )
    app.state.settings = settings
    public_routes = list(app.routes)  # so far, only /docs, /redoc and /openapi.json
    for router in PUBLIC_ROUTERS:
        public_routes.extend(router.routes)
    is_development = settings.environment == "development"
    # If two routes match, the first one answers. So public routers stand first.
    for router in (*PUBLIC_ROUTERS, auth, external):
        if router is not demo or (is_development and not settings.external_api_url):
            app.include_router(router)
    # The first one is the innermost.
    app.add_middleware(TokenCheck, public_routes=public_routes)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(RequestContext)
    return app


try:
    app = create_app()
except StartError as error:
    print(f"service: not started: {error}", file=sys.stderr)
    sys.exit(3)  # with 3, uvicorn and gunicorn do not try again
