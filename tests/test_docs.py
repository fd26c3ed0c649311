"""What the docs say works: python blocks run, `miniinfer` command lines parse, relative links lead to files."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from miniinfer_jax.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")
SHELL_LANGUAGES = ("console", "bash")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def python_source(page: Path) -> str:
    """The page's python blocks in order, each on its lines of the page, so that a traceback points there."""
    text = page.read_text()
    source = ""
    for block in FENCED.finditer(text):
        if block[1] == "python":
            first_line = text[: block.start(2)].count("\n")
            source += "\n" * (first_line - source.count("\n")) + block[2]
    return source


def shell_commands(page: Path) -> list[list[str]]:
    """The words of every command in the page's shell blocks, the parts of a pipe apart."""
    commands = []
    for language, code in FENCED.findall(page.read_text()):
        if language not in SHELL_LANGUAGES:
            continue
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
            words.whitespace_split = True
            commands += split_at_operators(list(words))
    return commands


def split_at_operators(words: list[str]) -> list[list[str]]:
    commands: list[list[str]] = [[]]
    for word in words:
        if word in ("|", "&&", ";"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def test_pages_are_found():
    assert len(PAGES) >= 7
    assert any(command[0] == "miniinfer" for page in PAGES for command in shell_commands(page))


@each_page
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(python_source(page), str(page), "exec"), {"__name__": "__main__"})


@each_page
def test_commands_are_accepted(page):
    """Names and types of all options are checked, and nothing is run."""
    command = typer.main.get_command(app)
    leaves = [command]
    while leaves:
        leaf = leaves.pop()
        leaves += getattr(leaf, "commands", {}).values()
        if not hasattr(leaf, "commands"):
            leaf.callback = lambda **_: None
    for name, *arguments in shell_commands(page):
        if Path(name).name == "miniinfer":
            command.main(arguments, prog_name=name, standalone_mode=False)
        elif Path(name).name == "python" and arguments[0].endswith(".py"):
            assert (ROOT / arguments[0]).is_file(), arguments[0]


@each_page
def test_relative_links_lead_to_files(page):
    prose = FENCED.sub("", page.read_text())
    targets = [target for target in LINK.findall(prose) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, f"{page.name} links to {', '.join(missing)}"
