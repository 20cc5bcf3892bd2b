"""A migration's progress as JSON: the field names that Cloud Hypervisor's users poll, and more of ours beside them.

The names (``timestamp_begin_ms`` … ``memory_transmission_info``) and the spelling of ``state`` as a tagged object are
those of the fork whose libvirt polls this route; what they mean here stands at :func:`progress_body`.
"""

from __future__ import annotations

from typing import Any, Final

from trivmm.memory.guest import PAGE_SIZE
from trivmm.migration.progress import Downtime, MigrationProgress, Phase, Round

__all__ = ["progress_body"]

PHASES: Final = {
    Phase.SETUP: "Starting",
    Phase.PRECOPY: "MemoryPrecopy",
    Phase.SWITCHOVER: "Completing",
    Phase.COMMIT: "Completing",
}


def progress_body(progress: MigrationProgress) -> dict[str, Any]:
    """The body of ``vm.migration-progress``.

    Theirs: times in milliseconds, of the Unix clock or since the beginning; ``downtime_estimated_ms`` is what is
    expected, then what it was; ``state`` is ``{"Ongoing": {phase, vcpu_throttle_percent}}``, ``{"Finished": {}}``,
    ``{"Cancelled": {…}}`` or ``{"Failed": {…}}``, both with the reason in ``error_msg``; bytes and 4 KiB pages
    transmitted so far and remaining in this round; pages without content count as constant.
    Ours: ``phase`` (``PRECOPY``, …, ``IN_DOUBT``), ``session`` (hex), ``transport``, ``round``, ``rounds``, ``rate``
    (bytes a second), ``attempts`` of a switchover, ``activations`` of devices meanwhile, the parts of the ``downtime``
    and their sum until COMMIT, up to where the limit is kept, ``reason``.
    """
    elapsed_ms = int(progress.elapsed_s * 1000)
    begin_ms = int(progress.began_s * 1000)
    known = progress.actual_downtime if progress.ended else progress.estimated_downtime
    return {
        "timestamp_begin_ms": begin_ms,
        "timestamp_snapshot_ms": begin_ms + elapsed_ms,
        "timestamp_snapshot_relative_ms": elapsed_ms,
        "downtime_configured_ms": int(progress.downtime_limit_ms or 0),
        "downtime_estimated_ms": 0 if known is None else round(known.total_ms),
        "transportation_mode": {"Tcp": {"connections": 1, "tls": False}},
        "state": _state(progress),
        "memory_transmission_info": {
            "memory_iteration": progress.round,
            "memory_transmission_bps": int(progress.rate),
            "memory_bytes_total": progress.memory_bytes,
            "memory_bytes_transmitted": progress.bytes_sent,
            "memory_bytes_remaining_iteration": progress.remaining_pages * PAGE_SIZE,
            "memory_pages_4k_transmitted": progress.pages + progress.zero_pages,
            "memory_pages_4k_remaining_iteration": progress.remaining_pages,
            "memory_pages_constant_count": progress.zero_pages,
            "memory_dirty_rate_pps": int(progress.dirty_rate),
        },
        "phase": progress.phase.name,
        "session": progress.session,
        "transport": progress.transport,
        "elapsed_s": round(progress.elapsed_s, 3),
        "round": progress.round,
        "rounds": [_round(each) for each in progress.rounds],
        "rate": int(progress.rate),
        "attempts": progress.attempts,
        "activations": progress.activations,
        "downtime_ms": None if progress.actual_downtime is None else round(progress.actual_downtime.total_ms, 1),
        "downtime_until_commit_ms": (
            None if progress.actual_downtime is None else round(progress.actual_downtime.until_commit_ms, 1)
        ),
        "downtime": _parts(progress.actual_downtime),
        "downtime_expected": _parts(progress.estimated_downtime),
        "reason": progress.reason,
    }


def _state(progress: MigrationProgress) -> dict[str, Any]:
    reason = progress.reason or ""
    match progress.phase:
        case Phase.DONE:
            return {"Finished": {}}
        case Phase.CANCELLED:
            return {"Cancelled": {"error_msg": reason}}
        case Phase.FAILED | Phase.IN_DOUBT:
            return {"Failed": {"error_msg": reason, "error_msg_debug": f"{progress.phase.value}: {reason}"}}
    return {"Ongoing": {"phase": PHASES[progress.phase], "vcpu_throttle_percent": progress.throttle_percent}}


def _parts(downtime: Downtime | None) -> dict[str, float] | None:
    if downtime is None:
        return None
    return {name: round(getattr(downtime, name), 1) for name in ("stop_ms", "pages_ms", "state_ms", "resume_ms")}


def _round(each: Round) -> dict[str, Any]:
    return {
        "number": each.number,
        "start_s": round(each.start_s, 3),
        "seconds": round(each.seconds, 4),
        "bytes": each.bytes,
        "pages": each.pages,
        "zero_pages": each.zero_pages,
        "last": each.last,
    }
