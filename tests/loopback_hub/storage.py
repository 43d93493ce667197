"""What the loopback Hub holds: repositories, their commits and their files, in memory."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.loopback_hub import xet

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".png", ".parquet", ".gz", ".zst", ".model")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)


def git_oid(data: bytes) -> str:
    """The hash that git gives a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class File:
    """One file of one commit; the bytes of an LFS file lie in `Storage.objects` or in the xet store."""

    size: int
    oid: str  # git's; of the pointer for an LFS file
    sha256: str
    lfs: bool
    content: bytes = b""  # of a regular file

    @property
    def etag(self) -> str:
        """What the Hub sends as the entity tag: sha256 for LFS, git's hash otherwise."""
        return self.sha256 if self.lfs else self.oid


def regular_file(content: bytes) -> File:
    """A file that git itself holds."""
    return File(
        len(content), git_oid(content), hashlib.sha256(content).hexdigest(), lfs=False, content=content
    )


def lfs_file(sha256: str, size: int) -> File:
    """A file that git holds as a pointer."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return File(size, git_oid(pointer.encode()), sha256, lfs=True)


@dataclass(frozen=True)
class Commit:
    """A snapshot of a repository."""

    oid: str
    message: str
    files: dict[str, File]


@dataclass
class PullRequest:
    """A change that was proposed; its commits are those of refs/pr/N."""

    author: str
    title: str
    status: str = "open"  # "merged", "closed"


@dataclass
class Repository:
    """Commits and the names that point to them."""

    kind: str  # "model", "dataset", "space"
    repo_id: str
    private: bool = False
    gated_to: set[str] | None = None  # users who may read; None: not gated
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)  # in order
    fields: dict[str, Any] = field(default_factory=dict)  # what the creation asked for
    pull_requests: dict[int, PullRequest] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a pull request or a hash names."""
        return self.commits.get(self.refs.get(revision, revision))

    def commit(self, ref: str, files: dict[str, File], message: str) -> Commit:
        """Add a snapshot and point `ref` to it."""
        listing = "".join(f"{path} {file.oid}\n" for path, file in sorted(files.items()))
        oid = hashlib.sha1(
            f"{len(self.commits)} {self.repo_id} {ref} {message}\n{listing}".encode()
        ).hexdigest()
        self.commits[oid] = Commit(oid, message, files)
        self.refs[ref] = oid
        return self.commits[oid]


class Storage:
    """Every repository, and the large files that were uploaded over LFS or xet."""

    def __init__(self, xet_folder: Path) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}  # sha256 → bytes
        self.paying: set[str] = set()  # accounts with a subscription
        self.without_jobs: set[str] = set()  # accounts whose tokens may not use Jobs
        self.buckets: dict[str, Any] = {}
        self.jobs: dict[str, Any] = {}
        self.log_cuts: list[int] = []  # events; each cuts one connection to the log of a job to come
        self.xet_folder = xet_folder
        self.xet_clients = 0  # of buckets, so far
        self.xet_uploads: list[Path] = []  # stores that clients of buckets were given to write to
        self.xet_contents: dict[str, bytes] = {}  # xet hash → bytes, of all buckets

    def create(self, kind: str, repo_id: str, *, private: bool = False, **fields: Any) -> Repository:
        """A new repository with the commit that the Hub itself makes."""
        repository = Repository(kind, repo_id, private=private, fields=fields)
        repository.commit("main", {".gitattributes": regular_file(GIT_ATTRIBUTES.encode())}, "initial commit")
        self.repositories[kind, repo_id] = repository
        return repository

    def put(self, kind: str, repo_id: str, files: dict[str, bytes], *, message: str = "put") -> str:
        """Commit files directly, creating the repository if it is new; returns the commit's hash."""
        repository = self.repositories.get((kind, repo_id)) or self.create(kind, repo_id)
        entries = dict(repository.commits[repository.refs["main"]].files)
        for path, content in files.items():
            if path.endswith(LFS_SUFFIXES):
                entries[path] = lfs_file(self.add_object(content), len(content))
            else:
                entries[path] = regular_file(content)
        return repository.commit("main", entries, message).oid

    def add_object(self, content: bytes) -> str:
        """Keep a large file; returns its sha256."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.objects[sha256] = content
        return sha256

    def offer_over_xet(self) -> None:
        """Let clients that can download every large file so far over xet."""
        xet.write(self.xet_folder, self.objects.values())

    def xet_hashes(self) -> dict[str, str]:
        """sha256 → xet hash of the large files that lie in the xet store."""
        return xet.file_hashes(self.xet_folder)

    def has_object(self, sha256: str) -> bool:
        """Whether a large file was uploaded, over either path."""
        return sha256 in self.objects or sha256 in self.xet_hashes()

    def read(self, file: File) -> bytes:
        """The bytes of a file."""
        if not file.lfs:
            return file.content
        if file.sha256 not in self.objects:
            xet_hash = self.xet_hashes()[file.sha256]
            self.objects[file.sha256] = xet.read(self.xet_folder, xet_hash, size_bytes=file.size)
        return self.objects[file.sha256]


def card_data(commit: Commit) -> dict[str, Any] | None:
    """The front matter of a commit's README.md; None where it has none that can be read."""
    readme = commit.files.get("README.md")
    try:
        return front_matter(readme.content.decode()) if readme else None
    except (yaml.YAMLError, ValueError):
        return None


def front_matter(text: str) -> dict[str, Any] | None:
    """The YAML between the first two `---` lines; None where there is none.

    Raises:
        yaml.YAMLError: It is no YAML.
        ValueError: It is no mapping.
    """
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return None
    value = yaml.safe_load(text[4 : text.index("\n---", 4)])
    if not isinstance(value, dict):
        raise ValueError("front matter is no mapping")
    return value
