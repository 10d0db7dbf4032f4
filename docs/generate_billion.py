"""Write docs/billion.md and docs/zh/billion.md: what 10^9 images cost, computed from billion.toml.

Run it after a change of docs/billion.toml: ``python docs/generate_billion.py``.
"""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VALUES = HERE / "billion.toml"
PAGES = {"en": HERE / "billion.md", "zh": HERE / "zh" / "billion.md"}
BITS = {"bf16": "bfloat16", "int8": "int8"}


def values() -> dict[str, Any]:
    with VALUES.open("rb") as stream:
        return tomllib.load(stream)


def size(count: float) -> str:
    """Return bytes as a person writes them."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:,.{0 if count >= 10 * unit else 1}f} {name}"
    return f"{count:,.0f} B"


def hours(seconds: float) -> str:
    """Return a time in hours, with two digits that count."""
    number = seconds / 3600
    if number < 0.1:
        return f"{number:.2f}"
    return f"{number:,.1f}" if number < 10 else f"{number:,.0f}"


def embedding(v: dict[str, Any]) -> list[str]:
    """Return the rows of the table of GPU and CPU hours."""
    rows = []
    for name, model in v["models"].items():
        total = v["images"]["count"] * model["image"] * 1e9
        cells = [f"{model['image']:g}", f"{total / 1e18:,.{0 if total >= 1e19 else 1}f}"]
        for device in v["devices"].values():
            for bits in BITS:
                cells.append(hours(total / (device[bits] * 1e12 * device["share"])))
        for bits in BITS:
            rate = v["cpu"][bits] * 1e12 * v["cpu"][f"share_{bits}"] / v["cpu"]["cores"]
            cells.append(hours(total / rate))
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def storage(v: dict[str, Any]) -> list[str]:
    """Return the rows of the table of bytes for each width."""
    rows, count = [], v["images"]["count"]
    for dim in sorted({model["dim"] for model in v["models"].values()}):
        lists = count * (dim / 2 + 8)
        rows.append(
            f"| {dim} | {size(count * 2 * dim)} | {size(lists)} | {size(lists)} | "
            f"{size(count * (dim / 4 + 8))} |"
        )
    return rows


def search(v: dict[str, Any]) -> dict[str, Any]:
    """Return the search of 10^9 images, extrapolated from two measured sizes."""
    small, large = v["index"]["small"], v["index"]["large"]
    count = v["images"]["count"]
    grown = math.log(count / large["rows"])
    power = math.log(large["probes"] / small["probes"]) / math.log(large["rows"] / small["rows"])
    probes = large["probes"] * math.exp(power * grown)
    lists = 2 * math.sqrt(count)

    def scanned(index: dict[str, Any], probes: float, rows: float) -> float:
        return probes * rows / index["lists"]

    per_row = (large["query_ms"] - small["query_ms"]) / (
        scanned(large, large["probes"], large["rows"])
        - scanned(small, small["probes"], small["rows"])
    )
    rows = probes * count / lists
    own = large["query_ms"] - per_row * scanned(large, large["probes"], large["rows"])
    return {
        "power": power,
        "probes": probes,
        "lists": lists,
        "scanned": rows,
        "query_ms": own + per_row * rows,
        "row_bytes": large["bytes"] / large["rows"],
        "read": rows * large["bytes"] / large["rows"],
        "build_hours": large["build_core_seconds"] / large["rows"]
        * count * math.sqrt(count / large["rows"]) / 3600,
    }  # fmt: skip


def measured(v: dict[str, Any]) -> list[str]:
    rows = []
    for name in ("small", "large"):
        index = v["index"][name]
        rows.append(
            f"| {index['rows']:,} | {index['lists']:,} | {index['probes']} | "
            f"{index['candidates']} | {index['recall']:.3f} | {index['query_ms']:g} | "
            f"{index['cold_ms']:g} | {size(index['bytes'])} | {index['search_gb']:g} GB | "
            f"{index['build_core_seconds']:,} s | {index['build_gb']:g} GB |"
        )
    return rows


def parts(v: dict[str, Any]) -> list[str]:
    """Return the rows of the table of several servers."""
    s, rows = search(v), []
    for servers in (1, 4, 16, 64):
        rows.append(
            f"| {servers} | {v['images']['count'] // servers:,} | "
            f"{size(s['row_bytes'] * v['images']['count'] / servers)} | "
            f"{s['scanned'] / servers / 1e3:,.0f} k | {s['query_ms'] / servers:,.0f} ms |"
        )
    return rows


def fields(v: dict[str, Any]) -> dict[str, Any]:
    """Return what the templates show."""
    images, steps = v["images"], v["steps"]
    count = images["count"]
    shards = count // images["shard_rows"]
    s, base = search(v), v["models"]["ViT-B-16"]
    return {
        "bytes_each": size(images["bytes"]),
        "bytes_in": size(count * images["bytes"]),
        "gbits": f"{count * images['bytes'] * 8 / 86400 / 1e9:,.0f}",
        "shards": f"{shards:,}",
        "shard_rows": f"{images['shard_rows']:,}",
        "decode_ms": f"{1000 * steps['decode_seconds']:.1f}",
        "decode_hours": hours(count * steps["decode_seconds"]),
        "decode_rate": f"{1 / steps['decode_seconds']:,.0f}",
        "metadata": size(count * steps["metadata_bytes"]),
        "metadata_bytes": steps["metadata_bytes"],
        "manifests": size(shards * steps["manifest_bytes"]),
        "filter_hours": hours(count * steps["filter_seconds"]),
        "filter_us": f"{1e6 * steps['filter_seconds']:.1f}",
        "dedupe_us": f"{1e6 * steps['dedupe_seconds']:.0f}",
        "dedupe_hours": hours(
            count * steps["dedupe_seconds"] * math.sqrt(count / v["index"]["large"]["rows"])
        ),
        "text_share": f"{100 * base['text'] / base['image']:.0f}",
        "tokens": images["text_tokens"],
        "share": f"{100 * next(iter(v['devices'].values()))['share']:.0f}",
        "embedding": "\n".join(embedding(v)),
        "storage": "\n".join(storage(v)),
        "measured": "\n".join(measured(v)),
        "parts": "\n".join(parts(v)),
        "lists": f"{s['lists']:,.0f}",
        "probes": f"{s['probes']:,.0f}",
        "power": f"{s['power']:.2f}",
        "scanned": f"{s['scanned'] / 1e6:.1f}",
        "read": size(s["read"]),
        "query_ms": f"{s['query_ms']:,.0f}",
        "build_hours": f"{s['build_hours']:,.0f}",
        "sample": size((1 << 20) * 4 * 384),
        "machine": v["index"]["machine"],
        "machine_zh": v["index"]["machine_zh"],
        "quick": f"{v['index']['large']['quick_ms']:g}",
        "quick_small": f"{v['index']['small']['quick_ms']:g}",
        "cpu_rate": f"{1e3 * v['cpu']['bf16']:,.0f}",
        "cpu_share": f"{100 * v['cpu']['share_bf16']:.0f}",
    }


def render(language: str) -> str:
    """Return a page."""
    template = (HERE / "billion" / f"{language}.txt").read_text(encoding="utf-8")
    for name, value in fields(values()).items():
        template = template.replace(f"@{name}@", str(value))
    return template


if __name__ == "__main__":
    for language, page in PAGES.items():
        page.write_text(render(language), encoding="utf-8")
