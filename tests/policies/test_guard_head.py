"""A head that does not earn what reading prompts takes it is left out of calls, and tried again."""

import pytest

from tests.policies.machine import SLOPING, Machine
from tests.policies.rows import observation
from transformers_resps.policies.auto import default_policy
from transformers_resps.policies.fixed import FixedPolicy
from transformers_resps.policies.guard import BaselineGuard, HeadAccount
from transformers_resps.tree import TreeShape


def read_of(account: HeadAccount, calls: int, earned: float, rows: int = 1, seconds: float = 0.1) -> list[bool]:
    """Whether the head reads the prompts of 100 tokens of so many calls, with a hundred tokens each."""
    found = []
    for _ in range(calls):
        reads = account.pays(rows, 100, 100)
        found.append(reads)
        account.begin_call(seconds if reads else None)
        account.tokens, account.earned = 100.0, earned * reads
    return found


def test_a_head_that_earns_too_little_is_left_out_of_twice_as_many_calls_each_time() -> None:
    trials = [number for number, reads in enumerate(read_of(HeadAccount(), 90, earned=0.05)) if reads]
    assert trials == [0, 1, 3, 7, 15, 31, 63]


def test_a_head_that_earns_its_prompts_reads_all_and_one_that_begins_to_is_believed() -> None:
    account = HeadAccount()
    assert all(read_of(account, 20, earned=0.2))
    assert not all(read_of(account, 8, earned=-0.5))
    assert read_of(account, 30, earned=2.0)[-20:] == [True] * 20


def test_what_a_head_earns_is_known_for_each_number_of_rows() -> None:
    account = HeadAccount()
    assert not all(read_of(account, 4, earned=0.0, rows=8))
    assert all(read_of(account, 4, earned=0.2, rows=1))
    assert not all(read_of(account, 4, earned=0.0, rows=8))


def test_room_and_prompt_of_a_call_decide() -> None:
    account = HeadAccount()
    read_of(account, 4, earned=0.2)  # 0.002 seconds a token, and 0.001 to read one
    assert not account.pays(1, 1000, 100)
    assert account.pays(1, 1000, 1000)
    assert not account.pays(1, 100, 10)
    assert account.pays(1, 10, 10)


def test_an_interruption_while_a_prompt_is_read_counts_little() -> None:
    account = HeadAccount()
    read_of(account, 4, earned=0.2)
    read_of(account, 1, earned=0.2, seconds=10.0)
    assert all(read_of(account, 4, earned=0.2))


def test_calls_without_a_head_say_nothing_about_it() -> None:
    account = HeadAccount()
    read_of(account, 4, earned=0.2)
    for _ in range(20):
        account.begin_call(None)
        account.tokens = 100.0
    assert account.pays(1, 100, 100)


@pytest.mark.parametrize("hit", [0.01, 0.7])
def test_prompts_cost_a_useless_head_little_and_a_good_one_reads_them_all(hit: float) -> None:
    machine = Machine(SLOPING, 0.003, hit=hit, claimed=0.5, prompt_seconds=0.1)
    policy = default_policy()
    speeds = [machine.write(policy, 64) for _ in range(40)]
    if hit > 0.5:
        assert all(machine.read) and min(speeds[2:]) > 1.3
    else:
        assert sum(speeds[4:]) / 36 > 0.98 and machine.read[-30:].count(True) <= 3


def test_a_policy_that_needs_a_head_always_has_one_and_a_fixed_one_that_does_not_never() -> None:
    machine = Machine(SLOPING, 0.003, hit=0.01, prompt_seconds=0.1)
    guard = BaselineGuard(FixedPolicy(TreeShape(4, 3, 1)))
    for _ in range(8):
        machine.write(guard, 64)
    assert all(machine.read)
    assert not FixedPolicy(TreeShape(1, 0, 1, lookup=4)).wants_head(1, 100, 64)


def test_a_head_that_is_left_out_is_told() -> None:
    machine, policy = Machine(SLOPING, 0.003, hit=0.01, claimed=0.5, prompt_seconds=0.1), default_policy()
    while not machine.read or machine.read[-1]:
        machine.write(policy, 64)
    assert "gained too little by the head" in str(policy.explain(machine.records[-64:]))
    policy.observe(machine.records[-1])
    policy.choose(observation(1, 0))
    assert "by the head" not in str(policy.explain(machine.records[-64:])), "another call, which has no head"
