"""What several of the system tests are given."""

from collections.abc import AsyncIterator, Iterator

import pytest

from primary.injection import take_userfaultfd
from primary.userfault import Userfault, problem
from tests.system.tracked_child import Child, Reader


@pytest.fixture
def child() -> Iterator[Child]:
    """A process that does what it is told."""
    child = Child()
    yield child
    child.end()


@pytest.fixture
async def reader(child: Child) -> AsyncIterator[Reader]:
    """A reader of a child that is tracked."""
    if why := problem():
        pytest.skip(why)
    child.do("1")  # it has started
    reader = Reader(child, Userfault((await take_userfaultfd(child.pid)).descriptor))
    yield reader
    reader.close()


@pytest.fixture
def untracked(child: Child) -> Iterator[Reader]:
    """A reader of a child that is not."""
    reader = Reader(child, None)
    yield reader
    reader.close()
