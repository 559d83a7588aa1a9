"""A small service to read, run and copy: accounts, tokens, and a client for an unstable API.

The path of a request, which the second half of this file follows:

    uvicorn > RequestContext > route > a few statements > the answer
              request id,            > the external client
              body limit,              (retries, circuit breaker)
              token check, access record, the answer to every error

First the vocabulary: 1 Settings, 2 Logging, 3 Errors, 4 Database, 5 External client, 6 Security.
Then the request: 7 Middleware, 8 Routes, 9 App. Nothing is used before it is defined."""

import asyncio
import hmac
import json
import logging
import math
import os
import pathlib
import queue
import re
import sqlite3
import threading
import time
import unicodedata
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Annotated, Any, Literal, NamedTuple, Optional, cast

import anyio
import asyncpg  # type: ignore[import-untyped]
import bcrypt
import httpx
import jwt
import sqlalchemy
import tenacity
from databases import Database as Driver, DatabaseURL
from email_validator import SPECIAL_USE_DOMAIN_NAMES, EmailNotValidError, validate_email
from fastapi import APIRouter, Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pybreaker import CircuitBreaker, CircuitBreakerListener
from pydantic import AfterValidator, AnyHttpUrl, BaseModel, BeforeValidator, Field, SecretStr
from pydantic_core import from_json, to_json
from pydantic_settings import BaseSettings, SettingsConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# ==== 1 Settings ======================================================================
# Read once, at start: the environment wins over `.env`; an empty value counts as unset.
# To add one: a field, a line in `.env.example`, a row in the README. SERVER: user:pass@host/db
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
SERVER = r"([^][/?#@:]+(:[^][/?#@:]*)?@)?([^][/?#@:]+|\[[\da-f:]+\])(:\d+)?/[^][/?#@:]+"
URL = rf"sqlite:///[^:?#][^?#]*|postgresql://(?=[!-~]+$){SERVER}(\?(&?(ssl|max_size)=[\w-]+)+)?"


class Settings(BaseSettings):
    """Every knob. Raises: pydantic.ValidationError."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore")
    environment: Literal["development", "production", "test"] = "development"
    database_url: str = "sqlite:///service.db"  # or postgresql://user:password@host/name
    database_timeout_seconds: Seconds = 5  # one statement, all its waits included; then 503
    jwt_secret: Optional[SecretStr] = None  # None: a random one; required in production
    jwt_expires_seconds: Annotated[int, Field(ge=1, le=315_360_000)] = 86400
    bcrypt_rounds: Annotated[int, Field(ge=4, le=15)] = 12  # 0.25 s; one more doubles it
    password_min_length: Annotated[int, Field(ge=1, le=128)] = 8  # characters, of new passwords
    login_max_failures: Count = 5  # failed logins per email and address, in one window
    login_window_seconds: Count = 300
    max_body_bytes: Annotated[int, Field(ge=1, le=2**30)] = 65536  # a larger body: 413
    external_api_url: Optional[AnyHttpUrl] = None  # None: the demo upstream
    external_timeout_seconds: Seconds = 2  # one attempt, from first to last byte
    external_deadline_seconds: Seconds = 5  # the whole call, attempts and waits
    external_attempts: Annotated[int, Field(ge=1, le=20)] = 3
    breaker_fail_max: Count = 5  # failed attempts in a row that open the circuit
    breaker_reset_seconds: Seconds = 30  # how long it stays open before one probe
    log_level: Annotated[Level, BeforeValidator(str.upper)] = "INFO"
    log_format: Literal["text", "json"] = "text"

    def model_post_init(self, _: Any) -> None:
        """Checks that a type cannot make. The key: no shorter than its hash (RFC 7518, 3.2)."""
        if not re.fullmatch(URL, self.database_url):
            raise ValueError("DATABASE_URL: use sqlite:///path or postgresql://user:pass@host/db")
        if self.jwt_secret and len(os.fsencode(self.jwt_secret.get_secret_value())) < 32:
            raise ValueError("JWT_SECRET must have 32 bytes or more; try: openssl rand -hex 32")
        missing = [n for n in ("jwt_secret", "external_api_url") if getattr(self, n) is None]
        if missing and self.environment == "production":
            raise ValueError(f"{', '.join(missing).upper()}: required in production")


def load_settings() -> Settings:
    """Read the settings, or end the process: one message names the variables, never a value."""
    try:
        return Settings()
    except (ValueError, OSError) as exc:  # pydantic's, or that of the file
        errors = getattr(exc, "errors", lambda: [{"loc": [".env"], "msg": "cannot be read"}])()
        wrong = [f"{' '.join(map(str, e['loc'])).upper()} {e['msg']}".strip() for e in errors]
        text = "; ".join(wrong).replace("Value error, ", "")
        raise SystemExit(f"service: not started: {text}") from None


# ==== 2 Logging =======================================================================
# One line a record, to stdout. A reader that stalls never stalls the service: past 10,000 waiting
# lines, new ones are dropped and counted. Other libraries: WARNING and up, as DEBUG shows values.
logger = logging.getLogger("service")
request_id: ContextVar[str] = ContextVar("request_id", default="-")


class StdoutHandler(logging.Handler):
    """Hands each line to a thread; only that thread ever waits for whoever reads stdout."""

    def __init__(self, log_format: str, limit: int = 10_000) -> None:
        super().__init__()
        self.log_format, self.limit, self.dropped = log_format, limit, 0
        self.tasks: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        threading.Thread(target=self.work, name="log", daemon=True).start()

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object; or text, in which only the service itself can begin a line."""
        # Starlette hands over a failed start as a traceback; the sentence at its end is enough.
        message = re.split("(?:Start|Service)Error: ", record.getMessage())[-1].strip()
        dropped, self.dropped = self.dropped, 0
        message += f" ({dropped} records before this were dropped)" if dropped else ""
        moment = datetime.fromtimestamp(record.created, timezone.utc).isoformat()
        entry = {"time": moment, "level": record.levelname, "logger": record.name}
        entry.update(message=message, request_id=request_id.get(), **getattr(record, "fields", {}))
        if record.exc_info:
            entry["traceback"] = logging.Formatter().formatException(record.exc_info)
        if self.log_format == "json":
            return json.dumps(entry, default=str)
        lines = [json.dumps(message)[1:-1], *entry.get("traceback", "").splitlines()]
        return "{time} {level:8} [{request_id}] ".format(**entry) + "\n    ".join(lines)

    def emit(self, record: logging.LogRecord) -> None:
        if self.tasks.qsize() >= self.limit:
            self.dropped += 1
        else:
            line = (self.format(record) + "\n").encode(errors="backslashreplace")
            self.tasks.put(lambda: os.write(1, line))

    def flush(self) -> None:
        """Wait for the lines so far, one second at most. Called when the service stops."""
        done = threading.Event()
        self.tasks.put(done.set)
        done.wait(1)

    def work(self) -> None:
        while True:
            with suppress(OSError):  # the reader has gone, and with it the line
                self.tasks.get()()


def configure_logging(settings: Settings) -> None:
    """All through one handler, uvicorn's too. CRITICAL counts as ERROR: a failed start is said."""
    logging.basicConfig(handlers=[StdoutHandler(settings.log_format)], level="WARNING", force=True)
    for name in ("service", "uvicorn", "uvicorn.error", "uvicorn.access"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [], name != "uvicorn.access"
        log.setLevel(min(logging.getLevelName(settings.log_level), logging.ERROR))


def log_event(event: str, user_id: str = "", detail: str = "", level: int = logging.INFO) -> None:
    """An event: a word for programs, the id of the user concerned, and nothing secret."""
    fields = {"event": event, "user_id": user_id or None}
    logger.log(level, " ".join(filter(None, (event, user_id, detail))), extra={"fields": fields})


# ==== 3 Errors ========================================================================
# Code that meets an error raises it by its code word; only `problem_response` makes answers.
# To add one: a line in ERRORS, a raise, and its code word in the answers() of the route.
ERRORS = {  # code (a stable word, for programs): status, what to do next (for people)
    "not_authenticated": (401, "No token was sent: log in, send Authorization: Bearer <token>."),
    "invalid_token": (401, "The token is not valid, or no longer valid; log in again."),
    "expired_token": (401, "The token has expired; log in again."),
    "invalid_credentials": (401, "The email or the password is wrong."),
    "wrong_password": (403, "The current password is wrong; nothing was changed."),
    "not_found": (404, "There is nothing at this path; see /docs."),
    "method_not_allowed": (405, "This path does not take this method; see the Allow header."),
    "request_timeout": (408, "The body did not arrive in time; send it again, faster."),
    "email_taken": (409, "This email already has an account; log in instead."),
    "body_too_large": (413, "The body is too large."),
    "invalid_request": (422, "The request is not valid; see errors."),
    "too_many_attempts": (429, "Too many failed attempts; wait as long as Retry-After says."),
    "internal_error": (500, "Something broke on our side; the request id finds it in the log."),
    "external_service_error": (502, "The external service failed; try again later."),
    "circuit_open": (503, "The external service keeps failing; wait as long as Retry-After says."),
    "database_unavailable": (503, "The database does not answer; a write may or may not be done."),
    "overloaded": (503, "Too many passwords are waiting to be checked; try again."),
    "external_timeout": (504, "The external service did not answer in time; try again later."),
}


class ServiceError(HTTPException):
    def __init__(self, code: str, retry_after: int = 0, **members: Any) -> None:
        """`retry_after` in seconds; `members`: more of the body, never the client's own words."""
        (status, detail), headers = ERRORS[code], {}
        if status in (429, 503):
            headers["Retry-After"] = str(max(1, retry_after))
        if status == 401:  # RFC 6750, 3: with `error` only if a token was sent
            error = ', error="invalid_token"' if code.endswith("_token") else ""
            headers["WWW-Authenticate"] = f'Bearer realm="service"{error}'
        super().__init__(status, detail, headers)
        self.code, self.retry_after, self.members = code, retry_after, members

    def describe(self) -> dict[str, Any]:  # as RFC 9457 does
        title, rid = HTTPException(self.status_code).detail, request_id.get()
        body = {"type": "about:blank", "title": title, "status": self.status_code}
        return {**body, "detail": self.detail, "code": self.code, "request_id": rid, **self.members}


class AuthError(ServiceError): ...  # who is asking, and may they?


class ValidationError(ServiceError): ...  # what was sent is not what is asked for


class ExternalServiceError(ServiceError): ...  # what the external API did


def problem_response(exc: Exception) -> Response:
    """Answer any exception in the one shape: ours, Starlette's, FastAPI's, and a bug."""
    error, status = cast(Any, exc), exc.status_code if isinstance(exc, HTTPException) else 500
    if status == 400:  # FastAPI could not read the body
        exc = RequestValidationError([{"loc": ["body"], "msg": "No JSON.", "type": "json_invalid"}])
    if isinstance(exc, RequestValidationError):
        errors = [{name: e[name] for name in ("loc", "msg", "type")} for e in exc.errors()]
        error = ValidationError("invalid_request", errors=errors)
    elif not isinstance(exc, ServiceError):
        codes = {404: "not_found", 405: "method_not_allowed"}
        error = ServiceError(codes.get(status, "internal_error"))
        error.headers = getattr(exc, "headers", None) if status in codes else None  # Allow
    body, content_type = to_json(error.describe()), "application/problem+json"
    return Response(body, error.status_code, error.headers, content_type)


def answers(*errors: Any) -> dict[Any, Any]:
    """What openapi.json says of these errors, given by code or status: an example for each code."""
    described, shape = {}, {"$ref": "#/components/schemas/Problem"}
    named = [ServiceError(code) for code in ERRORS if code in errors or ERRORS[code][0] in errors]
    for status in sorted({error.status_code for error in named}):
        these = [error for error in named if error.status_code == status]
        examples = {e.code: {"value": {**e.describe(), "request_id": "-"}} for e in these}
        content = {"application/problem+json": {"schema": shape, "examples": examples}}
        described[str(status)] = {"description": ", ".join(examples), "content": content}
    return described


# ==== 4 Database ======================================================================
# Raw SQL through `databases`, one method per statement: constraints keep promises; no transaction
# stays open. SQLite: two held connections, so reads go on while a write waits. PostgreSQL: a pool.
Row = dict[str, Any]
SCHEMA = pathlib.Path(__file__).with_name("schema.sql")
POSTGRES_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
DRIVER_ERRORS = (*POSTGRES_ERRORS, sqlite3.Error, OSError, asyncio.TimeoutError)


class StartError(Exception): ...  # the text says why the service cannot start, without secrets


def sql(text: str) -> Callable[..., Awaitable[Row]]:
    """Make a method that runs the SQL: it takes the `:names` and returns the first row, or {}."""

    async def run_sql(self: Any, **values: Any) -> Row:
        lane = self.reads if text.lstrip().startswith("SELECT") else self.writes
        row = await self.run(lane, lambda connection: connection.fetch_one(text, values))
        return dict(row._mapping) if row else {}

    return run_sql


class Database:
    """Every statement; each has `timeout` seconds, waits included. Raises: database_unavailable."""

    def __init__(self, reader: Any, writer: Any, at_once: int, timeout: float) -> None:
        """`reader`, `writer`: return a connection, for `at_once` statements; `timeout`: seconds."""
        self.reads = anyio.Semaphore(at_once), reader
        self.writes = anyio.Semaphore(at_once), writer
        self.timeout, self.asked = timeout, set[str]()  # ids for the next look-up of users

    async def run(self, lane: Any, execute: Callable[[Any], Awaitable[Any]]) -> Any:
        """Wait for a turn and a connection, and let `execute` use it."""
        (turns, connect), begun = lane, list[Any]()

        async def wait_and_execute() -> Any:
            async with turns, connect() as connection:
                begun.append(connection.raw_connection)
                return await execute(connection)

        # A task: to await a cancelled statement can take for ever (PostgreSQL frozen). Out of time,
        # one that queues is cancelled; one that runs is ended by SQLite, or PostgreSQL is cut off.
        task = asyncio.ensure_future(wait_and_execute())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            return await asyncio.wait_for(asyncio.shield(task), self.timeout)
        except DRIVER_ERRORS as exc:
            if not begun:
                task.cancel()
            elif not task.done() and isinstance(begun[0], asyncpg.Connection):
                with suppress(asyncpg.InterfaceError):  # it was released at this very moment
                    begun[0].terminate()
            why = str(exc) if isinstance(exc, sqlite3.Error) else type(exc).__name__
            logger.warning("database: %s", why)  # PostgreSQL's texts quote rows, SQLite's do not
            raise ServiceError("database_unavailable") from None  # nor may a traceback show them

    async def find_user_by_id(self, id: str) -> Row:
        """All who ask before it begins share one statement: each would be a trip to a thread."""
        if not self.asked or self.lookup.done():  # nobody waits, or all waited in vain
            self.lookup: Any = asyncio.ensure_future(self.run(self.reads, self.find_asked))
        self.asked.add(id)
        found: dict[str, Row] = await asyncio.shield(self.lookup)
        return found.get(id, {})

    async def find_asked(self, connection: Any) -> dict[str, Row]:
        asked, self.asked = self.asked, set()  # who asks from now on must see the latest writes
        users = await connection.fetch_all(self.USERS_BY_ID.bindparams(ids=[*asked]))
        return {user["id"]: dict(user._mapping) for user in users}

    USERS_BY_ID = sqlalchemy.text("""
        SELECT id, email, token_version, created_at FROM users WHERE id IN :ids
        """).bindparams(sqlalchemy.bindparam("ids", expanding=True))
    insert_user = sql("""
        INSERT INTO users (id, email, password_hash, created_at)
        VALUES (:id, :email, :password_hash, :created_at)
        ON CONFLICT (email) DO NOTHING RETURNING id, email, created_at""")
    find_user_by_email = sql("""
        SELECT id, password_hash, token_version FROM users WHERE email = :email""")
    replace_hash = sql("""
        UPDATE users SET password_hash = :new_hash, token_version = token_version + :ended
        WHERE id = :id AND token_version = :token_version RETURNING id""")
    end_sessions = sql("UPDATE users SET token_version = token_version + 1 WHERE id = :id")
    count_attempt = sql("""
        INSERT INTO login_attempts (email, address, attempts, window_ends_at)
        VALUES (:email, :address, 1, :ends)
        ON CONFLICT (email, address) DO UPDATE SET attempts = login_attempts.attempts + 1
        RETURNING attempts, window_ends_at""")
    # Takes one attempt back from the address and from the total ('*'), but all from `cleared`.
    forgive_attempt = sql("""
        UPDATE login_attempts SET attempts = CASE address WHEN :cleared THEN 0 ELSE attempts - 1 END
        WHERE email = :email AND address IN (:address, '*') AND attempts > 0""")
    # What ends after `latest`, two windows ahead, was begun by a clock that was wrong.
    delete_ended_windows = sql("""
        DELETE FROM login_attempts WHERE window_ends_at <= :now OR window_ends_at > :latest""")
    # Returns the value that was there first: all workers get the same.
    keep_secret = sql("""
        INSERT INTO secrets (name, value) VALUES (:name, :value)
        ON CONFLICT (name) DO UPDATE SET name = excluded.name RETURNING value""")


async def migrate(connection: Any, begin: str) -> None:
    """Run the sections of schema.sql that this database has not seen, each in one transaction.
    `begin` opens it and locks out other workers. Raises: StartError; the section leaves nothing."""
    raw = connection.raw_connection
    run_script = getattr(raw, "executescript", raw.execute)  # asyncpg's takes scripts, too
    table = "CREATE TABLE IF NOT EXISTS schema_migrations (version BIGINT NOT NULL PRIMARY KEY)"
    await run_script(f"{begin}; {table}; COMMIT")
    _, *parts = re.split(r"(?im)^-- *migration \d+[: ]*(.*)$", SCHEMA.read_text("utf-8"))
    for version, (name, script) in enumerate(zip(parts[::2], parts[1::2]), 1):
        mark = f"INSERT INTO schema_migrations (version) VALUES ({version})"
        is_applied = f"SELECT 1 FROM schema_migrations WHERE version = {version}"
        try:
            if not await connection.fetch_one(is_applied):
                await run_script(f"{begin}; {mark}; {script}\n; COMMIT")
        except DRIVER_ERRORS as exc:
            with suppress(*DRIVER_ERRORS):
                await raw.execute("ROLLBACK")  # not as a script: SQLite would commit first
            if not await connection.fetch_one(is_applied):  # by another worker, meanwhile
                raise StartError(f"schema.sql, migration {version}: {name}: {exc}") from None


async def open_sqlite(url: DatabaseURL, timeout: float, stack: AsyncExitStack) -> Database:
    os.close(os.open(url.database, os.O_RDWR | os.O_CREAT, 0o600))  # for its owner only
    drivers = Driver(url, timeout=timeout), Driver(url, timeout=timeout)  # seconds, for a lock
    reader, writer = [await stack.enter_async_context(d.connection()) for d in drivers]
    await migrate(writer, "BEGIN IMMEDIATE")
    # Workers that switch to WAL at once get "locked". FULL: a 201 survives a power cut.
    retrying = tenacity.retry(stop=tenacity.stop_after_delay(timeout), reraise=True)
    await retrying(writer.fetch_one)("PRAGMA journal_mode = WAL")
    await writer.raw_connection.executescript("PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON")
    return Database(lambda: reader, lambda: writer, 1, timeout)


async def open_postgres(url: DatabaseURL, timeout: float, stack: AsyncExitStack) -> Database:
    lock_limit = {"lock_timeout": str(math.ceil(timeout * 1000))}  # ms: ends what we gave up
    pool = Driver(url, min_size=0, timeout=timeout, server_settings=lock_limit)
    await pool.connect()
    closing = asyncio.wait_for(pool.disconnect(), timeout)  # a frozen server fails nothing else
    stack.push_async_callback(asyncio.gather, closing, return_exceptions=True)
    db = Database(pool.connection, pool.connection, 1000, timeout)  # the pool has the real limit
    await db.run(db.writes, lambda c: migrate(c, "BEGIN; SELECT pg_advisory_xact_lock(7519)"))
    return db


async def open_database(settings: Settings, stack: AsyncExitStack) -> Database:
    """Open and migrate; `stack` closes it. Raises: StartError, with the path or the host."""
    url, timeout = DatabaseURL(settings.database_url), settings.database_timeout_seconds
    try:
        return await (open_sqlite if url.scheme == "sqlite" else open_postgres)(url, timeout, stack)
    except (StartError, ServiceError, *DRIVER_ERRORS, ValueError, OverflowError) as exc:
        place = re.sub("(?<=^postgresql://).*@", "", settings.database_url)
        reason = exc.__context__ if isinstance(exc, ServiceError) else exc  # what `run` keeps back
        why = str(reason).partition("\n")[0] or "no answer in time"
        raise StartError(f"DATABASE_URL: cannot use {place}: {why}") from None


# ==== 5 External client ===============================================================
# One GET: retries within a deadline > the circuit > one attempt in its time > httpx. The deadline
# shortens the last attempt: cancelled, it would be no failure, and the circuit would never open.
MAX_UPSTREAM_BYTES = 2**20
HELLO = httpx.ByteStream(b'{"message": "Hello from the demo upstream."}')


class TransientError(ExternalServiceError): ...  # worth another attempt, after `retry_after`


class RejectionError(ExternalServiceError): ...  # a 4xx: we asked badly; the API is alive


class Circuit(CircuitBreaker, CircuitBreakerListener):
    """pybreaker for coroutines: an attempt is awaited first, then pybreaker is given its result.
    Added: one probe only; who began before a change of state does not count; monotonic time."""

    def __init__(self, fail_max: int, reset_seconds: float) -> None:
        super().__init__(fail_max, exclude=[RejectionError], throw_new_error_on_trip=False)
        self.reset_seconds, self.changed_at, self.is_probing = reset_seconds, 0.0, False
        self.add_listener(self)

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        self.changed_at = time.monotonic()
        log_event("circuit_changed", "", new_state.name, logging.WARNING)

    @property
    def retry_after_seconds(self) -> int:
        """Seconds until a call may probe, rounded up; 0 unless open."""
        left = self.changed_at + self.reset_seconds - time.monotonic()
        return max(0, math.ceil(left)) if self.current_state == "open" else 0

    async def run(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Await the attempt, if it is let through. Raises: ExternalServiceError."""
        if self.retry_after_seconds > 0 or self.is_probing:
            raise ExternalServiceError("circuit_open", self.retry_after_seconds)
        if self.current_state == "open":
            self.half_open()
        state = self.state  # an object that is replaced at each change
        is_probe = self.is_probing = state.name == "half-open"
        outcome = asyncio.get_running_loop().create_future()
        try:
            outcome.set_result(await attempt())
        except ExternalServiceError as exc:
            outcome.set_exception(exc)
        finally:
            self.is_probing = self.is_probing and not is_probe  # the probe gives its place back
        return self.call(outcome.result) if state is self.state else outcome.result()


class ExternalClient:
    """Fetches JSON from an API that may fail, hang or lie."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.url = settings, str(settings.external_api_url or "http://demo/")
        self.circuit = Circuit(settings.breaker_fail_max, settings.breaker_reset_seconds)
        self.demo_status = 200
        demo = httpx.MockTransport(lambda _: httpx.Response(self.demo_status, stream=HELLO))
        transport = None if settings.external_api_url else demo
        limits = httpx.Limits(max_connections=None)  # to wait for one would look like a failure
        self.http = httpx.AsyncClient(transport=transport, trust_env=False, limits=limits)
        self.http.timeout, self.http.event_hooks = None, {"response": [self.check_status]}

    async def fetch(self) -> Any:
        """Return the upstream's JSON. Raises: ExternalServiceError, that of the last attempt."""
        circuit, seconds = self.circuit, self.settings.external_deadline_seconds
        if circuit.retry_after_seconds > 0:  # at once, without the cost of what follows
            raise ExternalServiceError("circuit_open", circuit.retry_after_seconds)
        attempts = tenacity.stop_after_attempt(self.settings.external_attempts)
        deadline, ends = tenacity.stop_before_delay(seconds), time.monotonic() + seconds
        jitter = tenacity.wait_random_exponential(multiplier=0.1, max=1)  # full jitter
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            wait=lambda call: jitter(call) + cast(Any, call.outcome).exception().retry_after,
            stop=lambda call: attempts(call) or deadline(call) or circuit.current_state != "closed",
            reraise=True,
        )
        return await retrying(circuit.run, lambda: self.get(ends))

    async def get(self, ends: float) -> Any:
        """One attempt, within its time and the deadline's. Raises: ExternalServiceError."""
        limit = min(self.settings.external_timeout_seconds, ends - time.monotonic())
        headers = {"Accept-Encoding": "gzip", "X-Request-ID": request_id.get()}
        self.http.cookies.clear()  # or one caller's would be sent for another
        try:
            with anyio.fail_after(limit):
                async with self.http.stream("GET", self.url, headers=headers) as response:
                    return await self.read(response)
        except (TimeoutError, httpx.HTTPError, httpx.InvalidURL, ValueError, zlib.error) as exc:
            logger.warning("upstream: %s", type(exc).__name__)  # no text: it can quote the answer
            code = "external_timeout" if isinstance(exc, TimeoutError) else "external_service_error"
            is_transient = isinstance(exc, (TimeoutError, httpx.TransportError))
            raise (TransientError if is_transient else ExternalServiceError)(code) from None

    async def check_status(self, response: httpx.Response) -> None:
        """Let successes pass, and nothing else, before httpx looks where a redirect leads."""
        status, wait = response.status_code, response.headers.get("Retry-After", "")
        if not response.is_success:
            logger.warning("upstream: status %s", status)
            family = 5 if status in (408, 429) else status // 100
            error = {4: RejectionError, 5: TransientError}.get(family, ExternalServiceError)
            seconds = int(wait) if re.fullmatch(r"[0-9]{1,9}", wait) else 0
            raise error("external_service_error", seconds)

    async def read(self, response: httpx.Response) -> Any:
        """Read 1 MiB at most, inflated too (httpx has no bound there). Raises: ValueError."""
        body, gzip = bytearray(), zlib.decompressobj(wbits=31)
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MAX_UPSTREAM_BYTES:
                raise ValueError("too large")
        if response.headers.get("Content-Encoding", "").lower() in ("gzip", "x-gzip"):
            body = bytearray(gzip.decompress(body, MAX_UPSTREAM_BYTES))
            if not gzip.eof or gzip.unused_data:
                raise ValueError("too large, cut off, or followed by more")
        data = from_json(body)
        json.dumps(data, allow_nan=False)  # NaN and Infinity (1e999) are not JSON
        return data


# ==== 6 Security ======================================================================
# Passwords: bcrypt, one thread per core, a bounded queue. Throttle: counted in the database
# before anything is hashed. Tokens: JWT; a user's token_version ends them. No reset, no MFA.
BCRYPT_HASH = re.compile(r"\$2[aby]\$(0[4-9]|1[0-5])\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")


class Passwords:
    """Hashes and checks passwords without holding up other requests."""

    def __init__(self, rounds: int) -> None:
        cores = os.cpu_count() or 1
        self.rounds, self.threads = rounds, anyio.CapacityLimiter(cores)
        self.places = anyio.Semaphore(16 * cores)  # at cost 12 the last waits four seconds

    def digest(self, password: str) -> bytes:
        """64 bytes: bcrypt reads 72 at most. The key is public: it only makes the digest ours."""
        return hmac.digest(b"service.py: password", password.encode(), "sha256").hex().encode()

    def place(self) -> anyio.Semaphore:
        """A place among those who may hash. Raises: overloaded, at once, if none is left."""
        if not self.places.value:
            raise ServiceError("overloaded", 2)
        return self.places

    async def hash(self, password: str) -> str:
        digest, salt = self.digest(password), bcrypt.gensalt(self.rounds)
        async with self.place():
            raw = await anyio.to_thread.run_sync(bcrypt.hashpw, digest, salt, limiter=self.threads)
        return raw.decode()

    def compare(self, password: str, stored: str) -> bool:
        """Takes the same time with no hash, one damaged or too costly, or one of a lower cost."""
        digest, usable = self.digest(password), BCRYPT_HASH.fullmatch(stored)
        same = bcrypt.checkpw(digest, stored.encode()) if usable else False
        # Costs are powers of two, and 2^a + 2^a + 2^(a+1) + ... + 2^(b-1) = 2^b.
        for cost in range(int(usable[1]), self.rounds) if usable else [self.rounds]:
            bcrypt.checkpw(digest, f"$2b${cost:02}${'.' * 53}".encode())
        return same

    async def verify(self, password: str, stored: str) -> bool:  # needs a place()
        return await anyio.to_thread.run_sync(self.compare, password, stored, limiter=self.threads)


class Services(NamedTuple):  # what lives as long as the process, and works together
    settings: Settings
    db: Database
    external: ExternalClient
    passwords: Passwords
    token_secret: bytes

    async def authenticate(self, email: str, address: str, password: str, refusal: str) -> Row:
        """Return the user; counts as failed until then. Raises: AuthError; too_many_attempts."""
        now, most = int(time.time()), self.settings.login_max_failures
        window = self.settings.login_window_seconds
        async with self.passwords.place():
            await self.db.delete_ended_windows(now=now, latest=now + 2 * window)
            user = await self.db.find_user_by_email(email=email)
            for source, limit in ((address, most), ("*", 10 * most)):  # or one could spend them all
                row = await self.db.count_attempt(email=email, address=source, ends=now + window)
                if row["attempts"] > limit:
                    if source == "*":  # no password was checked: take it back from the address
                        await self.db.forgive_attempt(email=email, address=address, cleared="")
                    log_event("login_throttled", user.get("id", ""), level=logging.WARNING)
                    raise ServiceError("too_many_attempts", row["window_ends_at"] - now)
            if not await self.passwords.verify(password, user.get("password_hash", "")):
                log_event("login_failed", user.get("id", ""), level=logging.WARNING)
                raise AuthError(refusal)
            await self.db.forgive_attempt(email=email, address=address, cleared=address)
        return user

    def check_new_password(self, field: str, password: str) -> None:  # raises: ValidationError
        least = self.settings.password_min_length
        if not least <= len(password) <= 128:
            error = {"msg": f"A password has {least} to 128 characters.", "type": "password_length"}
            raise ValidationError("invalid_request", errors=[{"loc": ["body", field], **error}])

    async def replace_password(self, user: Row, password: str, ended: int) -> Row:
        """Hash anew; end all sessions (`ended` 1) or none (0). {} if they ended meanwhile."""
        found = {"id": user["id"], "token_version": user["token_version"]}
        new_hash = await self.passwords.hash(password)
        return await self.db.replace_hash(**found, new_hash=new_hash, ended=ended)

    def issue_token(self, user: Row) -> str:
        """A JWT (RFC 7519), as RFC 8725 advises; `ver` ends it when the user's has moved on."""
        now, life = int(time.time()), self.settings.jwt_expires_seconds
        claims = {"iss": "service", "aud": "service", "sub": user["id"], "jti": uuid.uuid4().hex}
        claims.update(iat=now, exp=now + life, ver=user["token_version"])
        return jwt.encode(claims, self.token_secret, algorithm="HS256")

    async def find_token_user(self, token: str) -> Row:
        """Return the user of a valid token. Raises: AuthError."""
        rules: Any = {"issuer": "service", "audience": "service", "algorithms": ["HS256"]}
        rules["options"] = {"require": ["iss", "aud", "sub", "iat", "exp", "jti", "ver"]}
        try:
            claims = jwt.decode(token, self.token_secret, leeway=2, **rules)  # s: clocks differ
            user_id = str(uuid.UUID(claims["sub"]))
        except jwt.ExpiredSignatureError:
            raise AuthError("expired_token") from None
        except Exception:  # a hostile token makes more raise than PyJWT (RecursionError, say)
            raise AuthError("invalid_token") from None
        user = await self.db.find_user_by_id(id=user_id)
        if user.get("token_version") != claims["ver"]:
            raise AuthError("invalid_token")
        return user


# ==== 7 Middleware ====================================================================
# One plain ASGI class. What it learns, it tells the routes through scope["state"].
BODY_SECONDS = 5  # for a whole body to arrive
NO_STORE = (b"cache-control", b"no-store")  # caches must not keep tokens and accounts
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
PUBLIC_PATHS = {"/api/v1/auth/register", "/api/v1/auth/login", "/demo/upstream"}
PUBLIC_PATHS |= {"/health/live", "/health/ready", "/docs", "/redoc", "/openapi.json"}


async def read_body(request: Request, receive: Receive) -> Receive:
    """Read a bounded body; return a `receive` that repeats it. Raises: body_too_large, and 408."""
    limit = request.app.state.settings.max_body_bytes
    length = request.headers.get("content-length", "0")
    if length == "0" and "transfer-encoding" not in request.headers:
        return receive
    if len(length) > 10 or int(length) > limit:  # 5,000 zeros are more than int() takes
        raise ServiceError("body_too_large")
    body = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise ServiceError("body_too_large")
    except (TimeoutError, ClientDisconnect):
        raise ServiceError("request_timeout") from None
    messages: list[Message] = [{"type": "http.request", "body": bytes(body)}]

    async def repeat() -> Message:
        return messages.pop() if messages else await receive()

    return repeat


async def check_token(request: Request) -> None:
    """Closed by default: what is not public needs a valid token. Raises: AuthError."""
    if request.scope["path"][len(request.scope.get("root_path", "")) :] in PUBLIC_PATHS:
        return
    # Two headers are one, with a comma (RFC 9110, 5.3), and no token has that.
    scheme, _, token = ",".join(request.headers.getlist("authorization")).partition(" ")
    if scheme.lower() == "bearer":
        request.state.user = await request.app.state.services.find_token_user(token.strip(" "))
    elif any(route.matches(request.scope)[0].name == "FULL" for route in request.app.routes):
        raise AuthError("not_authenticated")  # else there is nothing to protect: 404 or 405


class RequestContext:
    """Gives a request its id, its access record and, whatever happens, an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status, request = time.perf_counter(), 0, Request(scope, receive)
        sent_id = request.headers.get("x-request-id", "")
        request_id.set(sent_id if REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex)
        own_headers = [NO_STORE, (b"x-request-id", request_id.get().encode())]
        client = scope["client"][0][:64] if scope.get("client") else "-"
        state = scope["state"] = {**scope.get("state", {}), "client": client, "user": {}}

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *own_headers]
            await send(message)

        try:
            receive = await read_body(request, receive)
            await check_token(request)
            await self.app(scope, receive, send_with_id)
        except Exception as exc:
            response = problem_response(exc)
            if isinstance(exc, AuthError) and exc.code.endswith("_token"):
                log_event("token_refused", "", exc.code, logging.WARNING)
            elif response.status_code == 500:
                logger.exception("unhandled error")
            if not status:
                await response(scope, receive, send_with_id)
        finally:
            path = scope["raw_path"][:500].decode("ascii", "backslashreplace")  # a line: one write
            ms, method = round((time.perf_counter() - began) * 1000, 2), scope["method"][:20]
            fields = {"method": method, "path": path, "status": status, "duration_ms": ms}
            fields.update(client=client, user_id=state["user"].get("id"))
            logger.info(f"{method} {path} {status} {ms} ms", extra={"fields": fields})


# ==== 8 Routes ========================================================================
# A route validates by its model, calls the database or the client, returns a model, and names its
# own errors in answers(...). It needs a token, unless its path is in PUBLIC_PATHS.
router, demo_router = APIRouter(), APIRouter()
BODY = (408, 413, 422)  # the errors of what has a body


def normalise_email(value: str) -> str:
    """Check the syntax, no display names, and lower the case: one address, one spelling."""
    try:
        address = validate_email(value, check_deliverability=False).normalized.lower()
        return unicodedata.normalize("NFC", address)  # lower() can take it apart
    except EmailNotValidError:  # its text repeats parts of the value
        raise ValueError("this is not an email address") from None


SPECIAL_USE_DOMAIN_NAMES.clear()  # .test and .local are good syntax, too
EMAIL = Body(max_length=254, examples=["ada@example.com"], json_schema_extra={"format": "email"})
Email = Annotated[str, EMAIL, AfterValidator(normalise_email)]
# Both Unicode forms are one password. NFC leaves at least a quarter of the characters: hence 512.
NFC = AfterValidator(lambda value: unicodedata.normalize("NFC", value))
Secret = Annotated[str, Body(max_length=512, examples=["correct horse battery staple"]), NFC]
Flag = Annotated[bool, Body(embed=True, strict=True)]


class UserResponse(BaseModel):
    id: uuid.UUID
    email: str = Field(examples=["ada@example.com"])
    created_at: datetime


@router.post("/api/v1/auth/register", status_code=201, responses=answers("email_taken", *BODY))
async def register(email: Email, password: Secret, request: Request) -> UserResponse:
    """Create an account. The password has PASSWORD_MIN_LENGTH (8, unless set) to 128 characters."""
    services: Services = request.app.state.services
    services.check_new_password("password", password)
    new = {"id": str(uuid.uuid4()), "created_at": datetime.now(timezone.utc).isoformat()}
    new["password_hash"] = await services.passwords.hash(password)
    user = await services.db.insert_user(email=email, **new)
    if not user:
        raise ServiceError("email_taken")
    log_event("user_registered", user["id"])
    return UserResponse(**user)


class TokenResponse(BaseModel):
    access_token: str
    token_type: Literal["bearer"] = "bearer"
    expires_in: int = Field(description="Seconds.")


@router.post("/api/v1/auth/login", responses=answers("invalid_credentials", 429, *BODY))
async def log_in(email: Email, password: Secret, request: Request) -> TokenResponse:
    """Exchange email and password for a token; "Authorize" (top right) wants it without Bearer."""
    services: Services = request.app.state.services
    user = await services.authenticate(email, request.state.client, password, "invalid_credentials")
    if int(user["password_hash"][4:6]) < services.settings.bcrypt_rounds:  # rounds were raised
        await services.replace_password(user, password, ended=0)
    log_event("login_succeeded", user["id"])
    token, seconds = services.issue_token(user), services.settings.jwt_expires_seconds
    return TokenResponse(access_token=token, expires_in=seconds)


@router.get("/api/v1/auth/me")
async def show_account(request: Request) -> UserResponse:
    """Return the account that the token belongs to."""
    return UserResponse(**request.state.user)


@router.put("/api/v1/auth/password", status_code=204, responses=answers(403, 429, *BODY))
async def change_password(current_password: Secret, new_password: Secret, request: Request) -> None:
    """Replace the password and end every session, this one too."""
    services: Services = request.app.state.services
    services.check_new_password("new_password", new_password)
    email, address = request.state.user["email"], request.state.client
    user = await services.authenticate(email, address, current_password, "wrong_password")
    if not await services.replace_password(user, new_password, ended=1):
        raise AuthError("invalid_token")  # another change was quicker, and ended this session
    log_event("password_changed", user["id"])


@router.post("/api/v1/auth/logout", status_code=204)
async def log_out(request: Request) -> None:
    """End every session: all tokens issued to the user until now stop working."""
    await request.app.state.services.db.end_sessions(id=request.state.user["id"])
    log_event("logged_out", request.state.user["id"])


@router.get("/api/v1/external/data", responses=answers(502, 504))
async def fetch_external_data(request: Request) -> dict[str, Any]:
    """Call the external API: with retries, within a deadline, behind a circuit breaker."""
    return {"data": await request.app.state.services.external.fetch()}


class CircuitStatus(BaseModel, from_attributes=True):
    state: Literal["closed", "open", "half-open"] = Field(validation_alias="current_state")
    failures: int = Field(validation_alias="fail_counter", description="Failed attempts in a row.")
    fail_max: int = Field(examples=[5], description="So many failures open the circuit.")
    retry_after_seconds: int = Field(description="Until one call may probe; 0 unless open.")


@router.get("/api/v1/external/status")
async def show_circuit(request: Request) -> CircuitStatus:
    """The circuit of the process that answers. Open stays open until a call probes."""
    return CircuitStatus.model_validate(request.app.state.services.external.circuit)


@demo_router.put("/demo/upstream", status_code=204, responses=answers(*BODY))
async def switch_demo_upstream(failing: Flag, request: Request) -> None:
    """Make the demo upstream fail, or heal it; the circuit notices when you fetch external data."""
    request.app.state.services.external.demo_status = 503 if failing else 200


@router.get("/health/live")
async def check_liveness() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/health/ready")
async def check_readiness(request: Request) -> dict[str, str]:
    """The process and its database answer."""
    await request.app.state.services.db.find_user_by_id(id="")  # any statement would do
    return {"status": "ok"}


# ==== 9 App ===========================================================================
# The lifespan opens what lives as long as the process, and closes it after the last answer.
@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings = app.state.settings
    async with AsyncExitStack() as stack:
        for handler in logging.getLogger().handlers:  # uvicorn ends by the signal: no atexit then
            stack.callback(handler.flush)
        db = await open_database(settings, stack)
        secret = key.get_secret_value() if (key := settings.jwt_secret) else os.urandom(32).hex()
        if key is None and settings.environment == "development":
            logger.warning("JWT_SECRET is not set: a random one is used, kept in the database")
            secret = (await db.keep_secret(name="jwt_secret", value=secret))["value"]
        external, passwords = ExternalClient(settings), Passwords(settings.bcrypt_rounds)
        await stack.enter_async_context(external.http)
        app.state.services = Services(settings, db, external, passwords, os.fsencode(secret))
        yield


def describe_api(app: FastAPI) -> dict[str, Any]:
    """FastAPI's openapi.json, and what it does not know: our tokens, the shape of our errors."""
    schema = FastAPI.openapi(app)
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["tags"] = [path.replace("/api/v1", "").split("/")[1]]
            if path not in PUBLIC_PATHS:
                operation["responses"].update(answers(401))
                operation["security"] = [{"token": []}]
    schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    names = ServiceError("invalid_request", errors=[]).describe()
    schema["components"]["schemas"]["Problem"] = {"properties": {name: {} for name in names}}
    return schema


def create_app(settings: Settings) -> FastAPI:
    configure_logging(settings)
    handlers: Any = {HTTPException: None, RequestValidationError: None}  # RequestContext answers
    app = FastAPI(lifespan=lifespan, exception_handlers=handlers, redirect_slashes=False)
    app.title, app.state.settings = "service", settings
    app.include_router(router, responses=answers(500, 503))
    if settings.environment == "development" and settings.external_api_url is None:
        app.include_router(demo_router, responses=answers(500, 503))
    app.openapi = lambda: describe_api(app)  # type: ignore[method-assign]
    app.add_middleware(RequestContext)
    return app


app = create_app(load_settings())
