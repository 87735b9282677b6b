"""URLs of media: a server on this machine that misbehaves in every way, and hosts that are not to be reached."""

from __future__ import annotations

import http.server
import socket
import threading
import time

import pytest

from veomni.data.sources.fetch import Fetch
from veomni.errors import MediaError


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        getattr(self, f"give_{self.path.strip('/').partition('?')[0]}")()

    def give(self, status=200, body=b"picture", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def give_picture(self):
        self.give()

    def give_gone(self):
        self.give(404)

    def give_moved(self):
        self.give(302, b"", Location="/picture")

    def give_loop(self):
        self.give(302, b"", Location="/loop")

    def give_inside(self):
        self.give(302, b"", Location="http://169.254.169.254/latest/meta-data/")

    def give_file(self):
        self.give(302, b"", Location="file:///etc/passwd")

    def give_large(self):
        self.give(body=b"x" * 5000)

    def give_short(self):
        self.give(**{"Content-Length": "100"})

    def give_endless(self):
        self.send_response(200)
        self.end_headers()
        try:
            while not self.server.stopping.wait(0.05):
                self.wfile.write(b"x")
        except OSError:
            pass

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.stopping = threading.Event()
    found.daemon_threads = True
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield f"http://localhost:{found.server_port}"
    found.stopping.set()
    found.shutdown()
    found.server_close()
    thread.join()


def fetch(**changes):
    options = {"hosts": ["localhost"], "private": ["localhost"], "max_bytes": 4096, "timeout": 20.0}
    return Fetch(**(options | changes))


def test_content_comes_and_redirections_are_followed(server):
    assert fetch()(f"{server}/picture?size=2#part") == b"picture"
    assert fetch()(f"{server}/moved") == b"picture"


CASES = {
    "gone": ("/gone", {}, "answers 404"),
    "redirected for ever": ("/loop", {}, "more than 3 redirections"),
    "redirected into the network": ("/inside", {"hosts": ["localhost", "169.254.169.254"]}, "an address inside"),
    "redirected to a host that is not allowed": ("/inside", {}, r"169\.254\.169\.254 is not allowed"),
    "redirected to a file": ("/file", {}, "file URLs are not read"),
    "too large": ("/large", {}, "more than 4096 bytes"),
    "cut short": ("/short", {}, "93 bytes early|IncompleteRead"),
    "drop by drop": ("/endless", {"timeout": 1.0}, "nothing in 1 s|timed out"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_server_that_misbehaves_is_an_error_in_time(case, server):
    path, changes, message = CASES[case]
    started = time.monotonic()
    with pytest.raises(MediaError, match=message):
        fetch(**changes)(server + path)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org/a.png", "example.org is not allowed"),
        ("http://localhost.example.org/a.png", "localhost.example.org is not allowed"),
        ("http://localhost@evil.org/a.png", "not a plain URL"),
        ("http://user:secret@localhost/a.png", "not a plain URL"),
        ("http://local host/a.png", "not a plain URL"),
        ("http:///a.png", "not a plain URL"),
        ("http://localhost:port/a.png", "no URL"),
        ("http://[::1/a.png", "no URL"),
        ("ftp://localhost/a.png", "ftp URLs are not read"),
        ("file:///etc/passwd", "file URLs are not read"),
        ("gopher://localhost", "gopher URLs are not read"),
    ],
)
def test_urls_that_are_not_allowed(url, message):
    with pytest.raises(MediaError, match=message) as raised:
        fetch()(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "[::1]", "[fe80::1]",
             "[::ffff:169.254.169.254]", "100.64.0.1", "224.0.0.1", "localhost"],
)  # fmt: skip
def test_addresses_inside_the_network_are_rejected_even_where_the_host_is_allowed(host):
    with pytest.raises(MediaError, match="an address inside the network"):
        Fetch([host.strip("[]")], max_bytes=10)(f"http://{host}/a.png")


def test_link_local_is_rejected_even_where_private_is_allowed():
    with pytest.raises(MediaError, match="an address inside"):
        fetch(hosts=["169.254.169.254"], private=["169.254.169.254"])("http://169.254.169.254/")


def test_a_name_that_changes_its_address_is_looked_up_once(server, monkeypatch):
    """DNS rebinding: what was checked is what is connected to."""
    real, asked = socket.getaddrinfo, []

    def answer(host, port, *arguments, **options):
        if host != "pictures.example.org":
            return real(host, port, *arguments, **options)
        asked.append(host)
        return real("127.0.0.1" if len(asked) == 1 else "169.254.169.254", port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    port = server.rpartition(":")[2]
    get = fetch(hosts=[".example.org"], private=["pictures.example.org"])
    assert get(f"http://pictures.example.org:{port}/picture") == b"picture"
    assert asked == ["pictures.example.org"]


def test_a_host_that_does_not_exist_is_named():
    with pytest.raises(MediaError, match=r"http://nowhere\.invalid/a: cannot be reached"):
        fetch(hosts=["nowhere.invalid"])("http://nowhere.invalid/a?key=secret")
