"""A shard becomes samples, in the shard's order and in bounded memory: every image once, with its key.

Nothing is dropped in silence: an image that cannot be had is a sample with a `Reject`, and where the rest of a shard
is lost, a last sample with the key `#end` says so. Errors of the store are raised, never turned into rejects.
"""

import hashlib
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from pipeline.addresses import Access
from pipeline.errors import Reject
from pipeline.fetching import MAX_IMAGE_BYTES
from pipeline.storage import Entry, is_local, open_input, read_listed, resolve
from pipeline.tables import read_rows
from pipeline.tars import Member, read_members

if TYPE_CHECKING:  # listing.py imports us
    from pipeline.listing import Shard

KEY_CHARS = 200  # longer ones cost more memory than a digest
LABEL_MAX_BYTES = 32  # a `.cls` member: an integer as text
IMAGE_ENDINGS = {
    "jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "ppm", "pgm", "pbm", "pnm",
    "jp2", "j2k", "jpx", "avif", "heic", "heif", "jxl", "svg", "ico", "tga", "dds", "psd", "qoi", "xbm", "exr", "hdr",
}  # fmt: skip
WEBDATASET_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # webdataset's `base_plus_ext`, over line breaks
WEBDATASET_META = re.compile(r"__[^/]*__($|/)")


@dataclass(slots=True)
class Sample:
    """One image of a shard. `id_key` names it in its shard: `key`, but for the second and later of equal keys."""

    row: int  # position in the shard
    key: str
    image: bytes = b""
    label: int | None = None
    url: str | None = None  # to be had with `fetching.fetch`, in a thread, instead of `image`
    access: Access = Access()  # with `url`: what an address out of a column may lead to
    listed: Entry | None = None  # with `url`: a folder's own file as it was listed, not an address out of a column
    size: int = 0  # of the image as stored, where it is known; 0 for one behind a URL
    reject: Reject | None = None  # already known to give no vector
    id_key: str = ""

    def __post_init__(self) -> None:
        self.id_key = self.id_key or self.key


def read_samples(shard: "Shard") -> Iterator[Sample]:
    """All samples, rows 0, 1, 2 …. Raises `StorageError` or `OSError` where the store fails, nothing for bad data."""
    return _numbered(shard, images=True)


def read_keys(shard: "Shard") -> Iterator[str]:
    """The `id_key` of each sample that `read_samples` gives, in order, without reading images where that can be."""
    return (sample.id_key for sample in _numbered(shard, images=False))


def _numbered(shard: "Shard", images: bool) -> Iterator[Sample]:
    """Counts the rows and keeps ids unique: the first with a key keeps it, later ones become rejects."""
    rows: dict[str | bytes, int] = {}
    reader = {"webdataset": _webdataset, "parquet": _parquet, "folder": _folder}[shard.format]
    for row, sample in enumerate(reader(shard, images)):
        sample.row = row
        if (first := rows.get(_mark(sample.id_key))) is not None:
            if sample.reject is None or sample.reject.reason not in ("truncated", "corrupt"):
                sample.reject = Reject("duplicate_key", "read", f"row {first} has the key {sample.key!r} already")
            sample.image, sample.url = b"", None
            while _mark(sample.id_key) in rows:
                sample.id_key += f"#duplicate-{row}"
        rows[_mark(sample.id_key)] = row
        yield sample


def _mark(key: str) -> str | bytes:
    """What stands for the key among all of a shard's: long ones (tars may have names of 1 MB) by their digest."""
    return key if len(key) <= KEY_CHARS else hashlib.blake2b(key.encode(), digest_size=16).digest()


def is_image(name: str) -> bool:
    return "." in name and name.rpartition(".")[2].lower() in IMAGE_ENDINGS


def _text(name: str) -> str:
    """A name as valid Unicode: bytes that were no UTF-8 are spelled out, as output columns must hold it."""
    return name.encode("utf-8", "backslashreplace").decode()


def _sized(sample: Sample, size: int) -> Sample:
    """The sample with its image's size, and the reject that this alone gives."""
    sample.size = size
    if size == 0:
        sample.reject = Reject("empty", "read", "the image holds no bytes")
    elif size > MAX_IMAGE_BYTES:
        message = f"an image of {size} bytes, at most {MAX_IMAGE_BYTES} are taken"
        sample.reject, sample.image = Reject("too_large", "read", message), b""
    return sample


# WebDataset


def _webdataset(shard: "Shard", images: bool) -> Iterator[Sample]:
    """webdataset's own grouping: consecutive members with one name up to the first dot are one sample."""
    group: _Group | None = None
    with open_input(shard.url, shard.size) as raw:
        try:
            for member in read_members(raw):
                name = WEBDATASET_NAME.fullmatch(member.name)
                is_meta = WEBDATASET_META.match(member.name)
                # Links give no bytes: webdataset skips them. Here one in place of an image must not vanish.
                is_data = member.kind == "file" or (member.kind != "folder" and is_image(member.name))
                if not name or is_meta or not is_data:
                    continue
                key, ending = _text(name.group(1)), name.group(2).lower()
                if group is not None and group.key != key:
                    yield from group.samples()
                    group = None
                group = group or _Group(key)
                group.add(ending, member, images)
        except Reject as damage:
            if group is not None and group.image is not None:
                yield from group.samples()
            if group is None or group.cut is not damage:
                yield Sample(0, "#end", reject=damage)
            return
    if group is not None:
        yield from group.samples()


class _Group:
    """The members of one key. The image is the first with a plain ending (`jpg`), else the first (`seg.png`)."""

    def __init__(self, key: str):
        self.key, self.label = key, cast(int | None, None)
        self.image: Sample | None = None
        self.cut: Reject | None = None  # the damage that ended the tar within our image
        self._ending, self._endings, self._repeated = "", set[str](), 0

    def add(self, ending: str, member: Member, images: bool) -> None:
        if ending == "cls" and member.size <= LABEL_MAX_BYTES and self.label is None:
            self.label = _integer(member.read())
        if not is_image("." + ending):
            return
        if ending in self._endings:
            self._repeated += 1
            return
        self._endings.add(ending)
        if self.image is None or ("." in self._ending and "." not in ending):
            self._ending, self.image = ending, _sized(Sample(0, self.key), member.size)
            if member.kind != "file":
                what = f"a link to {_text(member.link)!r}" if member.kind == "link" else "no file"
                message = f"{_text(member.name)!r} is {what}: the tar holds no bytes of its own for it"
                self.image.reject = Reject("missing_image", "read", message)
            elif self.image.reject is None:
                try:
                    if images:
                        self.image.image = member.read()
                    else:
                        member.check()
                except Reject as damage:
                    self.image.reject = self.cut = damage
                    raise

    def samples(self) -> Iterator[Sample]:
        """The sample, and one more for each further image under a name that the group had already."""
        missing = Reject("missing_image", "read", "no member with an image's ending (jpg, png …)")
        image = self.image or Sample(0, self.key, reject=missing)
        image.label = self.label
        yield image
        for _ in range(self._repeated):
            yield Sample(0, self.key)


def _integer(text: bytes) -> int | None:
    """None for what is no integer, or none that the output's int32 column holds."""
    try:
        number = int(text)
    except ValueError:
        return None
    return number if -(2**31) <= number < 2**31 else None


# Parquet


def _parquet(shard: "Shard", images: bool) -> Iterator[Sample]:
    access = Access(shard.url, shard.columns.allow_urls)
    with open_input(shard.url, shard.size) as raw:
        for row in read_rows(raw, shard.size, shard.columns, images):
            sample = Sample(0, row.key, row.image or b"", row.label, reject=row.reject)
            if row.url is not None:
                sample.url, sample.access = _absolute(row.url, shard.url), access
            elif images and row.reject is None:
                _sized(sample, len(sample.image))
            yield sample


def _absolute(url: str, shard_url: str) -> str:
    """An address out of a column; one without a scheme is relative to the Parquet file's folder."""
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", url) or url.startswith("/"):
        return url
    scheme, mark, path = shard_url.rpartition("://")
    return scheme + mark + posixpath.normpath(posixpath.join(posixpath.dirname(path.partition("?")[0]), url))


# Folders and addresses


def _folder(shard: "Shard", images: bool) -> Iterator[Sample]:
    """A local folder's files are read here, in order; a remote one's are left to `fetch`, many at a time."""
    remote = not is_local(resolve(shard.url)[0])
    root_length = len(shard.url.rstrip("/")) + 1
    for member in shard.members:
        sample = _sized(Sample(0, _text(member.url[root_length:])), member.size)
        if sample.reject is None and remote:
            sample.url, sample.listed = member.url, member
        elif sample.reject is None and images:
            sample.image = read_listed(member)
        yield sample
