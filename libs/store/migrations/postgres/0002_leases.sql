-- Who holds a fence as a lease, and until when (milliseconds since 1970).

ALTER TABLE fences ADD COLUMN holder TEXT COLLATE "C";
ALTER TABLE fences ADD COLUMN expires BIGINT;
