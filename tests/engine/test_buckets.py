"""Every plan that the scheduler may make fits a bucket, and no smaller one."""

from hypothesis import given
from hypothesis import strategies as st

from miniinfer_jax.config import EngineConfig
from miniinfer_jax.engine.buckets import choose_buckets

CONFIGS = st.builds(
    EngineConfig,
    max_num_seqs=st.integers(1, 300),
    max_num_batched_tokens=st.integers(1, 9000),
    page_size=st.sampled_from([1, 16, 64]),
    deterministic=st.booleans(),
)


@given(CONFIGS, st.booleans(), st.booleans(), st.data())
def test_the_smallest_bucket_that_holds_a_plan(config, with_plain, is_plain, data):
    buckets = choose_buckets(config, with_plain=with_plain)
    num_tokens = data.draw(
        st.integers(
            1, min(64, config.max_num_batched_tokens) if config.deterministic else config.max_num_batched_tokens
        )
    )
    num_rows = data.draw(st.integers(1, min(num_tokens, config.max_num_seqs)))
    chosen = buckets.for_chunks(num_tokens, num_rows, is_plain)
    assert chosen.num_tokens >= num_tokens and chosen.num_rows >= num_rows
    assert chosen.num_new_pages >= num_rows + num_tokens // config.page_size
    assert is_plain or not chosen.is_plain
    for other in buckets.ragged:
        fits = other.num_tokens >= num_tokens and other.num_rows >= num_rows and (is_plain or not other.is_plain)
        assert not fits or (other.num_tokens, other.num_rows) >= (chosen.num_tokens, chosen.num_rows)
    if not config.deterministic:
        rows = buckets.for_rows(num_rows, is_plain)
        assert rows.num_rows >= num_rows and (is_plain or not rows.is_plain)


def test_long_chunks_of_few_sequences_have_shapes_of_their_own():
    buckets = choose_buckets(EngineConfig(max_num_seqs=256, max_num_batched_tokens=8192, page_size=64))
    for num_tokens, num_rows, expected in ((128, 1, 16), (5000, 16, 16), (300, 200, 256)):
        assert buckets.for_chunks(num_tokens, num_rows, is_plain=False).num_rows == expected


def test_plain_steps_have_shapes_of_their_own_where_asked_for():
    config = EngineConfig(max_num_seqs=4)
    both, one = choose_buckets(config, with_plain=True), choose_buckets(config)
    assert both.for_rows(3, is_plain=True).is_plain and both.for_chunks(30, 3, is_plain=True).is_plain
    assert both.for_rows(2, is_plain=True).num_rows == both.for_rows(2, is_plain=False).num_rows == 4
    assert not any(bucket.is_plain for bucket in (*one.ragged, *one.decode))
