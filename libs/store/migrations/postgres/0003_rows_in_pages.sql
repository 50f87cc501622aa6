-- What SQLite needs here, this database has always done.

SELECT 1;
