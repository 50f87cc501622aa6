-- The names that the tables have in a database shared with the log, and open minutes with the
-- ownership under which they were counted.

ALTER TABLE panes RENAME TO history_panes;
ALTER TABLE ready RENAME TO history_ready;
ALTER TABLE coverage RENAME TO history_coverage;

-- The open minute of each bucket, the newest ownership known (0: of a release that did not write
-- it), up to which position of the log changes of what is ready are saved, and before which second
-- panes are.
CREATE TABLE history_open (
    bucket BIGINT NOT NULL PRIMARY KEY,
    generation BIGINT NOT NULL,
    ready_through BIGINT NOT NULL,
    panes_before BIGINT NOT NULL,
    doc TEXT NOT NULL
);
INSERT INTO history_open (bucket, generation, ready_through, panes_before, doc)
SELECT
    bucket,
    COALESCE(json_extract(doc, '$.generation'), 0),
    COALESCE((SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'position'), 0),
    COALESCE((SELECT MAX(second) + 1 FROM history_panes), 0),
    doc
FROM open;
DROP TABLE open;
DROP TABLE meta;
