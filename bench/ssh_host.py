"""An sshd of our own on loopback, and what ssh and rsync take to bring bytes through it to the disk.

Its keys and configuration are made anew in a directory; neither the machine's sshd nor anybody's `~/.ssh` has
a part in it. Ciphers are what the installed OpenSSH agrees on by itself.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import resource
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.processes import cpu_s, has_children
from common.errors import LabError

_ADDRESS = "127.0.0.1"
_PRIVILEGE_SEPARATION = Path("/run/sshd")
"""Compiled into Debian's sshd, which does not start without it; its service would make it."""
_START_S = 10.0
_DEADLINE_S = 600.0


@dataclass(frozen=True, slots=True)
class Cost:
    """One transfer: wall clock, and the CPU seconds of client and server processes."""

    seconds: float
    cpu_s: float
    sent_bytes: int | None = None
    """As the client says; None: it does not say."""


def missing_programs() -> str:
    """Say why there can be no `SshHost`; empty if there can."""
    if os.geteuid() != 0:
        return "sshd needs root"
    missing = [name for name in ("ssh", "ssh-keygen", "sshd", "rsync") if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


class SshHost:
    """A running sshd; see `ssh_host`."""

    def __init__(self, server: int, client: Sequence[str]) -> None:
        self._server = server
        self._client = tuple(client)

    def greet(self) -> Cost:
        """Only connect and run `true`: what every transfer below contains."""
        return self._run([*self._client, _ADDRESS, "true"])[0]

    def pipe(self, source: Path, target: Path) -> Cost:
        """Write a file's bytes through ssh to `target`, synced."""
        write = f"dd of={shlex.quote(str(target))} bs=1M iflag=fullblock conv=fsync status=none"
        return self._run([*self._client, _ADDRESS, write], source)[0]

    def rsync(self, source: Path, target: Path) -> Cost:
        """Bring `target` to what `source` is, synced; only what differs is sent."""
        # Without --ignore-times a change within the second of the last one would be overlooked.
        options = ["--inplace", "--no-whole-file", "--ignore-times", "--fsync", "--stats"]
        shell = shlex.join(self._client)
        cost, said = self._run(["rsync", *options, "--rsh", shell, str(source), f"{_ADDRESS}:{target}"])
        sent = re.search(r"Total bytes sent: ([\d,.]+)", said)
        return Cost(cost.seconds, cost.cpu_s, int(re.sub(r"\D", "", sent[1])) if sent else None)

    def _run(self, command: list[str], source: Path | None = None) -> tuple[Cost, str]:
        server_s, client_s = cpu_s(self._server), _children_s()
        with (source or Path(os.devnull)).open("rb") as stream:
            started_s = time.monotonic()
            try:
                finished = subprocess.run(
                    command, stdin=stream, capture_output=True, text=True, check=True, timeout=_DEADLINE_S
                )
            except subprocess.SubprocessError as error:
                said = getattr(error, "stderr", None) or "nothing on stderr"
                raise LabError(f"{command[0]} failed: {error}: {said}") from error
            seconds = time.monotonic() - started_s
        while has_children(self._server):  # the server has not counted its session yet
            time.sleep(0.005)
        spent_s = cpu_s(self._server) - server_s + _children_s() - client_s
        return Cost(seconds, spent_s), finished.stdout


@contextlib.contextmanager
def ssh_host(directory: Path) -> Iterator[SshHost]:
    """Run an sshd with its files in `directory` until the block ends. Raises LabError if it cannot."""
    for name in ("host", "user"):
        _make_key(directory / name)
    authorized, config = directory / "authorized_keys", directory / "sshd_config"
    authorized.write_text((directory / "user.pub").read_text())
    port = _free_port()
    config.write_text(
        f"ListenAddress {_ADDRESS}\nPort {port}\nHostKey {directory / 'host'}\nPidFile none\n"
        f"AuthorizedKeysFile {authorized}\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        "PermitRootLogin prohibit-password\n"
    )
    known = directory / "known_hosts"
    known.write_text(f"[{_ADDRESS}]:{port} {(directory / 'host.pub').read_text()}")
    client = ["ssh", "-F", "none", "-p", str(port), "-i", str(directory / "user"), "-l", getpass.getuser()]
    for option in ("BatchMode=yes", "IdentitiesOnly=yes", f"UserKnownHostsFile={known}", "LogLevel=ERROR"):
        client += ["-o", option]
    log = directory / "sshd.log"
    with contextlib.ExitStack() as stack:
        if not _PRIVILEGE_SEPARATION.exists():
            _PRIVILEGE_SEPARATION.mkdir(mode=0o755)
            stack.callback(_PRIVILEGE_SEPARATION.rmdir)
        # sshd starts itself anew for every connection, so it wants its full path.
        command = [str(shutil.which("sshd")), "-D", "-e", "-f", str(config)]
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=stack.enter_context(log.open("wb"))
        )
        stack.callback(server.wait)
        stack.callback(server.terminate)
        deadline_s = time.monotonic() + _START_S
        while not _listens(port):
            if server.poll() is not None or time.monotonic() > deadline_s:
                raise LabError(f"sshd does not listen: {log.read_text().strip()}")
            time.sleep(0.02)
        yield SshHost(server.pid, client)


def versions() -> str:
    """Say which ssh and rsync these are."""
    ssh = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr
    rsync = subprocess.run(["rsync", "--version"], capture_output=True, text=True, check=True).stdout
    return f"{ssh.split(',')[0].strip()}, {' '.join(rsync.split()[:3])}"


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_ADDRESS, 0))
        return int(listener.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((_ADDRESS, port)) == 0


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
