"""Measures the demo model and its draft on what training never saw, through `LLM` as a user calls it.

    python scripts/eval_demo.py --model miniinfer_jax/demo --json figures.json

Per task: how many held-out problems are answered exactly, greedily, half of them in the plain form and half in
the chat form. On held-out stories: perplexity. For the draft: how often its likeliest next token is the
model's, given the same text.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import demo_corpus

sys.path.insert(0, str(Path(__file__).parents[1]))

from miniinfer_jax import LLM, SamplingParams
from miniinfer_jax.outputs import PositionLogprobs, RequestOutput

GREEDY = SamplingParams(temperature=0.0, max_tokens=48)
SCORE = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
MAX_NUM_SEQS = 64


def exact_matches(llm: LLM, num_problems: int, seed: int) -> dict[str, dict[str, float]]:
    """Per task the part of held-out problems answered exactly: all of them, in plain form, in chat form."""
    prompts: list[str] = []
    problems = {task: demo_corpus.held_out_problems(task, num_problems, seed) for task in demo_corpus.TASKS}
    for task_problems in problems.values():
        for index, problem in enumerate(task_problems):
            prompts.append(
                demo_corpus.plain_prompt(problem) if index % 2 == 0 else demo_corpus.chat_prompt(problem.prompt)
            )
    outputs = iter(llm.generate(prompts, GREEDY, use_tqdm=False))
    results = {}
    for task, task_problems in problems.items():
        right = [next(outputs).outputs[0].text.strip() == problem.answer for problem in task_problems]
        results[task] = {"exact": mean(right), "plain": mean(right[0::2]), "chat": mean(right[1::2])}
    return results


def mean(values: list[Any]) -> float:
    return sum(values) / len(values)


def held_out_texts(num_problems: int, num_stories: int, seed: int) -> dict[str, list[str]]:
    """Held-out text of both kinds, whole: problems with their answers, in both forms, and stories."""
    texts = []
    for task in demo_corpus.TASKS:
        for index, problem in enumerate(demo_corpus.held_out_problems(task, num_problems, seed)):
            turn = (problem.prompt, problem.answer, demo_corpus.ANSWER_WEIGHT)
            document = demo_corpus.render_chat([turn]) if index % 2 else demo_corpus.render_plain(problem)
            texts.append(document.text)
    stories = [demo_corpus.render_story(text).text for text in demo_corpus.held_out_stories(num_stories, seed)]
    return {"tasks": texts, "stories": stories}


def scored_tokens(outputs: list[RequestOutput]) -> list[tuple[int, PositionLogprobs]]:
    """Every token but the first of each text, and what the model expected in its place."""
    scored = []
    for output in outputs:
        if output.prompt_logprobs is None:
            raise ValueError(f"a text was not scored: {output.error}")
        for token_id, position in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
            if position is not None:
                scored.append((token_id, position))
    return scored


def perplexity(outputs: list[RequestOutput]) -> float:
    """exp of the mean negative log-probability of the texts' tokens."""
    return math.exp(-mean([position[token_id].logprob for token_id, position in scored_tokens(outputs)]))


def likeliest_tokens(outputs: list[RequestOutput]) -> list[int]:
    """The likeliest token at every scored position."""
    return [
        next(token_id for token_id, entry in position.items() if entry.rank == 1)
        for _, position in scored_tokens(outputs)
    ]


def agreement(outputs: list[RequestOutput], draft_outputs: list[RequestOutput]) -> float:
    """How often both models find the same next token the likeliest."""
    pairs = zip(likeliest_tokens(outputs), likeliest_tokens(draft_outputs), strict=True)
    return mean([own == drafted for own, drafted in pairs])


def evaluate(model: Path, draft: Path | None, num_problems: int, num_stories: int, seed: int) -> dict[str, Any]:
    """Every figure of the model, and of the draft where there is one."""
    llm = LLM(model, max_num_seqs=MAX_NUM_SEQS, use_tqdm=False)
    tasks = exact_matches(llm, num_problems, seed)
    texts = held_out_texts(num_problems, num_stories, seed)
    scored = {kind: llm.generate(kind_texts, SCORE, use_tqdm=False) for kind, kind_texts in texts.items()}
    figures: dict[str, Any] = {
        "seed": seed,
        "problems_per_task": num_problems,
        "stories": num_stories,
        "tasks": tasks,
        "exact_over_all_tasks": mean([task["exact"] for task in tasks.values()]),
        "story_perplexity": perplexity(scored["stories"]),
    }
    if draft is not None:
        draft_llm = LLM(draft, max_num_seqs=MAX_NUM_SEQS, use_tqdm=False)
        drafted = {kind: draft_llm.generate(kind_texts, SCORE, use_tqdm=False) for kind, kind_texts in texts.items()}
        figures["draft"] = {
            "story_perplexity": perplexity(drafted["stories"]),
            "agreement_on_tasks": agreement(scored["tasks"], drafted["tasks"]),
            "agreement_on_stories": agreement(scored["stories"], drafted["stories"]),
            "agreement": agreement(
                scored["tasks"] + scored["stories"],
                drafted["tasks"] + drafted["stories"],
            ),
        }
    return figures


def print_figures(figures: dict[str, Any]) -> None:
    print(f"{figures['problems_per_task']} held-out problems a task, seed {figures['seed']}")
    print(f"{'task':28}{'exact':>8}{'plain':>8}{'chat':>8}")
    for task, result in figures["tasks"].items():
        print(f"{task:28}{result['exact']:8.1%}{result['plain']:8.1%}{result['chat']:8.1%}")
    print(f"{'over all tasks':28}{figures['exact_over_all_tasks']:8.1%}")
    print(f"perplexity of {figures['stories']} held-out stories: {figures['story_perplexity']:.3f}")
    if "draft" in figures:
        draft = figures["draft"]
        print(
            f"draft: agrees with the model on {draft['agreement']:.1%} of next tokens "
            f"(tasks {draft['agreement_on_tasks']:.1%}, stories {draft['agreement_on_stories']:.1%}); "
            f"story perplexity {draft['story_perplexity']:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("miniinfer_jax/demo"))
    parser.add_argument("--draft", type=Path, help="default: the subfolder `draft` of the model, if there is one")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems a task")
    parser.add_argument("--stories", type=int, default=200, help="held-out stories")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    draft = arguments.draft or (arguments.model / "draft" if (arguments.model / "draft").is_dir() else None)
    started = time.perf_counter()
    figures = evaluate(arguments.model, draft, arguments.problems, arguments.stories, arguments.seed)
    print_figures(figures)
    print(f"done in {time.perf_counter() - started:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
