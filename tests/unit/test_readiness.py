"""Whether a node could restore an epoch: images written by us, a node that is this machine."""

import asyncio
import dataclasses
import mmap
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from google.protobuf.message import Message

from common.bundle import WorkloadPaths
from common.config import Node, NodeConfig
from common.criu.images import (
    MAP_HUGETLB,
    PE_PARENT,
    PE_PRESENT,
    Image,
    ImageKind,
    Pagemap,
    PagemapEntry,
    write_image,
    write_pagemap,
)
from common.criu.proto import (
    core_pb2,
    fdinfo_pb2,
    file_lock_pb2,
    fown_pb2,
    mm_pb2,
    remap_file_path_pb2,
    sk_opts_pb2,
)
from common.file_records import RECORDS
from common.model import FilePath, WorkloadSpec
from common.origin import ORIGIN_FILE, encode_origin, read_origin
from replica import readiness
from replica.buildid import BuildIds
from replica.readiness import Readiness, ReadinessVerdict, closest
from replica.rootview import RootView

ANY = "0.0.0.0"  # noqa: S104
FOWN = fown_pb2.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
DIRECTORY, LISTEN, CLOSED, ESTABLISHED = stat.S_IFDIR | 0o755, 10, 7, 1
POSIX, FLOCK = 1, 2
SHARED_FILE, MAP_SHARED, PROT_RW = 1 << 7, 1, 3


@dataclasses.dataclass
class Epoch:
    """An epoch's directory in the making: a workload whose root is `root`, and what it has open."""

    directory: Path
    root: Path
    config: NodeConfig
    spec: WorkloadSpec
    files: list[Message] = dataclasses.field(default_factory=list)
    vmas: list[mm_pb2.vma__pb2.vma_entry] = dataclasses.field(default_factory=list)
    remaps: list[Message] = dataclasses.field(default_factory=list)
    aio_rings: int = 0

    def make(self, path: str, content: bytes = b"content", mode: int = 0o644) -> Path:
        """Put a file into the workload's root on this node."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        file.chmod(mode)
        return file

    def opens(
        self,
        path: str,
        *,
        flags: int = os.O_RDONLY,
        size: int | None = None,
        mode: int = stat.S_IFREG | 0o644,
        build_id: bytes = b"",
    ) -> int:
        ident = len(self.files) + 1
        words = [int.from_bytes(build_id[at : at + 4], "little") for at in range(0, len(build_id), 4)]
        entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.REG, id=ident)
        entry.reg.CopyFrom(
            fdinfo_pb2.regfile__pb2.reg_file_entry(
                id=ident, flags=flags, pos=0, fown=FOWN, name=path, mode=mode, size=size, build_id=words
            )
        )
        self.files.append(entry)
        return ident

    def binds(
        self,
        address: str,
        port: int,
        *,
        kind: int = socket.SOCK_STREAM,
        state: int = LISTEN,
        destination: tuple[str, int] = (ANY, 0),
        v6only: bool = False,
    ) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        ident = len(self.files) + 1
        entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.INETSK, id=ident)
        entry.isk.CopyFrom(
            fdinfo_pb2.sk__inet__pb2.inet_sk_entry(
                id=ident,
                ino=ident,
                family=family,
                type=kind,
                proto=socket.IPPROTO_TCP if kind == socket.SOCK_STREAM else socket.IPPROTO_UDP,
                state=state,
                src_port=port,
                dst_port=destination[1],
                flags=0,
                backlog=5,
                src_addr=words(family, address),
                dst_addr=words(family, destination[0] if family == socket.AF_INET else "::"),
                fown=FOWN,
                opts=sk_opts_pb2.sk_opts_entry(
                    so_sndbuf=1,
                    so_rcvbuf=1,
                    so_snd_tmo_sec=0,
                    so_snd_tmo_usec=0,
                    so_rcv_tmo_sec=0,
                    so_rcv_tmo_usec=0,
                ),
                v6only=v6only,
            )
        )
        self.files.append(entry)

    def maps_shared(self, ident: int, *, prot: int = PROT_RW, open_flags: int = os.O_RDWR) -> None:
        self.vmas.append(
            mm_pb2.vma__pb2.vma_entry(
                start=4096,
                end=8192,
                pgoff=0,
                shmid=ident,
                prot=prot,
                flags=MAP_SHARED,
                status=SHARED_FILE,
                fd=-1,
                fdflags=open_flags,
            )
        )

    def deleted(self, ident: int, how: int) -> None:
        self.remaps.append(
            remap_file_path_pb2.remap_file_path_entry(orig_id=ident, remap_id=1, remap_type=how)
        )

    def write(self) -> None:
        numbers = dict.fromkeys([f"mm_{name}" for name in MM_FIELDS], 0)
        rings = [mm_pb2.aio_ring_entry(id=1, nr_req=1, ring_len=1)] * self.aio_rings
        mm = mm_pb2.mm_entry(**numbers, exe_file_id=1, vmas=self.vmas, aios=rings)
        write_image(self.directory / "files.img", Image(ImageKind.FILES, tuple(self.files)))
        write_image(self.directory / "mm-1.img", Image(ImageKind.MM, (mm,)))
        if self.remaps:
            write_image(self.directory / "remap-fpath.img", Image(ImageKind.REMAP_PATHS, tuple(self.remaps)))
        if not (self.directory / ORIGIN_FILE).exists():
            (self.directory / ORIGIN_FILE).write_bytes(encode_origin(read_origin("4.0")))

    async def judged(self, *, memory_bytes: int = 1 << 20, by: Readiness | None = None) -> ReadinessVerdict:
        self.write()
        return await (by or Readiness(self.config)).check(self.spec, self.directory, memory_bytes)


MM_FIELDS = (
    *("start_code", "end_code", "start_data", "end_data", "start_stack", "start_brk", "brk"),
    *("arg_start", "arg_end", "env_start", "env_end"),
)


def words(family: int, address: str) -> list[int]:
    packed = socket.inet_pton(family, address)
    return [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), 4)]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A criu that answers nothing but its version needs a process; everything else only has to be there."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("runc", "conmon"):
        (directory / name).write_text("#!/bin/sh\n")
        (directory / name).chmod(0o755)
    return directory


@pytest.fixture
def epoch(tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> Epoch:
    async def here(self: Readiness, reasons: list[str]) -> object:
        return read_origin("4.2.1")

    monkeypatch.setattr(Readiness, "_ask_criu", here)
    images, root = tmp_path / "images", tmp_path / "root"
    images.mkdir()
    root.mkdir(mode=0o755)
    config = NodeConfig(
        node=Node(
            name="b",
            address="127.0.0.1",
            state_dir=str(tmp_path / "state"),
            run_dir=str(tmp_path / "run"),
            runc=str(programs / "runc"),
            conmon=str(programs / "conmon"),
        )
    )
    storage = tmp_path / "storage"
    storage.mkdir()
    files = (
        FilePath(path="/srv/shared", source=str(storage), shared=True),
        FilePath(path="/srv/own", source=str(tmp_path / "own")),
    )
    spec = WorkloadSpec(name="w", nodes=("a", "b"), command=("x",), root=str(root), files=files)
    return Epoch(images, root, config, spec)


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


class TestFiles:
    async def test_the_same_files_are_restorable(self, epoch: Epoch) -> None:
        epoch.make("/etc/app.conf", b"12345")
        epoch.opens("/", mode=DIRECTORY)
        epoch.opens("/etc/app.conf", size=5)
        assert await epoch.judged() == ReadinessVerdict(True, ())

    @pytest.mark.parametrize(
        ("content", "mode", "words"),
        [
            (b"123456", 0o644, "6 bytes here and had 5"),
            (b"12345", 0o600, "mode -rw-------"),
            (None, 0, "missing"),
        ],
    )
    async def test_a_file_that_differs_is_not(
        self, epoch: Epoch, content: bytes | None, mode: int, words: str
    ) -> None:
        if content is not None:
            epoch.make("/etc/app.conf", content, mode)
        epoch.opens("/etc/app.conf", size=5)
        verdict = await epoch.judged()
        assert not verdict.restorable
        assert words in verdict.reasons[0]

    async def test_another_build_of_the_same_size_is_not(self, epoch: Epoch) -> None:
        program = epoch.make("/bin/app", Path("/bin/true").read_bytes(), 0o755)
        with program.open("rb") as file:
            build_id = BuildIds().of(file.fileno(), os.fstat(file.fileno()))
        size = program.stat().st_size
        assert len(build_id) == 20
        ident = epoch.opens("/bin/app", size=size, mode=stat.S_IFREG | 0o755, build_id=build_id)
        assert (await epoch.judged()).restorable

        epoch.files[ident - 1].reg.build_id[0] ^= 1
        assert "build-id differs" in (await epoch.judged()).reasons[0]

    async def test_a_change_on_the_node_is_seen_at_the_next_epoch(self, epoch: Epoch) -> None:
        file = epoch.make("/etc/app.conf", b"12345")
        epoch.opens("/etc/app.conf", size=5)
        readiness = Readiness(epoch.config)
        assert (await epoch.judged(by=readiness)).restorable
        file.write_bytes(b"123456")
        assert not (await epoch.judged(by=readiness)).restorable
        file.write_bytes(b"54321")
        assert (await epoch.judged(by=readiness)).restorable

    async def test_a_local_file_open_for_writing_is_not_restorable(self, epoch: Epoch) -> None:
        epoch.make("/var/log/x")
        epoch.opens("/var/log/x", flags=os.O_WRONLY | os.O_APPEND)
        (reason,) = (await epoch.judged()).reasons
        assert reason.startswith("/var/log/x is open for writing and is not replicated")

    async def test_nor_one_in_a_declared_directory_that_is_not_shared(self, epoch: Epoch) -> None:
        epoch.opens("/srv/own/dump.rdb", flags=os.O_RDWR)
        assert "open for writing" in (await epoch.judged()).reasons[0]

    async def test_nor_one_that_is_excluded_from_what_is_replicated(self, epoch: Epoch) -> None:
        epoch.make("/srv/own/x.tmp")
        epoch.opens("/srv/own/x.tmp", flags=os.O_RDWR)
        (epoch.directory / RECORDS.pagemap_name).write_bytes(b"")
        assert (await epoch.judged()).restorable
        epoch.spec = msgspec.structs.replace(epoch.spec, exclude=("*.tmp",))
        (reason,) = (await epoch.judged()).reasons
        assert reason.startswith("/srv/own/x.tmp is open for writing and is not replicated: take it out of")

    async def test_on_shared_storage_it_is(self, epoch: Epoch) -> None:
        storage = Path(epoch.spec.files[0].source)
        (storage / "log").write_bytes(b"12")
        (storage / "log").chmod(0o644)
        epoch.opens("/srv/shared/log", flags=os.O_WRONLY | os.O_APPEND)
        epoch.maps_shared(epoch.opens("/srv/shared/log", size=2))
        assert (await epoch.judged()).restorable

    async def test_unless_it_grew_since_the_epoch(self, epoch: Epoch) -> None:
        storage = Path(epoch.spec.files[0].source)
        (storage / "log").write_bytes(b"123")
        (storage / "log").chmod(0o644)
        epoch.opens("/srv/shared/log", flags=os.O_WRONLY, size=2)
        assert "appending" in (await epoch.judged()).reasons[0]

    @pytest.mark.parametrize(("prot", "flags"), [(3, os.O_RDWR), (1, os.O_RDWR), (3, 0)])
    async def test_a_local_file_mapped_as_shared_memory_is_not(
        self, epoch: Epoch, prot: int, flags: int
    ) -> None:
        epoch.make("/data/x", b"12")
        epoch.maps_shared(epoch.opens("/data/x", size=2), prot=prot, open_flags=flags)
        assert "mapped as writable shared memory" in (await epoch.judged()).reasons[0]

    async def test_a_shared_mapping_that_only_reads_is(self, epoch: Epoch) -> None:
        epoch.make("/data/x", b"12")
        epoch.maps_shared(epoch.opens("/data/x", size=2), prot=1, open_flags=os.O_RDONLY)
        assert (await epoch.judged()).restorable

    async def test_a_deleted_file_travels_with_the_epoch(self, epoch: Epoch) -> None:
        epoch.deleted(epoch.opens("/tmp/gone", flags=os.O_RDWR, size=2), remap_file_path_pb2.GHOST)
        assert (await epoch.judged()).restorable

    async def test_one_that_has_another_name_is_needed_by_the_one_that_criu_gave_it(
        self, epoch: Epoch
    ) -> None:
        epoch.deleted(epoch.opens("/data/gone", size=2), remap_file_path_pb2.LINKED)
        epoch.opens("/data/link_remap.1", size=2)
        assert "/data/link_remap.1" in (await epoch.judged()).reasons[0]
        epoch.make("/data/link_remap.1", b"12")
        assert (await epoch.judged()).restorable

    async def test_devices_and_proc_are_not_data(self, epoch: Epoch) -> None:
        null = os.stat("/dev/null").st_mode
        epoch.opens("/dev/null", flags=os.O_RDWR, mode=null)
        epoch.opens("/proc/1/stat", size=0, mode=stat.S_IFREG | 0o444)
        epoch.opens("/proc/sys/vm/x", flags=os.O_RDWR, mode=stat.S_IFREG | 0o644)
        assert (await epoch.judged()).restorable

    async def test_a_bind_that_the_start_will_make_counts_as_there(self, epoch: Epoch) -> None:
        epoch.opens("/srv/own", mode=DIRECTORY)
        assert (await epoch.judged()).restorable
        epoch.opens("/srv/own/below", mode=DIRECTORY)
        assert "missing" in (await epoch.judged()).reasons[0]

    async def test_hundreds_of_differences_are_summed_up(self, epoch: Epoch) -> None:
        for number in range(300):
            epoch.opens(f"/lib/{number}.so", size=1)
        reasons = (await epoch.judged()).reasons
        assert len(reasons) == 9
        assert reasons[-1] == "292 more files are missing or differ"

    def test_the_closest_declaration_decides_what_is_shared(self, epoch: Epoch) -> None:
        inner = FilePath(path="/srv/shared/private")
        spec = msgspec.structs.replace(epoch.spec, files=(*epoch.spec.files, inner))
        declared = closest(spec, "/srv/shared/x")
        assert declared is not None
        assert declared.shared
        assert closest(spec, "/srv/shared/private/x") == inner
        assert closest(spec, "/srv/sharedness") is None


class TestRootView:
    def test_a_link_does_not_lead_out_of_the_root(self, epoch: Epoch) -> None:
        (epoch.root / "etc").symlink_to("/elsewhere")
        with RootView(epoch.spec, WorkloadPaths(epoch.config, "w")) as view, pytest.raises(FileNotFoundError):
            view.stat("/etc/passwd")

    @pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
    def test_it_looks_below_what_is_mounted_on_the_node(self, epoch: Epoch) -> None:
        epoch.make("/mnt/below", b"12")
        script = (
            f"mount -t tmpfs none {epoch.root}/mnt && test ! -e {epoch.root}/mnt/below "
            f"&& exec {sys.executable} -c '"
            "from common.bundle import WorkloadPaths; from common.config import *\n"
            "from common.model import *\n"
            "from replica.rootview import RootView\n"
            'c = NodeConfig(node=Node(name="b", address="::1"))\n'
            f's = WorkloadSpec(name="w", nodes=("b",), command=("x",), root="{epoch.root}")\n'
            'with RootView(s, WorkloadPaths(c, "w")) as view: print(view.stat("/mnt/below").st_size)\''
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script], env=environment, capture_output=True, text=True
        )
        assert done.stdout == "2\n", done.stderr


class TestPorts:
    async def test_free_ports_are_restorable(self, epoch: Epoch, free_port: int) -> None:
        epoch.binds(ANY, free_port)
        epoch.binds("::", free_port, v6only=True)
        epoch.binds("127.0.0.1", free_port, kind=socket.SOCK_DGRAM, state=CLOSED)
        assert (await epoch.judged()).reasons == ()

    @pytest.mark.parametrize(("address", "v6only"), [(ANY, False), ("127.0.0.1", False), ("::", False)])
    async def test_a_taken_one_is_not(
        self, epoch: Epoch, taken_port: int, address: str, v6only: bool
    ) -> None:
        epoch.binds(address, taken_port, v6only=v6only)
        (reason,) = (await epoch.judged()).reasons
        assert f":{taken_port} is taken by something else" in reason

    async def test_ipv6_only_does_not_mind_ipv4(self, epoch: Epoch, taken_port: int) -> None:
        epoch.binds("::", taken_port, v6only=True)
        assert (await epoch.judged()).restorable

    async def test_nor_does_another_address(self, epoch: Epoch, taken_port: int) -> None:
        epoch.binds("127.0.0.2", taken_port)
        assert (await epoch.judged()).restorable

    async def test_a_udp_port_that_would_be_shared_with_a_stranger_is_not(self, epoch: Epoch) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            stranger.bind(("127.0.0.1", 0))
            epoch.binds("127.0.0.1", stranger.getsockname()[1], kind=socket.SOCK_DGRAM, state=CLOSED)
            assert "is taken" in (await epoch.judged()).reasons[0]

    async def test_connections_come_back_closed_and_need_no_port(self, epoch: Epoch, taken_port: int) -> None:
        epoch.binds("127.0.0.1", taken_port, state=ESTABLISHED, destination=("127.0.0.1", 9))
        epoch.binds("192.0.2.1", taken_port, state=ESTABLISHED, destination=("192.0.2.9", 9))
        assert (await epoch.judged()).restorable

    async def test_an_address_of_the_old_node_is_not(self, epoch: Epoch, free_port: int) -> None:
        if Path("/proc/sys/net/ipv4/ip_nonlocal_bind").read_text().strip() != "0":
            pytest.skip("net.ipv4.ip_nonlocal_bind is set here")
        epoch.binds("192.0.2.1", free_port)
        assert "an address that this node does not have" in (await epoch.judged()).reasons[0]
        epoch.spec = msgspec.structs.replace(epoch.spec, vip="192.0.2.1/24")
        assert not any("192.0.2.1" in reason for reason in (await epoch.judged()).reasons)

    @pytest.mark.parametrize("mark", [b"", b"\xe9"], ids=["text", "bytes"])
    async def test_an_abstract_name_that_is_held_here_is_not(self, epoch: Epoch, mark: bytes) -> None:
        name = f"\0outlive-test-{os.getpid()}".encode() + mark
        entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.UNIXSK, id=1)
        entry.usk.CopyFrom(
            fdinfo_pb2.sk__unix__pb2.unix_sk_entry(
                id=1,
                ino=1,
                type=socket.SOCK_STREAM,
                state=LISTEN,
                flags=0,
                uflags=0,
                backlog=1,
                peer=0,
                fown=FOWN,
                opts=sk_opts_pb2.sk_opts_entry(
                    so_sndbuf=1,
                    so_rcvbuf=1,
                    so_snd_tmo_sec=0,
                    so_snd_tmo_usec=0,
                    so_rcv_tmo_sec=0,
                    so_rcv_tmo_usec=0,
                ),
                name=name,
            )
        )
        epoch.files.append(entry)
        assert (await epoch.judged()).restorable
        with socket.socket(socket.AF_UNIX) as holder:
            holder.bind(name)
            reason = (await epoch.judged()).reasons[0]
            assert "abstract unix socket @outlive-test" in reason
            assert msgspec.json.encode(reason), "it can be sent, whatever the name"


class TestNode:
    async def test_too_little_memory_is_a_reason(self, epoch: Epoch) -> None:
        epoch.opens("/", mode=DIRECTORY)
        (reason,) = (await epoch.judged(memory_bytes=1 << 50)).reasons
        assert "1073741888 MiB of memory" in reason

    async def test_a_missing_program_is_a_reason(self, epoch: Epoch, programs: Path) -> None:
        (programs / "runc").unlink()
        epoch.opens("/", mode=DIRECTORY)
        assert "runc is not installed" in (await epoch.judged()).reasons[0]

    async def test_an_epoch_of_another_cpu_is_a_reason(self, epoch: Epoch) -> None:
        epoch.opens("/", mode=DIRECTORY)
        origin = msgspec.structs.replace(read_origin("4.2.1"), cpu_flags=("amx_of_the_future",))
        (epoch.directory / ORIGIN_FILE).write_bytes(encode_origin(origin))
        assert "amx_of_the_future" in (await epoch.judged()).reasons[0]

    @pytest.mark.parametrize(
        ("kind", "mapped", "others", "restorable"),
        [
            (POSIX, True, True, False),
            (POSIX, True, False, True),  # nobody is there whom the lock would keep out
            (POSIX, False, True, True),
            (FLOCK, True, True, True),
        ],
    )
    async def test_locks_that_criu_would_lose_are_a_reason(
        self, epoch: Epoch, kind: int, mapped: bool, others: bool, restorable: bool
    ) -> None:
        epoch.opens("/", mode=DIRECTORY)
        epoch.make("/db-shm")
        ident = epoch.opens("/db-shm", flags=os.O_RDONLY)
        if mapped:
            epoch.maps_shared(ident, prot=1, open_flags=os.O_RDONLY)
        for pid in (1, 2) if others else (1,):
            ids = core_pb2.task_kobj_ids_entry(vm_id=pid, files_id=pid, fs_id=1, sighand_id=1)
            entry = fdinfo_pb2.fdinfo_entry(id=ident, flags=0, type=fdinfo_pb2.REG, fd=7)
            write_image(epoch.directory / f"ids-{pid}.img", Image(ImageKind.IDS, (ids,)))
            write_image(epoch.directory / f"fdinfo-{pid}.img", Image(ImageKind.FDINFO, (entry,)))
        lock = file_lock_pb2.file_lock_entry(flag=kind, type=0, pid=1, fd=7, start=128, len=1)
        write_image(epoch.directory / "filelocks.img", Image(ImageKind.FILE_LOCKS, (lock,)))
        verdict = await epoch.judged()
        assert verdict.restorable == restorable, verdict
        assert restorable or "/db-shm is used by several processes" in verdict.reasons[0]

    async def test_kernel_aio_is_a_reason(self, epoch: Epoch) -> None:
        epoch.opens("/", mode=DIRECTORY)
        epoch.aio_rings = 1
        assert "kernel AIO" in (await epoch.judged()).reasons[0]

    @pytest.mark.parametrize(
        ("kind", "flag", "restorable"),
        [
            (mmap.MAP_PRIVATE, PE_PRESENT, True),
            (mmap.MAP_PRIVATE, PE_PARENT, False),
            (mmap.MAP_SHARED, PE_PARENT, True),
        ],
    )
    async def test_private_huge_pages_in_the_parent_are_a_reason_at_any_epoch(
        self, epoch: Epoch, monkeypatch: pytest.MonkeyPatch, kind: int, flag: int, restorable: bool
    ) -> None:
        monkeypatch.setattr(readiness, "_free_huge_bytes", lambda: 1 << 21)
        epoch.opens("/", mode=DIRECTORY)
        epoch.vmas.append(
            mm_pb2.vma__pb2.vma_entry(
                start=1 << 21, end=2 << 21, pgoff=0, shmid=0, prot=PROT_RW, flags=kind | MAP_HUGETLB,
                status=1 << 9, fd=-1,
            )
        )  # fmt: skip
        judge = Readiness(epoch.config)
        pagemap = epoch.directory / "pagemap-1.img"
        write_pagemap(pagemap, Pagemap(1, (PagemapEntry(1 << 21, 512, PE_PRESENT),)))
        assert (await epoch.judged(by=judge)).restorable
        write_pagemap(pagemap, Pagemap(1, (PagemapEntry(1 << 21, 512, flag),)))
        verdict = await epoch.judged(by=judge)
        assert verdict.restorable is restorable
        assert restorable or "huge pages" in verdict.reasons[0]

    async def test_too_few_free_huge_pages_are_a_reason(
        self, epoch: Epoch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(readiness, "_free_huge_bytes", lambda: 0)
        epoch.opens("/", mode=DIRECTORY)
        epoch.vmas.append(
            mm_pb2.vma__pb2.vma_entry(
                start=1 << 21, end=2 << 21, pgoff=0, shmid=0, prot=PROT_RW,
                flags=mmap.MAP_SHARED | MAP_HUGETLB, status=1 << 8, fd=-1,
            )
        )  # fmt: skip
        assert "vm.nr_hugepages" in (await epoch.judged()).reasons[0]

    @pytest.mark.parametrize("missing", ["files.img", ORIGIN_FILE])
    async def test_images_that_are_not_there_are_a_reason(self, epoch: Epoch, missing: str) -> None:
        epoch.opens("/", mode=DIRECTORY)
        epoch.write()
        (epoch.directory / missing).unlink()
        verdict = await Readiness(epoch.config).check(epoch.spec, epoch.directory, 1)
        assert "cannot be read" in verdict.reasons[0]


async def test_a_look_that_does_not_come_back_is_a_no_and_holds_up_nobody(
    epoch: Epoch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage that hangs: one look waits for it, however often is asked; another workload is judged."""
    monkeypatch.setattr(readiness, "_PATIENCE_S", 0.5)
    answers, looks = threading.Event(), list[str]()

    def look(self: Readiness, spec: WorkloadSpec, *_: object) -> list[str]:
        looks.append(spec.name)
        if spec.name == epoch.spec.name:
            answers.wait(30)
        return []

    monkeypatch.setattr(Readiness, "_check", look)
    judge = Readiness(epoch.config)
    async with asyncio.timeout(10):
        for _ in range(100):  # 50 s, if each of them waited
            verdict = await judge.check(epoch.spec, epoch.directory, 0)
            assert not verdict.restorable
            assert "has not come back" in verdict.reasons[-1]
    other = msgspec.structs.replace(epoch.spec, name="other")
    assert "has not come back" not in str(await judge.check(other, epoch.directory, 0))
    assert looks == [epoch.spec.name, "other"]
    answers.set()
    for _ in range(200):
        if "has not come back" not in str(await judge.check(epoch.spec, epoch.directory, 0)):
            break
        await asyncio.sleep(0.01)
    assert looks == [epoch.spec.name, "other", epoch.spec.name]


@pytest.mark.timeout(20)
async def test_who_asks_in_the_moment_in_which_an_overdue_look_comes_back_is_answered(epoch: Epoch) -> None:
    judge = Readiness(epoch.config)
    await judge.check(epoch.spec, epoch.directory, 0)  # criu is known from here on
    look: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
    judge._looks[epoch.spec.name] = look
    judge._overdue.add(epoch.spec.name)
    look.set_result([])
    look.add_done_callback(lambda done: judge._ended(epoch.spec.name, done))  # at the loop's next turn
    verdict = await judge.check(epoch.spec, epoch.directory, 0)
    assert "has not come back" not in str(verdict.reasons)
