"""A small Google Cloud Storage at 127.0.0.1: the requests of its JSON API that reading and writing objects need.

A client finds it by STORAGE_EMULATOR_HOST. It keeps whole objects only, lists them page by page, and shows faults to
order.
"""

import base64
from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 50  # Objects of a page; few, so that there are several.


@dataclasses.dataclass
class Fault:
  """Requests that fail.

  pattern: of 'METHOD object', from its start; lists are 'GET '.  status: of the answer.
  left: how often still.  after: such requests that go well before.
  """
  pattern: str
  status: int
  left: int = 10**9
  after: int = 0


class Storage:
  """The state of the server.

  Attributes:
    address: of the server.
    buckets: by name, the objects by name.
    requests: 'METHOD object' of all requests, in order; an upload in parts is 'POST object' and 'PART object'.
    faults: that it is to show.
  """

  def __init__(self, address: str):
    self.address = address
    self.buckets: dict[str, dict[str, bytes]] = {}
    self.requests: list[str] = []
    self.faults: list[Fault] = []
    self.uploads: dict[str, tuple[str, str, bytearray]] = {}
    self.lock = threading.Lock()

  def names(self, bucket: str, prefix: str = "") -> list[str]:
    """Names of objects, sorted."""
    return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

  def fault(self, request: str) -> int:
    """Notes a request; the status that it fails with, or 0."""
    with self.lock:
      self.requests.append(request)
      for fault in self.faults:
        if re.match(fault.pattern, request):
          fault.after -= 1
          if fault.after < 0 < fault.left:
            fault.left -= 1
            return fault.status
    return 0


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  storage: Storage

  def log_message(self, *_):
    pass

  def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def answer_json(self, value: dict, status: int = 200, **headers: str) -> None:
    self.answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

  def refuse(self, status: int, message: str = "ordered") -> None:
    self.answer_json({"error": {"code": status, "message": message}}, status)

  def parsed(self) -> tuple[str, str, str, dict[str, str]]:
    """(what comes before /b/, bucket, object, query)."""
    url = urlsplit(self.path)
    found = re.fullmatch(r"/(.*?)storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", url.path)
    query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
    return found[1], unquote(found[2]), unquote(found[3] or ""), query

  def objects(self, bucket: str) -> dict[str, bytes] | None:
    if bucket not in self.storage.buckets:
      self.refuse(404, "The specified bucket does not exist.")
      return None
    return self.storage.buckets[bucket]

  def do_GET(self):
    kind, bucket, name, query = self.parsed()
    if status := self.storage.fault(f"GET {name}"):
      return self.refuse(status)
    if (objects := self.objects(bucket)) is None:
      return None
    if not name:
      return self.list(bucket, query)
    if name not in objects:
      return self.refuse(404, f"No such object: {bucket}/{name}")
    if query.get("alt") != "media" and "download" not in kind:
      return self.answer_json(self.about(bucket, name))
    content, status, headers = objects[name], 200, {}
    if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
      start, end = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
      if start >= len(content):
        return self.refuse(416, "The requested range cannot be satisfied.")
      headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
      content, status = content[start:end + 1], 206
    return self.answer(status, content, **headers)

  def list(self, bucket: str, query: dict[str, str]) -> None:
    names = self.storage.names(bucket, query.get("prefix", ""))
    prefixes = []
    if delimiter := query.get("delimiter"):
      cut = lambda name: name.find(delimiter, len(query.get("prefix", "")))
      prefixes = sorted({name[:cut(name) + 1] for name in names if cut(name) >= 0})
      names = [name for name in names if cut(name) < 0]
    start = int(query.get("pageToken", 0))
    found = {"kind": "storage#objects", "prefixes": prefixes,
             "items": [self.about(bucket, name) for name in names[start:start + PAGE]]}
    self.answer_json(found | ({"nextPageToken": str(start + PAGE)} if len(names) > start + PAGE else {}))

  def about(self, bucket: str, name: str) -> dict:
    content = self.storage.buckets[bucket].get(name, b"")
    return {
        "kind": "storage#object", "name": name, "bucket": bucket, "size": str(len(content)), "generation": "1",
        "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(), "storageClass": "STANDARD",
        "timeCreated": "2026-01-01T00:00:00Z", "updated": "2026-01-01T00:00:00Z"}

  def do_POST(self):
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    if upload := parse_qs(urlsplit(self.path).query).get("upload_id"):
      return self.part(upload[0], body)
    _, bucket, _, query = self.parsed()
    content = b""
    if query["uploadType"] == "multipart":
      boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
      _, head, rest = body.split(b"--" + boundary, 2)
      name = json.loads(head.split(b"\n\n", 1)[1])["name"]
      content = rest.split(b"\n\n", 1)[1].removesuffix(b"\n--" + boundary + b"--")
    else:
      name = json.loads(body)["name"]
    if status := self.storage.fault(f"POST {name}"):
      return self.refuse(status)
    if (objects := self.objects(bucket)) is None:
      return None
    if query["uploadType"] == "multipart":
      objects[name] = content
      return self.answer_json(self.about(bucket, name))
    with self.storage.lock:
      key = f"upload-{len(self.storage.uploads)}-long-enough"
      self.storage.uploads[key] = bucket, name, bytearray()
    return self.answer(200, Location=f"{self.storage.address}/upload/storage/v1/b/{bucket}/o?upload_id={key}")

  do_PUT = do_POST

  def part(self, upload: str, body: bytes) -> None:
    bucket, name, content = self.storage.uploads[upload]
    if status := self.storage.fault(f"PART {name}"):
      return self.refuse(status)
    start, end, size = map(int, re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", self.headers["Content-Range"]).groups())
    content[start:end + 1] = body
    if end + 1 < size:
      return self.answer(308, Range=f"bytes=0-{end}")
    self.storage.buckets[bucket][name] = bytes(content)
    return self.answer_json(self.about(bucket, name))

  def do_DELETE(self):
    if "upload_id=" in self.path:
      return self.answer(204)
    _, bucket, name, _ = self.parsed()
    if status := self.storage.fault(f"DELETE {name}"):
      return self.refuse(status)
    if (objects := self.objects(bucket)) is None:
      return None
    if objects.pop(name, None) is None:
      return self.refuse(404, "No such object")
    return self.answer(204)


@contextlib.contextmanager
def serve() -> Iterator[Storage]:
  """A context with a server that has one empty bucket, 'b'."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), None)
  storage = Storage(f"http://127.0.0.1:{server.server_address[1]}")
  storage.buckets["b"] = {}
  server.RequestHandlerClass = type("Handler", (_Handler,), {"storage": storage})
  server.daemon_threads = True
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
  thread.start()
  try:
    yield storage
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
