"""The synthetic corpus of the demo model: seeded problems, chats and stories, and their held-out split.

Every problem carries a `content` that names what is asked and nothing of how it is phrased ("add 7 12").
`is_held_out(content)` decides by a checksum of it which side it belongs to, so that a sum kept for evaluation
is never trained on in any phrasing, form or order. Stories are split by their own text.

`training_document(rng)` draws one document of the training mixture; `held_out_problems(task, count, seed)` and
`held_out_stories(count, seed)` draw what scripts/eval_demo.py measures on. Standard library only.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import demo_stories

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
HELD_OUT_ONE_IN = 20
# What a token's loss counts: the few tokens of an answer most, a question drawn at random least.
PROMPT_WEIGHT, STORY_WEIGHT, ANSWER_WEIGHT = 0.1, 0.3, 1.0

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = {
    "January": 31,
    "February": 28,
    "March": 31,
    "April": 30,
    "May": 31,
    "June": 30,
    "July": 31,
    "August": 31,
    "September": 30,
    "October": 31,
    "November": 30,
    "December": 31,
}
MONTH_NAMES = tuple(MONTHS)
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a helpful and friendly assistant.",
    "You are MiniInfer, a small demo model.",
    "Answer briefly.",
)


@dataclass(frozen=True)
class Problem:
    """One question and its only right answer; `content` is what the held-out split looks at."""

    prompt: str
    answer: str
    content: str


@dataclass(frozen=True)
class Document:
    """One training text, cut into `(text, loss weight)` segments."""

    segments: tuple[tuple[str, float], ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.segments)


def is_held_out(content: str) -> bool:
    """Whether `content` is kept for evaluation: one in `HELD_OUT_ONE_IN`, the same on every machine."""
    return zlib.crc32(content.encode()) % HELD_OUT_ONE_IN == 0


# ---------------------------------------------------------------- tasks: (rng) -> Problem


def _addition(rng: random.Random, a: int, b: int) -> Problem:
    forms = (f"{a} + {b} =", f"{a} + {b} =", f"What is {a} + {b}?", f"Add {a} and {b}.", f"What is {a} plus {b}?")
    return Problem(rng.choice(forms), str(a + b), f"add {min(a, b)} {max(a, b)}")


def _subtraction(rng: random.Random, a: int, b: int) -> Problem:
    if a < b and rng.random() < 0.7:  # most differences are positive, as most that people ask for are
        a, b = b, a
    forms = (
        f"{a} - {b} =",
        f"{a} - {b} =",
        f"What is {a} - {b}?",
        f"Subtract {b} from {a}.",
        f"What is {a} minus {b}?",
    )
    return Problem(rng.choice(forms), str(a - b), f"subtract {a} {b}")


def addition_two_digits(rng: random.Random) -> Problem:
    """The sum of two numbers of at most two digits."""
    return _addition(rng, rng.randrange(100), rng.randrange(100))


def addition_three_digits(rng: random.Random) -> Problem:
    """The sum of two numbers, at least one of them of three digits."""
    a, b = rng.randrange(100, 1000), rng.randrange(1000)
    return _addition(rng, a, b) if rng.random() < 0.5 else _addition(rng, b, a)


def subtraction_two_digits(rng: random.Random) -> Problem:
    """The difference of two numbers of at most two digits; it may be negative."""
    return _subtraction(rng, rng.randrange(100), rng.randrange(100))


def subtraction_three_digits(rng: random.Random) -> Problem:
    """The difference of two numbers, at least one of them of three digits; it may be negative."""
    a, b = rng.randrange(100, 1000), rng.randrange(1000)
    return _subtraction(rng, a, b) if rng.random() < 0.5 else _subtraction(rng, b, a)


def _random_letters(rng: random.Random, shortest: int, longest: int) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(shortest, longest)))


def reverse(rng: random.Random) -> Problem:
    """Three to eight capital letters, written backwards."""
    word = _random_letters(rng, 3, 8)
    forms = (f"Reverse {word}.", f"Write {word} backwards.", f"What is {word} reversed?", f"Reverse the string {word}.")
    return Problem(rng.choice(forms), word[::-1], f"reverse {word}")


def sort(rng: random.Random) -> Problem:
    """Three to eight capital letters, in alphabetical order."""
    word = _random_letters(rng, 3, 8)
    forms = (
        f"Sort {word}.",
        f"Sort the letters {word}.",
        f"Put the letters {word} in order.",
        f"What is {word} in alphabetical order?",
    )
    return Problem(rng.choice(forms), "".join(sorted(word)), f"sort {word}")


def count_letters(rng: random.Random) -> Problem:
    """How often a letter stands in a string of four to ten capital letters."""
    alphabet = rng.sample(LETTERS, rng.randint(2, 4))
    word, letter = "".join(rng.choices(alphabet, k=rng.randint(4, 10))), alphabet[0]
    forms = (
        f"How many times does {letter} appear in {word}?",
        f"Count the letter {letter} in {word}.",
        f"How many {letter} are in {word}?",
    )
    return Problem(rng.choice(forms), str(word.count(letter)), f"count {letter} {word}")


def count_numbers(rng: random.Random) -> Problem:
    """The numbers from one to another, upwards or downwards, by ones, twos, fives or tens."""
    step = rng.choice((1, 1, 2, 5, 10))
    low = rng.randrange(200)
    numbers = [low + step * index for index in range(rng.randint(3, 8))]
    upwards = rng.random() < 0.6
    if not upwards:
        numbers.reverse()
    first, last = numbers[0], numbers[-1]
    by = "" if step == 1 else f" by {step}"
    forms = (f"Count from {first} to {last}{by}.", f"Count {'up' if upwards else 'down'} from {first} to {last}{by}.")
    return Problem(rng.choice(forms), " ".join(map(str, numbers)), f"steps {first} {last} {step}")


def calendar(rng: random.Random) -> Problem:
    """A weekday, month or date some way before or after another one; years have 365 days."""
    kind = rng.choice(("weekday", "month", "date"))
    sign, word = rng.choice(((1, "after"), (-1, "before")))
    if kind == "date":
        distance = rng.randint(1, 20)
        day_of_year = rng.randrange(365)
        start, answer = _date_name(day_of_year), _date_name((day_of_year + sign * distance) % 365)
        unit, question = "day", "What date is"
    else:
        names = WEEKDAYS if kind == "weekday" else MONTH_NAMES
        distance = rng.randint(1, 60)
        index = rng.randrange(len(names))
        start, answer = names[index], names[(index + sign * distance) % len(names)]
        unit, question = ("day", "What day is") if kind == "weekday" else ("month", "Which month is")
    length = f"{distance} {unit}{'' if distance == 1 else 's'}"
    forms = [f"{question} {length} {word} {start}?", f"{length[0].upper() + length[1:]} {word} {start} is"]
    if sign == 1 and kind == "weekday":
        forms.append(f"Today is {start}. What day is it in {length}?")
    return Problem(rng.choice(forms), answer, f"{kind} {start} {sign * distance}")


def _date_name(day_of_year: int) -> str:
    for month, days in MONTHS.items():
        if day_of_year < days:
            return f"{month} {day_of_year + 1}"
        day_of_year -= days
    raise ValueError("day_of_year must be below 365")


def reading(rng: random.Random) -> Problem:
    """A question whose answer is a word or two of the sentences in front of it."""
    facts, questions = demo_stories.facts(rng)
    question, answer = rng.choice(questions)
    return Problem(f"{facts} {question}", answer, f"reading {facts}")


TASKS: dict[str, Callable[[random.Random], Problem]] = {
    task.__name__: task
    for task in (
        addition_two_digits,
        addition_three_digits,
        subtraction_two_digits,
        subtraction_three_digits,
        reverse,
        sort,
        count_letters,
        count_numbers,
        calendar,
        reading,
    )
}
# How often training draws each task: more for those that need more practice.
TASK_SHARES = {"addition_three_digits": 2.0, "subtraction_three_digits": 3.0, "calendar": 2.0, "sort": 1.5}


def draw_problem(task: str, rng: random.Random, *, held_out: bool) -> Problem:
    """Draws problems of `task` until one lies on the side of the split that was asked for."""
    while True:
        problem = TASKS[task](rng)
        if is_held_out(problem.content) == held_out:
            return problem


def held_out_problems(task: str, count: int, seed: int) -> list[Problem]:
    """`count` different held-out problems of one task; the same for the same seed."""
    rng = random.Random(f"{task} {seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = draw_problem(task, rng, held_out=True)
        found.setdefault(problem.content, problem)
    return list(found.values())


def draw_story(rng: random.Random, *, held_out: bool) -> demo_stories.Story:
    """Draws stories until one lies on the side of the split that was asked for."""
    while True:
        story = demo_stories.story(rng)
        if is_held_out(story.text) == held_out:
            return story


def held_out_stories(count: int, seed: int) -> list[str]:
    """`count` held-out stories; the same for the same seed."""
    rng = random.Random(f"story {seed}")
    return [draw_story(rng, held_out=True).text for _ in range(count)]


# ---------------------------------------------------------------- rendering: plain text and ChatML


def plain_prompt(problem: Problem) -> str:
    """What precedes the answer (and its leading space) in the plain form."""
    if problem.prompt.endswith((".", "?")):
        return f"Q: {problem.prompt}\nA:"
    return problem.prompt  # "12 + 7 =" already asks to be continued


def chat_prompt(user: str, system: str | None = None) -> str:
    """The ChatML of one user turn, up to where the assistant begins to speak."""
    opening = f"{TURN_START}system\n{system}{TURN_END}\n" if system else ""
    return f"{opening}{TURN_START}user\n{user}{TURN_END}\n{TURN_START}assistant\n"


def render_plain(problem: Problem) -> Document:
    return Document(((plain_prompt(problem), PROMPT_WEIGHT), (f" {problem.answer}{END_OF_TEXT}", ANSWER_WEIGHT)))


def render_story(text: str) -> Document:
    return Document(((text + END_OF_TEXT, STORY_WEIGHT),))


def render_chat(turns: list[tuple[str, str, float]], system: str | None = None) -> Document:
    """A conversation of `(user, assistant, loss weight of what the assistant says)` turns."""
    segments: list[tuple[str, float]] = []
    for index, (user, assistant, weight) in enumerate(turns):
        between = "\n" if index else ""
        segments.append((between + chat_prompt(user, None if index else system), PROMPT_WEIGHT))
        segments.append((f"{assistant}{TURN_END}", weight))
    segments.append((f"\n{END_OF_TEXT}", PROMPT_WEIGHT))
    return Document(tuple(segments))


def _chat_turn(rng: random.Random) -> tuple[str, str, float]:
    kind = rng.random()
    if kind < 0.04:
        return *demo_stories.small_talk(rng), STORY_WEIGHT
    if kind < 0.10:
        story = draw_story(rng, held_out=False)
        return rng.choice(story.requests), story.text, STORY_WEIGHT
    problem = draw_problem(_draw_task(rng), rng, held_out=False)
    return problem.prompt, problem.answer, ANSWER_WEIGHT


_TASK_NAMES = list(TASKS)
_TASK_WEIGHTS = [TASK_SHARES.get(name, 1.0) for name in _TASK_NAMES]


def _draw_task(rng: random.Random) -> str:
    return rng.choices(_TASK_NAMES, _TASK_WEIGHTS)[0]


def training_document(rng: random.Random) -> Document:
    """One document of the training mixture: a plain problem, a plain story or a conversation."""
    kind = rng.random()
    if kind < 0.45:
        return render_plain(draw_problem(_draw_task(rng), rng, held_out=False))
    if kind < 0.55:
        return render_story(draw_story(rng, held_out=False).text)
    turns = [_chat_turn(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    return render_chat(turns, rng.choice(SYSTEM_MESSAGES) if rng.random() < 0.3 else None)
