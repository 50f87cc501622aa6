-- What the windows of rules need besides panes: which seconds were measured by each kind of source, and
-- the instances of deployments whose rules read them.

-- Seconds, from start up to but without end, that were measured: partial if some source was missing.
CREATE TABLE history_measured (
    bucket BIGINT NOT NULL,
    kind TEXT NOT NULL,
    start BIGINT NOT NULL,
    "end" BIGINT NOT NULL,
    partial BIGINT NOT NULL,
    length_us BIGINT NOT NULL,
    PRIMARY KEY (bucket, kind, start)
);

-- All instances of a deployment in the seconds from start up to but without end.
CREATE TABLE history_instances (
    endpoint TEXT NOT NULL,
    deployment TEXT NOT NULL,
    start BIGINT NOT NULL,
    "end" BIGINT NOT NULL,
    doc TEXT NOT NULL,
    PRIMARY KEY (endpoint, deployment, start)
);
CREATE INDEX history_instances_by_end ON history_instances ("end");
