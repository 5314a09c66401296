"""Rows of data files: JSON Lines (.jsonl, .json, also gzipped), Parquet, or a data set on the Hugging Face Hub."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.whole_files import replace_file, writing

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


class BadRow(Exception):
    """A row that cannot be used. `reason` is the short kind that rejects are counted by; the message has the detail."""

    def __init__(self, reason: str, detail: str, raw: Any = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.raw = raw


def read_rows(path_or_hub_name: str | Path, split: str = "train") -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Yield (line, row) with lines counted from 1; a line that is no JSON object comes as a BadRow.

    Args:
        path_or_hub_name: a file, or "owner/name" or "owner/name:config" on the Hub. A `config` that the data set has
            not is taken for a folder of it (as in Anthropic/hh-rlhf:harmless-base).
        split: split of a Hub data set; local files have none.

    Raises:
        UserError: no such file, an unknown ending, a damaged file, or a data set that cannot be loaded.
    """
    path = Path(path_or_hub_name)
    name = str(path_or_hub_name)
    if path.is_dir():
        raise UserError(f"{name} is a folder; name a data file in it")
    try:
        if name.endswith(JSON_SUFFIXES):
            yield from _json_rows(path)
        elif name.endswith(".parquet"):
            yield from _parquet_rows(path)
        elif path.exists():
            raise UserError(f"{name}: unknown file type; use {', '.join(JSON_SUFFIXES)} or .parquet")
        else:
            yield from _hub_rows(name, split)
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such file") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name} cannot be read: {error}") from error


def source_name(path_or_hub_name: str | Path) -> str:
    """The name that rows without a `source` get: the file's name without endings, or the Hub name."""
    name = str(path_or_hub_name)
    for suffix in (*JSON_SUFFIXES, ".parquet"):
        if name.endswith(suffix):
            return Path(name).name.removesuffix(suffix)
    return name


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON Lines (gzipped where the name ends in .gz), as `replace_file` does: all or none of them."""
    path = Path(path)
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Lone surrogates (possible in a rejected row) have no UTF-8 form; they are written as "?" rather than not at all.
    data = text.encode("utf-8", errors="replace")
    # mtime=0: the same rows give the same bytes, so fingerprints of data files can be compared.
    replace_file(path, gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)


def write_fingerprinted(folder: Path, name: str, rows: Sequence[dict[str, Any]], write: bool = True) -> str:
    """The path of the rows as `<name>-<fingerprint>.jsonl.gz`, so that a run on other rows counts as another run.

    Written where it is not there yet; `write` False, for all but one of several processes, only names it.
    """
    digest = hashlib.sha256("\n".join(json.dumps(row) for row in rows).encode()).hexdigest()[:12]
    path = folder / f"{name}-{digest}.jsonl.gz"
    if write and not path.exists():
        write_jsonl(path, rows)
    return str(path)


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            text = raw.decode("utf-8", errors="replace").rstrip("\r\n")
            try:
                row = json.loads(raw)
            except (ValueError, RecursionError) as error:
                yield line, BadRow("invalid JSON", str(error), text)
                continue
            if isinstance(row, dict):
                yield line, row
            else:
                yield line, BadRow("wrong type", f"the row must be an object, not {type(row).__name__}", text)


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            line = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error


def _hub_rows(name: str, split: str) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    import datasets  # takes a second to import, and local files do not need it

    repository, _, config = name.partition(":")
    if repository.count("/") > 1 or repository.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such file")
    try:
        try:
            rows = datasets.load_dataset(repository, config or None, split=split)
        except ValueError:
            if not config:
                raise
            rows = datasets.load_dataset(repository, data_dir=config, split=split)
    except Exception as error:  # the Hub client raises many unrelated types; all mean that there are no data
        raise UserError(f"{name} is neither a file nor a data set that can be loaded from the Hub: {error}") from error
    yield from enumerate(rows, start=1)
