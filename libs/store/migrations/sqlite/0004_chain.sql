-- The hash of the event before it in its bucket, 32 bytes. Older events get theirs in pages, outside
-- of this file; until all have one, the store's format stays what it was.

ALTER TABLE events ADD COLUMN prev_hash BLOB;
