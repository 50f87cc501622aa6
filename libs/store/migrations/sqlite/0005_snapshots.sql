-- What a consumer of the log has folded of a bucket, up to a position, in parts: one for each endpoint.
-- Parts lie in pages of a table, as rows do: their documents are large.

CREATE TABLE snapshots (
    consumer TEXT NOT NULL,
    bucket INTEGER NOT NULL,
    version BIGINT NOT NULL,
    position BIGINT NOT NULL,
    event_hash BLOB,
    hash TEXT NOT NULL,
    PRIMARY KEY (consumer, bucket)
) WITHOUT ROWID;

CREATE TABLE snapshot_parts (
    consumer TEXT NOT NULL,
    bucket INTEGER NOT NULL,
    key TEXT NOT NULL,
    doc TEXT NOT NULL,
    PRIMARY KEY (consumer, bucket, key)
);
