import pytest

from miniinfer_jax import LLM
from tests.engine.cases import GREEDY, SMALL, make_prompts
from tests.tiny import continue_greedily, make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, **SMALL)


@pytest.fixture
def pages_come_back(llm):
    yield
    assert not llm.engine.has_unfinished_requests()
    llm.engine.check()
    stats = llm.engine.stats()
    assert stats.num_free_pages + stats.num_cached_pages == stats.num_pages


@pytest.fixture(scope="module")
def expected(llm):
    """Tokens of each prompt of make_prompts(10), by the slow and obvious way."""
    return [continue_greedily(llm, prompt, GREEDY.max_tokens) for prompt in make_prompts(10)]
