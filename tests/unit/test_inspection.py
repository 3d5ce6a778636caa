"""What a live process uses, seen on real processes: this one's children."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.inspection import OpenDescriptor, ProcessUse, inspect_process, inspect_tree, outside_peers

Start = Callable[[str], ProcessUse]
PREAMBLE = "import ctypes, fcntl, mmap, os, socket, sys, threading\nlibc = ctypes.CDLL(None)\n"
SYS_IO_SETUP = {"x86_64": 206, "aarch64": 0}.get(os.uname().machine)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Run Python lines in a process of its own and look at it when they are done."""
    children: list[subprocess.Popen[bytes]] = []

    def run(code: str) -> ProcessUse:
        child = subprocess.Popen(
            [sys.executable, "-c", f"{PREAMBLE}{code}\nprint('ready', flush=True)\nsys.stdin.read()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=tmp_path,
        )
        children.append(child)
        assert child.stdout is not None
        answer = child.stdout.readline()
        if answer != b"ready\n":
            pytest.skip(f"not possible here: {answer.decode()}")
        return inspect_process(child.pid)

    yield run
    for child in children:
        child.kill()
        child.communicate()


def named(use: ProcessUse, name: str) -> OpenDescriptor:
    (found,) = (descriptor for descriptor in use.descriptors if descriptor.name == name)
    return found


def test_files_and_how_they_are_open(start: Start, tmp_path: Path) -> None:
    use = start("r = open('r', 'w+'); r.write('123'); r.flush(); a = open('a', 'ab'); d = os.open('.', 0)")
    read = named(use, f"{tmp_path}/r")
    assert (read.kind, read.writable, read.size_bytes, read.deleted) == ("regular", True, 3, False)
    assert named(use, f"{tmp_path}/a").flags & os.O_APPEND
    assert (named(use, str(tmp_path)).kind, named(use, str(tmp_path)).writable) == ("directory", False)


def test_deleted_files_keep_their_name(start: Start, tmp_path: Path) -> None:
    use = start("r = open('r', 'w'); os.unlink('r')\nl = open('l', 'w'); os.link('l', 'm'); os.unlink('l')")
    assert (named(use, f"{tmp_path}/r").deleted, named(use, f"{tmp_path}/r").links) == (True, 0)
    assert (named(use, f"{tmp_path}/l").deleted, named(use, f"{tmp_path}/l").links) == (True, 1)


def test_direct_io(start: Start, tmp_path: Path) -> None:
    use = start(
        "open('r', 'w').close()\n"
        "try: d = os.open('r', os.O_RDWR | os.O_DIRECT)\nexcept OSError as e: print(e)"
    )
    assert named(use, f"{tmp_path}/r").direct


@pytest.mark.parametrize("take", ["fcntl.flock(f, fcntl.LOCK_EX)", "fcntl.lockf(f, fcntl.LOCK_EX)"])
def test_file_locks(start: Start, tmp_path: Path, take: str) -> None:
    use = start(f"f = open('r', 'w'); g = open('s', 'w'); {take}")
    assert len(named(use, f"{tmp_path}/r").locks) == 1
    assert named(use, f"{tmp_path}/s").locks == ()


@pytest.mark.parametrize(("number", "name"), [("425, 4, b", "[io_uring]"), ("323, 1", "[userfaultfd]")])
def test_anonymous_inodes(start: Start, number: str, name: str) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("system call numbers of x86_64")
    use = start(
        f"b = ctypes.create_string_buffer(248)\nif libc.syscall({number}) < 0: print('no such system call')"
    )
    assert named(use, name).kind == "anonymous"


def test_an_inotify_watch_tells_its_filesystem(start: Start, tmp_path: Path) -> None:
    use = start("i = libc.inotify_init(); libc.inotify_add_watch(i, b'.', 0xfff)")
    device = tmp_path.stat().st_dev
    assert named(use, "inotify").watched_devices == {(os.major(device), os.minor(device))}


@pytest.mark.parametrize(
    ("arguments", "protocol"),
    [
        ("socket.AF_INET, socket.SOCK_STREAM", "TCP"),
        ("socket.AF_INET6, socket.SOCK_DGRAM", "UDPv6"),
        ("socket.AF_UNIX, socket.SOCK_STREAM", "UNIX-STREAM"),
        ("socket.AF_NETLINK, socket.SOCK_RAW", "NETLINK"),
        ("socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP", "SCTP"),
        ("socket.AF_INET, socket.SOCK_STREAM, 262", "MPTCP"),
    ],
)
def test_sockets_by_protocol(start: Start, arguments: str, protocol: str) -> None:
    use = start(f"try: s = socket.socket({arguments})\nexcept OSError as e: print(e)")
    assert [d.protocol for d in use.descriptors if d.kind == "socket"] == [protocol]


def test_mappings(start: Start, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(bytes(8192))
    use = start(
        "f = os.open('m', os.O_RDWR); s = mmap.mmap(f, 8192); r = mmap.mmap(f, 4096, prot=mmap.PROT_READ)\n"
        "p = mmap.mmap(f, 4096, flags=mmap.MAP_PRIVATE)"
    )
    found = {(m.shared, m.writable): m.bytes for m in use.mappings if m.name == f"{tmp_path}/m"}
    assert found == {(True, True): 8192, (True, False): 4096, (False, True): 4096}


def test_an_aio_context_shows_as_a_mapping(start: Start) -> None:
    if SYS_IO_SETUP is None:
        pytest.skip("the system call's number is not known for this machine")
    use = start(
        f"c = ctypes.c_ulong(0)\nif libc.syscall({SYS_IO_SETUP}, 4, ctypes.byref(c)): print('no AIO')"
    )
    assert "/[aio]" in {mapping.name for mapping in use.mappings}


def test_a_tracer_is_seen(start: Start) -> None:
    use = start(
        "pid = os.fork()\nif pid == 0: libc.ptrace(0, 0, 0, 0); os.kill(os.getpid(), 19)\nos.waitpid(pid, 2)"
    )
    (child,) = (int(pid) for pid in Path(f"/proc/{use.pid}/task/{use.pid}/children").read_text().split())
    assert (use.tracer_pid, inspect_process(child).tracer_pid) == (0, use.pid)
    os.kill(child, 9)


def test_a_process_that_has_ended_is_left_out() -> None:
    assert [use.pid for use in inspect_tree([os.getpid(), 2**22 + 1]).processes] == [os.getpid()]


def test_unix_sockets_with_a_peer_outside(start: Start, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{tmp_path}/sock")
        server.listen()
        use = start("a, b = socket.socketpair(); s = socket.socket(socket.AF_UNIX); s.connect('sock')")
        inside = [descriptor for descriptor in use.descriptors if descriptor.kind == "socket"]
        with server.accept()[0]:
            tree = inspect_tree([use.pid])
        assert tree.outside_peers == {inside[2].inode}


def test_peers_in_what_ss_prints() -> None:
    listed = (
        "u_str ESTAB  0 0 @a name with spaces 10 * 11\n"
        "u_str ESTAB  0 0 * 20 * 21\n"
        "u_dgr UNCONN 0 0 * 30 * 0\n"
        "u_str LISTEN 0 5 /run/x.sock 40 * 0\n"
        "u_str ESTAB  0 0 /run/x.sock 50 * 51\n"
    )
    assert outside_peers(listed, {10, 11, 20, 30, 40, 50}) == {20, 50}
