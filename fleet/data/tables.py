"""Parquet and arrow files, local or from the Hugging Face Hub: images as bytes in a column."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fleet.data.images import ImageData, decode, digest, need
from fleet.data.splits import Split, choose_split, held_out
from fleet.errors import ConfigError

SUFFIXES = (".parquet", ".arrow")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")  # tried in this order

_SPLIT_NAME = re.compile(r"(train|test|validation|valid|val)(ing)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class _Part:
    """One split: the schema at once, columns when asked for."""

    schema: Any  # pyarrow.Schema
    read: Callable[[list[str]], Any]  # column names → pyarrow.Table


def table_files(path: Path) -> list[Path]:
    """The parquet and arrow files of a folder, or the file itself; caches left out."""
    candidates = path.rglob("*") if path.is_dir() else [path]
    return sorted(p for p in candidates if p.suffix in SUFFIXES and not p.name.startswith("cache-"))


def load_table(path: Path, split: Split) -> ImageData:
    """Read a file, a folder of files named by split, or a `datasets.save_to_disk` folder.

    Raises:
        ConfigError: for a file that cannot be read, and as `_build`.
    """
    need("pyarrow", f"data {path}")
    parts = {name: _local_part(files) for name, files in _by_split(path).items()}
    return _build(str(path), parts, split)


def load_hugging_face(repository: str, split: Split) -> ImageData:
    """Download a data set of the Hub, or take it from the local cache.

    Raises:
        ConfigError: if it cannot be had, and as `_build`.
    """
    datasets = need("datasets", f"data {repository}")
    try:
        loaded = datasets.load_dataset(repository)
    except (OSError, ValueError) as error:  # a ConnectionError is an OSError
        raise ConfigError(
            f"{repository} could not be loaded from the Hugging Face Hub: {error}; there is no "
            f"folder of that name here either. Check the name and the internet connection, or "
            f"give a local parquet folder or an ImageFolder directory as data"
        ) from error
    parts = {
        name: _Part(dataset.features.arrow_schema, dataset.data.table.select)
        for name, dataset in loaded.items()
    }
    return _build(repository, parts, split)


def _by_split(path: Path) -> dict[str, list[Path]]:
    """Split → files. Files without a split in their name count only if no file has one."""
    named: dict[str, list[Path]] = {}
    files = table_files(path)
    for file in files if path.is_dir() else ():
        words = reversed(file.relative_to(path).parts)  # the file's own name before its folder's
        match = next((m for word in words if (m := _SPLIT_NAME.match(word))), None)
        if match:
            named.setdefault(match[1].lower(), []).append(file)
    return named or {"train": files}


def _local_part(files: list[Path]) -> _Part:
    return _Part(_read_file(files[0], []).schema, partial(_read_files, files))


def _read_files(files: list[Path], columns: list[str]) -> Any:
    import pyarrow

    try:
        return pyarrow.concat_tables([_read_file(file, columns) for file in files])
    except (pyarrow.ArrowInvalid, KeyError) as error:
        raise ConfigError(
            f"{files[0].parent} has files whose columns differ: {' '.join(str(error).split())}; "
            f"keep one data set a folder"
        ) from error


def _read_file(file: Path, columns: list[str]) -> Any:
    """The named columns; with none, an empty table that has the whole schema."""
    import pyarrow
    from pyarrow import parquet

    try:
        if file.suffix == ".parquet":
            source = parquet.ParquetFile(file)
            return source.read(columns) if columns else source.schema_arrow.empty_table()
        table = _map_arrow(file)
        return table.select(columns) if columns else table.schema.empty_table()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ConfigError(
            f"{file} cannot be read as {file.suffix[1:]}: {error}; write it anew"
        ) from error


def _map_arrow(file: Path) -> Any:
    import pyarrow

    try:  # what `datasets` writes
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all()


def _build(source: str, parts: Mapping[str, _Part], split: Split) -> ImageData:
    """Find the columns and read them.

    Raises:
        ConfigError: for a missing split, an image or label column that cannot be
            told, and examples without a label.
    """
    chosen, cut = choose_split(parts, split, source)
    features = _features(chosen.schema)
    image = _image_column(source, chosen.schema, features)
    label = _label_column(source, chosen.schema, features)
    table = chosen.read([image, label])
    labels = _labels(source, split, table[label])
    names = features.get(label, {}).get("names")
    if names is None:  # both splits, so that both get the same classes
        sides = {s: choose_split(parts, s, source)[0] for s in ("train", "test")}
        tops = [_labels(source, s, p.read([label])[label]).max() for s, p in sides.items()]
        names = range(max(tops) + 1)
    read = partial(_read_row, source, table[image])
    identify = partial(_digest_row, source, table[image])
    data = ImageData(source, tuple(str(name) for name in names), labels, read, identify)
    return held_out(data, split) if cut else data


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Column → what `datasets` wrote about it; empty for files of other makers."""
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features") or {}
    return {name: f for name, f in features.items() if isinstance(f, dict)}


def _image_column(source: str, schema: Any, features: Mapping[str, Mapping]) -> str:
    from pyarrow import types

    marked = [c for c in schema.names if features.get(c, {}).get("_type") == "Image"]
    binary = [f.name for f in schema if types.is_binary(f.type) or types.is_large_binary(f.type)]
    structs = [
        f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0
    ]
    candidates = marked or structs or binary
    if not candidates:
        raise ConfigError(
            f"{source} has no image column among {', '.join(schema.names)}; it needs one of type "
            f"Image, or of encoded bytes"
        )
    return candidates[0]


def _label_column(source: str, schema: Any, features: Mapping[str, Mapping]) -> str:
    from pyarrow import types

    marked = [c for c in schema.names if features.get(c, {}).get("_type") == "ClassLabel"]
    integers = [f.name for f in schema if types.is_integer(f.type)]
    for candidates in (marked, integers):
        for name in LABEL_NAMES:
            if name in candidates:
                return name
        if len(candidates) == 1 or (candidates and candidates is marked):
            return candidates[0]
    raise ConfigError(
        f"{source} has no label column among {', '.join(schema.names)}; it needs one of type "
        f"ClassLabel, an integer column named {', '.join(LABEL_NAMES[:-1])} or {LABEL_NAMES[-1]}, "
        f"or a single integer column"
    )


def _labels(source: str, split: str, column: Any) -> np.ndarray:
    labels = column.fill_null(-1).to_numpy().astype(np.int64)
    missing = int((labels < 0).sum())
    if missing or not len(labels):
        raise ConfigError(
            f"{source} has {missing} of {len(labels)} {split} examples without a label; "
            f"use data whose {split} split is labelled"
        )
    return labels


def _read_row(source: str, column: Any, i: int) -> Image.Image:
    return decode(_encoded(column, i), f"image {i} of {source}")


def _digest_row(source: str, column: Any, i: int) -> bytes:
    return digest(_encoded(column, i), f"image {i} of {source}")


def _encoded(column: Any, i: int) -> Path | bytes:
    value = column[i].as_py()
    if isinstance(value, dict):
        value = value["bytes"] or Path(value.get("path") or "")
    return value or b""  # a missing image is named as one that cannot be decoded
