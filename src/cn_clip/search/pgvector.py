"""Rows exported to a table of PostgreSQL with the extension pgvector."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cn_clip.errors import CNClipError, UsageError
from cn_clip.search.export_rows import COMMAND, Batch, Existing, ExportRows, OnProgress, mark
from cn_clip.translation import _

_STAGING = "cn_clip_rows"  # a temporary table


def to_pgvector(
    rows: ExportRows, address: str, table: str, existing: Existing, on_progress: OnProgress
) -> None:
    """Write rows into a table: ``id`` is its primary key, ``vector`` has an HNSW index for the
    inner product, ``<#>``.

    Nothing is changed unless all rows arrive: it is one transaction. The password is read as by
    every program of PostgreSQL, from ``PGPASSWORD`` or ``~/.pgpass``.

    Raises:
        UsageError: the table exists and is not to be changed, or is not ours.
        CNClipError: the server does not answer, or refuses.
    """
    psycopg = import_module("psycopg")
    sql = import_module("psycopg.sql")
    name = sql.Identifier(table)
    try:
        with psycopg.connect(address) as connection, connection.cursor() as cursor:
            cursor.execute("CREATE EXTENSION IF NOT EXISTS vector")
            exists = _check_ours(cursor, rows, table, existing)
            if exists and existing.overwrite:
                cursor.execute(sql.SQL("DROP TABLE {}").format(name))
                exists = False
            if not exists:
                _create(sql, cursor, rows, name)
            _copy(sql, cursor, rows, name, on_progress)
            if not exists:
                cursor.execute(
                    sql.SQL("CREATE INDEX ON {} USING hnsw (vector vector_ip_ops)").format(name)
                )
    except psycopg.Error as error:
        raise CNClipError(
            _(
                "PostgreSQL refused the export: {error}",
                error=" ".join(str(error).split()) or type(error).__name__,
            )
        ) from error


def _create(sql: Any, cursor: Any, rows: ExportRows, name: Any) -> None:
    columns = [
        sql.SQL("id bigint PRIMARY KEY"),
        sql.SQL("vector vector({}) NOT NULL").format(sql.Literal(rows.dim)),
        *(sql.SQL("{} text").format(sql.Identifier(text)) for text in rows.texts),
        *(sql.SQL("{} bigint").format(sql.Identifier(number)) for number in rows.numbers),
    ]
    cursor.execute(sql.SQL("CREATE TABLE {} ({})").format(name, sql.SQL(", ").join(columns)))
    cursor.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(name, sql.Literal(rows.about)))


def _copy(sql: Any, cursor: Any, rows: ExportRows, name: Any, on_progress: OnProgress) -> None:
    """Write the rows; those whose id is there are replaced."""
    names = ["id", "vector", *rows.texts, *rows.numbers]
    columns = sql.SQL(", ").join(map(sql.Identifier, names))
    staging = sql.Identifier(_STAGING)
    cursor.execute(
        sql.SQL("CREATE TEMPORARY TABLE {} (LIKE {}) ON COMMIT DROP").format(staging, name)
    )
    insert = sql.SQL(
        "INSERT INTO {table} ({columns}) SELECT {columns} FROM {staging} ON CONFLICT (id) "
        "DO UPDATE SET {changes}"
    ).format(
        table=name,
        columns=columns,
        staging=staging,
        changes=sql.SQL(", ").join(
            sql.SQL("{0} = EXCLUDED.{0}").format(sql.Identifier(each)) for each in names[1:]
        ),
    )
    copy_from = sql.SQL("COPY {} ({}) FROM STDIN").format(staging, columns)
    done = 0
    for batch in rows.batches():
        with cursor.copy(copy_from) as copy:
            for record in _records(rows, batch):
                copy.write_row(record)
        cursor.execute(insert)
        cursor.execute(sql.SQL("TRUNCATE {}").format(staging))
        done += len(batch.ids)
        on_progress(done, rows.count)


def _records(rows: ExportRows, batch: Batch) -> list[tuple[Any, ...]]:
    return [
        (
            image,
            "[" + ",".join(map(str, vector)) + "]",
            *(batch.text(name, row) for name in rows.texts),
            *(batch.columns[name][row] for name in rows.numbers),
        )
        for row, (image, vector) in enumerate(zip(batch.ids, batch.vectors.tolist(), strict=True))
    ]


def _check_ours(cursor: Any, rows: ExportRows, table: str, existing: Existing) -> bool:
    """Return whether the table exists; it may be changed then."""
    found = cursor.execute(
        "SELECT c.oid, obj_description(c.oid, 'pg_class') FROM pg_class c JOIN pg_namespace n "
        "ON n.oid = c.relnamespace WHERE c.relname = %s AND n.nspname = current_schema()",
        (table,),
    ).fetchone()
    if found is None:
        return False
    if not (existing.overwrite or existing.update):
        raise UsageError(
            _(
                "the table {table} exists; give another --collection, --update to write its rows "
                "again, or --overwrite to replace it",
                table=table,
            )
        )
    about = str(found[1])
    if not about.startswith(mark()):
        raise UsageError(
            _(
                "the table {table} was not written by `cn-clip {command}`; give another "
                "--collection",
                table=table,
                command=COMMAND,
            )
        )
    if existing.update and not about.endswith(rows.fingerprint):
        raise UsageError(
            _(
                "the table {table} has vectors of another model; give --overwrite to replace it",
                table=table,
            )
        )
    return True
