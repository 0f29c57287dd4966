"""Which addresses out of a Parquet file's URL column may be opened, decided before anything is.

Allowed are the web, as far as it is public (`fetching.py` looks at the address that it really connects to), and the
bucket of the Parquet file itself. Everything else is refused, by a `Reject` that names the `--allow-url` it takes.
What is opened is made of the parts that were looked at, so that no client reads an address otherwise than we did.
"""

import posixpath
import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote

import yarl

from pipeline.errors import Reject, UsageError
from pipeline.storage import BUCKETS

WEB = ("http", "https")
ONE_STORE = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "local": "file"}  # schemes of one store
SHOWN_CHARS = 200  # of an address in a message


@dataclass(frozen=True, slots=True)
class Address:
    """An address taken apart. Two lie beside each other when `scheme` and `host` are the same."""

    scheme: str  # lower-case, one for all names of a store
    host: str  # host and port of the web; the bucket; "" of local files
    path: tuple[str, ...]  # decoded where a web server decodes
    url: str  # to open; of a local file its absolute path
    shown: str  # for a person: without user, password, query and fragment

    @property
    def is_dubious(self) -> bool:
        """Whether a server may understand the path otherwise than we do: `..`, or an encoded slash."""
        if self.scheme not in WEB:
            return any(p in (".", "..") for p in self.path)
        return any("/" in p or "\\" in p or p.partition(";")[0] in (".", "..") for p in self.path)

    def holds(self, other: "Address") -> bool:
        """Whether `other` is this very address, or lies below it."""
        same = (self.scheme, self.host, self.path) == (other.scheme, other.host, other.path[: len(self.path)])
        return same and not (self.path and other.is_dubious)  # of a whole host any path will do


@dataclass(frozen=True, slots=True)
class Access:
    """What the URL column of one Parquet file may lead to."""

    beside: str = ""  # the Parquet file's own URL
    allowed: tuple[str, ...] = ()  # of `--allow-url`

    def admit(self, url: str) -> Address:
        """The address, if it may be opened. Raises a `Reject` that says what is refused and what would allow it."""
        try:
            address = parse(url)
        except ValueError as e:
            raise refused(str(e)) from None
        if address.scheme in WEB or self.prefix_of(address) or self._is_in_own_bucket(address):
            return address
        if address.is_dubious:
            raise refused(f"{address.shown}: an address with `..` in its path is not fetched")
        if address.scheme == "file":
            raise refused(without_flag(address, "a local file"))
        if address.scheme in BUCKETS and address.host:
            raise refused(without_flag(address, "in another bucket than the Parquet file"))
        raise refused(without_flag(address, f"an address of {address.scheme}"))

    def prefix_of(self, address: Address) -> Address | None:
        """The `--allow-url` that the address lies below."""
        return next((prefix for prefix in map(_prefix, self.allowed) if prefix.holds(address)), None)

    def _is_in_own_bucket(self, address: Address) -> bool:
        if address.scheme not in BUCKETS or address.is_dubious:
            return False
        own = parse(self.beside or "none://")
        return (own.scheme, own.host) == (address.scheme, address.host) != (address.scheme, "")


def refused(message: str) -> Reject:
    return Reject("fetch_failed", "fetch", message)


def without_flag(address: Address, what: str) -> str:
    """The sentence for an address that a flag would allow, with that flag."""
    folder = address.shown.rpartition("/")[0]
    flag = f"{folder}/" if folder.strip("/:").partition("://")[2] or address.scheme == "file" else address.shown
    return f"{address.shown}: {what}, not fetched unless allowed, as by --allow-url {flag}"


def check_prefix(text: str) -> str:
    """The prefix as it is kept, without a `*` at its end. Raises `UsageError` for what allows nothing."""
    kept = text.strip().rstrip("*")
    if kept in ("file://", "file:///"):
        return "file:///"
    wrong = f"--allow-url {_cut(text)}"
    try:
        prefix = parse(kept)
    except ValueError:
        raise UsageError(f"{wrong}: must be a URL's beginning or an absolute path, as in s3://bucket/photos/") from None
    if kept != text.strip() and prefix.path and not kept.endswith("/"):
        raise UsageError(f"{wrong}: must end at a `/`, which alone a `*` may follow")
    if prefix.scheme not in ("file", "memory") and not prefix.host:
        raise UsageError(f"{wrong}: names no host or bucket")
    if _holds_secrets(kept, prefix):
        raise UsageError(f"--allow-url {prefix.shown}: must hold no user, password, query or fragment")
    if prefix.is_dubious:
        raise UsageError(f"--allow-url {prefix.shown}: must hold no `..` and no encoded slash")
    return kept


def _holds_secrets(text: str, prefix: Address) -> bool:
    if prefix.scheme in WEB:
        web = yarl.URL(text)
        return any((web.raw_user, web.raw_password, web.raw_query_string, web.raw_fragment))
    return bool(prefix.scheme in ("s3", "gs") and "@" in prefix.host) or bool(re.search(r"://.*\?[^/?]*=", text))


@lru_cache(maxsize=256)
def _prefix(text: str) -> Address:
    return parse(text)


def parse(url: str) -> Address:
    """Raises `ValueError` with a sentence for what is no absolute address that anything here could open."""
    if url.startswith("/"):
        return _local(url)
    scheme, colon, rest = url.partition(":")
    if not colon or not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9+.-]*", scheme):
        raise ValueError("a malformed URL")
    scheme = scheme.lower()
    if scheme in WEB:
        return _web(url)
    scheme = ONE_STORE.get(scheme, scheme)
    if scheme == "file":
        path = rest.removeprefix("//").removeprefix("localhost")
        if not path.startswith("/"):
            raise ValueError(f"{_cut(f'file:{rest}')}: no absolute path")
        return _local(path)
    if not rest.startswith("//"):
        raise ValueError(f"addresses of the kind {scheme[:20]}: are not fetched")
    if "::" in rest:
        raise ValueError(f"addresses of the kind {scheme[:20]}://…::… are not fetched")
    return _stored(url, scheme, rest[2:])


def _local(path: str) -> Address:
    if "\0" in path:
        raise ValueError("a malformed path")
    path = "/" + posixpath.normpath(path).lstrip("/")
    return Address("file", "", _parts(path), path, _cut(path))


def _web(url: str) -> Address:
    """As aiohttp sends it: yarl is its own parser, which resolves dots, encoded ones too."""
    try:
        parsed = yarl.URL(url)
        host, port = parsed.raw_host, parsed.port
    except ValueError as e:
        raise ValueError("a malformed URL") from e
    if not host:
        raise ValueError("a malformed URL")
    where = f"[{host}]" if ":" in host else host.rstrip(".").lower()
    default = {"http": 80, "https": 443}[parsed.scheme]
    shown = f"{parsed.scheme}://{where}{'' if port == default else f':{port}'}{parsed.raw_path}"
    path = tuple(map(_decoded, _parts(parsed.raw_path)))
    return Address(parsed.scheme, f"{where}:{port}", path, str(parsed), _cut(shown))


def _decoded(part: str) -> str:
    """However often it was encoded."""
    while (plain := unquote(part)) != part:
        part = plain
    return part


def _stored(url: str, scheme: str, rest: str) -> Address:
    host, _, path = rest.partition("/")
    if scheme == "memory":  # has no host: memory://a/b is memory:///a/b
        host, path = "", rest
    elif scheme == "az" and "@" not in host and host.endswith(".core.windows.net"):
        container, _, path = path.partition("/")  # the host is the account
        host += f"/{container}"
    elif scheme not in BUCKETS:
        host = host.rpartition("@")[2].lower()
    plain = re.split(r"[?#]", rest)[0]
    shown = f"{url.partition(':')[0].lower()}://{plain.partition('/')[0].rpartition('@')[2]}"
    return Address(scheme, host, _parts(path), url, _cut(shown + "".join(plain.partition("/")[1:])))


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part)


def _cut(text: str) -> str:
    """At most `SHOWN_CHARS`, on one line, without what may be a password or a signature."""
    if "://" in text or not text.startswith("/"):
        text = re.sub(r"[?#].*|(?<=://)[^/]*@|^[^/:]*:[^/]*@", "", text, flags=re.DOTALL)
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…"
