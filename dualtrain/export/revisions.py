"""``dualtrain export --all`` and ``--push``: each checkpoint of a run, and to a hub as a branch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dualtrain.checkpoint.store import find_checkpoints, read_state
from dualtrain.common.errors import UserError
from dualtrain.common.files import user_path
from dualtrain.export.export import Exported, export_checkpoint
from dualtrain.model.build import CONFIG

if TYPE_CHECKING:
    from dualtrain.export.command import ExportOptions

MAIN = "main"
"""The branch that a hub shows, of the newest checkpoint."""


def exports(
    options: ExportOptions, *, on_note: Callable[[str], None] = lambda note: None
) -> Iterator[tuple[str, Path, Exported | None]]:
    """Export one checkpoint, or with ``--all`` each of a run into a directory of ``--to``.

    Such a directory is named by the words that were asked for in ``checkpoint.at``, ``chck_10M``
    as the BabyLM challenge has it, else by its step; the newest is also ``main``. What is there
    already is passed over.

    Yields:
        The branch, the directory, and what was written; None where it was there.

    Raises:
        UserError: It is no run with whole checkpoints, a step is named, or see
            :func:`~dualtrain.export.export.export_checkpoint`.
    """
    if not options.all_checkpoints:
        yield MAIN, options.to, export_checkpoint(options, on_note=on_note)
        return
    if options.step is not None:
        raise UserError("--step", "is one checkpoint, and --all is every", "one of the two")
    run_dir = user_path(options.path)
    checkpoints = find_checkpoints(run_dir)
    if not checkpoints:
        raise UserError(str(run_dir), "has no whole checkpoint", "with --all, a run's directory")
    for path in checkpoints:
        names = [_branch(words) for words in read_state(path).get("words", ())] or [path.name]
        for name in names if path != checkpoints[-1] else [*names, MAIN]:
            to, exported = options.to / name, None
            if (user_path(to) / CONFIG).is_file():
                on_note(f"{to} is there already")
            else:
                exported = export_checkpoint(replace(options, path=path, to=to), on_note=on_note)
            yield name, to, exported


def push(directory: Path, repository: str, *, branch: str = MAIN) -> str:
    """Upload an export to a branch of a repository on the hub; both are made where they lack.

    The hub is ``HF_ENDPOINT``, the token ``HF_TOKEN`` or that of ``hf auth login``: the library
    finds them. A new repository is public.

    Returns:
        Where it is.

    Raises:
        UserError: The hub does not take it.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(repository, exist_ok=True)
        if branch != MAIN:
            hub.create_branch(repository, branch=branch, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=user_path(directory),
            revision=branch,
            commit_message=f"{branch}, exported by dualtrain",
        )
    except Exception as error:  # of the library, and of each version's own HTTP client
        reason = " ".join(str(error).split())[:300]
        by_hand = f"`hf upload {repository} {directory} . --revision {branch}`"
        what = f"the hub has not taken {directory}: {reason}"
        hint = f"`hf auth login` first; by hand: {by_hand}"
        raise UserError(f"--push {repository}", what, "a repository to write to", hint) from None
    return f"{hub.endpoint}/{repository}/tree/{branch}"


def _branch(words: int) -> str:
    return f"chck_{f'{words / 1e6:.6f}'.rstrip('0').rstrip('.')}M"
