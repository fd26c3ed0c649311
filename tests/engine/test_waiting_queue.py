"""The queue against the slow and obvious way: sort everything, whenever somebody asks."""

from hypothesis import given, settings
from hypothesis import strategies as st

from miniinfer_jax.engine.policies import Fair, MultiQueue, Policy
from miniinfer_jax.engine.waiting_queue import WaitingQueue
from miniinfer_jax.sampling_params import SamplingParams
from miniinfer_jax.sequence import Sequence, SequenceStatus

PARAMS = SamplingParams()


def make_sequence(sequence_id: int, tenant: str = "") -> Sequence:
    return Sequence(sequence_id, [1] * 4, PARAMS, seed=0, max_len=1000, tenant=tenant)


def charge(policy: Policy, sequence: Sequence, num_tokens: int) -> None:
    sequence.num_computed = sequence.num_charged + num_tokens
    policy.on_prompt(sequence)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["push", "pop", "end", "serve"]), st.sampled_from("abcd"), st.integers(1, 30)),
    max_size=80,
)


@settings(deadline=None)
@given(ACTIONS, st.booleans())
def test_the_first_is_the_smallest_of_all(actions, by_level):
    policy = MultiQueue(quantum=8, num_levels=4, boost_interval=200) if by_level else Fair({"d": 3})
    queue, waiting, started = WaitingQueue(policy), [], []
    for count, (action, tenant, number) in enumerate(actions):
        if action == "push":
            # Newcomers, and those that ran for a while and are back.
            sequence = started.pop() if started and number % 2 else make_sequence(count, tenant)
            queue.push(sequence)
            waiting.append(sequence)
        elif action == "pop" and waiting:
            started.append(queue.pop())
            waiting.remove(started[-1])
        elif action == "end" and waiting:
            waiting.pop(number % len(waiting)).status = SequenceStatus.FINISHED
        elif action == "serve" and started:
            charge(policy, started[number % len(started)], number)
        assert sorted(s.sequence_id for s in queue) == sorted(s.sequence_id for s in waiting)
        first = queue.first()
        assert (first is None) == (not waiting)
        if first is not None:
            group = [s for s in waiting if policy.group(s) == policy.group(first)]
            assert policy.group_key(policy.group(first)) == min(policy.group_key(policy.group(s)) for s in waiting)
            assert first is min(group, key=policy.key)


def test_of_groups_alike_the_one_that_waits_longer_is_first():
    queue = WaitingQueue(Fair())
    for sequence_id, tenant in enumerate("zay"):
        queue.push(make_sequence(sequence_id, tenant))
    assert [queue.pop().tenant for _ in range(3)] == ["z", "a", "y"]


def test_what_has_ended_leaves_no_trace():
    queue = WaitingQueue(Fair())
    for sequence_id in range(100):
        sequence = make_sequence(sequence_id, str(sequence_id))
        queue.push(sequence)
        sequence.status = SequenceStatus.FINISHED
    assert queue.first() is None
    assert (queue._order, queue._groups) == ([], {})


def test_a_step_over_many_tenants_looks_at_few_of_them(monkeypatch):
    """While one of 5,000 tenants is served, the queue is asked for its first: the work is that of a heap."""
    policy = Fair()
    queue = WaitingQueue(policy)
    for sequence_id in range(5000):
        queue.push(make_sequence(sequence_id, str(sequence_id)))
    num_looks = 0
    original = policy.group_key

    def counted(group: str) -> float:
        nonlocal num_looks
        num_looks += 1
        return original(group)

    monkeypatch.setattr(policy, "group_key", counted)
    for _ in range(1000):
        sequence = queue.pop()
        charge(policy, sequence, 1)
        queue.push(sequence)
    assert num_looks < 10 * 1000
