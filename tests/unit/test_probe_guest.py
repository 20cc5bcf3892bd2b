"""The probe guest's ELF, its command line and the reading of what it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given
from hypothesis import strategies as st

import trivmm.guest
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path

MIB = 1 << 20
GENERATIONS = 8 * MIB  # the table of truth starts here: image and bss must end below
XEN_ELFNOTE_PHYS32_ENTRY = 18

READY = "PROBE ready cpus=2 pages=4096\n"
LINE = (
    "PROBE t=4010 beats=38 gap_ms=142 pages=4096 dirtied=1934 checked=440846 errors=0 rng_act=224 blk_act=186 "
    "rng_ios=447 blk_ios=370 stuck=0 needs_reset=0 raced=3\n"
)


def test_elf_has_its_pvh_note_and_fits_below_the_truth() -> None:
    with open(probe_path(), "rb") as file:
        elf = ELFFile(file)
        assert (elf["e_machine"], elf["e_type"]) == ("EM_X86_64", "ET_EXEC")
        segments = list(elf.iter_segments())
        assert {segment["p_type"] for segment in segments} == {"PT_LOAD", "PT_NOTE"}  # static: nothing to resolve
        (note,) = [note for segment in segments if segment["p_type"] == "PT_NOTE" for note in segment.iter_notes()]
        assert (note["n_name"], note["n_type"]) == ("Xen", XEN_ELFNOTE_PHYS32_ENTRY)
        assert int.from_bytes(note["n_descdata"], "little") == elf["e_entry"]
        loads = [segment for segment in segments if segment["p_type"] == "PT_LOAD"]
        assert min(segment["p_paddr"] for segment in loads) == MIB
        assert max(segment["p_paddr"] + segment["p_memsz"] for segment in loads) <= GENERATIONS


def test_missing_elf_says_how_to_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trivmm.guest, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"probe\.elf: not built; install the package"):
        probe_path()


def test_cmdline_keeps_order_and_leaves_none_out() -> None:
    assert probe_cmdline(cpus=2, cycle="rng,blk", mem=None, tsc_khz=5) == "cpus=2 cycle=rng,blk tsc_khz=5"
    assert re.fullmatch(r"rate=7 tsc_khz=\d+", probe_cmdline(rate=7))
    assert probe_cmdline(tsc_khz=None) == ""


def test_every_option_documented_is_one_the_guest_knows() -> None:
    sources = (Path(__file__).parents[2] / "trivmm" / "guest").glob("*.c")
    source = "".join(each.read_text() for each in sources)
    known = set(re.findall(r'"([a-z][a-z_]*)="', source))
    documented = set(re.findall(r"``([a-z_]+)=", trivmm.guest.__doc__ or ""))
    assert documented == known


def test_good_report() -> None:
    report = parse_report(READY + LINE.replace("t=4010", "t=3000") + LINE)
    assert report == ProbeReport(
        ready=True, cpus=2, t=4010, beats=38, gap_ms=142, pages=4096, dirtied=1934, checked=440846, rng_act=224,
        blk_act=186, rng_ios=447, blk_ios=370, raced=3, reports=2,
    )  # fmt: skip


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_unfinished_line_waits(newline: str) -> None:
    text = (READY + LINE).replace("\n", newline)
    for cut in range(len(text)):
        report = parse_report(text[:cut])
        assert report.reports == 0
        assert report.ready == (newline in text[:cut])
        assert report.problems == ()
    assert parse_report(text).reports == 1


def test_problems_in_order() -> None:
    told = ["LOST page which=0 want=0x1 got=0x1", "STALE page which=1 want=0x9 got=0x7", "fail: vector=14 rip=0x1"]
    quiet = ["off", "reboot", "absent dev=rng"]
    text = READY + "".join(f"PROBE {line}\n" for line in [*told, *quiet]) + LINE
    assert parse_report(text).problems == tuple(told)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "SeaBIOS (version 1.16.2)",
        "PROBE",
        "PROBE t=",
        "PROBE t=1",
        "PROBE t=1 beats=",
        "PROBE t=1 beats=x",
        "PROBE t=-1 beats=1",
        "PROBE t=1 beats=0x1",
        "PROBE t=1  beats=1",
        "PROBE t=\u0661 beats=\u0662",
        "PROBE t=" + "9" * 5000 + " beats=1",
        "PROBE t=1 beats=" + "9" * 5000,
        "PROBE ready cpus=1",
        "PROBE ready cpus=" + "1" * 5000 + " pages=1",
        "xPROBE t=1 beats=1",
    ],
)
def test_garbage_counts_for_nothing(line: str) -> None:
    assert parse_report(READY + LINE + line + "\n") == parse_report(READY + LINE)


def test_names_that_are_not_the_guests_to_set() -> None:
    report = parse_report("PROBE t=1 ready=1 cpus=3 reports=9 problems=2 counts=6 other=4 beats=5\n")
    strange = {"ready": 1, "cpus": 3, "reports": 9, "problems": 2, "counts": 6, "other": 4}
    assert report == ProbeReport(t=1, beats=5, reports=1, counts=strange)


WORDS = st.sampled_from(
    ["PROBE ", "t=", "1", "9" * 30, " beats=", " cpus=", "ready ", "\n", "\r", "pages=", "\x00", "\xb2"]
)


@given(st.lists(st.one_of(WORDS, st.text(max_size=4))).map("".join))
def test_no_text_makes_it_raise(text: str) -> None:
    parse_report(text)
    assert parse_report(text + "\n" + READY + LINE).t == 4010
