-- One-second panes per deployment, what was ready when, and which seconds are covered. Nothing here
-- is in the log, and nothing here is needed to serve. The tables stand beside the log's.

CREATE TABLE history_panes (
    endpoint TEXT COLLATE "C" NOT NULL,
    deployment TEXT COLLATE "C" NOT NULL,
    second BIGINT NOT NULL,
    role TEXT COLLATE "C" NOT NULL,
    doc TEXT COLLATE "C" NOT NULL
);
-- Not unique: what comes late for a second is another row, and rows of a second add up.
CREATE INDEX history_panes_of_deployment ON history_panes (endpoint, deployment, second);
CREATE INDEX history_panes_by_second ON history_panes (second);

-- Instances ready from this second on.
CREATE TABLE history_ready (
    endpoint TEXT COLLATE "C" NOT NULL,
    deployment TEXT COLLATE "C" NOT NULL,
    second BIGINT NOT NULL,
    instances BIGINT NOT NULL,
    PRIMARY KEY (endpoint, deployment, second)
);

-- Seconds, from start up to but without end, of which every gateway has told.
CREATE TABLE history_coverage (
    bucket BIGINT NOT NULL,
    start BIGINT NOT NULL,
    "end" BIGINT NOT NULL,
    PRIMARY KEY (bucket, start)
);
