"""Judges what the node's file names: key, address, interface, fences, peers, our own processes.

In: the node's configuration. Out: checks of area `node`. Nothing is changed: peers are only connected to, and
no fence is run (one by SSH is asked whether it would do it).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import time
from pathlib import Path

from msgspec.structs import replace

from common import keys
from common.config import Etcd, Fence, NodeConfig, SshFence
from common.control import AskStatus, NodeStatus
from common.control_channel import ask
from common.errors import OutliveError, UnreachableError
from common.etcd import EtcdClient
from common.fence_request import FenceRequest
from common.lease_calls import LeaseKeys, Look, Seen, Unanswered
from outlive.doctor.report import Check, node_check

_PEER_DEADLINE_S = 1.0
_KEEPER_DEADLINE_S = 1.0
_FENCE_DEADLINE_S = 5.0
_ETCD_DEADLINE_S = 1.0
_LEASES_LAST_3_4, _LEASES_LAST = (3, 4, 31), (3, 5, 13)


async def check_named(config: NodeConfig) -> list[Check]:
    """Check each thing that the file names. Peers that are silent cost a second."""
    found = [_check_key(config), _check_address(config.node.address)]
    if config.node.vip_interface:
        found.append(_check_interface(config.node.vip_interface))
    found += await asyncio.gather(*(_check_fence(config, fence) for fence in config.fences))
    found += await asyncio.gather(*(_check_peer(p.name, p.address, p.agent_port) for p in config.peers))
    found += await asyncio.gather(*(_check_etcd(config.etcd, each) for each in config.etcd.endpoints))
    found.append(await _check_keeper(config))
    return found


async def _check_etcd(etcd: Etcd, member: str) -> Check:
    """Ask one member for what must go through all of them, and which etcd it is."""
    keys = LeaseKeys("doctor", node="doctor", boot_id="", ttl_s=2, clock=time.monotonic)
    client = EtcdClient(replace(etcd, endpoints=(member,)), _ETCD_DEADLINE_S)
    answer = await client.ask(keys, Look())
    if isinstance(answer, Seen):
        return judge_etcd(member, await _version_of(client))
    reason = answer.reason if isinstance(answer, Unanswered) else "it does not answer as etcd would"
    hint = "is etcd running there, has it a leader (etcdctl endpoint status), does a firewall let us through?"
    return node_check("etcd", "warn", reason, hint)


async def _version_of(client: EtcdClient) -> tuple[int, ...]:
    try:
        return await client.version()
    except UnreachableError:
        return ()


def judge_etcd(member: str, version: tuple[int, ...]) -> Check:
    """See that a lease lasts with that etcd; `version` is empty if it does not tell.

    A leader of etcd that stood still until it was replaced ended leases that had been renewed with the next
    one, before these versions (etcd-io/etcd issue 15247; pull requests 16822 and 17465).
    """
    told = ".".join(map(str, version)) or "of a version that it does not tell"
    if version >= (_LEASES_LAST_3_4 if version[:2] == (3, 4) else _LEASES_LAST):
        return node_check("etcd", "ok", f"{member} answers, and is etcd {told}")
    newer = " or ".join(".".join(map(str, each)) for each in (_LEASES_LAST_3_4, _LEASES_LAST))
    return node_check(
        "etcd",
        "warn",
        f"{member} answers, and is etcd {told}: its leader may end a lease that was renewed, after it "
        "hung and was replaced: two nodes may run the workload for a moment",
        f"etcd {newer}, or newer",
    )


def _check_address(address: str) -> Check:
    """Find out by binding a socket to it, as agent and keeper will."""
    family, kind, _, _, where = socket.getaddrinfo(
        address, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )[0]
    try:
        with socket.socket(family, kind) as probe:
            probe.bind(where)
    except OSError as error:
        return node_check(
            "address",
            "warn",
            f"{address} is no address of this machine, so agent and keeper cannot listen: {error.strerror}",
            "write one that `ip address` shows as node.address, or add it to an interface",
        )
    return node_check("address", "ok", f"{address} is an address of this machine")


def _check_interface(name: str) -> Check:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return node_check(
            "vip_interface",
            "warn",
            f"this machine has no interface {name}, so no virtual address can be added here",
            "write one that `ip link` shows as node.vip_interface",
        )
    return node_check("vip_interface", "ok", f"{name} is an interface of this machine")


async def _check_fence(config: NodeConfig, fence: Fence) -> Check:
    name = f"fence {fence.label} of {fence.node}"
    if fence.ssh is None:
        return _check_command(name, fence)
    return await _check_ssh(name, fence, fence.ssh, config.node.name)


async def _check_ssh(name: str, fence: Fence, ssh: SshFence, here: str) -> Check:
    """Ask the node whether it would be fenced: all that a fence takes, and nothing is done there."""
    from common.ssh_fence import ask_by_ssh

    request = FenceRequest(node=fence.node, by=here)
    deadline_s = min(fence.timeout_ms / 1000, _FENCE_DEADLINE_S)
    try:
        answer = await ask_by_ssh(ssh, request, deadline_s, dry_run=True)
    except UnreachableError as error:
        hint = "is sshd running there, and does a firewall let us through? A node that is off cannot answer"
        return node_check(name, "warn", f"it cannot confirm now: {error.message}", hint)
    except OutliveError as error:
        return node_check(name, "fail", f"it can never confirm: {error.message}", error.hint)
    if answer.outcome != "ready":
        hint = "docs/concepts/fencing.md says how to set it up"
        return node_check(name, "fail", f"it can never confirm: {answer.reason}", hint)
    return node_check(name, "ok", f"{fence.node} answers at {ssh.host} with the pinned key: {answer.reason}")


def _check_command(name: str, fence: Fence) -> Check:
    """Look for the program as the keeper will; it is not run, for it would turn the node off."""
    program = fence.command[0]
    found = shutil.which(program)
    if found is not None:
        return node_check(name, "ok", f"{found} is there; whether it works, only a trial tells")
    if "/" not in program:
        why, hint = "is not installed, or not in PATH", "install it, or name its absolute path"
    elif not Path(program).exists():
        why, hint = "does not exist", "install it, or correct the path"
    else:
        why, hint = "is not an executable file", f"chmod +x {program}, or correct the path"
    return node_check(
        name, "fail", f"{program} {why}, so it can never confirm that {fence.node} is off", hint
    )


def _check_key(config: NodeConfig) -> Check:
    path = Path(config.node.key_file)
    try:
        keys.load(path)
    except OutliveError as error:
        return node_check("key", "fail", error.message, error.hint)
    return node_check("key", "ok", f"{path} belongs to us and nobody else can read it")


async def _check_peer(name: str, address: str, port: int) -> Check:
    """Connect to the peer's agent by TCP. Whether it accepts our key only the agent finds out."""
    where = f"{address} port {port}"
    try:
        async with asyncio.timeout(_PEER_DEADLINE_S):
            _, writer = await asyncio.open_connection(address, port)
        writer.close()
    except (OSError, TimeoutError) as error:
        silent = f"no answer within {_PEER_DEADLINE_S:g} s"
        why = os.strerror(error.errno) if error.errno else silent
        hint = "is its agent running, and does a firewall let us through?"
        return node_check(f"peer {name}", "warn", f"{where} cannot be reached: {why}", hint)
    return node_check(f"peer {name}", "ok", f"{where} answers")


async def _check_keeper(config: NodeConfig) -> Check:
    try:
        answer = await ask(config.keeper_endpoint, AskStatus(), _KEEPER_DEADLINE_S)
    except OutliveError as error:
        return node_check(
            "keeper", "warn", error.message, "nothing is protected here until keeper and agent run"
        )
    if not isinstance(answer, NodeStatus):
        return node_check("keeper", "warn", f"it answered {type(answer).__name__}", "outlive status")
    if answer.agent != "alive":
        hint = "workloads run on unprotected: start the agent"
        return node_check("keeper", "warn", f"it runs, the agent is {answer.agent}", hint)
    return node_check("keeper", "ok", "keeper and agent run")
