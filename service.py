"""A small service to read, run and copy: accounts, tokens, and a client for an unstable API.

The way of a request, and so the order of this file's second half:

    uvicorn > RequestContext > route > a statement or two > the answer
              request id,            > the external client
              body limit,              (retries, circuit breaker)
              token check, access record, every last error

First the vocabulary, each section readable alone: 1 Settings, 2 Logging, 3 Errors, 4 Database,
5 External client, 6 Security. Then the request: 7 Middleware, 8 Routes (each beside its models),
9 App (start, stop, everything together). Nothing is used before it is defined."""

import asyncio
import hmac
import json
import logging
import math
import os
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
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Optional, cast

import anyio
import asyncpg  # type: ignore[import-untyped]
import bcrypt
import httpx
import jwt
import pydantic
import tenacity
from databases import Database as Driver, DatabaseURL
from email_validator import SPECIAL_USE_DOMAIN_NAMES, EmailNotValidError, validate_email
from fastapi import APIRouter, Body, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pybreaker import CircuitBreaker, CircuitBreakerListener
from pydantic import BaseModel, Field, SecretStr
from pydantic_core import from_json, to_json
from pydantic_settings import BaseSettings, SettingsConfigDict
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# ==== 1 Settings ======================================================================
# Read once, at start: the environment wins over `.env`; an empty value counts as unset.
# To add one: a field here, a line in `.env.example`, a row in the README's table.
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
URL = r"^(sqlite:///[^:?#][^?#]*|postgresql://[^/?#]+/[^/?#]+(\?(&?(ssl|max_size)=[\w-]+)+)?)$"


class Settings(BaseSettings):
    """Every knob. Raises: pydantic.ValidationError."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore")
    environment: Literal["development", "production", "test"] = "development"
    database_url: Annotated[str, Field(pattern=URL)] = "sqlite:///service.db"
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
        wrong = [f"{''.join(map(str, e['loc'][:1])).upper()} {e['msg']}" for e in exc.errors()]
        raise SystemExit(f"service: not started: {'; '.join(wrong)}") from None


# ==== 2 Logging =======================================================================
# One line a record, to stdout. A reader that stalls never stalls the service: past 10,000 waiting
# lines, new ones are dropped and counted. Other libraries: from WARNING up, for some print values.
logger = logging.getLogger("service")
request_id: ContextVar[str] = ContextVar("request_id", default="-")


class StdoutHandler(logging.Handler):
    """Hands its work to a thread, which alone waits for whoever reads stdout."""

    def __init__(self, log_format: str, limit: int = 10_000) -> None:
        super().__init__()
        self.log_format, self.limit, self.dropped = log_format, limit, 0
        self.tasks: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        threading.Thread(target=self.work, name="log", daemon=True).start()

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object; or text, in which only the service itself can begin a line."""
        moment, rid = datetime.fromtimestamp(record.created, timezone.utc), request_id.get()
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        # Starlette hands over a failed start as a traceback; the sentence at its end is enough.
        message = record.getMessage().rpartition("StartError: ")[2].strip()
        dropped, self.dropped = self.dropped, 0
        message += f" ({dropped} records before this were dropped)" if dropped else ""
        if self.log_format == "json":
            entry = {"time": moment.isoformat(), "level": record.levelname, "logger": record.name}
            entry.update(message=message, request_id=rid, **getattr(record, "fields", {}))
            return json.dumps({**entry, "traceback": trace} if trace else entry)
        line = f"{moment.isoformat()} {record.levelname:8} [{rid}] {json.dumps(message)[1:-1]}"
        return line + ("\n" + trace).replace("\n", "\n    ") if trace else line

    def emit(self, record: logging.LogRecord) -> None:
        if self.tasks.qsize() >= self.limit:
            self.dropped += 1
        else:
            line = (self.format(record) + "\n").encode()
            self.tasks.put(lambda: os.write(1, line))

    def flush(self) -> None:
        """Wait for the lines so far, one second at most. Called at exit, too."""
        done = threading.Event()
        self.tasks.put(done.set)
        done.wait(1)

    def work(self) -> None:
        while True:
            with suppress(OSError):  # the reader has gone, and with it the line
                self.tasks.get()()


def configure_logging(settings: Settings) -> None:
    """Send all through one handler, uvicorn's too; its access log gives way to ours."""
    logging.basicConfig(handlers=[StdoutHandler(settings.log_format)], level="WARNING", force=True)
    for name in ("service", "uvicorn", "uvicorn.error", "uvicorn.access"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [], name != "uvicorn.access"
        log.setLevel(settings.log_level)


def log_event(event: str, detail: str, user_id: Optional[str], level: int = 20) -> None:
    """A security event: a word for programs, whom it concerns, and nothing secret."""
    logger.log(level, detail, extra={"fields": {"event": event, "user_id": user_id}})


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


class ServiceError(HTTPException):  # Starlette's: nothing else leaves receive() unchanged
    def __init__(self, code: str, retry_after: int = 0, **members: Any) -> None:
        """`retry_after` in seconds; `members`: more of the body, never what was sent."""
        (status, sentence), headers = ERRORS[code], {}
        if status in (429, 503):
            headers["Retry-After"] = str(max(1, retry_after))
        if status == 401:  # RFC 6750, 3: with `error` only if a token was sent
            sent = ', error="invalid_token"' if code.endswith("_token") else ""
            headers["WWW-Authenticate"] = f'Bearer realm="service"{sent}'
        self.code, self.retry_after, self.members = code, retry_after, members
        super().__init__(status, sentence, headers)


class AuthError(ServiceError): ...  # who is asking, and may they?


class ValidationError(ServiceError): ...  # what was sent is not what is asked for


class ExternalServiceError(ServiceError): ...  # what the external API did


async def problem_response(_: Any, exc: Exception) -> Response:
    """Answer any exception in the one shape (RFC 9457), Starlette's and FastAPI's too."""
    error: Any = exc
    if isinstance(exc, RequestValidationError):
        errors = [{name: e[name] for name in ("loc", "msg", "type")} for e in exc.errors()]
        error = ValidationError("invalid_request", errors=errors)
    elif getattr(exc, "status_code", 500) == 400:
        errors = [{"loc": ["body"], "msg": "Not JSON.", "type": "json_invalid"}]
        error = ValidationError("invalid_request", errors=errors)
    elif not isinstance(exc, ServiceError):
        codes = {404: "not_found", 405: "method_not_allowed"}
        error = ServiceError(codes.get(getattr(exc, "status_code", 500), "internal_error"))
        error.headers = getattr(exc, "headers", None)  # Allow
    title, status = HTTPException(error.status_code).detail, error.status_code
    body = {"type": "about:blank", "title": title, "status": status, "detail": error.detail}
    body.update(code=error.code, request_id=request_id.get(), **error.members)
    return Response(to_json(body), status, error.headers, "application/problem+json")


def answers(*statuses: int) -> dict[Any, Any]:
    """What openapi.json is to say of errors with these statuses."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    codes = {s: [code for code, (status, _) in ERRORS.items() if status == s] for s in statuses}
    return {str(s): {"description": ", ".join(codes[s]), "content": content} for s in statuses}


# ==== 4 Database ======================================================================
# Raw SQL through `databases`, one method a statement. Single statements and constraints keep all
# promises, so no transaction is left open. SQLite: two held connections, so that reads go on while
# a write waits. PostgreSQL: a pool. To change the schema, see schema.sql.
Row = dict[str, Any]
SCHEMA = Path(__file__).with_name("schema.sql")
POSTGRES_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
DRIVER_ERRORS = (*POSTGRES_ERRORS, sqlite3.Error, OSError, asyncio.TimeoutError)


class StartError(Exception): ...  # the text says why the service cannot start, without secrets


def sql(text: str) -> Callable[..., Awaitable[Row]]:
    """A method that runs the SQL; it takes its `:names` and returns its first row, {} if none."""

    async def run_sql(self: "Database", **values: Any) -> Row:
        lane = self.reads if text.lstrip().startswith("SELECT") else self.writes
        row = await self.run(lane, lambda connection: connection.fetch_one(text, values))
        return dict(row._mapping) if row else {}

    return run_sql


class Database:
    """Every statement, in `timeout` seconds with queue and locks. Raises: database_unavailable."""

    def __init__(self, reader: Any, writer: Any, at_once: int, timeout: float) -> None:
        self.reads, self.writes = ((anyio.Semaphore(at_once), c) for c in (reader, writer))
        self.timeout, self.wanted = timeout, set[str]()

    async def run(self, lane: Any, execute: Callable[[Any], Awaitable[Any]]) -> Any:
        """Wait for a turn and a connection in the lane, and let `execute` use it."""
        begun: list[Any] = []

        async def take_turn() -> Any:
            async with lane[0], lane[1]() as connection:
                begun.append(connection.raw_connection)
                return await execute(connection)

        # A task: to wait for a cancelled statement can take for ever (PostgreSQL frozen). Too late,
        # it is cancelled if it queues; if it has begun, SQLite ends it, or its connection is cut.
        task = asyncio.ensure_future(take_turn())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            return await asyncio.wait_for(asyncio.shield(task), self.timeout)
        except DRIVER_ERRORS as exc:  # PostgreSQL's texts quote rows, SQLite's do not
            why = str(exc) if isinstance(exc, sqlite3.Error) else type(exc).__name__
        if not begun:
            task.cancel()
        elif not task.done() and isinstance(begun[0], asyncpg.Connection):
            begun[0].terminate()
        logger.warning("database: %s", why)
        raise ServiceError("database_unavailable")

    async def find_user_by_id(self, id: str) -> Row:
        """Every request asks this, and most of a statement's cost is its way to the driver's thread
        and back. So one goes for all who ask before it begins, for eight users at most."""
        if len(self.wanted) in (0, 8) or self.lookup.done():
            wanted = self.wanted = {id}

            async def execute(connection: Any) -> dict[str, Row]:
                self.wanted = set()  # who comes from now on must see what is written until then
                values = dict(zip("abcdefgh", [*wanted] + 8 * [id]))
                users = await connection.fetch_all(self.USERS_BY_ID, values)
                return {user["id"]: dict(user._mapping) for user in users}

            self.lookup: Any = asyncio.ensure_future(self.run(self.reads, execute))
        self.wanted.add(id)
        found: dict[str, Row] = await asyncio.shield(self.lookup)
        return found.get(id, {})

    USERS_BY_ID = """
        SELECT id, email, token_version, created_at FROM users
        WHERE id IN (:a, :b, :c, :d, :e, :f, :g, :h)"""
    insert_user = sql("""
        INSERT INTO users (id, email, password_hash, created_at)
        VALUES (:id, :email, :password_hash, :created_at)
        ON CONFLICT (email) DO NOTHING RETURNING id, email, created_at""")
    find_user_by_email = sql("""
        SELECT id, password_hash, token_version FROM users WHERE email = :email""")
    # {} if the user has changed since it was found. :ended is 1 to end all sessions, else 0.
    replace_hash = sql("""
        UPDATE users SET password_hash = :new_hash, token_version = token_version + :ended
        WHERE id = :id AND password_hash = :password_hash AND token_version = :token_version
        RETURNING id""")
    end_sessions = sql("UPDATE users SET token_version = token_version + 1 WHERE id = :id")
    count_attempt = sql("""
        INSERT INTO login_attempts (email, address, attempts, window_ends_at)
        VALUES (:email, :address, 1, :ends)
        ON CONFLICT (email, address) DO UPDATE SET attempts = login_attempts.attempts + 1
        RETURNING attempts, window_ends_at""")
    # After a success nothing stands against the address, and one less against all ('*').
    forgive_attempt = sql("""
        UPDATE login_attempts SET attempts = CASE address WHEN '*' THEN attempts - 1 ELSE 0 END
        WHERE email = :email AND address IN (:address, '*') AND attempts > 0""")
    delete_ended_windows = sql("DELETE FROM login_attempts WHERE window_ends_at <= :now")
    # Returns the value that was there first: all workers get the same.
    keep_secret = sql("""
        INSERT INTO secrets (name, value) VALUES (:name, :value)
        ON CONFLICT (name) DO UPDATE SET name = excluded.name RETURNING value""")


async def migrate(connection: Any, begin: str) -> None:
    """Run the sections of schema.sql that this database has not seen, each in one transaction.
    `begin` opens it, with a lock against other workers. Raises: StartError; nothing stays."""
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
            with suppress(*DRIVER_ERRORS):
                await raw.execute("ROLLBACK")  # not as a script: SQLite would commit first
            if not await connection.fetch_one(is_applied):  # by another worker, meanwhile
                why = str(exc).partition("\n")[0]
                raise StartError(f"schema.sql, migration {version}: {name}: {why}") from None


async def open_sqlite(url: DatabaseURL, timeout: float, opened: AsyncExitStack) -> Database:
    os.close(os.open(url.database, os.O_RDWR | os.O_CREAT, 0o600))  # for its owner only
    drivers = Driver(url, timeout=timeout), Driver(url, timeout=timeout)  # seconds, for a lock
    reader, writer = [await opened.enter_async_context(d.connection()) for d in drivers]
    # Several workers that switch to WAL at once get "locked", without a wait.
    locked = tenacity.retry_if_exception_message(match=".*locked")
    waiting = tenacity.retry(retry=locked, stop=tenacity.stop_after_delay(timeout), reraise=True)
    await waiting(writer.fetch_one)("PRAGMA journal_mode = WAL")
    await writer.fetch_one("PRAGMA synchronous = FULL")  # a 201 survives a power cut
    await migrate(writer, "BEGIN IMMEDIATE")
    return Database(lambda: reader, lambda: writer, 1, timeout)


async def open_postgresql(url: DatabaseURL, timeout: float, opened: AsyncExitStack) -> Database:
    lock_limit = {"lock_timeout": str(math.ceil(timeout * 1000))}  # ms; ends what we gave up
    pool = Driver(url, min_size=0, timeout=timeout, server_settings=lock_limit)
    await pool.connect()
    opened.push_async_callback(asyncio.wait_for, pool.disconnect(), timeout)
    async with pool.connection() as connection:
        await migrate(connection, "BEGIN; SELECT pg_advisory_xact_lock(7519)")
    return Database(pool.connection, pool.connection, 1000, timeout)  # the pool has the real limit


async def open_database(settings: Settings, opened: AsyncExitStack) -> Database:
    """Open and migrate; `opened` closes it. Raises: StartError, with the path or the host."""
    url, timeout = DatabaseURL(settings.database_url), settings.database_timeout_seconds
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
HELLO = httpx.ByteStream(b'{"message": "Hello from the demo upstream."}')


class TransientError(ExternalServiceError): ...  # worth another attempt, after `retry_after`


class RejectionError(ExternalServiceError): ...  # a 4xx: not well asked, a sign of life


class Circuit(CircuitBreakerListener):
    """pybreaker for coroutines: an attempt is awaited first, then pybreaker calls its result. By
    hand: one probe only; no heed to who began before the last change (`epoch`); monotonic time."""

    def __init__(self, fail_max: int, reset_seconds: float) -> None:
        options: Any = {"listeners": [self], "exclude": [RejectionError]}
        self.breaker = CircuitBreaker(fail_max, throw_new_error_on_trip=False, **options)
        self.state: Literal["closed", "open", "half-open"] = "closed"
        self.reset_seconds, self.changed_at = reset_seconds, 0.0
        self.epoch, self.is_probing = 0, False

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        self.epoch, self.changed_at, self.state = self.epoch + 1, time.monotonic(), new_state.name
        log_event("circuit_changed", f"circuit {self.state}", None, logging.WARNING)

    @property
    def retry_after(self) -> int:
        """Seconds until a call may probe, rounded up; 0 unless open."""
        left = self.changed_at + self.reset_seconds - time.monotonic()
        return max(0, math.ceil(left)) if self.state == "open" else 0

    async def call(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Await the attempt, if it is let through. Raises: ExternalServiceError."""
        if self.retry_after > 0 or self.is_probing:
            raise ExternalServiceError("circuit_open", self.retry_after)
        if self.state == "open":
            self.breaker.half_open()
        is_probe = self.is_probing = self.state == "half-open"
        epoch, outcome = self.epoch, asyncio.get_running_loop().create_future()
        try:
            outcome.set_result(await attempt())
        except ExternalServiceError as exc:
            outcome.set_exception(exc)
        finally:
            self.is_probing &= not is_probe
        return self.breaker.call(outcome.result) if epoch == self.epoch else outcome.result()


class ExternalClient:
    """Fetches JSON from an API that may fail, hang or lie."""

    def __init__(self, settings: Settings, transport: Optional[httpx.AsyncBaseTransport]) -> None:
        self.settings, self.url = settings, str(settings.external_api_url or "http://demo/")
        self.circuit = Circuit(settings.breaker_fail_max, settings.breaker_reset_seconds)
        # Time is limited in get(), and waiting for a connection would look like a failure.
        options: Any = {"timeout": None, "limits": httpx.Limits(max_connections=None)}
        options["event_hooks"] = {"response": [self.check]}
        self.http = httpx.AsyncClient(transport=transport, trust_env=False, **options)

    async def fetch(self) -> Any:
        """Return the upstream's JSON. Raises: ExternalServiceError, that of the last attempt."""
        circuit, seconds = self.circuit, self.settings.external_deadline_seconds
        if circuit.retry_after > 0:  # at once, without the cost of what follows
            raise ExternalServiceError("circuit_open", circuit.retry_after)
        attempts = tenacity.stop_after_attempt(self.settings.external_attempts)
        deadline, ends = tenacity.stop_before_delay(seconds), time.monotonic() + seconds
        jitter = tenacity.wait_random_exponential(multiplier=0.1, max=1)  # "full"
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            wait=lambda call: jitter(call) + cast(Any, call.outcome).exception().retry_after,
            stop=lambda call: attempts(call) or deadline(call) or circuit.state != "closed",
            reraise=True,
        )
        return await retrying(circuit.call, lambda: self.get(ends))

    async def get(self, ends: float) -> Any:
        """One attempt, in its own time and the deadline's. Raises: ExternalServiceError."""
        limit = min(self.settings.external_timeout_seconds, ends - time.monotonic())
        headers = {"Accept-Encoding": "gzip", "X-Request-ID": request_id.get()}
        self.http.cookies.clear()  # or one caller's would be sent for another
        try:
            with anyio.fail_after(limit):
                async with self.http.stream("GET", self.url, headers=headers) as response:
                    return await self.read(response)
        except TimeoutError:
            raise TransientError("external_timeout") from None
        except httpx.TransportError:
            raise TransientError("external_service_error") from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, zlib.error):  # it sent nonsense
            raise ExternalServiceError("external_service_error") from None

    async def check(self, response: httpx.Response) -> None:
        """Let successes with a body pass, before httpx looks where a redirect leads."""
        status, wait = response.status_code, response.headers.get("Retry-After", "")
        if status >= 500 or status in (408, 429):
            seconds = int(wait) if re.fullmatch(r"[0-9]{1,9}", wait) else 0
            raise TransientError("external_service_error", seconds)
        if status >= 400:
            raise RejectionError("external_service_error")
        if not 200 <= status < 300 or status == 204:
            raise ExternalServiceError("external_service_error")

    async def read(self, response: httpx.Response) -> Any:
        """Read 1 MiB at most, inflated too (httpx has no bound there). Raises: ValueError."""
        body, gzip = b"", zlib.decompressobj(wbits=31)
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MAX_UPSTREAM_BYTES:
                raise ValueError("too large")
        if response.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body, MAX_UPSTREAM_BYTES)
            if not gzip.eof:
                raise ValueError("too large, or cut off")
        data = from_json(body)
        json.dumps(data, allow_nan=False)  # NaN and Infinity (1e999) are not JSON
        return data


# ==== 6 Security ======================================================================
# Passwords: bcrypt, in as many threads as there are cores; a bounded number waits, the rest is told
# to come back. Throttle: counted in the database before anything is hashed. Tokens: JWT; a user's
# token_version ends them early. No reset, no MFA: they need a mailbox.
BCRYPT_HASH = re.compile(r"\$2[aby]\$(0[4-9]|1[0-5])\$[./A-Za-z0-9]{53}")  # no absurd cost


class Passwords:
    """Hashes and checks passwords without being felt by other requests."""

    def __init__(self, rounds: int) -> None:
        cores = os.cpu_count() or 1
        self.rounds, self.threads = rounds, anyio.CapacityLimiter(cores)
        self.places = anyio.Semaphore(16 * cores)  # at cost 12 the last waits four seconds
        self.decoy = f"$2b${rounds:02}${'.' * 53}"  # nobody's, but as slow as any

    def digest(self, password: str) -> bytes:
        """64 of the 72 bytes that bcrypt sees: all counts. Keyed: leaked digests do not help."""
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

    async def verify(self, password: str, stored: str) -> bool:
        """Without a hash, or with a damaged one, take as long and say no. Needs a place()."""
        is_usable = BCRYPT_HASH.fullmatch(stored) is not None
        digest, known = self.digest(password), (stored if is_usable else self.decoy).encode()
        same = await anyio.to_thread.run_sync(bcrypt.checkpw, digest, known, limiter=self.threads)
        return same and is_usable


class Services(NamedTuple):  # what lives as long as the process: app.state.services
    settings: Settings
    db: Database
    external: ExternalClient
    demo: dict[str, int]
    passwords: Passwords
    token_secret: str

    async def authenticate(self, email: str, address: str, password: str, refusal: str) -> Row:
        """Return the user; until then, count a failure. Raises: AuthError; too_many_attempts."""
        now, most = int(time.time()), self.settings.login_max_failures
        ends = now + self.settings.login_window_seconds
        async with self.passwords.place():
            await self.db.delete_ended_windows(now=now)
            for place, limit in ((address, most), ("*", 10 * most)):  # one must not use up all's
                row = await self.db.count_attempt(email=email, address=place, ends=ends)
                if row["attempts"] > limit:
                    log_event("login_throttled", "too many failures", None, logging.WARNING)
                    raise ServiceError("too_many_attempts", row["window_ends_at"] - now)
            user = await self.db.find_user_by_email(email=email)
            if not await self.passwords.verify(password, user.get("password_hash", "")):
                log_event("login_failed", "wrong password", user.get("id"), logging.WARNING)
                raise AuthError(refusal)
            await self.db.forgive_attempt(email=email, address=address)
        return user

    def check_new_password(self, field: str, password: str) -> None:
        """Raises: ValidationError."""
        least = self.settings.password_min_length
        if not least <= len(password) <= 128:
            why = f"A password has {least} to 128 characters."
            errors = [{"loc": ["body", field], "msg": why, "type": "password_length"}]
            raise ValidationError("invalid_request", errors=errors)

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
            claims = jwt.decode(token, self.token_secret, **rules)
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
# One, plain ASGI. What it learns it tells the routes, through scope["state"].
BODY_SECONDS = 5  # for a whole body to arrive
NO_STORE = (b"cache-control", b"no-store")  # tokens and accounts are nobody else's
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
PUBLIC_PATHS = {  # everything else needs a token
    *("/api/v1/auth/register", "/api/v1/auth/login", "/health/live", "/health/ready"),
    *("/docs", "/redoc", "/openapi.json", "/demo/upstream"),
}


def limit_body(request: Request, receive: Receive) -> Receive:
    """Bound a body in size and in time. Raises: body_too_large; request_timeout, from receive()."""
    headers, left = request.headers, request.app.state.settings.max_body_bytes
    if "content-length" not in headers and "transfer-encoding" not in headers:
        return receive
    if int(headers.get("content-length", 0)) > left:
        raise ServiceError("body_too_large")
    ends = time.monotonic() + BODY_SECONDS

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

    return limited_receive


async def check_token(request: Request) -> None:
    """Closed by default: what is not public needs a valid token. Raises: AuthError."""
    if request.scope["path"][len(request.scope.get("root_path", "")) :] in PUBLIC_PATHS:
        return
    # Two headers are one, with a comma (RFC 9110, 5.3), and no token has that.
    scheme, _, token = ",".join(request.headers.getlist("authorization")).partition(" ")
    if scheme.lower() == "bearer":
        request.state.user = await request.app.state.services.find_token_user(token.strip(" "))
        request.state.user_id = request.state.user["id"]
    elif any(route.matches(request.scope)[0].name == "FULL" for route in request.app.routes):
        raise AuthError("not_authenticated")  # else there is nothing to protect: 404 or 405


class RequestContext:
    """Gives a request its id, its access record and, whatever happens, an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status, request = time.perf_counter(), 0, Request(scope)
        sent_id = request.headers.get("x-request-id", "")
        request_id.set(sent_id if REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex)
        client = scope["client"][0] if scope.get("client") else "-"
        state = scope["state"] = {**scope.get("state", {}), "client": client, "user_id": None}

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] += [(b"x-request-id", request_id.get().encode()), NO_STORE]
            await send(message)

        try:
            receive = limit_body(request, receive)
            await check_token(request)
            await self.app(scope, receive, send_with_id)
        except Exception as exc:
            if isinstance(exc, AuthError) and "authorization" in request.headers:
                log_event("token_refused", exc.detail, None, logging.WARNING)
            elif not isinstance(exc, ServiceError):
                logger.exception("unhandled error")
            if not status:
                await (await problem_response(None, exc))(scope, receive, send_with_id)
        finally:
            method, path = scope["method"], scope["raw_path"].decode("ascii", "backslashreplace")
            ms = round((time.perf_counter() - began) * 1000, 2)
            fields = {"method": method, "path": path, "status": status, "duration_ms": ms}
            fields.update(client=client, user_id=state["user_id"])
            logger.info("%s %s %s %s ms", method, path, status, ms, extra={"fields": fields})


# ==== 8 Routes ========================================================================
# A route validates by its arguments' types, calls the database or the client, returns a model, and
# names its own errors in answers(...). It needs a token, unless its path is in PUBLIC_PATHS.
async def get_services(request: Request) -> Any:
    return request.app.state.services


def normalise_email(value: str) -> str:
    """Check the syntax, no display names, and lower the case: one address, one spelling."""
    try:
        return validate_email(value, check_deliverability=False).normalized.lower()
    except EmailNotValidError:  # its text repeats parts of the value
        raise ValueError("this is not an email address") from None


InServices = Annotated[Services, Depends(get_services)]
SPECIAL_USE_DOMAIN_NAMES.clear()  # .test and .local are good syntax, too
Address = Body(max_length=254, examples=["ada@example.com"], json_schema_extra={"format": "email"})
Email = Annotated[str, Address, pydantic.AfterValidator(normalise_email)]
# 512, because NFC leaves a quarter of the characters at least, and is slow on what is long.
NFC = pydantic.AfterValidator(lambda value: unicodedata.normalize("NFC", value))
Password = Annotated[str, Body(max_length=512, examples=["correct horse battery staple"]), NFC]
ExternalData = Annotated[dict[str, Any], Field(examples=[{"data": {"message": "Hello."}}])]
Flag = Annotated[bool, Body(embed=True, strict=True)]
router, BODY = APIRouter(), (408, 413, 422)


class UserResponse(BaseModel):
    id: uuid.UUID
    email: str = Field(examples=["ada@example.com"])
    created_at: datetime


class TokenResponse(BaseModel):
    access_token: str
    token_type: Literal["bearer"] = "bearer"
    expires_in: int = Field(description="Seconds.")


@router.post("/api/v1/auth/register", status_code=201, responses=answers(409, *BODY))
async def register(email: Email, password: Password, services: InServices) -> UserResponse:
    """Create an account. The password has PASSWORD_MIN_LENGTH (8) to 128 characters."""
    services.check_new_password("password", password)
    new = {"id": str(uuid.uuid4()), "created_at": datetime.now(timezone.utc).isoformat()}
    new["password_hash"] = await services.passwords.hash(password)
    user = await services.db.insert_user(email=email, **new)
    if not user:
        raise ServiceError("email_taken")
    log_event("user_registered", "user registered", user["id"])
    return UserResponse(**user)


@router.post("/api/v1/auth/login", responses=answers(401, 429, *BODY))
async def log_in(
    email: Email, password: Password, services: InServices, request: Request
) -> TokenResponse:
    """Exchange email and password for a token; paste it under "Authorize" to try the rest. After
    LOGIN_MAX_FAILURES even the right password has to wait, LOGIN_WINDOW_SECONDS at most."""
    user = await services.authenticate(email, request.state.client, password, "invalid_credentials")
    if int(user["password_hash"][4:6]) < services.settings.bcrypt_rounds:  # they have been raised
        renewed = await services.passwords.hash(password)
        await services.db.replace_hash(**user, new_hash=renewed, ended=0)
    log_event("login_succeeded", "logged in", user["id"])
    token, seconds = services.issue_token(user), services.settings.jwt_expires_seconds
    return TokenResponse(access_token=token, expires_in=seconds)


@router.get("/api/v1/auth/me")
async def show_account(request: Request) -> UserResponse:
    """Whose token is it?"""
    return UserResponse(**request.state.user)


@router.put("/api/v1/auth/password", status_code=204, responses=answers(403, 429, *BODY))
async def change_password(
    current_password: Password, new_password: Password, services: InServices, request: Request
) -> None:
    """Replace the password and end every session, this one too."""
    services.check_new_password("new_password", new_password)
    email, address = request.state.user["email"], request.state.client
    user = await services.authenticate(email, address, current_password, "wrong_password")
    renewed = await services.passwords.hash(new_password)
    if not await services.db.replace_hash(**user, new_hash=renewed, ended=1):
        raise AuthError("invalid_token")  # another change was quicker, and ended this session
    log_event("password_changed", "password changed", user["id"])


@router.post("/api/v1/auth/logout", status_code=204)
async def log_out(request: Request, services: InServices) -> None:
    """End every session: all tokens issued to the user until now stop working."""
    await services.db.end_sessions(id=request.state.user_id)
    log_event("logged_out", "logged out", request.state.user_id)


class CircuitStatus(BaseModel):
    state: Literal["closed", "open", "half-open"]
    failures: int = Field(description="Failed attempts in a row.")
    fail_max: int = Field(description="As many open the circuit.")
    retry_after_seconds: int = Field(description="Until a call may probe; 0 unless open.")


@router.get("/api/v1/external/data", responses=answers(502, 504))
async def fetch_external_data(request: Request) -> ExternalData:
    """Call the external API: with retries, within a deadline, behind a circuit breaker."""
    return {"data": await request.app.state.services.external.fetch()}  # the quick way to them


@router.get("/api/v1/external/status")
async def show_circuit(services: InServices) -> CircuitStatus:
    """The circuit of the process that answers. Open stays open until a call probes."""
    circuit = services.external.circuit
    counts = {"failures": circuit.breaker.fail_counter, "fail_max": circuit.breaker.fail_max}
    return CircuitStatus(state=circuit.state, **counts, retry_after_seconds=circuit.retry_after)


@router.get("/health/live")
async def check_liveness() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/health/ready")
async def check_readiness(services: InServices) -> dict[str, str]:
    """The database answers, too."""
    await services.db.find_user_by_id(id="")
    return {"status": "ok"}


async def switch_demo_upstream(failing: Flag, services: InServices) -> None:
    """Make the demo upstream fail, or heal it. Failing: fetch external data twice, and the circuit
    opens. Healed: wait for BREAKER_RESET_SECONDS, fetch again, and it closes."""
    services.demo["status"] = 503 if failing else 200


# ==== 9 App ===========================================================================
# The lifespan opens what lives as long as the process, in the order of need; it is closed in
# reverse after uvicorn has answered what was begun (SIGTERM).
@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings, transport, demo = app.state.settings, app.state.transport, {"status": 200}
    if transport is None and settings.external_api_url is None:
        transport = httpx.MockTransport(lambda _: httpx.Response(demo["status"], stream=HELLO))
    async with AsyncExitStack() as opened:
        db = await open_database(settings, opened)
        key = settings.jwt_secret
        secret = key.get_secret_value() if key else os.urandom(32).hex()
        if key is None and settings.environment == "development":
            logger.warning("JWT_SECRET is not set: a random one is used, kept in the database")
            secret = (await db.keep_secret(name="jwt_secret", value=secret))["value"]
        client, passwords = ExternalClient(settings, transport), Passwords(settings.bcrypt_rounds)
        await opened.enter_async_context(client.http)
        app.state.services = Services(settings, db, client, demo, passwords, secret)
        yield


def describe_api(app: FastAPI) -> dict[str, Any]:
    """FastAPI's openapi.json, with what holds for all: tags, locks, errors."""
    schema, text = FastAPI.openapi(app), {"type": "string"}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["tags"] = [path.split("/")[-2]]
            if path not in PUBLIC_PATHS:
                operation["responses"].update(answers(401))
                operation["security"] = [{"token": []}]
    schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    fields: dict[str, Any] = dict.fromkeys(("type", "title", "detail", "code", "request_id"), text)
    fields.update(status={"type": "integer"}, errors={"type": "array", "items": {"type": "object"}})
    schema["components"]["schemas"]["Problem"] = {"type": "object", "properties": fields}
    return schema


def create_app(settings: Settings, transport: Optional[httpx.AsyncBaseTransport] = None) -> FastAPI:
    """Put everything together; `transport` stands in for the network to the external API."""
    configure_logging(settings)
    handlers = {HTTPException: problem_response, RequestValidationError: problem_response}
    options: Any = {"title": "service", "exception_handlers": handlers, "lifespan": lifespan}
    options.update(redirect_slashes=False, generate_unique_id_function=lambda route: route.name)
    app = FastAPI(**options, responses=answers(500, 503))
    app.state.settings, app.state.transport = settings, transport
    app.include_router(router)
    if settings.environment == "development" and settings.external_api_url is None:
        app.put("/demo/upstream", status_code=204, responses=answers(*BODY))(switch_demo_upstream)
    app.openapi = lambda: describe_api(app)  # type: ignore[method-assign]
    app.add_middleware(RequestContext)
    return app


app = create_app(load_settings())
