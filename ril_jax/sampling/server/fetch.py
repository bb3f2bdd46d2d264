"""Images from the network: only from hosts that the operator names, never from inside its own network."""

import ipaddress
import socket
import time
from collections.abc import Callable, Sequence
from urllib.parse import urljoin, urlsplit

import httpx

from ril_jax.errors import InputError

SECONDS = 20.0  # for a whole fetch
_MAX_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet."""
    ip = ipaddress.ip_address(address)
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_global and not ip.is_multicast


class ImageFetcher:
    """Gets the bytes behind an http(s) URL within limits.

    hosts: those that may be asked, by name; none of them fetches nothing. max_bytes: of an answer. The host is looked
    up once, and the address that was judged by `allowed` is the one that is connected to.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        max_bytes: int,
        *,
        seconds: float = SECONDS,
        allowed: Callable[[str], bool] = is_public,
    ):
        self._hosts = {host.lower() for host in hosts}
        self._max_bytes, self._seconds, self._allowed = max_bytes, seconds, allowed

    def __call__(self, url: str, where: str) -> bytes:
        """Raises InputError, with `where`, for a host that is not named, and where there is nothing to be had."""
        end = time.monotonic() + self._seconds
        with httpx.Client(trust_env=False, follow_redirects=False) as client:
            for _ in range(_MAX_REDIRECTS + 1):
                data, target = self._get(client, url, where, end)
                if target is None:
                    return data
                url = target
        raise InputError(f"{where}: the image's address leads on and on; give a data URL")

    def _get(self, client: httpx.Client, url: str, where: str, end: float) -> tuple[bytes, str | None]:
        """The bytes, or where it says that they are."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port or _PORTS[parts.scheme]
        except (ValueError, KeyError):
            raise InputError(f"{where}: the image's address is no http(s) URL; give a data URL") from None
        if host not in self._hosts:
            raise InputError(
                f"{where}: images are not fetched from {host or 'there'}; give a data URL, or name the host in "
                f"config.server.allowed_image_hosts"
            )
        try:
            address = self._address(host, port, where)
            name = parts.netloc.rpartition("@")[2]
            bracketed = f"[{address}]" if ":" in address else address
            request = client.build_request(
                "GET",
                parts._replace(netloc=f"{bracketed}:{port}", fragment="").geturl(),
                headers={"Host": name, "Accept": "image/*", "Accept-Encoding": "identity"},
                extensions={"sni_hostname": host},
                timeout=max(0.1, end - time.monotonic()),
            )
            response = client.send(request, stream=True)
            try:
                if response.is_redirect:
                    target = urljoin(url, response.headers["location"])
                    if (urlsplit(target).hostname or "").lower() != host:
                        raise InputError(f"{where}: the image's address leads on to another host; give a data URL")
                    return b"", target
                if response.status_code != 200:
                    raise InputError(f"{where}: the image's host answers with status {response.status_code}")
                return self._read(response, where, end), None
            finally:
                response.close()
        except InputError:
            raise
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise InputError(f"{where}: the image cannot be fetched ({type(error).__name__})") from None

    def _address(self, host: str, port: int, where: str) -> str:
        found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        for address in found:
            if not self._allowed(str(address)):
                raise InputError(f"{where}: {host} is inside a private network; give a data URL")
        return str(found[0])

    def _read(self, response: httpx.Response, where: str, end: float) -> bytes:
        data = bytearray()
        for piece in response.iter_bytes():
            data += piece
            if len(data) > self._max_bytes:
                raise InputError(f"{where}: the image has more than {self._max_bytes:,} bytes; give a smaller one")
            if time.monotonic() > end:
                raise InputError(f"{where}: the image did not come within {self._seconds:g} seconds; give a data URL")
        return bytes(data)
