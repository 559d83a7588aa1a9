"""The promises of the service, one test for each, under a heading for each topic.

`pytest` runs them on SQLite. With TEST_POSTGRES_URL=postgresql://... most of them run on
PostgreSQL, too. `pytest -m "not process"` leaves out the tests that start a server.
"""

import asyncio
import base64
import contextlib
import dataclasses
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import secrets
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unicodedata
import uuid
from datetime import date
from pathlib import Path
from unittest import mock

import anyio
import asyncpg
import bcrypt
import fastapi
import httpx
import jwt
import pydantic
import pytest
import uvicorn.supervisors.multiprocess
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException

FOLDER = Path(__file__).parent
START_FOLDER = os.getcwd()
# The .env and the environment of a developer stay out.
with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, clear=True):
    os.chdir(empty)
    import service

    WRITTEN_BY_IMPORT = os.listdir()
    os.chdir(START_FOLDER)
service.STDOUT = os.open(os.devnull, os.O_WRONLY)  # tests of the log look elsewhere

POSTGRES_URL = os.environ.get("TEST_POSTGRES_URL", "")
SSL_CONTEXT = (
    httpx.create_ssl_context()
)  # making one takes 50 ms, so all tests share it
SECRET = "a secret of thirty-two bytes or more, and of sixty-four for HS512"

EMAIL = "ada@example.com"
PASSWORD = "correct horse battery"
ADA = {"email": EMAIL, "password": PASSWORD}

REGISTER = "/api/v1/auth/register"
LOGIN = "/api/v1/auth/login"
ME = "/api/v1/auth/me"
CHANGE = "/api/v1/auth/password"
LOGOUT = "/api/v1/auth/logout"
DATA = "/api/v1/external/data"
STATUS = "/api/v1/external/status"
DEMO = "/demo/upstream"

# What the tests count on, whatever the defaults are.
SETTINGS = {
    "environment": "test",
    "jwt_expires_seconds": 86400,
    "bcrypt_rounds": 4,
    "login_max_failures": 5,
    "login_window_seconds": 300,
    "max_body_bytes": 65536,
    "external_attempts": 3,
    "breaker_fail_max": 5,
}

needs_postgres = pytest.mark.skipif(
    not POSTGRES_URL, reason="TEST_POSTGRES_URL is not set"
)
needs_local_postgres = pytest.mark.skipif(
    "@127.0.0.1" not in POSTGRES_URL, reason="stops processes of a local PostgreSQL"
)


# ---- what the tests share --------------------------------------------------------------


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """The same for all tests, whatever a developer has set."""
    for name in service.Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(httpx, "create_ssl_context", lambda: SSL_CONTEXT)


class Store:
    """An empty database, and a way to look into it without the service."""

    def __init__(self, url):
        self.url = url

    @property
    def path(self):
        return self.url[len("sqlite:///") :]

    async def sql(self, text):
        """Run one statement and return its rows as tuples."""
        if self.url.startswith("sqlite"):
            with contextlib.closing(
                sqlite3.connect(self.path, isolation_level=None)
            ) as db:
                return db.execute(text).fetchall()
        db = await asyncpg.connect(self.url)
        try:
            return [tuple(row) for row in await db.fetch(text)]
        finally:
            await db.close()


@pytest.fixture
def sqlite():
    """A file in the memory of the machine if possible: a disk is slow to confirm writes."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Store(f"sqlite:///{folder}/service.db")


@pytest.fixture(scope="session")
def postgres_database():
    """Each process of the test run has a database of its own."""
    if not POSTGRES_URL:
        pytest.skip("TEST_POSTGRES_URL is not set")
    name = f"service_test_{os.getpid()}"
    admin = Store(POSTGRES_URL)
    asyncio.run(admin.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
    asyncio.run(admin.sql(f"CREATE DATABASE {name}"))
    yield Store(re.sub(r"/[^/]*$", f"/{name}", POSTGRES_URL))
    asyncio.run(admin.sql(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
async def postgres(postgres_database):
    """The database, empty, and without the connections of the test before."""
    db = await asyncpg.connect(postgres_database.url)
    await db.execute("""
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid();
        DROP SCHEMA public CASCADE;
        CREATE SCHEMA public""")
    await db.close()
    return postgres_database


@pytest.fixture(params=["sqlite", "postgres"] if POSTGRES_URL else ["sqlite"])
def store(request):
    """Each test that uses it runs once on each database."""
    return request.getfixturevalue(request.param)


def make_settings(store, **settings):
    assert set(settings) <= set(service.Settings.model_fields), "an unknown setting"
    values = {**SETTINGS, "jwt_secret": SECRET, "database_url": store.url, **settings}
    return service.Settings(_env_file=None, **values)


@contextlib.asynccontextmanager
async def serve(store, **settings):
    """Run the service inside the test. Yield a client, with `app` and `services`."""
    app = service.create_app(make_settings(store, **settings))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test"
        ) as client:
            client.app = app
            client.services = app.state.services
            yield client


@pytest.fixture
async def client(store):
    async with serve(store) as client:
        yield client


async def sign_in(client, **account):
    """Register, if that is not done yet, and log in. Return the headers with the token."""
    await client.post(REGISTER, json={**ADA, **account})
    answer = await client.post(LOGIN, json={**ADA, **account})
    assert answer.status_code == 200, answer.text
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


@pytest.fixture
async def headers(client):
    return await sign_in(client)


def check_problem(answer, status, code):
    """Assert that the answer is this error, in the one shape of errors. Return its body."""
    body = answer.json()
    assert (answer.status_code, body["code"], body["status"]) == (status, code, status)
    assert answer.headers["content-type"] == "application/problem+json"
    members = {"type", "title", "status", "detail", "code", "request_id"}
    assert set(body) - {"errors"} == members
    assert body["request_id"] == answer.headers["x-request-id"]
    assert ("errors" in body) == (status == 422)
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert ("www-authenticate" in answer.headers) == (status == 401)
    return body


async def fail_logins(client, times, email=EMAIL, **options):
    """Log in with a wrong password, so many times at once. Return the sorted statuses."""
    wrong = {"email": email, "password": "wrong"}
    logins = [client.post(LOGIN, json=wrong, **options) for _ in range(times)]
    return sorted(answer.status_code for answer in await asyncio.gather(*logins))


class Upstream:
    """A real HTTP server with a script: bytes to send, or functions of the writer.

    The last entry of the script is repeated.
    """

    def __init__(self):
        self.script = [ok({"n": 1})]
        self.requests = []
        self.tasks = []

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/"
        return self

    async def __aexit__(self, *_):
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def answer(self, reader, writer):
        self.tasks.append(asyncio.current_task())
        gone = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*gone), contextlib.closing(writer):
            self.requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
            entry = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            if callable(entry):
                await entry(writer)
            else:
                writer.write(entry)
            await writer.drain()


def raw(status, body=b"", headers="", length=None):
    """The bytes of an answer. `length` is what Content-Length says."""
    length = len(body) if length is None else length
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n"
    return f"{head}{headers}\r\n".encode() + body


def ok(data):
    return raw(200, json.dumps(data).encode(), "Content-Type: application/json\r\n")


async def hang(writer):
    await asyncio.sleep(60)


@pytest.fixture
async def upstream():
    async with Upstream() as upstream:
        yield upstream


@pytest.fixture
async def guarded(sqlite, upstream):
    """A logged-in client of a service whose external API is `upstream`.

    One attempt for each call, short times, and a circuit that three failures open.
    """
    settings = {
        "external_api_url": upstream.url,
        "external_attempts": 1,
        "external_timeout_seconds": 2,
        "external_deadline_seconds": 5,
        "breaker_fail_max": 3,
        "breaker_reset_seconds": 60,
    }
    async with serve(sqlite, **settings) as client:
        client.headers.update(await sign_in(client))
        yield client


def turn_clock(monkeypatch, seconds):
    """Let the monotonic clock of the service be so many seconds ahead."""
    now = time.monotonic
    clock = mock.Mock(wraps=time, monotonic=lambda: now() + seconds)
    monkeypatch.setattr(service, "time", clock)


@pytest.fixture
def unused_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield free.getsockname()[1]


class Server:
    """A real uvicorn on a free port, with its own folder and environment."""

    has_started = False

    def __init__(
        self, folder, *arguments, app="service:app", output=None, **environment
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.log = folder / f"log-{self.port}"
        self.http = httpx.Client(
            base_url=self.url,
            timeout=15,
            verify=SSL_CONTEXT,
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        settings = {name.upper(): str(value) for name, value in SETTINGS.items()}
        settings.update(ENVIRONMENT="", LOG_FORMAT="json", PYTHONDONTWRITEBYTECODE="1")
        settings.update(PYTHONPATH=str(FOLDER), PATH=os.environ["PATH"], LANG="C")
        command = [sys.executable, "-m", "uvicorn", app, "--port", str(self.port)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments],
                cwd=folder,
                env={**settings, **environment},
                stdout=output or log,
                stderr=log,
                start_new_session=True,  # so that its workers can be killed with it
            )

    def __enter__(self):
        self.wait_for_start()
        if not self.has_started:
            raise AssertionError(self.log.read_text())
        return self

    def wait_for_start(self):
        """Return when the server has answered, or has ended, or after a long time."""
        deadline = time.monotonic() + 60
        while not self.has_started and time.monotonic() < deadline:
            if self.process.poll() is not None:
                return
            with contextlib.suppress(httpx.TransportError):
                self.ask("GET", "/health/live")
                self.has_started = True
            time.sleep(0.02)

    def is_starting(self):
        """Tell whether the process neither listens nor has ended."""
        with socket.socket() as client:
            refused = client.connect_ex(("127.0.0.1", self.port)) != 0
        return refused and self.process.poll() is None

    def __exit__(self, *_):
        self.http.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ask(self, method, path, **options):
        return self.http.request(method, path, **options)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(15)

    def sign_in(self):
        self.ask("POST", REGISTER, json=ADA)
        token = self.ask("POST", LOGIN, json=ADA).json()["access_token"]
        return {"Authorization": f"Bearer {token}"}


def start_with_pipe(folder, blocking, **options):
    """Start a server whose log goes to `server.pipe`, which nobody reads so far."""
    reader, writer = os.pipe()
    os.set_blocking(writer, blocking)
    server = Server(folder, output=writer, **options)
    os.close(writer)
    server.pipe = os.fdopen(reader, "rb")
    return server


def start_hasty(folder):
    """Start a server that waits half a second for a body, and that hashes slowly."""
    code = "import service\nservice.BODY_SECONDS = 0.5\napp = service.app\n"
    (folder / "hasty.py").write_text(code)
    return start_with_pipe(folder, False, app="hasty:app", BCRYPT_ROUNDS="13")


NO_DATABASE = "postgresql://u:hunter2@127.0.0.1:1/db"
TWO_WORKERS = ("--workers", "2")
# With this option, uvicorn notices sooner that a worker has ended.
IMPATIENT = ("--timeout-worker-healthcheck", "3")
WRONG = {"JWT_SECRET": "hunter2", "LOG_LEVEL": "ERROR"}

# The marker `process` of a test names the server that the test needs. The last three do
# not start, and end by themselves.
EARLY_SERVERS = {
    "shared": lambda folder: Server(folder, LOG_LEVEL="DEBUG"),
    "killed": Server,
    "hasty": start_hasty,
    "unread": lambda folder: start_with_pipe(folder, True),
    "two workers": lambda folder: Server(folder, *TWO_WORKERS),
    "readme": lambda folder: Server(folder, BREAKER_RESET_SECONDS="1"),
    "wrong setting": lambda folder: Server(folder, **WRONG),
    "wrong workers": lambda folder: Server(folder, *TWO_WORKERS, *IMPATIENT, **WRONG),
    "no database": lambda folder: Server(folder, DATABASE_URL=NO_DATABASE),
}


class EarlyServers:
    """Starts the servers that tests need, one after another, between other tests.

    A server starts in a process of its own while the tests go on. All this happens in the
    thread of the tests, because a test may change the environment or the clock.
    """

    def __init__(self, names, make_folder):
        self.waiting = names
        self.make_folder = make_folder
        self.starting = None
        self.servers = {}

    def start(self, name):
        self.waiting.remove(name)
        self.starting = EARLY_SERVERS[name](self.make_folder(name))
        self.servers[name] = self.starting

    def go_on(self):
        """Start the next server, unless the last one is not ready yet."""
        if self.waiting and not (self.starting and self.starting.is_starting()):
            self.start(self.waiting[0])

    def get(self, name):
        """Return a server that has started, or has ended by itself."""
        if name in self.waiting:
            self.start(name)
        self.servers[name].wait_for_start()
        return self.servers[name]


@pytest.fixture(scope="session")
def early_servers(request, tmp_path_factory):
    marks = [test.get_closest_marker("process") for test in request.session.items]
    needed = {mark.args[0] for mark in marks if mark and mark.args}
    names = [name for name in EARLY_SERVERS if name in needed]
    early_servers = EarlyServers(names, tmp_path_factory.mktemp)
    yield early_servers
    for server in early_servers.servers.values():
        server.__exit__()


@pytest.fixture(autouse=True)
def next_early_server(early_servers):
    early_servers.go_on()


@pytest.fixture(scope="session")
def server(early_servers):
    """One server for all tests that do not disturb each other. Nobody must stop it."""
    return early_servers.get("shared")


def read_table(heading):
    """Return the rows of the first table below a heading of the README."""
    text = (FOLDER / "README.md").read_text().partition(f"\n## {heading}\n")[2]
    rows = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE).group().splitlines()[2:]
    return [
        [cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows
    ]


@pytest.fixture
def memory():
    return Store("sqlite:///:memory:")


# For promises in which the kind of the database plays no part.
in_memory = pytest.mark.parametrize("store", ["memory"], indirect=True)


@pytest.fixture(scope="session")
def shared():
    """A client for all tests that change nothing, with the token of its user.

    They must not end the session of the user, nor fail a login.
    """
    settings = make_settings(Store("sqlite:///:memory:"), environment="development")
    app = service.create_app(settings)
    with TestClient(app, follow_redirects=False) as client:
        client.post(REGISTER, json=ADA)
        client.token = client.post(LOGIN, json=ADA).json()["access_token"]
        client.bearer = {"Authorization": f"Bearer {client.token}"}
        yield client


# ---- settings --------------------------------------------------------------------------


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Load the settings in an empty folder, with no other environment than the given."""
    monkeypatch.chdir(tmp_path)

    def load_from(**environment):
        with mock.patch.dict(os.environ, environment, clear=True):
            return service.load_settings()

    return load_from


def each_value(table):
    """Make a case, with an id, of each value of each setting in the table."""
    return [
        pytest.param(name, value, id=f"{name}={value}")
        for name, values in table.items()
        for value in values
    ]


LAST_GOOD_VALUES = {
    "DATABASE_TIMEOUT_SECONDS": ["0.001", "3600"],
    "JWT_EXPIRES_SECONDS": ["1", "315360000"],
    "BCRYPT_ROUNDS": ["4", "15"],
    "LOGIN_MAX_FAILURES": ["1", "1000000"],
    "LOGIN_WINDOW_SECONDS": ["1", "1000000"],
    "MAX_BODY_BYTES": ["1", "1073741824"],
    "EXTERNAL_TIMEOUT_SECONDS": ["0.001", "3600"],
    "EXTERNAL_DEADLINE_SECONDS": ["0.001", "3600"],
    "EXTERNAL_ATTEMPTS": ["1", "20"],
    "BREAKER_FAIL_MAX": ["1", "1000000"],
    "BREAKER_RESET_SECONDS": ["0.001", "3600"],
}

FIRST_BAD_VALUES = {
    "DATABASE_TIMEOUT_SECONDS": ["0", "3600.001", "inf"],
    "JWT_EXPIRES_SECONDS": ["0", "315360001"],
    "BCRYPT_ROUNDS": ["3", "16"],
    "LOGIN_MAX_FAILURES": ["0", "1000001"],
    "LOGIN_WINDOW_SECONDS": ["0", "1000001"],
    "MAX_BODY_BYTES": ["0", "1073741825"],
    "EXTERNAL_TIMEOUT_SECONDS": ["0", "3600.001", "inf"],
    "EXTERNAL_DEADLINE_SECONDS": ["0", "3600.001", "inf"],
    "EXTERNAL_ATTEMPTS": ["0", "21"],
    "BREAKER_FAIL_MAX": ["0", "1000001"],
    "BREAKER_RESET_SECONDS": ["0", "3600.001", "inf"],
}

# None of these values is a part of the message that refuses it.
WRONG_VALUES = {
    "ENVIRONMENT": ["staging", "Production"],
    "DATABASE_URL": ["mysql://u:hunter2@h/d"],
    "DATABASE_TIMEOUT_SECONDS": ["nan", "5s"],
    "JWT_SECRET": ["hunter2"],
    "JWT_EXPIRES_SECONDS": ["1e9"],
    "BCRYPT_ROUNDS": ["12.5"],
    "LOGIN_MAX_FAILURES": ["-1"],
    "LOGIN_WINDOW_SECONDS": ["soon"],
    "MAX_BODY_BYTES": ["64k"],
    "EXTERNAL_API_URL": ["ftp://hunter2/", "hunter2"],
    "EXTERNAL_TIMEOUT_SECONDS": ["nan"],
    "EXTERNAL_DEADLINE_SECONDS": ["nan"],
    "EXTERNAL_ATTEMPTS": ["3.5"],
    "BREAKER_FAIL_MAX": ["-1"],
    "BREAKER_RESET_SECONDS": ["nan"],
    "LOG_LEVEL": ["loud", "CRITICAL", "NOTSET", "20"],
    "LOG_FORMAT": ["xml"],
}


@pytest.mark.parametrize("name, value", each_value(LAST_GOOD_VALUES))
def test_the_last_good_value_of_a_setting_is_taken(load, name, value):
    settings = load(**{name: value})
    assert getattr(settings, name.lower()) == float(value)


@pytest.mark.parametrize("name, value", each_value(FIRST_BAD_VALUES))
def test_the_first_bad_value_of_a_setting_is_refused(load, name, value):
    with pytest.raises(service.StartError, match=f"^{name}: "):
        load(**{name: value})


@pytest.mark.parametrize("name, value", each_value(WRONG_VALUES))
def test_a_wrong_value_gives_one_line_with_the_name_and_without_the_value(
    load, name, value
):
    with pytest.raises(service.StartError) as refusal:
        load(**{name: value})
    message = str(refusal.value)
    assert message.startswith(f"{name}: ")
    assert value not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "wrong, names",
    [
        pytest.param(
            {"BCRYPT_ROUNDS": "3", "LOG_LEVEL": "loud", "JWT_SECRET": "hunter2"},
            ["BCRYPT_ROUNDS", "LOG_LEVEL", "JWT_SECRET"],
            id="three wrong values",
        ),
        pytest.param(
            {"ENVIRONMENT": "production"},
            ["JWT_SECRET", "EXTERNAL_API_URL"],
            id="production without its values",
        ),
    ],
)
def test_several_wrong_settings_are_all_named(load, wrong, names):
    with pytest.raises(service.StartError) as refusal:
        load(**wrong)
    assert [name for name in names if name not in str(refusal.value)] == []


WRONG_DATABASE_URLS = {
    "another database": "mysql://u:hunter2@h/d",
    "a driver in the scheme": "postgresql+asyncpg://u:hunter2@h/d",
    "no database": "postgresql://u:hunter2@h",
    "an empty database": "postgresql://u:hunter2@h/",
    "no host": "postgresql://u:hunter2@/d",
    "port 0": "postgresql://u:hunter2@h:0/d",
    "a port above 65535": "postgresql://u:hunter2@h:65536/d",
    "an unknown option": "postgresql://u:hunter2@h/d?sslmode=require",
    "an option of SQLite": "sqlite:///x.db?timeout=1&hunter2",
    "the password where the port stands": "postgresql://bob:hunter2/d",
    "a slash in the password": "postgresql://bob:hunter2/x@h/d",
    "digits and a slash in the password": "postgresql://bob:1234/hunter2@h/d",
    "digits, a slash and a # in the password": "postgresql://u:1/hunter2#x@h/d",
    "an open bracket in the password": "postgresql://bob:[hunter2@h/d",
    "a wide question mark": "postgresql://bob:hunter2\uff1f@h/d",
    "SQLite without a path": "sqlite:///",
    "SQLite with two slashes": "sqlite://hunter2",
}


@pytest.mark.parametrize(
    "url", WRONG_DATABASE_URLS.values(), ids=WRONG_DATABASE_URLS.keys()
)
def test_a_wrong_database_url_is_refused_without_its_password(load, url):
    with pytest.raises(service.StartError) as refusal:
        load(DATABASE_URL=url)
    assert str(refusal.value).startswith("DATABASE_URL: ")
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    "option",
    [
        pytest.param("max_size=many", id="max_size that is not a number"),
        pytest.param("max_size=0", id="max_size of zero"),
        pytest.param("ssl=hunter2", id="ssl that is unknown"),
    ],
)
async def test_a_wrong_option_in_the_database_url_is_refused_at_the_start(load, option):
    with pytest.raises(service.StartError) as refusal:
        url = f"postgresql://u:hunter2@127.0.0.1:1/d?{option}"
        app = service.create_app(load(DATABASE_URL=url))
        async with app.router.lifespan_context(app):
            pass
    assert str(refusal.value).startswith("DATABASE_URL: ")
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("sqlite:///service.db", id="a file in the working folder"),
        pytest.param("sqlite:////a/b c.db", id="an absolute path with a blank"),
        pytest.param("sqlite:///:memory:", id="a database in memory"),
        pytest.param("postgresql://h/d", id="no user"),
        pytest.param("postgresql://u@h:1/d", id="the first port"),
        pytest.param("postgresql://u@h:65535/d", id="the last port"),
        pytest.param("postgresql://h/d?ssl=require&max_size=3", id="both options"),
        pytest.param("postgresql://u:p%40%2F!@h/d", id="an escaped password"),
        pytest.param("postgresql://u:p@[::1]/d_1", id="IPv6"),
    ],
)
def test_a_good_database_url_is_taken(load, url):
    assert load(DATABASE_URL=url).database_url == url


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"jwt_secret": "hunter2"}, id="secret"),
        pytest.param({"database_url": "mysql://u:hunter2@h/d"}, id="database"),
        pytest.param({"external_api_url": "ftp://u:hunter2@h/"}, id="external API"),
        pytest.param(
            {"environment": "production", "database_url": "postgresql://u:hunter2@h/d"},
            id="a secret beside a missing value",
        ),
    ],
)
def test_the_error_text_of_settings_does_not_show_the_input(values):
    refused = pytest.raises(pydantic.ValidationError)
    with mock.patch.dict(os.environ, clear=True), refused as refusal:
        service.Settings(_env_file=None, **values)
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    "secret",
    [
        pytest.param("x" * 31, id="31 letters"),
        pytest.param("\u00e9" * 15 + "x", id="31 bytes in 16 letters"),
    ],
)
def test_a_secret_of_31_bytes_is_refused(load, secret):
    with pytest.raises(service.StartError, match="^JWT_SECRET: "):
        load(JWT_SECRET=secret)


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(f"ssh-rsa hunter2{'A' * 40}", id="of SSH"),
        pytest.param(
            "-----BEGIN PUBLIC KEY-----\nhunter2\n-----END PUBLIC KEY-----", id="PEM"
        ),
    ],
)
def test_a_public_key_is_refused_as_a_secret(load, key):
    with pytest.raises(service.StartError, match="^JWT_SECRET: .* public key") as error:
        load(JWT_SECRET=key)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "secret",
    [
        pytest.param("x" * 32, id="32 letters"),
        pytest.param("\u00e9" * 16, id="32 bytes in 16 letters"),
    ],
)
def test_a_secret_of_32_bytes_is_taken(load, secret):
    assert load(JWT_SECRET=secret).jwt_secret.get_secret_value() == secret


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR"])
def test_a_log_level_from_debug_to_error_is_taken_in_any_case(load, level):
    assert load(LOG_LEVEL=level).log_level == level
    assert load(LOG_LEVEL=level.lower()).log_level == level


PRODUCTION = {
    "ENVIRONMENT": "production",
    "JWT_SECRET": SECRET,
    "EXTERNAL_API_URL": "https://api.example.com/",
}


def test_production_starts_with_a_secret_and_an_api(load):
    assert load(**PRODUCTION).environment == "production"


@pytest.mark.parametrize("missing", ["JWT_SECRET", "EXTERNAL_API_URL"])
def test_production_needs_a_secret_and_an_api(load, missing):
    with pytest.raises(service.StartError, match=f"^{missing}: "):
        load(**{**PRODUCTION, missing: ""})


def test_the_environment_wins_over_the_env_file(load, tmp_path):
    (tmp_path / ".env").write_text("BCRYPT_ROUNDS=5\nLOG_LEVEL=debug\nUNKNOWN=1\n")
    settings = load(BCRYPT_ROUNDS="6")
    assert (settings.bcrypt_rounds, settings.log_level) == (6, "DEBUG")


def test_an_empty_value_counts_as_unset(load, tmp_path):
    (tmp_path / ".env").write_text("EXTERNAL_ATTEMPTS=\nLOG_LEVEL=ERROR\n")
    settings = load(LOG_FORMAT="", LOG_LEVEL="")
    defaults = service.Settings.model_fields
    assert settings.external_attempts == defaults["external_attempts"].default
    assert settings.log_format == defaults["log_format"].default
    assert settings.log_level == "ERROR"


def test_an_env_file_with_a_byte_order_mark_keeps_its_first_line(load, tmp_path):
    text = "ENVIRONMENT=test\r\nLOG_FORMAT=json\r\n"
    (tmp_path / ".env").write_bytes(b"\xef\xbb\xbf" + text.encode())
    settings = load()
    assert (settings.environment, settings.log_format) == ("test", "json")


def test_an_env_file_that_is_not_utf_8_is_named(load, tmp_path):
    (tmp_path / ".env").write_bytes(b"LOG_LEVEL=\xff")
    with pytest.raises(service.StartError, match=r"^\.env cannot be read: [A-Za-z]+$"):
        load()


@pytest.mark.skipif(
    not os.path.exists("/proc/self/mem"), reason="needs a file that fails to be read"
)
def test_an_env_file_that_cannot_be_read_is_named(load, tmp_path):
    # Even root gets an error from this file, because nothing is at its first address.
    (tmp_path / ".env").symlink_to("/proc/self/mem")
    with pytest.raises(service.StartError, match=r"^\.env cannot be read: [A-Za-z]+$"):
        load()


async def test_a_database_in_memory_serves_a_whole_session(
    memory, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    async with serve(memory) as client:
        headers = await sign_in(client)
        assert (await client.get(ME, headers=headers)).json()["email"] == EMAIL
        assert (await client.post(LOGOUT, headers=headers)).status_code == 204
        check_problem(await client.get(ME, headers=headers), 401, "invalid_token")
        assert (await client.get("/health/ready")).status_code == 200
    assert list(tmp_path.iterdir()) == []


async def test_a_database_in_memory_serves_many_requests_at_once(memory):
    async with serve(memory) as client:
        users = [sign_in(client, email=f"{n}@example.com") for n in range(10)]
        assert len(await asyncio.gather(*users)) == 10


async def test_each_app_has_a_database_in_memory_of_its_own(memory):
    async with serve(memory) as one, serve(memory) as other:
        await sign_in(one)
        check_problem(await other.post(LOGIN, json=ADA), 401, "invalid_credentials")


# ---- registration ----------------------------------------------------------------------


async def test_registering_returns_the_account_without_the_password(client):
    answer = await client.post(REGISTER, json=ADA)
    assert answer.status_code == 201
    account = answer.json()
    assert set(account) == {"id", "email", "created_at"}
    assert account["email"] == EMAIL
    assert str(uuid.UUID(account["id"])) == account["id"]
    assert account["created_at"].endswith("Z")


async def test_registering_stores_a_hash_of_the_password(client, store):
    account = (await client.post(REGISTER, json=ADA)).json()
    [row] = await store.sql("SELECT id, email, password_hash, created_at FROM users")
    assert row[:2] == (account["id"], EMAIL)
    assert row[2].startswith("$2b$04$")
    assert datetime.datetime.fromisoformat(row[3]).utcoffset() == datetime.timedelta(0)


async def test_an_email_is_stored_in_lower_case(client, store):
    answer = await client.post(REGISTER, json={**ADA, "email": "Ada@EXAMPLE.com"})
    assert answer.json()["email"] == EMAIL
    assert await store.sql("SELECT email FROM users") == [(EMAIL,)]


@pytest.mark.parametrize("email", [EMAIL, "ADA@example.COM", "aDA@eXample.com"])
async def test_an_email_is_taken_in_any_case(client, email):
    await client.post(REGISTER, json={**ADA, "email": "Ada@Example.com"})
    answer = await client.post(REGISTER, json={**ADA, "email": email})
    check_problem(answer, 409, "email_taken")


@pytest.mark.parametrize("email", [EMAIL, "ADA@example.COM", "aDA@eXample.com"])
async def test_an_email_logs_in_in_any_case(client, email):
    await client.post(REGISTER, json={**ADA, "email": "Ada@Example.com"})
    answer = await client.post(LOGIN, json={**ADA, "email": email})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "email",
    [
        pytest.param("a@b.test", id="a domain for tests"),
        pytest.param("a+b@x.local", id="a plus and a local domain"),
        pytest.param("a@m\u00fcnchen.example", id="an international domain"),
        pytest.param("\u00e9@x.org", id="an international name"),
        pytest.param(f"{'a' * 64}@{'.'.join(['b' * 61] * 3)}.com", id="254 characters"),
    ],
)
async def test_an_address_with_the_syntax_of_an_email_is_accepted(client, email):
    assert await sign_in(client, email=email)


@pytest.mark.parametrize(
    "email",
    [
        pytest.param("", id="empty"),
        pytest.param("ada", id="no at sign"),
        pytest.param("@example.com", id="no name"),
        pytest.param("a@b", id="no dot in the domain"),
        pytest.param("Ada <ada@example.com>", id="a display name"),
        pytest.param("a@example.com, b@example.com", id="two addresses"),
        pytest.param("a b@example.com", id="a blank"),
        pytest.param("a@x.org\n", id="a newline"),
        pytest.param("a\x00@example.com", id="a NUL"),
        pytest.param(
            f"{'a' * 64}@{'.'.join(['b' * 61] * 3)}b.com", id="255 characters"
        ),
        pytest.param("a@" + "x" * 400, id="402 characters"),
        pytest.param(None, id="null"),
        pytest.param(12345, id="a number"),
        pytest.param(["a@b.org"], id="a list"),
    ],
)
def test_a_wrong_email_is_refused_without_an_echo(shared, email):
    answer = shared.post(REGISTER, json={**ADA, "email": email})
    body = check_problem(answer, 422, "invalid_request")
    assert [error["loc"] for error in body["errors"]] == [["body", "email"]]
    assert set(body["errors"][0]) == {"loc", "msg", "type"}
    text = answer.text.replace(body["request_id"], "")
    assert PASSWORD not in text
    assert not email or str(email) not in text


@pytest.mark.parametrize("model", ["UserRegister", "UserLogin"])
def test_openapi_states_the_limit_of_an_email(model):
    schemas = service.app.openapi()["components"]["schemas"]
    schema = schemas[model]["properties"]["email"]
    assert (schema["format"], schema["maxLength"]) == ("email", 254)


async def test_the_email_in_the_answer_is_the_one_that_is_taken_and_logs_in(client):
    # Lower case and Unicode's normal form depend on each other in this letter.
    email = "J\u030c@example.com"
    answer = await client.post(REGISTER, json={**ADA, "email": email})
    shown = answer.json()["email"]
    again = await client.post(REGISTER, json={**ADA, "email": shown})
    check_problem(again, 409, "email_taken")
    assert await sign_in(client, email=shown)
    assert await sign_in(client, email=email)


async def test_of_many_registrations_of_one_email_exactly_one_succeeds(client, store):
    registrations = [client.post(REGISTER, json=ADA) for _ in range(12)]
    answers = await asyncio.gather(*registrations)
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 11
    assert await store.sql("SELECT COUNT(*) FROM users") == [(1,)]


async def test_many_users_can_register_and_log_in_at_once(client):
    users = [sign_in(client, email=f"{n}@example.com") for n in range(12)]
    assert len(await asyncio.gather(*users)) == 12


# ---- passwords -------------------------------------------------------------------------

# NFC makes one letter of "e" and an accent. In NFD, GREEK_LETTER takes four characters.
E_WITH_ACCENT = "e\u0301"
GREEK_LETTER = "\u1f82"
HORSE = "\U0001f40e"  # four bytes in UTF-8

too_short_or_too_long = pytest.mark.parametrize(
    "password",
    [
        pytest.param("", id="empty"),
        pytest.param("seven77", id="7 characters"),
        pytest.param(E_WITH_ACCENT * 7, id="7 characters in NFC"),
        pytest.param("x" * 129, id="129 characters"),
        pytest.param(E_WITH_ACCENT * 129, id="129 characters in NFC"),
        pytest.param(
            unicodedata.normalize("NFD", GREEK_LETTER * 129),
            id="129 characters in NFC and 516 in NFD",
        ),
    ],
)


@too_short_or_too_long
def test_a_password_of_less_than_8_or_more_than_128_characters_is_not_registered(
    shared, password
):
    answer = shared.post(REGISTER, json={**ADA, "password": password})
    body = check_problem(answer, 422, "invalid_request")
    assert body["errors"][0]["loc"] == ["body", "password"]


@too_short_or_too_long
def test_a_password_does_not_change_to_less_than_8_or_more_than_128_characters(
    shared, password
):
    change = {"current_password": PASSWORD, "new_password": password}
    answer = shared.put(CHANGE, json=change, headers=shared.bearer)
    body = check_problem(answer, 422, "invalid_request")
    assert body["errors"][0]["loc"] == ["body", "new_password"]


@pytest.mark.parametrize(
    "password",
    [
        pytest.param("x" * 8, id="8 characters"),
        pytest.param(E_WITH_ACCENT * 8, id="8 characters in NFC"),
        pytest.param(HORSE * 128, id="128 characters of four bytes"),
        pytest.param(E_WITH_ACCENT * 128, id="128 characters in NFC"),
        pytest.param(
            unicodedata.normalize("NFD", GREEK_LETTER * 128),
            id="128 characters in NFC and 512 in NFD",
        ),
        pytest.param("a\x00b" * 4, id="NUL"),
        pytest.param(" " * 8, id="blanks"),
    ],
)
async def test_any_8_to_128_characters_make_a_password(client, password):
    assert await sign_in(client, password=password)


@pytest.mark.parametrize(
    "password",
    [
        pytest.param("x" * 8, id="8 characters"),
        pytest.param(HORSE * 128, id="128 characters of four bytes"),
    ],
)
@in_memory
async def test_a_password_can_be_changed_to_8_or_128_characters(
    client, headers, password
):
    change = {"current_password": PASSWORD, "new_password": password}
    answer = await client.put(CHANGE, json=change, headers=headers)
    assert answer.status_code == 204
    assert await sign_in(client, password=password)


@pytest.mark.parametrize("stored, typed", [("NFC", "NFD"), ("NFD", "NFC")])
@in_memory
async def test_composed_and_decomposed_letters_are_the_same_password(
    client, stored, typed
):
    password = E_WITH_ACCENT * 7 + GREEK_LETTER
    stored_form = unicodedata.normalize(stored, password)
    await client.post(REGISTER, json={**ADA, "password": stored_form})
    typed_form = unicodedata.normalize(typed, password)
    answer = await client.post(LOGIN, json={**ADA, "password": typed_form})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "registered, typed",
    [
        pytest.param("\ufb01ne horses", "fine horses", id="a ligature"),
        pytest.param("correct horse", "Correct horse", id="case"),
        pytest.param("correct horse", "correct horse ", id="a blank at the end"),
        pytest.param("correct\x00horse", "correct\x00house", id="after a NUL"),
        pytest.param("x" * 127 + "a", "x" * 127 + "b", id="the 128th character"),
        pytest.param(HORSE * 30 + "a", HORSE * 30 + "b", id="after 72 bytes"),
    ],
)
@in_memory
async def test_a_password_that_differs_in_one_character_does_not_log_in(
    client, registered, typed
):
    await client.post(REGISTER, json={**ADA, "password": registered})
    answer = await client.post(LOGIN, json={**ADA, "password": typed})
    check_problem(answer, 401, "invalid_credentials")
    assert await sign_in(client, password=registered)


wrong_passwords = pytest.mark.parametrize(
    "password",
    [
        pytest.param("", id="empty"),
        pytest.param("x", id="1 character"),
        pytest.param("x" * 129, id="129 characters"),
        pytest.param("x" * 60000, id="60,000 characters"),
    ],
)


@wrong_passwords
@in_memory
async def test_a_login_with_a_password_of_any_length_is_wrong_and_not_invalid(
    client, password
):
    await client.post(REGISTER, json=ADA)
    answer = await client.post(LOGIN, json={**ADA, "password": password})
    check_problem(answer, 401, "invalid_credentials")


@wrong_passwords
@in_memory
async def test_a_current_password_of_any_length_is_wrong_and_not_invalid(
    client, headers, password
):
    change = {"current_password": password, "new_password": "another password"}
    answer = await client.put(CHANGE, json=change, headers=headers)
    check_problem(answer, 403, "wrong_password")


@pytest.mark.parametrize("path", [REGISTER, LOGIN])
def test_a_password_that_utf_8_cannot_hold_is_refused(shared, path):
    half_a_pair = '{"email": "ada@example.com", "password": "correct horse \\ud800"}'
    json_type = {"Content-Type": "application/json"}
    answer = shared.post(path, content=half_a_pair, headers=json_type)
    body = check_problem(answer, 422, "invalid_request")
    assert body["errors"][0]["loc"] == ["body", "password"]
    assert "correct" not in answer.text


@pytest.mark.parametrize(
    "model, field",
    [("UserRegister", "password"), ("PasswordChange", "new_password")],
)
def test_openapi_states_the_limits_of_new_passwords(model, field):
    schemas = service.app.openapi()["components"]["schemas"]
    schema = schemas[model]["properties"][field]
    assert (schema["minLength"], schema["maxLength"]) == (8, 128)


@pytest.mark.parametrize(
    "model, field",
    [("UserLogin", "password"), ("PasswordChange", "current_password")],
)
def test_openapi_states_no_limits_of_present_passwords(model, field):
    schemas = service.app.openapi()["components"]["schemas"]
    schema = schemas[model]["properties"][field]
    assert schema["type"] == "string"
    assert not {"minLength", "maxLength", "pattern"} & set(schema)


# ---- login -----------------------------------------------------------------------------


class HashCalls:
    """Stands in for a function of bcrypt. Notes its calls, and can hold them up."""

    def __init__(self, function):
        self.function = function
        self.arguments = []
        self.threads = []
        self.running = 0
        self.most_at_once = 0
        self.lock = threading.Lock()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, *arguments):
        with self.lock:
            self.arguments.append(arguments)
            self.threads.append(threading.current_thread())
            self.running += 1
            self.most_at_once = max(self.most_at_once, self.running)
        if not self.gate.wait(5):  # the test has failed: do not hold up the rest
            self.gate.set()
        try:
            return self.function(*arguments)
        finally:
            with self.lock:
                self.running -= 1

    async def wait_for_a_call(self):
        with anyio.fail_after(10):
            while not self.arguments:
                await asyncio.sleep(0.01)


@pytest.fixture
def hashpw(monkeypatch):
    calls = HashCalls(bcrypt.hashpw)
    monkeypatch.setattr(bcrypt, "hashpw", calls)
    yield calls
    calls.gate.set()


@pytest.fixture
def checkpw(monkeypatch):
    calls = HashCalls(bcrypt.checkpw)
    monkeypatch.setattr(bcrypt, "checkpw", calls)
    yield calls
    calls.gate.set()


async def test_login_returns_a_bearer_token(client):
    await client.post(REGISTER, json=ADA)
    answer = await client.post(LOGIN, json=ADA)
    assert answer.status_code == 200
    body = answer.json()
    assert set(body) == {"access_token", "token_type", "expires_in"}
    assert (body["token_type"], body["expires_in"]) == ("bearer", 86400)


@in_memory
async def test_no_cache_may_keep_a_token(client):
    await client.post(REGISTER, json=ADA)
    answer = await client.post(LOGIN, json=ADA)
    assert answer.headers["cache-control"] == "no-store"


@in_memory
async def test_each_login_returns_another_token(client):
    assert await sign_in(client) != await sign_in(client)


async def test_an_unknown_email_and_a_wrong_password_get_the_same_answer(client):
    await client.post(REGISTER, json=ADA)
    wrong = await client.post(LOGIN, json={**ADA, "password": "wrong"})
    unknown = await client.post(LOGIN, json={**ADA, "email": "bob@example.com"})
    one = check_problem(wrong, 401, "invalid_credentials")
    other = check_problem(unknown, 401, "invalid_credentials")
    assert {**one, "request_id": ""} == {**other, "request_id": ""}
    for answer in (wrong, unknown):
        assert answer.headers["www-authenticate"] == 'Bearer realm="service"'


@pytest.mark.parametrize(
    "email",
    [
        pytest.param(EMAIL, id="a known email"),
        pytest.param("bob@example.com", id="an unknown email"),
    ],
)
async def test_a_wrong_login_costs_one_hash_of_the_configured_rounds(
    store, checkpw, email
):
    async with serve(store, bcrypt_rounds=5) as client:
        await client.post(REGISTER, json=ADA)
        await client.post(LOGIN, json={"email": email, "password": "wrong"})
    assert [stored[:7] for _, stored in checkpw.arguments] == [b"$2b$05$"]


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param("''", id="empty"),
        pytest.param("'junk'", id="junk"),
        pytest.param("SUBSTR(password_hash, 1, 59)", id="the last character is gone"),
        pytest.param("password_hash || 'x'", id="a character too many"),
        pytest.param("SUBSTR(password_hash, 1, 59) || '\u00e9'", id="not ASCII"),
        pytest.param(f"'$2b$04${'a' * 53}'", id="a salt that bcrypt refuses"),
        pytest.param(f"'$2b$03${'.' * 53}'", id="3 rounds"),
        pytest.param(f"'$2b$16${'.' * 53}'", id="16 rounds"),
        pytest.param(f"'$2b$31${'a' * 53}'", id="31 rounds"),
    ],
)
async def test_a_damaged_or_too_expensive_hash_is_a_wrong_login_at_the_usual_cost(
    client, store, checkpw, stored
):
    await client.post(REGISTER, json=ADA)
    await store.sql(f"UPDATE users SET password_hash = {stored}")
    check_problem(await client.post(LOGIN, json=ADA), 401, "invalid_credentials")
    assert [used[:7] for _, used in checkpw.arguments] == [b"$2b$04$"]


async def test_a_login_renews_a_hash_of_fewer_rounds(store):
    async with serve(store) as client:
        await sign_in(client)
    async with serve(store, bcrypt_rounds=5) as client:
        await sign_in(client)
        [(stored,)] = await store.sql("SELECT password_hash FROM users")
        assert stored.startswith("$2b$05$")
        assert await sign_in(client)


async def test_sessions_go_on_when_a_login_renews_the_hash(store):
    async with serve(store) as client:
        headers = await sign_in(client)
    async with serve(store, bcrypt_rounds=5) as client:
        await sign_in(client)
        assert (await client.get(ME, headers=headers)).status_code == 200


async def test_a_login_succeeds_even_if_its_hash_cannot_be_renewed(store, monkeypatch):
    async def refuse(password):
        raise service.ServiceError("overloaded")

    async with serve(store) as client:
        await client.post(REGISTER, json=ADA)
    async with serve(store, bcrypt_rounds=5) as client:
        monkeypatch.setattr(client.services.passwords, "hash", refuse)
        assert (await client.post(LOGIN, json=ADA)).status_code == 200


@pytest.mark.parametrize(
    "rounds", [pytest.param(4, id="as many"), pytest.param(5, id="more")]
)
async def test_a_login_does_not_touch_a_hash_of_enough_rounds(store, rounds):
    async with serve(store, bcrypt_rounds=rounds) as client:
        await client.post(REGISTER, json=ADA)
        before = await store.sql("SELECT password_hash FROM users")
    async with serve(store, bcrypt_rounds=4) as client:
        await sign_in(client)
    assert await store.sql("SELECT password_hash FROM users") == before


async def test_a_renewed_hash_does_not_undo_a_password_change(
    store, hashpw, monkeypatch
):
    async with serve(store) as client:
        headers = await sign_in(client)
    hashpw.arguments.clear()
    async with serve(store, bcrypt_rounds=5) as client:
        hashpw.gate.clear()
        login = asyncio.ensure_future(client.post(LOGIN, json=ADA))
        await hashpw.wait_for_a_call()  # the login computes its new hash
        monkeypatch.setattr(bcrypt, "hashpw", hashpw.function)
        change = {"current_password": PASSWORD, "new_password": "another password"}
        answer = await client.put(CHANGE, json=change, headers=headers)
        assert answer.status_code == 204
        hashpw.gate.set()
        await login
        check_problem(await client.post(LOGIN, json=ADA), 401, "invalid_credentials")
        assert await sign_in(client, password="another password")


async def test_a_session_that_ends_during_a_password_change_changes_nothing(
    client, headers, store, monkeypatch
):
    authenticate = client.services.accounts.authenticate

    async def log_out_and_authenticate(*arguments):
        await store.sql("UPDATE users SET token_version = token_version + 1")
        return await authenticate(*arguments)

    monkeypatch.setattr(
        client.services.accounts, "authenticate", log_out_and_authenticate
    )
    change = {"current_password": PASSWORD, "new_password": "another password"}
    answer = await client.put(CHANGE, json=change, headers=headers)
    check_problem(answer, 401, "invalid_token")
    monkeypatch.undo()
    assert (await client.post(LOGIN, json=ADA)).status_code == 200


async def test_a_login_during_a_password_change_gets_no_token_that_works(
    store, hashpw, monkeypatch
):
    async with serve(store) as client:
        headers = await sign_in(client)
    hashpw.arguments.clear()
    async with serve(store, bcrypt_rounds=5) as client:
        hashpw.gate.clear()
        login = asyncio.ensure_future(client.post(LOGIN, json=ADA))
        await hashpw.wait_for_a_call()  # the old password has been accepted
        monkeypatch.setattr(bcrypt, "hashpw", hashpw.function)
        change = {"current_password": PASSWORD, "new_password": "another password"}
        await client.put(CHANGE, json=change, headers=headers)
        hashpw.gate.set()
        token = (await login).json()["access_token"]
        answer = await client.get(ME, headers={"Authorization": f"Bearer {token}"})
        check_problem(answer, 401, "invalid_token")


@in_memory
async def test_passwords_are_hashed_outside_the_event_loop(client, hashpw, checkpw):
    await sign_in(client)
    threads = hashpw.threads + checkpw.threads
    assert len(threads) == 2
    assert threading.current_thread() not in threads


# ---- the queue of passwords ------------------------------------------------------------


@pytest.fixture
async def crowded(sqlite, checkpw, monkeypatch):
    """A client of a service with one core, whose queue of passwords is full.

    One password is being checked and 15 wait. `shed` is the answer to the 17th login.
    `let_pass` empties the queue and returns the statuses of the 17 logins.
    """
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    async with serve(sqlite) as client:
        client.headers.update(await sign_in(client))
        checkpw.arguments.clear()
        checkpw.gate.clear()
        accounts = [{**ADA, "email": f"{n}@example.com"} for n in range(17)]
        logins = [
            asyncio.ensure_future(client.post(LOGIN, json=account))
            for account in accounts
        ]
        first, _ = await asyncio.wait(logins, return_when=asyncio.FIRST_COMPLETED)
        client.shed = first.pop().result()

        async def let_pass():
            checkpw.gate.set()
            answers = await asyncio.gather(*logins)
            return sorted(answer.status_code for answer in answers)

        client.let_pass = let_pass
        yield client
        await let_pass()


async def test_a_login_that_finds_the_queue_full_is_told_so_at_once(crowded):
    check_problem(crowded.shed, 503, "overloaded")
    assert crowded.shed.headers["retry-after"] == "2"


async def test_every_login_that_found_a_place_in_the_queue_is_answered(crowded):
    assert await crowded.let_pass() == [401] * 16 + [503]


async def test_no_more_passwords_are_checked_at_once_than_there_are_cores(
    crowded, checkpw
):
    await crowded.let_pass()
    assert checkpw.most_at_once == 1


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", ME])
async def test_other_requests_are_answered_while_the_queue_is_full(crowded, path):
    assert (await crowded.get(path)).status_code == 200


async def test_a_registration_that_finds_the_queue_full_stores_nothing(crowded, sqlite):
    bob = {**ADA, "email": "bob@example.com"}
    check_problem(await crowded.post(REGISTER, json=bob), 503, "overloaded")
    assert await sqlite.sql("SELECT email FROM users") == [(EMAIL,)]


async def test_a_password_change_that_finds_the_queue_full_changes_nothing(crowded):
    change = {"current_password": PASSWORD, "new_password": "another password"}
    check_problem(await crowded.put(CHANGE, json=change), 503, "overloaded")
    await crowded.let_pass()
    assert await sign_in(crowded)


async def test_a_login_that_finds_the_queue_full_is_not_counted_as_a_failure(crowded):
    assert await fail_logins(crowded, 6) == [503] * 6
    await crowded.let_pass()
    assert await fail_logins(crowded, 6) == [401] * 5 + [429]


async def test_a_login_that_loses_the_race_for_the_last_place_is_not_counted(
    crowded, sqlite
):
    # All 17 logins of `crowded` began while the queue was empty.
    await crowded.let_pass()
    failures = "SELECT COUNT(DISTINCT email) FROM login_attempts WHERE attempts > 0"
    assert await sqlite.sql(failures) == [(16,)]


# ---- the login throttle ----------------------------------------------------------------

BEGIN = 1_700_000_000  # a moment, in seconds since 1970


def set_clock(monkeypatch, moment):
    """Let the service take this moment for the present, except where it checks tokens."""
    clock = mock.Mock(wraps=time, time=lambda: moment + 0.9)
    monkeypatch.setattr(service, "time", clock)


async def log_in_from(client, address, password="wrong"):
    """Log in with a connection from this address. Return the status."""
    transport = httpx.ASGITransport(client.app, client=(address, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
        answer = await other.post(LOGIN, json={**ADA, "password": password})
        return answer.status_code


async def test_of_many_wrong_logins_at_once_the_first_five_get_through(client):
    await client.post(REGISTER, json=ADA)
    assert await fail_logins(client, 12) == [401] * 5 + [429] * 7


async def test_an_unknown_email_is_throttled_like_a_known_one(client):
    assert await fail_logins(client, 6) == [401] * 5 + [429]


@in_memory
async def test_an_email_is_throttled_in_all_its_spellings_together(client):
    assert await fail_logins(client, 3, email="Ada@Example.com") == [401] * 3
    assert await fail_logins(client, 3, email=EMAIL) == [401] * 2 + [429]


@in_memory
async def test_other_emails_are_not_throttled(client):
    await fail_logins(client, 6, email="bob@example.com")
    assert await sign_in(client)


@pytest.mark.parametrize("limit", [1, 2])
async def test_the_limit_of_failures_is_a_setting(memory, limit):
    async with serve(memory, login_max_failures=limit) as client:
        assert await fail_logins(client, limit + 1) == [401] * limit + [429]


async def test_over_the_limit_the_right_password_waits_too(client):
    await client.post(REGISTER, json=ADA)
    await fail_logins(client, 5)
    check_problem(await client.post(LOGIN, json=ADA), 429, "too_many_attempts")


async def test_over_the_limit_nothing_is_hashed(client, checkpw):
    await fail_logins(client, 5)
    checkpw.arguments.clear()
    assert await fail_logins(client, 3) == [429] * 3
    assert checkpw.arguments == []


async def test_a_login_counts_as_a_failure_until_it_succeeds(client, checkpw):
    await client.post(REGISTER, json=ADA)
    checkpw.gate.clear()
    logins = [asyncio.ensure_future(client.post(LOGIN, json=ADA)) for _ in range(6)]
    first, _ = await asyncio.wait(logins, return_when=asyncio.FIRST_COMPLETED)
    check_problem(first.pop().result(), 429, "too_many_attempts")
    checkpw.gate.set()
    answers = await asyncio.gather(*logins)
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429]


async def test_a_success_clears_the_failures_from_its_address(client):
    await client.post(REGISTER, json=ADA)
    for _ in range(3):
        assert await fail_logins(client, 4) == [401] * 4
        await sign_in(client)


async def test_the_throttle_is_shared_by_all_processes(store):
    async with serve(store) as one, serve(store) as other:
        assert await fail_logins(one, 3) == [401] * 3
        assert await fail_logins(other, 3) == [401] * 2 + [429]


async def test_the_throttle_survives_a_restart(store):
    async with serve(store) as client:
        await fail_logins(client, 5)
    async with serve(store) as client:
        assert await fail_logins(client, 1) == [429]


async def test_retry_after_is_what_is_left_of_the_window(client, monkeypatch):
    set_clock(monkeypatch, BEGIN)
    await fail_logins(client, 5)
    set_clock(monkeypatch, BEGIN + 100)
    answer = await client.post(LOGIN, json=ADA)
    assert answer.headers["retry-after"] == "200"


async def test_more_attempts_do_not_lengthen_the_window(client, monkeypatch):
    set_clock(monkeypatch, BEGIN)
    await fail_logins(client, 3)
    set_clock(monkeypatch, BEGIN + 100)
    await fail_logins(client, 12)
    answer = await client.post(LOGIN, json=ADA)
    assert answer.headers["retry-after"] == "200"


async def test_the_window_is_a_setting(memory, monkeypatch):
    set_clock(monkeypatch, BEGIN)
    async with serve(memory, login_window_seconds=1000) as client:
        await fail_logins(client, 5)
        answer = await client.post(LOGIN, json=ADA)
        assert answer.headers["retry-after"] == "1000"


async def test_in_the_last_second_of_the_window_a_login_waits(client, monkeypatch):
    set_clock(monkeypatch, BEGIN)
    await fail_logins(client, 5)
    set_clock(monkeypatch, BEGIN + 299)
    answer = await client.post(LOGIN, json=ADA)
    check_problem(answer, 429, "too_many_attempts")
    assert answer.headers["retry-after"] == "1"


async def test_after_the_seconds_of_retry_after_attempts_count_from_one(
    client, monkeypatch
):
    set_clock(monkeypatch, BEGIN)
    await fail_logins(client, 6)
    set_clock(monkeypatch, BEGIN + 300)
    assert await fail_logins(client, 6) == [401] * 5 + [429]


async def test_windows_that_have_ended_are_removed(client, store, monkeypatch):
    set_clock(monkeypatch, BEGIN)
    await fail_logins(client, 2, email="bob@example.com")
    set_clock(monkeypatch, BEGIN + 1)
    await fail_logins(client, 1, email="carol@example.com")
    set_clock(monkeypatch, BEGIN + 300)
    await fail_logins(client, 1)
    emails = await store.sql("SELECT DISTINCT email FROM login_attempts ORDER BY email")
    assert emails == [(EMAIL,), ("carol@example.com",)]


async def test_only_a_new_window_costs_the_removal_of_ended_ones(
    client, store, monkeypatch
):
    set_clock(monkeypatch, BEGIN)
    await fail_logins(client, 1, email="bob@example.com")
    set_clock(monkeypatch, BEGIN + 299)
    await client.post(REGISTER, json=ADA)
    await client.post(LOGIN, json=ADA)
    set_clock(monkeypatch, BEGIN + 300)
    await client.post(LOGIN, json=ADA)
    emails = await store.sql("SELECT DISTINCT email FROM login_attempts ORDER BY email")
    assert emails == [(EMAIL,), ("bob@example.com",)]


async def test_only_the_first_attempt_in_a_window_removes_ended_ones(
    client, store, monkeypatch
):
    set_clock(monkeypatch, BEGIN)
    await fail_logins(client, 1, email="bob@example.com")
    await fail_logins(client, 1)
    end = "UPDATE login_attempts SET window_ends_at = 0 WHERE email LIKE 'bob@%'"
    await store.sql(end)
    await fail_logins(client, 1)  # in the same second as the attempt before
    emails = await store.sql("SELECT DISTINCT email FROM login_attempts ORDER BY email")
    assert emails == [(EMAIL,), ("bob@example.com",)]


async def test_all_addresses_together_have_ten_times_the_limit(store):
    async with serve(store, login_max_failures=2) as client:
        await client.post(REGISTER, json=ADA)
        statuses = [await log_in_from(client, f"10.0.0.{n}") for n in range(20)]
        assert statuses == [401] * 20
        assert await log_in_from(client, "10.0.1.1", PASSWORD) == 429


async def test_after_an_attack_from_many_addresses_the_owner_waits_for_the_window(
    memory, monkeypatch
):
    set_clock(monkeypatch, BEGIN)
    async with serve(memory, login_max_failures=1) as client:
        await client.post(REGISTER, json=ADA)
        for n in range(10):
            await log_in_from(client, f"10.0.0.{n}")
        set_clock(monkeypatch, BEGIN + 299)
        assert await log_in_from(client, "10.0.1.1", PASSWORD) == 429
        set_clock(monkeypatch, BEGIN + 300)
        assert await log_in_from(client, "10.0.1.2", PASSWORD) == 200


async def test_a_success_takes_only_itself_back_from_the_total(store):
    async with serve(store, login_max_failures=1) as client:
        await client.post(REGISTER, json=ADA)
        for n in range(9):
            assert await log_in_from(client, f"10.0.0.{n}") == 401
        for _ in range(3):
            assert await log_in_from(client, "10.0.1.1", PASSWORD) == 200
        assert await log_in_from(client, "10.0.2.1") == 401
        assert await log_in_from(client, "10.0.2.2") == 429


async def test_a_success_takes_nothing_back_from_a_window_without_attempts(
    client, store, checkpw
):
    await client.post(REGISTER, json=ADA)
    checkpw.gate.clear()
    login = asyncio.ensure_future(client.post(LOGIN, json=ADA))
    await checkpw.wait_for_a_call()
    await store.sql("UPDATE login_attempts SET attempts = 0")
    checkpw.gate.set()
    assert (await login).status_code == 200
    assert await store.sql("SELECT attempts FROM login_attempts") == [(0,), (0,)]


async def test_one_address_alone_does_not_lock_out_the_owner_elsewhere(store):
    async with serve(store, login_max_failures=1) as client:
        await client.post(REGISTER, json=ADA)
        assert await fail_logins(client, 12) == [401] + [429] * 11
        assert await log_in_from(client, "10.0.0.1", PASSWORD) == 200


@in_memory
async def test_the_forwarded_for_header_of_a_stranger_does_not_change_the_address(
    client,
):
    for n in range(5):
        await fail_logins(client, 1, headers={"X-Forwarded-For": f"10.0.0.{n}"})
    stranger = {"X-Forwarded-For": "10.0.0.9", "Forwarded": "for=10.0.0.9"}
    assert await fail_logins(client, 1, headers=stranger) == [429]


async def test_an_address_that_a_proxy_made_up_is_cut_to_64_characters(client, store):
    address = secrets.token_hex(4000)  # PostgreSQL's index takes 2,700 bytes
    assert await log_in_from(client, address, PASSWORD) == 401
    rows = await store.sql("SELECT address FROM login_attempts")
    assert set(rows) == {("*",), (address[:64],)}


async def test_a_password_change_counts_in_the_throttle_of_logins(client, headers):
    change = {"current_password": "wrong", "new_password": "another password"}
    for _ in range(5):
        answer = await client.put(CHANGE, json=change, headers=headers)
        check_problem(answer, 403, "wrong_password")
    assert await fail_logins(client, 1) == [429]


async def test_failed_logins_hold_up_a_password_change(client, headers):
    await fail_logins(client, 5)
    change = {"current_password": PASSWORD, "new_password": "another password"}
    answer = await client.put(CHANGE, json=change, headers=headers)
    check_problem(answer, 429, "too_many_attempts")


async def test_a_password_change_that_succeeds_clears_the_failures(client, headers):
    await fail_logins(client, 4)
    change = {"current_password": PASSWORD, "new_password": "another password"}
    answer = await client.put(CHANGE, json=change, headers=headers)
    assert answer.status_code == 204
    assert await fail_logins(client, 6) == [401] * 5 + [429]


# ---- tokens ----------------------------------------------------------------------------

WITHOUT_TOKEN = 'Bearer realm="service"'
WITH_TOKEN = 'Bearer realm="service", error="invalid_token"'


def forge(token, key=SECRET, algorithm="HS256", drop=None, **claims):
    """Return headers with a copy of the token that differs in the given ways."""
    good = jwt.decode(token, options={"verify_signature": False})
    good.update(claims)
    good.pop(drop, None)
    return {"Authorization": f"Bearer {jwt.encode(good, key, algorithm)}"}


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
def test_the_bearer_scheme_has_any_case(shared, scheme):
    answer = shared.get(ME, headers={"Authorization": f"{scheme} {shared.token}"})
    assert answer.status_code == 200


async def test_me_is_the_account_of_the_token(client, headers):
    account = await client.post(REGISTER, json={**ADA, "email": "bob@example.com"})
    bob = await sign_in(client, email="bob@example.com")
    assert (await client.get(ME, headers=bob)).json() == account.json()
    assert (await client.get(ME, headers=headers)).json()["email"] == EMAIL


def test_a_token_holds_the_claims_of_a_jwt_and_no_email(shared):
    claims = jwt.decode(shared.token, SECRET, ["HS256"], audience="service")
    assert set(claims) == {"iss", "aud", "sub", "iat", "exp", "jti", "ver"}
    account = shared.get(ME, headers=shared.bearer).json()
    assert (claims["iss"], claims["sub"]) == ("service", account["id"])


async def test_a_token_lives_as_long_as_the_setting_says(memory):
    async with serve(memory, jwt_expires_seconds=1000) as client:
        await client.post(REGISTER, json=ADA)
        body = (await client.post(LOGIN, json=ADA)).json()
    claims = jwt.decode(body["access_token"], options={"verify_signature": False})
    assert body["expires_in"] == claims["exp"] - claims["iat"] == 1000


@pytest.mark.parametrize("claim", ["iss", "aud", "sub", "iat", "exp", "jti", "ver"])
def test_every_claim_is_required(shared, claim):
    answer = shared.get(ME, headers=forge(shared.token, drop=claim))
    check_problem(answer, 401, "invalid_token")
    assert answer.headers["www-authenticate"] == WITH_TOKEN


@pytest.mark.parametrize(
    "claims",
    [
        pytest.param({"iss": "x"}, id="another issuer"),
        pytest.param({"aud": "x"}, id="another audience"),
        pytest.param({"aud": []}, id="no audience"),
        pytest.param({"sub": "x"}, id="a user id that is no UUID"),
        pytest.param({"sub": "\x00"}, id="a NUL as user id"),
        pytest.param({"sub": 5}, id="a number as user id"),
        pytest.param({"sub": str(uuid.UUID(int=0))}, id="an unknown user"),
        pytest.param({"ver": 1}, id="a later version"),
        pytest.param({"ver": -1}, id="an earlier version"),
        pytest.param({"ver": "0"}, id="a version that is text"),
        pytest.param({"ver": 10**40}, id="a huge version"),
        pytest.param({"ver": None}, id="no version"),
        pytest.param({"exp": "soon"}, id="an end that is text"),
        pytest.param({"exp": float("inf")}, id="no end"),
        pytest.param({"exp": float("-inf")}, id="an end before all time"),
        pytest.param({"exp": None}, id="an end that is null"),
        pytest.param({"iat": 10**12}, id="issued in the future"),
        pytest.param({"iat": "now"}, id="issued at a time that is text"),
        pytest.param({"nbf": 10**12}, id="valid in the future"),
        pytest.param({"jti": 5}, id="a number as token id"),
    ],
)
def test_a_claim_with_a_wrong_value_is_refused(shared, claims):
    answer = shared.get(ME, headers=forge(shared.token, **claims))
    check_problem(answer, 401, "invalid_token")


@pytest.mark.parametrize(
    "forgery",
    [
        pytest.param({"key": "x" * 40}, id="another key"),
        pytest.param({"algorithm": "HS512"}, id="another algorithm"),
        pytest.param({"key": None, "algorithm": "none"}, id="no signature"),
    ],
)
def test_a_token_with_another_key_or_algorithm_is_refused(shared, forgery):
    answer = shared.get(ME, headers=forge(shared.token, **forgery))
    check_problem(answer, 401, "invalid_token")


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("Bearer", id="no token"),
        pytest.param("Bearer ", id="an empty token"),
        pytest.param("Bearer a.b.c", id="three letters"),
        pytest.param("Bearer x y", id="two words"),
        pytest.param("bearer \x7f", id="a control character"),
        pytest.param("Bearer " + "a" * 60000, id="60,000 letters"),
        pytest.param(
            "Bearer " + jwt.api_jws.PyJWS().encode(b"{}", None, algorithm="none"),
            id="nothing inside and not signed",
        ),
        pytest.param(
            "Bearer " + base64.urlsafe_b64encode(b"[" * 40000).decode() + ".e30.x",
            id="JSON that is 40,000 levels deep",
        ),
    ],
)
def test_a_malformed_token_is_refused(shared, value):
    answer = shared.get(ME, headers={"Authorization": value})
    check_problem(answer, 401, "invalid_token")


@pytest.mark.parametrize(
    "pasted",
    [
        pytest.param('"{}"', id="double quotes"),
        pytest.param("'{}'", id="single quotes"),
        pytest.param("Bearer {}", id="Bearer twice"),
        pytest.param("bearer {}", id="bearer twice"),
    ],
)
def test_a_badly_pasted_token_gets_a_hint(shared, pasted):
    value = "Bearer " + pasted.format(shared.token)
    answer = shared.get(ME, headers={"Authorization": value})
    detail = check_problem(answer, 401, "invalid_token")["detail"]
    assert "without quotes" in detail and "Bearer only once" in detail
    assert shared.token not in answer.text


def test_a_token_that_is_wrong_for_another_reason_gets_no_hint_about_pasting(shared):
    answer = shared.get(ME, headers=forge(shared.token, key="x" * 40))
    assert "quotes" not in check_problem(answer, 401, "invalid_token")["detail"]


@pytest.mark.parametrize("value", ["", "Basic YTpi", "Token {}", "{}", "Bearerfoo {}"])
def test_another_scheme_than_bearer_is_no_token(shared, value):
    sent = {"Authorization": value.format(shared.token)}
    answer = shared.get(ME, headers=sent)
    check_problem(answer, 401, "not_authenticated")
    assert answer.headers["www-authenticate"] == WITHOUT_TOKEN


@pytest.mark.parametrize(
    "gap", [pytest.param(b"\xa0", id="a no-break space"), pytest.param(b"\t", id="tab")]
)
@in_memory
async def test_only_a_blank_ends_the_scheme(client, headers, gap):
    sent = {"Authorization": headers["Authorization"].encode().replace(b" ", gap)}
    answer = await client.get(ME, headers=sent)
    check_problem(answer, 401, "not_authenticated")


@in_memory
async def test_a_no_break_space_after_the_token_makes_it_invalid(client, headers):
    sent = {"Authorization": headers["Authorization"].encode() + b"\xa0"}
    check_problem(await client.get(ME, headers=sent), 401, "invalid_token")


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(["Bearer {}", "Bearer {}"], id="the same token twice"),
        pytest.param(["Bearer x", "Bearer {}"], id="a bad token first"),
        pytest.param(["Bearer {}", "Bearer x"], id="a bad token last"),
        pytest.param(["Bearer {}", ""], id="an empty header last"),
        pytest.param(["", "Bearer {}"], id="an empty header first"),
        pytest.param(["Basic YTpi", "Bearer {}"], id="two schemes"),
        pytest.param(["Basic YTpi", "Basic YTpi"], id="no token in either"),
    ],
)
def test_two_authorization_headers_are_refused(shared, values):
    both = [("Authorization", value.format(shared.token)) for value in values]
    check_problem(shared.get(ME, headers=both), 401, "invalid_token")


@pytest.mark.parametrize(
    "method, path, body",
    [
        pytest.param("GET", ME, b"", id="a protected route"),
        pytest.param("GET", "/nowhere", b"", id="an unknown path"),
        pytest.param("DELETE", ME, b"", id="an unknown method"),
        pytest.param("PUT", CHANGE, b"{", id="a broken body"),
    ],
)
def test_an_expired_token_is_refused_before_any_route(shared, method, path, body):
    expired = forge(shared.token, exp=int(time.time()) - 60)
    answer = shared.request(method, path, content=body, headers=expired)
    assert "expired" in check_problem(answer, 401, "expired_token")["detail"]
    assert answer.headers["www-authenticate"] == WITH_TOKEN


@pytest.mark.parametrize(
    "offsets, status",
    [
        pytest.param({"exp": -1}, 200, id="expired 1 s ago"),
        pytest.param({"exp": -2}, 401, id="expired 2 s ago"),
        pytest.param({"iat": 2}, 200, id="issued in 2 s"),
        pytest.param({"iat": 3}, 401, id="issued in 3 s"),
        pytest.param({"nbf": 2}, 200, id="valid in 2 s"),
        pytest.param({"nbf": 3}, 401, id="valid in 3 s"),
    ],
)
def test_the_clocks_of_two_hosts_may_differ_by_two_seconds(
    shared, monkeypatch, offsets, status
):
    class StoppedClock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(BEGIN, tz)

    claims = {"iat": BEGIN, "exp": BEGIN + 60}
    claims.update({name: BEGIN + offset for name, offset in offsets.items()})
    sent = forge(shared.token, **claims)
    monkeypatch.setattr("jwt.api_jwt.datetime", StoppedClock)
    assert shared.get(ME, headers=sent).status_code == status


async def test_the_tokens_of_a_deleted_user_stop_working_at_once(
    client, headers, store
):
    await store.sql("DELETE FROM users")
    check_problem(await client.get(ME, headers=headers), 401, "invalid_token")


async def test_a_logout_ends_every_session_of_the_user(client, headers):
    second = await sign_in(client)
    assert (await client.post(LOGOUT, headers=second)).status_code == 204
    for ended in (headers, second):
        check_problem(await client.get(ME, headers=ended), 401, "invalid_token")


async def test_a_logout_leaves_later_and_other_sessions_alone(client, headers):
    bob = await sign_in(client, email="bob@example.com")
    await client.post(LOGOUT, headers=headers)
    later = await sign_in(client)
    for session in (bob, later):
        assert (await client.get(ME, headers=session)).status_code == 200


async def test_a_password_change_ends_every_session_and_the_old_password(
    client, headers
):
    second = await sign_in(client)
    change = {"current_password": PASSWORD, "new_password": "another password"}
    assert (await client.put(CHANGE, json=change, headers=second)).status_code == 204
    for ended in (headers, second):
        check_problem(await client.get(ME, headers=ended), 401, "invalid_token")
    check_problem(await client.post(LOGIN, json=ADA), 401, "invalid_credentials")
    assert await sign_in(client, password="another password")


async def test_a_password_change_with_a_wrong_password_changes_nothing(client, headers):
    change = {"current_password": "wrong", "new_password": "another password"}
    answer = await client.put(CHANGE, json=change, headers=headers)
    check_problem(answer, 403, "wrong_password")
    assert (await client.get(ME, headers=headers)).status_code == 200
    assert await sign_in(client)


async def test_of_four_password_changes_at_once_one_wins(
    client, headers, store, checkpw
):
    checkpw.gate.clear()
    changes = [
        {"current_password": PASSWORD, "new_password": f"new password {n}"}
        for n in range(4)
    ]
    requests = [
        asyncio.ensure_future(client.put(CHANGE, json=change, headers=headers))
        for change in changes
    ]
    begun = "SELECT attempts FROM login_attempts WHERE address = '*'"
    with anyio.fail_after(10):  # until all four have read the old hash
        while await store.sql(begun) != [(4,)]:
            await asyncio.sleep(0.01)
    checkpw.gate.set()
    answers = await asyncio.gather(*requests)
    assert sorted(answer.status_code for answer in answers) == [204, 401, 401, 401]
    winner = [answer.status_code for answer in answers].index(204)
    assert await sign_in(client, password=f"new password {winner}")


async def test_development_keeps_its_secret_in_the_database(store):
    development = {"environment": "development", "jwt_secret": None}
    async with serve(store, **development) as client:
        headers = await sign_in(client)
    async with serve(store, **development) as client:
        assert (await client.get(ME, headers=headers)).status_code == 200
    [(secret,)] = await store.sql("SELECT value FROM secrets")
    assert len(bytes.fromhex(secret)) == 32  # as long as the hash, see RFC 7518, 3.2


async def test_development_warns_that_it_made_up_a_secret(memory, caplog):
    async with serve(memory, environment="development", jwt_secret=None):
        pass
    about_secret = [
        record.levelname
        for record in caplog.records
        if "JWT_SECRET" in record.getMessage()
    ]
    assert about_secret == ["WARNING"]


async def test_processes_that_start_together_agree_on_the_secret(store):
    async with contextlib.AsyncExitStack() as stack:
        starts = [
            stack.enter_async_context(
                serve(store, environment="development", jwt_secret=None)
            )
            for _ in range(3)
        ]
        clients = await asyncio.gather(*starts)
        headers = await sign_in(clients[0])
        for client in clients:
            assert (await client.get(ME, headers=headers)).status_code == 200


async def test_the_secret_of_the_settings_wins_over_the_one_in_the_database(sqlite):
    async with serve(sqlite, environment="development", jwt_secret=None) as client:
        headers = await sign_in(client)
    async with serve(sqlite, environment="development") as client:
        check_problem(await client.get(ME, headers=headers), 401, "invalid_token")


async def test_the_test_environment_makes_a_secret_for_each_process(store):
    async with serve(store, jwt_secret=None) as client:
        headers = await sign_in(client)
    async with serve(store, jwt_secret=None) as client:
        check_problem(await client.get(ME, headers=headers), 401, "invalid_token")
    assert await store.sql("SELECT * FROM secrets") == []


# ---- TokenCheck ------------------------------------------------------------------------

DEAD = {"Authorization": "Bearer dead"}


def test_a_protected_route_without_a_token_is_401(shared):
    answer = shared.get(ME)
    check_problem(answer, 401, "not_authenticated")
    assert answer.headers["www-authenticate"] == WITHOUT_TOKEN


def test_a_token_in_the_query_or_in_a_cookie_does_not_count(shared):
    cookie = {"Cookie": f"access_token={shared.token}"}
    answer = shared.get(ME, params={"access_token": shared.token}, headers=cookie)
    check_problem(answer, 401, "not_authenticated")


def test_without_a_token_an_unknown_path_is_404(shared):
    check_problem(shared.get("/nowhere"), 404, "not_found")


def test_without_a_token_an_unknown_method_is_405(shared):
    check_problem(shared.delete(ME), 405, "method_not_allowed")


def test_without_a_token_a_broken_body_is_401_and_not_422(shared):
    answer = shared.put(CHANGE, content=b"{")
    check_problem(answer, 401, "not_authenticated")


def test_a_body_that_is_too_large_is_refused_before_the_token_is_checked(shared):
    answer = shared.put(CHANGE, content=b"x" * 65537, headers=DEAD)
    check_problem(answer, 413, "body_too_large")


@pytest.mark.parametrize(
    "method, path, body, status",
    [
        ("GET", "/health/live", None, 200),
        ("GET", "/health/ready", None, 200),
        ("GET", "/docs", None, 200),
        ("GET", "/redoc", None, 200),
        ("GET", "/openapi.json", None, 200),
        ("POST", REGISTER, {**ADA, "email": "dead@example.com"}, 201),
        ("POST", LOGIN, ADA, 200),
        ("PUT", DEMO, {"failing": False}, 204),
    ],
)
def test_a_public_path_ignores_a_dead_token(shared, method, path, body, status):
    answer = shared.request(method, path, json=body, headers=DEAD)
    assert answer.status_code == status


@pytest.mark.parametrize(
    "path", ["/docs/x", "/health", "/health/live/", "/health/livex", "/x/health/live"]
)
def test_a_path_beside_a_public_path_is_not_public(shared, path):
    check_problem(shared.get(path, headers=DEAD), 401, "invalid_token")


@pytest.fixture
def public_router(monkeypatch):
    """A router of PUBLIC_ROUTERS. Routes that a test adds go away after it."""
    monkeypatch.setattr(service.health, "routes", [*service.health.routes])
    return service.health


@pytest.fixture
def public_parts(public_router):
    """A public route with a parameter: GET /health/parts/{name}."""

    @public_router.get("/parts/{name}")
    async def check_part(name: str) -> dict:
        return {"part": name}


async def test_a_public_route_with_a_parameter_ignores_a_dead_token(
    memory, public_parts
):
    async with serve(memory) as client:
        answer = await client.get("/health/parts/disk", headers=DEAD)
        assert answer.json() == {"part": "disk"}
        below = await client.get("/health/parts/disk/x", headers=DEAD)
        check_problem(below, 401, "invalid_token")


async def test_a_protected_route_with_the_path_of_a_public_one_stays_protected(
    memory, public_parts
):
    async with serve(memory) as client:

        @client.app.delete("/health/parts/{name}")
        async def delete_part(name: str, user: service.CurrentUser) -> dict:
            return {"deleted by": user.email}

        path = "/health/parts/disk"
        check_problem(await client.delete(path), 401, "not_authenticated")
        check_problem(await client.delete(path, headers=DEAD), 401, "invalid_token")
        answer = await client.delete(path, headers=await sign_in(client))
        assert answer.json() == {"deleted by": EMAIL}
        assert (await client.get(path, headers=DEAD)).json() == {"part": "disk"}
        answer = await client.put(path, headers=DEAD)
        check_problem(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == "DELETE, GET, HEAD"


async def test_a_public_route_answers_before_a_protected_one_with_the_same_path(
    memory, monkeypatch
):
    monkeypatch.setattr(service.public_auth, "routes", [*service.public_auth.routes])

    @service.public_auth.get("/{name}")
    async def show_name(name: str) -> dict:
        return {"name": name}

    async with serve(memory) as client:
        assert (await client.get(ME, headers=DEAD)).json() == {"name": "me"}


async def test_a_public_route_that_asks_for_its_user_is_401(memory, public_router):
    @public_router.get("/mine")
    async def check_mine(user: service.CurrentUser) -> dict:
        return {"email": user.email}

    async with serve(memory) as client:
        for headers in ({}, DEAD, await sign_in(client)):
            answer = await client.get("/health/mine", headers=headers)
            check_problem(answer, 401, "not_authenticated")
            assert answer.headers["www-authenticate"] == WITHOUT_TOKEN


@in_memory
async def test_a_route_that_somebody_adds_is_protected(client, headers):
    @client.app.get("/extra/{name}")
    async def show_extra(name: str) -> dict:
        return {"extra": name}

    check_problem(await client.get("/extra/1"), 401, "not_authenticated")
    check_problem(await client.get("/extra/1", headers=DEAD), 401, "invalid_token")
    assert (await client.get("/extra/1", headers=headers)).json() == {"extra": "1"}


def under(app, root_path):
    """Return a client of the app behind a proxy with this prefix."""
    transport = httpx.ASGITransport(app, root_path=root_path)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.parametrize(
    "root_path, prefix",
    [
        pytest.param("/svc", "/svc", id="the path begins with the prefix"),
        pytest.param("/svc", "", id="the path lacks the prefix"),
        pytest.param("/h", "", id="the path begins with the letters of the prefix"),
        pytest.param("/health", "/health", id="the prefix looks like a path"),
    ],
)
@in_memory
async def test_behind_a_root_path_the_public_and_the_protected_paths_stay_so(
    client, headers, root_path, prefix
):
    async with under(client.app, root_path) as proxied:
        live = await proxied.get(f"{prefix}/health/live", headers=DEAD)
        assert live.status_code == 200
        me = await proxied.get(prefix + ME)
        check_problem(me, 401, "not_authenticated")
        me = await proxied.get(prefix + ME, headers=DEAD)
        check_problem(me, 401, "invalid_token")
        me = await proxied.get(prefix + ME, headers=headers)
        assert me.status_code == 200


@pytest.mark.parametrize("path", ["/svchealth/live", "/svc", "/svc/svc/health/live"])
@in_memory
async def test_a_root_path_is_cut_only_once_and_only_where_a_slash_follows(
    client, path
):
    async with under(client.app, "/svc") as proxied:
        check_problem(await proxied.get(path), 404, "not_found")
        check_problem(await proxied.get(path, headers=DEAD), 401, "invalid_token")


@pytest.mark.parametrize("root_path", ["", "/proxy"])
@in_memory
async def test_mounted_in_another_app_the_public_and_the_protected_paths_stay_so(
    client, headers, root_path
):
    outer = fastapi.FastAPI()
    outer.mount("/svc", client.app)
    prefix = f"{root_path}/svc"
    async with under(outer, root_path) as mounted:
        live = await mounted.get(f"{prefix}/health/live", headers=DEAD)
        assert live.status_code == 200
        check_problem(await mounted.get(prefix + ME), 401, "not_authenticated")
        me = await mounted.get(prefix + ME, headers=DEAD)
        check_problem(me, 401, "invalid_token")
        assert (await mounted.get(prefix + ME, headers=headers)).status_code == 200
        check_problem(await mounted.get(f"{prefix}/nowhere"), 404, "not_found")


def test_head_needs_a_token_where_get_does(shared):
    assert shared.head(ME).status_code == 401
    assert shared.head(ME, headers=DEAD).status_code == 401
    assert shared.head(ME, headers=shared.bearer).status_code == 200


def ask_on_a_socket(server, method, path, headers):
    """Send a request. Return the lines of the answer's head, and its body as it came."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    with socket.create_connection(("127.0.0.1", server.port), timeout=15) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.decode().partition("\r\n\r\n")
    return head.splitlines(), body


@pytest.mark.process("shared")
@pytest.mark.parametrize(
    "is_signed_in, status",
    [
        pytest.param(True, "200 OK", id="with a token"),
        pytest.param(False, "401 Unauthorized", id="without a token"),
    ],
)
def test_head_has_the_headers_of_get_and_no_body(server, is_signed_in, status):
    headers = {"X-Request-ID": "the-same"}
    if is_signed_in:
        headers.update(server.sign_in())
    get_head, get_body = ask_on_a_socket(server, "GET", ME, headers)
    head_head, head_body = ask_on_a_socket(server, "HEAD", ME, headers)
    assert get_head[0] == head_head[0] == f"HTTP/1.1 {status}"
    assert f"content-length: {len(get_body)}" in head_head
    without_date = [line for line in head_head if not line.startswith("date:")]
    assert without_date == [line for line in get_head if not line.startswith("date:")]
    assert head_body == ""


async def test_a_public_path_ignores_a_dead_token_with_any_method(client):
    answer = await client.get(LOGIN, headers={"Authorization": "Bearer dead"})
    check_problem(answer, 405, "method_not_allowed")


# ---- errors ----------------------------------------------------------------------------

JSON_TYPE = {"Content-Type": "application/json"}


@pytest.fixture
async def sqlite_client(sqlite):
    """For promises that have nothing to do with the database."""
    async with serve(sqlite) as client:
        yield client


@pytest.fixture
async def learner():
    """A logged-in client of a service to which a learner adds routes.

    An exception that leaves the service fails the test, because a server would log it once
    more. The log is in JSON.
    """
    async with serve(Store("sqlite:///:memory:"), log_format="json") as client:
        headers = await sign_in(client)
        async with ask_app(client.app, **headers) as learner:
            learner.app = client.app
            learner.services = client.services
            yield learner


class LogFile:
    """What the service has written to its stdout."""

    def __init__(self, path):
        self.path = path

    def text(self):
        wait_for_log()
        return self.path.read_text("utf-8")

    def records(self):
        return [json.loads(line) for line in self.text().splitlines()]

    def tracebacks(self):
        return [entry["traceback"] for entry in self.records() if "traceback" in entry]


def configure_log(log_format="json", **settings):
    values = {"environment": "test", "log_format": log_format, **settings}
    service.configure_logging(service.Settings(_env_file=None, **values))


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "ten seconds have passed"
        time.sleep(0.001)


def without_the_handlers_of_pytest():
    return mock.patch.object(logging.getLogger(), "handlers", [])


def wait_for_log():
    wait_until(lambda: not service.log_queue.unfinished_tasks)


@contextlib.contextmanager
def write_log_to(descriptor):
    """Let the log thread of this process write there, and leave nothing behind."""
    wait_for_log()
    with mock.patch.object(service, "STDOUT", descriptor):
        yield
        wait_for_log()
    configure_log("text")


@pytest.fixture
def log_file(tmp_path):
    path = tmp_path / "log"
    with open(path, "wb") as file, write_log_to(file.fileno()):
        yield LogFile(path)


def changing_scope(app, **changes):
    """Let the app see another scope. A value of None removes the key."""

    async def changed(scope, receive, send):
        scope = {**scope, **changes}
        await app({k: v for k, v in scope.items() if v is not None}, receive, send)

    return changed


def ask_app(app, **headers):
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(
        transport=transport, base_url="http://test", headers=headers
    )


def speaking_http2(app, version="2"):
    """Let the app see requests as an HTTP/2 server may show them: without a length."""

    async def changed(scope, receive, send):
        lengths = (b"content-length", b"transfer-encoding")
        headers = [pair for pair in scope["headers"] if pair[0] not in lengths]
        scope = {**scope, "http_version": version, "headers": headers}
        await app(scope, receive, send)

    return changed


def find_records(server, request_id):
    """Wait for the access record of a request, and return all records with its id."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        lines = server.log.read_text("utf-8").splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        found = [entry for entry in records if entry["request_id"] == request_id]
        if any("duration_ms" in entry for entry in found):
            return found
        time.sleep(0.02)
    raise AssertionError(f"no access record of {request_id} in ten seconds")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="half an object"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"null", id="null"),
        pytest.param(b"{}", id="no fields"),
        pytest.param(b"\xff\xfe", id="only a byte order mark"),
        pytest.param(b"[" * 60000, id="60,000 levels"),
        pytest.param(b"9" * 5000, id="a number of 5,000 digits"),
        pytest.param(
            b'{"email": "\\ud800@example.com", "password": "hunter2-hunter2"}',
            id="a lone surrogate in the email",
        ),
        pytest.param(
            b'{"email": "a@example.com", "password": "hunter2-\\udfff"}',
            id="a lone surrogate in the password",
        ),
        pytest.param(b'{"email": NaN, "password": 1e999}', id="NaN and infinity"),
        pytest.param(json.dumps(ADA).encode("utf-32")[:-2], id="broken UTF-32"),
        pytest.param(
            b'{"email": "a@example.com", "password": "hunter2', id="an open string"
        ),
    ],
)
async def test_a_body_that_cannot_be_read_is_a_422_that_echoes_nothing(
    sqlite_client, sqlite, body
):
    answer = await sqlite_client.post(REGISTER, content=body, headers=JSON_TYPE)
    problem = check_problem(answer, 422, "invalid_request")
    assert problem["errors"]
    for mistake in problem["errors"]:
        assert set(mistake) == {"loc", "msg", "type"}
    assert "hunter2" not in answer.text
    assert await sqlite.sql("SELECT * FROM users") == []


@pytest.mark.parametrize(
    "request_body",
    [
        pytest.param(
            {"content": json.dumps(ADA), "headers": {"Content-Type": "text/plain"}},
            id="as text",
        ),
        pytest.param({"data": ADA}, id="as a form"),
        pytest.param({"files": {"email": b"x"}}, id="as an upload"),
    ],
)
async def test_a_body_that_was_not_sent_as_json_gets_a_422_that_says_so(
    sqlite_client, sqlite, request_body
):
    answer = await sqlite_client.post(REGISTER, **request_body)
    (mistake,) = check_problem(answer, 422, "invalid_request")["errors"]
    assert mistake["loc"] == ["body"]
    assert "Content-Type: application/json" in mistake["msg"]
    assert await sqlite.sql("SELECT * FROM users") == []


async def test_an_empty_body_that_was_announced_as_json_is_not_called_the_wrong_type(
    sqlite_client,
):
    for content_type in ("application/json", "Application/JSON"):
        headers = {"Content-Type": content_type}
        answer = await sqlite_client.post(REGISTER, headers=headers)
        (mistake,) = check_problem(answer, 422, "invalid_request")["errors"]
        assert "Content-Type" not in mistake["msg"]


async def test_a_422_names_each_wrong_field_but_not_what_was_sent(sqlite_client):
    answer = await sqlite_client.post(
        REGISTER, json={"email": "no-email", "password": "short"}
    )
    problem = check_problem(answer, 422, "invalid_request")
    places = [mistake["loc"] for mistake in problem["errors"]]
    assert places == [["body", "email"], ["body", "password"]]
    assert "no-email" not in answer.text and '"short"' not in answer.text


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/health/live", "GET, HEAD"), ("/docs", "GET, HEAD"), (LOGIN, "POST")],
)
async def test_a_405_names_the_methods_that_are_allowed(sqlite_client, path, allowed):
    answer = await sqlite_client.delete(path)
    check_problem(answer, 405, "method_not_allowed")
    assert sorted(answer.headers["allow"].split(", ")) == allowed.split(", ")


async def test_a_405_names_the_methods_of_all_routes_with_this_path(learner):
    @learner.app.get("/things/{number}")
    async def show(number: int):
        """Nobody calls it."""

    @learner.app.api_route("/things/{number}", methods=["PUT", "DELETE"])
    async def change(number: int):
        """Nobody calls it."""

    answer = await learner.post("/things/7")
    check_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "DELETE, GET, HEAD, PUT"


@pytest.mark.parametrize(
    "path", ["/health/live/", "//health/live", "/docs/", "/HEALTH/LIVE"]
)
async def test_a_path_that_is_nearly_right_is_a_404_and_no_redirect(
    sqlite_client, path
):
    answer = await sqlite_client.get(path, headers={"Host": "evil.example"})
    check_problem(answer, 404, "not_found")
    assert "location" not in answer.headers


@pytest.mark.parametrize(
    ("status", "title"),
    [
        (413, "Content Too Large"),
        (414, "URI Too Long"),
        (416, "Range Not Satisfiable"),
        (422, "Unprocessable Content"),
    ],
)
async def test_a_title_is_the_phrase_of_rfc_9110_on_every_python(
    learner, status, title
):
    @learner.app.get("/learn")
    async def fail():
        raise HTTPException(status, "about this request")

    assert (await learner.get("/learn")).json()["title"] == title


async def test_the_titles_of_our_own_413_and_422_are_the_phrases_of_rfc_9110(
    sqlite_client,
):
    refused = await sqlite_client.post(LOGIN, content=b"x" * 65537)
    assert check_problem(refused, 413, "body_too_large")["title"] == "Content Too Large"
    invalid = await sqlite_client.post(LOGIN, json={})
    problem = check_problem(invalid, 422, "invalid_request")
    assert problem["title"] == "Unprocessable Content"


async def in_chunks(body):
    for start in range(0, len(body), 1000):
        yield body[start : start + 1000]


@pytest.mark.parametrize("path", [LOGIN, "/nowhere", "/health/live"])
@pytest.mark.parametrize("send", [bytes, in_chunks], ids=["at once", "in chunks"])
async def test_a_body_of_one_byte_too_much_is_refused_at_every_path(
    sqlite_client, path, send
):
    answer = await sqlite_client.post(path, content=send(b"x" * 65537))
    check_problem(answer, 413, "body_too_large")


@pytest.mark.parametrize("send", [bytes, in_chunks], ids=["at once", "in chunks"])
async def test_a_body_of_exactly_the_limit_is_read(sqlite_client, send):
    answer = await sqlite_client.post(LOGIN, content=send(b"x" * 65536))
    check_problem(answer, 422, "invalid_request")


async def test_the_limit_of_a_body_is_a_setting(sqlite):
    async with serve(sqlite, max_body_bytes=100) as client:
        too_long = await client.post(LOGIN, content=b"x" * 101)
        check_problem(too_long, 413, "body_too_large")
        longest = await client.post(LOGIN, content=b"x" * 100)
        check_problem(longest, 422, "invalid_request")


@pytest.mark.parametrize(
    "length",
    [
        pytest.param("0" * 5000 + "33", id="5,000 zeros"),
        pytest.param("9" * 20, id="more than 64 bits"),
        pytest.param("-1", id="negative"),
        pytest.param("many", id="a word"),
    ],
)
async def test_a_strange_content_length_is_never_a_500(sqlite_client, length):
    headers = {"Content-Length": length}
    answer = await sqlite_client.post(LOGIN, content=b"{", headers=headers)
    check_problem(answer, 422, "invalid_request")


async def drip_spaces():
    for _ in range(200):
        yield b" "
        await asyncio.sleep(0.01)


async def stop_half_way():
    yield b"{"
    await asyncio.sleep(2)
    yield b"}"


@pytest.mark.parametrize("slow_body", [drip_spaces, stop_half_way])
async def test_a_body_that_is_not_complete_in_time_is_408(
    sqlite_client, monkeypatch, slow_body
):
    monkeypatch.setattr(service, "BODY_SECONDS", 0.1)
    answer = await sqlite_client.post(LOGIN, content=slow_body())
    check_problem(answer, 408, "request_timeout")


@pytest.mark.parametrize("version", ["2", "3"])
async def test_a_body_over_http2_is_limited_without_a_content_length(
    sqlite_client, version
):
    async with ask_app(speaking_http2(sqlite_client.app, version)) as http2:
        too_long = await http2.post(LOGIN, content=in_chunks(b"x" * 65537))
        check_problem(too_long, 413, "body_too_large")
        longest = await http2.post(LOGIN, content=in_chunks(b"x" * 65536))
        check_problem(longest, 422, "invalid_request")


@pytest.mark.parametrize("slow_body", [drip_spaces, stop_half_way])
async def test_a_body_over_http2_must_be_complete_in_time(
    sqlite_client, monkeypatch, slow_body
):
    monkeypatch.setattr(service, "BODY_SECONDS", 0.1)
    async with ask_app(speaking_http2(sqlite_client.app)) as http2:
        answer = await http2.post(LOGIN, content=slow_body())
        check_problem(answer, 408, "request_timeout")


async def test_a_body_over_http2_reaches_the_route(sqlite_client):
    async with ask_app(speaking_http2(sqlite_client.app)) as http2:
        assert (await http2.post(REGISTER, json=ADA)).status_code == 201
        assert (await http2.get("/health/live")).status_code == 200


async def test_a_get_without_a_body_does_not_wait_for_one(sqlite_client):
    """Some servers answer `receive` only when the client has left."""

    async def without_messages(scope, receive, send):
        async def never():
            raise AssertionError("the service asked for a body")

        await sqlite_client.app(scope, never, send)

    async with ask_app(without_messages) as bare:
        assert (await bare.get("/health/live")).status_code == 200


async def test_a_route_gets_the_whole_body_once_and_then_the_disconnect():
    sent = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.request", "body": b"}"},
        {"type": "http.disconnect"},
    ]
    received = []

    async def receive():
        return sent.pop(0)

    async def app(scope, receive, send):
        received.extend([await receive(), await receive()])

    scope = {"type": "http", "http_version": "2", "headers": []}
    await service.BodyLimit(app, max_bytes=2)(scope, receive, None)
    assert received[0]["body"] == b"{}" and not received[0].get("more_body")
    assert received[1] == {"type": "http.disconnect"}


@pytest.mark.process("shared")
def test_what_a_client_had_sent_when_it_left_is_not_taken_for_a_body(server):
    account = {"email": "left-early@example.com", "password": PASSWORD}
    body = json.dumps(account).encode()
    head = (
        f"POST {REGISTER} HTTP/1.1\r\nHost: x\r\nX-Request-ID: left-early\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body) + 1}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as leaving:
        leaving.sendall(head.encode() + body)
    (record,) = find_records(server, "left-early")
    assert (record["path"], record["status"]) == (REGISTER, 408)
    assert server.ask("POST", REGISTER, json=account).status_code == 201


async def test_only_a_request_over_http1_with_an_upgrade_header_closes_its_connection(
    sqlite_client,
):
    upgrade = {"Upgrade": "h2c"}
    answer = await sqlite_client.get("/health/live", headers=upgrade)
    assert answer.headers["connection"] == "close"
    assert "connection" not in (await sqlite_client.get("/health/live")).headers
    async with ask_app(speaking_http2(sqlite_client.app)) as http2:  # forbidden there
        answer = await http2.get("/health/live", headers=upgrade)
        assert answer.status_code == 200 and "connection" not in answer.headers


async def test_an_unexpected_exception_is_a_500_with_one_traceback(learner, log_file):
    @learner.app.get("/learn")
    async def fail():
        return 1 / 0

    answer = await learner.get("/learn", headers={"X-Request-ID": "my-id"})
    problem = check_problem(answer, 500, "internal_error")
    assert problem["request_id"] == "my-id" and "division" not in answer.text
    (traceback,) = log_file.tracebacks()
    assert traceback.count("Traceback") == 1 and "ZeroDivisionError" in traceback
    assert log_file.text().count("ZeroDivisionError") == 1


async def test_an_exception_that_looks_like_an_httpexception_is_a_500(
    learner, log_file
):
    class ForeignError(Exception):
        def __init__(self):
            self.status_code = 404
            self.detail = "secret"
            self.headers = {"X-Leak": "1"}

    @learner.app.get("/learn")
    async def fail():
        raise ForeignError

    answer = await learner.get("/learn")
    check_problem(answer, 500, "internal_error")
    assert "x-leak" not in answer.headers and "secret" not in answer.text
    assert len(log_file.tracebacks()) == 1


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "bad_request"),
        (401, "unauthorized"),
        (403, "forbidden"),
        (404, "not_found"),
        (405, "method_not_allowed"),
        (409, "conflict"),
        (418, "i_m_a_teapot"),
        (429, "too_many_requests"),
        (499, "error"),  # a status without a name
        (500, "internal_server_error"),
        (503, "service_unavailable"),
    ],
)
async def test_an_httpexception_of_a_route_keeps_status_detail_and_headers(
    learner, log_file, status, code
):
    @learner.app.get("/learn")
    async def fail():
        raise HTTPException(status, "Not today.", headers={"X-Reason": "holiday"})

    answer = await learner.get("/learn")
    problem = check_problem(answer, status, code)
    assert problem["detail"] == "Not today."
    assert answer.headers["x-reason"] == "holiday"
    assert log_file.tracebacks() == []  # it is an answer, and no bug


@pytest.mark.parametrize(
    ("status", "name", "value"),
    [
        (401, "WWW-Authenticate", 'Basic realm="cellar"'),
        (429, "Retry-After", "7"),
        (503, "Retry-After", "120"),
        (405, "Allow", "GET, PUT"),
    ],
)
async def test_the_headers_of_an_httpexception_win_over_ours(
    learner, status, name, value
):
    @learner.app.get("/learn")
    async def fail():
        raise HTTPException(status, headers={name: value})

    answer = await learner.get("/learn")
    assert answer.status_code == status
    assert answer.headers.get_list(name) == [value]


async def test_an_httpexception_cannot_replace_the_request_id(learner):
    @learner.app.get("/learn")
    async def fail():
        raise HTTPException(409, "Taken.", headers={"X-Request-ID": "forged"})

    answer = await learner.get("/learn", headers={"X-Request-ID": "my-id"})
    assert answer.headers.get_list("x-request-id") == ["my-id"]
    check_problem(answer, 409, "conflict")


@pytest.mark.parametrize(
    "status", [400, 401, 403, 408, 409, 413, 418, 422, 429, 500, 503]
)
@pytest.mark.parametrize("detail", [None, ""])
async def test_an_httpexception_without_a_detail_has_the_title_as_its_detail(
    learner, status, detail
):
    @learner.app.get("/learn")
    async def fail():
        raise HTTPException(status, detail)

    answer = await learner.get("/learn")
    problem = answer.json()
    assert answer.status_code == problem["status"] == status
    assert problem["detail"] == problem["title"] == service.TITLES[status]


async def test_a_404_without_a_detail_says_the_same_as_an_unknown_path(learner):
    @learner.app.get("/learn")
    async def fail():
        raise HTTPException(404)

    raised = check_problem(await learner.get("/learn"), 404, "not_found")
    unknown = check_problem(await learner.get("/nowhere"), 404, "not_found")
    assert raised["detail"] == unknown["detail"] and "/docs" in raised["detail"]


async def test_one_response_object_sent_twice_carries_each_requests_own_id(learner):
    shared = service.Response("x")

    @learner.app.get("/learn")
    async def answer_always_the_same():
        return shared

    for sent in ("one", "two"):
        answer = await learner.get("/learn", headers={"X-Request-ID": sent})
        assert answer.headers.get_list("x-request-id") == [sent]


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(RuntimeError("too late"), id="a bug"),
        pytest.param(service.ServiceError("email_taken", "too late"), id="our error"),
        pytest.param(HTTPException(409, "too late"), id="an HTTPException"),
    ],
)
async def test_an_error_after_the_answer_has_begun_is_logged_with_one_traceback(
    learner, log_file, error
):
    @learner.app.get("/learn")
    async def begin_and_fail():
        async def stream():
            yield b"begun"
            raise error

        return StreamingResponse(stream())

    sent = []

    async def recorded(scope, receive, send):
        async def record(message):
            sent.append(message["type"])
            await send(message)

        await learner.app(scope, receive, record)
        await send({"type": "http.response.body"})  # as a server ends what is broken

    async with ask_app(recorded, **learner.headers) as client:
        assert (await client.get("/learn")).content == b"begun"
    assert sent == ["http.response.start", "http.response.body"]
    (traceback,) = log_file.tracebacks()
    assert type(error).__name__ in traceback and "in stream" in traceback


# ---- errors of the database ------------------------------------------------------------

ROW_VALUE = "hunter2"  # a traceback shows lines of code, so it must not stand in them


async def test_a_mistake_in_the_sql_is_a_500_with_a_traceback(store, log_file):
    async with serve(store, log_format="json") as client:

        @client.app.get("/learn")
        async def read_what_is_not_there():
            sql = "SELECT colour FROM users WHERE email = $1"
            await client.services.db.fetch_one(dict, sql, EMAIL)

        answer = await client.get("/learn", headers=await sign_in(client))
        check_problem(answer, 500, "internal_error")
    assert "colour" not in answer.text
    (traceback,) = log_file.tracebacks()
    assert "colour" in traceback and "read_what_is_not_there" in traceback
    assert EMAIL not in log_file.text()


async def test_a_violated_constraint_is_a_500_whose_traceback_quotes_no_row(
    store, log_file
):
    async with serve(store, log_format="json") as client:
        await store.sql("CREATE TABLE pets (name TEXT, CONSTRAINT few CHECK (1 = 2))")

        @client.app.get("/learn")
        async def insert():
            sql = "INSERT INTO pets (name) VALUES (:name) RETURNING name"
            await client.services.db.write(dict, sql, name=ROW_VALUE)

        answer = await client.get("/learn", headers=await sign_in(client))
        check_problem(answer, 500, "internal_error")
    (traceback,) = log_file.tracebacks()
    assert "SqlError" in traceback and "few" in traceback
    assert ROW_VALUE not in log_file.text()


async def test_a_value_that_postgresql_cannot_take_is_not_in_the_traceback(
    postgres, log_file
):
    async with serve(postgres, log_format="json") as client:

        @client.app.get("/learn")
        async def send_a_word_for_a_number():
            sql = "SELECT CAST($1 AS BIGINT) AS number"
            await client.services.db.fetch_one(dict, sql, ROW_VALUE)

        answer = await client.get("/learn", headers=await sign_in(client))
        check_problem(answer, 500, "internal_error")
    assert len(log_file.tracebacks()) == 1 and ROW_VALUE not in log_file.text()


async def test_a_locked_database_is_a_503_without_a_traceback(sqlite, log_file):
    async with serve(sqlite, log_format="json") as client:
        async with client.services.db.writer() as connection:
            await connection.fetch_one("PRAGMA busy_timeout = 0")  # do not wait
        with contextlib.closing(sqlite3.connect(sqlite.path)) as other:
            other.execute("BEGIN IMMEDIATE")
            answer = await client.post(REGISTER, json=ADA)
        check_problem(answer, 503, "database_unavailable")
    assert log_file.tracebacks() == []


# ---- request id ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param("a", id="one letter"),
        pytest.param("A-Z_0.9", id="all kinds of characters"),
        pytest.param("x" * 128, id="128 characters"),
    ],
)
async def test_a_good_request_id_is_kept(sqlite_client, sent):
    answer = await sqlite_client.get("/nowhere", headers={"X-Request-ID": sent})
    assert answer.headers.get_list("x-request-id") == [sent]
    assert answer.json()["request_id"] == sent


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param("", id="empty"),
        pytest.param("x" * 129, id="129 characters"),
        pytest.param("a b", id="a space"),
        pytest.param('a"b', id="a quote"),
        pytest.param("a\\nb", id="a backslash"),
        pytest.param(b"\xe9", id="a letter that is not ASCII"),
        pytest.param(b"a\n", id="a line feed at its end"),
    ],
)
async def test_a_bad_request_id_is_replaced(sqlite_client, sent):
    answer = await sqlite_client.get("/nowhere", headers={"X-Request-ID": sent})
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("status", "method", "path", "options"),
    [
        (200, "GET", "/health/live", {}),
        (200, "HEAD", "/health/live", {}),
        (200, "GET", "/docs", {}),
        (201, "POST", REGISTER, {"json": ADA}),
        (401, "GET", ME, {}),
        (404, "GET", "/nowhere", {}),
        (405, "POST", "/health/live", {}),
        (413, "POST", LOGIN, {"content": b"x" * 65537}),
        (422, "POST", LOGIN, {"json": {}}),
    ],
)
async def test_every_answer_has_the_request_id(
    sqlite_client, status, method, path, options
):
    headers = {"X-Request-ID": "my-id"}
    answer = await sqlite_client.request(method, path, headers=headers, **options)
    assert answer.status_code == status
    assert answer.headers.get_list("x-request-id") == ["my-id"]


async def test_every_record_of_a_request_has_its_id(learner, log_file):
    @learner.app.get("/learn")
    async def say_something():
        logging.getLogger("some.library").warning("from a library")
        await asyncio.sleep(0)  # the other request comes in between
        service.logger.info("from the route")

    ids = ["one", "two"]
    requests = [learner.get("/learn", headers={"X-Request-ID": i}) for i in ids]
    await asyncio.gather(*requests)
    for sent in ids:
        own = [entry for entry in log_file.records() if entry["request_id"] == sent]
        messages = [entry["message"] for entry in own]
        assert messages[:2] == ["from a library", "from the route"]
        assert len(messages) == 3 and messages[2].startswith("GET /learn 200")
    assert len(log_file.records()) == 6


# ---- log -------------------------------------------------------------------------------


class LogPipe:
    """A stdout whose reader is the test."""

    def __init__(self):
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        self.is_open = True

    def stall(self):
        """Log more than a pipe holds, and wait until the log thread waits in it."""
        service.logger.info("x" * 2**20)
        wait_until(service.log_queue.empty)

    def read(self):
        """Read until the log thread has nothing more to write."""
        data = b""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            is_done = not service.log_queue.unfinished_tasks
            try:
                data += os.read(self.reading, 2**20)
            except BlockingIOError:
                if is_done:
                    break
                time.sleep(0.001)
        return data.decode()

    def leave(self):
        if self.is_open:
            os.close(self.reading)
        self.is_open = False


@pytest.fixture
def log_pipe():
    pipe = LogPipe()
    with write_log_to(pipe.writing):
        yield pipe
        pipe.leave()  # this frees a log thread that waits in the pipe
    os.close(pipe.writing)


async def test_a_request_leaves_one_access_record(sqlite, log_file):
    async with serve(sqlite, log_format="json") as client:
        headers = {"X-Request-ID": "my-id"}
        await client.get(f"{ME}?password=hunter2", headers=headers)
    (access,) = [e for e in log_file.records() if e["request_id"] == "my-id"]
    always = {"time", "level", "logger", "message", "request_id"}
    own = {"method", "path", "status", "duration_ms", "client", "user_id"}
    assert set(access) == always | own
    assert (access["level"], access["logger"]) == ("INFO", "service")
    assert (access["method"], access["path"], access["status"]) == ("GET", ME, 401)
    assert access["user_id"] is None and 0 < access["duration_ms"] < 60_000
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", access["time"])
    assert "hunter2" not in log_file.text()


def test_the_duration_of_a_request_is_in_milliseconds(caplog):
    caplog.set_level(logging.INFO, "service")
    scope = {"method": "GET", "path": "/health/live"}
    service.log_access(scope, 200, 1.23456, None)
    assert caplog.messages == ["GET /health/live 200 1234.56 ms"]


@pytest.fixture
def far_from_utc(monkeypatch):
    monkeypatch.setenv("TZ", "FAR-14")  # 14 hours ahead
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_the_time_of_a_record_is_in_utc(far_from_utc, log_file, log_format):
    configure_log(log_format)
    values = {"msg": "a moment", "created": 1_000_000_000.25, "levelno": 30}
    service.logger.handle(logging.makeLogRecord(values))
    assert "2001-09-09T01:46:40.250Z" in log_file.text()


async def test_an_access_record_has_the_user_and_no_address_of_a_stranger(
    learner, log_file
):
    answer = await learner.get(ME, headers={"X-Forwarded-For": "6.6.6.6"})
    (access,) = log_file.records()
    assert (access["user_id"], access["status"]) == (answer.json()["id"], 200)
    assert access["client"] == "127.0.0.1"


async def test_an_access_record_has_the_path_and_the_method_as_sent(learner, log_file):
    await learner.head("/a%0Ab%C3%A9")
    (access,) = log_file.records()
    assert (access["method"], access["path"]) == ("HEAD", "/a%0Ab%C3%A9")


@pytest.mark.parametrize("raw_path", [None, b""], ids=["missing", "empty"])
async def test_a_server_need_not_tell_the_raw_path(learner, log_file, raw_path):
    app = changing_scope(learner.app, raw_path=raw_path)
    async with ask_app(app) as client:
        check_problem(await client.get("/a%0Ab%C3%A9"), 404, "not_found")
    assert log_file.records()[0]["path"] == "/a%0Ab%C3%A9"


async def test_a_server_need_not_tell_the_address_of_the_client(learner, log_file):
    async with ask_app(changing_scope(learner.app, client=None)) as client:
        assert (await client.get("/health/live")).status_code == 200
    assert log_file.records()[0]["client"] == "-"


async def test_the_text_format_has_the_access_record_in_one_line(sqlite, log_file):
    async with serve(sqlite, log_format="text") as client:
        await client.get("/health/live", headers={"X-Request-ID": "my-id"})
    (line,) = [line for line in log_file.text().splitlines() if "my-id" in line]
    time_and_level = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO   "
    access = r" \[my-id\] GET /health/live 200 \d+\.\d+ ms"
    assert re.fullmatch(time_and_level + access, line)


async def test_security_events_are_records_with_failures_at_warning(store, log_file):
    async with serve(store, log_format="json") as client:
        headers = await sign_in(client)
        await client.get(ME, headers={"Authorization": "Bearer x"})
        await client.get(ME)  # nothing was sent, so nothing was refused
        change = {"current_password": PASSWORD, "new_password": PASSWORD}
        await client.put(CHANGE, json=change, headers=headers)
        await client.post(LOGOUT, headers=await sign_in(client))
        await fail_logins(client, 6)
    events = [entry for entry in log_file.records() if "event" in entry]
    user = events[0]["user_id"]
    refused = [("login_failed", "WARNING", user)] * 5
    refused.append(("login_throttled", "WARNING", user))
    seen = [(entry["event"], entry["level"], entry["user_id"]) for entry in events]
    assert seen[:-6] == [
        ("user_registered", "INFO", user),
        ("login_succeeded", "INFO", user),
        ("token_refused", "WARNING", None),
        ("password_changed", "INFO", user),
        ("login_succeeded", "INFO", user),
        ("logged_out", "INFO", user),
    ]
    assert sorted(seen[-6:]) == refused
    assert re.fullmatch(r"[0-9a-f-]{36}", user)


async def test_an_event_has_the_id_of_its_request_and_is_named_in_the_message(
    sqlite, log_file
):
    async with serve(sqlite, log_format="json") as client:
        headers = {"X-Request-ID": "my-id"}
        answer = await client.post(REGISTER, json=ADA, headers=headers)
    own = [entry for entry in log_file.records() if entry["request_id"] == "my-id"]
    event, access = own
    assert (event["event"], access["status"]) == ("user_registered", 201)
    assert event["message"] == f"user_registered {answer.json()['id']}"


async def test_the_log_of_the_accounts_has_no_secrets(store, log_file):
    async with serve(store, log_format="json", log_level="DEBUG") as client:
        headers = await sign_in(client)
        token = headers["Authorization"].split()[1]
        await client.get(ME, headers=headers)
        await client.get(ME, headers={"Authorization": f"Bearer {token}x"})
        change = {"current_password": PASSWORD, "new_password": "hunter2-hunter2"}
        await client.put(CHANGE, json=change, headers=headers)
        await fail_logins(client, 6)
        await client.post(REGISTER, json={"email": "no email", "password": PASSWORD})
    text = log_file.text()
    assert "password_changed" in text
    for secret in (EMAIL, PASSWORD, "hunter2", token, token[-20:], "$2b$", SECRET):
        assert secret not in text


@pytest.mark.process("shared")
def test_no_library_logs_a_secret_at_the_level_debug(server):
    account = {"email": "debug@example.com", "password": "hunter2-hunter2"}
    headers = {"X-Request-ID": "debug-register"}
    assert server.ask("POST", REGISTER, json=account, headers=headers).is_success
    assert server.ask("POST", LOGIN, json=account).status_code == 200
    event, access = find_records(server, "debug-register")
    assert (event["event"], access["status"]) == ("user_registered", 201)
    text = server.log.read_text("utf-8")
    assert "debug@example" not in text and "hunter2" not in text and "$2b$" not in text


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("DEBUG", ["debug", "info", "warning", "error"]),
        ("INFO", ["info", "warning", "error"]),
        ("WARNING", ["warning", "error"]),
        ("ERROR", ["error"]),
    ],
)
def test_the_log_level_is_a_setting(log_file, level, shown):
    configure_log(log_level=level)
    for name in ("debug", "info", "warning", "error"):
        getattr(service.logger, name)(name)
    assert [entry["message"] for entry in log_file.records()] == shown


@pytest.mark.parametrize("library", ["databases", "aiosqlite", "httpx", "asyncpg"])
def test_libraries_log_from_warning_on_only(log_file, library):
    configure_log(log_level="DEBUG")
    logging.getLogger(library).info("the values of a statement")
    logging.getLogger(library).warning("a trouble")
    assert [entry["message"] for entry in log_file.records()] == ["a trouble"]


@pytest.mark.parametrize("name", ["uvicorn", "uvicorn.error"])
@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_record_of_uvicorn_takes_the_same_format_and_is_written_once(
    log_file, name, log_format, capfd
):
    uvicorn_logger = logging.getLogger(name)
    with mock.patch.object(uvicorn_logger, "handlers", [logging.StreamHandler()]):
        uvicorn_logger.propagate = False  # uvicorn has set up its own logging
        configure_log(log_format)
        uvicorn_logger.info("Started server")
    (line,) = log_file.text().splitlines()
    if log_format == "json":
        assert json.loads(line)["message"] == "Started server"
        assert json.loads(line)["logger"] == name
    else:
        assert line.endswith("Z INFO    [-] Started server")
    assert capfd.readouterr() == ("", "")


@pytest.mark.process("shared")
def test_a_server_writes_each_line_once_and_in_one_format(server):
    for request_id in ("first", "second"):
        headers = {"X-Request-ID": request_id}
        server.ask("GET", f"/logged-{request_id}", headers=headers)
    find_records(server, "second")  # so all lines of the first one are written
    text = server.log.read_text("utf-8")
    lines = text[: text.rindex("\n")].splitlines()
    records = [json.loads(line) for line in lines]
    once = ["Waiting for application startup.", "Application startup complete."]
    messages = [entry["message"] for entry in records]
    assert [messages.count(message) for message in once] == [1, 1]
    assert sum("Uvicorn running on" in message for message in messages) == 1
    assert text.count("/logged-first") == 2  # as path and in the message
    assert "uvicorn.access" not in {entry["logger"] for entry in records}


def test_a_traceback_is_a_part_of_its_record(log_file):
    configure_log()
    try:
        raise ZeroDivisionError("no such quotient")
    except ZeroDivisionError:
        service.logger.exception("broken")
    (record,) = log_file.records()
    assert record["message"] == "broken"
    assert record["traceback"].startswith("Traceback")
    assert record["traceback"].endswith("ZeroDivisionError: no such quotient")


@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize(
    "message",
    [
        "before ServiceError: after",
        "ServiceError: at its start, and ServiceError: again",
        "a path is /a?b&c=%41",
        "x" * 100_000,
    ],
    ids=["an error's name", "an error's name at the start", "a percent", "long"],
)
def test_a_message_is_written_whole(log_file, log_format, message):
    configure_log(log_format)
    service.logger.error(message)
    (line,) = log_file.text().splitlines()
    if log_format == "json":
        assert json.loads(line)["message"] == message
    else:
        assert line.endswith(f" ERROR   [-] {message}")


@pytest.mark.parametrize(
    "letters",
    [
        pytest.param("é ß ø Ж 東京 ع", id="letters"),
        pytest.param("\U0001f600", id="an emoji"),
        pytest.param(" ~\u00a0\u00a1\u2027\u202a", id="next to control characters"),
    ],
)
def test_letters_stay_readable_in_the_text_format(log_file, letters):
    configure_log("text")
    service.logger.info("before %s after", letters)
    error = ValueError(letters)
    service.logger.error("broken", exc_info=error)
    assert f"[-] before {letters} after\n" in log_file.text()
    assert f"    ValueError: {letters}\n" in log_file.text()


@pytest.mark.parametrize(
    "character",
    ["\x00", "\t", "\n", "\r", "\x1b", "\x1f", "\x7f", "\x85", "\x9f"]
    + ["\u2028", "\u2029"],
    ids=ascii,
)
def test_a_control_character_is_escaped_in_the_text_format(log_file, character):
    configure_log("text")
    service.logger.info("before%safter", character)
    escaped = f"\\x{ord(character):02x}"
    assert log_file.text().endswith(f"[-] before{escaped}after\n")


def test_no_message_and_no_exception_can_forge_a_record_in_the_text_format(log_file):
    configure_log("text")
    error = ValueError("one\n2026 INFO [x] forged\r2026 INFO [x] forged")
    service.logger.error("two\n2026\u2028\x1b[31m forged", exc_info=error)
    text = log_file.text()
    first, *others = text.split("\n")[:-1]
    assert " ERROR   [-] two\\x0a2026\\x2028\\x1b[31m forged" in first
    assert all(line.startswith("    ") for line in others)
    assert others[-3:] == [
        "    ValueError: one",
        "    2026 INFO [x] forged",
        "    2026 INFO [x] forged",
    ]
    assert "\x1b" not in text and "\r" not in text


def test_a_record_is_one_line_in_the_json_format(log_file):
    configure_log()
    message = "one\ntwo\u2028three\x85four"
    service.logger.error(message, exc_info=ValueError("five\nsix"))
    (line,) = log_file.text().splitlines()
    assert json.loads(line)["message"] == message


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_what_utf8_cannot_hold_is_written_escaped(log_file, log_format):
    with without_the_handlers_of_pytest():  # pytest-xdist cannot send such a record
        configure_log(log_format)
        service.logger.error("unhandled error", exc_info=ValueError("x \ud800"))
    assert "ValueError: x \\ud800" in log_file.text()


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        pytest.param("%d", ["hunter2"], id="a word for a number"),
        pytest.param("%s", ["hunter2", "hunter2"], id="too many"),
        pytest.param("%s %s", ["hunter2"], id="too few"),
        pytest.param("%(name)s", [{"hunter2": 1}], id="a missing name"),
    ],
)
@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_wrong_log_call_is_reported_without_its_arguments(
    log_file, log_format, message, arguments, capfd
):
    with without_the_handlers_of_pytest():  # they raise
        configure_log(log_format)
        service.logger.info(message, *arguments)
        service.logger.info("the next one")
    wrong, after = log_file.text().splitlines()
    assert "WARNING" in wrong and Path(__file__).name in wrong
    assert "hunter2" not in wrong and "the next one" in after
    assert capfd.readouterr() == ("", "")


async def test_a_wrong_log_call_does_not_reach_the_request(learner, log_file):
    class Unprintable:
        def __str__(self):
            raise ValueError("hunter2")

    @learner.app.get("/learn")
    async def log_nonsense():
        service.logger.info("%d", "hunter2")
        service.logger.info("%s", Unprintable())
        service.logger.info("x", extra={"fields": {"value": Unprintable()}})
        return "answered"

    with without_the_handlers_of_pytest():
        configure_log()
        assert (await learner.get("/learn")).json() == "answered"
    *reports, _ = log_file.records()
    assert len(reports) == 3 and "hunter2" not in log_file.text()
    assert all("a log call is wrong" in entry["message"] for entry in reports)


def test_what_finds_no_room_is_dropped_counted_and_reported_once(log_pipe):
    with without_the_handlers_of_pytest():  # they are slow
        configure_log("text")
        log_pipe.stall()
        room = service.log_queue.maxsize
        assert room == 10_000  # as README.md says
        for number in range(room + 7):
            service.logger.info("line %d.", number)
        text = log_pipe.read()
        service.logger.info("after")
        service.logger.info("later")
        report, after, later = log_pipe.read().splitlines()
    assert f"line {room - 1}." in text and f"line {room}." not in text
    assert text.count("\n") == room + 1
    assert "WARNING" in report and " 7 log records were dropped" in report
    assert after.endswith("after") and later.endswith("later")


async def test_requests_are_answered_while_nobody_reads_the_log(
    sqlite_client, log_pipe, monkeypatch
):
    log_pipe.stall()
    monkeypatch.setattr(service.log_queue, "maxsize", 3)
    answers = [await sqlite_client.get("/health/live") for _ in range(10)]
    assert [answer.status_code for answer in answers] == [200] * 10
    assert log_pipe.read().count("GET /health/live 200") == 3


def test_the_exit_waits_for_a_reader_but_no_longer_than_a_second(log_pipe, monkeypatch):
    configure_log("text")
    log_pipe.stall()
    clock = mock.Mock(wraps=time)
    clock.monotonic.return_value = 100
    monkeypatch.setattr(service, "time", clock)
    exit_handler = threading.Thread(target=service.wait_until_log_is_written)
    exit_handler.start()
    wait_until(lambda: clock.monotonic.called)
    clock.monotonic.return_value = 100.99
    exit_handler.join(0.1)
    is_waiting_at_first = exit_handler.is_alive()
    clock.monotonic.return_value = 101
    exit_handler.join(10)
    is_waiting_at_last = exit_handler.is_alive()
    log_pipe.leave()
    exit_handler.join()
    assert is_waiting_at_first and not is_waiting_at_last


def test_the_exit_waits_until_the_lines_so_far_are_written(log_file):
    configure_log("text")
    for number in range(100):
        service.logger.info("line %d.", number)
    service.wait_until_log_is_written()
    assert log_file.path.read_text().count("\n") == 100


def test_a_stdout_that_does_not_block_loses_nothing(log_pipe):
    configure_log("text")
    os.set_blocking(log_pipe.writing, False)
    messages = [f"line {number}: {'x' * 5000}" for number in range(100)]
    for message in messages:
        service.logger.info(message)
    wait_until(lambda: not select.select([], [log_pipe.writing], [], 0)[1])  # full
    lines = log_pipe.read().splitlines()
    assert [line.partition("[-] ")[2] for line in lines] == messages


def test_a_reader_that_has_gone_is_survived(log_pipe, tmp_path):
    configure_log("text")
    log_pipe.leave()
    service.logger.info("lost")
    wait_for_log()
    path = tmp_path / "log"
    with open(path, "wb") as file, write_log_to(file.fileno()):
        service.logger.info("written")
    assert path.read_text().endswith("written\n") and "lost" not in path.read_text()


# ---- health and docs -------------------------------------------------------------------


async def test_live_and_ready_say_ok(sqlite_client):
    assert (await sqlite_client.get("/health/live")).json() == {"status": "ok"}
    ready = await sqlite_client.get("/health/ready")
    assert ready.status_code == 200 and ready.json()["status"] == "ok"


async def test_ready_asks_sqlite_and_live_does_not(sqlite, caplog):
    may_end = threading.Event()
    async with serve(sqlite) as client:
        db = client.services.db
        async with db.reader() as connection:
            driver = connection.raw_connection
        await driver.create_function("wait", 0, lambda: may_end.wait(30))
        reading = driver.execute_fetchall("SELECT wait()")
        other = asyncio.create_task(reading)  # ready must wait until this read ends
        await asyncio.sleep(0)
        db.timeout = 0.05
        try:
            answer = await client.get("/health/ready")
            check_problem(answer, 503, "database_unavailable")
            assert (await client.get("/health/live")).status_code == 200
        finally:
            may_end.set()
        with contextlib.suppress(sqlite3.OperationalError):  # interrupted
            await other
        db.timeout = 5
        assert (await client.get("/health/ready")).status_code == 200
    assert "database_unavailable: TimeoutError" in caplog.text


async def test_ready_asks_postgresql_and_live_does_not(postgres):
    name = postgres.url.rpartition("/")[2]
    admin = Store(POSTGRES_URL)
    async with serve(postgres) as client:
        await admin.sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        sessions = f"SELECT pid FROM pg_stat_activity WHERE datname = '{name}'"
        await admin.sql(f"SELECT pg_terminate_backend(pid) FROM ({sessions}) AS own")
        check_problem(await client.get("/health/ready"), 503, "database_unavailable")
        assert (await client.get("/health/live")).status_code == 200
        await admin.sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        assert (await client.get("/health/ready")).status_code == 200


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_the_docs_are_served(sqlite_client, path):
    answer = await sqlite_client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "/openapi.json" in answer.text


BODY_CODES = {"request_timeout", "body_too_large", "invalid_request"}
TOKEN_CODES = {"not_authenticated", "invalid_token", "expired_token"}
HASH_AND_DATABASE = {"overloaded", "database_unavailable"}

# All errors that each operation can give. Each one can give internal_error, too.
ERROR_CODES = {
    "register": {"email_taken", *HASH_AND_DATABASE, *BODY_CODES},
    "log_in": {
        "invalid_credentials",
        "too_many_attempts",
        *HASH_AND_DATABASE,
        *BODY_CODES,
    },
    "show_account": {"database_unavailable", *TOKEN_CODES},
    "change_password": {
        "wrong_password",
        "too_many_attempts",
        *HASH_AND_DATABASE,
        *TOKEN_CODES,
        *BODY_CODES,
    },
    "log_out": {"database_unavailable", *TOKEN_CODES},
    "fetch_external_data": {
        "external_service_error",
        "circuit_open",
        "external_timeout",
        "database_unavailable",
        *TOKEN_CODES,
    },
    "show_circuit": {"database_unavailable", *TOKEN_CODES},
    "switch_demo_upstream": BODY_CODES,
    "check_liveness": set(),
    "check_readiness": {"database_unavailable"},
}

# Where each operation is, and the status and the schema of its success.
OPERATIONS = {
    "register": ("post", REGISTER, "201", "UserResponse"),
    "log_in": ("post", LOGIN, "200", "TokenResponse"),
    "show_account": ("get", ME, "200", "UserResponse"),
    "change_password": ("put", CHANGE, "204", None),
    "log_out": ("post", LOGOUT, "204", None),
    "fetch_external_data": ("get", DATA, "200", "ExternalData"),
    "show_circuit": ("get", STATUS, "200", "CircuitStatus"),
    "switch_demo_upstream": ("put", DEMO, "204", None),
    "check_liveness": ("get", "/health/live", "200", "Health"),
    "check_readiness": ("get", "/health/ready", "200", "Health"),
}


@pytest.fixture(scope="session")
def document():
    """openapi.json as development serves it."""
    settings = service.Settings(_env_file=None, environment="development")
    app = service.create_app(settings)

    async def download():
        async with ask_app(app) as client:
            return (await client.get("/openapi.json")).json()

    return asyncio.run(download())


def read_operation(document, operation_id):
    method, path, _, _ = OPERATIONS[operation_id]
    return document["paths"][path][method]


def read_errors(operation):
    """Yield the status and the `content` of each answer that is an error."""
    for status, answer in operation["responses"].items():
        if status >= "400":
            yield status, answer["content"]


def test_every_operation_has_a_short_name(document):
    found = {
        (operation["operationId"], method, path)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    expected = {(name, *place[:2]) for name, place in OPERATIONS.items()}
    assert found == expected, "OPERATIONS needs an entry for each route"


@pytest.mark.parametrize("operation_id", OPERATIONS)
def test_an_operation_names_exactly_the_errors_that_it_can_give(document, operation_id):
    operation = read_operation(document, operation_id)
    codes = []
    for _, content in read_errors(operation):
        codes += content["application/problem+json"]["examples"]
    assert len(codes) == len(set(codes))
    expected = {"internal_error", *ERROR_CODES[operation_id]}
    assert set(codes) == expected, "problems() of the route and ERROR_CODES differ"


@pytest.mark.parametrize("operation_id", OPERATIONS)
def test_every_error_example_is_a_problem_with_its_status_and_code(
    document, operation_id
):
    for status, content in read_errors(read_operation(document, operation_id)):
        assert list(content) == ["application/problem+json"]
        media_type = content["application/problem+json"]
        assert media_type["schema"] == {"$ref": "#/components/schemas/Problem"}
        for code, example in media_type["examples"].items():
            problem = example["value"]
            service.Problem.model_validate(problem, strict=True)
            assert (problem["code"], str(problem["status"])) == (code, status)
            assert bool(problem.get("errors")) == (status == "422")
            assert example["summary"]


@pytest.mark.parametrize("operation_id", OPERATIONS)
def test_an_operation_explains_itself(document, operation_id):
    operation = read_operation(document, operation_id)
    assert operation["summary"] and operation["description"].endswith(".")
    assert len(operation["tags"]) == 1
    assert all(answer["description"] for answer in operation["responses"].values())


@pytest.mark.parametrize("operation_id", OPERATIONS)
def test_a_successful_answer_has_a_named_schema(document, operation_id):
    _, _, status, schema = OPERATIONS[operation_id]
    responses = read_operation(document, operation_id)["responses"]
    assert [key for key in responses if key < "400"] == [status]
    if schema is None:
        assert "content" not in responses[status]
    else:
        reference = {"$ref": f"#/components/schemas/{schema}"}
        assert responses[status]["content"]["application/json"]["schema"] == reference


@pytest.mark.parametrize(
    "name",
    ["UserResponse", "TokenResponse", "ExternalData", "CircuitStatus", "Health"],
)
def test_the_schema_of_a_successful_answer_has_an_example(document, name):
    schema = document["components"]["schemas"][name]
    own = [schema, *schema["properties"].values()]
    assert any("examples" in part or "const" in part for part in own)


@pytest.mark.parametrize("operation_id", OPERATIONS)
def test_the_locks_are_on_the_operations_that_need_a_token(document, operation_id):
    needs_token = "not_authenticated" in ERROR_CODES[operation_id]
    security = read_operation(document, operation_id).get("security")
    assert security == ([{"token": []}] if needs_token else [])


@pytest.mark.parametrize(
    ("operation_id", "schema"),
    [
        ("register", "UserRegister"),
        ("log_in", "UserLogin"),
        ("change_password", "PasswordChange"),
        ("switch_demo_upstream", "DemoSwitch"),
    ],
)
def test_the_body_of_a_request_has_a_named_schema(document, operation_id, schema):
    body = read_operation(document, operation_id)["requestBody"]
    reference = {"$ref": f"#/components/schemas/{schema}"}
    assert body["content"] == {"application/json": {"schema": reference}}
    assert body["required"] is True


def test_no_schema_has_a_name_that_fastapi_made_up(document):
    schemas = document["components"]["schemas"]
    assert "HTTPValidationError" not in schemas and "ValidationError" not in schemas
    assert not [name for name in schemas if name.startswith("Body_")]


def test_the_schema_of_errors_is_typed(document):
    schemas = document["components"]["schemas"]
    problem = schemas["Problem"]
    types = {name: part.get("type") for name, part in problem["properties"].items()}
    texts = dict.fromkeys(["type", "title", "detail", "code", "request_id"], "string")
    assert types == {**texts, "status": "integer", "errors": "array"}
    assert set(problem["required"]) == {*texts, "status"}
    assert "enum" not in problem["properties"]["code"]  # new codes break no client
    errors = problem["properties"]["errors"]
    assert errors["items"] == {"$ref": "#/components/schemas/FieldError"}
    assert "default" not in errors  # the service leaves it out and never sends null
    field_error = schemas["FieldError"]
    assert set(field_error["required"]) == {"loc", "msg", "type"}
    assert field_error["properties"]["loc"]["type"] == "array"


def test_the_page_says_what_the_service_is_and_how_to_try_it(document):
    info = document["info"]
    assert info["title"] and re.fullmatch(r"\d+\.\d+\.\d+", info["version"])
    for word in ("register", "log in", "access_token", "Authorize"):
        assert word in info["description"]


def test_every_tag_has_a_sentence(document):
    used = {read_operation(document, name)["tags"][0] for name in OPERATIONS}
    described = {tag["name"]: tag["description"] for tag in document["tags"]}
    assert set(described) == used
    for sentence in described.values():
        assert len(sentence.split()) > 3 and sentence.endswith(".")


def test_the_authorize_dialog_says_what_to_paste(document):
    (scheme,) = document["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert "access_token" in scheme["description"]


async def test_the_openapi_document_is_the_same_for_all(sqlite_client):
    first = await sqlite_client.get("/openapi.json", headers={"X-Request-ID": "a"})
    second = await sqlite_client.get("/openapi.json", headers={"X-Request-ID": "b"})
    assert first.status_code == 200 and first.text == second.text


async def test_the_demo_switch_is_documented_only_where_it_works(
    sqlite_client, document
):
    paths = (await sqlite_client.get("/openapi.json")).json()["paths"]
    assert DEMO not in paths and DEMO in document["paths"]


# ---- tests that a learner adds ---------------------------------------------------------


def test_the_testclient_of_fastapi_works(sqlite):
    with TestClient(service.create_app(make_settings(sqlite))) as client:
        assert client.post(REGISTER, json=ADA).status_code == 201
        token = client.post(LOGIN, json=ADA).json()["access_token"]
        answer = client.get(ME, headers={"Authorization": f"Bearer {token}"})
        assert answer.json()["email"] == EMAIL
        assert client.get("/nowhere").json()["code"] == "not_found"


async def test_a_test_can_replace_a_part_by_dependency_overrides(learner):
    class Fake:
        async def fetch(self):
            return {"from": "a fake"}

    async def get_fake_services():
        return dataclasses.replace(learner.services, external=Fake())

    overrides = learner.app.dependency_overrides
    overrides[service.get_services] = get_fake_services
    replaced = await learner.get(DATA)
    assert replaced.json() == {"data": {"from": "a fake"}}
    overrides.clear()
    assert (await learner.get(DATA)).json() != replaced.json()


# ---- external client: what the tests share ---------------------------------------------

# The database does not matter in this section, and this one is quick.
IN_MEMORY = Store("sqlite:///:memory:")
CREATE_SSL_CONTEXT = httpx.create_ssl_context  # share_ssl_context replaces it in tests


@contextlib.asynccontextmanager
async def serve_with_upstream(upstream, **settings):
    """Yield a logged-in client of a service whose external API is `upstream`."""
    async with serve(IN_MEMORY, external_api_url=upstream.url, **settings) as client:
        client.headers.update(await sign_in(client))
        yield client


@contextlib.asynccontextmanager
async def external_client(upstream, **settings):
    """Yield a client of `upstream` without the service around it, which is quicker."""
    settings = make_settings(IN_MEMORY, **settings)
    client = service.ExternalClient("external", upstream.url, settings)
    async with client.http:
        yield client


async def fail_to_fetch(client):
    """Fetch in vain. Return what the user of the service would get."""
    with pytest.raises(service.ExternalServiceError) as failure:
        await client.fetch()
    return failure.value.status, failure.value.code


BAD_GATEWAY = (502, "external_service_error")


async def read_status(client):
    return (await client.get(STATUS)).json()


async def wait_until_true(condition):
    """Let other tasks run until the condition is true. Fail after a minute."""
    give_up_at = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up_at, "the condition did not become true"
        await asyncio.sleep(0.01)


@pytest.fixture
def waits(monkeypatch):
    """The seconds of each wait between two attempts. No wait takes any time."""
    waits = []
    sleep = asyncio.sleep

    async def skip(seconds, result=None):
        if seconds:
            waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", skip)
    return waits


async def drip(writer):
    """Send a byte every now and then, for five seconds."""
    writer.write(raw(200, b"", length=1000))
    for _ in range(100):
        writer.write(b"1")
        await writer.drain()
        await asyncio.sleep(0.05)


async def flood(writer):
    """Send a body without end, until the other side closes the connection."""
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while True:
        writer.write(b"1" * 2**16)
        await writer.drain()


async def reset(writer):
    """Break the connection, as a server that crashes does."""
    linger = struct.pack("ii", 1, 0)
    peer = writer.get_extra_info("socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


# ---- external client: what is sent, and what is passed on ------------------------------


@pytest.mark.parametrize(
    "data",
    [
        pytest.param({"a": [1, "\u00e9", None, 1e300, True]}, id="object"),
        pytest.param([], id="empty list"),
        pytest.param("text", id="text"),
        pytest.param(None, id="null"),
    ],
)
async def test_the_json_of_the_upstream_is_passed_on(guarded, upstream, data):
    upstream.script = [ok(data)]
    answer = await guarded.get(DATA)
    assert (answer.status_code, answer.json()) == (200, {"data": data})


@pytest.mark.parametrize("status", [201, 299])
async def test_every_success_with_json_is_passed_on(guarded, upstream, status):
    upstream.script = [raw(status, b"1")]
    assert (await guarded.get(DATA)).json() == {"data": 1}


async def test_a_chunked_body_is_read(guarded, upstream):
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    upstream.script = [head + b"2\r\n[1\r\n" + b"3\r\n,2]\r\n" + b"0\r\n\r\n"]
    assert (await guarded.get(DATA)).json() == {"data": [1, 2]}


async def test_each_attempt_carries_the_id_of_the_request(upstream, waits):
    upstream.script = [raw(500), ok(1)]
    async with serve_with_upstream(upstream) as client:
        await client.get(DATA, headers={"X-Request-ID": "my-id"})
    assert len(upstream.requests) == 2
    for request in upstream.requests:
        assert "x-request-id: my-id\r\n" in request.lower()


async def test_the_token_is_not_sent_to_the_upstream(guarded, upstream):
    await guarded.get(DATA)
    [request] = upstream.requests
    token = guarded.headers["Authorization"].split()[1]
    assert "authorization" not in request.lower() and token not in request


async def test_the_upstream_is_asked_for_a_body_without_encoding(guarded, upstream):
    await guarded.get(DATA)
    [request] = upstream.requests
    assert "accept-encoding: identity\r\n" in request.lower()


async def test_a_body_that_is_marked_as_not_encoded_is_read(guarded, upstream):
    upstream.script = [raw(200, b"1", "Content-Encoding: identity\r\n")]
    assert (await guarded.get(DATA)).json() == {"data": 1}


async def test_a_body_of_exactly_one_mebibyte_is_read(guarded, upstream):
    upstream.script = [raw(200, b'"' + b"x" * (2**20 - 2) + b'"')]
    answer = await guarded.get(DATA)
    assert answer.json() == {"data": "x" * (2**20 - 2)}


async def test_cookies_are_not_kept(guarded, upstream):
    upstream.script = [raw(200, b"1", "Set-Cookie: a=b\r\n")]
    for _ in range(2):
        assert (await guarded.get(DATA)).status_code == 200
    assert "cookie" not in "".join(upstream.requests).lower()


async def test_proxies_of_the_environment_are_not_used(upstream, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with serve_with_upstream(upstream) as client:
        assert (await client.get(DATA)).status_code == 200


# ---- external client: what fails, and what is tried again ------------------------------


def nested(levels):
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(raw(200, b"<html>"), id="no JSON"),
        pytest.param(raw(200, b"1 2"), id="JSON and more"),
        pytest.param(raw(200, b""), id="no body"),
        pytest.param(raw(204), id="204"),
        pytest.param(raw(300, b"{}"), id="300"),
        pytest.param(raw(301, b"{}", "Location: /\r\n"), id="301"),
        pytest.param(raw(302, b"{}", "Location: http://[::1\r\n"), id="bad Location"),
        pytest.param(raw(304), id="304"),
        pytest.param(raw(399, b"{}"), id="399"),
        pytest.param(raw(200, b'{"a": NaN}'), id="NaN"),
        pytest.param(raw(200, b"-Infinity"), id="Infinity"),
        pytest.param(raw(200, b'"\\ud800"'), id="half a surrogate pair"),
        pytest.param(raw(200, b'"\xff"'), id="not UTF-8"),
        pytest.param(raw(200, nested(100_000)), id="deep nesting"),
        pytest.param(raw(200, b"1" * 5000), id="5000 digits"),
        pytest.param(raw(200, b"{}", "Content-Encoding: gzip\r\n"), id="gzip"),
        pytest.param(raw(200, b"{}", "Content-Encoding: br\r\n"), id="br"),
        pytest.param(raw(200, b'"' + b"x" * (2**20 - 1) + b'"'), id="1 MiB and a byte"),
        pytest.param(flood, id="no end"),
    ],
)
async def test_nonsense_is_502_and_a_failure_and_not_retried(upstream, entry):
    upstream.script = [entry]
    async with external_client(upstream) as client:
        assert await fail_to_fetch(client) == BAD_GATEWAY
        assert len(upstream.requests) == 1
        assert client.circuit.breaker.fail_counter == 1


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(raw(408, b"{}"), id="408"),
        pytest.param(raw(429, b"{}"), id="429"),
        pytest.param(raw(500, b"{}"), id="500"),
        pytest.param(raw(503, b"{}"), id="503"),
        pytest.param(raw(599, b"{}"), id="599"),
        pytest.param(raw(200, b"{}", length=10), id="a cut body"),
        pytest.param(b"SSH-2.0-x\r\n\r\n", id="no HTTP"),
        pytest.param(b"", id="a closed connection"),
        pytest.param(reset, id="a broken connection"),
    ],
)
async def test_a_passing_fault_is_retried_and_each_attempt_is_a_failure(
    upstream, waits, entry
):
    upstream.script = [entry]
    async with external_client(upstream, external_attempts=2) as client:
        assert await fail_to_fetch(client) == BAD_GATEWAY
        assert len(upstream.requests) == 2
        assert client.circuit.breaker.fail_counter == 2


async def test_a_refused_connection_is_retried_and_a_failure(
    unused_port, waits, caplog
):
    url = f"http://127.0.0.1:{unused_port}/"
    async with serve(IN_MEMORY, external_api_url=url) as client:
        client.headers.update(await sign_in(client))
        check_problem(await client.get(DATA), 502, "external_service_error")
        assert (await read_status(client))["failures"] == 3
    assert caplog.text.count("external: an attempt failed: ConnectError: ") == 3


async def test_a_retry_that_succeeds_clears_the_failures(upstream, waits):
    upstream.script = [raw(500), raw(500), ok(1)]
    async with external_client(upstream) as client:
        assert await client.fetch() == 1
        assert client.circuit.breaker.fail_counter == 0


@pytest.mark.parametrize("status", [400, 401, 404, 407, 409, 428, 430, 499])
async def test_another_4xx_is_502_and_a_sign_of_life_and_not_retried(
    upstream, waits, status
):
    upstream.script = [raw(500), raw(status, b"{}")]
    async with external_client(upstream) as client:
        assert await fail_to_fetch(client) == BAD_GATEWAY
        assert len(upstream.requests) == 2
        assert client.circuit.breaker.fail_counter == 0


@pytest.mark.parametrize("attempts", [1, 4])
async def test_there_are_as_many_attempts_as_the_setting_says(
    upstream, waits, attempts
):
    upstream.script = [raw(500)]
    settings = {"external_attempts": attempts}
    async with external_client(upstream, **settings) as client:
        assert await fail_to_fetch(client) == BAD_GATEWAY
    assert len(upstream.requests) == attempts


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        pytest.param(raw(503), "status 503", id="5xx"),
        pytest.param(raw(404), "status 404", id="4xx"),
        pytest.param(raw(301, b"", "Location: /\r\n"), "status 301", id="redirect"),
        pytest.param(b"x\r\n\r\n", "RemoteProtocolError", id="no HTTP"),
        pytest.param(raw(200, b"x"), "ValueError", id="no JSON"),
    ],
)
async def test_the_log_says_why_an_attempt_failed(
    guarded, upstream, caplog, entry, reason
):
    upstream.script = [entry]
    await guarded.get(DATA)
    [record] = [record for record in caplog.records if "attempt" in record.message]
    assert record.message == f"external: an attempt failed: {reason}"
    assert record.levelname == "WARNING"


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(raw(400, b"my secret", "X-Reason: my secret\r\n"), id="4xx"),
        pytest.param(raw(302, b"", "Location: /my secret\r\n"), id="redirect"),
        pytest.param(b"my secret\r\n\r\n", id="no HTTP"),
        pytest.param(raw(200, b"my secret"), id="no JSON"),
        pytest.param(raw(200, b"1", "Content-Encoding: my secret\r\n"), id="encoding"),
    ],
)
async def test_an_upstream_that_fails_is_not_quoted(guarded, upstream, caplog, entry):
    upstream.script = [entry]
    answer = await guarded.get(DATA)
    check_problem(answer, 502, "external_service_error")
    assert "my secret" not in answer.text + caplog.text


async def test_the_log_tells_two_clients_apart(upstream, caplog):
    upstream.script = [raw(500)]
    settings = make_settings(IN_MEMORY, external_attempts=1, breaker_fail_max=1)
    caplog.set_level(logging.WARNING, "service")
    for name in ("weather", "billing"):
        client = service.ExternalClient(name, upstream.url, settings)
        async with client.http:
            with pytest.raises(service.ExternalServiceError):
                await client.fetch()
    assert caplog.messages == [
        "weather: an attempt failed: status 500",
        "circuit_changed weather open",
        "billing: an attempt failed: status 500",
        "circuit_changed billing open",
    ]


# ---- external client: times ------------------------------------------------------------


@pytest.mark.parametrize("entry", [hang, drip])
async def test_an_attempt_without_an_end_is_504_and_a_failure(upstream, caplog, entry):
    upstream.script = [entry]
    settings = {"external_timeout_seconds": 0.3, "external_deadline_seconds": 60}
    settings.update(external_attempts=1)
    async with serve_with_upstream(upstream, **settings) as client:
        begin = time.monotonic()
        check_problem(await client.get(DATA), 504, "external_timeout")
        assert 0.25 < time.monotonic() - begin < 4
        assert (await read_status(client))["failures"] == 1
    assert "external: an attempt failed: no answer in time" in caplog.messages


async def test_the_deadline_shortens_an_attempt_which_is_a_failure(upstream):
    upstream.script = [hang]
    settings = {"external_timeout_seconds": 60, "external_deadline_seconds": 0.3}
    async with external_client(upstream, **settings) as client:
        begin = time.monotonic()
        assert await fail_to_fetch(client) == (504, "external_timeout")
        assert 0.25 < time.monotonic() - begin < 4
        assert client.circuit.breaker.fail_counter == 1


async def test_no_attempt_begins_after_the_deadline(upstream):
    upstream.script = [hang]
    settings = {"external_timeout_seconds": 0.3, "external_deadline_seconds": 0.5}
    settings.update(external_attempts=20, breaker_fail_max=99)
    async with external_client(upstream, **settings) as client:
        assert await fail_to_fetch(client) == (504, "external_timeout")
        assert client.circuit.breaker.fail_counter in (1, 2)


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        pytest.param([raw(500), hang], (504, "external_timeout"), id="time out"),
        pytest.param([hang, raw(500)], BAD_GATEWAY, id="status 500"),
    ],
)
async def test_the_last_attempt_decides_between_502_and_504(upstream, script, outcome):
    upstream.script = script
    settings = {"external_timeout_seconds": 0.3, "external_attempts": 2}
    async with external_client(upstream, **settings) as client:
        assert await fail_to_fetch(client) == outcome


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        pytest.param("0", 0, id="zero"),
        pytest.param("1", 1, id="a second"),
        pytest.param("4", 4, id="less than the deadline"),
        pytest.param("soon", 0, id="a word"),
        pytest.param("-1", 0, id="negative"),
        pytest.param("1.5", 0, id="a fraction"),
        pytest.param("9" * 400, 0, id="400 digits"),
    ],
)
async def test_the_retry_after_of_the_upstream_is_added_to_the_jitter(
    upstream, waits, asked, seconds
):
    upstream.script = [raw(429, b"", f"Retry-After: {asked}\r\n"), ok(1)]
    async with external_client(upstream, external_deadline_seconds=5) as client:
        assert await client.fetch() == 1
    [wait] = waits
    assert seconds < wait < seconds + 0.1001


@pytest.mark.parametrize(
    ("status", "asked"),
    [(408, "5"), (429, "5"), (503, "5"), (429, "60"), (429, "999999999")],
)
async def test_a_retry_after_beyond_the_deadline_ends_the_call(
    upstream, waits, status, asked
):
    upstream.script = [raw(status, b"", f"Retry-After: {asked}\r\n"), ok(1)]
    settings = {"external_deadline_seconds": 5}
    async with external_client(upstream, **settings) as client:
        assert await fail_to_fetch(client) == BAD_GATEWAY
    assert (len(upstream.requests), waits) == (1, [])


async def test_the_time_of_an_attempt_counts_for_the_deadline(upstream):
    async def answer_late(writer):
        await asyncio.sleep(0.3)
        writer.write(raw(429, b"", "Retry-After: 1\r\n"))

    upstream.script = [answer_late, ok(1)]
    async with external_client(upstream, external_deadline_seconds=1.3) as client:
        assert await fail_to_fetch(client) == BAD_GATEWAY
    assert len(upstream.requests) == 1


async def test_waits_have_full_jitter_and_are_at_most_a_second(waits):
    settings = make_settings(IN_MEMORY, external_attempts=16, breaker_fail_max=1000)
    transport = httpx.MockTransport(lambda request: httpx.Response(503))
    client = service.ExternalClient("test", "http://test/", settings, transport)
    async with client.http:
        for _ in range(40):
            assert await fail_to_fetch(client) == BAD_GATEWAY
    assert len(waits) == 40 * 15
    # The waits are random: once in a thousand million runs, this fails without a reason.
    for retry, limit in enumerate([0.1, 0.2, 0.4, 0.8]):
        seconds = waits[retry::15]
        assert 0 <= min(seconds) < 0.5 * limit < max(seconds) <= limit
    others = [wait for retry, wait in enumerate(waits) if retry % 15 >= 4]
    assert 0 <= min(others) < 0.05 and 0.95 < max(others) <= 1


# ---- external client: many calls, and https --------------------------------------------


async def test_the_retries_of_many_callers_do_not_mix(upstream, waits):
    upstream.script = [raw(500)]
    async with external_client(upstream, breaker_fail_max=1000) as client:
        await asyncio.gather(*[fail_to_fetch(client) for _ in range(20)])
        assert client.circuit.breaker.fail_counter == 60
    assert len(upstream.requests) == 60


async def test_the_stop_closes_the_connections_to_the_external_api(upstream):
    async with serve_with_upstream(upstream) as client:
        await client.get(DATA)
        assert not client.services.external.http.is_closed
    assert client.services.external.http.is_closed


async def test_calls_do_not_wait_for_the_connections_of_others(upstream):
    all_are_here = asyncio.Event()

    async def wait_for_all(writer):
        if len(upstream.requests) == 101:  # httpx itself would let 100 through
            all_are_here.set()
        await all_are_here.wait()
        writer.write(ok(1))

    upstream.script = [wait_for_all]
    settings = {"external_timeout_seconds": 20, "external_deadline_seconds": 20}
    async with external_client(upstream, **settings) as client:
        calls = [client.fetch() for _ in range(101)]
        assert await asyncio.gather(*calls) == [1] * 101


async def test_the_service_answers_others_while_110_calls_hang(upstream):
    gate = asyncio.Event()

    async def wait_for_gate(writer):
        await gate.wait()
        writer.write(ok(1))

    upstream.script = [wait_for_gate]
    settings = {
        "database_timeout_seconds": 60,
        "external_timeout_seconds": 60,
        "external_deadline_seconds": 60,
    }
    async with serve_with_upstream(upstream, **settings) as client:
        calls = [asyncio.ensure_future(client.get(DATA)) for _ in range(110)]
        await wait_until_true(lambda: len(upstream.requests) == 110)
        assert (await client.get(ME)).status_code == 200
        assert not any(call.done() for call in calls)
        gate.set()
        assert {call.status_code for call in await asyncio.gather(*calls)} == {200}


OPENSSL_CONFIG = """\
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:true
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[server]
basicConstraints = CA:false
subjectAltName = IP:127.0.0.1
authorityKeyIdentifier = keyid
"""


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A folder with ca.pem, the authority, and with server.pem, which it has signed."""
    if not shutil.which("openssl"):
        pytest.skip("the command openssl, which makes the certificates, is missing")
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "config").write_text(OPENSSL_CONFIG)
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1"
    new = f"req -config config {key} -nodes"
    sign = "x509 -req -CA ca.pem -CAkey ca.key -set_serial 2 -extfile config"
    for command in (
        f"{new} -x509 -extensions authority -subj /CN=ca -keyout ca.key -out ca.pem",
        f"{new} -subj /CN=server -keyout server.key -out server.csr",
        f"{sign} -extensions server -in server.csr -out server.pem",
    ):
        words = ["openssl", *command.split()]
        subprocess.run(words, cwd=folder, check=True, capture_output=True)
    return folder


class TlsUpstream(Upstream):
    def __init__(self, folder):
        super().__init__()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(folder / "server.pem", folder / "server.key")

    async def __aenter__(self):
        self.server = await asyncio.start_server(
            self.answer, "127.0.0.1", 0, ssl=self.context
        )
        port = self.server.sockets[0].getsockname()[1]
        self.url = f"https://127.0.0.1:{port}/"
        return self


@pytest.fixture
async def tls_upstream(certificates):
    async with TlsUpstream(certificates) as upstream:
        yield upstream


@pytest.mark.process
async def test_an_authority_in_ssl_cert_file_is_trusted(
    tls_upstream, certificates, monkeypatch
):
    monkeypatch.setattr(httpx, "create_ssl_context", CREATE_SSL_CONTEXT)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    async with serve_with_upstream(tls_upstream) as client:
        assert (await client.get(DATA)).json() == {"data": {"n": 1}}


@pytest.mark.process
async def test_an_unknown_authority_is_a_failure_with_its_reason_in_the_log(
    tls_upstream, waits, caplog
):
    async with serve_with_upstream(tls_upstream) as client:
        check_problem(await client.get(DATA), 502, "external_service_error")
        assert (await read_status(client))["failures"] == 3
    assert tls_upstream.requests == []
    assert "external: an attempt failed: ConnectError: " in caplog.text
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text


# ---- the circuit, seen from outside ----------------------------------------------------


@pytest.fixture
def still_clock(monkeypatch):
    """The monotonic clock of the service, which a test sets: `still_clock.now += 60`."""
    clock = mock.Mock(wraps=time, now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(service, "time", clock)
    return clock


async def open_circuit(client, upstream):
    """Let three calls fail. Then the upstream works again, but nobody has noticed."""
    upstream.script = [raw(500)]
    for _ in range(3):
        check_problem(await client.get(DATA), 502, "external_service_error")
    upstream.requests.clear()
    upstream.script = [ok(1)]


async def test_the_circuit_opens_at_exactly_the_last_allowed_failure(guarded, upstream):
    upstream.script = [raw(500)]
    states = []
    for _ in range(3):
        check_problem(await guarded.get(DATA), 502, "external_service_error")
        status = await read_status(guarded)
        states.append((status["failures"], status["state"]))
    assert states == [(1, "closed"), (2, "closed"), (3, "open")]


async def test_failures_count_across_calls(upstream, waits):
    upstream.script = [raw(500)]
    settings = {"external_attempts": 3, "breaker_fail_max": 5}
    async with serve_with_upstream(upstream, **settings) as client:
        for requests in (3, 5):
            check_problem(await client.get(DATA), 502, "external_service_error")
            assert len(upstream.requests) == requests
        check_problem(await client.get(DATA), 503, "circuit_open")
        assert len(upstream.requests) == 5


async def test_a_success_between_failures_keeps_the_circuit_closed(guarded, upstream):
    upstream.script = [raw(500), raw(500), ok(1), raw(500)]
    for _ in range(5):
        await guarded.get(DATA)
    status = await read_status(guarded)
    assert (status["failures"], status["state"]) == (2, "closed")


async def test_an_open_circuit_answers_without_a_call(guarded, upstream, still_clock):
    await open_circuit(guarded, upstream)
    answer = await guarded.get(DATA)
    check_problem(answer, 503, "circuit_open")
    assert (answer.headers["retry-after"], upstream.requests) == ("60", [])


async def test_the_status_tells_all_about_an_open_circuit(
    guarded, upstream, still_clock
):
    closed = {"state": "closed", "failures": 0, "fail_max": 3, "retry_after_seconds": 0}
    assert await read_status(guarded) == closed
    await open_circuit(guarded, upstream)
    opened = {"state": "open", "failures": 3, "fail_max": 3, "retry_after_seconds": 60}
    assert await read_status(guarded) == opened


async def test_a_circuit_that_opens_ends_the_retries_at_once(upstream, waits):
    upstream.script = [raw(500)]
    async with external_client(upstream, breaker_fail_max=2) as client:
        assert await fail_to_fetch(client) == BAD_GATEWAY
    assert (len(upstream.requests), len(waits)) == (2, 1)


async def test_a_circuit_stays_open_until_a_call_probes(guarded, upstream, still_clock):
    await open_circuit(guarded, upstream)
    still_clock.now += 60
    status = await read_status(guarded)
    assert (status["state"], status["retry_after_seconds"]) == ("open", 0)


async def test_a_probe_that_succeeds_closes_the_circuit(guarded, upstream, still_clock):
    await open_circuit(guarded, upstream)
    still_clock.now += 60
    assert (await guarded.get(DATA)).json() == {"data": 1}
    status = await read_status(guarded)
    assert (status["state"], status["failures"]) == ("closed", 0)


async def test_a_probe_that_is_refused_with_4xx_closes_the_circuit(
    guarded, upstream, still_clock
):
    await open_circuit(guarded, upstream)
    still_clock.now += 60
    upstream.script = [raw(404)]
    check_problem(await guarded.get(DATA), 502, "external_service_error")
    assert (await read_status(guarded))["state"] == "closed"


async def test_a_probe_that_fails_opens_the_circuit_for_the_full_time(
    upstream, waits, still_clock
):
    settings = {"breaker_fail_max": 3, "breaker_reset_seconds": 60}
    upstream.script = [raw(500)]
    async with serve_with_upstream(upstream, **settings) as client:
        check_problem(await client.get(DATA), 502, "external_service_error")
        still_clock.now += 90
        check_problem(await client.get(DATA), 502, "external_service_error")
        assert len(upstream.requests) == 4  # the probe is not retried
        status = await read_status(client)
    assert (status["state"], status["retry_after_seconds"]) == ("open", 60)


async def test_a_half_open_circuit_lets_one_of_40_calls_through(upstream, monkeypatch):
    gate = asyncio.Event()

    async def wait_for_gate(writer):
        await gate.wait()
        writer.write(ok(1))

    settings = {"external_timeout_seconds": 20, "external_deadline_seconds": 20}
    settings.update(external_attempts=1, breaker_fail_max=3)
    async with serve_with_upstream(upstream, **settings) as client:
        await open_circuit(client, upstream)
        turn_clock(monkeypatch, 60)
        upstream.script = [wait_for_gate]
        calls = [asyncio.ensure_future(client.get(DATA)) for _ in range(40)]
        await wait_until_true(lambda: sum(call.done() for call in calls) >= 39)
        status = await read_status(client)
        gate.set()
        answers = await asyncio.gather(*calls)
    assert (status["state"], status["retry_after_seconds"]) == ("half-open", 0)
    assert sorted(answer.status_code for answer in answers) == [200] + [503] * 39
    assert {answer.headers.get("retry-after") for answer in answers} == {"1", None}
    assert len(upstream.requests) == 1


async def test_each_change_of_the_circuit_is_logged_once(
    guarded, upstream, still_clock, caplog
):
    await open_circuit(guarded, upstream)
    await guarded.get(DATA)
    still_clock.now += 60
    await guarded.get(DATA)
    await guarded.get(DATA)
    changes = [text for text in caplog.messages if text.startswith("circuit_changed")]
    assert changes == [
        "circuit_changed external open",
        "circuit_changed external half-open",
        "circuit_changed external closed",
    ]


async def test_a_change_of_the_circuit_is_an_event_with_the_id_of_its_request(
    guarded, upstream, caplog, monkeypatch
):
    monkeypatch.setattr(caplog.handler, "formatter", service.JsonFormatter())
    upstream.script = [raw(500)]
    for request_id in ("first", "second", "third"):
        await guarded.get(DATA, headers={"X-Request-ID": request_id})
    entries = [json.loads(line) for line in caplog.text.splitlines()]
    [change] = [entry for entry in entries if entry.get("event") == "circuit_changed"]
    assert (change["level"], change["request_id"]) == ("WARNING", "third")


# ---- the circuit itself ----------------------------------------------------------------


async def end_with(result, gate=None):
    """Return the result, or raise it if it is an error, as soon as the gate is open."""
    if gate:
        await gate.wait()
    if isinstance(result, Exception):
        raise result
    return result


async def begin_call(circuit, result, gate):
    """Begin a call that waits for the gate. Return its task."""
    task = asyncio.ensure_future(circuit.call(end_with, result, gate))
    await asyncio.sleep(0)
    return task


async def fail_call(circuit):
    with pytest.raises(OSError, match="down"):
        await circuit.call(end_with, OSError("down"))


async def lead_circuit(circuit, state, clock):
    """Lead a circuit that two failures open from closed to a state, and wait a little."""
    await fail_call(circuit)
    await fail_call(circuit)
    if state != "open":
        clock.now += 60
        probe = await begin_call(circuit, 1, asyncio.Event())
        probe.cancel()
        await asyncio.wait({probe})
    if state == "closed":
        await circuit.call(end_with, 1)
        await fail_call(circuit)
    clock.now += 10
    assert circuit.state == state


async def expect_circuit_open(circuit):
    with pytest.raises(service.ExternalServiceError) as refused:
        await circuit.call(end_with, 1)
    assert refused.value.code == "circuit_open"


@pytest.mark.parametrize(
    ("elapsed", "seconds_left"),
    [(0, 60), (0.5, 60), (1, 59), (58.999, 2), (59, 1), (59.999, 1)],
)
async def test_an_open_circuit_tells_the_seconds_left_rounded_up(
    still_clock, elapsed, seconds_left
):
    circuit = service.Circuit("test", 1, 60)
    await fail_call(circuit)
    still_clock.now += elapsed
    assert circuit.retry_after_seconds == seconds_left
    with pytest.raises(service.ExternalServiceError) as refused:
        await circuit.call(end_with, 1)
    assert refused.value.headers == {"Retry-After": str(seconds_left)}


@pytest.mark.parametrize("state", ["open", "half-open", "closed"])
@pytest.mark.parametrize("late", ["success", "failure"])
async def test_a_call_from_before_a_change_of_the_state_changes_nothing(
    still_clock, state, late
):
    circuit = service.Circuit("test", 2, 60)
    gate = asyncio.Event()
    result = OSError("late") if late == "failure" else 1
    late_call = await begin_call(circuit, result, gate)
    await lead_circuit(circuit, state, still_clock)
    failures = circuit.breaker.fail_counter
    seconds_left = circuit.retry_after_seconds
    gate.set()
    await asyncio.wait({late_call})
    assert (late_call.exception() or late_call.result()) == result
    assert circuit.state == state
    assert circuit.breaker.fail_counter == failures
    assert circuit.retry_after_seconds == seconds_left


async def test_a_late_call_gives_away_no_second_probe(still_clock):
    circuit = service.Circuit("test", 1, 60)
    gate = asyncio.Event()
    probe_gate = asyncio.Event()
    late_call = await begin_call(circuit, 1, gate)
    await fail_call(circuit)
    still_clock.now += 60
    probe = await begin_call(circuit, 1, probe_gate)
    gate.set()
    assert await late_call == 1
    await expect_circuit_open(circuit)
    probe_gate.set()
    assert await probe == 1
    assert circuit.state == "closed"


async def test_a_cancelled_call_counts_neither_as_failure_nor_as_success():
    circuit = service.Circuit("test", 2, 60)
    await fail_call(circuit)
    call = await begin_call(circuit, 1, asyncio.Event())
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (circuit.state, circuit.breaker.fail_counter) == ("closed", 1)


async def test_a_cancelled_probe_gives_its_place_back(still_clock):
    circuit = service.Circuit("test", 1, 60)
    await fail_call(circuit)
    still_clock.now += 60
    probe = await begin_call(circuit, 1, asyncio.Event())
    await expect_circuit_open(circuit)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    assert circuit.state == "half-open"
    assert await circuit.call(end_with, 1) == 1
    assert circuit.state == "closed"


async def test_a_probe_that_fails_gives_its_place_to_the_next_probe(still_clock):
    circuit = service.Circuit("test", 1, 60)
    await fail_call(circuit)
    for _ in range(2):
        still_clock.now += 60
        await fail_call(circuit)
        await expect_circuit_open(circuit)


@pytest.mark.parametrize("jump", [-(10**6), 10**6], ids=["back", "forward"])
async def test_the_wall_clock_does_not_move_the_circuit(still_clock, jump):
    circuit = service.Circuit("test", 1, 60)
    await fail_call(circuit)
    still_clock.time = lambda: time.time() + jump
    still_clock.now += 59
    await expect_circuit_open(circuit)
    still_clock.now += 1
    assert await circuit.call(end_with, 1) == 1


async def test_an_ignored_exception_passes_on_and_counts_as_a_success():
    circuit = service.Circuit("test", 2, 60, [KeyError])
    await fail_call(circuit)
    with pytest.raises(KeyError):
        await circuit.call(end_with, KeyError())
    assert (circuit.state, circuit.breaker.fail_counter) == ("closed", 0)


# ---- the circuit as a decorator --------------------------------------------------------


async def test_a_decorated_function_gets_its_arguments_and_returns_its_result():
    circuit = service.Circuit("test", 2, 60)

    @circuit
    async def divide(dividend, divisor):
        return dividend / divisor

    assert await divide(6, divisor=3) == 2


def test_a_decorated_function_keeps_its_name_and_its_documentation():
    @service.Circuit("test", 2, 60)
    async def divide():
        """Divide."""

    assert (divide.__name__, divide.__doc__) == ("divide", "Divide.")


async def test_a_method_can_be_decorated():
    class Weather:
        city = "Paris"

        @service.Circuit("test", 2, 60)
        async def tell(self, day):
            return f"{self.city}: sunny on {day}"

    assert await Weather().tell("Monday") == "Paris: sunny on Monday"


async def test_the_failures_of_all_decorated_functions_open_their_circuit():
    circuit = service.Circuit("test", 2, 60)

    async def fail():
        raise OSError("down")

    for function in (circuit(fail), circuit(fail)):
        assert circuit.state == "closed"
        with pytest.raises(OSError, match="down"):
            await function()
    assert circuit.state == "open"


async def test_an_open_circuit_does_not_call_the_decorated_function(still_clock):
    circuit = service.Circuit("test", 1, 60)
    calls = []

    @circuit
    async def note_call():
        calls.append(1)

    await fail_call(circuit)
    with pytest.raises(service.ExternalServiceError) as refused:
        await note_call()
    assert (refused.value.code, calls) == ("circuit_open", [])
    assert refused.value.headers == {"Retry-After": "60"}


async def test_a_bug_in_a_decorated_function_is_a_failure_and_passes_on_unchanged():
    circuit = service.Circuit("test", 2, 60)
    bug = ValueError("a bug")

    @circuit
    async def divide():
        raise bug

    for failures in (1, 2):
        with pytest.raises(ValueError, match="a bug") as caught:
            await divide()
        assert caught.value is bug
        assert circuit.breaker.fail_counter == failures
    assert circuit.state == "open"


# ---- the demo upstream -----------------------------------------------------------------


@pytest.mark.parametrize("environment", ["development", "test"])
async def test_the_demo_upstream_serves_if_no_other_is_set(environment):
    async with serve(IN_MEMORY, environment=environment) as client:
        answer = await client.get(DATA, headers=await sign_in(client))
        assert answer.json() == {"data": {"message": "Hello from the demo upstream."}}


async def test_the_demo_upstream_shows_how_the_circuit_opens_and_closes(
    waits, monkeypatch
):
    async with serve(IN_MEMORY, environment="development") as client:
        client.headers.update(await sign_in(client))
        assert (await client.put(DEMO, json={"failing": True})).status_code == 204
        for _ in range(2):
            check_problem(await client.get(DATA), 502, "external_service_error")
        assert (await read_status(client))["state"] == "open"
        assert (await client.put(DEMO, json={"failing": False})).status_code == 204
        check_problem(await client.get(DATA), 503, "circuit_open")
        turn_clock(monkeypatch, 30)
        assert (await client.get(DATA)).status_code == 200
        assert (await read_status(client))["state"] == "closed"


@pytest.mark.parametrize("value", ["true", 1], ids=["a text", "a number"])
async def test_the_demo_switch_takes_only_true_and_false(value):
    async with serve(IN_MEMORY, environment="development") as client:
        answer = await client.put(DEMO, json={"failing": value})
        check_problem(answer, 422, "invalid_request")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"environment": "test"}, id="test"),
        pytest.param(
            {"environment": "development", "external_api_url": "http://127.0.0.1:1/"},
            id="development with an API",
        ),
        pytest.param(
            {"environment": "production", "external_api_url": "http://127.0.0.1:1/"},
            id="production",
        ),
    ],
)
async def test_the_demo_switch_is_missing_elsewhere(settings):
    async with serve(IN_MEMORY, **settings) as client:
        answer = await client.put(DEMO, json={"failing": True})
        check_problem(answer, 404, "not_found")
        assert DEMO not in (await client.get("/openapi.json")).json()["paths"]


# ---- what a server sees ----------------------------------------------------------------


async def play(app, scope, *messages):
    """Call the app as a server does. Return the messages that it sends."""
    waiting = list(messages)
    sent = []

    async def receive():
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent


async def test_a_client_that_leaves_in_the_middle_of_its_body_gets_408(sqlite):
    app = service.create_app(make_settings(sqlite))
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": LOGIN,
        "query_string": b"",
        "headers": [(b"content-length", b"100")],
    }
    half = {"type": "http.request", "body": b"{", "more_body": True}
    start, body = await play(app, scope, half, {"type": "http.disconnect"})
    assert start["status"] == 408
    assert json.loads(body["body"])["code"] == "request_timeout"


@pytest.fixture
def try_to_start():
    """A function that starts an app in vain, and returns what the server is told."""

    async def try_to_start(app, error):
        sent = []

        async def receive():
            return {"type": "lifespan.startup"}

        async def send(message):
            sent.append(message)

        with pytest.raises(error):
            await app({"type": "lifespan"}, receive, send)
        (failed,) = sent
        assert failed["type"] == "lifespan.startup.failed"
        return failed["message"]

    return try_to_start


async def test_a_database_that_cannot_keep_the_secret_ends_the_start(
    sqlite, monkeypatch, try_to_start
):
    is_locked = service.ServiceError("database_unavailable")
    keep_secret = mock.Mock(side_effect=is_locked)
    monkeypatch.setattr(service.Database, "keep_secret", keep_secret)
    settings = make_settings(sqlite, environment="development", jwt_secret=None)
    message = await try_to_start(service.create_app(settings), service.StartError)
    assert message.startswith("not started: DATABASE_URL: ")
    assert message.endswith("database_unavailable")


async def test_a_file_of_certificates_that_cannot_be_read_ends_the_start(
    memory, monkeypatch, try_to_start
):
    monkeypatch.setattr(httpx, "create_ssl_context", CREATE_SSL_CONTEXT)
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file.pem")
    app = service.create_app(make_settings(memory))
    message = await try_to_start(app, service.StartError)
    assert message.startswith("not started: SSL_CERT_FILE cannot be used: ")
    assert "No such file" in message


async def test_the_server_is_told_in_one_sentence_why_the_start_failed(
    tmp_path, try_to_start
):
    unusable = Store(f"sqlite:///{tmp_path}/no/such/folder.db")
    app = service.create_app(make_settings(unusable))
    message = await try_to_start(app, service.StartError)
    assert message.startswith("not started: DATABASE_URL: cannot use ")
    assert "\n" not in message


async def test_a_second_start_of_an_app_does_not_repeat_the_reason_of_the_first(
    sqlite, monkeypatch, try_to_start
):
    app = service.create_app(make_settings(sqlite))
    for error in (service.StartError("first"), ValueError("second")):
        monkeypatch.setattr(service, "open_services", mock.Mock(side_effect=error))
        message = await try_to_start(app, type(error))
    assert "ValueError: second" in message and "first" not in message


async def test_a_bug_in_the_start_is_told_with_its_traceback(
    sqlite, monkeypatch, try_to_start
):
    monkeypatch.setattr(service, "open_services", mock.Mock(side_effect=ValueError))
    app = service.create_app(make_settings(sqlite))
    assert "Traceback" in await try_to_start(app, ValueError)


def test_a_module_with_a_wrong_setting_ends_the_process_with_status_3(
    monkeypatch, capsys
):
    monkeypatch.setenv("JWT_SECRET", "hunter2")
    path = Path(service.__file__)
    spec = importlib.util.spec_from_file_location("service_again", path)
    with pytest.raises(SystemExit) as end:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert end.value.code == 3
    message = capsys.readouterr().err
    assert message.startswith("service: not started: JWT_SECRET")
    assert message.count("\n") == 1
    assert "hunter2" not in message


@pytest.mark.parametrize("status", [204, 304])
async def test_an_httpexception_whose_status_allows_no_body_has_none(sqlite, status):
    async with serve(sqlite) as client:

        @client.app.get("/learner")
        async def learner():
            raise service.HTTPException(status, headers={"ETag": "1"})

        answer = await client.get("/learner", headers=await sign_in(client))
        assert (answer.status_code, answer.content) == (status, b"")
        assert answer.headers["etag"] == "1"


def overwrite(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"x" * 40_000)


@pytest.mark.parametrize(
    "offset",
    [pytest.param(0, id="another file"), pytest.param(4096, id="a damaged page")],
)
async def test_a_damaged_sqlite_file_is_503(sqlite, offset):
    async with serve(sqlite) as client:
        headers = await sign_in(client)
        await sqlite.sql("PRAGMA wal_checkpoint(TRUNCATE)")
        overwrite(sqlite.path, offset)
        answer = await client.get(ME, headers=headers)
        check_problem(answer, 503, "database_unavailable")


# ---- database --------------------------------------------------------------------------

SCHEMA_TEXT = (FOLDER / "schema.sql").read_text("utf-8")
LAST_MIGRATION = SCHEMA_TEXT.count("\n-- migration ")
NO_SUCH_TABLE = (sqlite3.OperationalError, asyncpg.UndefinedTableError)
BOB = {"email": "bob@example.com", "password": PASSWORD}
ALL_EMAILS = "SELECT email FROM users ORDER BY email"


@pytest.fixture
def extend_schema(monkeypatch, tmp_path):
    """A function that lets the service read schema.sql with more text at its end."""

    def extend(text):
        file = tmp_path / "other.sql"
        file.write_text(f"{SCHEMA_TEXT}\n{text}\n", "utf-8")
        monkeypatch.setattr(service, "SCHEMA", file)

    return extend


def section(number, sql):
    return f"-- migration {number}: part {number}\n{sql}\n"


async def start_and_stop(store, **settings):
    async with serve(store, **settings):
        pass


async def test_a_new_migration_runs_once_and_old_data_stays(store, extend_schema):
    async with serve(store) as client:
        await client.post(REGISTER, json=ADA)
    sql = "CREATE TABLE scrap (t TEXT); -- a ; here\nINSERT INTO scrap VALUES ('a;b:c%d');"
    extend_schema(section(LAST_MIGRATION + 1, sql))
    await start_and_stop(store)
    async with serve(store) as client:
        assert (await client.post(LOGIN, json=ADA)).status_code == 200
    assert await store.sql("SELECT t FROM scrap") == [("a;b:c%d",)]
    marks = await store.sql("SELECT version FROM schema_migrations ORDER BY version")
    assert marks == [(number,) for number in range(1, LAST_MIGRATION + 2)]


async def test_the_log_names_a_migration_that_has_run(store, extend_schema, caplog):
    await start_and_stop(store)
    number = LAST_MIGRATION + 1
    extend_schema(section(number, "CREATE TABLE scrap (t TEXT);"))
    caplog.clear()
    await start_and_stop(store)
    found = [text for text in caplog.messages if "migration" in text]
    assert found == [f"schema.sql: migration {number} has run: part {number}"]


@pytest.mark.parametrize(
    "heading", ["-- migration {}", "--Migration {}: scrap", "--  MIGRATION {}:"]
)
async def test_a_heading_in_another_spelling_begins_a_migration_too(
    sqlite, extend_schema, heading
):
    await start_and_stop(sqlite)
    extend_schema(heading.format(LAST_MIGRATION + 1) + "\nCREATE TABLE scrap (t TEXT);")
    await start_and_stop(sqlite)
    assert await sqlite.sql("SELECT * FROM scrap") == []


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([1, 1], id="duplicate"),
        pytest.param([0], id="the last number again"),
        pytest.param([2], id="gap"),
        pytest.param([2, 1], id="wrong order"),
    ],
)
async def test_migrations_must_be_numbered_without_gaps(sqlite, extend_schema, steps):
    numbers = [LAST_MIGRATION + step for step in steps]
    extend_schema("".join(section(number, "SELECT 1;") for number in numbers))
    found = [*range(1, LAST_MIGRATION + 1), *numbers]
    with pytest.raises(service.StartError, match=re.escape(f"the numbers {found}")):
        await start_and_stop(sqlite)


async def test_a_migration_that_fails_leaves_nothing_and_is_named(store, extend_schema):
    good, bad = LAST_MIGRATION + 1, LAST_MIGRATION + 2
    broken = "CREATE TABLE half (t TEXT); INSERT INTO nowhere VALUES (1);"
    extend_schema(section(good, "CREATE TABLE fine (t TEXT);") + section(bad, broken))
    reason = f"DATABASE_URL: .*migration {bad}: part {bad}: .*nowhere"
    with pytest.raises(service.StartError, match=reason):
        await start_and_stop(store)
    assert await store.sql("SELECT * FROM fine") == []
    with pytest.raises(NO_SUCH_TABLE):
        await store.sql("SELECT * FROM half")


async def test_the_service_starts_again_when_a_migration_is_mended(
    store, extend_schema
):
    number = LAST_MIGRATION + 1
    extend_schema(section(number, "CREATE TABLE scrap (t TEXT); SELEC 1;"))
    with pytest.raises(service.StartError):
        await start_and_stop(store)
    extend_schema(section(number, "CREATE TABLE scrap (t TEXT);"))
    async with serve(store) as client:
        assert await sign_in(client)
    assert await store.sql("SELECT * FROM scrap") == []


async def test_a_migration_that_cannot_be_marked_as_done_leaves_nothing(
    store, extend_schema
):
    await start_and_stop(store)
    # The INSERT that marks it does not fill this column, so it fails.
    await store.sql("ALTER TABLE schema_migrations RENAME COLUMN version TO old")
    await store.sql("ALTER TABLE schema_migrations ADD COLUMN version BIGINT")
    await store.sql("UPDATE schema_migrations SET version = old")
    extend_schema(section(LAST_MIGRATION + 1, "CREATE TABLE half (t TEXT);"))
    with pytest.raises(service.StartError):
        await start_and_stop(store)
    with pytest.raises(NO_SUCH_TABLE):
        await store.sql("SELECT * FROM half")


async def test_many_that_start_at_once_on_an_empty_database_agree(store):
    development = {"environment": "development", "jwt_secret": None}

    async def start_and_sign_in(number):
        async with serve(store, **development) as client:
            return await sign_in(client, email=f"{number}@example.com")

    sessions = await asyncio.gather(*[start_and_sign_in(number) for number in range(8)])
    async with serve(store, **development) as client:
        answers = [await client.get(ME, headers=headers) for headers in sessions]
    assert [answer.status_code for answer in answers] == [200] * 8
    marks = await store.sql("SELECT COUNT(*) FROM schema_migrations")
    assert marks == [(LAST_MIGRATION,)]


async def test_the_lifespan_passes_through_the_middleware(sqlite):
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message["type"])

    app = service.create_app(make_settings(sqlite))
    await app({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_fetch_all_returns_every_row_as_an_object(client):
    for email in ("ada@example.com", "bob@example.com", "eve@example.com"):
        await client.post(REGISTER, json={**ADA, "email": email})
    sql = """
        SELECT id AS user_id, password_hash, token_version FROM users
        WHERE email <> $1 AND token_version < $2 ORDER BY email"""
    db = client.services.db
    logins = await db.fetch_all(service.Login, sql, "bob@example.com", 1)
    found = [await db.find_login(f"{name}@example.com") for name in ("ada", "eve")]
    assert logins == found and isinstance(logins[0], service.Login)


async def test_a_read_that_others_overlap_still_sees_what_was_written_before_it(sqlite):
    async with serve(sqlite) as client:
        for account in (ADA, BOB):
            await client.post(REGISTER, json=account)
        async with client.services.db.reader() as connection:
            reading = service.read_rows(connection, "SELECT id FROM users", [])
            other = asyncio.create_task(reading)
            await asyncio.sleep(0)
            time.sleep(0.2)  # noqa: ASYNC251 (only the thread of SQLite goes on)
            await sqlite.sql("UPDATE users SET token_version = 7")
            sql = "SELECT token_version FROM users"
            rows = await service.read_rows(connection, sql, [])
            await other
    assert rows == [{"token_version": 7}] * 2


async def test_fetch_all_returns_an_empty_list_if_there_are_no_rows(client):
    rows = await client.services.db.fetch_all(service.AnyRow, "SELECT id FROM users")
    assert rows == []


async def test_constraints_on_references_hold_on_both_databases(store, extend_schema):
    tables = """
        CREATE TABLE owner (id TEXT PRIMARY KEY);
        INSERT INTO owner VALUES ('a');
        CREATE TABLE owned (id TEXT REFERENCES owner (id));"""
    extend_schema(section(LAST_MIGRATION + 1, tables))
    sql = "INSERT INTO owned (id) VALUES (:id) RETURNING id"
    async with serve(store) as client:
        db = client.services.db
        assert await db.write(service.AnyRow, sql, id="a") == {"id": "a"}
        with pytest.raises(service.SqlError):
            await db.write(service.AnyRow, sql, id="nobody")


@pytest.mark.parametrize(
    ("method", "sql"),
    [
        pytest.param("fetch_one", "SELEC id FROM users WHERE id = $1", id="syntax"),
        pytest.param(
            "fetch_all", "SELECT no FROM users WHERE id = $1", id="unknown column"
        ),
        pytest.param(
            "fetch_one", "SELECT id FROM no WHERE id = $1", id="unknown table"
        ),
        pytest.param(
            "write",
            "INSERT INTO users (id) VALUES (:value) RETURNING id",
            id="violated constraint",
        ),
    ],
)
async def test_a_mistake_in_sql_is_an_error_that_quotes_no_value(client, method, sql):
    # The value is on a line that the traceback does not show.
    values = {"value": "sekret"}
    run = getattr(client.services.db, method)
    with pytest.raises(service.SqlError) as caught:
        if method == "write":
            await run(service.AnyRow, sql, **values)
        else:
            await run(service.AnyRow, sql, *values.values())
    error = (caught.type, caught.value, caught.tb)
    text = logging.Formatter().formatException(error)
    assert "Error: " in str(caught.value) and "sekret" not in text


@pytest.mark.parametrize(
    "sql",
    [
        pytest.param("SELECT 1 WHERE 1 = CAST($1 AS BIGINT)", id="type"),
        pytest.param("SELECT 1 WHERE 1 = CAST(CAST($1 AS TEXT) AS BIGINT)", id="cast"),
    ],
)
async def test_a_value_of_the_wrong_type_is_a_mistake_in_sql_for_postgresql(
    postgres, sql
):
    value = "sekret"  # on a line that the traceback does not show
    async with serve(postgres) as client:
        with pytest.raises(service.SqlError) as caught:
            await client.services.db.fetch_all(service.AnyRow, sql, value)
    error = (caught.type, caught.value, caught.tb)
    assert "sekret" not in logging.Formatter().formatException(error)


async def test_a_violated_constraint_is_a_500_whose_log_quotes_no_row(
    client, store, caplog
):
    await client.post(REGISTER, json=ADA)
    await store.sql("CREATE UNIQUE INDEX one_for_all ON users (substr(email, 4))")
    check_problem(await client.post(REGISTER, json=BOB), 500, "internal_error")
    assert caplog.text.count("Traceback") == 1 and "SqlError" in caplog.text
    assert "@example.com" not in caplog.text and "$2b$" not in caplog.text


async def test_a_missing_column_is_a_500_for_the_token_too(
    client, headers, store, caplog
):
    await store.sql("ALTER TABLE users RENAME COLUMN created_at TO made_at")
    check_problem(await client.get(ME, headers=headers), 500, "internal_error")
    assert caplog.text.count("Traceback") == 1 and "SqlError" in caplog.text
    assert "database_unavailable" not in caplog.text


async def test_a_traceback_after_a_failed_statement_does_not_show_the_drivers_text(
    client,
):
    async def fail(connection):
        raise asyncpg.PostgresError("Failing row contains (sekret)")

    db = client.services.db
    with pytest.raises(ZeroDivisionError) as caught:
        try:
            await db.run(db.reader, fail)
        except service.ServiceError:
            raise ZeroDivisionError  # a bug in a route: its traceback is logged
    error = (caught.type, caught.value, caught.tb)
    text = logging.Formatter().formatException(error)
    assert "database_unavailable" in text and "sekret" not in text


async def test_requests_at_the_same_time_each_get_their_own_user(client):
    emails = [f"user{number}@example.com" for number in range(6)] * 4
    sessions = [await sign_in(client, email=email) for email in emails[:6]] * 4
    gets = [client.get(ME, headers=headers) for headers in sessions]
    answers = await asyncio.gather(*gets)
    assert [answer.json()["email"] for answer in answers] == emails


async def test_the_statements_of_a_session_search_by_index(sqlite):
    statements = []
    async with serve(sqlite) as client:
        for borrow in (client.services.db.reader, client.services.db.writer):
            async with borrow() as connection:
                await connection.raw_connection.set_trace_callback(statements.append)
        headers = await sign_in(client)
        await client.post(LOGOUT, headers=headers)
    plans = []
    for statement in statements:
        # Up to Python 3.10, the trace shows ?, ?1 or $1 in the place of a value.
        some_values = re.sub(r"'[^']*'|\?\d*|\$\d", "'a'", statement)
        rows = await sqlite.sql(f"EXPLAIN QUERY PLAN {some_values}")
        plans += [row[3] for row in rows]
    assert len(plans) >= 5
    assert [plan for plan in plans if " USING INDEX " not in plan] == []


async def test_a_database_in_memory_works_and_is_gone_with_the_service(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        async with serve(Store("sqlite:///:memory:")) as client:
            answer = await client.post(REGISTER, json=ADA)
            assert answer.status_code == 201  # the second time, too
            headers = await sign_in(client)
            gets = [client.get(ME, headers=headers) for _ in range(20)]
            answers = await asyncio.gather(*gets)
            assert {answer.status_code for answer in answers} == {200}
    assert list(tmp_path.iterdir()) == []


async def test_only_its_owner_may_read_the_sqlite_file(sqlite):
    old_mask = os.umask(0)  # the file must not depend on the mask of the process
    try:
        async with serve(sqlite) as client:
            await client.post(REGISTER, json=ADA)
            files = list(Path(sqlite.path).parent.glob("service.db*"))
            modes = {stat.S_IMODE(file.stat().st_mode) for file in files}
    finally:
        os.umask(old_mask)
    assert len(files) == 3 and modes == {0o600}  # two of them are SQLite's own


async def test_sqlite_survives_a_power_cut(sqlite):
    async with serve(sqlite) as client, client.services.db.writer() as connection:
        synchronous = await connection.fetch_one("PRAGMA synchronous")
        journal = await connection.fetch_one("PRAGMA journal_mode")
    assert (synchronous[0], journal[0]) == (2, "wal")  # 2 is FULL


async def test_while_another_process_locks_sqlite_reads_go_on(sqlite):
    async with serve(sqlite, database_timeout_seconds=5) as client:
        headers = await sign_in(client)
        with contextlib.closing(sqlite3.connect(sqlite.path)) as other:
            other.isolation_level = None
            other.execute("BEGIN EXCLUSIVE")
            write = asyncio.create_task(client.post(REGISTER, json=BOB))
            answers = [await client.get(ME, headers=headers) for _ in range(5)]
            assert [answer.status_code for answer in answers] == [200] * 5
            assert not write.done()
            other.execute("ROLLBACK")
        assert (await write).status_code == 201


async def test_while_another_process_locks_sqlite_writes_are_503_in_time(sqlite):
    async with serve(sqlite, database_timeout_seconds=0.4) as client:
        await client.post(REGISTER, json=ADA)
        with contextlib.closing(sqlite3.connect(sqlite.path)) as other:
            other.isolation_level = None
            other.execute("BEGIN EXCLUSIVE")
            begin = time.monotonic()
            writes = [client.post(REGISTER, json=BOB) for _ in range(10)]
            answers = await asyncio.gather(*writes)
            seconds = time.monotonic() - begin
            for answer in answers:
                check_problem(answer, 503, "database_unavailable")
            assert seconds < 2.5  # one after another would take four
            async with client.services.db.writer():  # no statement is running any more
                assert time.monotonic() - begin < 10
                other.execute("ROLLBACK")
        assert await sqlite.sql(ALL_EMAILS) == [(EMAIL,)]


COUNT_FOR_SECONDS = """
    WITH RECURSIVE numbers(n) AS
        (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 100000000)
    SELECT COUNT(*) AS total FROM numbers"""


@pytest.mark.parametrize("method", ["fetch_all", "write"])
async def test_sqlite_ends_a_statement_that_takes_too_long(sqlite, method):
    async with serve(sqlite) as client:
        db = client.services.db
        db.timeout = 0.1
        with pytest.raises(service.ServiceError, match="database_unavailable"):
            await getattr(db, method)(service.AnyRow, COUNT_FOR_SECONDS)
        db.timeout = 5
        assert (await client.post(REGISTER, json=ADA)).status_code == 201
        assert (await client.get("/health/ready")).status_code == 200


async def test_a_statement_that_sqlite_interrupts_is_no_mistake_in_sql(sqlite):
    async with serve(sqlite) as client:
        db = client.services.db
        async with db.reader() as connection:
            raw_connection = connection.raw_connection
        task = asyncio.create_task(db.fetch_all(service.AnyRow, COUNT_FOR_SECONDS))
        while not task.done():
            await asyncio.sleep(0.01)
            await raw_connection.interrupt()
        with pytest.raises(service.ServiceError, match="database_unavailable"):
            await task


async def test_a_lock_that_sqlite_reports_at_once_is_503_and_heals(sqlite):
    async with serve(sqlite) as client:
        async with client.services.db.writer() as connection:
            await connection.fetch_one("PRAGMA busy_timeout = 0")
        with contextlib.closing(sqlite3.connect(sqlite.path)) as other:
            other.isolation_level = None
            other.execute("BEGIN EXCLUSIVE")
            answer = await client.post(REGISTER, json=ADA)
            check_problem(answer, 503, "database_unavailable")
            other.execute("ROLLBACK")
        assert (await client.post(REGISTER, json=ADA)).status_code == 201


@pytest.mark.parametrize(
    ("sick", "well"),
    [
        pytest.param("max_page_count = 1", "max_page_count = 1000000", id="full"),
        pytest.param("query_only = ON", "query_only = OFF", id="read-only"),
    ],
)
async def test_a_sqlite_that_takes_no_writes_is_503_and_heals(
    sqlite, caplog, sick, well
):
    async with serve(sqlite) as client:
        async with client.services.db.writer() as connection:
            await connection.fetch_one(f"PRAGMA {sick}")
        accounts = [{**ADA, "email": f"{n}@{'x' * 60}.com"} for n in range(60)]
        answers = [await client.post(REGISTER, json=account) for account in accounts]
        check_problem(answers[-1], 503, "database_unavailable")
        assert {answer.status_code for answer in answers} <= {201, 503}
        async with client.services.db.writer() as connection:
            await connection.fetch_one(f"PRAGMA {well}")
        assert (await client.post(REGISTER, json=accounts[-1])).status_code == 201
    assert "database_unavailable: OperationalError" in caplog.text


async def test_postgresql_waits_for_a_lock_no_longer_than_the_setting_says(postgres):
    async with serve(postgres, database_timeout_seconds=2.5) as client:
        sql = "SELECT current_setting('lock_timeout') AS lock_timeout"
        row = await client.services.db.fetch_one(service.AnyRow, sql)
    assert row == {"lock_timeout": "2500ms"}


async def test_a_read_that_waits_too_long_for_a_connection_is_503(postgres, caplog):
    async with serve(Store(f"{postgres.url}?max_size=1")) as client:
        db = client.services.db
        db.timeout = 0.05
        async with db.reader():
            answer = await asyncio.wait_for(client.get("/health/ready"), 10)
            check_problem(answer, 503, "database_unavailable")
        db.timeout = 5
        assert (await client.get("/health/ready")).status_code == 200
    assert "database_unavailable: TimeoutError" in caplog.text


async def test_a_write_that_timed_out_before_its_turn_is_not_made_later(store):
    only_one = "?max_size=1" if store.url.startswith("postgresql") else ""
    async with serve(Store(store.url + only_one)) as client:
        db = client.services.db
        db.timeout = 0.05
        async with db.writer():
            post = client.post(REGISTER, json=ADA)
            answer = await asyncio.wait_for(post, 10)
            check_problem(answer, 503, "database_unavailable")
        db.timeout = 5
        await client.post(REGISTER, json=BOB)  # Ada's turn would be before Bob's
    assert await store.sql(ALL_EMAILS) == [("bob@example.com",)]


@pytest.mark.parametrize("text", ["disk I/O error", "locking protocol"])
async def test_an_error_of_sqlite_that_no_test_can_cause_is_a_503(sqlite_client, text):
    async def fail(connection):
        raise sqlite3.OperationalError(text)

    db = sqlite_client.services.db
    with pytest.raises(service.ServiceError, match="database_unavailable"):
        await db.run(db.reader, fail)


async def test_a_statement_that_timed_out_is_not_logged_when_it_fails_later(
    client, caplog
):
    complaints = []
    may_fail = asyncio.Event()

    async def fail_late(connection):
        await may_fail.wait()
        raise sqlite3.OperationalError("sekret")

    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    others = asyncio.all_tasks()
    db = client.services.db
    db.timeout = 0.01
    with pytest.raises(service.ServiceError, match="database_unavailable"):
        await db.run(db.reader, fail_late)
    may_fail.set()
    await asyncio.wait(asyncio.all_tasks() - others)
    gc.collect()  # asyncio complains when it deletes the task
    await asyncio.sleep(0)
    loop.set_exception_handler(handler)
    assert complaints == [] and "TimeoutError" in caplog.text
    assert "sekret" not in caplog.text and "Traceback" not in caplog.text


JUNK = b"this is not a database, but a text of some length" * 99


@pytest.mark.parametrize(
    ("url", "place"),
    [
        pytest.param("sqlite:///{0}/no/folder.db", "no/folder.db", id="no folder"),
        pytest.param("sqlite:///{0}", "{0}", id="a folder"),
        pytest.param("sqlite:///{0}/junk.db", "junk.db", id="not a database"),
        pytest.param(
            "postgresql://u:hunter2@127.0.0.1:{1}/db",
            "127.0.0.1:{1}/db",
            id="no server",
        ),
    ],
)
async def test_a_database_that_cannot_be_used_is_named_without_its_password(
    tmp_path, unused_port, url, place
):
    (tmp_path / "junk.db").write_bytes(JUNK)
    others = threading.enumerate()
    with pytest.raises(service.StartError, match="DATABASE_URL") as caught:
        await start_and_stop(Store(url.format(tmp_path, unused_port)))
    for thread in threading.enumerate():
        # A thread of aiosqlite is about to end. It still needs the event loop.
        if thread not in others and not thread.daemon:
            thread.join(10)
    assert place.format(tmp_path, unused_port) in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert (tmp_path / "junk.db").read_bytes() == JUNK


async def test_a_postgresql_without_the_database_is_named_with_the_reason(postgres):
    missing = Store(f"{postgres.url}_missing")
    with pytest.raises(service.StartError, match="127.0.0.1.*_missing.*does not exist"):
        await start_and_stop(missing)


async def test_a_postgresql_that_never_answers_ends_the_start_in_time(upstream):
    upstream.script = [hang]
    address = upstream.url.replace("http://", "postgresql://u:hunter2@")
    begin = time.monotonic()
    with pytest.raises(service.StartError, match="no answer in time"):
        await start_and_stop(Store(f"{address}db"), database_timeout_seconds=0.3)
    assert time.monotonic() - begin < 5


async def test_the_database_of_another_application_stays_as_it_is(sqlite):
    await sqlite.sql("CREATE TABLE users (name TEXT)")
    reason = "migration 1: users: table users already exists"
    with pytest.raises(service.StartError, match=reason):
        await start_and_stop(sqlite)
    assert await sqlite.sql("PRAGMA journal_mode") == [("delete",)]
    assert await sqlite.sql("SELECT * FROM users") == []


def database_name(postgres):
    return postgres.url.rpartition("/")[2]


async def find_backends(postgres):
    """Return the ids of the PostgreSQL processes that serve the service."""
    rows = await Store(POSTGRES_URL).sql(f"""
        SELECT pid FROM pg_stat_activity
        WHERE datname = '{database_name(postgres)}' AND backend_type = 'client backend'
        """)
    return [pid for (pid,) in rows]


async def end_backends(postgres):
    for pid in await find_backends(postgres):
        await Store(POSTGRES_URL).sql(f"SELECT pg_terminate_backend({pid})")
    deadline = time.monotonic() + 10
    while await find_backends(postgres) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)


@contextlib.contextmanager
def frozen(pids):
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


async def test_a_locked_table_of_postgresql_is_503_in_time_and_heals(postgres):
    async with serve(postgres, database_timeout_seconds=0.5) as client:
        headers = await sign_in(client)
        other = await asyncpg.connect(postgres.url)
        await other.execute("BEGIN; LOCK TABLE users")
        begin = time.monotonic()
        gets = [client.get(ME, headers=headers) for _ in range(8)]
        for answer in await asyncio.gather(*gets):
            check_problem(answer, 503, "database_unavailable")
        assert time.monotonic() - begin < 3  # one after another would take four
        await other.execute("ROLLBACK")
        await other.close()
        assert (await client.get(ME, headers=headers)).status_code == 200


async def test_a_write_that_waited_for_a_lock_of_postgresql_is_not_made_later(postgres):
    only_one = Store(f"{postgres.url}?max_size=1")
    async with serve(only_one, database_timeout_seconds=0.5) as client:
        await client.post(REGISTER, json=BOB)  # now PostgreSQL knows the statement
        other = await asyncpg.connect(postgres.url)
        await other.execute("BEGIN; LOCK TABLE users")
        answer = await client.post(REGISTER, json=ADA)
        check_problem(answer, 503, "database_unavailable")
        waiting = """
            SELECT COUNT(*) FROM pg_locks
            WHERE NOT granted AND relation = CAST('users' AS regclass)"""
        deadline = time.monotonic() + 10
        while await other.fetchval(waiting) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await other.execute("ROLLBACK")
        await other.close()
        eve = {**ADA, "email": "eve@example.com"}
        with anyio.fail_after(10):  # a slow machine may need a second try
            while (await client.post(REGISTER, json=eve)).status_code == 503:
                pass
    emails = await postgres.sql(ALL_EMAILS)
    assert emails == [("bob@example.com",), ("eve@example.com",)]


async def test_a_migration_that_cannot_get_its_lock_ends_the_start_in_time(postgres):
    await start_and_stop(postgres)
    other = await asyncpg.connect(postgres.url)
    await other.execute("BEGIN; LOCK TABLE schema_migrations")
    begin = time.monotonic()
    with pytest.raises(service.StartError, match="DATABASE_URL"):
        await start_and_stop(postgres, database_timeout_seconds=0.5)
    assert time.monotonic() - begin < 5
    await other.close()


@needs_local_postgres
async def test_a_frozen_process_of_postgresql_is_503_and_then_replaced(postgres):
    only_one = Store(f"{postgres.url}?max_size=1")
    async with serve(only_one, database_timeout_seconds=0.5) as client:
        headers = await sign_in(client)
        with frozen(await find_backends(postgres)):
            get = client.get(ME, headers=headers)
            check_problem(await asyncio.wait_for(get, 10), 503, "database_unavailable")
            get = client.get(ME, headers=headers)
            assert (await asyncio.wait_for(get, 10)).status_code == 200


@needs_local_postgres
async def test_a_postgresql_that_freezes_during_the_migration_ends_the_start(postgres):
    await start_and_stop(postgres)
    other = await asyncpg.connect(postgres.url)
    await other.execute("BEGIN; LOCK TABLE schema_migrations")
    start = asyncio.create_task(start_and_stop(postgres, database_timeout_seconds=1))
    sql = """
        SELECT pid FROM pg_locks
        WHERE NOT granted AND relation = CAST('schema_migrations' AS regclass)"""
    pids = []
    while not pids and not start.done():
        pids = [row["pid"] for row in await other.fetch(sql)]
    with frozen(pids):
        await asyncio.wait({start}, timeout=10)
        assert pids and start.done()
    with pytest.raises(service.StartError, match="no answer in time"):
        await start
    await other.close()


@needs_local_postgres
async def test_a_frozen_postgresql_does_not_hold_up_the_stop(postgres):
    is_ready = asyncio.Event()
    may_stop = asyncio.Event()

    async def run():
        async with serve(postgres, database_timeout_seconds=0.5) as client:
            await sign_in(client)
            is_ready.set()
            await may_stop.wait()

    service_task = asyncio.create_task(run())
    await is_ready.wait()
    pids = await find_backends(postgres)
    with frozen(pids):
        may_stop.set()
        await asyncio.wait_for(service_task, 10)
    assert pids


async def test_connections_that_postgresql_closes_are_replaced(postgres):
    async with serve(postgres) as client:
        headers = await sign_in(client)
        await end_backends(postgres)
        answers = [await client.get(ME, headers=headers) for _ in range(3)]
    statuses = [answer.status_code for answer in answers]
    assert statuses[0] in (200, 503) and statuses[1:] == [200, 200]


async def test_a_postgresql_that_refuses_connections_is_503_and_heals(postgres):
    allow = f"ALTER DATABASE {database_name(postgres)} ALLOW_CONNECTIONS"
    async with serve(postgres) as client:
        await Store(POSTGRES_URL).sql(f"{allow} false")
        await end_backends(postgres)
        for _ in range(2):
            answer = await client.get("/health/ready")
            check_problem(answer, 503, "database_unavailable")
        assert (await client.get("/health/live")).status_code == 200
        await Store(POSTGRES_URL).sql(f"{allow} true")
        assert (await client.get("/health/ready")).status_code == 200


async def test_after_a_failover_one_write_is_503_and_the_next_ones_work(postgres):
    alter = f"ALTER DATABASE {database_name(postgres)}"
    async with serve(postgres) as client:
        await Store(POSTGRES_URL).sql(f"{alter} SET default_transaction_read_only = on")
        await end_backends(postgres)  # so that all connections are read-only
        await client.get("/health/ready")  # notices that the connections are closed
        slow = "SELECT 1 AS one FROM pg_sleep(0.3)"
        db = client.services.db
        await asyncio.gather(*[db.fetch_all(service.AnyRow, slow) for _ in range(4)])
        await Store(POSTGRES_URL).sql(f"{alter} RESET default_transaction_read_only")
        assert len(await find_backends(postgres)) == 4
        answer = await client.post(REGISTER, json=ADA)
        check_problem(answer, 503, "database_unavailable")
        # These writes take time, so each of them needs a connection of its own.
        slow_write = """
            INSERT INTO secrets (name, value)
            SELECT :name, 'x' FROM pg_sleep(0.3) RETURNING name"""
        writes = [db.write(service.AnyRow, slow_write, name=str(n)) for n in range(4)]
        assert len(await asyncio.gather(*writes)) == 4
        assert (await client.post(REGISTER, json=ADA)).status_code == 201


async def test_a_connection_that_has_just_been_given_back_can_be_discarded(postgres):
    async with serve(postgres) as client:
        db = client.services.db
        async with db.reader() as connection:
            raw_connection = connection.raw_connection
        given_back = types.SimpleNamespace(raw_connection=raw_connection)
        await db.discard(given_back)  # the pool has it, and `connection` does not know
        await db.discard(connection)
        assert (await client.get("/health/ready")).status_code == 200


# ---- the process -----------------------------------------------------------------------

WRONG_PASSWORD = "wr0ng-one"
NEW_PASSWORD = "n3w password"
STATUSES_AFTER_SIGTERM = (0, -signal.SIGTERM, 128 + signal.SIGTERM)


def walk(server):
    """Use everything once. Return the token, and the number of requests."""
    answers = []

    def ask(call, status, code=None, **options):
        answer = server.ask(*call.split(), **options)
        answers.append(answer)
        assert answer.status_code == status, answer.text
        if code is not None:
            check_problem(answer, status, code)
        return answer

    wrong = {**ADA, "password": WRONG_PASSWORD}
    change = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
    ask(f"POST {REGISTER}", 201, json=ADA)
    ask(f"POST {REGISTER}", 409, "email_taken", json=ADA)
    ask(f"POST {LOGIN}", 401, "invalid_credentials", json=wrong)
    token = ask(f"POST {LOGIN}", 200, json=ADA).json()["access_token"]
    headers = {"Authorization": f"Bearer {token}"}
    ask(f"GET {ME}", 200, headers=headers)
    ask(f"GET {ME}", 401, "not_authenticated")
    ask(f"GET {DATA}", 200, headers=headers)
    ask(f"PUT {DEMO}", 204, json={"failing": True})
    ask(f"GET {DATA}", 502, "external_service_error", headers=headers)
    ask(f"GET {DATA}", 503, "circuit_open", headers=headers)
    ask(f"GET {STATUS}", 200, headers=headers)
    ask(f"PUT {CHANGE}", 204, json=change, headers=headers)
    ask(f"GET {ME}", 401, "invalid_token", headers=headers)
    return token, len(answers)


@pytest.mark.process
async def test_a_walk_on_a_real_server_leaves_no_secret_in_its_log(store, tmp_path):
    folder = tmp_path / "with a space"
    folder.mkdir()
    settings = {"DATABASE_URL": store.url, "LOG_LEVEL": "DEBUG"}

    def run():
        with Server(folder, BREAKER_FAIL_MAX="3", **settings) as server:
            token, requests = walk(server)
            assert server.stop() in STATUSES_AFTER_SIGTERM
            return token, requests, server.log.read_text()

    token, requests, log = await asyncio.to_thread(run)
    [(jwt_secret,)] = await store.sql("SELECT value FROM secrets")
    for secret in (EMAIL, PASSWORD, WRONG_PASSWORD, NEW_PASSWORD, "$2b$", jwt_secret):
        assert secret not in log
    for part in token.split("."):
        assert part not in log
    check_records(log, requests + 1)  # one more, to see that the server has started


def check_records(log, requests):
    """Each line is JSON, no record is there twice, and each request has one."""
    lines = log.splitlines()
    records = [json.loads(line) for line in lines]
    assert len(set(lines)) == len(lines)
    assert len([record for record in records if "duration_ms" in record]) == requests
    # Each record has its path twice, in the message and in a field.
    assert len(re.findall("/(?:api|demo|health)/", log)) == 2 * requests
    assert "Shutting down" in [record["message"] for record in records]


@pytest.mark.process("killed")
def test_an_account_that_was_acknowledged_survives_kill_9(early_servers):
    stored = []
    has_many = threading.Event()

    def register_until_the_server_dies():
        with contextlib.suppress(httpx.TransportError):
            while True:
                email = f"user{len(stored)}@example.com"
                answer = server.ask("POST", REGISTER, json={**ADA, "email": email})
                assert answer.status_code == 201
                stored.append(email)
                if len(stored) > 20:
                    has_many.set()

    with early_servers.get("killed") as server:
        thread = threading.Thread(target=register_until_the_server_dies)
        thread.start()
        assert has_many.wait(60)
        server.process.kill()
        thread.join()
    with contextlib.closing(sqlite3.connect(server.folder / "service.db")) as db:
        found = [email for (email,) in db.execute("SELECT email FROM users")]
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert set(stored) <= set(found) and len(found) <= len(stored) + 1


def fill_log(server):
    """Make the server log more than a pipe holds (64 KiB). Return the paths."""
    paths = [f"/{number:02}{'x' * 5000}" for number in range(40)]
    for path in paths:
        assert server.ask("GET", path).status_code == 404
    return paths


def receive_all(connection):
    parts = []
    while True:
        part = connection.recv(65536)
        if not part:
            return b"".join(parts)
        parts.append(part)


def raw_request(method, path, body, length=None, headers=""):
    """The bytes of a request. `length` is what Content-Length says."""
    length = len(body) if length is None else length
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
    return f"{head}Content-Type: application/json\r\n{headers}\r\n".encode() + body


@pytest.fixture(scope="session")
def stopped_server(early_servers):
    """Stop a server at a bad moment, and keep what it did then.

    One client waits for a slow answer, and one has sent half of its request. The log goes
    to a pipe that does not block. It is full, because nobody has read it so far.
    """
    server = early_servers.get("hasty")
    place = ("127.0.0.1", server.port)
    stopped = types.SimpleNamespace()
    with server, contextlib.ExitStack() as stack:
        stopped.paths = fill_log(server)
        slow = stack.enter_context(socket.create_connection(place, 60))
        half = stack.enter_context(socket.create_connection(place, 60))
        slow.sendall(raw_request("POST", REGISTER, json.dumps(ADA).encode()))
        half.sendall(raw_request("POST", REGISTER, b"{", length=99))
        server.ask("GET", "/health/live")  # after its answer, both requests have begun
        server.process.send_signal(signal.SIGTERM)
        stopped.slow_answer = receive_all(slow)
        stopped.half_answer = receive_all(half)
        journal = (
            server.folder / "service.db-wal"
        )  # is gone when the database is closed
        while journal.exists() and server.process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.2)  # even now, nobody reads the log
        stopped.lines = server.pipe.read().decode().splitlines()
        stopped.status = server.process.wait(60)
    return stopped


@pytest.mark.process("hasty")
def test_sigterm_answers_a_request_that_has_begun(stopped_server):
    assert stopped_server.slow_answer.startswith(b"HTTP/1.1 201 ")
    assert stopped_server.status in STATUSES_AFTER_SIGTERM


@pytest.mark.process("hasty")
def test_half_a_request_does_not_keep_a_stopping_server_alive(stopped_server):
    assert (
        service.BODY_SECONDS == 5
    )  # the server of this test waits for half a second only
    assert stopped_server.half_answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.process("hasty")
def test_lines_that_wait_at_the_stop_are_written_whole(stopped_server):
    records = [json.loads(line) for line in stopped_server.lines]
    paths = [record.get("path", "") for record in records]
    assert [path for path in paths if "xxx" in path] == stopped_server.paths


@pytest.mark.process("unread")
def test_a_log_that_nobody_reads_stalls_neither_the_service_nor_its_exit(early_servers):
    with early_servers.get("unread") as server:
        fill_log(server)
        assert server.stop() in STATUSES_AFTER_SIGTERM


@pytest.mark.process("shared")
@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_a_request_that_asks_for_an_upgrade_is_answered_as_plain_http(server, protocol):
    headers = {"Connection": "Upgrade", "Upgrade": protocol, "X-Request-ID": "my-id"}
    headers["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    headers["Sec-WebSocket-Version"] = "13"
    answer = server.ask("POST", f"{REGISTER}?token=sekret", json=ADA, headers=headers)
    hint = ""
    if importlib.util.find_spec("websockets") or importlib.util.find_spec("wsproto"):
        hint = "uvicorn uses the WebSocket library that is installed: see README.md"
    assert answer.status_code == 422, hint
    assert check_problem(answer, 422, "invalid_request")["request_id"] == "my-id"
    answer = server.ask("GET", "/health/live", headers=headers)
    assert answer.status_code == 200
    log = server.log.read_text()
    assert "sekret" not in log and "Traceback" not in log


@pytest.mark.process("shared")
@pytest.mark.parametrize(
    ("line", "upgrade"),
    [
        pytest.param(f"POST {LOGIN} HTTP/1.1", "websocket", id="websocket"),
        pytest.param(f"POST {LOGIN} HTTP/1.1", "h2c", id="h2c"),
        pytest.param(f"POST {LOGIN} HTTP/1.0", "anything", id="HTTP 1.0"),
        pytest.param(f"POST {LOGIN} HTTP/2.0", "h2c", id="HTTP 2.0 as text"),
        pytest.param("CONNECT /health/live HTTP/1.1", "", id="CONNECT"),
    ],
)
def test_the_body_of_an_upgrade_is_not_taken_for_another_request(server, line, upgrade):
    hidden = raw_request("GET", "/smuggled", b"")
    head = f"{line}\r\nHost: x\r\nContent-Length: {len(hidden)}\r\n"
    if upgrade:
        head += f"Connection: keep-alive, Upgrade\r\nUpgrade: {upgrade}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 15) as connection:
        connection.sendall(f"{head}\r\n".encode())
        answer = connection.recv(65536)
        with contextlib.suppress(ConnectionError):
            connection.sendall(hidden)
            answer += receive_all(connection)
    assert b"\r\nx-request-id: " in answer.lower(), (
        "uvicorn has answered itself. Is a WebSocket library installed? See the README."
    )
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nconnection: close\r\n" in answer.lower()
    assert "/smuggled" not in server.log.read_text()


@pytest.mark.process("shared")
@pytest.mark.parametrize(
    ("scheme", "code"), [("Bearer", "invalid_token"), ("Basic", "not_authenticated")]
)
def test_a_token_of_60_kilobytes_is_refused_like_any_other(server, scheme, code):
    headers = {"Authorization": f"{scheme} {'x' * 60_000}"}
    check_problem(server.ask("GET", ME, headers=headers), 401, code)


@pytest.mark.process("two workers")
def test_several_workers_share_secret_throttle_and_logout(early_servers):
    with early_servers.get("two workers") as server:
        headers = server.sign_in()

        def get_me():
            return server.ask("GET", ME, headers=headers).status_code

        assert {get_me() for _ in range(12)} == {200}
        wrong = {**ADA, "password": "wrong"}
        answers = [server.ask("POST", LOGIN, json=wrong) for _ in range(8)]
        statuses = [answer.status_code for answer in answers]
        assert statuses == [401] * 5 + [429] * 3
        assert server.ask("POST", LOGOUT, headers=headers).status_code == 204
        assert {get_me() for _ in range(12)} == {401}
        server.stop()
    assert "Traceback" not in server.log.read_text()


# The newest uvicorn for Python 3.9 starts a worker again and again, whatever its status.
OLD_UVICORN = not hasattr(uvicorn.supervisors.multiprocess, "STARTUP_FAILURE")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param(
            "wrong setting",
            "JWT_SECRET: use 32 bytes",
            id="wrong setting",
            marks=pytest.mark.process("wrong setting"),
        ),
        pytest.param(
            "no database",
            "DATABASE_URL: cannot use 127.0.0.1:1/db",
            id="no database",
            marks=pytest.mark.process("no database"),
        ),
    ],
)
def test_a_start_that_fails_says_why_in_one_line_and_ends_with_3(
    early_servers, name, reason
):
    server = early_servers.get(name)
    assert server.process.wait(60) == 3
    log = server.log.read_text()
    assert len(re.findall(f"not started: {reason}", log)) == 1
    assert len([line for line in log.splitlines() if reason in line]) == 1
    assert "Traceback" not in log and "hunter2" not in log


@pytest.mark.process("wrong workers")
@pytest.mark.skipif(OLD_UVICORN, reason="this uvicorn never gives up")
def test_several_workers_with_a_wrong_setting_end_by_themselves(early_servers):
    server = early_servers.get("wrong workers")
    server.process.wait(60)  # or its workers would be started again for ever
    log = server.log.read_text()
    assert "not started: JWT_SECRET: use 32 bytes" in log
    assert "Traceback" not in log and "hunter2" not in log


SCRIPT_THAT_FORKS = """\
import os
import service

service.logger.warning("from the parent")
if os.fork():
    os.wait()
else:
    service.logger.warning("from the child")
"""


@pytest.mark.process
def test_the_log_needs_no_lifespan_and_survives_a_fork(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT_THAT_FORKS],
        capture_output=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(FOLDER), "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=60,
    )
    lines = run.stdout.decode().splitlines()
    messages = {line.partition(" [-] ")[2] for line in lines}
    assert len(lines) == 2
    assert messages == {"from the parent", "from the child"}


def test_importing_the_service_writes_nothing():
    assert WRITTEN_BY_IMPORT == []


def without_ids_and_times(text):
    uuid_or_hex = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}"
    text = re.sub(uuid_or_hex, "ID", text)
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text).strip()


@pytest.mark.process("readme")
@pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("bash")), reason="needs curl and bash"
)
def test_the_walk_of_the_readme_gives_the_answers_that_the_readme_shows(early_servers):
    text = (FOLDER / "README.md").read_text("utf-8")
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    steps = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", "".join(blocks), re.MULTILINE)
    script = "".join(f"{command}\necho; echo @@\n" for command, _ in steps)
    script = script.replace("sleep 31", "sleep 1.1")
    with early_servers.get("readme") as server:
        script = script.replace("http://127.0.0.1:8000", server.url)
        environment = {"PATH": os.environ["PATH"], "HOME": str(server.folder)}
        run = subprocess.run(
            ["bash", "-c", script],
            capture_output=True,
            check=False,
            env=environment,
            timeout=60,
        )
    shown = [without_ids_and_times(answer) for _, answer in steps]
    answers = run.stdout.decode().split("@@")[:-1]
    assert len(shown) > 15
    assert [without_ids_and_times(answer) for answer in answers] == shown


# ---- the text --------------------------------------------------------------------------

PUBLIC_OPERATIONS = {
    f"POST {REGISTER}",
    f"POST {LOGIN}",
    f"PUT {DEMO}",
    "GET /health/live",
    "GET /health/ready",
}


async def read_operations(client):
    """Return what openapi.json says about each operation, by method and path."""
    paths = (await client.get("/openapi.json")).json()["paths"]
    return {
        f"{method.upper()} {path}": operation
        for path, methods in paths.items()
        for method, operation in methods.items()
    }


async def test_every_operation_needs_a_token_unless_it_is_listed_as_public(sqlite):
    async with serve(sqlite, environment="development") as client:
        operations = await read_operations(client)
        open_ones = set()
        for call, operation in operations.items():
            answer = await client.request(*call.split())
            if answer.status_code != 401:
                open_ones.add(call)
            assert bool(operation["security"]) == (answer.status_code == 401), call
    assert open_ones == PUBLIC_OPERATIONS, "it needs an entry for each public route"
    assert len(operations) > len(open_ones)


def list_defaults():
    fields = service.Settings.model_fields.items()
    return [
        (name.upper(), "" if field.default is None else str(field.default))
        for name, field in fields
    ]


def test_the_settings_of_the_readme_are_those_of_the_service():
    found = [
        (name, "" if default == "–" else default)
        for name, default, *_ in read_table("Settings")
    ]
    assert found == list_defaults(), "README.md needs a row for each field, in order"


def test_the_example_of_an_env_file_has_each_setting_with_its_default():
    lines = (FOLDER / ".env.example").read_text("utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    found = [tuple(line.split("=", 1)) for line in lines]
    assert found == list_defaults(), (
        ".env.example needs a line for each field, in order"
    )


def test_the_errors_of_the_readme_are_those_of_the_service():
    found = {code: int(status) for code, status, *_ in read_table("Errors")}
    known = {code: status for code, (status, _) in service.ERRORS.items()}
    assert found == known, "README.md needs a row for each line in ERRORS"


async def test_the_endpoints_of_the_readme_are_those_of_the_service(sqlite):
    async with serve(sqlite, environment="development") as client:
        operations = await read_operations(client)
    known = {
        call: "bearer" if operation["security"] else "all"
        for call, operation in operations.items()
    }
    known["GET /docs, /redoc, /openapi.json"] = "all"
    found = {call: who for call, who, *_ in read_table("Endpoints")}
    assert found == known, "README.md needs a row for each route"


# The text above the table "Endpoints" says which calls can give these errors.
SAID_ABOVE_THE_TABLE = {
    "internal_error",
    "overloaded",
    "database_unavailable",
    *TOKEN_CODES,
    *BODY_CODES,
}


async def test_the_endpoints_of_the_readme_name_their_statuses(sqlite):
    async with serve(sqlite, environment="development") as client:
        operations = await read_operations(client)
    rows = {call: answers for call, _, answers in read_table("Endpoints")}
    for call, operation in operations.items():
        expected = {status for status in operation["responses"] if status < "400"}
        for status, content in read_errors(operation):
            codes = set(content["application/problem+json"]["examples"])
            if codes - SAID_ABOVE_THE_TABLE:
                expected.add(status)
        named = set(re.findall(r"\b[1-5]\d\d\b", rows[call]))
        assert expected <= named, f"README.md: a status is missing in {call}"


# ---- the benchmark ---------------------------------------------------------------------
#
# `pytest -m benchmark -s` prints one table, for the README. It compares the service with
# a bare FastAPI route. The two take turns, so that a slow moment of the machine hits both.

BARE_APP = """\
from fastapi import FastAPI

app = FastAPI()


@app.get("/health/live")
async def answer():
    return {"id": "x" * 36}
"""


def send_gets(server, path, headers, seconds, connections=1, pause=0.0):
    """Send GETs over open connections for so long. Return the seconds that each took."""
    times = []
    lines = [f"GET {path} HTTP/1.1", "Host: x"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    request = "\r\n".join([*lines, "", ""]).encode()
    ends_at = time.monotonic() + seconds

    def send():
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            while time.monotonic() < ends_at:
                begin = time.perf_counter()
                connection.sendall(request)
                head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
                missing = int(re.search(rb"content-length: (\d+)", head)[1]) - len(body)
                while missing > 0:
                    missing -= len(connection.recv(65536))
                times.append(time.perf_counter() - begin)
                time.sleep(pause)

    run_threads([send] * connections)
    return times


def run_threads(functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def set_cores(server, cores):
    for task in os.listdir(f"/proc/{server.process.pid}/task"):
        os.sched_setaffinity(int(task), cores)


def used_seconds(server):
    """The CPU time that the server has used since its start."""
    text = Path(f"/proc/{server.process.pid}/stat").read_text()
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def used_mebibytes(server):
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024


def seconds_for_each(server, path, headers, connections):
    before = used_seconds(server)
    count = len(send_gets(server, path, headers, 1.2, connections))
    return (used_seconds(server) - before) / count


def p99_milliseconds(times):
    return sorted(times)[int(len(times) * 0.99)] * 1000


def hash_on_all_cores(seconds):
    """Return how many hashes bcrypt alone makes in a second."""
    count = []
    ends_at = time.monotonic() + seconds

    def work():
        while time.monotonic() < ends_at:
            bcrypt.hashpw(b"x" * 64, bcrypt.gensalt(12))
            count.append(1)

    begin = time.monotonic()
    run_threads([work] * os.cpu_count())
    return len(count) / (time.monotonic() - begin)


@contextlib.contextmanager
def flood_of_logins(server, accounts):
    """Each account logs in without pause. Yield the list of the statuses so far."""
    statuses = []
    must_end = threading.Event()

    def log_in_again_and_again(account):
        with httpx.Client(base_url=server.url, verify=SSL_CONTEXT, timeout=60) as http:
            while not must_end.is_set():
                statuses.append(http.post(LOGIN, json=account).status_code)

    threads = [
        threading.Thread(target=log_in_again_and_again, args=[account])
        for account in accounts
    ]
    for thread in threads:
        thread.start()
    yield statuses
    must_end.set()
    for thread in threads:
        thread.join()


def measure_requests(bare, server, headers, rounds=5):
    """Return how many times the CPU of the bare route each kind of request takes."""
    kinds = {
        f"CPU of {name}, {words}": (path, connections)
        for connections, words in ((16, "16 connections"), (1, "one connection"))
        for name, path in (("GET me", ME), ("an open circuit", DATA))
    }
    ratios = {kind: [] for kind in kinds}
    cores = sorted(os.sched_getaffinity(0))
    set_cores(bare, cores[:1])
    set_cores(server, cores[:1])
    os.sched_setaffinity(0, cores[-1:])
    for _ in range(rounds):
        for kind, (path, connections) in kinds.items():
            floor = seconds_for_each(bare, "/health/live", {}, connections)
            cost = seconds_for_each(server, path, headers, connections)
            ratios[kind].append(cost / floor)
    os.sched_setaffinity(0, cores)
    set_cores(server, cores)
    return {
        kind: f"{statistics.median(values):.1f} bare routes"
        for kind, values in ratios.items()
    }


def measure_logins(server, headers, accounts, rounds=3):
    """Compare logins with bcrypt alone, and GET me during them with GET me alone."""
    shares = []
    idle = []
    busy = []
    for _ in range(rounds):
        idle += send_gets(server, ME, headers, 2, pause=0.005)
        limit = hash_on_all_cores(5)
        with flood_of_logins(server, accounts) as statuses:
            time.sleep(2)
            begin = time.monotonic()
            before = len(statuses)
            time.sleep(8)
            rate = (len(statuses) - before) / (time.monotonic() - begin)
            busy += send_gets(server, ME, headers, 5, pause=0.005)
        assert set(statuses) == {200}
        shares.append(rate / limit)
    return {
        "Logins, as a share of bcrypt alone": f"{statistics.median(shares):.2f}",
        "p99 of GET me, no other requests": f"{p99_milliseconds(idle):.1f} ms",
        "p99 of GET me, 16 clients log in": f"{p99_milliseconds(busy):.1f} ms",
    }


def measure(bare, database_url, folder):
    settings = {"BCRYPT_ROUNDS": "12", "LOGIN_MAX_FAILURES": "1000000"}
    settings.update(BREAKER_RESET_SECONDS="3600", DATABASE_URL=database_url)
    with Server(folder, **settings) as server:
        headers = server.sign_in()
        accounts = [{**ADA, "email": f"{number}@example.com"} for number in range(16)]
        for account in accounts:
            server.ask("POST", REGISTER, json=account)
        server.ask("PUT", DEMO, json={"failing": True})
        for _ in range(3):
            server.ask("GET", DATA, headers=headers)
        results = measure_requests(bare, server, headers)
        results.update(measure_logins(server, headers, accounts))
        results["Memory at rest"] = f"{used_mebibytes(server):.0f} MiB"
    return results


@pytest.fixture
def stores(request):
    names = {"SQLite": "sqlite"}
    if POSTGRES_URL:
        names["PostgreSQL"] = "postgres"
    return {name: request.getfixturevalue(fixture) for name, fixture in names.items()}


@pytest.mark.benchmark
@pytest.mark.process
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads the CPU time from /proc"
)
async def test_benchmark(stores, tmp_path, capsys):
    (tmp_path / "bare.py").write_text(BARE_APP)
    with Server(tmp_path, "--no-access-log", app="bare:app") as bare:
        columns = [measure(bare, store.url, tmp_path) for store in stores.values()]
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("fastapi", "starlette", "uvicorn", "databases", "bcrypt")
    ]
    python = f"Python {platform.python_version()}"
    with capsys.disabled():
        print(f"\n\n{date.today()}, {', '.join([python, *versions])}:\n")
        print(f"| | {' | '.join(stores)} |")
        print(f"|---|{'---|' * len(stores)}")
        for row in columns[0]:
            print(f"| {row} | {' | '.join(column[row] for column in columns)} |")
