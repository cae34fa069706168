"""Reading what users give, and writing that never destroys: a temporary name first, then one rename."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trimtab.core.errors import DataError, OutputError

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def sha256_file(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(handle)


def _digest(handle: object) -> str:
    digest = hashlib.sha256()
    while chunk := handle.read(1 << 20):  # type: ignore[attr-defined]
        digest.update(chunk)
    return digest.hexdigest()


def read_user_text(path: str | Path) -> str:
    """A text file that a user gave, with its line ends as they are. Raises DataError: missing, not UTF-8, or empty."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"text {path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}. "
            "Convert it, for example with iconv."
        ) from None
    except OSError as error:
        raise DataError(f"text {path} cannot be read: {error.strerror or error}.") from None
    if not text.strip():
        raise DataError(f"text {path} is empty.")
    return text


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old content or all of the new. Raises OutputError."""
    with atomic_file(path) as partial, open(partial, "w", encoding="utf-8") as handle:
        handle.write(text)


@contextmanager
def atomic_file(path: str | Path, *, also: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """A temporary name to write a file to; on leaving without an error it becomes `path`, else it is removed.

    Raises OutputError if the disk refuses a write; `also` are errors in which a writer's library says so.
    """
    path = Path(path)
    refusals: tuple[type[Exception], ...] = (OSError, *also)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        yield partial
        with open(partial, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except refusals as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path} cannot be written ({reason}); nothing was changed.") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def refuse_occupied(path: str | Path, force: bool) -> None:
    """Raise OutputError if `path` is a file, or a directory with something in it and `force` is not set."""
    path = Path(path)
    if path.is_file():
        raise OutputError(f"output {path} is a file; give the name of a directory.")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise OutputError(f"output directory {path} is not empty. Choose another, or replace it with --force.")


@contextmanager
def atomic_directory(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A fresh directory to fill; on leaving without an error it takes the name `path`, else it is removed.

    What stood at `path` stays whole until the swap, which is one system call on Linux. Raises OutputError if `path` is
    occupied and `force` is not set, and if the disk refuses a write.
    """
    path = Path(path)
    refuse_occupied(path, force)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        _take_name(partial, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror or error}); nothing was changed.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(path: Path) -> None:
    """Remove what writers of `path` left that were killed: partial files and directories whose process is gone."""
    for partial in path.parent.glob(f".{path.name}.partial-*"):
        pid = partial.name.rpartition("-")[2]
        if pid == str(os.getpid()) or (
            pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc/self").exists()
        ):
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)


def _take_name(partial: Path, path: Path) -> None:
    if not path.exists():
        os.rename(partial, path)
    elif not _exchange(partial, path):
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        os.rename(path, old)
        os.rename(partial, path)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one system call; False where the platform cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)
