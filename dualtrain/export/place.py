"""Where an export is made: beside its place, and moved there when it is whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dualtrain.common.errors import UserError
from dualtrain.common.file_kinds import check_name
from dualtrain.common.files import absolute, beside, discard, publish
from dualtrain.common.locks import locked

OPTION = "--to"
_EXPECTED = "a new or empty directory"


@contextmanager
def made_whole(directory: Path | str) -> Iterator[Path]:
    """Give a directory to write into, which takes its place only if nothing goes wrong.

    One process at a time works on a place; what a killed one left beside it is removed.

    Yields:
        The directory to write into.

    Raises:
        UserError: Something is there already, or it cannot be written.
    """
    place, partial, made = Path(directory), None, []
    try:
        place = absolute(directory)
        check_name(place)
        _check_free(place)
        partial = beside(place)
        made += [parent for parent in place.parents if not parent.exists()]
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place.parent / f".{place.name}.lock", remove=True):
            _check_free(place)  # another export may just have ended there
            discard(partial)
            partial.mkdir()
            yield partial
            publish(partial, place)
    except BaseException as error:
        if partial is not None:
            discard(partial)
        for parent in made:
            with suppress(OSError):  # in use by somebody else, or never made
                parent.rmdir()
        if not isinstance(error, OSError):
            raise
        what = error.strerror or str(error)
        raise UserError(
            f"{OPTION} {place}", f"cannot be written: {what}", hint="nothing is left of it"
        ) from None


def _check_free(place: Path) -> None:
    """Refuse a place where something is.

    Raises:
        UserError: Something is.
    """
    file = next((path for path in (place, *place.parents) if path.exists()), place)
    if file.exists() and not file.is_dir():
        raise UserError(f"{OPTION} {place}", f"{file} is a file", _EXPECTED)
    if place.is_mount():
        raise UserError(
            f"{OPTION} {place}",
            "a volume is mounted there, and nothing can be moved in its place",
            "a directory in it",
        )
    if place.exists() and any(place.iterdir()):
        raise UserError(
            f"{OPTION} {place}",
            "the directory is not empty",
            _EXPECTED,
            "nothing is overwritten: remove it, or choose another name",
        )
