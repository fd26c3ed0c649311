"""The demo corpus: the same for the same seed, right answers, a real held-out split, and a lossless tokenizer."""

import random
import re
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import demo_corpus
import demo_stories
import demo_tokenizer
from demo_corpus import MONTH_NAMES, WEEKDAYS, Problem

DRAWS = 1000


def problems(task: str) -> list[Problem]:
    rng = random.Random(1)
    return [demo_corpus.TASKS[task](rng) for _ in range(DRAWS)]


def numbers_of(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def capitals_of(text: str) -> list[str]:
    return re.findall(r"\b[A-Z]{1,}\b", text)


def recomputed_date(start: str, days: int) -> str:
    month, day = start.split()
    moved = date(2001, MONTH_NAMES.index(month) + 1, int(day)) + timedelta(days=days)  # 2001 has 365 days
    return f"{MONTH_NAMES[moved.month - 1]} {moved.day}"


def recomputed(task: str, problem: Problem) -> str:
    """The answer, from the words of the prompt alone."""
    prompt, numbers = problem.prompt, numbers_of(problem.prompt)
    if task.startswith("addition"):
        return str(sum(numbers))
    if task.startswith("subtraction"):
        first, second = reversed(numbers) if prompt.startswith("Subtract") else numbers
        return str(first - second)
    if task == "reverse":
        return "".join(reversed(capitals_of(prompt)[-1]))
    if task == "sort":
        return "".join(sorted(capitals_of(prompt)[-1]))
    if task == "count_letters":
        letter, word = capitals_of(prompt)
        return str(sum(other == letter for other in word))
    if task == "count_numbers":
        first, last, step = numbers if " by " in prompt else (*numbers, 1)
        direction = 1 if last > first else -1
        return " ".join(str(number) for number in range(first, last + direction, direction * step))
    assert task == "calendar"
    distance = numbers[0] if numbers else 0
    distance = -distance if " before " in prompt else distance
    start = re.search(rf"(?:{'|'.join(WEEKDAYS + MONTH_NAMES)})(?: \d+)?", prompt).group()
    if " " in start:
        return recomputed_date(start, distance)
    names = WEEKDAYS if start in WEEKDAYS else MONTH_NAMES
    return names[(names.index(start) + distance) % len(names)]


@pytest.mark.parametrize("task", [task for task in demo_corpus.TASKS if task != "reading"])
def test_answers_are_right(task: str) -> None:
    for problem in problems(task):
        assert problem.answer == recomputed(task, problem), problem


def test_a_reading_answer_stands_in_the_facts() -> None:
    for problem in problems("reading"):
        facts = problem.content.removeprefix("reading ")
        assert problem.prompt.startswith(facts)
        assert problem.answer in facts, problem


@pytest.mark.parametrize("task", demo_corpus.TASKS)
def test_the_same_seed_draws_the_same_problems(task: str) -> None:
    assert problems(task) == problems(task)
    assert demo_corpus.held_out_problems(task, 20, 7) == demo_corpus.held_out_problems(task, 20, 7)
    assert demo_corpus.held_out_problems(task, 20, 7) != demo_corpus.held_out_problems(task, 20, 8)


def test_the_same_seed_draws_the_same_documents() -> None:
    first, second = random.Random(3), random.Random(3)
    for _ in range(200):
        assert demo_corpus.training_document(first) == demo_corpus.training_document(second)


@pytest.mark.parametrize("task", demo_corpus.TASKS)
def test_every_task_holds_out_enough_problems_that_training_never_draws(task: str) -> None:
    held_out = {problem.content for problem in demo_corpus.held_out_problems(task, 200, 0)}
    rng = random.Random(4)
    trained = {demo_corpus.draw_problem(task, rng, held_out=False).content for _ in range(3000)}
    assert len(held_out) == 200
    assert not held_out & trained


def test_a_sum_is_held_out_in_either_order_and_every_phrasing() -> None:
    rng = random.Random(5)
    sides: dict[tuple[int, ...], set[bool]] = {}
    for _ in range(5000):
        problem = demo_corpus.addition_two_digits(rng)
        key = tuple(sorted(numbers_of(problem.prompt)))
        sides.setdefault(key, set()).add(demo_corpus.is_held_out(problem.content))
    assert all(len(side) == 1 for side in sides.values())


def test_training_documents_hold_no_held_out_sum_or_story() -> None:
    rng = random.Random(6)
    for _ in range(3000):
        text = demo_corpus.training_document(rng).text
        for a, b in re.findall(r"\b(\d+) \+ (\d+) =", text):
            low, high = sorted((int(a), int(b)))
            assert not demo_corpus.is_held_out(f"add {low} {high}")
        if text.startswith(("Once", "There")):
            assert not demo_corpus.is_held_out(text.removesuffix(demo_corpus.END_OF_TEXT))


def test_stories_do_not_repeat() -> None:
    rng = random.Random(2)
    assert len({demo_stories.story(rng).text for _ in range(20_000)}) == 20_000


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer.build_tokenizer(seed=0, num_documents=2000)


def test_the_tokenizer_gives_any_text_back(tokenizer) -> None:
    texts = ["", "12 + 7 = 19", " \t\r\n\n  x", "héllo wörld 你好 🎉 e\u0301", "a\x00b\u200d\ufeff", "don't STOP_it"]
    texts += [demo_corpus.training_document(random.Random(seed)).text for seed in range(50)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_and_lone_capitals_are_single_tokens(tokenizer) -> None:
    assert tokenizer.encode("Sort DBCA 407").tokens[-9:] == ["Ġ", "D", "B", "C", "A", "Ġ", "4", "0", "7"]


def test_segments_tokenize_as_the_whole_text_does(tokenizer) -> None:
    rng = random.Random(8)
    for _ in range(300):
        document = demo_corpus.training_document(rng)
        pieces = [token for text, _ in document.segments for token in tokenizer.encode(text).ids]
        assert pieces == tokenizer.encode(document.text).ids


def test_transformers_loads_the_tokenizer_and_its_chat_template(tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    demo_tokenizer.save_tokenizer(tokenizer, tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Hi"}]
    rendered = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == demo_corpus.chat_prompt("Hi", "Answer briefly.")
    assert loaded(rendered).input_ids == tokenizer.encode(rendered).ids
    assert (loaded.eos_token, loaded.pad_token) == (demo_corpus.TURN_END, demo_corpus.END_OF_TEXT)
