"""The README says what is there: the commands of .ci/run, every folder of the map, the figures of the model card."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_test_command_to_the_letter():
    commands = re.search(r"```bash\n(.*?)```", README, re.DOTALL).group(1).strip().splitlines()
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci/run").read_text().splitlines()
    assert "miniinfer generate" in commands[0]


def test_the_map_names_every_part_of_the_package():
    table = README.split("## The house")[1].split("A file imports")[0]
    parts = [path for path in (ROOT / "miniinfer_jax").iterdir() if not path.name.startswith(("__pycache__", "."))]
    for path in parts:
        name = f"{path.name}/" if path.is_dir() else path.name
        assert name in table, f"the README's map lacks {name}"
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", table):
        places = (ROOT, ROOT / "miniinfer_jax", ROOT / "miniinfer_jax/models", ROOT / "tests")
        assert any((place / name).exists() for place in places), f"the map names {name}, which is not there"


def test_the_model_card_holds_the_measured_figures():
    figures = json.loads((ROOT / "benchmarks/demo_eval.json").read_text())
    card = README.split("## The model that ships")[1].split("## Development")[0]
    for task, shares in figures["tasks"].items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {task} "))
        assert row.split("|")[2].strip() == f"{100 * shares['exact']:.1f}%"
    assert f"| all | {100 * figures['exact_over_all_tasks']:.1f}%" in card
    assert f"{figures['story_perplexity']:.3f}" in card
    assert f"{100 * figures['draft']['agreement']:.1f}%" in card


def test_the_measured_figures_are_those_that_were_asked_for():
    figures = json.loads((ROOT / "benchmarks/demo_eval.json").read_text())
    assert figures["tasks"]["addition_two_digits"]["exact"] >= 0.97
    assert figures["exact_over_all_tasks"] >= 0.90
    assert figures["draft"]["agreement"] >= 0.60


def test_the_model_that_ships_is_as_small_as_promised():
    demo = ROOT / "miniinfer_jax/demo"
    assert sum(path.stat().st_size for path in demo.rglob("*") if path.is_file()) <= 8_000_000
    assert sum(path.stat().st_size for path in (demo / "draft").iterdir()) <= 1_000_000
