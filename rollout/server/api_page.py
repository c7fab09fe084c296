# SPDX-License-Identifier: Apache-2.0
"""GET /openapi.json, and GET /docs: a page of it without scripts or a CDN."""

from collections.abc import Mapping, Sequence
import html
import json
from typing import Any

import fastapi
from fastapi import responses
import pydantic
from pydantic import json_schema

_REF = "#/components/schemas/{model}"
_STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto }
code, pre { background: #f0f0f0; padding: 0.1em 0.3em }
table { border-collapse: collapse }
td, th { border: 1px solid #ccc; padding: 0.2em 0.6em; text-align: left }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_EXAMPLE = {"prompts": [{"text": "Two plus two is"}], "max_tokens": 8}
_Json = Mapping[str, Any]  # Any: JSON.


def request_body(
  kind: type[pydantic.BaseModel],
) -> dict[str, Any]:  # Any: JSON.
  """Describes the body of a route, which FastAPI does not parse."""
  schema = {"$ref": _REF.format(model=kind.__name__)}
  return {"required": True, "content": {"application/json": {"schema": schema}}}


class Page:
  """The documentation of an app."""

  def __init__(
    self, app: fastapi.FastAPI, kinds: Sequence[type[pydantic.BaseModel]]
  ) -> None:
    """Describes an app whose routes have bodies of these kinds."""
    self._app, self._kinds = app, kinds

  async def openapi(self) -> fastapi.Response:
    """Returns the OpenAPI description."""
    return responses.JSONResponse(self._describe())

  async def html(self) -> fastapi.Response:
    """Returns the OpenAPI description as a page."""
    return responses.HTMLResponse(
      render(self._describe()), headers={"Content-Security-Policy": _POLICY}
    )

  def _describe(self) -> dict[str, Any]:  # Any: JSON.
    """Returns FastAPI's description plus the schemas of the bodies."""
    described = self._app.openapi()
    _, bodies = json_schema.models_json_schema(
      [(kind, "validation") for kind in self._kinds], ref_template=_REF
    )
    described["components"]["schemas"] |= bodies["$defs"]
    return described


def render(openapi: _Json) -> str:
  """Returns an HTML page of an OpenAPI description."""
  parts = [f"<p>{html.escape(openapi['info']['description'])}</p>"]
  parts.append(
    "<p>For example: <pre>curl -H 'Content-Type: application/json' -d "
    f"'{html.escape(json.dumps(_EXAMPLE))}' http://HOST:PORT/generate</pre>"
  )
  for path, methods in openapi["paths"].items():
    for method, operation in methods.items():
      parts += _operation(f"{method.upper()} {path}", operation)
  for name, schema in openapi["components"]["schemas"].items():
    parts += _schema(name, schema)
  title = html.escape(openapi["info"]["title"])
  return (
    f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
    f"<style>{_STYLE}</style><h1>{title}</h1>{''.join(parts)}</html>"
  )


def _operation(heading: str, operation: _Json) -> list[str]:
  parts = [f"<h2>{html.escape(heading)}</h2>"]
  parts.append(f"<p>{html.escape(operation.get('description', ''))}</p>")
  for name, body in (
    ("Request", operation.get("requestBody")),
    ("Response", operation["responses"].get("200")),
  ):
    if schema := (body or {}).get("content", {}).get("application/json"):
      parts.append(f"<p>{name}: {_type(schema['schema'])}</p>")
  return parts


def _schema(name: str, schema: _Json) -> list[str]:
  parts = [f"<h3 id={html.escape(name)}>{html.escape(name)}</h3>"]
  parts.append(f"<p>{html.escape(schema.get('description', ''))}</p>")
  parts.append("<table><tr><th>field<th>type<th>default")
  for field, details in schema.get("properties", {}).items():
    default = json.dumps(details["default"]) if "default" in details else ""
    if field in schema.get("required", ()):
      default = "required"
    parts.append(
      f"<tr><td><code>{html.escape(field)}</code><td>{_type(details)}"
      f"<td>{html.escape(default)}"
    )
  return [*parts, "</table>"]


def _type(schema: _Json) -> str:
  """Returns the type of a JSON value, with a link to its table."""
  if ref := schema.get("$ref"):
    name = html.escape(ref.rpartition("/")[2])
    return f"<a href=#{name}>{name}</a>"
  if several := schema.get("anyOf"):
    return " or ".join(map(_type, several))
  if values := schema.get("enum"):
    return " or ".join(html.escape(json.dumps(value)) for value in values)
  if schema.get("type") == "array":
    return f"list of {_type(schema.get('items', {}))}"
  return html.escape(str(schema.get("type", "any")))
