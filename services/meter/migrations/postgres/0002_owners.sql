-- The open minute of each bucket, the newest ownership known, up to which position of the log changes
-- of what is ready are saved, and before which second panes are.

CREATE TABLE history_open (
    bucket BIGINT NOT NULL PRIMARY KEY,
    generation BIGINT NOT NULL,
    ready_through BIGINT NOT NULL,
    panes_before BIGINT NOT NULL,
    doc TEXT COLLATE "C" NOT NULL
);
