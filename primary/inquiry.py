"""Asks a replica what it holds, when its primary does not know: after a restart, a pause, a broken base.

In: an epoch about to be sent, and what the replica says of the epoch's spaces: page numbers and identities,
under the secret that the epoch's own pages were identified with. Out: a table that tells which pages need not
be sent. What the replica does not claim to hold is sent; a false claim harms nothing but its own copy.

Keeps this: of what a replica says no more is kept than the epoch has pages, and no more is listened to than a
few times that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.bulk import HELD_PAGES, unpack_held
from common.errors import ProtocolError
from common.messages import AskHeld, AskStored, encode
from common.model import EpochId
from common.threads import in_thread
from primary.book import PageBook
from primary.capture import CapturedEpoch, PageTable, SpacePages
from primary.page_set import NO_PAGES
from primary.session import Session
from primary.verification import different

_TIMES_LISTENED = 4
"""How many times an epoch's own pages a replica may hold: a workload that shrank. The rest is sent."""


async def ask_held(
    session: Session, epoch: CapturedEpoch, secret: int, *, held: EpochId | None = None, seed: int = 0
) -> PageTable:
    """Ask which pages of the epoch's spaces are held, in the committed epoch `held` or in the seed `seed`.

    Raises UnreachableError if no answer comes, ProtocolError for one that cannot be.
    """
    return PageTable([await _ask_space(session, space, secret, held, seed) for space in epoch.spaces])


async def _ask_space(
    session: Session, space: SpacePages, secret: int, held: EpochId | None, seed: int
) -> SpacePages:
    """Ask part by part: one message is in memory at a time, on either side."""
    kept = PageBook(space.key)
    row, last, more = 0, -1, True
    while more:
        ask = AskHeld(
            epoch=held,
            seed=seed,
            secret=secret.to_bytes(8, "little"),
            kind=space.key.kind,
            ident=space.key.ident,
            first_row=row,
        )
        told, frame = await session.ask(encode(ask, version=session.version))
        if (told.kind, told.ident) != (space.key.kind, space.key.ident):
            raise ProtocolError(f"the replica was asked for {space.key.pagemap_name} and spoke of another")
        part, identity = await in_thread(unpack_held, frame, told.pages)
        if told.pages:
            if int(part[0]) <= last:
                raise ProtocolError(
                    f"the replica says twice that it holds a page of {space.key.pagemap_name}"
                )
            last = int(part[-1])
        ours = space.pages.has(part)
        kept.put(part[ours], identity[ours])
        row += told.pages
        more = (
            told.more and told.pages > 0 and len(space.pages) > 0 and last < int(space.pages.bounds[-1]) - 1
        )
        more = more and row < _TIMES_LISTENED * max(len(space.pages), HELD_PAGES)
    return kept.table(NO_PAGES)


async def ask_stored(
    session: Session, epoch: EpochId, space: SpacePages, numbers: NDArray[np.uint64], secret: int
) -> tuple[NDArray[np.bool_], str]:
    """Ask what is on the replica's disk of these pages (ascending) of a space, in an epoch that it committed.

    Marks those that it does not have, or has otherwise; shape (n,). With a reason, it could not tell, and
    nothing is marked. Raises as `ask_held` does.
    """
    told = [np.empty(0, dtype=np.uint64)]
    told_identity = [np.empty((0, 2), dtype=np.uint64)]
    first_page, end_page, more = int(numbers[0]), int(numbers[-1]) + 1, True
    while more and first_page < end_page:
        ask = AskStored(
            epoch=epoch,
            secret=secret.to_bytes(8, "little"),
            kind=space.key.kind,
            ident=space.key.ident,
            first_page=first_page,
            end_page=end_page,
        )
        answer, frame = await session.ask(encode(ask, version=session.version))
        if (answer.kind, answer.ident) != (space.key.kind, space.key.ident):
            raise ProtocolError(f"the replica was asked for {space.key.pagemap_name} and spoke of another")
        if answer.problem:
            return np.zeros(len(numbers), dtype=np.bool_), answer.problem
        part, part_identity = await in_thread(unpack_held, frame, answer.pages)
        if answer.pages:
            if int(part[0]) < first_page or int(part[-1]) >= end_page:
                raise ProtocolError(f"the replica speaks of pages of {space.key.pagemap_name} unasked")
            first_page = int(part[-1]) + 1
            told.append(part)
            told_identity.append(part_identity)
        more = answer.more and answer.pages > 0
    identity = space.identities.get(numbers)
    return different(numbers, identity, np.concatenate(told), np.concatenate(told_identity)), ""
