-- The log, what is derived from it, and how far its readers have come.
-- Column types are portable (TEXT, BIGINT, INTEGER); only `INTEGER PRIMARY KEY`, which makes the
-- position SQLite's own row number, and `WITHOUT ROWID` are particular to this dialect.

CREATE TABLE meta (
    key TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
);

CREATE TABLE events (
    position INTEGER PRIMARY KEY,
    prev BIGINT NOT NULL,
    bucket INTEGER NOT NULL,
    stream TEXT NOT NULL,
    version BIGINT NOT NULL,
    id TEXT NOT NULL,
    type TEXT NOT NULL,
    type_version INTEGER NOT NULL,
    time BIGINT NOT NULL,
    actor TEXT NOT NULL,
    data TEXT NOT NULL
);
CREATE UNIQUE INDEX events_by_stream ON events (stream, version);
CREATE UNIQUE INDEX events_by_id ON events (id);
CREATE INDEX events_by_bucket ON events (bucket, position);

CREATE TABLE rows (
    model TEXT NOT NULL,
    key TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    deployment TEXT NOT NULL,
    position BIGINT NOT NULL,
    time BIGINT NOT NULL,
    doc TEXT NOT NULL,
    PRIMARY KEY (model, key)
) WITHOUT ROWID;
CREATE INDEX rows_newest ON rows (model, position);
CREATE INDEX rows_newest_of_endpoint ON rows (model, endpoint, position);
CREATE INDEX rows_newest_of_deployment ON rows (model, endpoint, deployment, position);

CREATE TABLE cursors (
    consumer TEXT NOT NULL,
    bucket INTEGER NOT NULL,
    position BIGINT NOT NULL,
    PRIMARY KEY (consumer, bucket)
) WITHOUT ROWID;

CREATE TABLE fences (
    name TEXT NOT NULL PRIMARY KEY,
    generation BIGINT NOT NULL
) WITHOUT ROWID;

CREATE TABLE causes (
    key TEXT NOT NULL PRIMARY KEY,
    body_hash TEXT NOT NULL,
    result TEXT,
    positions TEXT NOT NULL,
    time BIGINT NOT NULL
) WITHOUT ROWID;
CREATE INDEX causes_by_time ON causes (time);
