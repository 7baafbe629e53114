"""A headless Chromium driven by the DevTools protocol over pipes; standard library only."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import tempfile
import time
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_DEADLINE_S = 120.0
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
          "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe")


def find() -> str | None:
  """The path of an installed browser, or None."""
  return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
  """One tab. requests: URLs that it asked for.  complaints: exceptions, and errors and warnings of the console."""

  def __init__(self, command_fd: int, answer_fd: int):
    self._command_fd, self._answer_fd = command_fd, answer_fd
    self._buffer, self._last, self._session = b"", 0, None
    self._loaded = False
    self.requests: list[str] = []
    self.complaints: list[str] = []
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.call(f"{domain}.enable")

  def call(self, method: str, **parameters: Any) -> dict[str, Any]:
    """The result of one command; events on the way are noted."""
    self._last += 1
    message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._command_fd, json.dumps(message).encode() + b"\0")
    while True:
      answer = self._read()
      if answer.get("id") == self._last:
        if "error" in answer:
          raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

  def open(self, url: str, width: int, height: int) -> None:
    """Loads a page at a size in CSS pixels and waits until it is loaded."""
    self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
              mobile=width < 600)
    self._loaded = False
    self.call("Page.navigate", url=url)
    while not self._loaded:
      self._read()

  def evaluate(self, expression: str) -> Any:
    """The value of a JavaScript expression, awaited."""
    result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
    if "exceptionDetails" in result:
      raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
    return result["result"].get("value")

  def _read(self) -> dict[str, Any]:
    end = time.monotonic() + _DEADLINE_S
    while b"\0" not in self._buffer:
      if not select.select([self._answer_fd], [], [], max(0.0, end - time.monotonic()))[0]:
        raise TimeoutError(f"the browser did not answer within {_DEADLINE_S:.0f} s")
      if not (chunk := os.read(self._answer_fd, 1 << 16)):
        raise RuntimeError("the browser ended")
      self._buffer += chunk
    line, _, self._buffer = self._buffer.partition(b"\0")
    message = json.loads(line)
    method, found = message.get("method"), message.get("params", {})
    if method == "Page.loadEventFired":
      self._loaded = True
    elif method == "Network.requestWillBeSent":
      self.requests.append(found["request"]["url"])
    elif method == "Runtime.exceptionThrown":
      self.complaints.append(str(found["exceptionDetails"]))
    elif method == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
      self.complaints.append(found["entry"]["text"])
    elif method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
      self.complaints.append(str(found["args"]))
    return message


@contextlib.contextmanager
def page() -> Iterator[Page]:
  """A fresh tab in a fresh profile; the browser ends with the block."""
  executable = find()
  if executable is None:
    raise FileNotFoundError(f"no browser is installed; needs one of {NAMES}")
  to_browser, from_us = os.pipe()
  from_browser, to_us = os.pipe()
  profile = tempfile.mkdtemp(prefix="hbpo_jax_browser_")
  # The browser reads commands from descriptor 3 and answers on 4.
  script = f'exec "$0" "$@" 3<&{to_browser} 4>&{to_us}'
  process = subprocess.Popen(
      ["bash", "-c", script, executable, *_FLAGS, f"--user-data-dir={profile}"], pass_fds=(to_browser, to_us),
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
  os.close(to_browser)
  os.close(to_us)
  try:
    yield Page(from_us, from_browser)
  finally:
    os.close(from_us)  # It quits when its commands end.
    try:
      process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
    os.close(from_browser)
    shutil.rmtree(profile, ignore_errors=True)


def file_url(path: pathlib.Path) -> str:
  """The address of a local file."""
  return path.resolve().as_uri()
