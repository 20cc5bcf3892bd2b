"""Who is given up, and who never is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trivmm.control.connections import Doing, Table


def quiet(_: str) -> bool:
    return False


def table(names: str, limit: int = 9) -> Table[str]:
    made: Table[str] = Table(limit, 100)
    for name in names:
        made.add(name)
    return made


def test_the_oldest_goes_first() -> None:
    made = table("abc")
    assert made.oldest(quiet) == "a"
    made.put("a", Doing.READING)  # its first byte: from here on it is the youngest
    assert made.oldest(quiet) == "b"
    made.remove("b")
    assert made.oldest(quiet) == "c"
    made.put("a", Doing.READING)  # more bytes don't make it younger
    made.add("d")
    made.remove("c")
    assert made.oldest(quiet) == "a"


def test_a_busy_one_never_goes() -> None:
    made = table("abc")
    for name in "abc":
        made.put(name, Doing.BUSY)
    assert made.oldest(quiet) is None
    made.put("b", Doing.IDLE)
    assert made.oldest(quiet) == "b"


def test_what_stirs_is_spared() -> None:
    made = table("abc")
    assert made.oldest("a".__eq__) == "b"
    assert made.oldest(lambda _: True) is None  # idle, all of them: each may be a request by now
    made.put("c", Doing.READING)
    made.put("a", Doing.READING)
    assert made.oldest("ab".__contains__) == "c"
    assert made.oldest(lambda _: True) == "c"  # nobody keeps others out by trickling


def test_full() -> None:
    made = table("ab", limit=3)
    assert not made.full
    made.add("c")
    made.put("a", Doing.BUSY)
    assert made.full
    assert len(made) == 3


def test_one_that_was_given_up_stays_so() -> None:
    made = table("ab")
    assert made.remove("a") is Doing.IDLE
    made.put("a", Doing.BUSY)
    assert "a" not in made
    assert made.remove("a") is None
    assert len(made) == 1


def test_what_is_held_counts_from_the_first_read() -> None:
    made = table("ab")
    assert made.hold("a", 60) == []  # it came with the first byte, before anybody said that it is half-sent
    made.put("a", Doing.READING)
    assert made.hold("b", 60) == ["a"]


def test_bodies_hold_a_bounded_number_of_bytes() -> None:
    made = table("abcd")
    for name in "abcd":
        made.put(name, Doing.READING)
    assert made.hold("a", 40) == []
    assert made.hold("b", 40) == []
    assert made.hold("c", 20) == []
    assert made.hold("c", 21) == ["a"]
    assert made.hold("c", 70) == ["a", "b"]
    made.remove("a")
    assert made.hold("b", 0) == []
    assert made.hold("c", 100) == []
    assert made.hold("c", 101) == []  # never itself: its own limit is the protocol's
    made.put("c", Doing.BUSY)  # whole: what its handler does with it is the handler's
    assert made.hold("b", 100) == []


STEPS = st.lists(st.tuples(st.sampled_from(["add", "remove", *Doing]), st.sampled_from("abcde")), max_size=40)


@given(STEPS, st.sets(st.sampled_from("abcde")))
def test_any_steps_keep_the_order(steps: list[tuple[str | Doing, str]], stirring: set[str]) -> None:
    made = table("")
    model: list[tuple[str, Doing]] = []
    for step, name in steps:
        now = dict(model)
        if step == "add":
            if name not in now:
                made.add(name)
                model.append((name, Doing.IDLE))
        elif step == "remove":
            assert made.remove(name) is now.get(name)
            model = [pair for pair in model if pair[0] != name]
        elif isinstance(step, Doing):
            made.put(name, step)
            if name in now and now[name] is not step:
                model = [*[pair for pair in model if pair[0] != name], (name, step)]
    waiting = [(name, doing) for name, doing in model if doing is not Doing.BUSY]
    still = [name for name, _ in waiting if name not in stirring]
    half = [name for name, doing in waiting if doing is Doing.READING]
    assert made.oldest(stirring.__contains__) == next(iter([*still, *half]), None)
    assert len(made) == len(model)
