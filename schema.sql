-- The schema, as numbered migrations. The same file works on SQLite and on PostgreSQL.
--
-- At startup, the service runs every section that this database has not run yet, in order.
-- Each section runs in its own transaction, which also records its number in the table
-- schema_migrations. The numbers are 1, 2, 3 and so on.
--
-- To change the schema, add a section at the end, with the next number. Never change a
-- section that has run anywhere: nobody would run it again.
--
-- Use the types TEXT and BIGINT only. The service writes the times: as RFC 3339 text in UTC
-- where people read them, as whole seconds since 1970 where SQL compares them. AUTOINCREMENT,
-- SERIAL, NOW() and LOWER() do not mean the same on both databases, so avoid them.


-- migration 1: users
-- One row for each account.
CREATE TABLE users (
    id             TEXT   NOT NULL PRIMARY KEY,  -- a random UUID; the claim `sub` of a token
    email          TEXT   NOT NULL UNIQUE,       -- in lower case; UNIQUE leads to the 409
    password_hash  TEXT   NOT NULL,              -- bcrypt of an HMAC-SHA-256 of the password
    token_version  BIGINT NOT NULL DEFAULT 0,    -- a token with another version is refused
    created_at     TEXT   NOT NULL               -- RFC 3339, UTC
);


-- migration 2: login attempts
-- One row for each email and address that tries to log in, and one row with the address '*'
-- for all addresses together. An attempt is counted before the password is checked. If the
-- password is right, the row of the address goes back to 0, and the row '*' goes down by
-- one.
CREATE TABLE login_attempts (
    email           TEXT   NOT NULL,             -- in lower case; it need not have an account
    address         TEXT   NOT NULL,             -- of the client, or '*'
    attempts        BIGINT NOT NULL,             -- in the current window
    window_ends_at  BIGINT NOT NULL,             -- seconds since 1970; then counting restarts
    PRIMARY KEY (email, address)                 -- makes the upsert that counts atomic
);
CREATE INDEX login_attempts_by_end ON login_attempts (window_ends_at);


-- migration 3: secrets
-- Values that the service made up and must remember: in development, the key that signs
-- tokens.
CREATE TABLE secrets (
    name   TEXT NOT NULL PRIMARY KEY,
    value  TEXT NOT NULL
);
