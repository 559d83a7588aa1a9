"""A small service to read, run and copy: accounts, tokens, and a client for an unstable API.

The way of a request, and so the order of this file's second half:

    uvicorn > RequestContext > BodyLimit > TokenCheck > route > a statement or two > the answer
              request id,      413, 408    401 before         > the external client
              access record,               any route            (retries, circuit breaker)
              every last error

First half, the vocabulary; each section can be read alone:
    1 Settings, 2 Logging, 3 Errors, 4 Database, 5 External client, 6 Security
Second half, the request:
    7 Middleware, 8 Routes (each beside its models), 9 App (start, stop, everything together)

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
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from datetime import datetime, timezone
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Optional

import anyio
import asyncpg
import bcrypt
import databases
import httpx
import jwt
import pybreaker
import pydantic
import pydantic_core
import tenacity
from email_validator import EmailNotValidError, validate_email
from fastapi import APIRouter, Body, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# ==== 1 Settings ======================================================================
# Read once, at start: the environment wins over `.env`; an empty value counts as unset.
# To add one: a field here, a line in `.env.example`, a row in the README's table.

Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
DATABASE_URL = r"sqlite:///[^?#]+|postgresql://[^/?#]+/[^/?#]+(\?(&?(ssl|max_size)=\w[\w-]*)+)?"


class Settings(BaseSettings):
    """Every knob. Raises: pydantic.ValidationError."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore")

    environment: Literal["development", "production", "test"] = "development"
    database_url: Annotated[str, Field(pattern=f"^({DATABASE_URL})$")] = "sqlite:///service.db"
    database_timeout_seconds: Seconds = 5  # a statement, its queue and its locks; then 503
    jwt_secret: Optional[SecretStr] = None  # None: a random one; required in production
    jwt_expires_seconds: Annotated[int, Field(ge=1, le=315_360_000)] = 86400
    bcrypt_rounds: Annotated[int, Field(ge=4, le=15)] = 12  # 0.25 s; one more doubles it
    password_min_length: Annotated[int, Field(ge=1, le=128)] = 8  # characters, of new passwords
    login_max_failures: Count = 5  # on an email from one address, in a window
    login_window_seconds: Count = 300
    max_body_bytes: Annotated[int, Field(ge=1, le=2**30)] = 65536  # a larger body: 413
    external_api_url: Optional[pydantic.AnyHttpUrl] = None  # None: the demo upstream
    external_timeout_seconds: Seconds = 2  # one attempt, from first to last byte
    external_deadline_seconds: Seconds = 5  # the whole call, attempts and waits
    external_attempts: Annotated[int, Field(ge=1, le=20)] = 3
    breaker_fail_max: Count = 5  # failed attempts in a row that open the circuit
    breaker_reset_seconds: Seconds = 30  # how long it stays open before one probe
    log_level: Annotated[Level, pydantic.BeforeValidator(str.upper)] = "INFO"
    log_format: Literal["text", "json"] = "text"

    @pydantic.model_validator(mode="after")
    def check_production(self) -> "Settings":
        """A key is at least as long as the hash (RFC 7518, 3.2)."""
        if self.jwt_secret and len(self.jwt_secret.get_secret_value().encode()) < 32:
            raise ValueError("JWT_SECRET must have 32 bytes or more; try: openssl rand -hex 32")
        for name in ("jwt_secret", "external_api_url"):
            if self.environment == "production" and getattr(self, name) is None:
                raise ValueError(f"{name.upper()} is required in production")
        return self


def load_settings() -> Settings:
    """Read them, or end the process with one message that names the variables, not the values."""
    try:
        return Settings()
    except pydantic.ValidationError as exc:
        wrong = [" ".join([*map(str, e["loc"][:1])]).upper() + " " + e["msg"] for e in exc.errors()]
    except (OSError, UnicodeError) as exc:
        wrong = [f".env cannot be read ({type(exc).__name__})"]
    raise SystemExit(f"service: not started: {'; '.join(wrong)}")


# ==== 2 Logging =======================================================================
# One line a record, to stdout. The request id travels in a context variable, so every record of
# a request has it. A reader that stalls never stalls the service: past 10,000 waiting lines new
# ones are dropped, and counted. Other libraries are heard from WARNING up: some print values.

logger = logging.getLogger("service")
request_id: ContextVar[str] = ContextVar("request_id", default="-")


class StdoutHandler(logging.Handler):
    """Hands lines to a thread, which alone waits for whoever reads stdout."""

    def __init__(self, as_json: bool, limit: int = 10_000) -> None:
        super().__init__()
        self.lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.as_json, self.limit, self.dropped = as_json, limit, 0
        self.thread = threading.Thread()

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object; or text, in which only the service itself can begin a line."""
        moment, rid = datetime.fromtimestamp(record.created, timezone.utc), request_id.get()
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        # Starlette hands over a failed start as a traceback; the sentence at its end is enough.
        message = record.getMessage().rpartition("StartError: ")[2].strip()
        if self.as_json:
            entry = {"time": moment.isoformat(), "level": record.levelname, "logger": record.name}
            entry.update(message=message, request_id=rid, **getattr(record, "fields", {}))
            return json.dumps({**entry, "traceback": trace} if trace else entry)
        line = f"{moment.isoformat()} {record.levelname:8} [{rid}] {json.dumps(message)[1:-1]}"
        return line + ("\n" + trace).replace("\n", "\n    ") if trace else line

    def emit(self, record: logging.LogRecord) -> None:
        if self.lines.qsize() >= self.limit:
            self.dropped += 1
            return
        if self.dropped:
            note, self.dropped = f"{self.dropped} log records dropped: read faster", 0
            self.emit(logging.LogRecord("service", logging.WARNING, "", 0, note, None, None))
        self.lines.put((self.format(record) + "\n").encode())
        if not self.thread.is_alive():  # the first record of the process, also after a fork
            self.thread = threading.Thread(target=self.write_lines, name="log", daemon=True)
            self.thread.start()

    def flush(self) -> None:
        """Wait for the lines so far, one second at most. Called at exit, too."""
        written = threading.Event()
        self.lines.put(written)
        written.wait(1 if self.thread.is_alive() else 0)

    def write_lines(self) -> None:
        while True:
            line = self.lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            with contextlib.suppress(OSError):  # the reader has gone, and with it the line
                while line:
                    line = line[os.write(1, line) :]


def configure_logging(settings: Settings) -> None:
    """Send all through one handler, uvicorn's too; its access log gives way to ours."""
    handler = StdoutHandler(settings.log_format == "json")
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("service", "uvicorn", "uvicorn.error", "uvicorn.access"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [], name != "uvicorn.access"
        log.setLevel(settings.log_level)


def log_event(event: str, user_id: Optional[str], detail: str = "", level: int = 20) -> None:
    """A security event: a word for programs, whom it concerns, and nothing secret."""
    fields = {"event": event, "user_id": user_id}
    logger.log(level, f"{event} {detail}".strip(), extra={"fields": fields})


# ==== 3 Errors ========================================================================
# Whoever notices an error raises it by its code; `problem_response` alone makes answers of them.
# To add one: a line in ERRORS, a raise, and its status in the answers() of the route.

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

    errors: Any = None

    def __init__(self, code: str, retry_after: float = 1) -> None:
        self.code, (status, sentence), headers = code, ERRORS[code], {}
        if status in (429, 503):
            headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
        if status == 401:  # RFC 6750, 3: with `error` only if a token was sent
            sent = ', error="invalid_token"' if code.endswith("_token") else ""
            headers["WWW-Authenticate"] = f'Bearer realm="service"{sent}'
        super().__init__(status, sentence, headers)

    def describe(self) -> dict[str, Any]:
        """The one shape of an error (RFC 9457)."""
        status, title = self.status_code, HTTPStatus(self.status_code).phrase
        body = {"type": "about:blank", "title": title, "status": status, "detail": self.detail}
        body.update(code=self.code, request_id=request_id.get())
        return body if self.errors is None else {**body, "errors": self.errors}


class AuthError(ServiceError):
    """Who is asking, and may they?"""


class ValidationError(ServiceError):
    """`errors` says where and why, never what was sent."""

    def __init__(self, *errors: Any) -> None:
        super().__init__("invalid_request")
        self.errors = [{name: error[name] for name in ("loc", "msg", "type")} for error in errors]


class ExternalServiceError(ServiceError):
    """What the external API did, and what retries and circuit make of it."""

    retry, wait, is_failure = False, None, True  # wait: seconds, if it asked for them

    def __init__(self, code: str = "external_service_error", **facts: Any) -> None:
        super().__init__(code, facts.pop("retry_after", 1))
        self.__dict__.update(facts)


async def problem_response(_: Any, exc: Exception) -> Response:
    """Answer any exception in the one shape; those of Starlette and FastAPI are translated."""
    status = getattr(exc, "status_code", 500)
    if isinstance(exc, ServiceError):
        error = exc
    elif isinstance(exc, RequestValidationError):
        error = ValidationError(*exc.errors())
    elif status == 400:
        error = ValidationError({"loc": ["body"], "msg": "Not JSON.", "type": "json_invalid"})
    else:
        codes = {404: "not_found", 405: "method_not_allowed"}
        error = ServiceError(codes.get(status, "internal_error"))
        error.headers = getattr(exc, "headers", None)  # Allow
    media_type = "application/problem+json"
    return JSONResponse(error.describe(), error.status_code, error.headers, media_type)


class Problem(BaseModel):
    """Any error (RFC 9457), for openapi.json."""

    type: str
    title: str
    status: int
    detail: str = Field(description="What to do next, for people.")
    code: str = Field(description="A stable word, for programs.")
    request_id: str = Field(description="As in X-Request-ID: it finds the request in the log.")
    errors: list[dict[str, Any]] = Field([], description="With 422 only: loc, msg, type.")


def answers(*statuses: int) -> dict[Any, Any]:
    """What openapi.json is to say of a route: every error with one of the statuses."""
    found: dict[Any, Any] = {}
    for code, (status, sentence) in ERRORS.items():
        if status in statuses:
            content = {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}
            answer = {"description": sentence, "content": {"application/problem+json": content}}
            kept = found.setdefault(status, answer)["content"]["application/problem+json"]
            kept["examples"][code] = {"value": ServiceError(code).describe()}
    return found


# ==== 4 Database ======================================================================
# Raw SQL through `databases`, one method a statement: single statements and constraints keep
# every promise, so no transaction is left open. SQLite: two held connections, one for reads,
# which go on while a write waits. PostgreSQL: a pool. To change the schema, see schema.sql.

Row = dict[str, Any]
Opened = contextlib.AsyncExitStack
Lane = tuple[asyncio.Semaphore, Callable[[], Any]]  # how many at once; where to get a connection
SCHEMA = Path(__file__).with_name("schema.sql")
POSTGRES_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
DRIVER_ERRORS = (*POSTGRES_ERRORS, sqlite3.Error, OSError, asyncio.TimeoutError)


class StartError(Exception):
    """The service cannot start; the text says why in one line, without secrets."""


class Database(NamedTuple):
    """Every statement, each within `timeout` seconds, its queue and its locks included.

    Whatever goes wrong raises database_unavailable. When a write returns, it is on disk; when it
    raises, its outcome is open.
    """

    reads: Lane
    writes: Lane
    timeout: float

    async def run(self, lane: Lane, sql: str, **values: Any) -> Row:
        """Return the first row, empty if there is none."""
        (turn, connect), begun = lane, []

        async def statement() -> Row:
            async with turn, connect() as connection:
                begun.append(connection.raw_connection)
                row = await connection.fetch_one(sql, values)
                return dict(row._mapping) if row else {}

        # A task, because waiting for a cancelled statement can take for ever (PostgreSQL frozen).
        # Out of time, it is cancelled if it still queues. If it has begun, SQLite ends it by its
        # own limit, and for PostgreSQL its connection is cut.
        task = asyncio.ensure_future(statement())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait({task}, timeout=self.timeout)
        why = "no answer in time"
        try:
            if task.done():
                return task.result()
            if not begun:
                task.cancel()
            elif isinstance(begun[0], asyncpg.Connection):
                begun[0].terminate()
        except DRIVER_ERRORS as exc:  # PostgreSQL's texts quote rows, SQLite's do not
            why = str(exc) if isinstance(exc, sqlite3.Error) else type(exc).__name__
        logger.warning("database: %s", why)
        raise ServiceError("database_unavailable")

    async def insert_user(self, email: str, password_hash: str) -> Row:
        """Return the new user; nothing if the email is taken: the constraint decides."""
        sql = """
            INSERT INTO users (id, email, password_hash, created_at)
            VALUES (:id, :email, :hash, :now)
            ON CONFLICT (email) DO NOTHING
            RETURNING id, email, created_at"""
        new = {"id": str(uuid.uuid4()), "now": datetime.now(timezone.utc).isoformat()}
        return await self.run(self.writes, sql, **new, email=email, hash=password_hash)

    async def find_user_by_email(self, email: str) -> Row:
        sql = "SELECT id, password_hash, token_version FROM users WHERE email = :email"
        return await self.run(self.reads, sql, email=email)

    async def find_user_by_id(self, user_id: str) -> Row:
        sql = """
            SELECT id, email, password_hash, token_version, created_at
            FROM users WHERE id = :id"""
        return await self.run(self.reads, sql, id=user_id)

    async def replace_hash(self, user: Row, new: str, end_sessions: bool) -> bool:
        """Return False if the user has another hash by now: somebody else was quicker."""
        sql = """
            UPDATE users SET password_hash = :new, token_version = token_version + :ended
            WHERE id = :id AND password_hash = :old
            RETURNING id"""
        known = {"id": user["id"], "old": user["password_hash"]}
        return bool(await self.run(self.writes, sql, **known, new=new, ended=int(end_sessions)))

    async def end_sessions(self, user_id: str) -> None:
        """Refuse every token that the user has been given."""
        sql = "UPDATE users SET token_version = token_version + 1 WHERE id = :id"
        await self.run(self.writes, sql, id=user_id)

    async def count_attempt(self, email: str, address: str, ends: int) -> Row:
        """Count one more in the window that is open, or the first of a new one."""
        sql = """
            INSERT INTO login_attempts (email, address, attempts, window_ends_at)
            VALUES (:email, :address, 1, :ends)
            ON CONFLICT (email, address) DO UPDATE SET attempts = login_attempts.attempts + 1
            RETURNING attempts, window_ends_at"""
        return await self.run(self.writes, sql, email=email, address=address, ends=ends)

    async def forgive_attempt(self, email: str, address: str) -> None:
        """Clear what stands against the address; take one from what stands against all ('*')."""
        sql = """
            UPDATE login_attempts SET attempts = CASE address WHEN '*' THEN attempts - 1 ELSE 0 END
            WHERE email = :email AND address IN (:address, '*') AND attempts > 0"""
        await self.run(self.writes, sql, email=email, address=address)

    async def delete_ended_windows(self, now: int) -> None:
        sql = "DELETE FROM login_attempts WHERE window_ends_at <= :now"
        await self.run(self.writes, sql, now=now)

    async def keep_secret(self, name: str, value: str) -> str:
        """Store the value unless there is one; return the one on which all workers agree."""
        sql = """
            INSERT INTO secrets (name, value) VALUES (:name, :value)
            ON CONFLICT (name) DO UPDATE SET name = excluded.name
            RETURNING value"""
        return str((await self.run(self.writes, sql, name=name, value=value))["value"])

    async def ping(self) -> None:
        await self.run(self.reads, "SELECT version FROM schema_migrations WHERE version = 1")


async def migrate(connection: Any, begin: str) -> None:
    """Run the sections of schema.sql that this database has not seen, a transaction each.

    `begin` opens the transaction and takes a lock: of many starting workers, one does the work.
    Raises: StartError, naming the section; nothing of it stays.
    """
    raw = connection.raw_connection
    run_script = raw.execute if isinstance(raw, asyncpg.Connection) else raw.executescript
    table = "CREATE TABLE IF NOT EXISTS schema_migrations (version BIGINT NOT NULL PRIMARY KEY)"
    await run_script(f"{begin}; {table}; COMMIT")
    _, *parts = re.split(r"^-- migration (\d+): *(.*)$", SCHEMA.read_text("utf-8"), flags=re.M)
    for version, name, script in zip(map(int, parts[::3]), parts[1::3], parts[2::3]):
        mark = f"INSERT INTO schema_migrations (version) VALUES ({version})"
        is_applied = f"SELECT 1 FROM schema_migrations WHERE version = {version}"
        try:
            if not await connection.fetch_one(is_applied):
                await run_script(f"{begin}; {mark}; {script}\n; COMMIT")
        except DRIVER_ERRORS as exc:
            with contextlib.suppress(*DRIVER_ERRORS):
                await run_script("ROLLBACK")
            if not await connection.fetch_one(is_applied):  # by another worker, meanwhile
                why = str(exc).partition("\n")[0]
                raise StartError(f"schema.sql, migration {version}: {name}: {why}") from None


@tenacity.retry(  # several workers that switch to WAL at once get "locked" without a wait
    retry=tenacity.retry_if_exception(lambda exc: "locked" in str(exc)),
    wait=tenacity.wait_random(0, 0.1),
    stop=tenacity.stop_after_delay(1),
    reraise=True,
)
async def open_sqlite(url: databases.DatabaseURL, timeout: float, opened: Opened) -> Database:
    async def hold() -> Lane:
        driver = databases.Database(url, timeout=timeout)  # how long SQLite waits for a lock
        connection = await opened.enter_async_context(driver.connection())
        return asyncio.Semaphore(1), lambda: connection

    in_memory = url.database == ":memory:"
    if not in_memory:
        os.close(os.open(url.database, os.O_RDWR | os.O_CREAT, 0o600))  # for its owner only
    writes = await hold()
    connection = writes[1]()
    await connection.fetch_one("PRAGMA journal_mode = WAL")
    await connection.fetch_one("PRAGMA synchronous = FULL")  # a 201 survives a power cut
    await migrate(connection, "BEGIN IMMEDIATE")
    return Database(writes if in_memory else await hold(), writes, timeout)


async def open_postgresql(url: databases.DatabaseURL, timeout: float, opened: Opened) -> Database:
    lock_limit = {"lock_timeout": str(math.ceil(timeout * 1000))}  # ms; ends what we gave up
    driver = databases.Database(url, min_size=1, timeout=timeout, server_settings=lock_limit)
    await driver.connect()
    opened.push_async_callback(
        lambda: asyncio.wait({asyncio.ensure_future(driver.disconnect())}, timeout=timeout)
    )
    async with driver.connection() as connection:
        await migrate(connection, "BEGIN; SELECT pg_advisory_xact_lock(7519)")
    lane = asyncio.Semaphore(1000), driver.connection  # the pool has the real limit
    return Database(lane, lane, timeout)


async def open_database(settings: Settings, opened: Opened) -> Database:
    """Open and migrate; `opened` closes it. Raises: StartError, with the path or the host."""
    url, timeout = databases.DatabaseURL(settings.database_url), settings.database_timeout_seconds
    is_sqlite = url.scheme == "sqlite"
    try:
        return await (open_sqlite if is_sqlite else open_postgresql)(url, timeout, opened)
    except (*DRIVER_ERRORS, ValueError, OverflowError) as exc:
        place = url.database if is_sqlite else f"{url.hostname}/{url.database}"
        why = str(exc).partition("\n")[0] or "no answer in time"
        raise StartError(f"DATABASE_URL: cannot use {place}: {why}") from None


# ==== 5 External client ===============================================================
# One GET in layers: retries within a deadline > the circuit > one attempt in its time > httpx.
# The deadline shortens the last attempt rather than cancelling it: a cancelled one would count
# for nothing, and the circuit never open. For a second API, make a second ExternalClient.

MAX_UPSTREAM_BYTES = 2**20


class Circuit(pybreaker.CircuitBreakerListener):
    """pybreaker for coroutines; the state is this process's.

    pybreaker counts what happens while it calls a function, which cannot await. So the call is
    awaited first, and its outcome then reported by a function that takes no time. What is left
    to do by hand: half-open, one probe only; no heed to the outcome of a call from before the
    last change of state (`epoch`); a cancelled call counts for nothing; monotonic time.
    """

    def __init__(self, fail_max: int, reset_seconds: float) -> None:
        options: Any = {"listeners": [self], "throw_new_error_on_trip": False}
        self.breaker = pybreaker.CircuitBreaker(fail_max, **options)
        self.reset_seconds, self.changed_at = reset_seconds, 0.0
        self.epoch, self.is_probing = 0, False

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        self.epoch, self.changed_at = self.epoch + 1, time.monotonic()
        log_event("circuit_changed", None, new_state.name, logging.WARNING)

    @property
    def state(self) -> Any:
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

    def report(self, epoch: int, failure: Optional[Exception]) -> None:
        if epoch == self.epoch:
            with contextlib.suppress(ExternalServiceError), self.breaker.calling():
                if failure is not None:
                    raise failure


class ExternalClient:
    """Fetches JSON from an API that may fail, hang or lie."""

    def __init__(self, settings: Settings, transport: Optional[httpx.AsyncBaseTransport]) -> None:
        self.settings, self.url = settings, str(settings.external_api_url or "http://demo/")
        self.circuit = Circuit(settings.breaker_fail_max, settings.breaker_reset_seconds)
        # Time is limited in get(), and waiting for a connection would look like a failure.
        options: Any = {"timeout": None, "limits": httpx.Limits(max_connections=None)}
        self.http = httpx.AsyncClient(transport=transport, trust_env=False, **options)

    async def fetch(self) -> Any:
        """Return the upstream's JSON. Raises: ExternalServiceError, that of the last attempt."""
        settings, circuit = self.settings, self.circuit
        ends = time.monotonic() + settings.external_deadline_seconds
        jitter = tenacity.wait_random_exponential(multiplier=0.1, max=1)  # "full", from 0 seconds

        def is_worth_it(exc: BaseException) -> bool:
            return getattr(exc, "retry", False) and circuit.state == pybreaker.STATE_CLOSED

        def wait(retry: tenacity.RetryCallState) -> float:
            asked = getattr(retry.outcome and retry.outcome.exception(), "wait", None)
            return jitter(retry) if asked is None else float(asked)

        async def attempt() -> Any:
            limit = min(settings.external_timeout_seconds, ends - time.monotonic())
            return await circuit.call(lambda: self.get(limit))

        deadline = tenacity.stop_before_delay(settings.external_deadline_seconds)
        stop = tenacity.stop_after_attempt(settings.external_attempts) | deadline
        retry = tenacity.retry_if_exception(is_worth_it)
        # One for each call: a shared one would mix the states of its callers.
        retrying = tenacity.AsyncRetrying(stop=stop, wait=wait, retry=retry, reraise=True)
        return await retrying(attempt)

    async def get(self, limit: float) -> Any:
        """One attempt, `limit` seconds from first to last byte. Raises: ExternalServiceError."""
        headers = {"Accept-Encoding": "gzip", "X-Request-ID": request_id.get()}
        self.http.cookies.clear()  # or one caller's would be sent for another
        try:
            with anyio.fail_after(limit):
                async with self.http.stream("GET", self.url, headers=headers) as response:
                    return await self.read(response)
        except TimeoutError:
            raise ExternalServiceError("external_timeout", retry=True) from None
        except httpx.TransportError:
            raise ExternalServiceError(retry=True) from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, zlib.error):  # it sent nonsense
            raise ExternalServiceError from None

    async def read(self, response: httpx.Response) -> Any:
        """Judge the status; read 1 MiB at most, inflated too (httpx has no bound there)."""
        status, wait = response.status_code, response.headers.get("Retry-After", "")
        if status >= 500 or status in (408, 429):
            asked = float(wait) if re.fullmatch(r"[0-9]{1,9}", wait) else None
            raise ExternalServiceError(retry=True, wait=asked)
        if not 200 <= status < 300 or status == 204:
            raise ExternalServiceError(is_failure=status < 400)  # a 4xx is a sign of life
        body, gzip = b"", zlib.decompressobj(wbits=31)
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MAX_UPSTREAM_BYTES:
                raise ValueError("too large")
        if response.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body, MAX_UPSTREAM_BYTES)
            if not gzip.eof:
                raise ValueError("too large, or cut off")
        data = pydantic_core.from_json(body, allow_inf_nan=False)
        json.dumps(data, allow_nan=False)  # 1e999 is infinite too, and cannot be passed on
        return data


class DemoUpstream:
    """An upstream in this process, so that nothing else is needed; `failing` makes it fail."""

    failing = False

    def __call__(self, request: httpx.Request) -> httpx.Response:
        answer = httpx.ByteStream(b'{"message": "Hello from the demo upstream."}')
        return httpx.Response(503 if self.failing else 200, stream=answer)


# ==== 6 Security ======================================================================
# Passwords: bcrypt, in as many threads as there are cores; a bounded number waits, the rest is
# told to come back. Throttle: counted in the database before anything is hashed. Tokens: JWT,
# one algorithm; the user's token_version ends them early. No reset, no MFA: they need a mailbox.

MAX_PASSWORD_LENGTH = 128  # characters, normalised
BCRYPT_HASH = re.compile(r"\$2[aby]\$(0[4-9]|1[0-5])\$[./A-Za-z0-9]{53}")  # no absurd cost


def digest_password(password: str) -> bytes:
    """64 bytes of the 72 that bcrypt sees, so that every character counts. The key: digests
    leaked elsewhere are no help in guessing."""
    normalised = unicodedata.normalize("NFC", password).encode()
    return hmac.digest(b"service.py: password", normalised, "sha256").hex().encode()


class Passwords:
    """Hashes and checks passwords without being felt by other requests."""

    def __init__(self, rounds: int) -> None:
        cores = os.cpu_count() or 1
        self.rounds, self.threads = rounds, ThreadPoolExecutor(cores, thread_name_prefix="bcrypt")
        self.places = asyncio.Semaphore(16 * cores)  # at cost 12 the last waits four seconds
        self.decoy = self.hash_now("")

    def place(self) -> asyncio.Semaphore:
        """A place among those who may hash. Raises: overloaded, at once, if none is left."""
        if self.places.locked():
            raise ServiceError("overloaded", retry_after=2)
        return self.places

    def hash_now(self, password: str) -> str:
        return bcrypt.hashpw(digest_password(password), bcrypt.gensalt(self.rounds)).decode()

    async def hash(self, password: str) -> str:
        async with self.place():
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.threads, self.hash_now, password)

    async def verify(self, password: str, stored: str) -> bool:
        """Without a hash, or with a damaged one, take as long and say no. Needs a place()."""
        is_usable = BCRYPT_HASH.fullmatch(stored) is not None
        digest, known = digest_password(password), (stored if is_usable else self.decoy).encode()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, bcrypt.checkpw, digest, known) and is_usable


class Tokens(NamedTuple):
    """Issues and verifies JWTs (RFC 7519), as RFC 8725 advises."""

    secret: str
    expires_seconds: int

    def issue(self, user: Row) -> str:
        now = int(time.time())
        claims = {"iss": "service", "aud": "service", "sub": user["id"], "jti": uuid.uuid4().hex}
        claims.update(iat=now, exp=now + self.expires_seconds, ver=user["token_version"])
        return jwt.encode(claims, self.secret, algorithm="HS256")

    def verify(self, token: str) -> Row:
        """Return the claims, all checked but `ver`. Raises: expired_token, invalid_token."""
        rules: Any = {"issuer": "service", "audience": "service", "algorithms": ["HS256"]}
        rules["options"] = {"require": ["iss", "aud", "sub", "iat", "exp", "jti", "ver"]}
        try:
            claims = jwt.decode(token, self.secret, **rules)
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

    async def verify_password(self, email: str, address: str, password: str) -> Row:
        """Return the user, if the password is right; until then the attempt counts as a failure.

        The address comes first, so that one address cannot use up what is left to all ('*').
        Raises: overloaded, too_many_attempts.
        """
        now, most = int(time.time()), self.settings.login_max_failures
        ends = now + self.settings.login_window_seconds
        async with self.passwords.place():
            await self.db.delete_ended_windows(now)
            for place, limit in ((address, most), ("*", 10 * most)):
                row = await self.db.count_attempt(email, place, ends)
                if row["attempts"] > limit:
                    log_event("login_throttled", None, level=logging.WARNING)
                    left = row["window_ends_at"] - now
                    raise ServiceError("too_many_attempts", retry_after=left)
            user = await self.db.find_user_by_email(email)
            if not await self.passwords.verify(password, user.get("password_hash", "")):
                log_event("login_failed", user.get("id"), level=logging.WARNING)
                return {}
        await self.db.forgive_attempt(email, address)
        return user


# ==== 7 Middleware ====================================================================
# Plain ASGI, outermost first. What they learn they tell the routes, through scope["state"].

BODY_SECONDS = 5  # for a whole body to arrive
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
AUTH, EXTERNAL = "/api/v1/auth", "/api/v1/external"
DOCS = ("/docs", "/redoc", "/openapi.json")
PUBLIC_PATHS = {  # everything else needs a token
    *(f"{AUTH}/register", f"{AUTH}/login", "/health/live", "/health/ready", "/demo/upstream"),
    *DOCS,
}


class RequestContext:
    """Gives a request its id, its access record and, whatever happens, an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status, state = time.perf_counter(), 0, scope.setdefault("state", {})
        state["client"] = scope["client"][0] if scope.get("client") else "-"
        sent_id = Request(scope).headers.get("x-request-id", "")
        request_id.set(sent_id if REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.get().encode()))
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as exc:
            if not isinstance(exc, ServiceError):
                logger.exception("unhandled error")
            if not status:
                await (await problem_response(None, exc))(scope, receive, send_with_id)
        finally:
            method, path = scope["method"], scope["raw_path"].decode("ascii", "backslashreplace")
            ms = round((time.perf_counter() - began) * 1000, 2)
            fields = {"method": method, "path": path, "status": status, "duration_ms": ms}
            fields.update(client=state["client"], user_id=state.get("user_id"))
            logger.info("%s %s %s %s ms", method, path, status, ms, extra={"fields": fields})


class BodyLimit:
    """Bounds a body in size and time; a request without one is passed on as it is."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Request(scope).headers if scope["type"] == "http" else {}
        if "content-length" not in headers and "transfer-encoding" not in headers:
            return await self.app(scope, receive, send)
        if int(headers.get("content-length", 0)) > self.max_bytes:
            raise ServiceError("body_too_large")
        ends, left = time.monotonic() + BODY_SECONDS, self.max_bytes

        async def limited_receive() -> Message:
            nonlocal ends, left
            try:
                with anyio.fail_after(ends - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise ServiceError("request_timeout") from None
            left -= len(message.get("body", b""))
            if left < 0:
                raise ServiceError("body_too_large")
            if not message.get("more_body"):
                ends = math.inf  # what comes now is the end of the connection
            return message

        await self.app(scope, limited_receive, send)


class TokenCheck:
    """Closed by default: what exists is served to a valid token only, or on PUBLIC_PATHS."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")[len(scope.get("root_path", "")) :]
        if scope["type"] == "http" and path not in PUBLIC_PATHS:
            await self.authenticate(scope)
        await self.app(scope, receive, send)

    async def authenticate(self, scope: Scope) -> None:
        """Find the token's user. Raises: not_authenticated, invalid_token, expired_token."""
        services: Services = scope["app"].state.services
        sent = Request(scope).headers.getlist("authorization")
        scheme, _, token = "".join(sent[:1]).partition(" ")
        if len(sent) < 2 and scheme.lower() != "bearer":
            if any(route.matches(scope)[0] is Match.FULL for route in scope["app"].routes):
                raise AuthError("not_authenticated")
            return  # there is nothing to protect: 404 or 405
        try:
            claims = services.tokens.verify(token.strip() if len(sent) == 1 else "")
            user = await services.db.find_user_by_id(claims["sub"])
            if user.get("token_version") != claims["ver"]:
                raise AuthError("invalid_token")
        except AuthError as exc:
            log_event("token_refused", None, exc.code, logging.WARNING)
            raise
        scope["state"].update(user=user, user_id=user["id"])


# ==== 8 Routes ========================================================================
# A route validates by the types of its arguments, calls the database or the client, and returns
# a model. To add one: the models, the function, answers(...) for the errors it can give. It
# needs a token, unless its path stands in PUBLIC_PATHS.


async def get_services(request: Request) -> Any:
    return request.app.state.services


async def get_user(request: Request) -> Any:
    return request.state.user


def normalise_email(value: str) -> str:
    """Check the syntax, no display names, and lower the case: one address, one spelling."""
    try:
        return validate_email(value, check_deliverability=False).normalized.lower()
    except EmailNotValidError:  # its text repeats parts of the value
        why = "This is not an email address."
        raise pydantic_core.PydanticCustomError("email", why) from None  # type: ignore[arg-type]


def check_new_password(field: str, password: str, settings: Settings) -> None:
    """Raises: ValidationError."""
    shortest, longest = settings.password_min_length, MAX_PASSWORD_LENGTH
    if not shortest <= len(unicodedata.normalize("NFC", password)) <= longest:
        why = f"A password has {shortest} to {longest} characters."
        raise ValidationError({"loc": ["body", field], "msg": why, "type": "password_length"})


InServices = Annotated[Services, Depends(get_services)]
CurrentUser = Annotated[Row, Depends(get_user)]
EmailText = Body(max_length=320, examples=["ada@example.com"])
Email = Annotated[str, EmailText, pydantic.AfterValidator(normalise_email)]
# 512, because NFC leaves a quarter of the characters at least, and is slow on what is long.
Password = Annotated[str, Body(max_length=512, examples=["correct horse battery staple"])]

public = APIRouter()
private = APIRouter(dependencies=[Depends(HTTPBearer(auto_error=False))], responses=answers(401))
demo = APIRouter()
BODY = (408, 413, 422)


class UserResponse(BaseModel):
    id: uuid.UUID
    email: str = Field(examples=["ada@example.com"])
    created_at: datetime


class TokenResponse(BaseModel):
    access_token: str
    token_type: Literal["bearer"] = "bearer"
    expires_in: int = Field(description="Seconds.")


@public.post(f"{AUTH}/register", status_code=201, responses=answers(409, *BODY))
async def register(email: Email, password: Password, services: InServices) -> UserResponse:
    """Create an account. The email is kept in lower case; a 201 means that it is on disk."""
    check_new_password("password", password, services.settings)
    user = await services.db.insert_user(email, await services.passwords.hash(password))
    if not user:
        raise ServiceError("email_taken")
    log_event("user_registered", user["id"])
    return UserResponse(**user)


@public.post(f"{AUTH}/login", responses=answers(401, 429, *BODY))
async def log_in(
    email: Email, password: Password, services: InServices, request: Request, response: Response
) -> TokenResponse:
    """Exchange email and password for a token; paste it under "Authorize" to try the rest.

    An unknown email and a wrong password get the same answer in the same time. After
    LOGIN_MAX_FAILURES even the right password has to wait, LOGIN_WINDOW_SECONDS at most.
    """
    user = await services.verify_password(email, request.state.client, password)
    if not user:
        raise AuthError("invalid_credentials")
    if int(user["password_hash"][4:6]) < services.settings.bcrypt_rounds:  # they have been raised
        renewed = await services.passwords.hash(password)
        await services.db.replace_hash(user, renewed, end_sessions=False)
    log_event("login_succeeded", user["id"])
    response.headers["Cache-Control"] = "no-store"
    token, seconds = services.tokens.issue(user), services.tokens.expires_seconds
    return TokenResponse(access_token=token, expires_in=seconds)


@private.get(f"{AUTH}/me")
async def show_account(user: CurrentUser) -> UserResponse:
    """Whose token is it?"""
    return UserResponse(**user)


@private.put(f"{AUTH}/password", status_code=204, responses=answers(403, 429, *BODY))
async def change_password(
    current_password: Password, new_password: Password, services: InServices, request: Request
) -> None:
    """Replace the password and end every session, this one too."""
    check_new_password("new_password", new_password, services.settings)
    email, address = request.state.user["email"], request.state.client
    user = await services.verify_password(email, address, current_password)
    if not user:
        raise AuthError("wrong_password")
    renewed = await services.passwords.hash(new_password)
    if not await services.db.replace_hash(user, renewed, end_sessions=True):
        raise AuthError("invalid_token")  # another change was quicker, and ended this session
    log_event("password_changed", user["id"])


@private.post(f"{AUTH}/logout", status_code=204)
async def log_out(user: CurrentUser, services: InServices) -> None:
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


@private.get(f"{EXTERNAL}/data", responses=answers(502, 504))
async def fetch_external_data(services: InServices) -> ExternalData:
    """Call the external API: with retries, within a deadline, behind a circuit breaker."""
    return ExternalData(data=await services.external.fetch())


@private.get(f"{EXTERNAL}/status")
async def show_circuit(services: InServices) -> CircuitStatus:
    """The circuit of the process that answers. Open stays open until a call probes."""
    circuit = services.external.circuit
    counts = {"failures": circuit.breaker.fail_counter, "fail_max": circuit.breaker.fail_max}
    left = math.ceil(circuit.retry_after)
    return CircuitStatus(state=circuit.state, **counts, retry_after_seconds=left)


class Health(BaseModel):
    status: Literal["ok"] = "ok"


@public.get("/health/live")
async def check_liveness() -> Health:
    """The process answers."""
    return Health()


@public.get("/health/ready")
async def check_readiness(services: InServices) -> Health:
    """The database answers, too."""
    await services.db.ping()
    return Health()


@demo.put("/demo/upstream", status_code=204, responses=answers(*BODY))
async def switch_upstream(failing: Annotated[bool, Body(embed=True)], services: InServices) -> None:
    """Make the demo upstream fail, or heal it (in development, without EXTERNAL_API_URL).

    Failing: fetch external data twice, and the circuit opens. Healed: wait for
    BREAKER_RESET_SECONDS, fetch again, and it closes.
    """
    services.demo.failing = failing


# ==== 9 App ===========================================================================
# The lifespan opens what lives as long as the process, in the order of need; it is closed in
# reverse after uvicorn has answered what was begun (SIGTERM).


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings, transport, upstream = app.state.settings, app.state.transport, DemoUpstream()
    if transport is None and settings.external_api_url is None:
        transport = httpx.MockTransport(upstream)
    async with contextlib.AsyncExitStack() as opened:
        db = await open_database(settings, opened)
        secret = secrets.token_hex(32)
        if settings.jwt_secret is not None:
            secret = settings.jwt_secret.get_secret_value()
        elif settings.environment == "development":
            logger.warning("JWT_SECRET is not set: a random one is used, kept in the database")
            secret = await db.keep_secret("jwt_secret", secret)
        client = ExternalClient(settings, transport)
        await opened.enter_async_context(client.http)
        passwords = Passwords(settings.bcrypt_rounds)
        opened.callback(passwords.threads.shutdown, wait=False)
        tokens = Tokens(secret, settings.jwt_expires_seconds)
        app.state.services = Services(settings, db, client, upstream, passwords, tokens)
        yield


def describe_api(app: FastAPI) -> dict[str, Any]:
    """FastAPI's openapi.json, with the error shape and the lengths of new passwords."""
    models = FastAPI.openapi(app)["components"]["schemas"]
    models["Problem"] = Problem.model_json_schema()
    lengths = {"minLength": app.state.settings.password_min_length, "maxLength": 128}
    models["Body_register"]["properties"]["password"].update(lengths)
    models["Body_change_password"]["properties"]["new_password"].update(lengths)
    return app.openapi_schema or {}


def create_app(settings: Settings, transport: Optional[httpx.AsyncBaseTransport] = None) -> FastAPI:
    """Put everything together; `transport` stands in for the network to the external API."""
    configure_logging(settings)
    app = FastAPI(
        title="service",
        version="1.0.0",
        lifespan=lifespan,
        responses=answers(500, 503),
        redirect_slashes=False,  # it would redirect to whatever the Host header says
        swagger_ui_oauth2_redirect_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.settings, app.state.transport = settings, transport
    has_switch = settings.environment == "development" and settings.external_api_url is None
    for router in (public, private, *([demo] if has_switch else [])):
        app.include_router(router)
    app.openapi = lambda: describe_api(app)  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, problem_response)
    app.add_exception_handler(RequestValidationError, problem_response)
    app.add_middleware(TokenCheck)  # innermost first
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(RequestContext)
    return app


app = create_app(load_settings())
