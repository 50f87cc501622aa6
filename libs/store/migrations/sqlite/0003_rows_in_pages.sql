-- Rows lie in pages of a table, several to a page. As entries of the primary key (WITHOUT ROWID) each
-- document of more than 1,000 bytes had a page of 4 KiB to itself, and every index held the key again.

CREATE TABLE rows_in_pages (
    model TEXT NOT NULL,
    key TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    deployment TEXT NOT NULL,
    position BIGINT NOT NULL,
    time BIGINT NOT NULL,
    doc TEXT NOT NULL,
    PRIMARY KEY (model, key)
);
INSERT INTO rows_in_pages (model, key, endpoint, deployment, position, time, doc)
    SELECT model, key, endpoint, deployment, position, time, doc FROM rows ORDER BY model, key;
DROP TABLE rows;
ALTER TABLE rows_in_pages RENAME TO rows;
CREATE INDEX rows_newest ON rows (model, position);
CREATE INDEX rows_newest_of_endpoint ON rows (model, endpoint, position);
CREATE INDEX rows_newest_of_deployment ON rows (model, endpoint, deployment, position);
