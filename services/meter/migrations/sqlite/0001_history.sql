-- One-second panes per deployment, what was ready when, which seconds are covered, and the meter's
-- own state. Nothing here is in the log, and nothing here is needed to serve.

CREATE TABLE panes (
    endpoint TEXT NOT NULL,
    deployment TEXT NOT NULL,
    second BIGINT NOT NULL,
    role TEXT NOT NULL,
    doc TEXT NOT NULL
);
-- Not unique: what comes late for a second is another row, and rows of a second add up.
CREATE INDEX panes_of_deployment ON panes (endpoint, deployment, second);
CREATE INDEX panes_by_second ON panes (second);

-- Instances ready from this second on.
CREATE TABLE ready (
    endpoint TEXT NOT NULL,
    deployment TEXT NOT NULL,
    second BIGINT NOT NULL,
    instances BIGINT NOT NULL,
    PRIMARY KEY (endpoint, deployment, second)
) WITHOUT ROWID;

-- Seconds, from start up to but without end, of which every gateway has told.
CREATE TABLE coverage (
    bucket INTEGER NOT NULL,
    start BIGINT NOT NULL,
    "end" BIGINT NOT NULL,
    PRIMARY KEY (bucket, start)
) WITHOUT ROWID;

-- The open minute of each bucket.
CREATE TABLE open (
    bucket INTEGER NOT NULL PRIMARY KEY,
    doc TEXT NOT NULL
);

CREATE TABLE meta (
    key TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;
