"""Asking a workload whether it serves: by TCP, HTTP or a command.

In: a `HealthCheck` and the address to ask at. Out: nothing if it is healthy, else a sentence. HTTP is spoken
by hand (one GET, the status line): the keeper asks too, and an HTTP library is larger than the keeper.
"""

from __future__ import annotations

import asyncio
import ipaddress
import shlex
import time

from common.children import end_child, hangs
from common.model import HealthCheck, WorkloadSpec

_PAUSE_S = 0.05
"""Between two attempts while a workload comes up."""
_LINE_BYTES = 4096


def health_address(spec: WorkloadSpec) -> str:
    """Return where the workload is asked: at its virtual address, else at loopback."""
    return str(ipaddress.ip_interface(spec.vip).ip) if spec.vip is not None else "127.0.0.1"


async def check_once(check: HealthCheck, address: str) -> str:
    """Return what is wrong, in a sentence; empty if the workload is healthy. Never raises."""
    try:
        async with asyncio.timeout(check.timeout_ms / 1000):
            if check.tcp is not None:
                return await _tcp(address, check.tcp)
            if check.http is not None:
                return await _http(address, *check.http_target())
            return await _command(check.command or ())
    except TimeoutError:
        return f"no answer within {check.timeout_ms} ms"
    except OSError as error:
        return error.strerror or str(error)
    except (ValueError, RuntimeError) as error:  # what cannot be asked, or no thread to ask with
        return str(error)


async def wait_healthy(check: HealthCheck, address: str) -> str:
    """Ask until the workload is healthy (return the empty string) or its grace is over (what is wrong)."""
    deadline_s = time.monotonic() + check.grace_ms / 1000
    while wrong := await check_once(check, address):
        if time.monotonic() >= deadline_s:
            return f"{wrong} (asked for {check.grace_ms} ms)"
        await asyncio.sleep(_PAUSE_S)
    return ""


async def _tcp(address: str, port: int) -> str:
    _, writer = await asyncio.open_connection(address, port)
    writer.close()
    return ""


async def _http(address: str, port: int, path: str) -> str:
    """Every 2xx and 3xx status is healthy."""
    host = f"[{address}]" if ":" in address else address
    reader, writer = await asyncio.open_connection(address, port, limit=_LINE_BYTES)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        line = (await reader.readline()).decode("latin-1").strip()
    except ValueError:
        return "the answer is not HTTP"
    finally:
        writer.close()
    status = line.split(" ")[1] if line.startswith("HTTP/") and " " in line else ""
    return "" if status[:1] in ("2", "3") else f"answered {line[:80]!r}"


async def _command(command: tuple[str, ...]) -> str:
    kind = f"health {shlex.join(command)}"
    if hangs(kind):
        return f"an earlier {command[0]} was killed, and has not ended yet"
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        status = await process.wait()
    finally:
        await end_child(process, kind)
    return "" if status == 0 else f"{command[0]} exited with {status}"
