"""Where an epoch was captured, as far as it matters to where it can be restored.

The primary writes it as `origin.json` beside CRIU's images; a replica compares it with itself. In: /proc.
Out: an `Origin`, its JSON, and the sentences that say why a machine cannot take what another captured.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from common.errors import StoreError

ORIGIN_FILE = "origin.json"
"""Its name among an epoch's metadata files."""

_KERNEL_ONLY = (
    "vme de pse msr mce apic mtrr pge mca pat pse36 pn acpi tm pbe nx pdpe1gb "
    "smep smap umip pcid invpcid invpcid_single x2apic tsc_deadline_timer tsc_adjust hypervisor cpuid "
    "constant_tsc nonstop_tsc nonstop_tsc_s3 tsc_reliable tsc_known_freq rep_good art arat nopl xtopology "
    "ht up dca pdcm xtpr est tm2 ds_cpl dtes64 monitor smx vmx svm "
    "extd_apicid amd_dcm aperfmperf cr8_legacy cmp_legacy extapic osvw ibs skinit wdt topoext nodeid_msr "
    "perfctr_core perfctr_nb perfctr_llc perfctr_l2 bpext ptsc arch_perfmon pebs bts ds dts intel_pt "
    "perfmon_v2 amd_lbr_v2 amd_lbr_pmc_freeze arch_lbr tsc_scale vmmcall epb hwp hwp_notify hwp_act_window "
    "hwp_epp hwp_pkg_req hfi dtherm ida pln pts cpb hw_pstate proc_feedback cppc rapl cat_l2 cat_l3 cdp_l2 "
    "cdp_l3 cqm cqm_llc cqm_occup_llc cqm_mbm_total cqm_mbm_local mba rdt_a smba bmec "
    "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists pausefilter pfthreshold "
    "avic v_vmsave_vmload vgif x2avic v_spec_ctrl vnmi sev sev_es sev_snp sme tpr_shadow vnmi "
    "flexpriority ept ept_ad vpid tdx_guest debug_swap idle_hlt "
    "pti kaiser retpoline retpoline_amd rsb_ctxsw ibrs ibrs_enhanced ibpb ibpb_exit_to_user stibp ssbd "
    "virt_ssbd amd_ssbd amd_stibp amd_ibpb arch_capabilities spec_ctrl intel_stibp flush_l1d l1d_flush "
    "md_clear btc_no sbpb srso_no overflow_recov succor smca split_lock_detect bus_lock_detect mds_no "
    "null_seg_clr_base verw_clear ibpb_brtype tsa_sq_no tsa_l1_no bhi_ctrl clear_bhb_loop"
)
_IRRELEVANT_FLAGS = frozenset(_KERNEL_ONLY.split())
"""Flags of /proc/cpuinfo that no program can come to depend on: only the kernel or a hypervisor can use them,
or they describe clocks, power, errors and mitigations. All others count, unknown ones too."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """One machine; `kernel` and `criu` as they print themselves, `cpu_flags` as /proc/cpuinfo, sorted."""

    arch: str
    kernel: str
    criu: str
    cpu_flags: tuple[str, ...]
    page_bytes: int


def read_origin(criu_version: str) -> Origin:
    """Describe the machine that this runs on. Reads /proc/cpuinfo, a few hundred microseconds."""
    system = os.uname()
    return Origin(
        arch=system.machine,
        kernel=system.release,
        criu=criu_version,
        cpu_flags=_cpu_flags(Path("/proc/cpuinfo").read_text()),
        page_bytes=os.sysconf("SC_PAGE_SIZE"),
    )


def encode_origin(origin: Origin) -> bytes:
    """Write it as JSON."""
    return msgspec.json.encode(origin)


def decode_origin(data: bytes) -> Origin:
    """Read what `encode_origin` wrote; raises `StoreError` for anything else."""
    try:
        return msgspec.json.decode(data, type=Origin)
    except msgspec.DecodeError as error:
        raise StoreError(f"{ORIGIN_FILE} is damaged: {error}", hint="take a new checkpoint") from error


def obstacles(origin: Origin, here: Origin) -> list[str]:
    """Say why `here` cannot continue what `origin` captured, one sentence each; empty if it can.

    Newer kernels and CRIUs are taken, older ones are not: they may lack what the images use.
    """
    if origin.arch != here.arch or origin.page_bytes != here.page_bytes:
        return [
            f"the epoch comes from {origin.arch} with pages of {origin.page_bytes} bytes and this node is "
            f"{here.arch} with {here.page_bytes}: use nodes of one architecture"
        ]
    found = []
    missing = sorted(set(origin.cpu_flags) - set(here.cpu_flags) - _IRRELEVANT_FLAGS)
    if missing:
        shown = " ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        found.append(
            f"this CPU lacks what the primary's has and the workload may use ({shown}): use the same CPU "
            "model on all nodes, or give the virtual machines a common one"
        )
    if _numbers(here.kernel)[:2] < _numbers(origin.kernel)[:2]:
        found.append(
            f"kernel {here.kernel} is older than the primary's {origin.kernel} and may lack what the "
            "workload uses: upgrade this node first"
        )
    if _numbers(here.criu) < _numbers(origin.criu):
        found.append(
            f"CRIU {here.criu} is older than the primary's {origin.criu} and may not read its images: "
            "upgrade this node first"
        )
    return found


def _cpu_flags(cpuinfo: str) -> tuple[str, ...]:
    """Return what every CPU has: a thread may run on any of them."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return tuple(sorted(set.intersection(*(set(line.split()) for line in lines)))) if lines else ()


def _numbers(version: str) -> tuple[int, ...]:
    """`6.18.44-fc` is (6, 18, 44); `4.2` is older than `4.2.1`."""
    return tuple(int(number) for number in re.match(r"[\d.]*", version)[0].strip(".").split(".") if number)  # type: ignore[index]
