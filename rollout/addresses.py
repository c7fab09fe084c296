# SPDX-License-Identifier: Apache-2.0
"""Addresses of servers: URLs, sockets, and which are of this machine only."""

import ipaddress
import socket

# Servers listen on all addresses; clients of this machine use loopback.
_OF_ANY = {4: "127.0.0.1", 6: "::1"}


def url(host: str, port: int) -> str:
  """Returns the URL of a server that listens on `host`."""
  try:
    address = ipaddress.ip_address(host)
  except ValueError:
    return f"http://{host}:{port}"  # A name.
  text = _OF_ANY[address.version] if address.is_unspecified else str(address)
  return f"http://[{text}]:{port}" if ":" in text else f"http://{text}:{port}"


def is_loopback(host: str) -> bool:
  """Returns whether `host` is reachable from this machine only."""
  try:
    return host == "localhost" or ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def bind(host: str, port: int) -> socket.socket:
  """Returns a socket bound to a host's first address, IPv4 or IPv6.

  Raises:
    socket.gaierror: if the host is unknown.
    OSError: if the port is in use, or the address is another machine's.
    OverflowError: if there is no such port.
  """
  family, kind, _, _, address = socket.getaddrinfo(
    host, None, type=socket.SOCK_STREAM
  )[0]
  bound = socket.socket(family, kind)
  # Sockets in TIME_WAIT must not block the port.
  bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    bound.bind((address[0], port, *address[2:]))
  except (OSError, OverflowError):
    bound.close()
    raise
  return bound
