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
from common.messages import AskHeld, encode
from common.model import EpochId
from common.threads import in_thread
from primary.capture import CapturedEpoch, PageTable, SpacePages
from primary.session import Session

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
    numbers: list[NDArray[np.uint64]] = []
    identities: list[NDArray[np.uint64]] = []
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
        told, frame = await session.ask(encode(ask))
        if (told.kind, told.ident) != (space.key.kind, space.key.ident):
            raise ProtocolError(f"the replica was asked for {space.key.pagemap_name} and spoke of another")
        part, identity = await in_thread(unpack_held, frame, told.pages)
        if told.pages:
            if int(part[0]) <= last:
                raise ProtocolError(
                    f"the replica says twice that it holds a page of {space.key.pagemap_name}"
                )
            last = int(part[-1])
        ours = np.isin(part, space.numbers, assume_unique=True)
        numbers.append(part[ours])
        identities.append(identity[ours])
        row += told.pages
        more = told.more and told.pages > 0 and len(space.numbers) > 0 and last < space.numbers[-1]
        more = more and row < _TIMES_LISTENED * max(len(space.numbers), HELD_PAGES)
    held_numbers = np.concatenate(numbers)
    flags = np.zeros(len(held_numbers), np.uint8)
    return SpacePages(space.key, held_numbers, flags, np.concatenate(identities))
