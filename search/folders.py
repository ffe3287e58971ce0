"""Folders that are replaced as a whole: the old one is there until the new one is."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peftscape.search.disk import writing
from peftscape.spaces.words import InputError

_NEW, _OLD = ".new", ".old"


@contextmanager
def replacing(target: Path, owned: Collection[str], last: str) -> Iterator[Path]:
    """A new folder to write in, which takes the target's place when the block ends well.

    Files in the target that are not among `owned` stay where they are; then `last` goes first and comes back last.

    Raises:
        InputError: the target is a link.
        DiskError: there is no room; the old folder stands.
    """
    if target.is_symlink():
        raise InputError(str(target), ["a link, which could lead anywhere; a folder, or nothing, was expected"])
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder, old = _beside(target, _NEW), _beside(target, _OLD)
        if old.is_dir() and not target.exists():  # it was killed between the two renamings
            old.replace(target)
        if folder.is_dir() and not folder.is_symlink():
            remove(folder)
        folder.mkdir()
        try:
            yield folder
            _put(folder, target, owned, last)
        finally:
            if folder.is_dir():
                remove(folder)


def _put(folder: Path, target: Path, owned: Collection[str], last: str) -> None:
    if target.is_dir() and any(file.name not in owned for file in target.iterdir()):
        for name in (last, *owned):
            (target / name).unlink(missing_ok=True)
        for file in sorted(folder.iterdir(), key=lambda f: f.name == last):
            file.replace(target / file.name)
        return
    old = _beside(target, _OLD)
    if target.is_dir():
        if old.is_dir():
            remove(old)
        target.replace(old)
    folder.replace(target)
    if old.is_dir():
        remove(old)


def prune(folder: Path, keep: Collection[int]) -> None:
    """Remove the folders of trials that are not kept. Links and what nobody here wrote are left alone."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for old in folder.iterdir():
        ours = old.name.removeprefix(".").removesuffix(_OLD).removesuffix(_NEW)
        if ours.isascii() and ours.isdigit() and old.is_dir() and not old.is_symlink() and int(ours) not in keep:
            remove(old)


def remove(folder: Path) -> None:
    """A folder with files; one that holds folders too stays, with those."""
    for file in folder.iterdir():
        if file.is_symlink() or not file.is_dir():
            file.unlink()
    with suppress(OSError):
        folder.rmdir()


def _beside(target: Path, end: str) -> Path:
    return target.with_name(f".{target.name[:100]}{end}")
