from __future__ import annotations

import base64
import os

import pytest

from veomni.data.multimodal.limits import MediaLimits
from veomni.data.multimodal.reader import MediaReader
from veomni.errors import MediaError

CONTENT = b"some media"
ENCODED = base64.b64encode(CONTENT).decode()


@pytest.fixture
def root(tmp_path):
    (tmp_path / "media" / "sub").mkdir(parents=True)
    (tmp_path / "media" / "sub" / "a.bin").write_bytes(CONTENT)
    (tmp_path / "media" / "empty.bin").touch()
    (tmp_path / "secret").write_bytes(b"secret")
    os.symlink(tmp_path / "secret", tmp_path / "media" / "link")
    os.symlink("sub/a.bin", tmp_path / "media" / "inner")
    os.symlink("loop", tmp_path / "media" / "loop")
    os.mkfifo(tmp_path / "media" / "pipe")
    return tmp_path / "media"


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("sub/a.bin", "sub/a.bin"),
        ("sub/../sub/a.bin", "sub/../sub/a.bin"),
        ("inner", "inner"),
        ({"path": "sub/a.bin", "bytes": None}, "sub/a.bin"),
        ({"path": "gone.bin", "bytes": CONTENT}, "gone.bin"),
        ({"url": "sub/a.bin"}, "sub/a.bin"),
        (CONTENT, "10 bytes"),
        (memoryview(CONTENT), "10 bytes"),
        ({"base64": ENCODED}, "base64"),
        (f"data:image/png;base64,{ENCODED}", "data:image/png;base64"),
        (f"data:;base64,{ENCODED[:4]}\n{ENCODED[4:]}", "data:;base64"),
    ],
)
def test_every_kind_of_reference_is_read(root, reference, name):
    assert MediaReader(root)(reference) == (name, CONTENT)


def test_an_absolute_path_within_the_root_is_read(root):
    assert MediaReader(root)(str(root / "sub" / "a.bin"))[1] == CONTENT


def test_urls_go_to_the_fetcher(root):
    reader = MediaReader(root, fetch=lambda url: url.encode())
    assert reader("https://example.org/a.png") == ("https://example.org/a.png", b"https://example.org/a.png")
    assert reader({"url": "s3://bucket/a.png"})[1] == b"s3://bucket/a.png"


BAD = {
    "above the root": ("../secret", r"\.\./secret: outside .*media"),
    "an absolute path": ("/etc/hostname", "/etc/hostname: outside"),
    "a link out of the root": ("link", "link: outside"),
    "a link to itself": ("loop", "loop: "),
    "a pipe": ("pipe", "pipe: not a regular file"),
    "a device": ("/dev/zero", "outside|not a regular"),
    "a directory": ("sub", "sub: not a regular file"),
    "a missing file": ("gone.jpg", "gone.jpg: No such file"),
    "a null byte": ("a\0b", "null"),
    "a path too long": ("a" * 5000, "too long"),
    "an empty file": ("empty.bin", "empty.bin: the file is empty"),
    "empty bytes": (b"", "empty"),
    "a web page, not allowed": ("http://169.254.169.254/latest/meta-data", r"169.254.169.254.*: URLs are not allowed"),
    "a file URL": ("file:///etc/passwd", "file URLs are not read"),
    "a file URL in capitals": ("FILE:///etc/passwd", "file URLs are not read"),
    "an object store, not allowed": ("s3://bucket/a.png", "URLs are not allowed"),
    "base64 with other characters": ({"base64": "@@@@"}, "base64: not base64"),
    "base64 cut short": ({"base64": ENCODED[:-1]}, "not base64"),
    "a data URL in percent signs": ("data:image/png,%89PNG", "a data URL that is not base64"),
    "an object without media": ({"kind": "image"}, r"an object without media \(keys: kind"),
    "a number": (7, "int is no reference to media"),
    "nothing": (None, "NoneType is no reference"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_references_are_named(case, root):
    reference, message = BAD[case]
    with pytest.raises(MediaError, match=message) as raised:
        MediaReader(root)(reference)
    assert raised.value.fix
    assert "secret\n" not in str(raised.value)


def test_file_urls_are_rejected_whatever_the_fetcher_allows(root):
    with pytest.raises(MediaError, match="file URLs"):
        MediaReader(root, fetch=lambda url: b"read")("file:///etc/passwd")


@pytest.mark.parametrize("reference", ["sub/a.bin", CONTENT, {"base64": ENCODED}, "https://example.org/x"])
def test_large_files_are_rejected(root, reference):
    reader = MediaReader(root, fetch=lambda url: CONTENT, limits=MediaLimits(max_bytes=9))
    with pytest.raises(MediaError, match="10 bytes, more than 9"):
        reader(reference)
