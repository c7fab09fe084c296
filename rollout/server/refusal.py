# SPDX-License-Identifier: Apache-2.0
"""Rejected requests, and the HTTP responses for them."""

import fastapi

from rollout import wire


class RefusalError(Exception):
  """A rejected request, with its HTTP status and response body.

  `retry_after_s` is set if the same request may succeed later.
  """

  def __init__(
    self,
    status: int,
    error: str,
    *,
    what: str,
    why: str,
    fix: str,
    retry_after_s: int | None = None,
  ) -> None:
    super().__init__(what)
    self.status, self.retry_after_s = status, retry_after_s
    self.body = wire.Refusal(error=error, what=what, why=why, fix=fix)


def respond(
  status: int, body: wire.Refusal, retry_after_s: int | None = None
) -> fastapi.Response:
  """Returns the HTTP response for a refusal."""
  headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
  if status == 401:
    headers["WWW-Authenticate"] = "Bearer"
  return fastapi.Response(
    body.model_dump_json(), status, headers, "application/json"
  )
