"""A folder that holds a JSON document and arrays: the document in `snapshot.json`, the arrays written by orbax."""

import json
import shutil
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

STATE_FILE = "snapshot.json"
PAGES_FOLDER = "pages"
FORMAT = 1


class SnapshotError(ValueError):
    """A snapshot that is damaged, or that this engine cannot continue; says what is missing or differs."""


def write(folder: str | PathLike[str], document: dict[str, Any], pages: tuple[np.ndarray, ...]) -> None:
    """Writes a new folder; a draft beside it takes its name when it is whole. Raises SnapshotError if there is one."""
    target = Path(folder).absolute()
    if target.exists():
        raise SnapshotError(f"{target} exists already; name a folder that does not")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        has_pages = any(layer.size for layer in pages)  # orbax writes no empty array
        if has_pages:
            _save_pages(pages, draft / PAGES_FOLDER)
        files = {path.relative_to(draft).as_posix(): path.stat().st_size for path in draft.rglob("*") if path.is_file()}
        whole = {"format": FORMAT, "files": files, "has_pages": has_pages, **document}
        (draft / STATE_FILE).write_text(json.dumps(whole, default=_plain_number))
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def read(folder: str | PathLike[str]) -> tuple[dict[str, Any], tuple[np.ndarray, ...]]:
    """The document and the arrays. Raises SnapshotError, naming each file, if any is missing or of another size."""
    source = Path(folder).absolute()
    document = _read_document(source / STATE_FILE)
    _check_files(source, document.get("files", {}))
    return document, _load_pages(source / PAGES_FOLDER) if document.get("has_pages") else ()


def _read_document(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SnapshotError(f"{path.parent} holds no snapshot: {path.name} is missing; name a folder that save() wrote")
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise SnapshotError(f"{path} is cut short or damaged: {error}; take the snapshot again") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise SnapshotError(f"{path} is no snapshot of format {FORMAT}; take it again with this version")
    return document


def _check_files(source: Path, files: dict[str, int]) -> None:
    bad = [
        f"{name} ({size} bytes)"
        for name, size in files.items()
        if not (source / name).is_file() or (source / name).stat().st_size != size
    ]
    if bad:
        raise SnapshotError(
            f"the snapshot in {source} is cut short, {len(bad)} of its {len(files)} files are missing or of another "
            f"size: {', '.join(bad)}; copy the folder again, or take the snapshot again"
        )


def _save_pages(pages: tuple[np.ndarray, ...], folder: Path) -> None:
    import orbax.checkpoint as ocp  # takes a second, and few processes save or load a snapshot

    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder, list(pages))


def _load_pages(folder: Path) -> tuple[np.ndarray, ...]:
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        return tuple(checkpointer.restore(folder))


def _plain_number(value: Any) -> Any:
    """numpy's numbers, which sampling parameters may hold, as Python's."""
    return value.item()
