# SPDX-License-Identifier: Apache-2.0
"""All processes of a launch stop, however the launcher exits.

The servers are small fakes that serve /health and record their process id.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from atlas_jax import errors
from rollout import supervisor

_ROOT = pathlib.Path(__file__).parents[2]

_SERVER = """
import http.server, os, pathlib, signal, sys
port, role, notes, mode = sys.argv[1:]
with open(notes, "a") as file:
  file.write(f"{os.getpid()}\\n")
if mode == "fails":
  sys.exit("no such model")
if mode == "stubborn":
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    if mode == "slow":
      import time; time.sleep(60)
    body = pathlib.Path(notes + "." + role).read_bytes()
    self.send_response(200)
    self.end_headers()
    self.wfile.write(body)
address = ("127.0.0.1", int(port))
http.server.ThreadingHTTPServer(address, Handler).serve_forever()
"""


@pytest.fixture
def stage(tmp_path):
  return _Stage(tmp_path)


class _Stage:
  """Creates fake servers, and checks that none of them is left."""

  def __init__(self, path):
    self.path, self.notes = path, path / "pids"
    self.notes.touch()
    self.ports = []
    for role in ("policy", "student"):
      health = {
        "status": "ok",
        "role": role,
        "engine": "jax",
        "model": "fake",
        "max_model_len": 64,
        "tokenizer_digest": "",
        "version": 0,
        "num_running": 0,
        "num_waiting": 0,
      }
      (path / f"pids.{role}").write_text(json.dumps(health))

  def server(self, role="policy", mode="well", answers_as=None, grace_s=10.0):
    port = _free_port()
    self.ports.append(port)
    argv = (sys.executable, "-c", _SERVER, str(port), answers_as or role)
    command = supervisor.Command(
      f"{role} server on port {port}",
      (*argv, str(self.notes), mode),
      {},
      self.path / "logs" / f"{role}.log",
      grace_s,
    )
    return supervisor.Server(role, f"http://127.0.0.1:{port}", command)

  def pids(self):
    return [int(line) for line in self.notes.read_text().split()]

  def check_nothing_left(self):
    for pid in self.pids():
      assert not _is_alive(pid)
    # A connection of another process may use the port for a moment.
    _wait_for(self._ports_are_free)

  def _ports_are_free(self):
    try:
      for port in self.ports:
        supervisor.check_ports("127.0.0.1", port, 1)
    except errors.ConfigError:
      return False
    return True


def _training(code):
  return supervisor.Command(
    "Training", (sys.executable, "-c", code), {}, None, 10.0
  )


def _free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def _is_alive(pid):
  try:  # A zombie has no command line.
    return bool(pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())
  except (FileNotFoundError, ProcessLookupError):
    return False


def _wait_for(condition, seconds=30.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, f"not true within {seconds} s"
    time.sleep(0.05)


def test_the_error_for_a_port_in_use_suggests_a_free_one():
  with socket.socket() as holder:
    holder.bind(("127.0.0.1", 0))
    holder.listen()
    port = holder.getsockname()[1]
    # Another test may use the first of the two.
    either = rf"Port ({port - 1}|{port}) is"
    with pytest.raises(errors.ConfigError, match=either) as caught:
      supervisor.check_ports("127.0.0.1", port - 1, 2)
  assert caught.value.exit_code == errors.Exit.CONFIG
  suggested = int(caught.value.fix.rpartition("=")[2].rstrip("."))
  supervisor.check_ports("127.0.0.1", suggested, 2)


@pytest.mark.parametrize("host", ["192.0.2.1", "host.invalid"])
def test_servers_cannot_be_started_at_another_machines_address(host):
  with pytest.raises(errors.ConfigError, match="of this machine") as caught:
    supervisor.check_ports(host, 9000, 1)
  assert "launch.sh" in caught.value.fix


def test_the_token_is_not_sent_to_a_proxy(stage, monkeypatch):
  """The proxy of the environment would get every request, and the token."""
  with socket.socket() as proxy:
    proxy.bind(("127.0.0.1", 0))
    proxy.listen()
    proxy.settimeout(0.1)
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
      monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
    monkeypatch.setenv("no_proxy", "")
    assert supervisor.run([stage.server()], _training(""), max_wait_s=30.0) == 0
    with pytest.raises(TimeoutError):
      proxy.accept()
  stage.check_nothing_left()


def test_servers_run_during_training_and_stop_after_it(stage):
  servers = [stage.server("policy"), stage.server("student")]
  asks = "import urllib.request\n" + "\n".join(
    f"urllib.request.urlopen('{server.url}/health', timeout=20).read()"
    for server in servers
  )
  assert supervisor.run(servers, _training(asks), max_wait_s=30.0) == 0
  assert len(stage.pids()) == 2
  stage.check_nothing_left()


def test_the_launch_returns_the_exit_code_of_training(stage):
  training = _training("import sys; sys.exit(4)")
  assert supervisor.run([stage.server()], training, max_wait_s=30.0) == 4
  stage.check_nothing_left()


def test_killed_training_is_an_error(stage):
  training = _training("import os; os.kill(os.getpid(), 9)")
  with pytest.raises(errors.AtlasError, match="killed by SIGKILL") as caught:
    supervisor.run([stage.server()], training, max_wait_s=30.0)
  assert caught.value.exit_code == errors.Exit.INTERNAL
  stage.check_nothing_left()


def test_aborted_training_is_reported_as_a_lost_process(stage):
  training = _training("import os; os.abort()")
  with pytest.raises(errors.LostProcessError, match="its own libraries"):
    supervisor.run([stage.server()], training, max_wait_s=30.0)
  stage.check_nothing_left()


@pytest.mark.parametrize(
  ("mode", "answers_as", "message"),
  [
    ("fails", "policy", "no such model"),
    ("well", "student", "role=student, status=ok"),
    ("slow", "policy", "not healthy within 1 s"),
  ],
)
def test_a_server_that_is_not_healthy_in_time_fails_the_launch(
  stage, monkeypatch, caplog, mode, answers_as, message
):
  caplog.set_level("INFO")
  monkeypatch.setattr(supervisor, "_PROBE_S", 1.0)
  monkeypatch.setattr(supervisor, "_PROGRESS_S", 0.0)
  servers = [stage.server(mode=mode, answers_as=answers_as)]
  marker = stage.path / "trained"
  training = _training(f"open({str(marker)!r}, 'w')")
  with pytest.raises(errors.RolloutError) as caught:
    supervisor.run(servers, training, max_wait_s=1.0)
  assert message in str(caught.value)
  if mode == "well":
    assert "on port" in caplog.text
    assert ": starting, 1 s (limit 1 s; role=student, status=ok)" in caplog.text
  assert str(stage.path / "logs" / "policy.log") in caught.value.where
  assert not marker.exists()
  stage.check_nothing_left()


def test_a_server_that_exits_is_restarted(stage):
  server = stage.server()
  code = f"""
import os, time, urllib.request
first = open({str(stage.notes)!r}).read()
os.kill(int(first), 9)
while open({str(stage.notes)!r}).read() == first: time.sleep(0.05)
"""
  assert supervisor.run([server], _training(code), max_wait_s=30.0) == 0
  assert len(stage.pids()) == 2
  stage.check_nothing_left()


@pytest.mark.parametrize("status", ["dead", "hung"])
def test_a_server_whose_engine_is_lost_is_restarted(stage, monkeypatch, status):
  monkeypatch.setattr(supervisor, "_CHECK_S", 0.5)
  server = stage.server()
  paths = (str(stage.notes), str(stage.notes) + ".policy")
  code = f"""
import pathlib, time
notes, health = map(pathlib.Path, {paths})
first, well = notes.read_text(), health.read_text()
health.write_text(well.replace('"ok"', '"{status}"'))
while notes.read_text() == first: time.sleep(0.05)
health.write_text(well)
"""
  assert supervisor.run([server], _training(code), max_wait_s=30.0) == 0
  assert len(stage.pids()) == 2
  stage.check_nothing_left()


# Saves on SIGTERM, as training does.
_SAVES = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (saved.touch(), sys.exit(75)))
saved = pathlib.Path({saved!r})
pathlib.Path({begun!r}).touch()
time.sleep(60)
"""


def _launch_apart(servers, training):
  """Runs a launch in a separate process, so that it can be killed."""
  fields = [(s.role, s.url, s.command) for s in servers]
  code = f"""
import sys
from pathlib import PosixPath
from atlas_jax import errors
from rollout import supervisor
from rollout.supervisor import Command, Server
servers = [Server(*fields) for fields in {fields!r}]
try:
  sys.exit(supervisor.run(servers, {training!r}, max_wait_s=30.0))
except errors.AtlasError as error:
  sys.exit(int(error.exit_code))
"""
  return subprocess.Popen(
    [sys.executable, "-c", code], cwd=_ROOT, start_new_session=True
  )


def _saving(stage):
  begun, saved = stage.path / "begun", stage.path / "saved"
  code = _SAVES.format(begun=str(begun), saved=str(saved))
  return _training(code), begun, saved


@pytest.mark.parametrize(
  "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
)
def test_a_signal_lets_training_save_and_leaves_nothing(stage, number):
  training, begun, saved = _saving(stage)
  servers = [stage.server("policy"), stage.server("student")]
  process = _launch_apart(servers, training)
  _wait_for(begun.exists)
  os.killpg(process.pid, number)  # As a terminal does on Ctrl-C.
  assert process.wait(30.0) == errors.Exit.PREEMPTED
  assert saved.exists()
  stage.check_nothing_left()


def test_a_signal_before_training_leaves_nothing(stage):
  training, begun, _ = _saving(stage)
  process = _launch_apart([stage.server(mode="slow")], training)
  _wait_for(stage.pids)
  process.terminate()
  assert process.wait(30.0) == errors.Exit.PREEMPTED
  assert not begun.exists()
  stage.check_nothing_left()


@pytest.mark.parametrize("mode", ["well", "stubborn"])
def test_servers_stop_when_the_launcher_is_killed(stage, mode):
  """Within the grace period, even if they ignore SIGTERM."""
  training, begun, saved = _saving(stage)
  server = stage.server(mode=mode, grace_s=1.0)
  process = _launch_apart([server], training)
  _wait_for(begun.exists)
  os.kill(process.pid, signal.SIGKILL)
  process.wait(30.0)
  _wait_for(lambda: not any(map(_is_alive, stage.pids())), seconds=6.0)
  _wait_for(saved.exists)
  stage.check_nothing_left()


def test_servers_outlast_training_that_saves_after_a_kill(stage):
  """The last step samples from servers, one of which was restarted."""
  servers = [stage.server("policy", grace_s=1.0), stage.server("student")]
  begun, saved = stage.path / "begun", stage.path / "saved"
  code = f"""
import os, pathlib, signal, sys, time, urllib.request
def save(*_):
  time.sleep(2.0)
  for url in {[server.url for server in servers]!r}:
    urllib.request.urlopen(url + "/health", timeout=5).read()
  pathlib.Path({str(saved)!r}).touch()
  sys.exit(75)
signal.signal(signal.SIGTERM, save)
notes = pathlib.Path({str(stage.notes)!r})
os.kill(int(notes.read_text().split()[0]), signal.SIGKILL)
while len(notes.read_text().split()) < 3: time.sleep(0.05)
time.sleep(1.0)
pathlib.Path({str(begun)!r}).touch()
time.sleep(60)
"""
  process = _launch_apart(servers, _training(code))
  _wait_for(begun.exists)
  os.kill(process.pid, signal.SIGKILL)
  process.wait(30.0)
  _wait_for(saved.exists, seconds=10.0)
  _wait_for(lambda: not any(map(_is_alive, stage.pids())), seconds=6.0)
  stage.check_nothing_left()


def test_a_child_process_of_a_server_stops_with_it(stage):
  child = "import time; time.sleep(60)"
  code = f"""
import subprocess, sys
p = subprocess.Popen([sys.executable, "-c", {child!r}])
open({str(stage.notes)!r}, "a").write(f"{{p.pid}}\\n")
"""
  assert supervisor.run([], _training(code), max_wait_s=1.0) == 0
  assert len(stage.pids()) == 1
  stage.check_nothing_left()
