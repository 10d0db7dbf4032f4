-- The facts of a library. The vectors are in files of their own: the vector of image i is row
-- i - 1 of vectors-M.f16, M being the id of a model.

-- At most one model is active: its vectors are searched. `rows` is the number of rows of its
-- vector file that count; rows beyond it belong to a write that was never committed.
CREATE TABLE models (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,                -- a model's name or path, as `load` takes it
    fingerprint TEXT NOT NULL,
    derived_from TEXT,
    precision TEXT NOT NULL,
    fast_decode INTEGER NOT NULL,
    dim INTEGER NOT NULL,
    logit_scale REAL NOT NULL,
    rows INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL CHECK (state IN ('active', 'building', 'kept')),
    created TEXT NOT NULL
);
CREATE UNIQUE INDEX one_active_model ON models (state) WHERE state = 'active';

-- Images that a model has no vector of: their rows are zero.
CREATE TABLE missing (
    model INTEGER NOT NULL REFERENCES models,
    image INTEGER NOT NULL,
    PRIMARY KEY (model, image)
) WITHOUT ROWID;

-- What was indexed: a folder, or a source of image-text pairs.
CREATE TABLE roots (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('folder', 'source')),
    location BLOB NOT NULL UNIQUE,     -- the path, or the URI
    include TEXT NOT NULL,             -- JSON lists of globs
    exclude TEXT NOT NULL,
    hidden INTEGER NOT NULL,
    stamp TEXT                         -- of a source's files when it was last read to its end
);

-- Each distinct content once. Ids are never used again.
CREATE TABLE images (
    id INTEGER PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,       -- BLAKE2b of the file, 16 bytes
    bytes INTEGER NOT NULL,
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    taken TEXT,                        -- EXIF date, 2024-05-01T12:00:00, in the camera's time zone
    latitude REAL,
    longitude REAL,
    look BLOB,                         -- perceptual hash, for near-duplicates
    text TEXT,                         -- recognised in the image; NULL: not yet looked for
    files INTEGER NOT NULL DEFAULT 0   -- files that have this content now
);
CREATE INDEX images_without_files ON images (id) WHERE files = 0;
CREATE INDEX images_without_text ON images (id) WHERE text IS NULL;

CREATE TABLE files (
    id INTEGER PRIMARY KEY,
    root INTEGER NOT NULL REFERENCES roots,
    name BLOB NOT NULL,                -- relative path of a file, or the image id in a source
    position INTEGER,                  -- first row of the image in a source
    size INTEGER NOT NULL,
    mtime INTEGER NOT NULL,            -- nanoseconds
    image INTEGER REFERENCES images,   -- NULL: unreadable, see error
    error TEXT,
    caption TEXT,
    present INTEGER NOT NULL DEFAULT 1,
    UNIQUE (root, name)
);
CREATE INDEX files_of_image ON files (image);

CREATE TRIGGER file_added AFTER INSERT ON files WHEN NEW.present AND NEW.image IS NOT NULL BEGIN
    UPDATE images SET files = files + 1 WHERE id = NEW.image;
END;
CREATE TRIGGER file_removed AFTER DELETE ON files WHEN OLD.present AND OLD.image IS NOT NULL BEGIN
    UPDATE images SET files = files - 1 WHERE id = OLD.image;
END;
CREATE TRIGGER file_changed AFTER UPDATE OF image, present ON files BEGIN
    UPDATE images SET files = files - 1 WHERE id = OLD.image AND OLD.present;
    UPDATE images SET files = files + 1 WHERE id = NEW.image AND NEW.present;
END;

-- Words of captions (by file id) and of the text in images (by image id).
CREATE VIRTUAL TABLE caption_words USING fts5 (words, tokenize = 'ascii');
CREATE VIRTUAL TABLE image_words USING fts5 (words, tokenize = 'ascii');

-- What derived tables were made with: when it changes, they are made again.
CREATE TABLE versions (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- Images that were removed for good; their rows stay zero, and their ids are not used again.
CREATE TABLE erasures (
    image INTEGER PRIMARY KEY,
    digest BLOB,                       -- names the thumbnail, until that is deleted
    pending INTEGER NOT NULL DEFAULT 2 -- 2: vector and thumbnail exist; 1: traces in this database
);
CREATE INDEX erasures_pending ON erasures (pending) WHERE pending > 0;
