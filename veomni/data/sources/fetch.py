"""Get files that data names by URL: only from hosts that are allowed, never from inside the network, within bounds.

The address that a host's name stands for is looked up once, checked, and the connection is made to that very address: a
name that means another one a moment later (DNS rebinding) leads nowhere. Each redirection is checked as the first URL.
"""

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable
from typing import Annotated
from urllib.parse import SplitResult, urljoin, urlsplit

from annotated_types import Gt

from veomni.errors import MediaError

_REDIRECTIONS = 3
_CHUNK = 1 << 16
_MOVED = (301, 302, 303, 307, 308)


class Fetch:
    """Gets the content of ``http`` and ``https`` URLs.

    Args:
        hosts: Those allowed: ``example.com`` is that host, ``.example.com`` all below it.
        max_bytes: Largest content.
        timeout: Seconds in which a URL must have been fetched.
        private: Hosts that may have an address inside the network (a store of one's own); link-local addresses, where
            clouds keep credentials, are rejected all the same.
    """

    def __init__(
        self, hosts: Iterable[str], *, max_bytes: int, timeout: Annotated[float, Gt(0.0)] = 30.0,
        private: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self.hosts = tuple(host.lower().rstrip(".") for host in hosts)
        self.max_bytes, self.timeout = max_bytes, timeout
        self._private = frozenset(host.lower() for host in private)

    def __call__(self, url: str) -> bytes:
        """Return what is behind a URL; MediaError where it is not allowed, not reached in time, or holds too much."""
        deadline = time.monotonic() + self.timeout
        for _ in range(_REDIRECTIONS + 1):
            parts = self._checked(url)
            moved, content = self._get(parts, _shown(parts), deadline)
            if moved is None:
                return content
            url = urljoin(url, moved)
        raise MediaError(f"{_shown(urlsplit(url))}: more than {_REDIRECTIONS} redirections", "give the final URL")

    def _checked(self, url: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            host, _ = (parts.hostname or "").rstrip("."), parts.port
        except ValueError as error:
            raise MediaError(f"{url[:100]!r} is no URL: {error}", "fix the record") from error
        shown = _shown(parts)
        if parts.scheme not in ("http", "https"):
            raise MediaError(f"{shown}: {parts.scheme} URLs are not read", "use https, or a path")
        if parts.username is not None or not host or any(ord(char) <= 32 for char in url):
            raise MediaError(f"{shown}: not a plain URL of a host", "write https://host/path")
        if not any(host == allowed or (allowed.startswith(".") and host.endswith(allowed)) for allowed in self.hosts):
            fix = "add it to the allowed hosts, or download it"
            raise MediaError(f"{shown}: the host {host} is not allowed", fix, "Fetch.url_hosts")
        return parts

    def _get(self, parts: SplitResult, shown: str, deadline: float) -> tuple[str | None, bytes]:
        """Return where the content has moved, or None and the content."""
        try:
            connection = self._connected(parts, shown, deadline)
        except OSError as error:
            raise MediaError(f"{shown}: cannot be reached: {error}", "check the URL and the network") from error
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept-Encoding": "identity", "Connection": "close"})
            response = connection.getresponse()
            if response.status in _MOVED and response.headers.get("Location"):
                return response.headers["Location"], b""
            if response.status != 200:
                raise MediaError(f"{shown}: the server answers {response.status} {response.reason}", "check the URL")
            return None, self._read(response, connection, shown, deadline)
        except (OSError, http.client.HTTPException) as error:
            raise MediaError(f"{shown}: cannot be read: {error or type(error).__name__}", "try again") from error
        finally:
            connection.close()

    def _connected(self, parts: SplitResult, shown: str, deadline: float) -> http.client.HTTPConnection:
        host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
        addresses = [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        for address in addresses:
            number = ipaddress.ip_address(address.partition("%")[0])
            number = getattr(number, "ipv4_mapped", None) or number
            if number.is_link_local or number.is_multicast or not (number.is_global or host in self._private):
                problem = f"{shown}: {host} is {address}, an address inside the network"
                raise MediaError(problem, "download it, give a path")
        connection = http.client.HTTPConnection(host, port, timeout=self._left(deadline))
        connection.sock = socket.create_connection((addresses[0], port), timeout=self._left(deadline))
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
        return connection

    def _left(self, deadline: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"nothing in {self.timeout:g} s")
        return left

    def _read(
        self, response: http.client.HTTPResponse, connection: http.client.HTTPConnection, shown: str, deadline: float
    ) -> bytes:
        content = bytearray()
        while True:
            left = self._left(deadline)
            if connection.sock is not None:
                connection.sock.settimeout(left)
            part = response.read1(_CHUNK)
            if not part:
                break
            content += part
            if len(content) > self.max_bytes:
                problem = f"{shown}: more than {self.max_bytes} bytes"
                raise MediaError(problem, "raise max_bytes", "MediaLimits.max_bytes")
        if response.length:
            raise MediaError(f"{shown}: the connection ended {response.length} bytes early", "try again")
        return bytes(content)


def _shown(parts: SplitResult) -> str:
    """Return a URL without what may be secret: user, password and query."""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:200]
