"""The fenced node's side of a fence by SSH: refuse durably, end what could undo that, kill, read back.

In: a `FenceRequest` of a peer. Out: a `FenceAnswer`; *confirmed* only if all of it was read back.

    refusal on disk ─▶ keeper, agent ended ─▶ still no newer term ─▶ VIP dropped ─▶ workload killed ─▶ read

Invariant: from a confirmed answer on, this node neither runs the workload nor has its address under a term
up to the named one, whatever is started here again and in whatever boot. What keeps it:

- The refusal is on disk before anything is ended. Whatever keeper starts from then on finds it there.
- Every keeper that could have started before is ended, also one that hangs or was stopped: it holds the
  control socket, and reads the term files only after it has got that. With it goes what it has started (`ip`
  may be about to add the address).
- Then the agent is ended, which may be half-way through an order of that keeper; then runc and conmon, which
  may be half-way through bringing the workload up; then what is in its cgroup. An agent that starts again
  acts on the orders of a keeper only.

The price: what else this node leads is unprotected until its service manager has started both again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from common.addresses import Vip, drop_vip, holds_vip
from common.bringing_up import bringing_up, end_bringing_up
from common.config import NodeConfig
from common.container import kill_workload, workload_pids
from common.errors import OutliveError
from common.events import Event, EventLog, event_file
from common.fence_request import FenceAnswer, FenceRequest
from common.model import WorkloadSpec
from common.processes import end, holders, matching
from common.roles import Refusal
from common.state_format import check_state_format
from common.terms_file import TermFiles
from common.threads import in_thread
from outlive import lease_guard

_END_S = 5.0
"""How long a killed process may take to be gone."""


async def accept_fence(config: NodeConfig, request: FenceRequest, *, dry_run: bool = False) -> FenceAnswer:
    """Carry a fence out, or (`dry_run`) only say whether it would be. Never raises an OutliveError.

    What was begun is carried to its end whoever hangs up: SIGHUP and SIGTERM are ignored from here on.
    """
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    files = TermFiles(Path(config.node.state_dir), config.node.name)

    def answer(outcome: str, reason: str, *, newer: bool = False) -> FenceAnswer:
        return FenceAnswer(
            node=config.node.name,
            by=request.by,
            terms=request.terms,
            outcome=outcome,  # type: ignore[arg-type]
            reason=reason,
            newer=newer,
        )

    try:
        check_state_format(Path(config.node.state_dir))
        # Read once: what a keeper records from here on is beyond what is fenced.
        fenced = {name: max(term, files.load(name).term) for name, term in request.terms.items()}
        if objection := _stranger(config, request):
            return answer("refused", objection)
        if objection := _of_the_past(config, files, request, fenced):
            return answer("refused", objection, newer=True)
        if os.geteuid():
            return answer("unknown", "only root can end what runs here, and this is not root")
        if dry_run:
            return answer("ready", f"a fence by {request.by} would be carried out")
        if not request.terms:
            return answer("unknown", "no workload was named, and only workloads can be fenced by SSH")
        outcome, reason = await _carry_out(config, files, request.by, fenced)
        return answer(outcome, reason, newer=outcome == "refused")
    except (OutliveError, OSError) as error:
        return answer("unknown", f"not carried to its end: {error}")


def _stranger(config: NodeConfig, request: FenceRequest) -> str:
    """Return why the request is not for this node, or not from one of its peers."""
    if request.node != config.node.name:
        return f"this is {config.node.name}, not {request.node}: the fence has the wrong address"
    if config.peer(request.by) is None:
        return f"{request.by} is no peer of {config.node.name}"
    return ""


def _of_the_past(config: NodeConfig, files: TermFiles, request: FenceRequest, fenced: dict[str, int]) -> str:
    """Return why the request is of the past: a workload's newest term here is beyond what it allows.

    One that this node has begun unheard is not: who handed it over may have it back. But what serves in it
    already goes on serving; who asks has only what it was before that.
    """
    for name, term in request.terms.items():
        record = files.load(name)
        if fenced[name] > (most := max(term, request.up_to)):
            leader = record.leader or "another node"
            return f"{leader} leads {name} in term {fenced[name]}, and {request.by} knows of {most} only"
        beyond = record.leader == config.node.name and record.term > term
        if beyond and record.mark == "stopped":
            return f"{name} was stopped here in term {record.term}, and {request.by} knows of {term} only"
        if beyond and record.mark == "leads" and workload_pids(config, name):
            return (
                f"{name} runs here in term {record.term}, and {request.by} knows of {term} only: "
                f"outlive stop {name} on {config.node.name} ends it"
            )
    return ""


def _begun_since(files: TermFiles, fenced: dict[str, int]) -> str:
    """Return which newer term was recorded since the terms to be fenced were read."""
    for name, term in fenced.items():
        if (known := files.load(name)).term > term:
            return f"term {known.term} of {name} has begun meanwhile, led by {known.leader or 'another node'}"
    return ""


async def _carry_out(
    config: NodeConfig, files: TermFiles, by: str, fenced: dict[str, int]
) -> tuple[str, str]:
    """Return outcome and reason. `fenced`: for each workload the term up to which it is led here no more."""
    for name, term in fenced.items():
        refusal = Refusal(term=term, by=by, at_wall_s=time.time())
        await in_thread(files.record_refusal, name, refusal)
    for endpoint in (config.keeper_endpoint, config.agent_endpoint):
        await in_thread(_end_holders, endpoint.removeprefix("ipc://"), endpoint == config.keeper_endpoint)
    if newer := _begun_since(files, fenced):  # that one is not ours to end
        return "refused", newer
    for name in fenced:
        for vip in _vips(config, files, name):
            await drop_vip(vip)
        await end_bringing_up(config, name)
        await kill_workload(config, name)
    for name, term in fenced.items():
        if problem := await _still_there(config, files, name, term):
            return "unknown", problem
    if newer := _begun_since(files, fenced):
        return "unknown", newer
    _tell(config, by, fenced)
    what = ", ".join(f"{name} in no term up to {term}" for name, term in fenced.items())
    return "confirmed", f"{config.node.name} leads {what}; nothing of it is left there"


def _end_holders(path: str, with_children: bool) -> None:
    """End who holds a socket. A guard of leases, which a keeper has started, stays: others need it now."""
    guards = matching(lambda words: lease_guard.__file__ in words) if with_children else []
    for pid in holders(path):
        end(pid, _END_S, with_children, spare=guards)


async def _still_there(config: NodeConfig, files: TermFiles, name: str, term: int) -> str:
    """Read back: return what is not as it should be, or nothing."""
    refusal = await in_thread(files.load_refusal, name)
    if refusal is None or refusal.term < term:
        return f"the refusal of {name} in term {term} is not on disk"
    if pids := workload_pids(config, name) or bringing_up(config, name):
        return f"processes of {name} are still there: {pids}"
    for vip in _vips(config, files, name):
        if await holds_vip(vip):
            return f"the address {vip} is still here"
    return ""


def _vips(config: NodeConfig, files: TermFiles, name: str) -> Iterator[Vip]:
    """Yield every address that this node may have for the workload: by its file, or by a peer's."""
    declared: list[WorkloadSpec | None] = [spec for spec in config.workloads if spec.name == name]
    addresses = {spec.vip for spec in (*declared, files.load_spec(name)) if spec is not None and spec.vip}
    if config.node.vip_interface:  # else no keeper here could add any
        yield from (Vip.parse(address, config.node.vip_interface) for address in sorted(addresses))


def _tell(config: NodeConfig, by: str, fenced: dict[str, int]) -> None:
    events = EventLog(event_file(config), "fence")
    for name, term in fenced.items():
        reason = f"{by} fenced this node: it leads {name} in no term up to {term}"
        events.append(Event.WORKLOAD_FENCED, workload=name, reason=reason, peer=by)
    events.close()
