"""Which columns of a Parquet file hold the images (or their addresses), the keys and the labels.

Found by the name that the user gave, else by type and by usual names; what is unclear is refused with the columns
there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import types

from pipeline.addresses import check_prefix
from pipeline.errors import UsageError

# Found by these names, in this order; the second line of images only where no name of the first is there.
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes", "img_bytes")
VAGUE_IMAGE_NAMES = ("bytes", "content", "data", "binary", "raw", "file")
URI_NAMES = ("url", "uri", "image_url", "image_uri", "img_url", "image_path", "image_link", "href", "link")
KEY_NAMES = ("__key__", "key", "id", "image_id", "sample_id", "uid", "uuid", "filename", "file_name", "name")
LABEL_NAMES = ("label", "labels", "cls", "class", "class_id", "label_id", "target", "y")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that the user named; None: found by type and name. Raises `UsageError` for a prefix that is none."""

    image: str | None = None  # binary, or Hugging Face's struct {bytes, path}
    key: str | None = None  # string or integer; none found: the row's number is the key
    uri: str | None = None  # string: addresses to fetch, instead of `image`
    allow_urls: tuple[str, ...] = ()  # prefixes of addresses in `uri` that are fetched though local, private, elsewhere

    def __post_init__(self) -> None:
        object.__setattr__(self, "allow_urls", tuple(sorted(set(map(check_prefix, self.allow_urls)))))


UNNAMED = Columns()


@dataclass(frozen=True, slots=True)
class Found:
    """The columns of one file; exactly one of `image` and `uri` is there."""

    image: str | None
    uri: str | None
    key: str | None
    label: str | None


def find_columns(schema: pa.Schema, columns: Columns) -> Found:
    """By name where `columns` says so, else by type and name. Raises `UsageError` naming the columns there are."""
    image, uri = columns.image, columns.uri
    if image is not None and uri is not None:
        raise UsageError(f"--image-column {image} and --uri-column {uri}: give one of them")
    if image is not None:
        _check(schema, image, "--image-column", _holds_images, "binary or a struct with binary bytes")
    elif uri is not None:
        _check(schema, uri, "--uri-column", _is_string, "string")
    else:
        image, uri = _find_image(schema)
    if columns.key is not None:
        _check(schema, columns.key, "--key-column", _is_key, "string or integer")
    key = columns.key or next(iter(_named(schema, KEY_NAMES, _is_key, {image, uri})), None)
    label = next(iter(_named(schema, LABEL_NAMES, types.is_integer, {key})), None)
    return Found(image, uri, key, label)


def _find_image(schema: pa.Schema) -> tuple[str | None, str | None]:
    candidates = [f.name for f in schema if _holds_images(f.type)]
    uris = _named(schema, URI_NAMES, _is_string, set())
    for names in (IMAGE_NAMES, VAGUE_IMAGE_NAMES):
        if len(named := _named(schema, names, _holds_images, set())) == 1:
            return named[0], None
        if named:
            raise _unclear(schema, "image", "more than one could be the image's")
    if len(candidates) == 1 and not uris:
        return candidates[0], None
    if candidates:
        raise _unclear(schema, "image", "more than one could be the image's")
    if not uris:
        raise _unclear(schema, "image", "none of them holds images or their URLs")
    return None, uris[0]


def _unclear(schema: pa.Schema, flag: str, why: str) -> UsageError:
    return UsageError(f"columns {_listed(schema)}: {why}: give --{flag}-column or --uri-column")


def _listed(schema: pa.Schema) -> str:
    return ", ".join(f"{f.name} ({f.type})" for f in schema)


def _check(schema: pa.Schema, name: str, flag: str, fits: Any, wanted: str) -> None:
    if schema.names.count(name) != 1:
        raise UsageError(f"{flag} {name}: no such column among {_listed(schema)}")
    if not fits(schema.field(name).type):
        raise UsageError(f"{flag} {name}: it is {schema.field(name).type}, not {wanted}")


def _named(schema: pa.Schema, names: Sequence[str], fits: Any, taken: set[str | None]) -> list[str]:
    """The columns with one of the names, in the names' order, whatever their case."""
    fitting = [f.name for f in schema if schema.names.count(f.name) == 1 and fits(_plain(f.type))]
    return [column for name in names for column in fitting if column.lower() == name and column not in taken]


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if types.is_dictionary(kind) else kind


def _is_string(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_key(kind: pa.DataType) -> bool:
    return _is_string(kind) or types.is_integer(_plain(kind))


def _is_binary(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _holds_images(kind: pa.DataType) -> bool:
    if types.is_struct(kind):
        names = [part.name for part in kind]
        return names.count("bytes") == 1 and names.count("path") <= 1 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)
