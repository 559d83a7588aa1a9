"""The promises of the service, one a test, in the README's order. `pytest` runs them on SQLite;
with TEST_POSTGRES_URL=postgresql://... most run on PostgreSQL, too."""

import ast
import asyncio
import base64
import contextlib
import gc
import gzip
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import stat
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import uuid
from pathlib import Path
from unittest import mock

import anyio
import asyncpg
import bcrypt
import httpx
import jwt
import pytest

FOLDER = Path(__file__).parent
START = os.getcwd()
os.chdir(tempfile.gettempdir())  # neither a developer's .env nor environment counts here
with mock.patch.dict(os.environ, clear=True):
    import service
os.chdir(START)
logging.getLogger().handlers.clear()

POSTGRES = os.environ.get("TEST_POSTGRES_URL", "")
KEY = "a secret of at least thirty-two bytes, and of more than sixty-four for HS512"
EMAIL, PASSWORD = "ada@example.com", "correct horse battery"
ADA = {"email": EMAIL, "password": PASSWORD}
REGISTER, LOGIN, ME = "/api/v1/auth/register", "/api/v1/auth/login", "/api/v1/auth/me"
CHANGE, LOGOUT = "/api/v1/auth/password", "/api/v1/auth/logout"
DATA, STATUS = "/api/v1/external/data", "/api/v1/external/status"
KNOBS = {  # what the tests count on, whatever the defaults are
    "environment": "test",
    "jwt_expires_seconds": 86400,
    "bcrypt_rounds": 4,
    "password_min_length": 8,
    "login_max_failures": 5,
    "login_window_seconds": 300,
    "max_body_bytes": 65536,
    "external_attempts": 3,
    "breaker_fail_max": 5,
}


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Leave pytest's logging alone; tests of the log call the original."""
    monkeypatch.setattr(service, "configure_logging", lambda settings: None)
    service.logger.setLevel(logging.DEBUG)


class Store:
    """A fresh database and a way to look into it that is not the service's."""

    def __init__(self, url):
        self.url = url
        self.path = url[len("sqlite:///") :] if url.startswith("sqlite") else None

    async def sql(self, text):
        if self.path:
            with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as db:
                return db.execute(text).fetchall()
        db = await asyncpg.connect(self.url)
        try:
            return [tuple(row) for row in await db.fetch(text)]
        finally:
            await db.close()


@pytest.fixture
async def postgres():
    """A database of its own for each process of the test run, emptied for each test."""
    name = f"service_test_{os.getpid()}"
    admin = await asyncpg.connect(POSTGRES)
    await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    await admin.execute(f"CREATE DATABASE {name}")
    yield Store(re.sub(r"/[^/]*$", f"/{name}", POSTGRES))
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


@pytest.fixture
def sqlite(tmp_path):
    return Store(f"sqlite:///{tmp_path / 'service.db'}")


@pytest.fixture(params=["sqlite", "postgres"] if POSTGRES else ["sqlite"])
def store(request):
    return request.getfixturevalue(request.param)


@contextlib.asynccontextmanager
async def serve(store, **knobs):
    """A client of an app on the store, with its lifespan."""
    knobs = {**KNOBS, "jwt_secret": KEY, "database_url": store.url, **knobs}
    settings = service.Settings(_env_file=None, **knobs)
    app = service.create_app(settings)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            client.app, client.services = app, app.state.services
            yield client


@pytest.fixture
async def client(store):
    async with serve(store) as client:
        yield client


async def sign_in(client, **account):
    """Register unless that is done, log in, and return the headers that carry the token."""
    await client.post(REGISTER, json={**ADA, **account})
    answer = await client.post(LOGIN, json={**ADA, **account})
    assert answer.status_code == 200, answer.text
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


@pytest.fixture
async def headers(client):
    return await sign_in(client)


class Upstream:
    """A real HTTP server that plays a script: bytes to send, or a function of the writer. The last
    entry is repeated."""

    def __init__(self):
        self.script, self.requests, self.tasks = [ok({"n": 1})], [], []

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        self.url = "http://127.0.0.1:%d/" % self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def answer(self, reader, writer):
        self.tasks.append(asyncio.current_task())
        with (
            contextlib.suppress(
                ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError
            ),
            contextlib.closing(writer),
        ):
            self.requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
            entry = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            await entry(writer) if callable(entry) else writer.write(entry)
            await writer.drain()


def raw(status, body=b"", headers="", length=None):
    length = len(body) if length is None else length
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n"
    return head.encode() + body


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
    """A client whose external API is the upstream: short times, and a circuit of three failures."""
    knobs = {"external_timeout_seconds": 0.3, "external_deadline_seconds": 1.5}
    knobs.update(breaker_fail_max=3, breaker_reset_seconds=60, external_attempts=1)
    async with serve(sqlite, external_api_url=upstream.url, **knobs) as client:
        client.headers.update(await sign_in(client))
        yield client


def problem(answer, status, code):
    """Assert the one shape of an error, and return it."""
    body = answer.json()
    assert (answer.status_code, body["code"], body["status"]) == (status, code, status), body
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(body) - {"errors"} == {"type", "title", "status", "detail", "code", "request_id"}
    assert body["request_id"] == answer.headers["x-request-id"]
    assert ("errors" in body) == (status == 422)
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert ("www-authenticate" in answer.headers) == (status == 401)
    return body


# ---- settings --------------------------------------------------------------------------


def load(monkeypatch, **environment):
    for name in service.Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return service.load_settings()


@pytest.mark.parametrize(
    "name, value",
    [
        ("ENVIRONMENT", "staging"),
        ("DATABASE_URL", "mysql://u:hunter2@h/d"),
        ("DATABASE_URL", "postgresql://u:hunter2@h"),
        ("DATABASE_URL", "postgresql://u:hunter2@h/d?sslmode=require"),
        ("DATABASE_URL", "sqlite:///x.db?timeout=1&hunter2"),
        ("DATABASE_URL", "postgresql://bob:hunter2/d"),
        ("DATABASE_URL", "postgresql://bob:hunter2/x@h/d"),
        ("DATABASE_URL", "postgresql://bob:[hunter2]@h/d"),
        ("DATABASE_URL", "postgresql://bob:hunter2\uff1f@h/d"),
        ("DATABASE_URL", "sqlite:///:memory:"),
        ("DATABASE_URL", "sqlite://hunter2"),
        ("DATABASE_TIMEOUT_SECONDS", "0"),
        ("JWT_SECRET", "hunter2"),
        ("JWT_EXPIRES_SECONDS", "1e9"),
        ("BCRYPT_ROUNDS", "16"),
        ("PASSWORD_MIN_LENGTH", "129"),
        ("LOGIN_MAX_FAILURES", "0"),
        ("LOGIN_WINDOW_SECONDS", "soon"),
        ("MAX_BODY_BYTES", "-1"),
        ("EXTERNAL_API_URL", "ftp://hunter2/"),
        ("EXTERNAL_TIMEOUT_SECONDS", "nan"),
        ("EXTERNAL_DEADLINE_SECONDS", "inf"),
        ("EXTERNAL_ATTEMPTS", "0"),
        ("BREAKER_FAIL_MAX", "0"),
        ("BREAKER_RESET_SECONDS", "-1"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_a_wrong_value_ends_the_start_with_the_variables_name(monkeypatch, tmp_path, name, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        load(monkeypatch, **{name: value})
    assert name in str(end.value) and "hunter2" not in str(end.value)
    assert "\n" not in str(end.value)


@pytest.mark.parametrize(
    "url",
    ["sqlite:////a/b c.db", "postgresql://h/d", "postgresql://u@h:5432/d?ssl=require&max_size=3"]
    + ["postgresql://u:p%40%2F!@[::1]/d_1"],
)
def test_a_good_database_url_is_taken(monkeypatch, tmp_path, url):
    monkeypatch.chdir(tmp_path)
    assert load(monkeypatch, DATABASE_URL=url).database_url == url


def test_an_env_file_that_cannot_be_read_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_bytes(b"LOG_LEVEL=\xff")
    with pytest.raises(SystemExit, match="\\.ENV cannot be read"):
        load(monkeypatch)
    with mock.patch.object(service, "Settings", side_effect=PermissionError):
        with pytest.raises(SystemExit, match="\\.ENV cannot be read"):
            load(monkeypatch)


@pytest.mark.parametrize(
    "name, value, is_good",
    [
        ("JWT_SECRET", "x" * 31, False),
        ("JWT_SECRET", "x" * 32, True),
        ("JWT_SECRET", "\u00e9" * 16, True),
        ("BCRYPT_ROUNDS", "3", False),
        ("BCRYPT_ROUNDS", "4", True),
        ("BCRYPT_ROUNDS", "15", True),
    ],
)
def test_a_limit_is_the_last_good_value(monkeypatch, tmp_path, name, value, is_good):
    monkeypatch.chdir(tmp_path)
    with contextlib.nullcontext() if is_good else pytest.raises(SystemExit, match=name):
        load(monkeypatch, **{name: value})


@pytest.mark.parametrize("missing", ["JWT_SECRET", "EXTERNAL_API_URL"])
def test_production_refuses_to_start_without_its_own_values(monkeypatch, tmp_path, missing):
    monkeypatch.chdir(tmp_path)
    knobs = {"JWT_SECRET": KEY, "EXTERNAL_API_URL": "https://api.example.com/"}
    assert load(monkeypatch, ENVIRONMENT="production", **knobs)
    with pytest.raises(SystemExit, match=missing):
        load(monkeypatch, ENVIRONMENT="production", **{**knobs, missing: ""})


def test_the_environment_wins_over_the_env_file_and_empty_counts_as_unset(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("BCRYPT_ROUNDS=5\nLOG_LEVEL=debug\nEXTERNAL_ATTEMPTS=\nX=1\n")
    settings = load(monkeypatch, BCRYPT_ROUNDS="6", LOG_FORMAT="")
    assert (settings.bcrypt_rounds, settings.log_level) == (6, "DEBUG")
    for name in ("external_attempts", "log_format"):
        assert getattr(settings, name) == service.Settings.model_fields[name].default


# ---- registration ----------------------------------------------------------------------


async def test_registering_stores_the_account_and_returns_it_without_the_password(client, store):
    answer = await client.post(REGISTER, json=ADA)
    assert answer.status_code == 201
    assert set(answer.json()) == {"id", "email", "created_at"}
    [(email, password_hash)] = await store.sql("SELECT email, password_hash FROM users")
    assert email == EMAIL and PASSWORD not in password_hash
    assert password_hash.startswith("$2b$04$")
    assert answer.json()["created_at"].endswith("Z")


async def test_an_email_is_taken_in_any_spelling_of_case(client):
    answer = await client.post(REGISTER, json={**ADA, "email": "Ada@EXAMPLE.com"})
    assert answer.json()["email"] == EMAIL
    problem(await client.post(REGISTER, json=ADA), 409, "email_taken")
    problem(
        await client.post(REGISTER, json={**ADA, "email": "ADA@example.COM"}), 409, "email_taken"
    )
    assert await sign_in(client, email="aDA@eXample.com")


@pytest.mark.parametrize(
    "email", ["a@b.test", "a+b@x.local", "a@m\u00fcnchen.example", "\u00e9@x.org"]
)
async def test_what_is_an_email_address_by_its_syntax_is_accepted(client, email):
    assert await sign_in(client, email=email)


async def test_the_email_of_the_answer_logs_in_and_is_taken(client):
    email = "J\u030c@example.com"
    found = (await client.post(REGISTER, json={**ADA, "email": email})).json()["email"]
    problem(await client.post(REGISTER, json={**ADA, "email": found}), 409, "email_taken")
    assert await sign_in(client, email=found)


async def test_of_many_registrations_of_one_email_exactly_one_succeeds(client, store):
    answers = await asyncio.gather(*[client.post(REGISTER, json=ADA) for _ in range(20)])
    assert sorted(a.status_code for a in answers) == [201] + [409] * 19
    assert await store.sql("SELECT COUNT(*) FROM users") == [(1,)]


async def test_many_registrations_and_logins_of_different_users_all_succeed(client):
    async def both(n):
        return await sign_in(client, email=f"u{n}@example.com")

    assert len(await asyncio.gather(*[both(n) for n in range(25)])) == 25


@pytest.mark.parametrize(
    "email",
    ["", "ada", "Ada <ada@example.com>", "a@b", "a b@example.com", "a@x.org\n", "a@" + "x" * 400]
    + [
        "a\x00@example.com",
        "@example.com",
        "a@example.com, b@example.com",
        None,
        12345,
        ["a@b.org"],
    ],
)
async def test_what_is_not_an_email_address_is_refused_without_an_echo(client, email):
    answer = await client.post(REGISTER, json={**ADA, "email": email})
    body = problem(answer, 422, "invalid_request")
    assert body["errors"][0]["loc"] == ["body", "email"]
    assert set(body["errors"][0]) == {"loc", "msg", "type"}
    text = answer.text.replace(body["request_id"], "")
    assert PASSWORD not in text and (not email or str(email) not in text)


@pytest.mark.parametrize("password", ["", "seven77", "x" * 129, "e\u0301" * 7, "e\u0301" * 129])
async def test_a_new_password_has_8_to_128_characters_after_normalisation(client, password):
    answer = await client.post(REGISTER, json={**ADA, "password": password})
    problem(answer, 422, "invalid_request")
    change = {"current_password": PASSWORD, "new_password": password}
    answer = await client.put(CHANGE, json=change, headers=await sign_in(client))
    problem(answer, 422, "invalid_request")


@pytest.mark.parametrize("password", ["x" * 8, "\U0001f40e" * 128, "e\u0301" * 128, "a\x00b" * 4])
async def test_any_characters_make_a_password_and_it_is_the_same_in_both_unicode_forms(
    client, password
):
    assert await sign_in(client, password=password)
    other_form = unicodedata.normalize("NFC", password)
    assert await sign_in(client, password=other_form)


async def test_passwords_that_only_look_alike_are_different(client):
    await client.post(REGISTER, json={**ADA, "password": "\ufb01ne horses"})
    answer = await client.post(LOGIN, json={**ADA, "password": "fine horses"})
    problem(answer, 401, "invalid_credentials")


async def test_128_characters_in_their_longest_form_are_a_password(client):
    password = unicodedata.normalize("NFD", "\u1f82" * 128)
    assert len(password) == 512 and await sign_in(client, password=password)


async def test_the_least_length_is_a_setting_and_for_new_passwords_only(sqlite):
    async with serve(sqlite) as client:
        await sign_in(client, password="x" * 14)
    async with serve(sqlite, password_min_length=15) as client:
        assert await sign_in(client, password="x" * 14)
        bob = {"email": "bob@example.com", "password": "x" * 14}
        problem(await client.post(REGISTER, json=bob), 422, "invalid_request")


async def test_an_email_of_254_characters_is_one(client):
    email = "a" * 64 + "@" + ".".join(["b" * 61] * 3) + ".com"
    assert len(email) == 254 and await sign_in(client, email=email)


async def test_two_passwords_that_share_72_bytes_do_not_both_log_in(client):
    await client.post(REGISTER, json={**ADA, "password": "\U0001f40e" * 30 + "a"})
    answer = await client.post(LOGIN, json={**ADA, "password": "\U0001f40e" * 30 + "b"})
    problem(answer, 401, "invalid_credentials")


# ---- login and throttle ----------------------------------------------------------------


async def test_login_returns_a_bearer_token_that_is_not_to_be_cached(client):
    await client.post(REGISTER, json=ADA)
    answer = await client.post(LOGIN, json=ADA)
    assert answer.headers["cache-control"] == "no-store"
    body = answer.json()
    assert (body["token_type"], body["expires_in"]) == ("bearer", 86400)
    again = (await client.post(LOGIN, json=ADA)).json()
    assert again["access_token"] != body["access_token"]


async def test_an_unknown_email_and_a_wrong_password_get_the_same_answer(client):
    await client.post(REGISTER, json=ADA)
    wrong = await client.post(LOGIN, json={**ADA, "password": "wrong"})
    unknown = await client.post(LOGIN, json={**ADA, "email": "bob@example.com"})
    one, other = problem(wrong, 401, "invalid_credentials"), unknown.json()
    assert {**one, "request_id": ""} == {**other, "request_id": ""}
    assert wrong.headers["www-authenticate"] == 'Bearer realm="service"'


async def test_every_login_hashes_once_at_the_configured_cost(client, store, monkeypatch):
    await client.post(REGISTER, json=ADA)
    costs = []

    def check(password, stored, original=bcrypt.checkpw):
        costs.append(stored[:7])
        return original(password, stored)

    monkeypatch.setattr(bcrypt, "checkpw", check)
    for email in (EMAIL, "bob@example.com"):
        await client.post(LOGIN, json={"email": email, "password": "wrong"})
    assert costs == [b"$2b$04$"] * 2


async def test_an_old_hash_of_lower_cost_takes_as_long_as_any_other(store, monkeypatch):
    async with serve(store) as client:
        await client.post(REGISTER, json=ADA)
    check, costs = bcrypt.checkpw, []
    monkeypatch.setattr(
        bcrypt, "checkpw", lambda p, s: costs.append(2 ** int(s[4:6])) or check(p, s)
    )
    async with serve(store, bcrypt_rounds=7) as client:
        for email in (EMAIL, "bob@example.com"):
            problem(
                await client.post(LOGIN, json={"email": email, "password": "wrong"}),
                401,
                "invalid_credentials",
            )
            assert sum(costs) == 2**7
            costs.clear()


async def test_known_and_unknown_users_take_the_same_time(sqlite):
    async with serve(sqlite, bcrypt_rounds=7, login_max_failures=1000) as client:
        await client.post(REGISTER, json=ADA)
        times = {EMAIL: [], "bob@example.com": []}
        for _ in range(25):
            for email, taken in times.items():
                begin = time.perf_counter()
                await client.post(LOGIN, json={"email": email, "password": "wrong"})
                taken.append(time.perf_counter() - begin)
    known, unknown = map(statistics.median, times.values())
    assert 0.7 < known / unknown < 1.4  # a hash more or less is twice or half


@pytest.mark.parametrize(
    "stored",
    ["", "junk", "$2b$31$" + "a" * 53, "$2b$04$" + "a" * 52 + "\u00e9", "$2b$04$" + "a" * 53],
)
async def test_a_damaged_or_absurdly_costly_hash_is_a_refused_login(client, store, stored):
    await client.post(REGISTER, json=ADA)
    await store.sql(f"UPDATE users SET password_hash = '{stored}'")
    problem(await client.post(LOGIN, json=ADA), 401, "invalid_credentials")


async def test_a_hash_of_lower_cost_is_renewed_at_login_and_sessions_go_on(store):
    async with serve(store) as client:
        headers = await sign_in(client)
    async with serve(store, bcrypt_rounds=5) as client:
        await sign_in(client)
        [(stored,)] = await store.sql("SELECT password_hash FROM users")
        assert stored.startswith("$2b$05$")
        assert (await client.get(ME, headers=headers)).status_code == 200
        assert await sign_in(client)


async def test_a_hash_of_higher_cost_is_left_alone(store):
    async with serve(store, bcrypt_rounds=5) as client:
        await sign_in(client)
    async with serve(store) as client:
        await sign_in(client)
    [(stored,)] = await store.sql("SELECT password_hash FROM users")
    assert stored.startswith("$2b$05$")


async def test_a_login_that_renews_the_hash_does_not_undo_a_change_that_is_under_way(client):
    await client.post(REGISTER, json=ADA)
    services = client.services
    user = await services.authenticate(EMAIL, "-", PASSWORD, "wrong_password")
    assert await services.replace_password(user, PASSWORD, ended=0)
    assert await services.replace_password(user, "another password", ended=1)
    assert not await services.replace_password(user, PASSWORD, ended=0)
    assert await sign_in(client, password="another password")


async def fail(client, times, email=EMAIL, **options):
    wrong = {"email": email, "password": "wrong"}
    answers = await asyncio.gather(
        *[client.post(LOGIN, json=wrong, **options) for _ in range(times)]
    )
    return sorted(answer.status_code for answer in answers)


async def test_of_parallel_wrong_logins_the_first_five_get_through(client):
    await client.post(REGISTER, json=ADA)
    assert await fail(client, 20) == [401] * 5 + [429] * 15


async def test_past_the_limit_the_right_password_waits_too_and_nothing_is_hashed(
    client, monkeypatch
):
    await client.post(REGISTER, json=ADA)
    await fail(client, 5)
    monkeypatch.setattr(bcrypt, "checkpw", None)
    answer = await client.post(LOGIN, json=ADA)
    problem(answer, 429, "too_many_attempts")
    assert 290 <= int(answer.headers["retry-after"]) <= 300


async def test_a_success_clears_what_stood_against_the_address(client):
    await client.post(REGISTER, json=ADA)
    for _ in range(3):
        assert await fail(client, 4) == [401] * 4
        await sign_in(client)


async def test_the_throttle_survives_a_restart_and_is_shared(store):
    async with serve(store) as one, serve(store) as other:
        assert await fail(one, 3) + await fail(other, 3) == [401] * 5 + [429]
    async with serve(store) as client:
        assert await fail(client, 1) == [429]


async def test_after_the_window_attempts_count_anew_and_ended_windows_are_removed(client, store):
    await fail(client, 6)
    await fail(client, 1, email="bob@example.com")
    await store.sql("UPDATE login_attempts SET window_ends_at = 1")
    assert await fail(client, 1) == [401]
    rows = await store.sql("SELECT email, address, attempts FROM login_attempts ORDER BY address")
    assert rows == [(EMAIL, "*", 1), (EMAIL, "127.0.0.1", 1)]


async def test_a_window_that_a_wrong_clock_began_does_not_lock_for_years(client, store):
    await client.post(REGISTER, json=ADA)
    await fail(client, 6)
    window = client.services.settings.login_window_seconds
    await store.sql(f"UPDATE login_attempts SET window_ends_at = window_ends_at + {window - 5}")
    assert await fail(client, 1) == [429]
    await store.sql("UPDATE login_attempts SET window_ends_at = window_ends_at + 31536000")
    assert await sign_in(client)


async def from_address(client, address, password="wrong"):
    transport = httpx.ASGITransport(client.app, client=(address, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
        account = {"email": EMAIL, "password": password}
        return (await other.post(LOGIN, json=account)).status_code


async def test_one_account_attacked_from_many_addresses_is_limited_too(client):
    await client.post(REGISTER, json=ADA)
    statuses = [await from_address(client, f"10.0.0.{n}") for n in range(51)]
    assert statuses == [401] * 50 + [429]
    assert await from_address(client, "10.0.1.1", PASSWORD) == 429


async def test_a_success_takes_itself_back_from_the_limit_of_all(client, store):
    await client.post(REGISTER, json=ADA)
    for n in range(3):
        await from_address(client, f"10.0.0.{n}")
    assert await from_address(client, "10.0.1.1", PASSWORD) == 200
    assert await store.sql("SELECT attempts FROM login_attempts WHERE address = '*'") == [(3,)]


async def test_a_success_takes_nothing_back_from_a_window_that_has_begun_meanwhile(
    client, store, monkeypatch
):
    async def verify(*_):
        await store.sql("UPDATE login_attempts SET attempts = 0")
        return True

    await client.post(REGISTER, json=ADA)
    monkeypatch.setattr(service.Passwords, "verify", verify)
    assert await sign_in(client)
    assert await store.sql("SELECT attempts FROM login_attempts") == [(0,), (0,)]


async def test_who_waits_exactly_as_long_as_retry_after_says_may_try_again(
    client, store, monkeypatch
):
    await fail(client, 6)
    [(ends,)] = await store.sql("SELECT window_ends_at FROM login_attempts WHERE address <> '*'")
    monkeypatch.setattr(service, "time", mock.Mock(wraps=time, time=lambda: ends))
    assert await fail(client, 1) == [401]


async def test_attempts_do_not_lengthen_the_window_and_retry_after_is_what_is_left(client, store):
    await fail(client, 5)
    await store.sql(f"UPDATE login_attempts SET window_ends_at = {int(time.time()) + 100}")
    for _ in range(2):
        answer = await client.post(LOGIN, json=ADA)
        assert 95 <= int(answer.headers["retry-after"]) <= 100


async def test_the_limit_and_the_window_are_settings(sqlite):
    async with serve(sqlite, login_max_failures=2, login_window_seconds=1000) as client:
        assert await fail(client, 3) == [401] * 2 + [429]
        answer = await client.post(LOGIN, json=ADA)
        assert 990 <= int(answer.headers["retry-after"]) <= 1000


async def test_what_the_limit_of_all_refuses_does_not_count_against_the_address(client, store):
    await client.post(REGISTER, json=ADA)
    for n in range(51):
        await from_address(client, f"10.0.0.{n}")
    for _ in range(7):
        assert await from_address(client, "10.0.1.1", PASSWORD) == 429
    await store.sql("UPDATE login_attempts SET window_ends_at = 1 WHERE address = '*'")
    assert await from_address(client, "10.0.1.1", PASSWORD) == 200


async def test_failures_from_before_a_refusal_by_the_limit_of_all_still_count(client, store):
    for _ in range(4):
        assert await from_address(client, "10.0.1.1") == 401
    for n in range(47):
        await from_address(client, f"10.0.0.{n}")
    assert await from_address(client, "10.0.1.1") == 429
    await store.sql("DELETE FROM login_attempts WHERE address = '*'")
    assert [await from_address(client, "10.0.1.1") for _ in range(2)] == [401, 429]


async def test_an_address_of_any_length_is_one(client, store):
    await client.post(REGISTER, json=ADA)
    assert await from_address(client, "x" * 9000, PASSWORD) == 200
    [(longest,)] = await store.sql("SELECT MAX(LENGTH(address)) FROM login_attempts")
    assert longest == 64


async def test_one_address_alone_does_not_lock_the_owner_out_elsewhere(client):
    await client.post(REGISTER, json=ADA)
    for _ in range(7):
        assert set(await fail(client, 10)) <= {401, 429}
    assert await from_address(client, "10.0.0.1", PASSWORD) == 200


async def test_a_strangers_forwarded_for_counts_for_nothing(client):
    for n in range(5):
        await fail(client, 1, headers={"X-Forwarded-For": f"10.0.0.{n}"})
    assert await fail(client, 1, headers={"X-Forwarded-For": "10.0.0.9"}) == [429]


async def test_a_password_change_has_the_throttle_of_logins(client, headers):
    change = {"current_password": "wrong", "new_password": "another password"}
    for _ in range(5):
        problem(await client.put(CHANGE, json=change, headers=headers), 403, "wrong_password")
    answer = await client.put(CHANGE, json=change, headers=headers)
    problem(answer, 429, "too_many_attempts")
    assert await fail(client, 1) == [429]


async def test_passwords_are_hashed_outside_the_event_loop(client, monkeypatch):
    threads = []
    for name in ("hashpw", "checkpw"):

        def recorded(*arguments, original=getattr(bcrypt, name)):
            threads.append(threading.current_thread())
            return original(*arguments)

        monkeypatch.setattr(bcrypt, name, recorded)
    await sign_in(client)
    assert len(threads) == 2 and threading.current_thread() not in threads


async def test_logins_that_do_not_fit_the_queue_are_shed_at_once(client, monkeypatch):
    await client.post(REGISTER, json=ADA)
    checked, gate = [], threading.Event()
    monkeypatch.setattr(bcrypt, "checkpw", lambda *_: checked.append(1) or gate.wait(5))
    places = client.services.passwords.places.value
    logins = [
        asyncio.ensure_future(client.post(LOGIN, json={**ADA, "email": f"{n}@example.com"}))
        for n in range(places + 10)
    ]
    try:
        done, _ = await asyncio.wait(logins, timeout=4, return_when=asyncio.FIRST_COMPLETED)
        problem(next(iter(done)).result(), 503, "overloaded")
        while len(checked) < os.cpu_count():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # time for one more than there are cores
        assert len(checked) == os.cpu_count()
        assert (await client.get("/health/ready")).status_code == 200
    finally:
        gate.set()
    statuses = sorted(a.status_code for a in await asyncio.gather(*logins))
    assert statuses == [401] * places + [503] * 10
    problem(await client.post(REGISTER, json=ADA), 409, "email_taken")


# ---- tokens ----------------------------------------------------------------------------


async def test_me_is_the_user_of_the_token_and_the_scheme_has_any_case(client, headers):
    token = headers["Authorization"].split()[1]
    for scheme in ("Bearer", "bearer", "BEARER"):
        answer = await client.get(ME, headers={"Authorization": f"{scheme} {token}"})
        assert answer.json()["email"] == EMAIL
        assert set(answer.json()) == {"id", "email", "created_at"}


def forge(headers, key=KEY, algorithm="HS256", drop=None, **claims):
    good = jwt.decode(
        headers["Authorization"].split()[1], KEY, ["HS256"], audience="service", issuer="service"
    )
    good.update(claims)
    good.pop(drop, None)
    return {"Authorization": f"Bearer {jwt.encode(good, key, algorithm)}"}


@pytest.mark.parametrize("claim", ["iss", "aud", "sub", "iat", "exp", "jti", "ver"])
async def test_every_claim_is_required(client, headers, claim):
    answer = await client.get(ME, headers=forge(headers, drop=claim))
    problem(answer, 401, "invalid_token")
    assert answer.headers["www-authenticate"] == 'Bearer realm="service", error="invalid_token"'


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "x"},
        {"aud": "x"},
        {"sub": "x"},
        {"sub": "\x00"},
        {"sub": "00000000-0000-0000-0000-000000000000"},
        {"ver": 1},
        {"ver": "0"},
        {"exp": "soon"},
        {"exp": float("inf")},
        {"iat": 10**12},
        {"nbf": 10**12},
        {"ver": 10**40},
        {"ver": None},
        {"sub": 5},
        {"jti": 5},
        {"iat": "now"},
        {"exp": None},
        {"exp": -1e400},
        {"aud": []},
    ],
)
async def test_a_claim_with_a_wrong_value_is_refused(client, headers, claims):
    problem(await client.get(ME, headers=forge(headers, **claims)), 401, "invalid_token")


async def test_an_expired_token_is_refused_before_any_route_and_said_to_be_expired(client, headers):
    for path in (ME, "/nowhere"):
        for age in (5, 60):
            expired = forge(headers, exp=int(time.time()) - age)
            answer = await client.get(path, headers=expired)
            assert "expired" in problem(answer, 401, "expired_token")["detail"]
            sent = 'Bearer realm="service", error="invalid_token"'
            assert answer.headers["www-authenticate"] == sent


async def test_a_token_lives_as_long_as_the_setting_says(sqlite):
    async with serve(sqlite, jwt_expires_seconds=1000) as client:
        token = (await sign_in(client))["Authorization"].split()[1]
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["exp"] - claims["iat"] == 1000


async def test_clocks_may_differ_by_two_seconds_and_no_more(client, headers):
    while time.time() % 1 > 0.7:  # so that no second begins before the answer
        await asyncio.sleep(0.05)
    for ago, status in ((1, 200), (2, 401)):
        old = forge(headers, exp=int(time.time()) - ago)
        assert (await client.get(ME, headers=old)).status_code == status


async def test_a_host_whose_clock_is_a_second_behind_takes_a_fresh_token(client, headers):
    fresh = forge(headers, iat=int(time.time()) + 1)
    assert (await client.get(ME, headers=fresh)).status_code == 200


async def test_a_token_of_another_key_or_algorithm_is_refused(client, headers):
    unsigned = jwt.api_jws.PyJWS().encode(b"{}", None, algorithm="none")
    none = forge(headers, key=None, algorithm="none")
    for bad in (
        none,
        forge(headers, key="x" * 40),
        forge(headers, algorithm="HS512"),
        {"Authorization": f"Bearer {unsigned}"},
    ):
        problem(await client.get(ME, headers=bad), 401, "invalid_token")


@pytest.mark.parametrize(
    "value",
    ["Bearer", "Bearer ", "Bearer a.b.c", "Bearer x y", "bearer \x7f", "Bearer " + "a" * 60000]
    + ["Bearer " + base64.urlsafe_b64encode(b"[" * 40000).decode() + ".e30.x"],
)
async def test_a_malformed_token_is_refused(client, value):
    problem(await client.get(ME, headers={"Authorization": value}), 401, "invalid_token")


async def test_two_authorization_headers_are_refused(client, headers):
    both = [("Authorization", headers["Authorization"])] * 2
    problem(await client.get(ME, headers=both), 401, "invalid_token")


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Basic YTpi"}, {"Authorization": ""}])
async def test_without_a_token_what_is_protected_is_401_and_what_is_not_there_404(client, headers):
    answer = await client.get(ME, headers=headers, params={"access_token": "x"})
    problem(answer, 401, "not_authenticated")
    assert answer.headers["www-authenticate"] == 'Bearer realm="service"'
    problem(await client.get("/nowhere", headers=headers), 404, "not_found")
    problem(await client.delete(ME, headers=headers), 405, "method_not_allowed")
    big = {"content": b"x" * 70000, "headers": headers}
    problem(await client.put(CHANGE, **big), 413, "body_too_large")
    problem(await client.put(CHANGE, content=b"{", headers=headers), 401, "not_authenticated")


@pytest.mark.parametrize("scheme", ["Bearerfoo ", "Bearer\xa0", "Bearer\t", "Token ", ""])
async def test_a_good_token_with_an_odd_scheme_is_no_token(client, headers, scheme):
    odd = {"Authorization": (scheme + headers["Authorization"].split()[1]).encode("latin-1")}
    problem(await client.get(ME, headers=odd), 401, "not_authenticated")
    spaced = {"Authorization": headers["Authorization"].encode() + b"\xa0"}
    problem(await client.get(ME, headers=spaced), 401, "invalid_token")


async def test_a_dead_token_can_still_log_in(client):
    await client.post(REGISTER, json=ADA)
    dead = {"Authorization": "Bearer dead"}
    assert (await client.post(LOGIN, json=ADA, headers=dead)).status_code == 200
    for path in ("/health/live", "/health/ready", "/docs", "/redoc", "/openapi.json"):
        assert (await client.get(path, headers=dead)).status_code == 200


async def test_below_a_public_path_nothing_is_public(client):
    bad = {"Authorization": "Bearer x"}
    problem(await client.get("/docs/x", headers=bad), 401, "invalid_token")


async def test_behind_a_root_path_public_stays_public(client):
    transport = httpx.ASGITransport(client.app, root_path="/prefix")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
        assert (await other.get("/prefix/health/live")).status_code == 200
        assert (await other.get("/prefix" + ME)).status_code == 401


async def test_the_tokens_of_a_deleted_user_die_at_once(client, headers, store):
    await store.sql("DELETE FROM users")
    problem(await client.get(ME, headers=headers), 401, "invalid_token")


async def test_logout_ends_every_session_until_now(client, headers):
    second = await sign_in(client)
    assert (await client.post(LOGOUT, headers=second)).status_code == 204
    for dead in (headers, second):
        problem(await client.get(ME, headers=dead), 401, "invalid_token")
    assert (await client.get(ME, headers=await sign_in(client))).status_code == 200


async def test_a_password_change_ends_every_session_and_the_old_password(client, headers):
    change = {"current_password": PASSWORD, "new_password": "another password"}
    assert (await client.put(CHANGE, json=change, headers=headers)).status_code == 204
    problem(await client.get(ME, headers=headers), 401, "invalid_token")
    problem(await client.post(LOGIN, json=ADA), 401, "invalid_credentials")
    assert await sign_in(client, password="another password")


async def test_of_two_password_changes_at_once_one_wins(client, headers):
    changes = [{"current_password": PASSWORD, "new_password": f"password {n}"} for n in range(4)]
    puts = [client.put(CHANGE, json=change, headers=headers) for change in changes]
    statuses = [answer.status_code for answer in await asyncio.gather(*puts)]
    assert statuses.count(204) == 1 and set(statuses) <= {204, 401, 403}


async def test_tokens_survive_a_restart_with_the_secret_kept_in_development(store, caplog):
    async with serve(store, environment="development", jwt_secret=None) as client:
        headers = await sign_in(client)
    assert [r.levelname for r in caplog.records if "JWT_SECRET" in r.message] == ["WARNING"]
    async with serve(store, environment="development", jwt_secret=None) as client:
        assert (await client.get(ME, headers=headers)).status_code == 200


async def test_the_test_profile_makes_a_new_secret_for_each_process(store):
    async with serve(store, jwt_secret=None) as client:
        headers = await sign_in(client)
    async with serve(store, jwt_secret=None) as client:
        problem(await client.get(ME, headers=headers), 401, "invalid_token")
    assert await store.sql("SELECT * FROM secrets") == []


# ---- errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe",
        b"[" * 60000,
        b"9" * 5000,
        b'{"email": "\\ud800@example.com", "password": "hunter2-hunter2"}',
        b'{"email": "a@example.com", "password": "hunter2-\\udfff"}',
        b'{"email": NaN, "password": 1e999}',
        json.dumps(ADA).encode("utf-32")[:-2],
        b'{"email": "a@example.com", "password": "hunter2',
    ],
)
async def test_a_body_that_cannot_be_read_is_a_422_that_echoes_nothing(client, store, body):
    answer = await client.post(REGISTER, content=body, headers={"Content-Type": "application/json"})
    found = problem(answer, 422, "invalid_request")
    assert found["errors"] and "hunter2" not in answer.text
    assert await store.sql("SELECT * FROM users") == []


async def test_other_content_types_are_not_read(client):
    answer = await client.post(
        REGISTER, content=json.dumps(ADA), headers={"Content-Type": "text/x"}
    )
    problem(answer, 422, "invalid_request")


async def test_405_names_the_methods_and_404_does_not_redirect(client):
    answer = await client.post("/health/live")
    problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET"
    for path in ("/health/live/", "//health/live", "/docs/", "/HEALTH/LIVE"):
        problem(await client.get(path, headers={"Host": "evil.example"}), 404, "not_found")


async def chunks(count, size=1000):
    for _ in range(count):
        yield b"x" * size


async def test_a_body_over_the_limit_is_refused_by_its_length_and_by_its_size(client):
    announced = {"content": b"{", "headers": {"Content-Length": "65537"}}
    problem(await client.post(LOGIN, **announced), 413, "body_too_large")
    problem(await client.post(LOGIN, content=chunks(65537, 1)), 413, "body_too_large")
    problem(await client.post("/nowhere", content=b"x" * 65537), 413, "body_too_large")
    problem(await client.post(LOGIN, content=chunks(64, 1024)), 422, "invalid_request")


async def test_the_longest_body_is_a_setting(sqlite):
    async with serve(sqlite, max_body_bytes=100) as client:
        problem(await client.post(LOGIN, content=b"x" * 101), 413, "body_too_large")
        problem(await client.post(LOGIN, content=b"x" * 100), 422, "invalid_request")


async def test_a_body_that_drips_is_408(client, monkeypatch):
    monkeypatch.setattr(service, "BODY_SECONDS", 0.3)

    async def dripping():
        for _ in range(10):
            yield b" "
            await asyncio.sleep(0.1)

    problem(await client.post(LOGIN, content=dripping()), 408, "request_timeout")


async def test_a_length_of_thousands_of_digits_is_refused(client):
    for length in ("0" * 5000 + "33", "9" * 20):
        answer = await client.post(LOGIN, content=b"{", headers={"Content-Length": length})
        problem(answer, 413, "body_too_large")


async def test_a_body_that_does_not_arrive_in_time_is_408(client, monkeypatch):
    monkeypatch.setattr(service, "BODY_SECONDS", 0.05)

    async def slow():
        yield b"{"
        await asyncio.sleep(1)
        yield b"}"

    problem(await client.post(LOGIN, content=slow()), 408, "request_timeout")


async def test_a_body_is_read_once_and_then_the_disconnect_is_waited_for(client):
    end = {"type": "http.disconnect"}
    messages = [{"type": "http.request", "body": b"{", "more_body": True}]
    messages += [{"type": "http.request", "body": b"}"}, end]

    async def receive():
        return messages.pop(0)

    chunked = [(b"transfer-encoding", b"chunked")]
    scope = {"type": "http", "headers": chunked, "app": client.app}
    repeat = await service.read_body(service.Request(scope, receive), receive)
    assert messages == [end]
    assert (await repeat())["body"] == b"{}" and await repeat() == end


async def test_what_a_client_had_sent_when_it_left_is_not_taken_for_a_body(tmp_path):
    body = json.dumps(ADA).encode()
    head = f"POST {REGISTER} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with Server(tmp_path) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(f"{head}Content-Length: {len(body) + 1}\r\n\r\n".encode() + body)
        assert server.ask("POST", REGISTER, json=ADA).status_code == 201
        server.stop()
    assert f"POST {REGISTER} 408" in server.log.read_text()


async def test_an_unexpected_exception_is_a_500_with_one_traceback_in_the_log(
    client, monkeypatch, caplog
):
    monkeypatch.setattr(service.Database, "insert_user", lambda *_, **__: 1 / 0)
    answer = await client.post(REGISTER, json=ADA, headers={"X-Request-ID": "my-id"})
    body = problem(answer, 500, "internal_error")
    assert body["request_id"] == "my-id" and "division" not in answer.text
    assert caplog.text.count("Traceback") == 1 and "ZeroDivisionError" in caplog.text


async def test_a_foreign_exception_with_a_status_is_a_500_without_its_headers(client, monkeypatch):
    class ForeignError(Exception):
        status_code, headers = 404, {"x-leak": "1"}

    async def fail(*_, **__):
        raise ForeignError

    monkeypatch.setattr(service.Database, "insert_user", fail)
    answer = await client.post(REGISTER, json=ADA)
    problem(answer, 500, "internal_error")
    assert "x-leak" not in answer.headers


@pytest.mark.parametrize("status", [401, 403, 409, 418, 500])
async def test_an_httpexception_that_is_no_error_of_ours_is_a_bug_with_its_traceback(
    client, monkeypatch, caplog, status
):
    async def fail(*_, **__):
        raise service.HTTPException(status, "of FastAPI's kind")

    monkeypatch.setattr(service.Database, "insert_user", fail)
    answer = await client.post(REGISTER, json=ADA)
    problem(answer, 500, "internal_error")
    assert caplog.text.count("Traceback") == 1 and "of FastAPI's kind" in caplog.text


async def test_one_response_object_sent_twice_carries_each_requests_own_id(client):
    shared = service.Response("x")
    client.app.router.add_route("/docs2", lambda request: shared)
    headers = await sign_in(client)
    for rid in ("one", "two"):
        answer = await client.get("/docs2", headers={**headers, "X-Request-ID": rid})
        assert answer.headers.get_list("x-request-id") == [rid]


async def test_an_exception_after_the_answer_has_begun_is_logged_and_sends_no_second_one(caplog):
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("late")

    async def send(message):
        sent.append(message["type"])

    app.state = mock.Mock(settings=service.Settings(_env_file=None), services=None)
    scope = {"type": "http", "method": "GET", "path": "/docs", "raw_path": b"/docs", "headers": []}
    scope["app"] = app
    await service.RequestContext(app)(scope, None, send)
    assert sent == ["http.response.start"] and "late" in caplog.text


def test_every_error_class_has_its_place_under_the_base():
    for kind in (service.AuthError, service.ValidationError, service.ExternalServiceError):
        assert issubclass(kind, service.ServiceError)


# ---- request id and log ----------------------------------------------------------------


@pytest.mark.parametrize("sent", ["a", "A-Z_0.9", "x" * 128])
async def test_a_good_request_id_is_kept(client, sent):
    answer = await client.get("/nowhere", headers={"X-Request-ID": sent})
    assert answer.headers.get_list("x-request-id") == [sent]
    assert answer.json()["request_id"] == sent


@pytest.mark.parametrize("sent", ["", "x" * 129, "a b", 'a"b', "a\\nb", "\u00e9".encode()])
async def test_a_bad_request_id_is_replaced(client, sent):
    answer = await client.get("/nowhere", headers={"X-Request-ID": sent})
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


@pytest.fixture
def log(monkeypatch):
    """The lines that the handler would write, as the process writes them."""
    lines = []
    monkeypatch.setattr(os, "write", lambda fd, line: lines.append(line.decode()) or len(line))

    def handler(log_format="json", **options):
        handler = service.StdoutHandler(log_format, **options)
        root = logging.getLogger()
        monkeypatch.setattr(root, "handlers", [handler])
        return handler, lines

    return handler


async def test_a_request_leaves_one_access_record_and_events_with_its_id(client, log):
    handler, lines = log()
    answer = await client.post(REGISTER, json=ADA, headers={"X-Request-ID": "my-id"})
    await client.get(ME + "?password=hunter2")
    handler.flush()
    event, access, other = map(json.loads, lines)
    assert (event["event"], event["request_id"], event["level"]) == (
        "user_registered",
        "my-id",
        "INFO",
    )
    assert event["user_id"] == answer.json()["id"]
    assert set(access) == {"time", "level", "logger", "message", "request_id", "method"} | {
        *("path", "status", "duration_ms", "client", "user_id"),
    }
    assert (access["method"], access["path"], access["status"]) == ("POST", REGISTER, 201)
    assert (other["path"], other["status"], other["user_id"]) == (ME, 401, None)
    assert "hunter2" not in "".join(lines)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", access["time"])


@pytest.mark.parametrize("log_format", ["json", "text"])
async def test_a_line_is_short_enough_to_stay_whole_in_a_pipe_of_several_workers(
    client, log, log_format
):
    handler, lines = log(log_format)
    await client.get("/" + '"' * 5000)
    await client.request("X" * 9000, "/")
    handler.flush()
    assert len(lines) == 2 and 500 < len(lines[0]) < 4096 and len(lines[1]) < 4096


async def test_security_events_are_records_with_failures_at_warning(client, caplog, monkeypatch):
    headers = await sign_in(client)
    await client.get(ME, headers={"Authorization": "Bearer x"})
    await client.get(ME)
    change = {"current_password": PASSWORD, "new_password": PASSWORD}
    await client.put(CHANGE, json=change, headers=headers)
    await client.post(LOGOUT, headers=await sign_in(client))
    await fail(client, 6)
    records = [r for r in caplog.records if "event" in getattr(r, "fields", {})]
    assert {r.fields["user_id"] for r in records if r.message != "token_refused invalid_token"} == {
        records[0].fields["user_id"]
    }
    events = [(r.fields["event"], r.levelname) for r in records]
    assert events[:6] == [
        ("user_registered", "INFO"),
        ("login_succeeded", "INFO"),
        ("token_refused", "WARNING"),
        ("password_changed", "INFO"),
        ("login_succeeded", "INFO"),
        ("logged_out", "INFO"),
    ]
    throttled = ("login_throttled", "WARNING")
    assert sorted(events[6:]) == [("login_failed", "WARNING")] * 5 + [throttled]
    assert EMAIL not in caplog.text and PASSWORD not in caplog.text


async def test_an_access_record_has_the_path_as_sent_the_user_and_no_strangers_address(
    client, caplog
):
    headers = await sign_in(client)
    user = (await client.get(ME, headers={**headers, "X-Forwarded-For": "6.6.6.6"})).json()["id"]
    fields = caplog.records[-1].fields
    assert (fields["path"], fields["user_id"], fields["client"]) == (ME, user, "127.0.0.1")
    await client.get("/a%0Ab")
    assert caplog.records[-1].fields["path"] == "/a%0Ab"


def test_a_traceback_is_a_part_of_its_record(log):
    handler, lines = log()
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        service.logger.exception("broken")
    handler.flush()
    assert "ZeroDivisionError" in json.loads(lines[0])["traceback"]


def test_a_reader_that_stalls_does_not_hold_up_the_exit(log, monkeypatch):
    handler, _ = log()
    gate = threading.Event()
    monkeypatch.setattr(os, "write", lambda fd, line: gate.wait(4) or len(line))
    service.logger.warning("stalled")
    begin = time.monotonic()
    handler.flush()
    taken = time.monotonic() - begin
    gate.set()
    assert taken < 3


def test_no_line_can_be_forged_in_the_text_format(log):
    handler, lines = log("text")
    error = ValueError("one\n2026 INFO [x] forged")
    service.logger.error("two\n2026\u2028\x1b[31m forged", exc_info=error)
    handler.flush()
    begins = [line for line in "".join(lines).splitlines() if not line.startswith("    ")]
    assert len(begins) == 1 and "\x1b" not in begins[0] and "ERROR" in begins[0]


def test_a_reader_that_stalls_stalls_nothing_and_is_told_what_was_dropped(log, monkeypatch):
    handler, lines = log(limit=10)
    gate = threading.Event()
    monkeypatch.setattr(
        os, "write", lambda fd, line: gate.wait(5) and lines.append(line) or len(line)
    )
    begin = time.monotonic()
    for n in range(100):
        service.logger.warning("line %d", n)
    assert time.monotonic() - begin < 2
    gate.set()
    handler.flush()
    service.logger.warning("after")
    handler.flush()
    assert len(lines) in (11, 12, 13) and re.search(rb"(8\d|90) records before this", lines[-1])
    service.logger.warning("later")
    handler.flush()
    assert b"records before this" not in lines[-1]


def test_what_utf8_cannot_hold_is_written_escaped(log):
    handler, lines = log("text")
    service.logger.error("unhandled error", exc_info=ValueError("x \ud800"))
    handler.flush()
    assert "ValueError: x \\ud800" in lines[0]


def test_a_reader_that_has_gone_is_survived(log, monkeypatch):
    handler, lines = log()
    monkeypatch.setattr(os, "write", mock.Mock(side_effect=[BrokenPipeError, 100]))
    service.logger.warning("lost")
    service.logger.warning("written")
    handler.flush()
    assert os.write.call_count == 2


def test_uvicorns_records_take_the_same_way_and_its_access_log_is_silent(monkeypatch):
    monkeypatch.undo()
    root, loggers = (
        logging.getLogger(),
        [logging.getLogger(n) for n in ("uvicorn", "uvicorn.error")],
    )
    before = root.handlers[:]
    try:
        service.configure_logging(service.Settings(_env_file=None, log_level="error"))
        assert [type(h) for h in root.handlers] == [service.StdoutHandler]
        assert all(log.propagate and not log.handlers for log in loggers)
        assert not logging.getLogger("uvicorn.access").hasHandlers()
        for library in ("databases", "aiosqlite", "httpx", "asyncpg"):
            assert not logging.getLogger(library).isEnabledFor(logging.INFO)
        assert not service.logger.isEnabledFor(logging.WARNING)
    finally:
        root.handlers[:] = before


# ---- external client -------------------------------------------------------------------


async def test_the_upstreams_json_is_passed_on_with_the_request_id_and_without_the_token(
    guarded, upstream
):
    upstream.script = [ok({"a": [1, "\u00e9", None, 1e300]})]
    answer = await guarded.get(DATA, headers={"X-Request-ID": "my-id"})
    assert answer.json() == {"data": {"a": [1, "\u00e9", None, 1e300]}}
    [request] = upstream.requests
    assert "x-request-id: my-id" in request.lower() and "authorization" not in request.lower()
    assert "accept-encoding: gzip\r\n" in request.lower()


@pytest.mark.parametrize("name", ["gzip", "GZIP", "x-gzip"])
async def test_a_gzip_body_is_inflated(guarded, upstream, name):
    body = gzip.compress(b'{"a": 1}')
    upstream.script = [raw(200, body, f"Content-Encoding: {name}\r\n")]
    assert (await guarded.get(DATA)).json() == {"data": {"a": 1}}


def deep(levels):
    return b"[" * levels + b"]" * levels


NONSENSE = {
    "junk": raw(200, b"<html>"),
    "nothing": raw(200, b""),
    "204": raw(204),
    "301": raw(301, b"{}", "Location: http://127.0.0.1:1/\r\n"),
    "a strange redirect": raw(302, b"{}", "Location: http://[::1\r\n"),
    "NaN": raw(200, b'{"a": NaN}'),
    "an infinite number": raw(200, b'{"a": 1e999}'),
    "a lone surrogate": raw(200, b'"\\ud800"'),
    "not UTF-8": raw(200, b'"\xff"'),
    "deep nesting": raw(200, deep(100_000)),
    "a broken gzip": raw(200, b"{}", "Content-Encoding: gzip\r\n"),
    "a gzip and more": raw(200, gzip.compress(b"1") + b"2", "Content-Encoding: gzip\r\n"),
    "a cut gzip": raw(200, gzip.compress(b'{"a": 1}')[:-9], "Content-Encoding: gzip\r\n"),
    "another encoding": raw(200, b"\x00{}", "Content-Encoding: br\r\n"),
    "too much": raw(200, b'"' + b"x" * 2**20 + b'"'),
    "a gzip bomb": raw(
        200, gzip.compress(b'"' + b"x" * 2**24 + b'"'), "Content-Encoding: gzip\r\n"
    ),
}
UNSTABLE = {
    **{str(status): raw(status, b"{}") for status in (500, 503, 599, 408, 429)},
    "a cut body": raw(200, b"{}", length=10),
    "no HTTP": b"SSH-2.0-x\r\n\r\n",
    "a closed connection": b"",
}


@pytest.mark.parametrize("entry", NONSENSE.values(), ids=list(NONSENSE))
async def test_nonsense_is_502_not_retried_and_a_failure_to_the_circuit(sqlite, upstream, entry):
    upstream.script = [entry]
    async with serve(sqlite, external_api_url=upstream.url) as client:
        headers = await sign_in(client)
        problem(await client.get(DATA, headers=headers), 502, "external_service_error")
        assert len(upstream.requests) == 1
        assert (await client.get(STATUS, headers=headers)).json()["failures"] == 1


@pytest.mark.parametrize("entry", UNSTABLE.values(), ids=list(UNSTABLE))
async def test_what_may_pass_is_retried_and_each_attempt_is_a_failure(sqlite, upstream, entry):
    upstream.script = [entry]
    async with serve(sqlite, external_api_url=upstream.url, external_attempts=2) as client:
        headers = await sign_in(client)
        problem(await client.get(DATA, headers=headers), 502, "external_service_error")
        assert len(upstream.requests) == 2
        assert (await client.get(STATUS, headers=headers)).json()["failures"] == 2


async def test_the_log_says_why_each_attempt_failed_but_not_what_was_sent(
    guarded, upstream, caplog
):
    guarded.services.settings.external_attempts = 3
    upstream.script = [raw(503, b"sekret"), b"sekret\r\n\r\n", raw(200, b"sekret")]
    problem(await guarded.get(DATA), 502, "external_service_error")
    why = [r.getMessage() for r in caplog.records if r.getMessage().startswith("upstream")]
    assert why == ["upstream: status 503", "upstream: RemoteProtocolError", "upstream: ValueError"]
    assert {r.levelname for r in caplog.records if "upstream" in r.getMessage()} == {"WARNING"}
    assert "sekret" not in caplog.text


async def test_a_retry_that_succeeds_is_a_success_and_clears_the_failures(sqlite, upstream):
    upstream.script = [raw(500), raw(500), ok(1)]
    async with serve(sqlite, external_api_url=upstream.url) as client:
        headers = await sign_in(client)
        assert (await client.get(DATA, headers=headers)).json() == {"data": 1}
        assert (await client.get(STATUS, headers=headers)).json()["failures"] == 0


async def test_a_refused_connection_is_retried(sqlite):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = "http://127.0.0.1:%d/" % closed.getsockname()[1]
        async with serve(sqlite, external_api_url=url) as client:
            headers = await sign_in(client)
            problem(await client.get(DATA, headers=headers), 502, "external_service_error")
            assert (await client.get(STATUS, headers=headers)).json()["failures"] == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 422, 451])
async def test_a_4xx_is_502_not_retried_and_a_sign_of_life(guarded, upstream, status):
    upstream.script = [raw(500), raw(500), raw(status, b"{}")]
    for failures in (1, 2, 0):
        problem(await guarded.get(DATA), 502, "external_service_error")
        assert (await guarded.get(STATUS)).json()["failures"] == failures
    guarded.services.settings.external_attempts = 3
    problem(await guarded.get(DATA), 502, "external_service_error")
    assert len(upstream.requests) == 4


async def drip(writer):
    writer.write(raw(200, b"", length=1000))
    for _ in range(100):
        writer.write(b"1")
        await writer.drain()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("entry", [hang, drip])
async def test_an_upstream_that_hangs_or_drips_is_504_within_the_attempts_time(
    guarded, upstream, entry
):
    upstream.script = [entry]
    begin = time.monotonic()
    problem(await guarded.get(DATA), 504, "external_timeout")
    assert 0.25 < time.monotonic() - begin < 1


async def test_the_deadline_bounds_the_whole_call(sqlite, upstream):
    upstream.script = [hang]
    knobs = {"external_timeout_seconds": 0.5, "external_deadline_seconds": 0.6}
    async with serve(
        sqlite, external_api_url=upstream.url, external_attempts=20, breaker_fail_max=99, **knobs
    ) as client:
        headers = await sign_in(client)
        begin = time.monotonic()
        problem(await client.get(DATA, headers=headers), 504, "external_timeout")
        assert time.monotonic() - begin < 1


@pytest.mark.parametrize("asked, calls", [("1", 2), ("0", 2), ("60", 1), ("soon", 2), ("-1", 2)])
async def test_a_retry_after_is_waited_for_when_it_fits_the_deadline(
    sqlite, upstream, asked, calls
):
    upstream.script = [raw(429, b"", f"Retry-After: {asked}\r\n"), ok(1)]
    async with serve(sqlite, external_api_url=upstream.url) as client:
        headers = await sign_in(client)
        begin = time.monotonic()
        answer = await client.get(DATA, headers=headers)
        assert len(upstream.requests) == calls
        assert answer.status_code == (200 if calls == 2 else 502)
        assert (time.monotonic() - begin >= 1) == (asked == "1")


async def test_a_retry_after_of_400_digits_is_no_retry_after(guarded, upstream):
    upstream.script = [raw(429, b"", f"Retry-After: {'9' * 400}\r\n"), ok(1)]
    guarded.services.settings.external_attempts = 2
    assert (await guarded.get(DATA)).json() == {"data": 1}


async def test_a_body_of_exactly_a_mebibyte_is_read(guarded, upstream):
    upstream.script = [raw(200, b'"' + b"x" * (2**20 - 2) + b'"')]
    assert (await guarded.get(DATA)).status_code == 200


async def test_calls_do_not_wait_for_each_others_connections(sqlite, upstream):
    all_here = asyncio.Event()

    async def wait_for_all(writer):
        if len(upstream.requests) == 101:  # one more than httpx lets through by itself
            all_here.set()
        await all_here.wait()
        writer.write(ok(1))

    upstream.script = [wait_for_all]
    async with serve(sqlite, external_api_url=upstream.url) as client:
        external = client.services.external
        assert await asyncio.gather(*[external.fetch() for _ in range(101)]) == [1] * 101


async def test_cookies_are_not_kept(guarded, upstream):
    upstream.script = [raw(200, b"1", "Set-Cookie: a=b\r\n")]
    for _ in range(2):
        assert (await guarded.get(DATA)).status_code == 200
    assert "cookie" not in "".join(upstream.requests).lower()


async def test_proxies_in_the_environment_are_not_used(sqlite, upstream, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with serve(sqlite, external_api_url=upstream.url) as client:
        assert (await client.get(DATA, headers=await sign_in(client))).status_code == 200


async def open_circuit(client, upstream):
    upstream.script = [raw(500)]
    for _ in range(3):
        problem(await client.get(DATA), 502, "external_service_error")
    upstream.requests.clear()


def turn_clock(monkeypatch, seconds):
    now = time.monotonic
    monkeypatch.setattr(service, "time", mock.Mock(wraps=time, monotonic=lambda: now() + seconds))


async def test_the_circuit_opens_after_exactly_so_many_failures_and_answers_at_once(
    guarded, upstream, caplog
):
    await open_circuit(guarded, upstream)
    answer = await guarded.get(DATA)
    problem(answer, 503, "circuit_open")
    assert answer.headers["retry-after"] == "60" and upstream.requests == []
    status = (await guarded.get(STATUS)).json()
    assert status == {"state": "open", "failures": 3, "fail_max": 3, "retry_after_seconds": 60}
    assert [r.message for r in caplog.records if "circuit" in r.message] == ["circuit_changed open"]


async def test_an_opening_circuit_ends_the_retries_at_once(sqlite, upstream):
    upstream.script = [raw(500)]
    async with serve(sqlite, external_api_url=upstream.url, breaker_fail_max=2) as client:
        headers = await sign_in(client)
        problem(await client.get(DATA, headers=headers), 502, "external_service_error")
        assert len(upstream.requests) == 2


async def test_open_stays_open_until_a_probe_whose_success_closes_it(
    guarded, upstream, monkeypatch, caplog
):
    await open_circuit(guarded, upstream)
    turn_clock(monkeypatch, 59)
    problem(await guarded.get(DATA), 503, "circuit_open")
    turn_clock(monkeypatch, 61)
    status = (await guarded.get(STATUS)).json()
    assert (status["state"], status["retry_after_seconds"]) == ("open", 0)
    upstream.script = [ok(1)]
    assert (await guarded.get(DATA)).status_code == 200
    assert (await guarded.get(STATUS)).json()["state"] == "closed"
    changes = [r.message.split()[1] for r in caplog.records if r.message.startswith("circuit")]
    assert changes == ["open", "half-open", "closed"]


async def test_a_probe_that_fails_opens_the_circuit_for_the_full_time(
    guarded, upstream, monkeypatch
):
    await open_circuit(guarded, upstream)
    turn_clock(monkeypatch, 61)
    problem(await guarded.get(DATA), 502, "external_service_error")
    assert len(upstream.requests) == 1
    status = (await guarded.get(STATUS)).json()
    assert (status["state"], status["retry_after_seconds"]) == ("open", 60)


def failure():
    return service.ExternalServiceError("external_service_error")


def outcome(result, gate=None):
    """An attempt that ends as told, once the gate is open."""

    async def attempt():
        if gate:
            await gate.wait()
        if isinstance(result, Exception):
            raise result
        return result

    return attempt


async def trip(circuit):
    while circuit.current_state != "open":
        with pytest.raises(service.ExternalServiceError):
            await circuit.run(outcome(failure()))


async def test_an_open_circuit_says_how_long_it_stays_open():
    circuit = service.Circuit(1, 60)
    await trip(circuit)
    with pytest.raises(service.ExternalServiceError) as refused:
        await circuit.run(outcome(1))
    assert refused.value.headers["Retry-After"] == "60"


async def test_a_straggler_that_ends_gives_away_no_second_probe(monkeypatch):
    circuit, gate, probe_gate = service.Circuit(1, 60), asyncio.Event(), asyncio.Event()
    straggler = asyncio.ensure_future(circuit.run(outcome(1, gate)))
    await asyncio.sleep(0)
    await trip(circuit)
    turn_clock(monkeypatch, 61)
    probe = asyncio.ensure_future(circuit.run(outcome(1, probe_gate)))
    await asyncio.sleep(0)
    gate.set()
    await straggler
    with pytest.raises(service.ExternalServiceError) as refused:
        await circuit.run(outcome(2))
    assert refused.value.code == "circuit_open"
    probe_gate.set()
    await probe


async def test_the_wall_clock_does_not_move_the_circuit(monkeypatch):
    circuit = service.Circuit(1, 60)
    await trip(circuit)
    monkeypatch.setattr(time, "time", lambda: 10**11)
    with pytest.raises(service.ExternalServiceError) as refused:
        await circuit.run(outcome(1))
    assert refused.value.code == "circuit_open" and circuit.current_state == "open"


async def test_half_open_lets_exactly_one_of_many_callers_through(monkeypatch):
    circuit, gate, calls = service.Circuit(1, 60), asyncio.Event(), []
    await trip(circuit)
    turn_clock(monkeypatch, 61)

    async def probe():
        calls.append(1)
        await gate.wait()

    callers = [asyncio.ensure_future(circuit.run(probe)) for _ in range(40)]
    done, waiting = await asyncio.wait(callers, timeout=0.1)
    assert len(calls) == len(waiting) == 1 and circuit.current_state == "half-open"
    assert {d.exception().code for d in done} == {"circuit_open"}
    assert {d.exception().headers["Retry-After"] for d in done} == {"1"}
    gate.set()
    await waiting.pop()
    assert circuit.current_state == "closed"


async def test_a_change_of_the_circuit_is_an_event_at_warning(guarded, upstream, caplog):
    await open_circuit(guarded, upstream)
    [change] = [r for r in caplog.records if "circuit" in r.message]
    assert (change.levelname, change.fields["event"]) == ("WARNING", "circuit_changed")


@pytest.mark.parametrize("late", [failure(), 1])
async def test_stragglers_from_before_a_change_of_state_change_nothing(monkeypatch, late):
    circuit, gate = service.Circuit(2, 60), asyncio.Event()
    straggler = asyncio.ensure_future(circuit.run(outcome(late, gate)))
    await asyncio.sleep(0)
    await trip(circuit)
    opened_at = circuit.retry_after_seconds
    gate.set()
    await asyncio.wait({straggler})
    straggler.exception()
    assert circuit.current_state == "open" and circuit.retry_after_seconds <= opened_at
    assert circuit.fail_counter == 2
    turn_clock(monkeypatch, 61)
    assert await circuit.run(outcome(1)) == 1 and circuit.current_state == "closed"


async def test_a_straggler_does_not_close_or_reopen_a_half_open_circuit(monkeypatch):
    for late in (1, failure()):
        circuit, gate, probe_gate = service.Circuit(1, 60), asyncio.Event(), asyncio.Event()
        straggler = asyncio.ensure_future(circuit.run(outcome(late, gate)))
        await asyncio.sleep(0)
        await trip(circuit)
        turn_clock(monkeypatch, 61)
        probe = asyncio.ensure_future(circuit.run(outcome(1, probe_gate)))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.wait({straggler})
        straggler.exception()
        assert circuit.current_state == "half-open"
        probe_gate.set()
        await probe
        assert circuit.current_state == "closed"
        monkeypatch.undo()


async def test_a_cancelled_call_counts_as_neither_and_gives_its_place_back(monkeypatch):
    circuit, never = service.Circuit(2, 60), asyncio.Event()
    with pytest.raises(service.ExternalServiceError):
        await circuit.run(outcome(failure()))
    for state in ("closed", "half-open"):
        call = asyncio.ensure_future(circuit.run(outcome(1, never)))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert circuit.current_state == state
        if state == "closed":
            assert circuit.fail_counter == 1
            await trip(circuit)
            turn_clock(monkeypatch, 61)
    assert await circuit.run(outcome(1)) == 1 and circuit.current_state == "closed"


async def test_retries_of_many_callers_at_once_do_not_mix(sqlite, upstream):
    upstream.script = [raw(500)]
    knobs = {"external_api_url": upstream.url, "breaker_fail_max": 1000}
    async with serve(sqlite, **knobs) as client:
        headers = await sign_in(client)
        await asyncio.gather(*[client.get(DATA, headers=headers) for _ in range(20)])
    assert len(upstream.requests) == 60


async def test_waits_have_full_jitter(sqlite, upstream, monkeypatch):
    waits = []

    async def sleep(seconds, original=asyncio.sleep):
        waits.append(seconds)
        await original(0)

    upstream.script = [raw(500)]
    async with serve(sqlite, external_api_url=upstream.url, breaker_fail_max=1000) as client:
        monkeypatch.setattr(asyncio, "sleep", sleep)
        for _ in range(4):
            with pytest.raises(service.ExternalServiceError):
                await client.services.external.fetch()
    waits = [wait for wait in waits if wait]
    assert len(set(waits)) == 8 and 0 < min(waits) and max(waits) <= 0.2001


async def test_the_rest_stays_quick_while_many_requests_hang_on_the_upstream(guarded, upstream):
    upstream.script = [hang]
    hanging = [asyncio.ensure_future(guarded.get(DATA)) for _ in range(150)]
    await asyncio.sleep(0.1)
    begin = time.monotonic()
    assert (await guarded.get(ME)).status_code == 200
    assert time.monotonic() - begin < 5
    statuses = {answer.status_code for answer in await asyncio.gather(*hanging)}
    assert statuses <= {503, 504}


async def test_the_demo_switch_takes_a_truth_and_nothing_like_it(sqlite):
    async with serve(sqlite, environment="development") as client:
        answer = await client.put("/demo/upstream", json={"failing": "yes"})
        problem(answer, 422, "invalid_request")


async def test_the_demo_upstream_can_be_made_to_fail_in_development_only(sqlite, upstream):
    switch = {"url": "/demo/upstream", "json": {"failing": True}}
    async with serve(sqlite, environment="development") as client:
        headers = await sign_in(client)
        assert (await client.get(DATA, headers=headers)).json()["data"]
        assert (await client.put(**switch)).status_code == 204
        problem(await client.get(DATA, headers=headers), 502, "external_service_error")
        assert (await client.put("/demo/upstream", json={"failing": False})).status_code == 204
        assert (await client.get(DATA, headers=headers)).status_code == 200
    url = upstream.url
    for knobs in ({}, {"environment": "development", "external_api_url": url}):
        async with serve(sqlite, **knobs) as client:
            problem(await client.put(**switch), 404, "not_found")
            assert "/demo/upstream" not in (await client.get("/openapi.json")).json()["paths"]


# ---- health and docs -------------------------------------------------------------------


async def test_live_asks_nothing_and_ready_asks_the_database(client, monkeypatch):
    assert (await client.get("/health/live")).json() == {"status": "ok"}
    assert (await client.get("/health/ready")).json()["status"] == "ok"

    def broken():
        raise sqlite3.OperationalError("disk I/O error")

    client.services.db.reads = (asyncio.Semaphore(1), broken)
    assert (await client.get("/health/live")).status_code == 200
    problem(await client.get("/health/ready"), 503, "database_unavailable")


async def test_the_docs_are_served(client):
    for path in ("/docs", "/redoc"):
        answer = await client.get(path)
        assert answer.status_code == 200 and "text/html" in answer.headers["content-type"]


async def operations(client):
    schema = (await client.get("/openapi.json")).json()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def examples(answer):
    return answer["content"]["application/problem+json"]["examples"].values() if answer else []


OWN_ERRORS = {REGISTER: "409", LOGIN: "401 429", CHANGE: "403 429", DATA: "502 504"}


async def test_every_operation_is_described_with_just_the_errors_that_it_can_give(sqlite):
    async with serve(sqlite, environment="development") as client:
        async for path, _, operation in operations(client):
            assert operation.get("description"), f"{path} needs a docstring"
            assert operation["summary"] and len(operation["tags"]) == 1
            found = {s: a for s, a in operation["responses"].items() if s >= "400"}
            expected = {"500", "503", *OWN_ERRORS.get(path, "").split()}
            expected |= {"401"} if path not in service.PUBLIC_PATHS else set()
            expected |= {"408", "413", "422"} if "requestBody" in operation else set()
            assert expected <= set(found), f"{path} lacks some in its answers()"
            assert path not in OWN_ERRORS or expected == set(found)
            for status, answer in found.items():
                kinds = list(answer["content"])
                assert kinds == ["application/problem+json"], f"{path}: {status} in answers()"
                assert all(str(e["value"]["status"]) == status for e in examples(answer))
                assert answer["description"]
            if path in (REGISTER, LOGIN):
                codes = {e["value"]["code"] for s in ("401", "409") for e in examples(found.get(s))}
                assert codes == {"email_taken" if path == REGISTER else "invalid_credentials"}


async def test_the_openapi_document_is_the_same_for_all(client):
    answers = [await client.get("/openapi.json", headers={"X-Request-ID": rid}) for rid in "ab"]
    assert answers[0].text == answers[1].text


async def test_the_openapi_document_knows_the_errors_shape(client):
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    assert set(schemas["Problem"]["properties"]) >= {"code", "request_id", "errors", "detail"}
    assert "HTTPValidationError" not in schemas


# ---- database --------------------------------------------------------------------------


NEXT = (FOLDER / "schema.sql").read_text().count("\n-- migration ") + 1


def scripts(monkeypatch, tmp_path, *sections):
    text = "-- intro\n" + "\n".join(f"-- migration {n}: part {n}\n{s}" for n, s in sections)
    (tmp_path / "other.sql").write_text((FOLDER / "schema.sql").read_text() + text)
    monkeypatch.setattr(service, "SCHEMA", tmp_path / "other.sql")


async def test_new_sections_run_once_and_old_data_stays(store, monkeypatch, tmp_path):
    async with serve(store) as client:
        await client.post(REGISTER, json=ADA)
    section = "CREATE TABLE scrap (t TEXT); -- a ; here\nINSERT INTO scrap VALUES ('a;b:c%d');"
    scripts(monkeypatch, tmp_path, (NEXT, section))
    for _ in range(2):
        async with serve(store) as client:
            assert await sign_in(client)
    assert await store.sql("SELECT t FROM scrap") == [("a;b:c%d",)]
    marks = await store.sql("SELECT version FROM schema_migrations ORDER BY version")
    assert marks == [(number,) for number in range(1, NEXT + 1)]


@pytest.mark.parametrize("heading", ["-- migration 4", "--Migration 4: scrap", "--  MIGRATION 4:"])
async def test_a_heading_written_in_another_way_begins_a_section_too(
    sqlite, monkeypatch, tmp_path, heading
):
    async with serve(sqlite):
        pass
    text = (FOLDER / "schema.sql").read_text() + f"\n{heading}\nCREATE TABLE scrap (t TEXT);\n"
    (tmp_path / "other.sql").write_text(text)
    monkeypatch.setattr(service, "SCHEMA", tmp_path / "other.sql")
    async with serve(sqlite):
        assert await sqlite.sql("SELECT * FROM scrap") == []


async def test_a_section_that_fails_leaves_nothing_and_is_named(store, monkeypatch, tmp_path):
    broken = "CREATE TABLE half (t TEXT); INSERT INTO nowhere VALUES (1);"
    scripts(monkeypatch, tmp_path, (NEXT, "CREATE TABLE fine (t TEXT);"), (NEXT + 1, broken))
    name = f"migration {NEXT + 1}: part {NEXT + 1}"
    with pytest.raises(service.StartError, match=f"DATABASE_URL: .*{name}: .*nowhere"):
        async with serve(store):
            pass
    assert await store.sql("SELECT * FROM fine") == []
    with pytest.raises((sqlite3.OperationalError, asyncpg.UndefinedTableError)):
        await store.sql("SELECT * FROM half")
    scripts(monkeypatch, tmp_path)
    async with serve(store) as client:
        assert await sign_in(client)


async def test_references_are_kept_by_both_databases(store, monkeypatch, tmp_path):
    tables = "CREATE TABLE owner (id TEXT PRIMARY KEY); INSERT INTO owner VALUES ('a');"
    tables += "CREATE TABLE owned (id TEXT REFERENCES owner (id)); INSERT INTO owned VALUES ('a');"
    scripts(monkeypatch, tmp_path, (NEXT, tables))
    async with serve(store) as client:
        db = client.services.db
        insert = service.sql("INSERT INTO owned (id) VALUES (:id) RETURNING id")
        assert await insert(db, id="a") == {"id": "a"}
        with pytest.raises(service.ServiceError, match="database"):
            await insert(db, id="nobody")


async def test_the_lifespan_passes_through_the_middleware(store):
    settings = service.Settings(_env_file=None, environment="test", database_url=store.url)
    messages, sent = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}], []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message["type"])

    await service.create_app(settings)({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_many_that_start_at_once_on_an_empty_database_agree(store):
    async def start():
        async with serve(store, environment="development", jwt_secret=None) as client:
            return client.services.token_secret

    assert len(set(await asyncio.gather(*[start() for _ in range(8)]))) == 1
    assert await store.sql("SELECT COUNT(*) FROM schema_migrations") == [(NEXT - 1,)]


async def test_each_look_up_has_an_index(sqlite):
    statements = []
    async with serve(sqlite) as client:
        reader = client.services.db.reads[1]().raw_connection
        await reader.set_trace_callback(statements.append)
        await client.get(ME, headers=await sign_in(client))
        await reader.set_trace_callback(None)
    assert len(statements) == 2
    for statement in statements:
        [plan] = await sqlite.sql("EXPLAIN QUERY PLAN " + statement.replace("?", "'a'"))
        assert "USING INDEX" in plan[3]


async def test_requests_at_once_each_get_their_own_user(client):
    ids = {}
    for n in range(11):
        account = {"email": f"user{n}@example.com", "password": "correct horse"}
        ids[(await client.post(REGISTER, json=account)).json()["id"]] = account["email"]
    db, asked = client.app.state.services.db, [*ids, str(uuid.uuid4()), *ids]
    users = await asyncio.gather(*(db.find_user_by_id(id=each) for each in asked))
    assert [user.get("email") for user in users] == [ids.get(each) for each in asked]


async def test_a_look_up_that_has_begun_is_not_joined(client, headers, monkeypatch):
    db, begun, gate = client.app.state.services.db, asyncio.Event(), asyncio.Event()
    user = (await client.get(ME, headers=headers)).json()["id"]
    run = service.Database.run

    async def slow_run(self, lane, execute):
        async def then_wait(connection):
            rows = await execute(connection)
            begun.set()
            await gate.wait()
            return rows

        return await run(self, lane, then_wait)

    with monkeypatch.context() as patch:
        patch.setattr(service.Database, "run", slow_run)
        early = asyncio.ensure_future(db.find_user_by_id(id=user))
        await begun.wait()
    await db.end_sessions(id=user)
    late = asyncio.ensure_future(db.find_user_by_id(id=user))
    await asyncio.sleep(0)
    gate.set()
    assert ((await early)["token_version"], (await late)["token_version"]) == (0, 1)


async def test_a_look_up_that_fails_or_is_left_stands_in_nobodys_way(client, headers, monkeypatch):
    db = client.app.state.services.db
    user = (await client.get(ME, headers=headers)).json()["id"]
    with monkeypatch.context() as patch:
        patch.setattr(db, "timeout", 0.01)
        patch.setattr(db, "reads", (anyio.Semaphore(0), None))
        for _ in range(2):
            with pytest.raises(service.ServiceError, match="database"):
                await db.find_user_by_id(id=user)
    left, stays = (asyncio.ensure_future(db.find_user_by_id(id=user)) for _ in range(2))
    await asyncio.sleep(0)
    left.cancel()
    assert (await stays)["email"] == EMAIL
    assert (await client.get(ME, headers=headers)).status_code == 200


async def test_the_sqlite_file_is_its_owners_only_and_durable(sqlite):
    before = os.umask(0)  # that of the process must not be what protects it
    async with serve(sqlite) as client:
        os.umask(before)
        assert stat.S_IMODE(os.stat(sqlite.path).st_mode) == 0o600
        _, writer = client.services.db.writes
        assert (await writer().fetch_one("PRAGMA synchronous"))[0] == 2
        assert (await writer().fetch_one("PRAGMA journal_mode"))[0] == "wal"


async def test_while_another_process_locks_sqlite_writes_are_503_and_reads_go_on(sqlite):
    async with serve(sqlite, database_timeout_seconds=0.4) as client:
        headers = await sign_in(client)
        with contextlib.closing(sqlite3.connect(sqlite.path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            begin = time.monotonic()
            bob = {**ADA, "email": "bob@example.com"}
            writes = asyncio.gather(*[client.post(REGISTER, json=bob) for _ in range(5)])
            await asyncio.sleep(0.05)
            assert (await client.get(ME, headers=headers)).status_code == 200
            assert time.monotonic() - begin < 0.35
            for answer in await writes:
                problem(answer, 503, "database_unavailable")
            assert time.monotonic() - begin < 1.5
            await asyncio.sleep(0.6)  # what was given up has ended, and is not made later
            other.execute("ROLLBACK")
        answer = await client.post(REGISTER, json={**ADA, "email": "eve@example.com"})
        assert answer.status_code == 201
        found = await sqlite.sql("SELECT email FROM users ORDER BY email")
        assert found == [(EMAIL,), ("eve@example.com",)]


async def test_statements_that_queue_too_long_are_given_up(client):
    turn = asyncio.Semaphore(0)
    client.services.db.reads = (turn, client.services.db.reads[1])
    client.services.db.timeout = 0.05
    problem(await client.get("/health/ready"), 503, "database_unavailable")
    turn.release()
    assert (await client.get("/health/ready")).status_code == 200


async def test_a_write_that_is_given_up_in_the_queue_is_not_made_later(client, store):
    db = client.services.db
    turn = asyncio.Semaphore(0)
    db.writes, db.timeout = (turn, db.writes[1]), 0.05
    problem(await client.post(REGISTER, json=ADA), 503, "database_unavailable")
    turn.release()
    await asyncio.sleep(0.2)
    assert await store.sql("SELECT * FROM users") == []


async def test_a_traceback_that_follows_a_failed_statement_does_not_show_the_drivers_text(client):
    async def fail(_):
        raise asyncpg.PostgresError("Failing row contains (sekret)")

    db = client.services.db
    with pytest.raises(ZeroDivisionError) as caught:
        try:
            await db.run(db.reads, fail)
        except service.ServiceError:
            raise ZeroDivisionError  # a bug in a route: its traceback is logged
    error = (caught.type, caught.value, caught.tb)
    text = logging.Formatter().formatException(error)
    assert "database" in text and "sekret" not in text


async def test_a_pool_that_cannot_be_closed_in_time_hides_nothing(monkeypatch):
    monkeypatch.setattr(service.Driver, "connect", mock.AsyncMock())
    monkeypatch.setattr(service.Driver, "disconnect", lambda _: asyncio.sleep(60))
    failing = mock.AsyncMock(side_effect=service.StartError("the reason"))
    monkeypatch.setattr(service.Database, "run", failing)
    with pytest.raises(service.StartError, match="the reason"):
        async with serve(Store("postgresql://127.0.0.1:1/db"), database_timeout_seconds=0.05):
            pass


async def test_what_is_given_up_and_fails_later_is_not_logged(client, caplog):
    async def fail_late(_):
        await asyncio.sleep(0.1)
        raise sqlite3.OperationalError("sekret")

    client.services.db.timeout = 0.01
    with pytest.raises(service.ServiceError, match="database"):
        await client.services.db.run(client.services.db.reads, fail_late)
    await asyncio.sleep(0.15)
    gc.collect()
    assert "TimeoutError" in caplog.text and "sekret" not in caplog.text


async def test_a_section_whose_mark_fails_leaves_nothing(store, monkeypatch, tmp_path):
    async with serve(store):
        pass
    scripts(monkeypatch, tmp_path, (NEXT, "CREATE TABLE half (t TEXT);"))
    await store.sql("ALTER TABLE schema_migrations RENAME COLUMN version TO old")
    await store.sql("ALTER TABLE schema_migrations ADD COLUMN version BIGINT")
    await store.sql("UPDATE schema_migrations SET version = old")  # old is NOT NULL: a mark fails
    with pytest.raises(service.StartError):
        async with serve(store):
            pass
    with pytest.raises((sqlite3.OperationalError, asyncpg.UndefinedTableError)):
        await store.sql("SELECT * FROM half")


async def test_a_connection_that_is_released_at_the_very_moment_of_the_timeout_is_503(monkeypatch):
    monkeypatch.setattr(asyncpg, "Connection", mock.Mock)
    raw_connection = mock.Mock()
    raw_connection.terminate.side_effect = asyncpg.InterfaceError("has been released")
    connection = mock.MagicMock(raw_connection=raw_connection)
    connection.__aenter__.return_value = connection
    db = service.Database(lambda: connection, lambda: connection, 1, 0.01)
    with pytest.raises(service.ServiceError, match="database"):
        await db.run(db.reads, lambda _: asyncio.sleep(60))
    raw_connection.terminate.assert_called_once()


async def test_a_database_that_cannot_be_used_is_named_without_its_password(tmp_path, unused_port):
    junk = b"this is not a database, but a text of some length" * 99
    (tmp_path / "junk.db").write_bytes(junk)
    for url, place in (
        (f"sqlite:///{tmp_path}/no/such/folder.db", "no/such/folder.db"),
        (f"sqlite:///{tmp_path}", str(tmp_path)),
        (f"sqlite:///{tmp_path}/junk.db", "junk.db"),
        (f"postgresql://u:hunter2@127.0.0.1:{unused_port}/db", f"127.0.0.1:{unused_port}/db"),
        ("postgresql://u:hunter2@127.0.0.1:99999/db", "postgresql://127.0.0.1:99999/db"),
    ):
        with pytest.raises(service.StartError, match="DATABASE_URL") as end:
            async with serve(Store(url)):
                pass
        assert place in str(end.value) and "hunter2" not in str(end.value)
    assert (tmp_path / "junk.db").read_bytes() == junk


async def test_the_database_of_another_application_keeps_its_tables_and_its_journal(sqlite):
    await sqlite.sql("CREATE TABLE users (name TEXT)")
    with pytest.raises(service.StartError, match="migration 1: users: table users already exists"):
        async with serve(sqlite):
            pass
    assert await sqlite.sql("PRAGMA journal_mode") == [("delete",)]
    assert await sqlite.sql("SELECT * FROM users") == []


@pytest.fixture
def unused_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield free.getsockname()[1]


if POSTGRES:

    async def test_a_locked_table_is_503_in_time_and_heals(postgres):
        async with serve(postgres, database_timeout_seconds=0.4) as client:
            headers = await sign_in(client)
            other = await asyncpg.connect(postgres.url)
            await other.execute("BEGIN; LOCK TABLE users")
            begin = time.monotonic()
            gets = [client.get(ME, headers=headers) for _ in range(10)]
            for answer in await asyncio.gather(*gets):
                problem(answer, 503, "database_unavailable")
            assert time.monotonic() - begin < 2
            await other.execute("ROLLBACK")
            await other.close()
            assert (await client.get(ME, headers=headers)).status_code == 200

    @pytest.mark.skipif("@127.0.0.1" not in POSTGRES, reason="stops processes of this machine")
    async def test_frozen_backends_are_503_in_time_and_others_take_their_place(postgres):
        only = Store(postgres.url + "?max_size=1")
        async with serve(only, database_timeout_seconds=0.5) as client:
            headers = await sign_in(client)
            pids = await postgres.sql(
                "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                "AND datname = current_database()"
            )
            for (pid,) in pids:
                os.kill(pid, signal.SIGSTOP)
            try:
                begin = time.monotonic()
                problem(await client.get(ME, headers=headers), 503, "database_unavailable")
                assert time.monotonic() - begin < 1.5
                assert (await client.get(ME, headers=headers)).status_code == 200
            finally:
                for (pid,) in pids:
                    os.kill(pid, signal.SIGCONT)

    @pytest.mark.skipif("@127.0.0.1" not in POSTGRES, reason="stops processes of this machine")
    async def test_frozen_backends_do_not_hold_up_the_stop_or_make_it_fail(postgres):
        pids = []
        try:
            async with serve(postgres, database_timeout_seconds=0.5) as client:
                await sign_in(client)
                pids = await postgres.sql(
                    "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                    "AND datname = current_database()"
                )
                for (pid,) in pids:
                    os.kill(pid, signal.SIGSTOP)
                begin = time.monotonic()
            assert pids and time.monotonic() - begin < 1.5
        finally:
            for (pid,) in pids:
                os.kill(pid, signal.SIGCONT)

    async def test_a_server_that_freezes_during_the_migration_ends_the_start(postgres, monkeypatch):
        async def freeze(connection, begin):
            await connection.fetch_one("SELECT pg_sleep(60)")

        monkeypatch.setattr(service, "migrate", freeze)
        begin = time.monotonic()
        with pytest.raises(service.StartError, match="DATABASE_URL"):
            async with serve(postgres, database_timeout_seconds=0.5):
                pass
        assert time.monotonic() - begin < 3

    async def test_connections_that_the_server_closes_are_replaced(postgres, caplog):
        async with serve(postgres) as client:
            headers = await sign_in(client)
            await postgres.sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )
            statuses = [(await client.get(ME, headers=headers)).status_code for _ in range(3)]
            assert set(statuses) <= {200, 503} and statuses[-1] == 200

    async def test_a_drivers_text_which_quotes_rows_is_not_logged(postgres, caplog):
        async with serve(postgres) as client:
            await postgres.sql("ALTER TABLE users ADD CHECK (email <> 'ada@example.com')")
            problem(await client.post(REGISTER, json=ADA), 503, "database_unavailable")
        assert "CheckViolationError" in caplog.text and EMAIL not in caplog.text


# ---- the process -----------------------------------------------------------------------


class Server:
    """A real uvicorn on a free port, with a folder and an environment of its own."""

    def __init__(self, folder, *arguments, app="service:app", output=None, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", folder / f"log-{self.port}"
        each_its_own_connection = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(
            base_url=self.url, timeout=15, verify=False, limits=each_its_own_connection
        )
        self.ask = self.http.request
        knobs = {name.upper(): str(value) for name, value in KNOBS.items()}
        knobs.update(ENVIRONMENT="", LOG_FORMAT="json", PYTHONDONTWRITEBYTECODE="1", LANG="C")
        knobs.update(PYTHONPATH=str(FOLDER), PATH=os.environ["PATH"], **environment)
        command = [sys.executable, "-m", "uvicorn", app, "--port", str(self.port), *arguments]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=knobs,
                stdout=output or log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its workers can be killed with it
            )

    def __enter__(self):
        for _ in range(200):
            with contextlib.suppress(httpx.TransportError):
                self.ask("GET", "/health/live")
                return self
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def __exit__(self, *_):
        self.http.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(15)

    def sign_in(self):
        self.ask("POST", REGISTER, json=ADA)
        token = self.ask("POST", LOGIN, json=ADA).json()["access_token"]
        return {"Authorization": f"Bearer {token}"}


async def test_the_main_walk_on_a_real_server_and_the_log_that_it_leaves(store, tmp_path, upstream):
    folder = tmp_path / "with a space"
    folder.mkdir()
    knobs = {"EXTERNAL_API_URL": upstream.url, "EXTERNAL_ATTEMPTS": "2", "BREAKER_FAIL_MAX": "2"}
    knobs.update(BREAKER_RESET_SECONDS="0.3", DATABASE_URL=store.url, LOG_LEVEL="DEBUG")
    server = Server(folder, **knobs)
    await asyncio.to_thread(server.__enter__)
    with contextlib.ExitStack() as stack:
        stack.push(server.__exit__)

        async def ask(method, path, **options):
            return await asyncio.to_thread(lambda: server.ask(method, path, **options))

        assert (await ask("POST", REGISTER, json=ADA)).status_code == 201
        problem(await ask("POST", REGISTER, json=ADA), 409, "email_taken")
        problem(
            await ask("POST", LOGIN, json={**ADA, "password": "wr0ng-one"}),
            401,
            "invalid_credentials",
        )
        token = (await ask("POST", LOGIN, json=ADA)).json()["access_token"]
        headers = {"Authorization": f"Bearer {token}"}
        assert (await ask("GET", ME, headers=headers)).json()["email"] == EMAIL
        problem(await ask("GET", ME), 401, "not_authenticated")
        assert (await ask("GET", DATA, headers=headers)).json() == {"data": {"n": 1}}
        upstream.script = [raw(500)]
        problem(await ask("GET", DATA, headers=headers), 502, "external_service_error")
        problem(await ask("GET", DATA, headers=headers), 503, "circuit_open")
        upstream.script = [ok(2)]
        await asyncio.sleep(0.35)
        assert (await ask("GET", DATA, headers=headers)).json() == {"data": 2}
        assert (await ask("GET", STATUS, headers=headers)).json()["state"] == "closed"
        change = {"current_password": PASSWORD, "new_password": "n3w password"}
        assert (await ask("PUT", CHANGE, json=change, headers=headers)).status_code == 204
        problem(await ask("GET", ME, headers=headers), 401, "invalid_token")
        assert (await asyncio.to_thread(server.stop)) in (0, -signal.SIGTERM, 143)
    lines = server.log.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(set(lines)) == len(lines) and "Shutting down" in server.log.read_text()
    assert sum(r["message"].startswith("GET /health/live") for r in records) == 1
    for secret in (
        EMAIL,
        PASSWORD,
        "wr0ng-one",
        "n3w password",
        "$2b$",
        token,
        token.split(".")[2],
    ):
        assert secret not in server.log.read_text()
    secrets = await store.sql("SELECT value FROM secrets")
    assert secrets and secrets[0][0] not in server.log.read_text()


def test_what_was_acknowledged_survives_kill_9(tmp_path):
    with Server(tmp_path) as server:
        stop, stored = threading.Event(), []

        def register():
            with httpx.Client(base_url=server.url) as client, contextlib.suppress(httpx.HTTPError):
                while not stop.is_set():
                    account = {**ADA, "email": f"u{len(stored)}-{time.time_ns()}@example.com"}
                    if client.post(REGISTER, json=account).status_code == 201:
                        stored.append(account["email"])

        thread = threading.Thread(target=register)
        thread.start()
        time.sleep(0.4)
        server.process.kill()
        stop.set()
        thread.join()
    with contextlib.closing(sqlite3.connect(tmp_path / "service.db")) as db:
        found = {email for (email,) in db.execute("SELECT email FROM users")}
        assert stored and set(stored) <= found
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_sigterm_answers_what_was_begun_and_then_ends(tmp_path):
    answers, begun = [], threading.Barrier(5)

    def register(n):
        with httpx.Client(base_url=server.url, timeout=15) as client:
            client.get("/health/live")  # so that the server knows the connection
            begun.wait()
            account = {**ADA, "email": f"{n}@example.com"}
            answers.append(client.post(REGISTER, json=account).status_code)

    with Server(tmp_path, BCRYPT_ROUNDS="12") as server:
        threads = [threading.Thread(target=register, args=[n]) for n in range(4)]
        for thread in threads:
            thread.start()
        begun.wait()
        time.sleep(0.15)
        server.stop()
        for thread in threads:
            thread.join()
    assert answers == [201] * 4


def test_a_half_sent_request_does_not_keep_a_stopping_server_alive(tmp_path):
    assert service.BODY_SECONDS == 5
    (tmp_path / "hasty.py").write_text(
        "import service\nservice.BODY_SECONDS = 0.5\napp = service.app\n"
    )
    with Server(tmp_path, "--app-dir", str(tmp_path), app="hasty:app") as server:
        with socket.create_connection(("127.0.0.1", server.port)) as half:
            half.sendall(b"POST /api/v1/auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n")
            half.sendall(b"Content-Type: application/json\r\n\r\n{")
            time.sleep(0.2)
            begin = time.monotonic()
            server.stop()
            assert time.monotonic() - begin < 4
            assert b" 408 " in half.recv(1000).split(b"\r\n")[0]


def test_a_request_that_asks_for_an_upgrade_is_like_any_other_without_its_body(tmp_path):
    upgrade = {"Connection": "Upgrade", "Sec-WebSocket-Version": "13", "X-Request-ID": "my-id"}
    upgrade["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    with Server(tmp_path, LOG_LEVEL="DEBUG") as server:
        headers = server.sign_in()
        for protocol in ("websocket", "h2c"):
            upgrade["Upgrade"] = protocol
            answer = server.ask("POST", f"{REGISTER}?token=sekret", json=ADA, headers=upgrade)
            assert problem(answer, 422, "invalid_request")["request_id"] == "my-id"
            assert server.ask("GET", ME, headers={**headers, **upgrade}).status_code == 200
        assert server.stop() in (0, -signal.SIGTERM)
    assert "sekret" not in server.log.read_text() and "Traceback" not in server.log.read_text()


def test_a_token_of_60_kilobytes_is_refused_in_the_one_shape(tmp_path):
    with Server(tmp_path) as server:
        for scheme in ("Bearer", "Basic"):
            answer = server.ask("GET", ME, headers={"Authorization": f"{scheme} {'x' * 60_000}"})
            problem(answer, 401, "invalid_token" if scheme == "Bearer" else "not_authenticated")


def test_a_log_pipe_that_is_never_read_stalls_neither_the_service_nor_its_exit(tmp_path):
    reader, writer = os.pipe()
    server = Server(tmp_path, output=writer)
    os.close(writer)
    with server, httpx.Client(base_url=server.url) as client:
        for _ in range(250):  # more than a pipe holds
            assert client.get("/" + "x" * 499).status_code == 404
        begin = time.monotonic()
        server.stop()
        assert time.monotonic() - begin < 5
    os.close(reader)


def test_lines_that_still_wait_at_the_stop_are_written(tmp_path):
    reader, writer = os.pipe()
    server = Server(tmp_path, output=writer)
    os.close(writer)
    with server, httpx.Client(base_url=server.url) as client:
        for n in range(250):  # more than a pipe holds
            assert client.get(f"/{n:03}" + "x" * 490).status_code == 404
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # whoever reads was busy
        with open(reader, "rb") as pipe:
            assert pipe.read().count(b'"path": "/') >= 250
        server.process.wait(15)


def test_several_workers_share_secret_throttle_and_logout(tmp_path):
    with Server(tmp_path, "--workers", "2") as server:
        headers = server.sign_in()
        assert {server.ask("GET", ME, headers=headers).status_code for _ in range(12)} == {200}
        wrong = {**ADA, "password": "wrong"}
        statuses = [server.ask("POST", LOGIN, json=wrong).status_code for _ in range(8)]
        assert statuses == [401] * 5 + [429] * 3
        assert server.ask("POST", LOGOUT, headers=headers).status_code == 204
        assert {server.ask("GET", ME, headers=headers).status_code for _ in range(12)} == {401}
        server.stop()
    assert "Traceback" not in server.log.read_text()


def test_a_start_that_fails_says_why_in_one_line_and_ends(tmp_path):
    started = []
    for name, value, place in (
        ("JWT_SECRET", "hunter2", "JWT_SECRET"),
        ("DATABASE_URL", "sqlite:////no/such/folder/x.db", "/no/such/folder/x.db"),
        ("DATABASE_URL", "postgresql://u:hunter2@127.0.0.1:1/db", "127.0.0.1:1/db"),
        ("DATABASE_URL", "postgresql://u:hunter2@127.0.0.1:99999/db", "127.0.0.1:99999/db"),
    ):
        server = Server(tmp_path, LOG_LEVEL="CRITICAL", **{name: value})
        started.append((server, name, place))
    for server, name, place in started:
        try:
            assert server.process.wait(15) != 0
        finally:
            server.__exit__()
        log = server.log.read_text()
        assert "Traceback" not in log and "hunter2" not in log
        assert len([line for line in log.splitlines() if place in line and name in line]) == 1


def normal(text):
    """Ids and times as in no run."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}", "ID", text)
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text).strip()


def test_the_readmes_walk_gives_what_the_readme_shows(tmp_path):
    blocks = re.findall(r"```console\n(.*?)```", (FOLDER / "README.md").read_text(), re.S)
    steps = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", "".join(blocks), re.M)
    with Server(tmp_path, BREAKER_RESET_SECONDS="1") as server:
        script = "".join(f"{command}\necho; echo @@\n" for command, _ in steps)
        script = script.replace("http://127.0.0.1:8000", server.url).replace(
            "sleep 31", "sleep 1.1"
        )
        run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    shown = [normal(answer) for _, answer in steps]
    found = [normal(answer) for answer in run.stdout.split("@@")[:-1]]
    assert len(shown) > 15 and found == shown, "README.md, A walk"


def test_importing_the_service_writes_nothing(tmp_path):
    environment = {"PYTHONPATH": str(FOLDER), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(
        [sys.executable, "-c", "import service"], cwd=tmp_path, env=environment, check=True
    )
    assert list(tmp_path.iterdir()) == []


# ---- the text --------------------------------------------------------------------------


async def test_every_operation_is_protected_unless_it_is_listed_as_public(sqlite):
    async with serve(sqlite, environment="development") as client:
        found = [o async for o in operations(client)]
        for path, method, operation in found:
            assert bool(operation.get("security")) == (path not in service.PUBLIC_PATHS)
            if path not in service.PUBLIC_PATHS:
                answer = await client.request(method, path)
                problem(answer, 401, "not_authenticated")
    documented = {path for path, _, _ in found} | {"/docs", "/redoc", "/openapi.json"}
    assert service.PUBLIC_PATHS <= documented
    for path in (ME, CHANGE, LOGOUT, DATA, STATUS):
        assert path not in service.PUBLIC_PATHS


def table(heading):
    """The rows of the first table under a heading of the README."""
    text = (FOLDER / "README.md").read_text().partition(f"\n## {heading}\n")[2]
    rows = re.search(r"(?:^\|.*\n)+", text, re.M).group().splitlines()[2:]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]


def defaults():
    for name, field in service.Settings.model_fields.items():
        yield name.upper(), "" if field.default is None else str(field.default)


def test_the_readmes_settings_are_the_services():
    found = [(name, default.replace("–", "")) for name, default, *_ in table("Settings")]
    assert found == list(defaults()), "README.md, Settings: a row for each field, in its order"


def test_the_example_of_an_env_file_has_every_setting_with_its_default():
    lines = (FOLDER / ".env.example").read_text().splitlines()
    found = [tuple(line.split("=", 1)) for line in lines if line and not line.startswith("#")]
    assert found == list(defaults()), ".env.example: a line for each field, in its order"


def test_the_readmes_errors_are_the_services():
    found = {code: int(status) for code, status, *_ in table("Errors")}
    known = {code: status for code, (status, _) in service.ERRORS.items()}
    assert found == known, "README.md, Errors: a row for each line in ERRORS"


async def test_the_readmes_endpoints_are_the_services(sqlite):
    async with serve(sqlite, environment="development") as client:
        found = {f"{method.upper()} {path}" async for path, method, _ in operations(client)}
    listed = {call for call, *_ in table("Endpoints")} - {"GET /docs, /redoc, /openapi.json"}
    assert listed == found, "README.md, Endpoints: a row for each route"


@pytest.mark.skipif("BUDGET" not in os.environ, reason="of what is taught, not of what grows")
def test_the_budget_holds():
    source = (FOLDER / "service.py").read_text()
    lines, tree, text, lengths = source.splitlines(), ast.parse(source), set(), []
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node):
            text.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, kinds[2:]):
            lengths.append(node.end_lineno - node.lineno + 1)
    code = [n for n, line in enumerate(lines, 1) if line.strip() and line.lstrip()[0] != "#"]
    assert len(set(code) - text) <= 650 and len(lines) <= 900
    assert max(lengths) <= 40 and statistics.median(lengths) <= 9
    assert max(map(len, lines)) <= 100
    assert len((FOLDER / "README.md").read_text().splitlines()) < 250


# ---- the benchmark ---------------------------------------------------------------------


def send_gets(port, paths, headers, seconds, connections=16, pause=0.0):
    """Send GETs over kept-alive sockets for so long; return their times in seconds."""
    times, ends = [], time.monotonic() + seconds

    def client(n):
        path = paths[n % len(paths)]
        lines = [f"GET {path} HTTP/1.1", "Host: x", *(f"{k}: {v}" for k, v in headers.items())]
        request = ("\r\n".join(lines) + "\r\n\r\n").encode()
        with socket.create_connection(("127.0.0.1", port)) as sock:
            while time.monotonic() < ends:
                begin = time.perf_counter()
                sock.sendall(request)
                head, _, rest = sock.recv(65536).partition(b"\r\n\r\n")
                missing = int(re.search(rb"content-length: (\d+)", head)[1]) - len(rest)
                while missing > 0:
                    missing -= len(sock.recv(65536))
                times.append(time.perf_counter() - begin)
                time.sleep(pause)

    threads = [threading.Thread(target=client, args=[n]) for n in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def cpu_each(server, path, headers, seconds=4):
    """Server CPU for one request, in microseconds; the server and its clients have a core each."""
    cores = sorted(os.sched_getaffinity(0))
    for task in os.listdir(f"/proc/{server.process.pid}/task"):
        os.sched_setaffinity(int(task), cores[:1])
    os.sched_setaffinity(0, cores[-1:])
    send_gets(server.port, [path], headers, 1)

    def used():
        fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    begin = used()
    count = len(send_gets(server.port, [path], headers, seconds))
    spent = used() - begin
    os.sched_setaffinity(0, cores)
    for task in os.listdir(f"/proc/{server.process.pid}/task"):
        os.sched_setaffinity(int(task), cores)
    return spent / count * 1e6


def p99(times):
    return sorted(times)[int(len(times) * 0.99)] * 1000


@contextlib.contextmanager
def logins(server, users):
    """As many clients log in without pause; yields the list of what was done."""
    done, stop = [], threading.Event()

    def client(account):
        with httpx.Client(base_url=server.url, timeout=60) as http:
            while not stop.is_set():
                done.append(http.post(LOGIN, json=account).status_code)

    threads = [threading.Thread(target=client, args=[account]) for account in users]
    for thread in threads:
        thread.start()
    yield done
    stop.set()
    for thread in threads:
        thread.join()


def hashes_each_second(seconds=8):
    """What bcrypt alone reaches on these cores."""
    count, ends = [], time.monotonic() + seconds

    def work():
        while time.monotonic() < ends:
            bcrypt.hashpw(b"x" * 64, bcrypt.gensalt(12))
            count.append(1)

    threads = [threading.Thread(target=work) for _ in range(os.cpu_count())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(count) / seconds


@pytest.mark.benchmark
async def test_benchmark(store, tmp_path, capsys):
    bare = "from fastapi import FastAPI\napp = FastAPI()\n\n\n@app.get('/')\nasync def f():\n"
    (tmp_path / "bare.py").write_text(
        bare + "    return {'id': 'x' * 36}\n\n\napp.get('/health/live')(f)\n"
    )
    with Server(tmp_path, "--no-access-log", "--app-dir", str(tmp_path), app="bare:app") as server:
        floor = cpu_each(server, "/", {})
    knobs = {"BCRYPT_ROUNDS": "12", "LOGIN_MAX_FAILURES": "1000000", "DATABASE_URL": store.url}
    with Server(tmp_path, BREAKER_RESET_SECONDS="3600", **knobs) as server:
        headers = server.sign_in()
        users = [{**ADA, "email": f"{n}@example.com"} for n in range(16)]
        for user in users:
            server.ask("POST", REGISTER, json=user)
        me = cpu_each(server, ME, headers)
        server.ask("PUT", "/demo/upstream", json={"failing": True})
        for _ in range(3):
            server.ask("GET", DATA, headers=headers)
        circuit = cpu_each(server, DATA, headers)
        idle = p99(send_gets(server.port, [ME], headers, 4, 1, 0.005))
        limit = hashes_each_second()
        with logins(server, users) as done:
            time.sleep(2)
            begin, count = time.monotonic(), len(done)
            time.sleep(25)
            rate = (len(done) - count) / (time.monotonic() - begin)
            busy = p99(send_gets(server.port, [ME], headers, 10, 1, 0.005))
        assert set(done) == {200}
        rss = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())
    with capsys.disabled():
        print(f"\n\n{store.url.partition(':')[0]:32} CPU us  x bare route")
        for name, each in (
            ("bare FastAPI route", floor),
            ("GET me", me),
            ("open circuit", circuit),
        ):
            print(f"{name:32} {each:6.0f}  {each / floor:6.2f}")
        print(f"logins a second                  {rate:6.2f}  {rate / limit:6.2f} of bcrypt alone")
        print(f"p99 of GET me, idle              {idle:6.1f} ms")
        print(f"p99 of GET me, 16 logging in     {busy:6.1f} ms")
        print(f"memory                           {int(rss[1]) / 1024:6.0f} MiB")
