"""Lost peers: recognising that another rank is gone, and saying which one.

A rank learns that another has died or hangs only by a collective that fails. Every rank that this
happens to reports at the store of the rendezvous; after a moment, those that did not are the lost
ones. Called by ``engine`` when ranks meet and by ``start`` when they fail.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from time import sleep
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

ROLL_CALL_S = 3.0
"""How long ranks that lost a peer wait for each other's report.

Longer than ``ranks.GRACE_AFTER_FAILURE_S``: on one machine the rank with the cause speaks, and
those that only follow are ended before they do.
"""
STORE_TIMEOUT_S = 3.0

# What gloo, the store and NCCL say of a rank that is gone, in torch 2.6 to 2.15. All of it in words
# that name the other side: a failure of one's own must keep its traceback.
LOST_PEER_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "application timeout caused pair closure",
    "timed out waiting",
    "remote process exited",
    "watchdog caught collective operation timeout",
    "failed to recv",
    "clients joined",
    "client socket has timed out",
    "connection was likely closed",
    "connection refused",
    "socket timeout",
    "gloo connectfullmesh failed",
)


class LostPeer(Exception):
    """Another rank is gone; the message says which, and how to go on."""


@dataclass(frozen=True)
class RollCall:
    """Who answered after a collective failed.

    Attributes:
        lost: Ranks that did not, with the name of their machine where it is known; None when the
            store itself cannot be reached.
        speaks: Whether this rank is the one of its machine that reports.
    """

    lost: Mapping[int, str] | None
    speaks: bool


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that another rank is gone."""
    return any(
        isinstance(part, RuntimeError)
        and any(sign in str(part).lower() for sign in LOST_PEER_SIGNS)
        for part in _chain(error)
    )


def announce() -> None:
    """Leave the name of this rank's machine at the store, for a later roll call."""
    if int(os.environ["WORLD_SIZE"]) > 1:
        _within(STORE_TIMEOUT_S, _write_host)


@contextmanager
def explaining_lost_peers(
    newest_step: Callable[[], int | None], *, timeout_s: float
) -> Iterator[None]:
    """Turn the failure of a collective into :class:`LostPeer`, which says what happened.

    Raises:
        LostPeer: with an empty message on a rank whose neighbour on the same machine speaks.
    """
    try:
        yield
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not is_lost_peer(error):
            raise
        call = roll_call()
        message = describe(call, error, newest_step=newest_step(), timeout_s=timeout_s)
        raise LostPeer(message if call.speaks else "") from error


def roll_call() -> RollCall:
    """Report that this rank lives, and find out which others do."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    answers: dict[int, str] = {}
    absent: dict[int, str] = {}

    def call() -> None:
        store = _store()
        store.set(_key("alive", rank), "")
        sleep(ROLL_CALL_S)
        for other in range(world_size):
            known = store.check([_key("host", other)])
            host = store.get(_key("host", other)).decode() if known else "unknown machine"
            is_alive = store.check([_key("alive", other)])
            (answers if is_alive else absent)[other] = host

    complete = _within(STORE_TIMEOUT_S + ROLL_CALL_S, call)
    if not complete:
        return RollCall(lost=None, speaks=int(os.environ["LOCAL_RANK"]) == 0)
    first_here = rank - int(os.environ["LOCAL_RANK"])
    return RollCall(lost=absent, speaks=not any(r in answers for r in range(first_here, rank)))


def describe(
    call: RollCall, error: BaseException, *, newest_step: int | None, timeout_s: float
) -> str:
    """Say what happened, what bounded it, and what to do."""
    reason = _reason(error)
    if "clients joined" in reason or "client socket has timed out" in reason:
        what = f"not all ranks arrived within {timeout_s:g} s (engine.timeout_s)"
        advice = "start the same command on every machine; check that they reach "
        advice += f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return f"{what}: {advice}\n  cause: {reason}"
    if call.lost is None:
        master = os.environ["MASTER_ADDR"]
        what = f"lost contact with rank 0: its machine ({master}) or the launcher there is gone"
    elif call.lost:
        what = f"lost contact with {_name(call.lost)}"
    else:
        what = "lost contact with another rank for a while; all of them still live"
    if "timed out" in reason.lower():
        what += f"; waited {timeout_s:g} s for it (engine.timeout_s)"
    start = "starts at step 0, as there is no checkpoint yet"
    if newest_step is not None:
        start = f"continues after step {newest_step}"
    return (
        f"{what}\n  the run has ended on this machine, too; nothing is saved for this moment\n"
        f"  to go on, start all ranks with the same command: it {start}\n  cause: {reason}"
    )


def _name(lost: Mapping[int, str]) -> str:
    """``rank 1 on gpu07``, or ``ranks 8-15 on gpu07 and rank 3 on gpu02``."""
    by_host: dict[str, list[int]] = {}
    for rank, host in lost.items():
        by_host.setdefault(host, []).append(rank)
    parts = [f"{_ranks(ranks)} on {host}" for host, ranks in by_host.items()]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def _reason(error: BaseException) -> str:
    """What the library said, without the place in its sources and its general advice."""
    parts = [part for part in _chain(error) if is_lost_peer(part)]
    line = str(parts[-1]).strip().splitlines()[0]
    line = re.sub(r"^\[[^\]]*\]:? *", "", line)
    return line.partition(" This is typically")[0][:300]


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _write_host() -> None:
    _store().set(_key("host", int(os.environ["RANK"])), socket.gethostname())


def _store() -> TCPStore:
    """A connection of its own, as that of the process group may be broken."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # TCPStore tries again when it is refused; a launcher that has lost its own store, too, would
    # end this rank before it could speak.
    socket.create_connection((address, port), timeout=STORE_TIMEOUT_S).close()
    return TCPStore(
        address,
        port,
        is_master=False,
        timeout=timedelta(seconds=STORE_TIMEOUT_S),
    )


def _key(kind: str, rank: int) -> str:
    # torchrun keeps its store when it restarts the ranks.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"dualtrain/{attempt}/{kind}/{rank}"


def _within(seconds: float, work: Callable[[], None]) -> bool:
    """Do some work in a thread, and return whether it was done without an error in time.

    A store whose process is stopped takes connections and never answers, and no timeout of torch
    covers that.
    """
    done = threading.Event()

    def run() -> None:
        # Broken connections are what is expected here.
        with suppress(OSError, RuntimeError):
            work()
            done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return done.is_set()
