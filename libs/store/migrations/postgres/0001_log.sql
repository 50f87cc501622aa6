-- The log, what is derived from it, and how far its readers have come.
-- Texts are compared byte by byte (collation "C"), so that their order is that of the other
-- database, whatever locale this one was made with.

CREATE TABLE meta (
    key TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    value TEXT COLLATE "C" NOT NULL
);

CREATE TABLE events (
    position BIGINT NOT NULL PRIMARY KEY,
    prev BIGINT NOT NULL,
    bucket BIGINT NOT NULL,
    stream TEXT COLLATE "C" NOT NULL,
    version BIGINT NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    type TEXT COLLATE "C" NOT NULL,
    type_version BIGINT NOT NULL,
    time BIGINT NOT NULL,
    actor TEXT COLLATE "C" NOT NULL,
    data TEXT COLLATE "C" NOT NULL
);
CREATE UNIQUE INDEX events_by_stream ON events (stream, version);
CREATE UNIQUE INDEX events_by_id ON events (id);
CREATE INDEX events_by_bucket ON events (bucket, position);

CREATE TABLE rows (
    model TEXT COLLATE "C" NOT NULL,
    key TEXT COLLATE "C" NOT NULL,
    endpoint TEXT COLLATE "C" NOT NULL,
    deployment TEXT COLLATE "C" NOT NULL,
    position BIGINT NOT NULL,
    time BIGINT NOT NULL,
    doc TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (model, key)
);
CREATE INDEX rows_newest ON rows (model, position);
CREATE INDEX rows_newest_of_endpoint ON rows (model, endpoint, position);
CREATE INDEX rows_newest_of_deployment ON rows (model, endpoint, deployment, position);

CREATE TABLE cursors (
    consumer TEXT COLLATE "C" NOT NULL,
    bucket BIGINT NOT NULL,
    position BIGINT NOT NULL,
    PRIMARY KEY (consumer, bucket)
);

CREATE TABLE fences (
    name TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    generation BIGINT NOT NULL
);

CREATE TABLE causes (
    key TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    body_hash TEXT COLLATE "C" NOT NULL,
    result TEXT COLLATE "C",
    positions TEXT COLLATE "C" NOT NULL,
    time BIGINT NOT NULL
);
CREATE INDEX causes_by_time ON causes (time);
