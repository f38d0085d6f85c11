"""Reference pictures of one's own: files and bytes, named by their content; and which files and buckets may be named.

A picture that is not on the web is uploaded through the API and then public to whoever has its link, and what stands in
a table goes to the vendor. So a file or an object is read only where the person at the command line names it, or where
the operator allows its place: by a setting, or by a block. Whoever fills in a form must not publish the worker's disk,
nor whatever buckets the worker can read; that a run writes to a bucket gives no right to read it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from prefect_eachlabs.errors import BadInput

MAX_PICTURE_BYTES = 100_000_000
"""What the API takes as an upload ("at most 100 MB"); a picture on the web may not be larger either."""
SNIFFED_BYTES = 64
ROOTS_VARIABLE = "EACHLABS_REFERENCE_ROOTS"
DESTINATIONS_VARIABLE = "EACHLABS_DESTINATIONS"
REFERENCE_FIELDS = ("image_url", "image", "image_urls", "input_image", "images")
"""How models call their reference pictures, in the order in which a schema is searched for them."""
BUCKET_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BLOCK_BYTES = 1024 * 1024
_SHOWN_CHARACTERS = 80


def content_type_of(head: bytes) -> str | None:
    """The media type that the first 64 bytes of a reference or an output show; None: no picture and no MP4."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "image/gif"
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        return {b"avif": "image/avif", b"avis": "image/avif", b"heic": "image/heic", b"heix": "image/heic"}.get(
            brand, "image/heif" if brand in (b"mif1", b"msf1") else "video/mp4"
        )
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "image/bmp"
    return "image/tiff" if head[:4] in (b"II*\0", b"MM\0*") else None


@dataclass(frozen=True)
class Picture:
    """A reference picture that is not on the web. Make it with `of_bytes`, or with `Roots.open`.

    Attributes:
        sha256: Hex digest of its bytes.
        content_type: What its first bytes show.
        size_bytes: How long it is.
        path: Where its bytes are read when they are needed; None: they are in `data`.
    """

    sha256: str
    content_type: str
    size_bytes: int
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """What stands for it in inputs and fingerprints: `sha256:` and the digest."""
        return f"sha256:{self.sha256}"

    @classmethod
    def of_bytes(cls, data: bytes) -> Picture:
        """A picture from its bytes.

        Raises:
            BadInput: They are no picture, none at all, or more than 100 MB.
        """
        content_type = _checked("the bytes", len(data), data[:SNIFFED_BYTES])
        return cls(hashlib.sha256(data).hexdigest(), content_type, len(data), data=data)

    def read(self) -> bytes:
        """Its bytes. Blocks where they are in a file.

        Raises:
            BadInput: The file is gone, or it is another by now.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None, "a picture has bytes or a file"
        try:
            with Roots(anywhere=True).stream(self.path) as file:  # the digest says whether it is still what was allowed
                data = file.read(MAX_PICTURE_BYTES + 1)
        except OSError as error:
            raise BadInput(f"image_url: {self.path} cannot be read any more ({error.strerror}).") from None
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise BadInput(f"image_url: {self.path} was changed while the run was going on: run again.")
        return data


def _checked(what: str, size_bytes: int, head: bytes) -> str:
    if size_bytes == 0:
        raise BadInput(f"image_url: {what}: empty. Give a picture.")
    if size_bytes > MAX_PICTURE_BYTES:
        raise BadInput(f"image_url: {what}: {size_bytes} bytes, and the API takes at most 100 MB. Make it smaller.")
    content_type = content_type_of(head)
    if content_type is None or not content_type.startswith("image/"):
        seen = content_type or "by its first bytes"
        raise BadInput(f"image_url: {what}: no picture ({seen}). Give a PNG, JPEG, WebP or GIF.")
    return content_type


def names_in(input: Mapping[str, object]) -> list[str]:
    """The names of the reference pictures in an item's input."""
    found = [input.get(name) for name in REFERENCE_FIELDS]
    names = [name for one in found for name in (one if isinstance(one, (list, tuple)) else [one])]
    return [name for name in names if isinstance(name, str)]


def with_names(input: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """An item's input, each name of a reference picture in it as `change` makes it."""

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [changed(inner) for inner in value]
        return change(value) if isinstance(value, str) else value

    return {field: changed(value) if field in REFERENCE_FIELDS else value for field, value in input.items()}


def parse_s3_name(text: str) -> tuple[str, str] | None:
    """Bucket and key of `s3://bucket/key`; None for anything else, and for keys whose `..` a URL would resolve."""
    bucket, _, key = text.removeprefix("s3://").partition("/")
    if not text.startswith("s3://") or not BUCKET_PATTERN.fullmatch(bucket):
        return None
    fine = key and len(key.encode(errors="replace")) <= 1024 and all(ord(character) >= 32 for character in key)
    return (bucket, key) if fine and not {".", ".."} & set(key.split("/")) else None


@dataclass(frozen=True)
class Roots:
    """Where reference pictures and tables may be read from.

    Attributes:
        folders: Files below these.
        prefixes: Bucket and folder ("" is the whole bucket) of objects.
        anywhere: A person at the command line names them: all that this user may read.
    """

    folders: tuple[Path, ...] = ()
    prefixes: tuple[tuple[str, str], ...] = ()
    anywhere: bool = False

    @classmethod
    def parse(cls, text: str) -> Roots:
        """Reads folders and `s3://bucket/prefix`, separated by colons; empty: none.

        Raises:
            ValueError: One is neither an absolute folder nor a bucket.
        """
        folders: list[Path] = []
        prefixes: list[tuple[str, str]] = []
        for part in (part.strip() for part in re.split(r":(?!//)", text)):
            if part.startswith("s3://"):
                bucket, _, prefix = part.removeprefix("s3://").partition("/")
                if not BUCKET_PATTERN.fullmatch(bucket):
                    raise ValueError(f"{part!r} must be s3://BUCKET or s3://BUCKET/PREFIX")
                prefixes.append((bucket, prefix.strip("/")))
            elif part:
                try:
                    folder = Path(part).expanduser()
                except RuntimeError:
                    raise ValueError(f"{part!r} begins with the home folder of nobody here") from None
                if not folder.is_absolute():
                    raise ValueError(f"{part!r} must be an absolute folder, or s3://BUCKET/PREFIX")
                folders.append(folder)
        return cls(tuple(folders), tuple(prefixes))

    @classmethod
    def from_environment(cls) -> Roots:
        """As the setting says; what is wrong there is reported where the account is made."""
        try:
            return cls.parse(os.environ.get(ROOTS_VARIABLE, ""))
        except ValueError:
            return cls()

    def and_below(self, bucket: str, prefix: str) -> Roots:
        """These and one folder of a bucket more."""
        return replace(self, prefixes=(*self.prefixes, (bucket, prefix)))

    def allow_object(self, bucket: str, key: str) -> bool:
        """Whether an object may be read."""
        return any(
            bucket == allowed and (not prefix or key.startswith(f"{prefix}/")) for allowed, prefix in self.prefixes
        )

    def open(self, name: str | os.PathLike[str]) -> Picture:
        """The picture in a file; a relative name is looked for in each of the folders. Blocks.

        Raises:
            BadInput: It is not there, may not be taken (which is not told apart), or is no picture.
        """
        for path in self._files(name):
            try:
                return self._opened(path)
            except BadInput:
                raise
            except (OSError, ValueError):  # unreadable, or no file
                continue
        advice = "or a file that can be read."
        if not self.anywhere:
            advice = (
                f"or a file in a folder that {ROOTS_VARIABLE} names on the machine that runs this. In Python, give "
            )
            advice += "the picture's bytes."
        raise BadInput(f"image_url: {_shown(os.fspath(name))} is not an http(s) URL, an s3://bucket/key, {advice}")

    def stream(self, path: Path) -> BinaryIO:
        """A file that may be taken, opened. Blocks.

        Where it lies is asked once more, of what was opened: a folder on the way may have become a link by then.

        Raises:
            OSError: It cannot be opened, is no file, or lies elsewhere.
        """
        # A named pipe would hold whoever opens it until somebody writes.
        opened = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            if not stat.S_ISREG(os.fstat(opened).st_mode):
                raise OSError(errno.EINVAL, "no regular file")
            if not self.anywhere:
                place = _place(opened, path)
                if not any(place.is_relative_to(folder.resolve()) for folder in self.folders):
                    raise OSError(errno.EACCES, "it lies elsewhere")
            return os.fdopen(opened, "rb")
        except BaseException:
            os.close(opened)
            raise

    def _opened(self, path: Path) -> Picture:
        with self.stream(path) as file:
            facts = os.fstat(file.fileno())
            content_type = _checked(_shown(path.name), facts.st_size, file.read(SNIFFED_BYTES))
        sha256 = _digest(self, path, facts.st_mtime_ns, facts.st_size, facts.st_ino)
        return Picture(sha256, content_type, facts.st_size, path=path)

    def source(self, name: str) -> str:
        """A table's name as it may be opened: `s3://bucket/key`, or the path of a file. Blocks.

        Raises:
            BadInput: It may not be read, or there is no such file (which is not told apart).
        """
        if name.startswith("s3://"):
            found = parse_s3_name(name)
            if found is not None and self.allow_object(*found):
                return name
        elif path := next((path for path in self._files(name) if path.is_file()), None):
            return str(path)
        raise BadInput(
            f"source: {_shown(name)} may not be read by runs, or is not there: a table is read where {ROOTS_VARIABLE} "
            "names its folder or bucket (such as /data/tables:s3://acme-tables/nightly) on the machine that runs this, "
            "or below the S3Destination block that the run writes to. Nothing was bought."
        )

    def _files(self, name: str | os.PathLike[str]) -> Iterator[Path]:
        """What has that name and may be taken; links and `..` are resolved before that is decided."""
        for folder in (Path(),) if self.anywhere else self.folders:
            try:
                path = (folder / Path(name).expanduser()).resolve(strict=True)
                if self.anywhere or path.is_relative_to(folder.resolve(strict=True)):
                    yield path
            except (OSError, ValueError, RuntimeError):  # not there; a null byte; a ring of links
                continue


def opened(image_url: object, roots: Roots) -> object:
    """What people have, as items take it: paths and bytes become a `Picture`, everything else stays. Blocks.

    Raises:
        BadInput: A file that may not be taken, or bytes that are no picture.
    """
    if isinstance(image_url, (bytes, bytearray, memoryview)):
        return Picture.of_bytes(bytes(image_url))
    is_name = isinstance(image_url, str) and image_url.strip() and not _SCHEME.match(image_url)
    return roots.open(image_url) if is_name or isinstance(image_url, os.PathLike) else image_url  # type: ignore[arg-type]  # as was just asked


def _place(opened: int, path: Path) -> Path:
    """Where an opened file lies; without /proc, where its path leads now."""
    try:
        return Path(os.readlink(f"/proc/self/fd/{opened}"))
    except OSError:
        return path.resolve(strict=True)


@lru_cache(maxsize=10_000)
def _digest(roots: Roots, path: Path, mtime_ns: int, size_bytes: int, inode: int) -> str:
    """Read once, however many rows of a table name the file."""
    digest = hashlib.sha256()
    with roots.stream(path) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…")
