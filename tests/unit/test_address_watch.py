"""An address belongs where its workload is led; one look is not enough to say that it does not."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from common.addresses import is_local
from common.model import WorkloadSpec
from common.roles import Instant, Role, StateName, TermRecord, Timing, new_role
from outlive.address_watch import AddressWatch, address_of, misplaced

SPEC = WorkloadSpec(name="w", nodes=("a", "b"), command=("sleep",), vip="10.0.0.9/24")


def role(name: StateName = "leading", *, term: int = 1, **values: object) -> Role:
    made = new_role(
        me="a",
        boot_id="boot",
        spec=SPEC,
        timing=Timing(),
        fenceable=frozenset(),
        record=TermRecord(term=term, leader="a", mark="leads", boot_id="boot"),
        first_order=1,
        now=Instant(1.0, 1.0),
        pauses=(),
        refusal=None,
    )
    return replace(made, **({"name": name, "alive": True} | values))


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize(
    ("name", "with_it", "without"),
    [
        ("leading", "", "missing"),
        ("following", "not ours", ""),
        ("handed_over", "not ours", ""),
        ("stopped", "not ours", ""),
        ("taking_over", "", ""),
        ("deposed", "", ""),
        ("acquiring", "", ""),
    ],
)
def test_by_the_role_alone(name: StateName, with_it: str, without: str, *, here: bool) -> None:
    assert misplaced(role(name), here) == (with_it if here else without)


@pytest.mark.parametrize(
    "values",
    [{"undo": frozenset({"drop_vip"})}, {"vip_problem": "add_vip: no"}, {"alive": False}, {"term": 0}],
    ids=str,
)
def test_what_is_under_way_or_known_already_is_no_mistake(values: dict[str, object]) -> None:
    assert misplaced(role(**values), False) == ""  # type: ignore[arg-type]


def test_it_counts_when_it_was_seen_twice_in_one_term_and_then_anew() -> None:
    watch = AddressWatch()
    assert [watch.look(role(), False) for _ in range(4)] == ["", "missing", "", "missing"]
    assert [watch.look(role(), here) for here in (False, True, False)] == ["", "", ""]
    assert watch.look(role(term=2), False) == "", "another term's"
    assert watch.look(role(term=2), False) == "missing"


def test_what_cannot_be_told_is_no_mistake() -> None:
    assert misplaced(role(), None) == ""
    assert misplaced(role("following"), None) == ""


def test_the_address_is_the_one_without_its_length() -> None:
    assert address_of(role()) == "10.0.0.9"
    assert address_of(role(spec=replace(SPEC, vip=None))) == ""


def test_what_this_host_has_is_told_by_the_kernel() -> None:
    assert is_local("127.0.0.1")
    assert is_local("::1")
    assert not is_local("192.0.2.1")
    assert not is_local("2001:db8::1")
