"""The promises of pipeline/addresses.py: what may be opened is decided on the address that is opened."""

import pytest

from pipeline.addresses import Access, check_prefix, parse
from pipeline.errors import Reject, UsageError

INSIDE = {
    "/data/pho": ["/data/pho", "/data/pho/a.jpg", "/data//pho/./a.jpg", "//data/pho/a.jpg", "file:///data/pho/a.jpg"],
    "/data/photos/*": ["/data/photos/a.jpg", "/data/photos/*/a.jpg", "file:/data/photos/a?b#c.jpg"],
    "file:///data": ["/data/a.jpg", "file://localhost/data/a.jpg", "local:///data/a.jpg"],
    "file://": ["/etc/passwd", "file:///a"],
    "http://10.0.0.5:8000/photos/": ["http://10.0.0.5:8000/photos/a.jpg?sig=1", "HTTP://10.0.0.5:8000/%70hotos/a"],
    "http://Intra.Corp": ["http://intra.corp/a.jpg", "http://INTRA.corp.:80/b", "http://u:p@intra.corp/c"],
    "https://host:443/a%20b": ["https://host/a b/c.jpg", "https://host/a%20b"],
    "s3://other/pre": ["s3://other/pre/a.jpg", "s3a://other/pre"],
    "abfs://c@acct.dfs.core.windows.net/": ["az://c@acct.dfs.core.windows.net/a.jpg"],
    "memory://x": ["memory:///x/a.jpg"],
    "ftp://host/pub/": ["ftp://user:secret@HOST/pub/a.jpg"],
}
OUTSIDE = {
    "/data/pho": ["/data/photos2/a.jpg", "/data/pho/../x", "/data/pho/../../etc/passwd", "file:///data/phoo", "/data"],
    "http://10.0.0.5:8000/photos/": [
        "http://10.0.0.5:8000/photos2/a", "http://10.0.0.5:8000/photos/../admin", "http://10.0.0.5/photos/a",
        "http://10.0.0.5:8000/photos/%2e%2e/admin", "http://10.0.0.5:8000/photos/%252e%252e/admin",
        "http://10.0.0.5:8000/photos/..%2fadmin", "http://10.0.0.5:8000/photos%2fa", "http://10.0.0.5:8000/photos/..;/a",
        "http://10.0.0.5:8000/photos/%2e%2e%5cadmin", "https://10.0.0.5:8000/photos/a", "http://10.0.0.50:8000/photos/a",
        "http://10.0.0.5:8000@evil.example/photos/a", "http://evil.example/http://10.0.0.5:8000/photos/a",
    ],
    "s3://other/pre": ["s3://other/prefix/a", "s3://other/pre/../a", "s3://Other/pre/a", "gs://other/pre/a", "s3://x/a"],
    "az://acct.dfs.core.windows.net/one/": ["az://acct.dfs.core.windows.net/two/a.jpg"],
}  # fmt: skip


@pytest.mark.parametrize(("prefix", "url"), [(p, u) for p, urls in INSIDE.items() for u in urls])
def test_a_prefix_holds_what_lies_below_it(prefix: str, url: str) -> None:
    """However scheme, host and path are spelled; a `*` at its end says nothing more."""
    assert Access(allowed=(check_prefix(prefix),)).prefix_of(parse(url))


@pytest.mark.parametrize(("prefix", "url"), [(p, u) for p, urls in OUTSIDE.items() for u in urls])
def test_a_prefix_ends_at_a_segments_border(prefix: str, url: str) -> None:
    """Nothing beside it, and nothing above by `..`, encoded, doubly encoded or dressed up."""
    assert not Access(allowed=(check_prefix(prefix),)).prefix_of(parse(url))


WRONG_PREFIXES = {
    "photos/": "must be a URL's beginning or an absolute path",
    "*": "must be a URL's beginning",
    "/data/photos*": "must end at a `/`",
    "s3://bucket/im*": "must end at a `/`",
    "C:\\photos": "must be a URL's beginning",
    "http://": "must be a URL's beginning",
    "file://photos": "must be a URL's beginning",
    "zip://a.zip::s3://b": "must be a URL's beginning",
    "s3://": "names no host or bucket",
    "https://user:secret@host/a": "must hold no user, password, query",
    "https://host/a?secret=1": "must hold no user, password, query",
    "https://host/a#secret": "must hold no user, password, query",
    "s3://key:secret@bucket/": "must hold no user",
    "az://c/a?sv=1&sig=secret": "must hold no user",
    "http://host/a%2f..%2fb": r"must hold no `\.\.`",
    "user:secret@host/a": "must be a URL's beginning",
}


@pytest.mark.parametrize("prefix", WRONG_PREFIXES)
def test_a_prefix_that_allows_nothing_is_told(prefix: str) -> None:
    """One sentence with what is wrong, and without what may be a secret."""
    with pytest.raises(UsageError, match=WRONG_PREFIXES[prefix]) as e:
        check_prefix(prefix)
    assert "secret" not in str(e.value) and str(e.value).startswith("--allow-url ")


BESIDE = "s3://mine/tables/x.parquet"
REFUSED = {
    "/etc/passwd": "/etc/passwd: a local file, not fetched unless allowed, as by --allow-url /etc/",
    "file:///etc/passwd": "/etc/passwd: a local file, not fetched unless allowed, as by --allow-url /etc/",
    "LOCAL:///etc/passwd": "/etc/passwd: a local file, not fetched unless allowed, as by --allow-url /etc/",
    "file:passwd": "file:passwd: no absolute path",
    "file://host/share/a": "file://host/share/a: no absolute path",
    "s3://other/a.jpg?X-Amz-Signature=secret": (
        "s3://other/a.jpg: in another bucket than the Parquet file, not fetched unless allowed, "
        "as by --allow-url s3://other/"
    ),
    "s3://mine/../other/a.jpg": "s3://mine/../other/a.jpg: an address with `..` in its path is not fetched",
    "s3://": "s3://: an address of s3, not fetched unless allowed, as by --allow-url s3://",
    "gs://mine/a.jpg": "gs://mine/a.jpg: in another bucket",
    "s3://key:secret@mine/a.jpg": "s3://mine/a.jpg: in another bucket",
    "ftp://user:secret@host/a.jpg": "ftp://host/a.jpg: an address of ftp, not fetched unless allowed, as by --allow",
    "memory://a/b.jpg": "memory://a/b.jpg: an address of memory",
    "github://org:repo@main/a.jpg": "github://main/a.jpg: an address of github",
    "zip://a.jpg::s3://mine/x.zip": "addresses of the kind zip://…::… are not fetched",
    "s3://mine/a.jpg::file:///etc/passwd": "addresses of the kind s3://…::… are not fetched",
    "simplecache::s3://mine/a.jpg": "addresses of the kind simplecache: are not fetched",
    "data:image/png;base64,secret": "addresses of the kind data: are not fetched",
    "javascript:secret": "addresses of the kind javascript: are not fetched",
    "http://[bad/a.jpg?secret": "a malformed URL",
    "http:///etc/passwd": "a malformed URL",
    "http://host\\@evil/secret": "a malformed URL",
    "http://host:99999/secret": "a malformed URL",
    "://secret": "a malformed URL",
    "/a\0secret": "a malformed path",
}


@pytest.mark.parametrize("url", REFUSED)
def test_what_is_refused_is_a_reject_that_says_what_would_allow_it(url: str) -> None:
    """Nothing is opened; user, password, query and fragment are not told."""
    with pytest.raises(Reject) as e:
        Access(BESIDE).admit(url)
    assert (e.value.reason, e.value.stage) == ("fetch_failed", "fetch")
    assert e.value.message.startswith(REFUSED[url]) and "secret" not in e.value.message


OWN = {
    BESIDE: ["s3://mine/a.jpg", "s3a://mine/b/c.jpg", "https://host/a.jpg", "http://169.254.169.254/"],
    "az://c@acct.dfs.core.windows.net/x.parquet": ["abfss://c@acct.dfs.core.windows.net/a.jpg"],
    "abfs://acct.dfs.core.windows.net/c/x.parquet": ["abfs://acct.dfs.core.windows.net/c/a.jpg"],
    "/local/x.parquet": ["https://host/a.jpg"],
}
FOREIGN = {
    BESIDE: ["s3://mine2/a.jpg", "gs://mine/a.jpg"],
    "abfs://acct.dfs.core.windows.net/c/x.parquet": ["abfs://acct.dfs.core.windows.net/d/a.jpg"],
    "az://c/x.parquet": ["az://c@other.dfs.core.windows.net/a.jpg", "az://c?x=@other/a.jpg"],
    "/local/x.parquet": ["/local/a.jpg"],
    "memory://b/x.parquet": ["memory://b/a.jpg"],
}


def test_the_bucket_of_the_parquet_file_is_open() -> None:
    """The user named it as input; other buckets, accounts and stores are not. The web's addresses are seen to later."""
    for beside, urls in OWN.items():
        assert [Access(beside).admit(url).url for url in urls] == urls
    for beside, urls in FOREIGN.items():
        for url in urls:
            with pytest.raises(Reject):
                Access(beside).admit(url)


def test_a_message_stays_short() -> None:
    """However long the address is."""
    with pytest.raises(Reject) as e:
        Access().admit(f"s3://other/{'x' * 100_000}")
    assert len(e.value.message) < 500
