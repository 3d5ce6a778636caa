"""`python3 -m setup.install`: makes a checkout ready to run, as root, again and again.

In: this machine and the checkout. Out: the system's packages that were missing, `.venv` with the project
and its tools, the parts in C in `native/build`, `.criu/bin/criu`, a CRIU that passed a trial on this kernel.
What is done already is only looked at, which takes well under a second. Progress goes to stderr.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setup import native, private_criu, sources

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CRIU = ROOT / ".criu"
WRAPPER = CRIU / "bin/criu"
ACCEPTED = CRIU / "accepted"

# What the project starts, and the package that brings it.
PROGRAMS = {
    "runc": "runc",
    "conmon": "conmon",
    "redis-server": "redis-server",
    "redis-cli": "redis-tools",
    "ip": "iproute2",
    "nft": "nftables",
    "iptables": "iptables",
    "sysctl": "procps",
    "nsenter": "util-linux",
    "rsync": "rsync",
    "mkfs.xfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "sshd": "openssh-server",
    "etcd": "etcd-server",
    "cc": "gcc",
    "clang": "clang",
}

# To see that the parts in C are fit for the other machine too.
CROSS = {
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "qemu-aarch64-static": "qemu-user-static",
}
if platform.machine() == "x86_64":
    PROGRAMS |= CROSS

# Files that no program shows, and the package that brings them.
FILES = {"/usr/include/stdio.h": "libc6-dev", "/usr/include/bpf/bpf_tracing.h": "libbpf-dev"}
if platform.machine() == "x86_64":
    FILES |= {"/usr/aarch64-linux-gnu/include/stdio.h": "libc6-dev-arm64-cross"}

# Of those, the ones that would run a service from the next boot on: only the program is wanted.
SERVICES = {
    "redis-server": ("redis-server",),
    "openssh-server": ("ssh.socket", "ssh.service"),
    "etcd-server": ("etcd",),
}

# Suites that may have a CRIU for a newer kernel, in the order in which they came to be.
NEWER_SUITES = {"debian": ("trixie", "forky", "sid")}

_POLICY = Path("/usr/sbin/policy-rc.d")
_POLICY_TEXT = """\
#!/bin/sh
# Outlive's setup is installing packages whose services must not start. It removes this right after.
exit 101
"""


class SetupError(Exception):
    """Setup cannot go on; the message is one line that says what to do by hand."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A criu to try: where it can be started and where it came from."""

    program: Path
    origin: str


def say(step: str, message: str) -> None:
    """Print one line of progress; `step` is like "1/4"."""
    print(f"[{step}] {message}", file=sys.stderr, flush=True)


def install_packages() -> None:
    """Install the packages of `PROGRAMS` that are missing, without starting a service.

    Raises:
        SetupError: they cannot be had from the machine's package sources.
    """
    step = "1/4"
    missing = _missing_packages()
    if not missing:
        say(step, f"system packages: {', '.join(dict.fromkeys(PROGRAMS.values()))} are here")
        return
    by_hand = f"install {' '.join(missing)} by hand, then run this again"
    if shutil.which("apt-get") is None:
        raise SetupError(f"this machine has no apt: {by_hand}")
    say(step, f"system packages: installing {' '.join(missing)} ...")
    apt_get = ["apt-get", "-qq", "--yes", "-oDPkg::Lock::Timeout=300", "-oAcquire::Retries=2"]
    # A third party's source that is out of order must not stop us: only the packages count.
    _run([*apt_get, "update"])
    with _services_stay_off():
        finished = _run([*apt_get, "install", "--no-install-recommends", *missing])
    if finished.returncode != 0 or _missing_packages():
        raise SetupError(f"apt could not install them ({_last_line(finished.stderr)}): {by_hand}")
    if Path("/run/systemd/system").is_dir():
        for service in (service for package in missing for service in SERVICES.get(package, ())):
            _run(["systemctl", "disable", "--now", service])
    say(step, "system packages: installed")


def make_venv() -> None:
    """Bring `.venv` to what pyproject.toml and constraints.txt say; rebuild it only if it was moved or broke.

    Raises:
        SetupError: pip failed.
    """
    step = "2/4"
    stamp = VENV / ".setup-stamp"
    content = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    wanted = f"{ROOT}\n{hashlib.sha256(content).hexdigest()}\n"
    stamped = stamp.read_text() if stamp.is_file() else ""
    python = VENV / "bin/python"
    question = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    works = python.exists() and _run([str(python), "-c", question]).returncode == 0
    moved = bool(stamped) and stamped.splitlines()[0] != str(ROOT)
    if works and stamped == wanted:
        say(step, "Python environment: .venv is up to date")
        return
    started = time.monotonic()
    say(step, "Python environment: installing into .venv ...")
    if moved or not works:
        _venv_step([sys.executable, "-m", "venv", "--clear", str(VENV)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    _venv_step([*pip, "--constraint", "constraints.txt", "--editable", ".[dev]"])
    stamp.write_text(wanted)
    say(step, f"Python environment: installed in {time.monotonic() - started:.0f} s")


def build_native() -> None:
    """Build the parts in C. Without them the stock memory backend captures, so a failure is told, no more."""
    step = "3/4"
    if native.is_built():
        say(step, "native parts: up to date")
        return
    try:
        native.build()
        say(step, "native parts: built")
    except native.BuildError as error:
        say(step, f"native parts: not built, so only the stock memory backend works: {error}")
    try:
        native.build_for_kernel()
    except native.BuildError as error:
        say(step, f"native parts: large files are read as a whole: {error}")


def find_criu() -> None:
    """Make `.criu/bin/criu` a CRIU that passed its trial on this kernel.

    Raises:
        SetupError: none of those that can be had here passes.
    """
    step = "4/4"
    kernel = platform.release()
    if (version := _accepted_version(kernel)) is not None:
        say(step, f"CRIU: {version} passed its trial on kernel {kernel}")
        return
    say(step, f"CRIU: looking for one that dumps and restores on kernel {kernel} ...")
    stage = CRIU / "stage"
    try:
        for candidate in _candidates(step, stage):
            version = _version(candidate.program)
            passed, answer, seconds = _try(candidate.program)
            say(step, f"CRIU: {version or 'unknown version'} from {candidate.origin}: {answer}")
            if passed:
                _accept(candidate, stage)
                _write_accepted(version, candidate.origin, kernel, seconds)
                return
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    raise SetupError(
        f"no CRIU passes its trial on kernel {kernel}: install CRIU 4.2 or newer by hand, on the PATH, "
        "then run this again"
    )


def suites_to_try(distribution: str, codename: str) -> tuple[str, ...]:
    """Return the machine's own suite and those that are newer, oldest first."""
    newer = NEWER_SUITES.get(distribution, ())
    return (codename, *(newer[newer.index(codename) + 1 :] if codename in newer else newer))


def _candidates(step: str, stage: Path) -> Iterator[Candidate]:
    """Yield what may work, cheapest first; what is unpacked stands in `stage` until the next is asked for.

    The distribution's own package is unpacked too, not installed: a CRIU that fails stays nowhere.
    """
    accepted = _read_accepted()
    if accepted and WRAPPER.exists():  # it passed on another kernel
        yield Candidate(WRAPPER, accepted["origin"])
    installed = shutil.which("criu")
    if installed and Path(installed).resolve() != WRAPPER.resolve():
        yield Candidate(Path(installed), "this machine")
    release = platform.freedesktop_os_release()
    distribution, codename = release.get("ID", ""), release.get("VERSION_CODENAME", "")
    archive = sources.main_archive(sources.read_entries(), distribution, codename)
    keyring = Path(f"/usr/share/keyrings/{distribution}-archive-keyring.gpg")
    if archive is None or not keyring.is_file() or not private_criu.is_supported(platform.machine()):
        here = f"{distribution or 'unknown system'} on {platform.machine()}"
        say(step, f"CRIU: none to fetch: no package archive is known for {here}")
        return
    for suite in suites_to_try(distribution, codename):
        shutil.rmtree(stage, ignore_errors=True)
        try:
            yield Candidate(private_criu.unpack(archive, suite, keyring, stage), f"{distribution} {suite}")
        except private_criu.UnpackError as error:
            say(step, f"CRIU: none from {distribution} {suite}: {error}")


def _accept(candidate: Candidate, stage: Path) -> None:
    """Put what passed in its place."""
    if candidate.program == WRAPPER:
        return
    shutil.rmtree(CRIU / "root", ignore_errors=True)
    WRAPPER.parent.mkdir(parents=True, exist_ok=True)
    WRAPPER.unlink(missing_ok=True)
    if candidate.program.is_relative_to(stage):
        (stage / "root").rename(CRIU / "root")
        candidate.program.rename(WRAPPER)
    else:
        WRAPPER.symlink_to(candidate.program)


def _write_accepted(version: str, origin: str, kernel: str, trial_s: float) -> None:
    fields = {
        "version": version,
        "origin": origin,
        "kernel": kernel,
        "date": time.strftime("%Y-%m-%d"),
        "trial_s": round(trial_s, 1),
    }
    temporary = ACCEPTED.with_suffix(".new")
    temporary.write_text(json.dumps(fields, indent=2) + "\n")
    temporary.rename(ACCEPTED)


def _read_accepted() -> dict[str, str]:
    try:
        fields = json.loads(ACCEPTED.read_text())
    except (OSError, ValueError):
        return {}
    return {name: str(value) for name, value in fields.items()}


def _accepted_version(kernel: str) -> str | None:
    """Return the version of the CRIU in place if it passed on this kernel and still is that one."""
    accepted = _read_accepted()
    if accepted.get("kernel") != kernel:
        return None
    version = _version(WRAPPER)
    return version if version and version == accepted.get("version") else None


def _version(criu: Path) -> str:
    """Return what `criu --version` calls itself, empty if it does not start."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run(
            [str(criu), "--version"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
        for line in said.splitlines():
            if line.startswith("Version:"):
                return line.partition(":")[2].strip()
    return ""


def _try(criu: Path) -> tuple[bool, str, float]:
    """Run the trial in a process of its own: whether it passed, what it says, how long it took."""
    started = time.monotonic()
    trial = [sys.executable, "-m", "setup.criu_trial", str(criu)]
    finished = _run(trial)
    said = finished.stdout.strip() or _last_line(finished.stderr)
    return finished.returncode == 0, said, time.monotonic() - started


def _missing_packages() -> list[str]:
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    return missing + [package for file, package in FILES.items() if not Path(file).exists()]


@contextlib.contextmanager
def _services_stay_off() -> Iterator[None]:
    """Keep packages from starting their services, by Debian's own switch; a policy that is there is kept."""
    if _POLICY.exists() and _POLICY.read_text() != _POLICY_TEXT:
        yield
        return
    _POLICY.write_text(_POLICY_TEXT)
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink()


def _venv_step(command: list[str]) -> None:
    finished = _run(command)
    if finished.returncode != 0:
        raise SetupError(f"making .venv failed: {_last_line(finished.stderr or finished.stdout)}")


def _run(command: list[str], limit_s: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout with no input; what it says comes back with its exit code."""
    return subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it did not say why"


def main() -> int:
    """Do all steps; return the exit code."""
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
    # Two at once would trip over each other; the lock goes with the process.
    checkout = os.open(ROOT, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(checkout, fcntl.LOCK_EX)
    try:
        install_packages()
        make_venv()
        build_native()
        find_criu()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
