"""Who changes an attribute of others, and what stands there when they are done."""

import threading
from types import SimpleNamespace

from transformers import PreTrainedModel

from transformers_resps.verifying.attention import STOCK, use_gqa_attention
from transformers_resps.verifying.invariant.attention import INVARIANT, use_invariant_attention
from transformers_resps.verifying.lending import Change, Lent


def test_the_newest_value_counts_and_the_last_call_gives_back_what_was_there() -> None:
    lent, owner = Lent(), SimpleNamespace(name="own")
    first, second = (lent.holding(Change(owner, "name", lambda own, more=more: own + more)) for more in (" 1", " 2"))
    first.__enter__()
    second.__enter__()
    assert owner.name == "own 2", "made of its own value, and not of a lent one"
    first.__exit__(None, None, None)
    assert owner.name == "own 2"
    second.__exit__(None, None, None)
    assert owner.name == "own"


def test_the_largest_rank_counts_whoever_came_last() -> None:
    lent, owner = Lent(), SimpleNamespace(name="own")
    high, low = (lent.holding(Change(owner, "name", lambda own, n=n: n, rank=n)) for n in (1, 0))  # type: ignore[misc]
    high.__enter__()
    low.__enter__()
    assert owner.name == 1
    high.__exit__(None, None, None)
    assert owner.name == 0
    low.__exit__(None, None, None)
    assert owner.name == "own"


def test_the_attention_of_the_exact_mode_outranks_that_of_a_call_in_another_thread(
    tiny_target: PreTrainedModel,
) -> None:
    target = tiny_target
    with use_invariant_attention(target), use_gqa_attention(target):
        assert target.config._attn_implementation == INVARIANT
    with use_gqa_attention(target), use_invariant_attention(target):
        assert target.config._attn_implementation == INVARIANT
    assert target.config._attn_implementation == STOCK


def test_what_anyone_else_sets_meanwhile_stays() -> None:
    lent, owner = Lent(), SimpleNamespace(name="own")
    with lent.holding(Change(owner, "name", lambda own: "lent")):
        owner.name = "chosen"
    assert owner.name == "chosen"
    with lent.holding(Change(owner, "name", lambda own: "lent")):
        assert owner.name == "lent"
    assert owner.name == "chosen"


def test_calls_of_many_threads_leave_nothing_behind() -> None:
    lent, owner, done = Lent(), SimpleNamespace(name=0, other="x"), list[bool]()

    def call(number: int) -> None:
        for _ in range(200):
            with lent.holding(Change(owner, "name", lambda own: number), Change(owner, "other", lambda own: own * 2)):
                done.append(owner.name > 0 and owner.other == "xx")

    threads = [threading.Thread(target=call, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (owner.name, owner.other) == (0, "x") and all(done) and len(done) == 800
