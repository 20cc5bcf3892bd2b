"""What a torture trial draws, and the options of the command."""

from __future__ import annotations

import pytest

from trivmm.cli.parser import UsageError
from trivmm.deadlines import TABLE
from trivmm.errors import ConfigError
from trivmm.migration.wire.frame import MessageType
from trivmm.testing.torture.__main__ import main, parse
from trivmm.testing.torture.plan import KINDS, QUICK, Act, Plan, draw, parse_kinds, parse_points

ALL = parse_kinds(None)


def plans(count: int = 2000, seed: int = 1) -> list[Plan]:
    return [draw(seed, number, ALL, QUICK) for number in range(count)]


def test_seed_and_number_are_all_there_is() -> None:
    assert plans(50) == plans(50)
    assert draw(1, 40, ALL, QUICK) == plans(50)[40]
    assert plans(50) != plans(50, seed=2)


def test_the_kinds_take_turns() -> None:
    turn = len(ALL)
    for start in range(0, 5 * turn, turn):
        assert {plan.kind for plan in plans(5 * turn)[start : start + turn]} == set(ALL)


def test_everything_that_there_is_comes() -> None:
    drawn = plans()
    for kind in ALL:
        of_kind = [plan for plan in drawn if plan.kind is kind]
        assert {plan.transport for plan in of_kind} == {"unix", "tcp"}
        assert {plan.point.message for plan in of_kind if plan.point.message} == set(kind.points)
        assert any(plan.point.message is None for plan in of_kind) is (kind.instants or not kind.points)
    rounds = {plan.point.nth for plan in drawn if plan.point.message is MessageType.ROUND_END}
    assert rounds == {1, 2, 3}


def test_what_lasts_is_well_shorter_or_longer_than_commit() -> None:
    lasting = [plan for plan in plans() if plan.kind.act in (Act.STOP, Act.CUT, Act.DELAY)]
    short = [plan for plan in lasting if plan.seconds <= 0.5 * QUICK.commit]
    assert short
    assert all(plan.seconds >= 1.25 * QUICK.commit for plan in lasting if plan not in short)
    assert not any(plan.kind.resume for plan in short)
    assert all(plan.seconds == 0 for plan in plans() if plan not in lasting)


def test_an_operator_s_resume_is_tried_where_no_lock_helps() -> None:
    for plan in plans():
        if plan.kind.resume:
            assert not plan.disk
            assert (plan.point.message, plan.point.before) in ((MessageType.COMMIT, False), (MessageType.RUNNING, True))


def test_the_quick_deadlines_are_in_the_order_of_the_defaults() -> None:
    assert QUICK.commit <= QUICK.handshake <= QUICK.stall
    assert TABLE["commit"].default_s <= TABLE["handshake"].default_s <= TABLE["stall"].default_s


def test_kinds_and_points() -> None:
    assert [kind.name for kind in parse_kinds("cut,move,cut")] == ["cut", "move"]
    limited = parse_points("COMMIT", parse_kinds("move,cut,drop"))
    assert [kind.name for kind in limited] == ["move", "cut", "drop"]
    drawn = [draw(1, number, limited, QUICK) for number in range(60)]
    assert {plan.point.message for plan in drawn if plan.kind.name != "move"} == {MessageType.COMMIT}
    assert parse_points("SETUP", parse_kinds("cut,drop"))[0].name == "cut"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kinds", "cut,nope"], '--kinds = "nope": no such kind'),
        (["--kinds", ","], "no kind"),
        (["--points", "COMIT"], '--points = "COMIT": no such message'),
        (["--points", "SETUP", "--kinds", "drop"], "none of the kinds happens there"),
        (["--trials", "0"], "--trials = 0: out of range"),
        (["--trials", "many"], '--trials = "many": not a number'),
        (["--time", "0"], "not a time"),
        (["--hypervisor", "xen"], '--hypervisor = "xen": unknown'),
        (["--deadlines", "comit=1"], "comit"),
        (["--trails", "1"], "did you mean --trials"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ConfigError, UsageError)) as caught:
        parse(arguments)
    assert said in str(caught.value)
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {caught.value}\n"


def test_options() -> None:
    options = parse(
        ["--seed", "7", "--first", "3", "--trials", "2", "--deadlines", "commit=1", "--kinds", "cut", "--json"]
    )
    assert (options.seed, options.first, options.trials, options.as_json) == (7, 3, 2, True)
    assert (options.deadlines.commit, options.deadlines.stall) == (1, QUICK.stall)
    assert options.kinds == (KINDS["cut"],)
    assert parse([]).seed != parse([]).seed
