-- Files that hold the beginning of the log, one after the other, and need not be in the table any more.

CREATE TABLE archives (
    first_position BIGINT NOT NULL,
    last_position BIGINT NOT NULL PRIMARY KEY,
    file TEXT COLLATE "C" NOT NULL,
    hash TEXT COLLATE "C" NOT NULL,
    events BIGINT NOT NULL,
    bytes BIGINT NOT NULL,
    sealed_at BIGINT NOT NULL
);
