-- What a consumer of the log has folded of a bucket, up to a position, in parts: one for each endpoint.

CREATE TABLE snapshots (
    consumer TEXT COLLATE "C" NOT NULL,
    bucket BIGINT NOT NULL,
    version BIGINT NOT NULL,
    position BIGINT NOT NULL,
    event_hash BYTEA,
    hash TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (consumer, bucket)
);

CREATE TABLE snapshot_parts (
    consumer TEXT COLLATE "C" NOT NULL,
    bucket BIGINT NOT NULL,
    key TEXT COLLATE "C" NOT NULL,
    doc TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (consumer, bucket, key)
);
