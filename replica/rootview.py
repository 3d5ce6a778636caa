"""The node's files as a workload restored here would see them, without starting anything.

In: a path inside the workload. Out: a descriptor of what is there. The container's root and each of its
binds are clones of *one* mount, without what is mounted below it (see `common.bundle`); so are the trees
that are looked through here (open_tree(2)): a tmpfs on the node's /tmp hides nothing that the workload
would see, and shows nothing that it would not. Symbolic links never lead out of a tree (openat2(2)).
"""

from __future__ import annotations

import ctypes
import os
import stat
from contextlib import ExitStack
from pathlib import PurePosixPath

from common.bundle import BindMount, WorkloadPaths, bind_mounts
from common.model import WorkloadSpec

_SYS_OPEN_TREE = 428
_SYS_OPENAT2 = 437
_OPEN_TREE_CLONE = 1
_AT_FDCWD = -100
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10
_O_PATH = 0o10000000

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    """`struct open_how` of <linux/openat2.h>."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class RootView:
    """A workload's view of this node's files. A context manager; needs CAP_SYS_ADMIN to look below mounts.

    Without the capability the node's own view is taken, which differs where something is mounted.
    """

    def __init__(self, spec: WorkloadSpec, paths: WorkloadPaths) -> None:
        binds = (BindMount("/", spec.root), *bind_mounts(spec, paths))
        self._binds = sorted(binds, key=lambda bind: len(bind.destination), reverse=True)
        self._trees: dict[str, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> RootView:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._trees.clear()

    def open(self, path: str) -> int:
        """Return an O_PATH descriptor of what the workload would find at `path`, the caller's to close.

        Raises OSError as open(2) does: FileNotFoundError, NotADirectoryError, …
        """
        bind = next(bind for bind in self._binds if _is_below(path, bind.destination))
        relative = os.path.relpath(path, bind.destination)
        return _open_in(self._tree(bind.source), relative)

    def stat(self, path: str) -> os.stat_result:
        """Return the attributes of what is at `path`; raises OSError."""
        descriptor = self.open(path)
        try:
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)

    def made_at_start(self, path: str) -> int | None:
        """Return the mode of a directory that the start of the container makes at `path`, if it would.

        These are the sources of binds which are not there yet.
        """
        bind = next(bind for bind in self._binds if _is_below(path, bind.destination))
        if path.rstrip("/") != bind.destination.rstrip("/") or os.path.lexists(bind.source):
            return None
        return stat.S_IFDIR | (0o1777 if bind.destination == "/dev/shm" else 0o755)  # noqa: S108

    def _tree(self, source: str) -> int:
        if source not in self._trees:
            flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
            descriptor = _libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source), flags)
            if descriptor < 0:
                descriptor = os.open(source, _O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._trees[source] = descriptor
            self._stack.callback(os.close, descriptor)
        return self._trees[source]


def _is_below(path: str, directory: str) -> bool:
    return PurePosixPath(path).is_relative_to(directory)


def _open_in(tree: int, relative: str) -> int:
    how = _OpenHow(_O_PATH | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    path = os.fsencode(relative)
    descriptor: int = _libc.syscall(_SYS_OPENAT2, tree, path, ctypes.byref(how), ctypes.sizeof(how))
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), relative)
    return descriptor
