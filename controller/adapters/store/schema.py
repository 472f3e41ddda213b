"""The tables of the store, as they have grown. Only statements that make them belong here."""

MIGRATIONS = (
    """
    CREATE TABLE meta (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        now REAL NOT NULL, boot TEXT NOT NULL,
        revision INTEGER NOT NULL, next_change INTEGER NOT NULL, next_epoch INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE peer (
        upstream TEXT NOT NULL, server TEXT NOT NULL, document TEXT NOT NULL,
        PRIMARY KEY (upstream, server)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE change (
        id INTEGER PRIMARY KEY,
        kind TEXT NOT NULL, upstream TEXT NOT NULL, status TEXT NOT NULL, forced INTEGER NOT NULL,
        created_at REAL NOT NULL, ended_at REAL, error TEXT NOT NULL,
        document TEXT
    ) STRICT;
    CREATE INDEX change_unfinished ON change (id) WHERE document IS NOT NULL;
    CREATE TABLE step (
        change INTEGER NOT NULL REFERENCES change (id), position INTEGER NOT NULL,
        name TEXT NOT NULL, server TEXT NOT NULL, batch INTEGER NOT NULL, state TEXT NOT NULL,
        started_at REAL, ended_at REAL, detail TEXT NOT NULL,
        PRIMARY KEY (change, position)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE event (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL,
        upstream TEXT NOT NULL, server TEXT NOT NULL, change INTEGER
    ) STRICT;
    """,
    """
    CREATE INDEX event_server ON event (upstream, server, id);
    CREATE INDEX event_time ON event (upstream, at);
    CREATE INDEX step_server ON step (server, change);
    CREATE TABLE series (
        id INTEGER PRIMARY KEY, upstream TEXT NOT NULL, server TEXT NOT NULL, UNIQUE (upstream, server)
    ) STRICT;
    CREATE TABLE traffic (
        series INTEGER NOT NULL REFERENCES series (id), at INTEGER NOT NULL,
        requests REAL NOT NULL, answered REAL NOT NULL, errors REAL NOT NULL, failures REAL NOT NULL,
        seconds REAL NOT NULL, in_flight INTEGER NOT NULL,
        PRIMARY KEY (series, at)
    ) STRICT, WITHOUT ROWID;
    """,
    """
    ALTER TABLE change ADD COLUMN plan TEXT;
    ALTER TABLE change ADD COLUMN outcome TEXT;
    CREATE INDEX change_unjudged ON change (id) WHERE plan IS NOT NULL AND outcome IS NULL;
    """,
    """
    ALTER TABLE change ADD COLUMN batch INTEGER;
    ALTER TABLE change ADD COLUMN max_unavailable INTEGER;
    ALTER TABLE change ADD COLUMN workers INTEGER;
    """,
)
"""One script a schema version; `PRAGMA user_version` says how many have been run."""
