"""PostgreSQL for tests: its programs wherever they are installed, a data directory, a server for a copy.

The server refuses to be root, so it is the user `postgres`. Where CRIU may not dump other users' processes
(root without CAP_SYS_RESOURCE, as in some containers), the workload is root and believes to be `postgres`.
"""

from __future__ import annotations

import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

USER = "postgres"
PORT = 5432
PROGRAMS = ("postgres", "initdb", "pgbench", "psql", "pg_checksums", "pg_controldata")
_START_TIMEOUT_S = 60
_CAP_SYS_RESOURCE = 24
_PATHS = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql/bin")

SETTINGS = {
    "listen_addresses": "*",
    "port": str(PORT),
    "unix_socket_directories": "",
    "shared_memory_type": "mmap",
    # Few buffers, so that pages are read from files, and written to them, all the time.
    "shared_buffers": "1MB",
    "max_connections": "20",
    "huge_pages": "off",
    "bgwriter_delay": "20ms",
    "autovacuum_naptime": "1s",
    "checkpoint_timeout": "30s",
    "max_wal_size": "64MB",
    "min_wal_size": "48MB",
    "jit": "off",
}


def program(name: str) -> str | None:
    """Return the path of one of PostgreSQL's programs, of the newest version; None: there is none."""
    found = [path for pattern in _PATHS for path in Path("/").glob(f"{pattern[1:]}/{name}")]
    return str(max(found)) if found else shutil.which(name)


def missing() -> str:
    """Return why there cannot be a server here; empty if there can."""
    lacking = [name for name in PROGRAMS if program(name) is None]
    if lacking:
        return f"PostgreSQL is not installed: no {', '.join(lacking)}"
    try:
        pwd.getpwnam(USER)
    except KeyError:
        return f"there is no user {USER}"
    return ""


def owner() -> tuple[int, int]:
    """Return user and group of the server."""
    entry = pwd.getpwnam(USER)
    return entry.pw_uid, entry.pw_gid


def user_of_workload(directory: Path) -> dict[str, Any]:
    """Return the fields of a declaration that make the server's user; `directory` is for what that takes."""
    uid, gid = owner()
    status = Path("/proc/self/status").read_text()
    capabilities = int(next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1], 16)
    if capabilities >> _CAP_SYS_RESOURCE & 1:
        return {"user": f"{uid}:{gid}"}
    preloaded = directory / "other_user.so"
    source = Path(__file__).with_name("other_user.c")
    subprocess.run(["cc", "-shared", "-fPIC", f"-DOTHER_USER={uid}", "-o", preloaded, source], check=True)
    return {"environment": {"LD_PRELOAD": str(preloaded)}}


def command(data: str, **settings: str) -> tuple[str, ...]:
    """Return the words that run a server."""
    words = [word for pair in (SETTINGS | settings).items() for word in ("-c", "=".join(pair))]
    return (str(program("postgres")), "-D", data, *words)


def run_as_owner(name: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    uid, gid = owner()
    done = subprocess.run(
        [str(program(name)), *words],
        user=uid,
        group=gid,
        extra_groups=[],
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert not check or done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
    return done


@contextmanager
def owned_directory() -> Iterator[Path]:
    """Make a directory that the server may use, and remove it."""
    with tempfile.TemporaryDirectory(prefix="outlive-postgres-") as name:
        path = Path(name)
        shutil.chown(path, *owner())
        yield path


def make_data(target: Path) -> None:
    """Make the data directory of a new server, with checksums; anybody may connect."""
    with owned_directory() as directory:
        made = directory / "data"
        run_as_owner("initdb", "-D", str(made), "-U", USER, "-k", "-A", "trust", "--locale=C", "-N")
        with (made / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 0.0.0.0/0 trust\n")
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mv", made, target], check=True)


def copy_data(source: Path, directory: Path) -> Path:
    """Copy a data directory into one that the server may use."""
    copy = directory / "data"
    subprocess.run(["cp", "-a", "--sparse=always", source, copy], check=True)
    uid, gid = owner()
    subprocess.run(["chown", "-R", f"{uid}:{gid}", copy], check=True)
    return copy


@contextmanager
def server_on(data: Path) -> Iterator[list[str]]:
    """Run a server that nobody reaches but by a socket; yield the options that lead clients there."""
    (data / "postmaster.pid").unlink(missing_ok=True)
    settings = {"listen_addresses": "", "unix_socket_directories": str(data.parent)}
    log = data.parent / "server.log"
    words = [word for pair in (SETTINGS | settings).items() for word in ("-c", "=".join(pair))]
    uid, gid = owner()
    with log.open("ab") as output:
        server = subprocess.Popen(
            [str(program("postgres")), "-D", str(data), *words],
            user=uid,
            group=gid,
            extra_groups=[],
            cwd="/",
            stdout=output,
            stderr=output,
        )
    try:
        options = ["-h", str(data.parent), "-p", str(PORT), "-U", USER]
        wait = 'for _ in $(seq 600); do psql "$@" -qAtc "SELECT 1" && exit; sleep 0.1; done; exit 1'
        ready = subprocess.run(
            ["sh", "-c", wait, "sh", *options, "postgres"],
            capture_output=True,
            timeout=_START_TIMEOUT_S,
            check=False,
        )
        assert ready.returncode == 0, log.read_text(errors="replace")
        yield options
    finally:
        server.terminate()
        try:
            server.wait(_START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
