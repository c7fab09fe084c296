# SPDX-License-Identifier: Apache-2.0
"""Tests every endpoint and its error responses."""

import pytest

from rollout import wire
from rollout.server import api_page
from tests import scripted_server


@pytest.mark.parametrize("slash", ["", "/"])
def test_every_endpoint_responds_with_and_without_a_slash(tmp_path, slash):
  async def test():
    served = scripted_server.Server()
    async with served.client() as client:
      for method, path, body in [
        ("GET", "/health", None),
        ("GET", "/version", None),
        ("GET", "/metrics", None),
        ("GET", "/get_tensor_parallel_size", None),
        ("POST", "/generate", scripted_server.request()),
        ("POST", "/init_communicator", scripted_server.init(tmp_path)),
        ("POST", "/update_weights", scripted_server.push(tmp_path, 1)),
        ("POST", "/reset_prefix_cache", None),
        ("POST", "/close_communicator", {"trainer_id": "t"}),
      ]:
        reply = await client.request(method, path + slash, json=body)
        assert reply.status_code == 200, (path, reply.text)

  scripted_server.run(test)


def test_completions_are_in_prompt_order_with_their_version():
  async def test():
    async with scripted_server.Server().client() as client:
      prompts = [
        {"row_id": "a", "token_ids": [3]},
        {"row_id": "b", "text": "of words"},
      ]
      reply = await client.post(
        "/generate", json=scripted_server.request(prompts=prompts, n=3)
      )
      answer = wire.GenerateResponse.model_validate(reply.json())
      assert [len(group) for group in answer.completions] == [3, 3]
      assert (answer.request_id, answer.version) == ("r", 0)

  scripted_server.run(test)


def test_two_fields_suffice_and_texts_are_returned():
  async def test():
    served = scripted_server.Server()
    async with served.client() as client:
      body = {"prompts": [{"text": "a word"}, {"text": "to"}], "max_tokens": 4}
      replies = [await client.post("/generate", json=body) for _ in range(2)]
      answers = [
        wire.GenerateResponse.model_validate(r.json()) for r in replies
      ]
      for answer in answers:
        assert [group[0].text for group in answer.completions] == ["1 2"] * 2
      assert answers[0].request_id != answers[1].request_id
      # Rows differ, so that equal prompts get different random numbers.
      assert [p.row_id for p in served.engine.prompts] == ["0", "1"]
      body["with_text"] = False
      reply = await client.post("/generate", json=body)
      assert reply.json()["completions"][0][0]["text"] is None

  scripted_server.run(test)


def test_error_responses_contain_no_prompt_text():
  async def test():
    async with scripted_server.Server().client() as client:
      prompts = [{"row_id": "x", "txt": "a secret"}]
      reply = await client.post(
        "/generate", json=scripted_server.request(prompts=prompts)
      )
      scripted_server.assert_rejected(reply, 422, "invalid")
      assert "secret" not in reply.text
      assert "prompts.0.txt" in reply.text

  scripted_server.run(test)


def test_unknown_paths_and_methods_get_error_responses():
  async def test():
    async with scripted_server.Server().client() as client:
      scripted_server.assert_rejected(await client.get("/nothing"), 404, "http")
      scripted_server.assert_rejected(
        await client.get("/generate"), 405, "http"
      )
      scripted_server.assert_rejected(
        await client.post("/generate", content="{"), 415, "content_type"
      )

  scripted_server.run(test)


def test_the_documentation_shows_every_field_and_loads_nothing():
  async def test():
    async with scripted_server.Server().client() as client:
      described = (await client.get("/openapi.json")).json()
      assert len(described["paths"]) == 9
      page = await client.get("/docs")
      assert page.headers["content-type"].startswith("text/html")
      policy = page.headers["content-security-policy"]
      assert policy.startswith("default-src 'none'")
      for name, schema in described["components"]["schemas"].items():
        assert f"<h3 id={name}>" in page.text
        for field in schema.get("properties", ()):
          assert f"<code>{field}</code>" in page.text
      for outside in ("<script", "<link", "src=", "url(", "https://"):
        assert outside not in page.text
      assert (await client.get("/redoc")).status_code == 404
      # Those that a request needs.
      required = described["components"]["schemas"]["GenerateRequest"]
      assert required["required"] == ["prompts", "max_tokens"]

  scripted_server.run(test)


def test_the_documentation_escapes_descriptions():
  page = api_page.render(
    {
      "info": {"title": "<b>", "description": "<i>"},
      "paths": {"/<x>": {"get": {"description": "<y>", "responses": {}}}},
      "components": {
        "schemas": {"S": {"properties": {"<f>": {"type": "<t>"}}}}
      },
    }
  )
  assert not any(tag in page for tag in ("<b>", "<i>", "<x>", "<y>", "<f>"))
  assert "<t>" not in page
