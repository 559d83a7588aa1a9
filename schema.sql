-- The schema, as numbered migrations: one section each, for SQLite and PostgreSQL alike.
--
-- At start every section that this database has not seen runs once, in order, each in a
-- transaction of its own together with its mark in schema_migrations. To change the schema,
-- add a section at the end with the next number; never edit one that has run anywhere.
--
-- Both databases read this file, so: TEXT and BIGINT columns, times written by the service
-- (RFC 3339 text in UTC where people read them, whole epoch seconds where SQL compares them),
-- no AUTOINCREMENT, SERIAL, NOW() or LOWER().


-- migration 1: users
-- One row per account.
CREATE TABLE users (
    id             TEXT   NOT NULL PRIMARY KEY,  -- a random UUID, the `sub` of its tokens
    email          TEXT   NOT NULL UNIQUE,       -- in lower case: UNIQUE is what answers 409
    password_hash  TEXT   NOT NULL,              -- bcrypt of an HMAC-SHA-256 of the password
    token_version  BIGINT NOT NULL DEFAULT 0,    -- a token that carries another one is refused
    created_at     TEXT   NOT NULL               -- RFC 3339, UTC
);


-- migration 2: login attempts
-- One row for each email and address that tries to log in, and one with address '*' for all
-- addresses together. It counts the attempts of a window that have not (yet) succeeded.
CREATE TABLE login_attempts (
    email           TEXT   NOT NULL,             -- in lower case, too; of an account or of none
    address         TEXT   NOT NULL,
    attempts        BIGINT NOT NULL,
    window_ends_at  BIGINT NOT NULL,             -- epoch seconds; afterwards the row means nothing
    PRIMARY KEY (email, address)                 -- the upsert that counts needs it to be atomic
);
CREATE INDEX login_attempts_by_end ON login_attempts (window_ends_at);


-- migration 3: secrets
-- What the service made up itself and must remember: the key that signs tokens in development.
CREATE TABLE secrets (
    name   TEXT NOT NULL PRIMARY KEY,
    value  TEXT NOT NULL
);
