"""A small service to read, run and copy: accounts, tokens, and a client for an unstable API.

The way of a request, and so the order of this file's second half:

    uvicorn > RequestContext > BodyLimit > TokenCheck > route > a query or two > the answer
              request id,      413, 408    401 before         > the external client
              access record,               any route            (retries, circuit breaker)
              every error's answer

First half, the vocabulary; each section can be read alone:
    1 Settings          every knob
    2 Logging           the request id, two formats, a writer that never blocks
    3 Errors            what can go wrong, and the one shape it leaves in
    4 Database          opening, migrating, every SQL statement
    5 External client   timeout, retry, circuit breaker
    6 Security          passwords, throttle, tokens
Second half, the request:
    7 Middleware        RequestContext, BodyLimit, TokenCheck
    8 Routes            each beside its models
    9 App               start, stop, everything put together

Nothing is used before it is defined. Run it: `uvicorn service:app`.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import math
import os
import queue
import re
import secrets
import sqlite3
import threading
import time
import unicodedata
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from datetime import datetime, timezone
from http import HTTPStatus
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Optional, cast

import anyio
import asyncpg
import bcrypt
import databases
import httpx
import jwt
import pybreaker
import pydantic
import tenacity
from databases.core import Connection
from email_validator import EmailNotValidError, validate_email
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, SecretStr
from pydantic.json_schema import models_json_schema
from pydantic_core import PydanticCustomError, from_json
from pydantic_settings import BaseSettings, SettingsConfigDict
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# ======================================================================================
# 1 Settings
# Read once, at start: the environment wins over `.env`; an empty value counts as unset.
# To add one: a field here, a line in `.env.example`, a row in the README's table.
# ======================================================================================

Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Upper = pydantic.BeforeValidator(str.upper)


class Settings(BaseSettings):
    """Every knob. Raises: pydantic.ValidationError, which never shows the value."""

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore"
    )

    environment: Literal["development", "production", "test"] = "development"
    database_url: str = "sqlite:///service.db"
    database_timeout_seconds: Seconds = 5  # a statement, its queue and its locks; then 503
    jwt_secret: Optional[SecretStr] = None  # None: a random one; required in production
    jwt_expires_seconds: int = Field(86400, ge=1, le=315_360_000)  # ten years at most
    bcrypt_rounds: int = Field(12, ge=4, le=15)  # one more doubles the time; 12 takes 0.25 s
    password_min_length: int = Field(8, ge=1, le=128)  # characters, of new passwords
    login_max_failures: Count = 5  # on an email from one address, in a window
    login_window_seconds: Count = 300
    max_body_bytes: int = Field(65536, ge=1, le=2**30)  # a larger body: 413
    external_api_url: Optional[pydantic.AnyHttpUrl] = None  # None: the demo upstream
    external_timeout_seconds: Seconds = 2  # one attempt, from first to last byte
    external_deadline_seconds: Seconds = 5  # the whole call, attempts and waits
    external_attempts: int = Field(3, ge=1, le=20)
    breaker_fail_max: Count = 5  # failed attempts in a row that open the circuit
    breaker_reset_seconds: Seconds = 30  # how long it stays open before one probe
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], Upper] = "INFO"
    log_format: Literal["text", "json"] = "text"

    @pydantic.field_validator("database_url")
    @classmethod
    def check_database_url(cls, value: str) -> str:
        """Refuse what `databases` would ignore, or take for a part of the file's name."""
        try:
            url = databases.DatabaseURL(value)
            known = {"sqlite": set(), "postgresql": {"ssl", "max_size"}}[url.scheme]
            good = url.database and (url.hostname or url.scheme == "sqlite") and url.port != 0
        except (ValueError, KeyError):  # their texts repeat the URL, password included
            good = False
        if not good or set(url.options) - known or (url.scheme == "sqlite" and url.netloc):
            raise ValueError(
                "use sqlite:///path or postgresql://user:password@host:port/name, the latter "
                "with ?ssl=... and &max_size=... if need be"
            )
        return value

    @pydantic.model_validator(mode="after")
    def check_secrets(self) -> "Settings":
        """A key has at least as many bits as the hash (RFC 7518, 3.2); production has its own."""
        if self.jwt_secret and len(self.jwt_secret.get_secret_value().encode()) < 32:
            raise ValueError("JWT_SECRET: use 32 bytes or more, for instance: openssl rand -hex 32")
        for name in ("jwt_secret", "external_api_url"):
            if self.environment == "production" and getattr(self, name) is None:
                raise ValueError(f"{name.upper()}: required in production")
        return self

    @property
    def has_demo_switch(self) -> bool:
        return self.environment == "development" and self.external_api_url is None


def load_settings() -> Settings:
    """Read the settings, or end the process with one message that names the variables."""
    try:
        return Settings()
    except pydantic.ValidationError as exc:
        wrong = [": ".join([*map(str.upper, map(str, e["loc"])), e["msg"]]) for e in exc.errors()]
    except (OSError, UnicodeError) as exc:
        wrong = [f".env cannot be read: {type(exc).__name__}"]
    raise SystemExit(f"service: not started: {'; '.join(wrong)}")


# ======================================================================================
# 2 Logging
# One line a record, to stdout. The request id travels in a context variable, so that every
# record of a request carries it, whoever writes the record. A reader that stalls never stalls
# the service: past 10,000 waiting lines new ones are dropped, counted, and the count is logged.
# Other libraries are heard from WARNING up only: at DEBUG some print the values of statements.
# ======================================================================================

logger = logging.getLogger("service")
request_id: ContextVar[str] = ContextVar("request_id", default="-")

CONTROL = {c: f"\\x{c:02x}" for c in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}


def format_time(epoch_seconds: float) -> str:
    """RFC 3339 in UTC, to the microsecond."""
    moment = datetime.fromtimestamp(epoch_seconds, timezone.utc)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


class Formatter(logging.Formatter):
    """One line a record. In text, control characters are escaped and tracebacks indented:
    whatever a message quotes, only the service itself begins a line."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        moment, rid, message = format_time(record.created), request_id.get(), record.getMessage()
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if not self.as_json:
            line = f"{moment} {record.levelname:8} [{rid}] {message.translate(CONTROL)}"
            return line + ("\n" + trace).replace("\n", "\n    ") if trace else line
        entry = {"time": moment, "level": record.levelname, "logger": record.name}
        entry.update(message=message, request_id=rid, **({"traceback": trace} if trace else {}))
        return json.dumps({**entry, **getattr(record, "fields", {})})


class StdoutHandler(logging.Handler):
    """Hands each line to a thread, which alone waits for whoever reads stdout."""

    def __init__(self, as_json: bool, limit: int = 10_000) -> None:
        super().__init__()
        self.setFormatter(Formatter(as_json))
        self.lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.limit, self.dropped = limit, 0
        self.thread = threading.Thread()

    def emit(self, record: logging.LogRecord) -> None:
        if self.lines.qsize() >= self.limit:
            self.dropped += 1
            return
        if self.dropped:
            note, self.dropped = f"{self.dropped} log records dropped: read faster", 0
            self.emit(logging.LogRecord("service", logging.WARNING, "", 0, note, None, None))
        self.lines.put((self.format(record) + "\n").encode("utf-8", "backslashreplace"))
        if not self.thread.is_alive():  # the first record of the process, also after a fork
            self.thread = threading.Thread(target=self.write_lines, name="log", daemon=True)
            self.thread.start()

    def flush(self) -> None:
        """Wait until the lines so far are written, a second at most; also called at exit."""
        written = threading.Event()
        self.lines.put(written)
        written.wait(1 if self.thread.is_alive() else 0)

    def write_lines(self) -> None:
        while True:
            line = self.lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            while line:
                try:
                    line = line[os.write(1, line) :]
                except BlockingIOError:
                    time.sleep(0.05)
                except OSError:  # the reader has gone, and with it the line
                    break


def configure_logging(settings: Settings) -> None:
    """Send every record through one handler; uvicorn's access log gives way to ours."""
    handler = StdoutHandler(as_json=settings.log_format == "json")
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("service", "uvicorn", "uvicorn.error", "uvicorn.access"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [], name != "uvicorn.access"
        log.setLevel(settings.log_level)


def log_event(event: str, user_id: Optional[str], message: str = "", level: int = 20) -> None:
    """Write a security event: a word for programs, who it was, and nothing secret."""
    logger.log(level, message or event, extra={"fields": {"event": event, "user_id": user_id}})


# ======================================================================================
# 3 Errors
# Whoever notices an error raises it by its code; `problem_response` alone makes answers of them.
# To add one: a line in ERRORS, a raise, and its code in the problems() of the route.
# ======================================================================================

ERRORS = {  # code (a stable word, for programs): status, what to do next (for people)
    "not_authenticated": (401, "This needs a token: log in, send Authorization: Bearer <token>."),
    "invalid_token": (401, "The token is not valid, or not any more; log in again."),
    "expired_token": (401, "The token has expired; log in again."),
    "invalid_credentials": (401, "The email or the password is wrong."),
    "wrong_password": (403, "The current password is wrong; nothing was changed."),
    "not_found": (404, "There is nothing at this path; see /docs."),
    "method_not_allowed": (405, "This path does not know the method; see the Allow header."),
    "request_timeout": (408, "The body did not arrive in time; send it again, faster."),
    "email_taken": (409, "There is an account with this email; log in instead."),
    "body_too_large": (413, "The body is too large."),
    "invalid_request": (422, "The request is not valid; see errors."),
    "too_many_attempts": (429, "Too many failed attempts; wait as long as Retry-After says."),
    "internal_error": (500, "Something broke on our side; the request id finds it in the log."),
    "external_service_error": (502, "The external service failed; try again later."),
    "circuit_open": (503, "The external service fails and is left alone until Retry-After."),
    "database_unavailable": (503, "The database does not answer; a write may be done or not."),
    "overloaded": (503, "Too many passwords are waiting to be checked; try again."),
    "external_timeout": (504, "The external service did not answer in time; try again later."),
}


class ServiceError(HTTPException):
    """The base of all. Starlette's, because nothing else gets out of receive() unchanged."""

    def __init__(self, code: str, retry_after: float = 1, errors: Any = None) -> None:
        self.code, self.errors = code, errors
        super().__init__(*ERRORS[code], headers={})
        if self.status_code in (429, 503):
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
        if self.status_code == 401:  # RFC 6750, 3: with `error` only if a token was sent
            sent = ', error="invalid_token"' if code.endswith("_token") else ""
            self.headers["WWW-Authenticate"] = f'Bearer realm="service"{sent}'


class AuthError(ServiceError):
    """Who is asking, and may they?"""


class ValidationError(ServiceError):
    """`errors` says where (`loc`) and why (`msg`, `type`), never what was sent."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__("invalid_request", errors=errors)


class ExternalServiceError(ServiceError):
    """What the external API can do to us, and what the retries and the circuit make of it."""

    def __init__(
        self,
        code: str = "external_service_error",
        *,
        retry: bool = False,
        wait: Optional[float] = None,  # seconds, if the upstream asked for them
        is_failure: bool = True,  # False: no fault of the upstream's
        retry_after: float = 1,
    ) -> None:
        super().__init__(code, retry_after)
        self.retry, self.wait, self.is_failure = retry, wait, is_failure


def describe_problem(error: ServiceError) -> dict[str, Any]:
    """The one shape of an error: RFC 9457, with `code`, `request_id`, and `errors` for 422."""
    status = error.status_code
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    body.update(detail=error.detail, code=error.code, request_id=request_id.get())
    return body if error.errors is None else {**body, "errors": error.errors}


def problem_response(error: ServiceError) -> Response:
    media_type = "application/problem+json"
    return JSONResponse(describe_problem(error), error.status_code, error.headers, media_type)


async def handle_http_exception(_: Request, exc: Exception) -> Response:
    """Give Starlette's own errors our shape: 404, 405, and 400 for a body that is not JSON."""
    if isinstance(exc, ServiceError):
        return problem_response(exc)
    assert isinstance(exc, HTTPException)
    if exc.status_code == 400:
        errors = [{"loc": ["body"], "msg": "This is not JSON.", "type": "json_invalid"}]
        return problem_response(ValidationError(errors))
    codes = {404: "not_found", 405: "method_not_allowed"}
    error = ServiceError(codes.get(exc.status_code, "internal_error"))
    error.headers = exc.headers  # Allow
    return problem_response(error)


async def handle_validation_error(_: Request, exc: Exception) -> Response:
    """Leave out FastAPI's `input` and `ctx`: they repeat what was sent."""
    assert isinstance(exc, RequestValidationError)
    errors = [{name: error[name] for name in ("loc", "msg", "type")} for error in exc.errors()]
    return problem_response(ValidationError(errors))


# ======================================================================================
# 4 Database
# Raw SQL through `databases`, one method a statement: single statements and constraints keep
# every promise, so no transaction is left open. SQLite: two held connections, one for reads,
# which go on while a write waits. PostgreSQL: a pool. To change the schema, see schema.sql.
# ======================================================================================

Row = dict[str, Any]
Opened = contextlib.AsyncExitStack

SCHEMA = Path(__file__).with_name("schema.sql")
POSTGRES_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
DRIVER_ERRORS = (*POSTGRES_ERRORS, sqlite3.Error, OSError, asyncio.TimeoutError)


class StartError(Exception):
    """The service cannot start; the text says why in one line, without secrets."""


class Lane(NamedTuple):
    """Connections, and how many statements may use them at once."""

    turn: asyncio.Semaphore
    connect: Callable[[], contextlib.AbstractAsyncContextManager[Connection]]


class Database:
    """Every statement, each within `timeout` seconds, its queue and its locks included.

    All methods raise database_unavailable, whatever goes wrong. When a write returns, it is on
    disk; when it raises, its outcome is open.
    """

    def __init__(self, reads: Lane, writes: Lane, timeout: float) -> None:
        self.reads, self.writes, self.timeout = reads, writes, timeout

    async def run(self, lane: Lane, sql: str, **values: Any) -> Optional[Row]:
        """Return the first row, if any."""
        begun: list[Any] = []

        async def statement() -> Optional[Row]:
            async with lane.turn, lane.connect() as connection:
                begun.append(connection.raw_connection)
                row = await connection.fetch_one(sql, values)
                return None if row is None else dict(row._mapping)

        # A task, because waiting for a cancelled statement can take for ever (PostgreSQL frozen).
        # Out of time, it is cancelled if it still queues. If it has begun, SQLite ends it by its
        # own limit, and for PostgreSQL its connection is cut.
        task = asyncio.ensure_future(statement())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait({task}, timeout=self.timeout)
        try:
            if task.done():
                return task.result()
            why = "no answer in time"
            if not begun:
                task.cancel()
            elif isinstance(begun[0], asyncpg.Connection):
                begun[0].terminate()
        except DRIVER_ERRORS as exc:  # PostgreSQL's texts quote rows, SQLite's do not
            why = str(exc) if isinstance(exc, sqlite3.Error) else type(exc).__name__
        logger.warning("database: %s", why)
        raise ServiceError("database_unavailable")

    async def insert_user(self, email: str, password_hash: str) -> Optional[Row]:
        """Return the new user, or None if the email is taken: the constraint decides."""
        sql = """
            INSERT INTO users (id, email, password_hash, created_at)
            VALUES (:id, :email, :hash, :now)
            ON CONFLICT (email) DO NOTHING
            RETURNING id, email, created_at"""
        new_id, now = str(uuid.uuid4()), format_time(time.time())
        return await self.run(self.writes, sql, id=new_id, email=email, hash=password_hash, now=now)

    async def find_user_by_email(self, email: str) -> Optional[Row]:
        sql = "SELECT id, password_hash, token_version FROM users WHERE email = :email"
        return await self.run(self.reads, sql, email=email)

    async def find_user_by_id(self, user_id: str) -> Optional[Row]:
        sql = """
            SELECT id, email, password_hash, token_version, created_at
            FROM users WHERE id = :id"""
        return await self.run(self.reads, sql, id=user_id)

    async def replace_hash(self, user_id: str, old: str, new: str, end_sessions: bool) -> bool:
        """Return False if the old hash is not there any more: somebody else was quicker."""
        sql = """
            UPDATE users SET password_hash = :new, token_version = token_version + :ended
            WHERE id = :id AND password_hash = :old
            RETURNING id"""
        ended = int(end_sessions)
        return bool(await self.run(self.writes, sql, id=user_id, old=old, new=new, ended=ended))

    async def end_sessions(self, user_id: str) -> None:
        """Refuse every token that the user has been given."""
        sql = "UPDATE users SET token_version = token_version + 1 WHERE id = :id"
        await self.run(self.writes, sql, id=user_id)

    async def count_attempt(self, email: str, address: str, now: int, ends: int) -> Row:
        """Count one more in the window that is open, or the first of a new one."""
        sql = """
            INSERT INTO login_attempts AS seen (email, address, attempts, window_ends_at)
            VALUES (:email, :address, 1, :ends)
            ON CONFLICT (email, address) DO UPDATE SET
                attempts = CASE WHEN seen.window_ends_at > :now THEN seen.attempts + 1 ELSE 1 END,
                window_ends_at = CASE WHEN seen.window_ends_at > :now
                                 THEN seen.window_ends_at ELSE excluded.window_ends_at END
            RETURNING attempts, window_ends_at"""
        row = await self.run(self.writes, sql, email=email, address=address, now=now, ends=ends)
        return cast(Row, row)

    async def forgive_attempt(self, email: str, address: str) -> None:
        """Clear what stands against the address; take one from what stands against all."""
        sql = """
            UPDATE login_attempts SET attempts = CASE address WHEN '*' THEN attempts - 1 ELSE 0 END
            WHERE email = :email AND address IN (:address, '*') AND attempts > 0"""
        await self.run(self.writes, sql, email=email, address=address)

    async def delete_ended_windows(self, now: int) -> None:
        sql = "DELETE FROM login_attempts WHERE window_ends_at <= :now"
        await self.run(self.writes, sql, now=now)

    async def keep_secret(self, name: str, value: str) -> str:
        """Store the value unless there is one; return the one on which all workers agree."""
        sql = "INSERT INTO secrets (name, value) VALUES (:name, :value) ON CONFLICT DO NOTHING"
        await self.run(self.writes, sql, name=name, value=value)
        sql = "SELECT value FROM secrets WHERE name = :name"
        return str(cast(Row, await self.run(self.reads, sql, name=name))["value"])

    async def find_schema_version(self) -> int:
        sql = "SELECT MAX(version) AS version FROM schema_migrations"
        return int(cast(Row, await self.run(self.reads, sql))["version"])


async def migrate(connection: Connection, begin: str) -> None:
    """Run the sections of schema.sql that this database has not seen, a transaction each.

    `begin` opens the transaction and takes a lock: of many starting workers, one does the work.
    Raises: StartError, naming the section; nothing of it stays.
    """
    raw = connection.raw_connection
    run_script = raw.execute if isinstance(raw, asyncpg.Connection) else raw.executescript
    table = "CREATE TABLE IF NOT EXISTS schema_migrations (version BIGINT NOT NULL PRIMARY KEY)"
    await run_script(f"{begin}; {table}; COMMIT")
    is_applied = "SELECT 1 FROM schema_migrations WHERE version = :version"
    _, *parts = re.split(r"^-- migration (\d+): *(.*)$", SCHEMA.read_text("utf-8"), flags=re.M)
    for version, name, script in zip(map(int, parts[::3]), parts[1::3], parts[2::3]):
        if await connection.fetch_one(is_applied, {"version": version}):
            continue
        mark = f"INSERT INTO schema_migrations (version) VALUES ({version})"
        try:
            await run_script(f"{begin}; {mark}; {script}\n; COMMIT")
        except DRIVER_ERRORS as exc:
            with contextlib.suppress(*DRIVER_ERRORS):
                await run_script("ROLLBACK")
            if not await connection.fetch_one(is_applied, {"version": version}):  # by another
                why = str(exc).partition("\n")[0]
                raise StartError(f"schema.sql, migration {version}: {name}: {why}") from None


async def open_sqlite(url: databases.DatabaseURL, timeout: float, opened: Opened) -> Database:
    async def hold() -> Lane:
        driver = databases.Database(url, timeout=timeout)  # how long SQLite waits for a lock
        connection = await opened.enter_async_context(driver.connection())
        return Lane(asyncio.Semaphore(1), lambda: connection)

    in_memory = url.database == ":memory:"
    if not in_memory:
        os.close(os.open(url.database, os.O_RDWR | os.O_CREAT, 0o600))  # for its owner only
    writes = await hold()
    patience = tenacity.AsyncRetrying(  # several at once get "locked" here, without a wait
        retry=tenacity.retry_if_exception(lambda exc: "locked" in str(exc)),
        stop=tenacity.stop_after_delay(timeout),
        wait=tenacity.wait_random(0, 0.1),
        reraise=True,
    )
    async with writes.connect() as connection:
        await patience(connection.fetch_one, "PRAGMA journal_mode = WAL")
        await connection.fetch_one("PRAGMA synchronous = FULL")  # a 201 survives a power cut
        await migrate(connection, "BEGIN IMMEDIATE")
    return Database(writes if in_memory else await hold(), writes, timeout)


async def open_postgresql(url: databases.DatabaseURL, timeout: float, opened: Opened) -> Database:
    lock_limit = {"lock_timeout": str(math.ceil(timeout * 1000))}  # ms; ends what we gave up
    driver = databases.Database(url, min_size=1, timeout=timeout, server_settings=lock_limit)

    async def disconnect() -> None:
        with contextlib.suppress(*DRIVER_ERRORS):
            await asyncio.wait_for(driver.disconnect(), timeout)

    await asyncio.wait_for(driver.connect(), timeout)
    opened.push_async_callback(disconnect)
    async with driver.connection() as connection:
        await migrate(connection, "BEGIN; SELECT pg_advisory_xact_lock(7519)")
    lane = Lane(asyncio.Semaphore(1000), driver.connection)  # the pool has the real limit
    return Database(lane, lane, timeout)


async def open_database(settings: Settings, opened: Opened) -> Database:
    """Open and migrate; `opened` closes it. Raises: StartError, with the path or the host."""
    url, timeout = databases.DatabaseURL(settings.database_url), settings.database_timeout_seconds
    is_sqlite = url.scheme == "sqlite"
    try:
        return await (open_sqlite if is_sqlite else open_postgresql)(url, timeout, opened)
    except DRIVER_ERRORS as exc:
        place = url.database if is_sqlite else f"{url.hostname}:{url.port or 5432}/{url.database}"
        why = str(exc).partition("\n")[0] or "no answer in time"
        raise StartError(f"DATABASE_URL: cannot use {place}: {why}") from None


# ======================================================================================
# 5 External client
# One GET in layers: retries within a deadline > the circuit > one attempt in its time > httpx.
# The deadline shortens the last attempt rather than cancelling it: a cancelled one would count
# for nothing and the circuit never open. Its state is per process. For a second API, make a
# second ExternalClient.
# ======================================================================================

MAX_UPSTREAM_BYTES = 2**20


class Circuit(pybreaker.CircuitBreakerListener):
    """pybreaker for coroutines.

    pybreaker counts what happens while it calls a function, which cannot await. So the call is
    awaited first, and its outcome then reported by a function that takes no time. What is left
    to do by hand: one probe only when half-open, no heed to the outcome of a call from before the
    last change of state (`epoch`), a cancelled call counts for nothing, monotonic time.
    """

    def __init__(self, fail_max: int, reset_seconds: float) -> None:
        self.breaker = pybreaker.CircuitBreaker(
            fail_max, listeners=[self], throw_new_error_on_trip=False
        )
        self.reset_seconds, self.changed_at = reset_seconds, 0.0
        self.epoch, self.is_probing = 0, False

    def state_change(self, cb: pybreaker.CircuitBreaker, old_state: Any, new_state: Any) -> None:
        self.epoch, self.changed_at = self.epoch + 1, time.monotonic()
        log_event("circuit_changed", None, f"circuit {new_state.name}", logging.WARNING)

    @property
    def state(self) -> str:
        """closed, open or half-open; open stays open until a call probes."""
        return self.breaker.current_state

    @property
    def retry_after(self) -> float:
        """Seconds until a call may probe; 0 unless open."""
        left = self.changed_at + self.reset_seconds - time.monotonic()
        return max(0.0, left) if self.state == pybreaker.STATE_OPEN else 0.0

    async def call(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Await the attempt, if it is let through. Raises: ExternalServiceError."""
        if self.retry_after > 0 or self.is_probing:
            raise ExternalServiceError("circuit_open", retry_after=self.retry_after)
        if self.state == pybreaker.STATE_OPEN:
            self.breaker.half_open()
        is_probe = self.is_probing = self.state == pybreaker.STATE_HALF_OPEN
        epoch = self.epoch
        try:
            result = await attempt()
            self.report(epoch, None)
            return result
        except ExternalServiceError as exc:
            self.report(epoch, exc if exc.is_failure else None)
            raise
        finally:
            if is_probe:
                self.is_probing = False

    def report(self, epoch: int, failure: Optional[ExternalServiceError]) -> None:
        def outcome() -> None:
            if failure:
                raise failure

        if epoch == self.epoch:
            with contextlib.suppress(ExternalServiceError):
                self.breaker.call(outcome)


class ExternalClient:
    """Fetches JSON from an API that may fail, hang or lie."""

    def __init__(self, settings: Settings, transport: Optional[httpx.AsyncBaseTransport]) -> None:
        self.settings, self.url = settings, str(settings.external_api_url or "http://demo/")
        self.circuit = Circuit(settings.breaker_fail_max, settings.breaker_reset_seconds)
        no_limits = httpx.Limits(max_connections=None)  # waiting for one would look like a failure
        self.http = httpx.AsyncClient(
            transport=transport, timeout=None, limits=no_limits, trust_env=False
        )
        self.http.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # none are kept

    async def fetch(self) -> Any:
        """Return the upstream's JSON. Raises: ExternalServiceError, that of the last attempt."""
        settings, circuit = self.settings, self.circuit
        ends = time.monotonic() + settings.external_deadline_seconds
        jitter = tenacity.wait_random_exponential(multiplier=0.1, max=1)  # "full", from 0 seconds

        def is_worth_a_retry(exc: BaseException) -> bool:
            can_retry = isinstance(exc, ExternalServiceError) and exc.retry
            return can_retry and circuit.state == pybreaker.STATE_CLOSED

        def wait(retry: tenacity.RetryCallState) -> float:
            asked = getattr(retry.outcome and retry.outcome.exception(), "wait", None)
            return jitter(retry) if asked is None else float(asked)

        async def attempt() -> Any:
            limit = min(settings.external_timeout_seconds, ends - time.monotonic())
            return await circuit.call(lambda: self.get(limit))

        deadline = tenacity.stop_before_delay(settings.external_deadline_seconds)
        stop = tenacity.stop_after_attempt(settings.external_attempts) | deadline
        retry = tenacity.retry_if_exception(is_worth_a_retry)
        # One for each call: a shared one would mix the states of its callers.
        retrying = tenacity.AsyncRetrying(stop=stop, wait=wait, retry=retry, reraise=True)
        return await retrying(attempt)

    async def get(self, limit: float) -> Any:
        """One attempt, `limit` seconds from first to last byte. Raises: ExternalServiceError."""
        headers = {"Accept-Encoding": "gzip", "X-Request-ID": request_id.get()}
        try:
            with anyio.fail_after(limit):
                async with self.http.stream("GET", self.url, headers=headers) as response:
                    self.check_status(response)
                    return await self.read_json(response)
        except TimeoutError:
            raise ExternalServiceError("external_timeout", retry=True) from None
        except httpx.TransportError:
            raise ExternalServiceError(retry=True) from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, zlib.error):  # it sent nonsense
            raise ExternalServiceError from None

    def check_status(self, response: httpx.Response) -> None:
        """Let successes pass that have a body. Raises: ExternalServiceError."""
        status, wait = response.status_code, response.headers.get("Retry-After", "")
        if status >= 500 or status in (408, 429):
            asked = float(wait) if re.fullmatch(r"[0-9]{1,9}", wait) else None
            raise ExternalServiceError(retry=True, wait=asked)
        if not 200 <= status < 300 or status == 204:
            raise ExternalServiceError(is_failure=status < 400)  # a 4xx is a sign of life

    async def read_json(self, response: httpx.Response) -> Any:
        """Read 1 MiB at most, inflated too (httpx has no bound there). Raises: ValueError."""
        body = b""
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MAX_UPSTREAM_BYTES:
                raise ValueError("too large")
        if response.headers.get("Content-Encoding") == "gzip":
            gzip = zlib.decompressobj(wbits=31)
            body = gzip.decompress(body, MAX_UPSTREAM_BYTES)
            if not gzip.eof:
                raise ValueError("too large, or cut off")
        data = from_json(body, allow_inf_nan=False)
        json.dumps(data, allow_nan=False)  # 1e999 is infinite too, and cannot be passed on
        return data


class DemoUpstream:
    """An upstream in this process, so that nothing else is needed; `failing` makes it fail."""

    failing = False

    def __call__(self, request: httpx.Request) -> httpx.Response:
        answer = httpx.ByteStream(b'{"message": "Hello from the demo upstream."}')
        return httpx.Response(503 if self.failing else 200, stream=answer)


# ======================================================================================
# 6 Security
# Passwords: bcrypt, in as many threads as there are cores; a bounded number waits, the rest is
# told to come back. Throttle: counted in the database before anything is hashed. Tokens: JWT
# with one algorithm; what ends them early is the user's token_version. No reset, no MFA: they
# need a second channel to the user.
# ======================================================================================

MAX_PASSWORD_LENGTH = 128  # characters, normalised
BCRYPT_HASH = re.compile(r"\$2[aby]\$(0[4-9]|1[0-5])\$[./A-Za-z0-9]{53}")  # no absurd cost


def normalise_password(password: str) -> str:
    return unicodedata.normalize("NFC", password)


def digest_password(password: str) -> bytes:
    """64 bytes of the 72 that bcrypt sees, so that every character counts. The key: digests
    leaked elsewhere are no help in guessing."""
    normalised = normalise_password(password).encode()
    return hmac.digest(b"service.py: password", normalised, "sha256").hex().encode()


class Passwords:
    """Hashes and checks passwords without being felt by other requests."""

    def __init__(self, rounds: int) -> None:
        cores = os.cpu_count() or 1
        self.rounds, self.places = rounds, 16 * cores  # the last waits four seconds, at cost 12
        self.threads = ThreadPoolExecutor(cores, thread_name_prefix="bcrypt")
        self.decoy = self.hash_now(secrets.token_hex())

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place among those who may hash. Raises: overloaded, at once, if none is left."""
        if not self.places:
            raise ServiceError("overloaded", retry_after=2)
        self.places -= 1
        try:
            yield
        finally:
            self.places += 1

    async def hash(self, password: str) -> str:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, self.hash_now, password)

    async def verify(self, password: str, stored: Optional[str]) -> bool:
        """Without a hash, or with a damaged one, take as long and say no."""
        usable = BCRYPT_HASH.fullmatch(stored or "")
        known = (usable.group() if usable else self.decoy).encode()
        check = lambda: bcrypt.checkpw(digest_password(password), known)  # noqa: E731
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, check) and usable is not None

    def hash_now(self, password: str) -> str:
        return bcrypt.hashpw(digest_password(password), bcrypt.gensalt(self.rounds)).decode()

    def is_outdated(self, stored: str) -> bool:
        """Whether the hash is cheaper than BCRYPT_ROUNDS asks for."""
        return int(stored[4:6]) < self.rounds


async def admit_attempt(
    db: Database, settings: Settings, email: str, address: str, user_id: Optional[str] = None
) -> None:
    """Count an attempt as failed, until it is forgiven. Raises: too_many_attempts.

    The address comes first, so that one address cannot use up what is left to all ('*').
    """
    now = int(time.time())
    for place, limit in ((address, 1), ("*", 10)):
        row = await db.count_attempt(email, place, now, now + settings.login_window_seconds)
        if row["attempts"] == 1:
            await db.delete_ended_windows(now)
        if row["attempts"] > limit * settings.login_max_failures:
            log_event("login_throttled", user_id, level=logging.WARNING)
            raise AuthError("too_many_attempts", retry_after=row["window_ends_at"] - now)


class Tokens:
    """Issues and verifies JWTs (RFC 7519) as RFC 8725 advises."""

    claims = ["iss", "aud", "sub", "iat", "exp", "jti", "ver"]

    def __init__(self, secret: str, expires_seconds: int) -> None:
        self.secret, self.expires_seconds = secret, expires_seconds

    def issue(self, user: Row) -> str:
        now = int(time.time())
        times = {"iat": now, "exp": now + self.expires_seconds}
        names = {"iss": "service", "aud": "service", "sub": user["id"], "jti": uuid.uuid4().hex}
        claims = {**names, **times, "ver": user["token_version"]}
        return jwt.encode(claims, self.secret, algorithm="HS256")

    def verify(self, token: str) -> dict[str, Any]:
        """Return the claims, all checked but `ver`. Raises: expired_token, invalid_token."""
        options = {"require": self.claims}
        names = {"issuer": "service", "audience": "service"}
        try:
            claims = jwt.decode(token, self.secret, ["HS256"], options=options, **names)
            uuid.UUID(claims["sub"])
            return claims
        except jwt.ExpiredSignatureError:
            raise AuthError("expired_token") from None
        except Exception:  # a hostile token makes more raise than PyJWT (RecursionError, say)
            raise AuthError("invalid_token") from None


class Services(NamedTuple):
    """What lives as long as the process: app.state.services."""

    settings: Settings
    db: Database
    external: ExternalClient
    demo: DemoUpstream
    passwords: Passwords
    tokens: Tokens


# ======================================================================================
# 7 Middleware
# Plain ASGI, outermost first. What they learn, they tell the routes through scope["state"].
# ======================================================================================

BODY_SECONDS = 5  # for a whole body to arrive
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
AUTH, EXTERNAL = "/api/v1/auth", "/api/v1/external"
PUBLIC_PATHS = {  # everything else needs a token
    *(f"{AUTH}/register", f"{AUTH}/login", "/health/live", "/health/ready", "/demo/upstream"),
    *("/docs", "/redoc", "/openapi.json"),
}


def client_address(scope: Scope) -> str:
    """The peer; behind a proxy that uvicorn trusts, what that says."""
    return scope["client"][0] if scope.get("client") else "-"


class RequestContext:
    """Gives a request its id, its access record and, whatever happens, an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 0
        sent_id = Headers(scope=scope).get("x-request-id", "")
        request_id.set(sent_id if REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex)
        state = scope.setdefault("state", {})

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.get().encode()))
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as exc:
            error = exc if isinstance(exc, ServiceError) else ServiceError("internal_error")
            if error is not exc:
                logger.exception("unhandled error")
            if not status:
                await problem_response(error)(scope, receive, send_with_id)
        finally:
            method, path = scope["method"], scope["raw_path"].decode("ascii", "backslashreplace")
            ms = round((time.perf_counter() - began) * 1000, 2)
            fields = {"method": method, "path": path, "status": status, "duration_ms": ms}
            fields.update(client=client_address(scope), user_id=state.get("user_id"))
            logger.info("%s %s %s %s ms", method, path, status, ms, extra={"fields": fields})


class BodyLimit:
    """Bounds a body in size and time; a request without one is passed on as it is."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        if "content-length" not in headers and "transfer-encoding" not in headers:
            return await self.app(scope, receive, send)
        if int(headers.get("content-length", 0)) > self.max_bytes:
            raise ServiceError("body_too_large")
        ends, left, is_complete = time.monotonic() + BODY_SECONDS, self.max_bytes, False

        async def limited_receive() -> Message:
            nonlocal left, is_complete
            try:
                with anyio.fail_after(None if is_complete else ends - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise ServiceError("request_timeout") from None
            left -= len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if left < 0:
                raise ServiceError("body_too_large")
            return message

        await self.app(scope, limited_receive, send)


class TokenCheck:
    """Closed by default: without a valid token, only PUBLIC_PATHS are served."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if scope["path"][len(scope.get("root_path", "")) :] not in PUBLIC_PATHS:
                await self.authenticate(scope)
        await self.app(scope, receive, send)

    async def authenticate(self, scope: Scope) -> None:
        """Find the token's user. Raises: not_authenticated, invalid_token, expired_token."""
        services: Services = scope["app"].state.services
        sent = Headers(scope=scope).getlist("authorization")
        scheme, _, token = "".join(sent[:1]).partition(" ")
        if len(sent) < 2 and scheme.lower() != "bearer":
            routes = scope["app"].routes
            if any(route.matches(scope)[0] is Match.FULL for route in routes):
                raise AuthError("not_authenticated")
            return  # there is nothing to protect: 404 or 405
        try:
            claims = services.tokens.verify(token.strip() if len(sent) == 1 else "")
            user = await services.db.find_user_by_id(claims["sub"])
            if user is None or user["token_version"] != claims["ver"]:
                raise AuthError("invalid_token")
        except AuthError as exc:
            log_event("token_refused", None, f"token_refused: {exc.code}", logging.WARNING)
            raise
        scope["state"].update(user=user, user_id=user["id"])


# ======================================================================================
# 8 Routes
# A route validates by its model, calls the database or the client, and returns a model. To add
# one: models, a function, problems(...) for what it can raise. It needs a token, unless its
# path stands in PUBLIC_PATHS.
# ======================================================================================

BODY = ("request_timeout", "body_too_large", "invalid_request")
TOKEN = ("not_authenticated", "invalid_token", "expired_token")


class FieldError(BaseModel):
    loc: list[Any]
    msg: str
    type: str


class Problem(BaseModel):
    """Any error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str = Field(description="What to do next, for people.")
    code: str = Field(description="A stable word, for programs.")
    request_id: str = Field(description="As in X-Request-ID: it finds the request in the log.")
    errors: Optional[list[FieldError]] = Field(None, description="With 422: where, and why.")


def problems(*codes: str) -> dict[Any, dict[str, Any]]:
    """The `responses` of a route: its own errors and those that every route can give."""
    responses: dict[Any, dict[str, Any]] = {}
    for code in (*codes, "internal_error", "database_unavailable"):
        status, sentence = ERRORS[code]
        content = {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}
        default = {"description": sentence, "content": {"application/problem+json": content}}
        response = responses.setdefault(status, default)["content"]["application/problem+json"]
        response["examples"][code] = {"value": describe_problem(ServiceError(code))}
    return responses


async def get_services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


async def get_user(request: Request) -> Row:
    """Whom TokenCheck has found."""
    return cast(Row, request.state.user)


def normalise_email(value: str) -> str:
    """Check the syntax, no display names, and lower the case: one address, one spelling."""
    try:
        return validate_email(value, check_deliverability=False).normalized.lower()
    except EmailNotValidError:  # its text repeats parts of the value
        raise PydanticCustomError("email", "This is not an email address.") from None


def check_new_password(field: str, password: str, settings: Settings) -> None:
    """Raises: ValidationError."""
    shortest, longest = settings.password_min_length, MAX_PASSWORD_LENGTH
    if not shortest <= len(normalise_password(password)) <= longest:
        why = f"A password has {shortest} to {longest} characters."
        raise ValidationError([{"loc": ["body", field], "msg": why, "type": "password_length"}])


CurrentServices = Annotated[Services, Depends(get_services)]
CurrentUser = Annotated[Row, Depends(get_user)]
EmailField = Field(max_length=320, examples=["ada@example.com"])
Email = Annotated[str, EmailField, pydantic.AfterValidator(normalise_email)]
# NFC leaves a quarter of the characters at least. A bound, because it is slow on what is long.
Password = Annotated[str, Field(max_length=512, examples=["correct horse battery staple"])]

auth = APIRouter(prefix=AUTH, tags=["auth"])
external = APIRouter(prefix=EXTERNAL, tags=["external"])
health = APIRouter(prefix="/health", tags=["health"])
demo = APIRouter(prefix="/demo", tags=["demo"])


class NewAccount(BaseModel):
    email: Email
    password: Password


class Credentials(BaseModel):
    email: Email
    password: Password


class UserResponse(BaseModel):
    id: uuid.UUID
    email: str = EmailField
    created_at: datetime


class TokenResponse(BaseModel):
    access_token: str
    token_type: Literal["bearer"] = "bearer"
    expires_in: int = Field(description="Seconds.")


class PasswordChange(BaseModel):
    current_password: Password
    new_password: Password


@auth.post("/register", status_code=201, responses=problems("email_taken", "overloaded", *BODY))
async def register(account: NewAccount, services: CurrentServices) -> UserResponse:
    """Create an account. The email is kept in lower case; a 201 means that it is on disk."""
    check_new_password("password", account.password, services.settings)
    with services.passwords.place():
        password_hash = await services.passwords.hash(account.password)
    user = await services.db.insert_user(account.email, password_hash)
    if user is None:
        raise ServiceError("email_taken")
    log_event("user_registered", user["id"])
    return UserResponse(**user)


@auth.post(
    "/login", responses=problems("invalid_credentials", "too_many_attempts", "overloaded", *BODY)
)
async def log_in(
    credentials: Credentials, services: CurrentServices, request: Request, response: Response
) -> TokenResponse:
    """Exchange email and password for a token; paste it under "Authorize" to try the rest.

    An unknown email and a wrong password get the same answer in the same time. After
    LOGIN_MAX_FAILURES even the right password has to wait for LOGIN_WINDOW_SECONDS.
    """
    db, passwords, address = services.db, services.passwords, client_address(request.scope)
    with passwords.place():
        await admit_attempt(db, services.settings, credentials.email, address)
        user = await db.find_user_by_email(credentials.email)
        is_right = await passwords.verify(credentials.password, user and user["password_hash"])
        if not is_right or user is None:
            log_event("login_failed", user and user["id"], level=logging.WARNING)
            raise AuthError("invalid_credentials")
        if passwords.is_outdated(user["password_hash"]):
            renewed = await passwords.hash(credentials.password)
            await db.replace_hash(user["id"], user["password_hash"], renewed, end_sessions=False)
    await db.forgive_attempt(credentials.email, address)
    log_event("login_succeeded", user["id"])
    response.headers["Cache-Control"] = "no-store"
    tokens = services.tokens
    return TokenResponse(access_token=tokens.issue(user), expires_in=tokens.expires_seconds)


@auth.get("/me", responses=problems(*TOKEN))
async def show_account(user: CurrentUser) -> UserResponse:
    """Whose token is it?"""
    return UserResponse(**user)


@auth.put(
    "/password",
    status_code=204,
    responses=problems("wrong_password", "too_many_attempts", "overloaded", *TOKEN, *BODY),
)
async def change_password(
    change: PasswordChange, user: CurrentUser, services: CurrentServices, request: Request
) -> None:
    """Replace the password and end every session, this one too."""
    check_new_password("new_password", change.new_password, services.settings)
    db, passwords, address = services.db, services.passwords, client_address(request.scope)
    with passwords.place():
        await admit_attempt(db, services.settings, user["email"], address, user["id"])
        if not await passwords.verify(change.current_password, user["password_hash"]):
            log_event("login_failed", user["id"], "wrong current password", logging.WARNING)
            raise AuthError("wrong_password")
        renewed = await passwords.hash(change.new_password)
    if not await db.replace_hash(user["id"], user["password_hash"], renewed, end_sessions=True):
        raise AuthError("invalid_token")  # another change was quicker, and ended this session
    await db.forgive_attempt(user["email"], address)
    log_event("password_changed", user["id"])


@auth.post("/logout", status_code=204, responses=problems(*TOKEN))
async def log_out(user: CurrentUser, services: CurrentServices) -> None:
    """End every session: all tokens issued to the user until now stop working."""
    await services.db.end_sessions(user["id"])
    log_event("logged_out", user["id"])


class ExternalData(BaseModel):
    data: Any = Field(examples=[{"message": "Hello from the demo upstream."}])


class CircuitStatus(BaseModel):
    state: Literal["closed", "open", "half-open"]
    failures: int = Field(description="Failed attempts in a row.")
    fail_max: int = Field(description="As many open the circuit.")
    retry_after_seconds: int = Field(description="Until a call may probe; 0 unless open.")


@external.get(
    "/data",
    responses=problems("external_service_error", "circuit_open", "external_timeout", *TOKEN),
)
async def fetch_external_data(user: CurrentUser, services: CurrentServices) -> ExternalData:
    """Call the external API: with retries, within a deadline, behind a circuit breaker."""
    return ExternalData(data=await services.external.fetch())


@external.get("/status", responses=problems(*TOKEN))
async def show_circuit(user: CurrentUser, services: CurrentServices) -> CircuitStatus:
    """The circuit of the process that answers. Open stays open until a call probes."""
    circuit = services.external.circuit
    return CircuitStatus(
        state=circuit.state,
        failures=circuit.breaker.fail_counter,
        fail_max=circuit.breaker.fail_max,
        retry_after_seconds=math.ceil(circuit.retry_after),
    )


class Liveness(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(Liveness):
    schema_version: int = Field(description="The last migration that has run.")


@health.get("/live", responses=problems())
async def check_liveness() -> Liveness:
    """The process answers."""
    return Liveness()


@health.get("/ready", responses=problems())
async def check_readiness(services: CurrentServices) -> Readiness:
    """The database answers too."""
    return Readiness(schema_version=await services.db.find_schema_version())


class DemoSwitch(BaseModel):
    failing: bool


@demo.put("/upstream", status_code=204, responses=problems(*BODY))
async def switch_demo_upstream(switch: DemoSwitch, services: CurrentServices) -> None:
    """Make the demo upstream fail, or heal it (in development, without EXTERNAL_API_URL).

    Failing: fetch external data twice, and the circuit opens. Healed: wait for
    BREAKER_RESET_SECONDS, fetch again, and it closes.
    """
    services.demo.failing = switch.failing


# ======================================================================================
# 9 App
# The lifespan opens what lives as long as the process, in the order of need, and closes it in
# the reverse order, after uvicorn has answered what was begun (SIGTERM).
# ======================================================================================


async def choose_secret(settings: Settings, db: Database) -> str:
    if settings.jwt_secret is not None:
        return settings.jwt_secret.get_secret_value()
    if settings.environment == "test":
        return secrets.token_hex(32)
    logger.warning("JWT_SECRET is not set: a random one is used, and kept in the database")
    return await db.keep_secret("jwt_secret", secrets.token_hex(32))


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings, upstream = app.state.settings, DemoUpstream()
    transport = app.state.transport
    if transport is None and settings.external_api_url is None:
        transport = httpx.MockTransport(upstream)
    async with contextlib.AsyncExitStack() as opened:
        db = await open_database(settings, opened)
        tokens = Tokens(await choose_secret(settings, db), settings.jwt_expires_seconds)
        client = ExternalClient(settings, transport)
        await opened.enter_async_context(client.http)
        passwords = Passwords(settings.bcrypt_rounds)
        opened.callback(passwords.threads.shutdown, wait=False)
        app.state.services = Services(settings, db, client, upstream, passwords, tokens)
        yield


class StartMessage:
    """Cuts Starlette's traceback of a failed start down to the sentence of the StartError."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_sentence(message: Message) -> None:
            _, is_ours, sentence = message.get("message", "").partition("StartError: ")
            if is_ours:
                message = {**message, "message": f"service: not started: {sentence.strip()}"}
            await send(message)

        await self.app(scope, receive, send_sentence if scope["type"] == "lifespan" else send)


def describe_api(app: FastAPI) -> dict[str, Any]:
    """FastAPI's openapi.json, with the error shape, the lengths of passwords, and the locks."""
    if app.openapi_schema:
        return app.openapi_schema
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    template = "#/components/schemas/{model}"
    _, shapes = models_json_schema([(Problem, "serialization")], ref_template=template)
    models = schema["components"]["schemas"]
    models.update(shapes["$defs"])
    lengths = {"minLength": app.state.settings.password_min_length, "maxLength": 128}
    models["NewAccount"]["properties"]["password"].update(lengths)
    models["PasswordChange"]["properties"]["new_password"].update(lengths)
    schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"token": []}]  # closed by default, as TokenCheck is
    for path in PUBLIC_PATHS & schema["paths"].keys():
        for operation in schema["paths"][path].values():
            operation["security"] = []
    app.openapi_schema = schema
    return schema


def create_app(settings: Settings, transport: Optional[httpx.AsyncBaseTransport] = None) -> FastAPI:
    """Put everything together; `transport` stands in for the network to the external API."""
    configure_logging(settings)
    app = FastAPI(
        title="service",
        version="1.0.0",
        lifespan=lifespan,
        redirect_slashes=False,  # it would redirect to whatever the Host header says
        swagger_ui_oauth2_redirect_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.settings, app.state.transport = settings, transport
    for router in (auth, external, health, *([demo] if settings.has_demo_switch else [])):
        app.include_router(router)
    app.openapi = lambda: describe_api(app)  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, handle_http_exception)
    app.add_exception_handler(RequestValidationError, handle_validation_error)
    app.add_middleware(TokenCheck)  # innermost first
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(RequestContext)
    app.add_middleware(StartMessage)
    return app


app = create_app(load_settings())
