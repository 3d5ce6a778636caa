"""An etcd of the simulator: keys, leases and transactions as its JSON gateway has them, in virtual time.

It knows the calls that `common.lease_calls` makes and no others. Its own clock is the world's. A new leader
of its cluster gives every lease its whole time to live again, as etcd's does.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

import msgspec

from common.lease_calls import PREFIX, Call, Claimant


@dataclass
class Pair:
    """A key's value."""

    value: str
    revision: int
    lease: int


@dataclass
class Etcd:
    """The store; `up` is whether it answers."""

    up: bool = True
    slow_s: float = 0.0
    """How long an answer may take at most."""
    revision: int = 1
    pairs: dict[str, Pair] = field(default_factory=dict)
    leases: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Time to live, and when it is over."""
    granted: int = 0

    def leader(self, workload: str, now: float) -> str:
        """Return the node that holds the workload's key; empty if none does."""
        self._expire(now)
        pair = self.pairs.get(_encoded(f"{PREFIX}/{workload}/leader"))
        return msgspec.json.decode(base64.b64decode(pair.value), type=Claimant).node if pair else ""

    def elect(self, now: float) -> None:
        """Have another member lead: it begins to count every lease anew."""
        self._expire(now)
        self.leases = {each: (ttl, now + ttl) for each, (ttl, _) in self.leases.items()}

    def handle(self, call: Call, now: float) -> Any:
        """Carry out a call and return its decoded answer."""
        return msgspec.json.decode(self.answer(call.path, call.body, now), type=call.answer, strict=False)

    def answer(self, path: str, raw: bytes, now: float) -> bytes:
        """Carry out a request and return its JSON."""
        self._expire(now)
        body = json.loads(raw)
        answers = {
            "/v3/kv/txn": self._transact,
            "/v3/lease/grant": self._grant,
            "/v3/lease/keepalive": self._keep_alive,
            "/v3/lease/revoke": self._revoke,
        }
        return json.dumps(answers[path](body, now)).encode()

    def _expire(self, now: float) -> None:
        for lease in [each for each, (_, over_at) in self.leases.items() if over_at <= now]:
            self._end(lease)

    def _end(self, lease: int) -> None:
        self.leases.pop(lease, None)
        gone = [key for key, pair in self.pairs.items() if pair.lease == lease]
        self.revision += bool(gone)
        for key in gone:
            del self.pairs[key]

    def _grant(self, body: dict[str, Any], now: float) -> dict[str, Any]:
        self.granted += 1
        self.leases[self.granted] = (int(body["TTL"]), now + int(body["TTL"]))
        return {"ID": str(self.granted), "TTL": body["TTL"]}

    def _keep_alive(self, body: dict[str, Any], now: float) -> dict[str, Any]:
        lease = int(body["ID"])
        if lease not in self.leases:
            return {"result": {"ID": body["ID"]}}
        ttl, _ = self.leases[lease]
        self.leases[lease] = (ttl, now + ttl)
        return {"result": {"ID": body["ID"], "TTL": str(ttl)}}

    def _revoke(self, body: dict[str, Any], now: float) -> dict[str, Any]:
        self._end(int(body["ID"]))
        return {}

    def _transact(self, body: dict[str, Any], now: float) -> dict[str, Any]:
        held = all(
            (self.pairs[each["key"]].revision if each["key"] in self.pairs else 0)
            == int(each["mod_revision"])
            for each in body["compare"]
        )
        steps = body["success" if held else "failure"]
        if any("request_put" in step for step in steps):
            self.revision += 1
        responses = []
        for step in steps:
            if "request_put" in step:
                put = step["request_put"]
                lease = int(put.get("lease", 0))
                if lease and lease not in self.leases:
                    return {"header": {"revision": str(self.revision)}}  # etcd: requested lease not found
                self.pairs[put["key"]] = Pair(put["value"], self.revision, lease)
                responses.append({})
            else:
                key = step["request_range"]["key"]
                responses.append({"response_range": self._range(key)})
        answer: dict[str, Any] = {"header": {"revision": str(self.revision)}, "responses": responses}
        return answer | ({"succeeded": True} if held else {})

    def _revision_of(self, key: str) -> int:
        return self.pairs[key].revision if key in self.pairs else 0

    def _range(self, key: str) -> dict[str, Any]:
        pair = self.pairs.get(key)
        if pair is None:
            return {}
        kv = {"key": key, "value": pair.value, "mod_revision": str(pair.revision), "lease": str(pair.lease)}
        return {"kvs": [kv]}


def _encoded(key: str) -> str:
    return base64.b64encode(key.encode()).decode()
