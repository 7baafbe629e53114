"""A small Hugging Face hub at 127.0.0.1: the requests that reading and pushing repositories need, and faults to order.

Large files are kept on a second server, as on the real hub, to which downloads are redirected.
"""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import pathlib
import re
import threading
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".parquet", ".csv")  # What goes to large file storage, whatever its size.


@dataclasses.dataclass
class Repo:
  """Commits by hash, each {path: content}; refs by name; who may read and write."""
  commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
  refs: dict[str, str] = dataclasses.field(default_factory=dict)
  messages: list[str] = dataclasses.field(default_factory=list)
  gated: bool = False
  private: bool = False

  def commit(self, files: dict[str, bytes], ref: str = "main", message: str = "") -> str:
    """A new commit with exactly these files; returns its hash."""
    text = json.dumps([len(self.commits), *((k, hashlib.sha256(v).hexdigest()) for k, v in sorted(files.items()))])
    name = hashlib.sha1(text.encode()).hexdigest()
    self.commits[name], self.refs[ref] = dict(files), name
    self.messages.append(message)
    return name

  @property
  def head(self) -> dict[str, bytes]:
    """The files of main."""
    return self.commits[self.refs["main"]]


@dataclasses.dataclass(frozen=True)
class Request:
  """What a server was asked: 'hub' or 'storage', method, path, the Range and Authorization headers, bytes sent."""
  host: str
  method: str
  path: str
  range: str | None
  authorization: str | None
  sent: int


class Hub:
  """The state of the server, and the faults that it is to show.

  Attributes:
    address: of the hub.
    repos: by kind and name, such as ('models', 'org/name').
    requests: all that came, in order.
    strangers, readers, writers: tokens; a reader opens what is gated or private, a stranger is only known.
    cuts: by file name, after how many bytes its next downloads break off.
    refusals: statuses with which the next downloads are answered.
    wrong: contents that are served in place of a file's own.
    ignores_range: whether downloads always start at the first byte.
  """

  def __init__(self):
    self.address = self.storage_address = ""
    self.repos: dict[tuple[str, str], Repo] = {}
    self.blobs: dict[str, bytes] = {}
    self.requests: list[Request] = []
    self.strangers, self.readers, self.writers = {"hf_stranger"}, {"hf_reader"}, {"hf_writer"}
    self.cuts: dict[str, list[int]] = {}
    self.refusals: list[int] = []
    self.wrong: dict[str, bytes] = {}
    self.ignores_range = False
    self.lock = threading.Lock()

  def add(self, name: str, files: dict[str, bytes] | pathlib.Path, kind: str = "models") -> Repo:
    """A new repository, of files or of a directory."""
    repo = self.repos[kind, name] = Repo()
    repo.commit(files if isinstance(files, dict) else {
        p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()})
    return repo

  def downloads(self, name: str = "") -> list[Request]:
    """The requests that were for content, of one file or of all."""
    return [r for r in self.requests if r.method == "GET" and "/api/" not in r.path and r.sent and (
        r.path.split("?")[0].endswith(name))]


@contextlib.contextmanager
def serve():
  """A running Hub."""
  hub = Hub()
  with contextlib.ExitStack() as stack:
    hub.storage_address = stack.enter_context(_served(_handler(_Storage, hub)))
    hub.address = stack.enter_context(_served(_handler(_Front, hub)))
    yield hub


@contextlib.contextmanager
def _served(handler):
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  thread = threading.Thread(target=server.serve_forever, args=(0.02,))
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_port}"
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def _handler(base, hub):
  return type(base.__name__, (base,), {"hub": hub})


def git_digest(content: bytes) -> str:
  """git's name of a file's content."""
  return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(content: bytes) -> bytes:
  """What git holds in place of a large file."""
  return (f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(content).hexdigest()}\n"
          f"size {len(content)}\n").encode()


class _Base(http.server.BaseHTTPRequestHandler):
  hub: Hub
  host = ""
  protocol_version = "HTTP/1.1"

  def log_message(self, *args):
    pass

  def note(self, sent: int = 0) -> None:
    with self.hub.lock:
      self.hub.requests.append(Request(
          self.host, self.command, self.path, self.headers.get("Range"), self.headers.get("Authorization"), sent))

  def answer(self, status: int, body: bytes = b"", **headers) -> None:
    self.note(len(body))
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), str(value))
    if "Content_Length" not in headers:
      self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def answer_json(self, value, status: int = 200) -> None:
    self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

  def refuse(self, status: int, code: str = "", message: str = "") -> None:
    headers = {"X_Error_Code": code} if code else {}
    self.answer(status, json.dumps({"error": message}).encode(), X_Error_Message=message, **headers)

  def body(self) -> bytes:
    return self.rfile.read(int(self.headers.get("Content-Length", 0)))

  def send_content(self, name: str, content: bytes, **headers) -> None:
    """A file, from the byte that was asked for, up to where it is to break off."""
    hub = self.hub
    content = hub.wrong.get(name, content)
    if hub.refusals and self.command == "GET":
      return self.refuse(hub.refusals.pop(0), message="busy")
    asked = None if hub.ignores_range else re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
    first = int(asked[1]) if asked else 0
    if first and first >= len(content):
      return self.answer(416, Content_Range=f"bytes */{len(content)}")
    part = content[first:]
    cut = hub.cuts[name].pop(0) if hub.cuts.get(name) and self.command == "GET" else None
    sent = part if cut is None else part[:cut]
    self.note(0 if self.command == "HEAD" else len(sent))
    self.send_response(206 if asked else 200)
    if asked:
      self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
    for key, value in headers.items():
      self.send_header(key.replace("_", "-"), str(value))
    self.send_header("Content-Length", str(len(part)))
    self.send_header("Accept-Ranges", "bytes")
    self.end_headers()
    if self.command == "HEAD":
      return None
    self.wfile.write(sent)
    if cut is not None:
      self.wfile.flush()
      self.close_connection = True
      self.connection.shutdown(2)
    return None


class _Storage(_Base):
  """Where large files lie; /SHA256/NAME."""
  host = "storage"

  def do_GET(self):
    digest, name = self.path.split("?")[0].strip("/").split("/")
    self.send_content(name, self.hub.blobs[digest])

  do_HEAD = do_GET

  def do_PUT(self):
    content = self.body()
    digest = self.path.strip("/").split("/")[0]
    assert hashlib.sha256(content).hexdigest() == digest
    self.hub.blobs[digest] = content
    self.note(len(content))
    self.send_response(200)
    self.send_header("Content-Length", "0")
    self.end_headers()


class _Front(_Base):
  host = "hub"

  def token(self) -> str:
    return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

  def find(self, kind: str, name: str) -> Repo | None:
    """The repository, if it exists and may be seen; the answer is given where not."""
    repo, known = self.hub.repos.get((kind, name)), self.hub.readers | self.hub.writers
    if self.token() and self.token() not in known | self.hub.strangers:
      self.refuse(401, message="Invalid credentials in Authorization header")
    elif repo is None or (repo.private and self.token() not in known):
      # The real hub tells a stranger neither.
      self.refuse(404 if self.token() else 401, "RepoNotFound", "Repository not found")
    else:
      return repo
    return None

  def files_at(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]] | None:
    commit = repo.refs.get(unquote(revision), unquote(revision))
    if commit not in repo.commits:
      self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
      return None
    return commit, repo.commits[commit]

  def do_GET(self):
    path = urlsplit(self.path).path
    if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
      return self.info(found[1], found[2], found[3] or "main")
    if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+).*", path):
      return self.tree(found[1], found[2], found[3])
    if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
      return self.resolve("datasets" if found[1] else "models", found[2], found[3], unquote(found[4]))
    return self.refuse(404, message=f"no route {path}")

  do_HEAD = do_GET

  def info(self, kind, name, revision):
    if (repo := self.find(kind, name)) is None or (at := self.files_at(repo, revision)) is None:
      return
    commit, files = at
    siblings = []
    for path, content in files.items():
      entry = {"rfilename": path, "size": len(content), "blobId": git_digest(content)}
      if path.endswith(LARGE):
        entry["blobId"] = git_digest(pointer(content))
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
      siblings.append(entry)
    self.answer_json({"_id": "1", "id": name, "sha": commit, "private": repo.private, "tags": [], "downloads": 0,
                      "likes": 0, "gated": "manual" if repo.gated else False, "siblings": siblings})

  def tree(self, kind, name, revision):
    if (repo := self.find(kind, name)) is None or (at := self.files_at(repo, revision)) is None:
      return
    entries = []
    for path, content in at[1].items():
      entry = {"type": "file", "path": path, "size": len(content), "oid": git_digest(content)}
      if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
      entries.append(entry)
    self.answer_json(entries)

  def resolve(self, kind, name, revision, path):
    if (repo := self.find(kind, name)) is None:
      return None
    if repo.gated and self.token() not in self.hub.readers | self.hub.writers:
      return self.refuse(403 if self.token() else 401, "GatedRepo", f"Access to model {name} is restricted.")
    if (at := self.files_at(repo, revision)) is None:
      return None
    commit, files = at
    if path not in files:
      return self.refuse(404, "EntryNotFound", "Entry not found")
    content = files[path]
    if not path.endswith(LARGE):
      return self.send_content(path, content, X_Repo_Commit=commit, ETag=f'"{git_digest(content)}"')
    digest = hashlib.sha256(content).hexdigest()
    self.hub.blobs.setdefault(digest, content)
    return self.answer(
        302, X_Repo_Commit=commit, X_Linked_Size=len(content), X_Linked_Etag=f'"{digest}"',
        Location=f"{self.hub.storage_address}/{digest}/{path.rpartition('/')[2]}")

  def do_POST(self):
    path, body = urlsplit(self.path).path, self.body()
    if path == "/api/validate-yaml":
      return self.answer_json({"errors": [], "warnings": []})
    if not self.token():
      return self.refuse(401, message="Invalid username or password.")
    if self.token() not in self.hub.readers | self.hub.writers | self.hub.strangers:
      return self.refuse(401, message="Invalid credentials in Authorization header")
    if self.token() not in self.hub.writers:
      return self.refuse(403, message="Forbidden: you must use a write token to upload to a repository.")
    if path == "/api/repos/create":
      return self.create(json.loads(body))
    if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/]+)", path):
      if (repo := self.find("models", found[1])) is None:
        return None
      return getattr(self, found[2])(repo, unquote(found[3]), body)
    if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
      return self.batch(json.loads(body))
    return self.refuse(404, message=f"no route {path}")

  def create(self, wish):
    name = f"{wish['organization']}/{wish['name']}"
    if ("models", name) in self.hub.repos:
      return self.answer_json({"error": "You already created this model repo", "url": f"{self.hub.address}/{name}"},
                              409)
    repo = self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
    repo.private = wish.get("visibility") == "private" or bool(wish.get("private"))
    return self.answer_json({"url": f"{self.hub.address}/{name}", "name": name})

  def branch(self, repo, name, body):
    if name in repo.refs:
      return self.refuse(409, message="Reference already exists")
    repo.refs[name] = repo.refs["main"]
    return self.answer_json({})

  def preupload(self, repo, revision, body):
    files = self.files_at(repo, revision)
    if files is None:
      return
    answers = []
    for file in json.loads(body)["files"]:
      held = files[1].get(file["path"])
      is_large = file["path"].endswith(LARGE)
      oid = None if held is None else hashlib.sha256(held).hexdigest() if is_large else git_digest(held)
      answers.append({"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False,
                      "oid": oid})
    self.answer_json({"files": answers})

  def batch(self, wish):
    objects = []
    for entry in wish["objects"]:
      answer = {"oid": entry["oid"], "size": entry["size"]}
      if entry["oid"] not in self.hub.blobs:
        answer["actions"] = {"upload": {"href": f"{self.hub.storage_address}/{entry['oid']}"}}
      objects.append(answer)
    self.answer_json({"transfer": "basic", "objects": objects})

  def commit(self, repo, revision, body):
    rows = [json.loads(line) for line in body.splitlines()]
    files = dict(repo.commits[repo.refs[revision]])
    for row in rows[1:]:
      value = row["value"]
      if row["key"] == "file":
        files[value["path"]] = base64.b64decode(value["content"])
      elif row["key"] == "lfsFile":
        if value["oid"] not in self.hub.blobs:
          return self.refuse(400, message="LFS object does not exist")
        files[value["path"]] = self.hub.blobs[value["oid"]]
      elif row["key"] == "deletedFile":
        del files[value["path"]]
    name = repo.commit(files, revision, rows[0]["value"]["summary"])
    url = f"{self.hub.address}{urlsplit(self.path).path.removeprefix('/api/models').partition('/commit/')[0]}"
    return self.answer_json({"success": True, "commitOid": name, "commitUrl": f"{url}/commit/{name}"})
