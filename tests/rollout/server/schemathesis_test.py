# SPDX-License-Identifier: Apache-2.0
"""Schemathesis calls every route with valid and invalid requests.

They are generated from the app's own OpenAPI description, which also says what
a response may be.
"""

import hypothesis
import pytest
import schemathesis
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks

from tests import scripted_server

_HEADERS = {"Authorization": f"Bearer {scripted_server.TOKEN}"}
_CHECKS = [
  checks.not_a_server_error,
  openapi_checks.content_type_conformance,
  openapi_checks.response_schema_conformance,
  openapi_checks.status_code_conformance,
]


def _operations():
  app = scripted_server.Server(token=scripted_server.TOKEN).app
  schema = schemathesis.openapi.from_asgi(
    "/openapi.json", app, headers=_HEADERS
  )
  return [found.ok() for found in schema.get_all_operations()]


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_every_response_is_described_and_none_is_an_error_of_the_server(mode):
  operations = _operations()
  labels = []
  for operation in operations:
    if mode.is_negative and not operation.body:
      continue  # Nothing to get wrong.

    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis.settings(
      max_examples=10 if operation.body else 1,
      database=None,
      deadline=None,
      derandomize=True,
      suppress_health_check=list(hypothesis.HealthCheck),
    )
    def check(case):
      case.call_and_validate(checks=_CHECKS, headers=_HEADERS)
      labels.append(case.operation.label)

    check()
  assert len(set(labels)) == (4 if mode.is_negative else 9)
