"""Measure how easily the package reads: its structure in numbers, for this tree or for an earlier
commit.

    python scripts/structure.py                   # flowrl/ as it is
    python scripts/structure.py 09c2979 HEAD      # two commits side by side

Tokens are Python's own without comments, line ends and indentation, and a line is a line of the
file, whatever it holds. Branches of a function count what radon counts, and every comprehension,
conditional expression and `and` or `or` besides. A docstring is a fragment when it begins with a
preposition or a question word, or is shorter than three words. The last two rows compare like with
like: functions that stand, by class and name, in every column, and their tokens.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import subprocess
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
STATEMENTS = (ast.If, ast.For, ast.While, ast.AsyncFor, ast.With, ast.AsyncWith, ast.Assert)
BRANCHES = (*STATEMENTS, ast.ExceptHandler, ast.comprehension, ast.IfExp, ast.match_case)
FRAGMENT = re.compile(r"(Of|What|Where|How|Whether|In|For|With|Both|By|From|To|Under|Which|As)\b")
LAYOUT = (
    tokenize.NEWLINE,
    tokenize.NL,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENDMARKER,
)
LIMIT = 10
"""Branches above which a function counts as too branched."""
POLICIES = ("flowrl/modules/policy.py", "flowrl/training/policy.py")

Sources = dict[str, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


def tree_sources() -> Sources:
    """Read the package as it stands."""
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for path in sorted((ROOT / "flowrl").rglob("*.py"))
    }


def commit_sources(revision: str) -> Sources:
    """Read the package of a commit."""
    names = _git("ls-tree", "-r", "--name-only", revision, "flowrl").splitlines()
    return {name: _git("show", f"{revision}:{name}") for name in names if name.endswith(".py")}


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def definitions(tree: ast.Module) -> Iterator[Definition]:
    """Walk the classes and functions of a module."""
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            yield node


def functions(tree: ast.Module) -> list[Function]:
    """Collect the functions and methods of a module."""
    return [node for node in definitions(tree) if not isinstance(node, ast.ClassDef)]


def docstrings(tree: ast.Module) -> list[str]:
    """Collect the docstrings of a module, its classes and its functions."""
    texts = [ast.get_docstring(tree), *(ast.get_docstring(node) for node in definitions(tree))]
    return [text for text in texts if text]


def is_fragment(text: str) -> bool:
    """Tell whether a docstring begins as no sentence does, or says next to nothing."""
    return bool(FRAGMENT.match(text)) or len(text.split()) < 3


def branches(function: ast.AST) -> int:
    """Count the ways through a function, with those inside its expressions."""
    count = 1
    for node in ast.walk(function):
        if isinstance(node, BRANCHES):
            count += 1
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        if isinstance(node, ast.comprehension):
            count += len(node.ifs)
    return count


def code_tokens(text: str) -> int:
    """Count the tokens of a module without comments and layout; a docstring counts as one."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type not in LAYOUT for token in tokens)


def comments(text: str) -> int:
    """Count the comments of a module, directives for tools left out."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    texts = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return sum(not re.match(r"#\s*(noqa|type:)", comment) for comment in texts)


def function_tokens(sources: Sources) -> dict[tuple[str, str], int]:
    """Count the tokens of each function without its docstring, by its class, which is empty for
    none, and its name; one that stands twice is left out, since either could be meant.
    """
    counts: dict[tuple[str, str], list[int]] = {}
    for text in sources.values():
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        lines = [token.start[0] for token in tokens if token.type not in LAYOUT]
        for parent in ast.walk(ast.parse(text)):
            for node in ast.iter_child_nodes(parent):
                if isinstance(node, Function):
                    place = (getattr(parent, "name", ""), node.name)
                    counts.setdefault(place, []).append(tokens_within(node, lines))
    return {place: numbers[0] for place, numbers in counts.items() if len(numbers) == 1}


def tokens_within(function: Function, lines: Sequence[int]) -> int:
    """Count the tokens of a function without its docstring, given the line of each token."""
    inside = range(function.lineno, (function.end_lineno or 0) + 1)
    about = range(0)
    if ast.get_docstring(function) is not None:
        first = function.body[0]
        about = range(first.lineno, (first.end_lineno or 0) + 1)
    return sum(line in inside and line not in about for line in lines)


def loss_checks(trees: dict[str, ast.Module]) -> int:
    """Count the places that ask of which class a loss is, or which function."""
    count = 0
    for tree in trees.values():
        for node in ast.walk(tree):
            text = ast.unparse(node) if isinstance(node, ast.Call | ast.Compare) else ""
            is_class = bool(re.match(r"isinstance\(.*(NFT|DPPO|GRPO|Guard|AWM|EPG|PAR)\b", text))
            is_identity = isinstance(node, ast.Compare) and bool(
                re.search(r"\bis (not )?(guard|grpo|dppo)\b", text)
            )
            count += is_class or is_identity
    return count


def policy_size(trees: dict[str, ast.Module]) -> tuple[int, int]:
    """Return the lines and the methods of the class Policy."""
    for path in POLICIES:
        for node in ast.walk(trees.get(path, ast.Module([], []))):
            if isinstance(node, ast.ClassDef) and node.name == "Policy":
                methods = [member for member in node.body if isinstance(member, ast.FunctionDef)]
                return (node.end_lineno or 0) - node.lineno + 1, len(methods)
    return 0, 0


def is_in_hall(path: str) -> bool:
    """Tell whether a module stands in no folder of the package, those aside that Python names."""
    place = PurePosixPath(path)
    return len(place.parts) == 2 and not place.name.startswith("__")


def measure(sources: Sources) -> dict[str, float]:
    """Measure a package, given the text of its modules by path."""
    trees = {path: ast.parse(text) for path, text in sources.items()}
    texts: list[str] = []
    counts: list[int] = []
    for tree in trees.values():
        texts += docstrings(tree)
        counts += [branches(function) for function in functions(tree)]
    counts.sort()
    tokens = sum(code_tokens(text) for text in sources.values())
    lines = sum(len(text.splitlines()) for text in sources.values())
    policy_lines, policy_methods = policy_size(trees)
    return {
        "modules": len(sources),
        "modules in the hall": sum(map(is_in_hall, sources)),
        "lines of Policy": policy_lines,
        "methods of Policy": policy_methods,
        "questions for a loss's class": loss_checks(trees),
        "docstrings": len(texts),
        "docstrings that are fragments": sum(map(is_fragment, texts)),
        "words a docstring": statistics.mean(len(text.split()) for text in texts),
        "tokens": tokens,
        "tokens a line": tokens / lines,
        f"functions above {LIMIT} branches": sum(count > LIMIT for count in counts),
        "branches, 90th percentile": counts[int(0.9 * len(counts))],
        "comments per 100 lines": 100 * sum(map(comments, sources.values())) / lines,
    }


def most_branched(sources: Sources, number: int) -> list[str]:
    """Name the functions with the most branches, with their counts."""
    rows = []
    for path, text in sources.items():
        for function in functions(ast.parse(text)):
            rows.append((branches(function), f"{path}:{function.lineno} {function.name}"))
    return [f"{count:>4}  {place}" for count, place in sorted(rows, reverse=True)[:number]]


def _text(value: float) -> str:
    return f"{value:,.1f}" if value % 1 else f"{int(value):,}"


def main() -> None:
    """Print the table, and with --worst the functions with the most branches."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "revisions", nargs="*", help="commits to measure; none measures the tree as it is"
    )
    parser.add_argument(
        "--worst", type=int, default=0, metavar="N", help="name the N most branched functions"
    )
    args = parser.parse_args()
    columns = {revision: commit_sources(revision) for revision in args.revisions}
    if not columns:
        columns = {"tree": tree_sources()}
    tables = {name: measure(sources) for name, sources in columns.items()}
    tokens = {name: function_tokens(sources) for name, sources in columns.items()}
    common = set.intersection(*(set(counts) for counts in tokens.values()))
    for name, counts in tokens.items():
        tables[name]["functions in all columns"] = len(common)
        tables[name]["tokens of these"] = sum(counts[place] for place in common)
    print(f"{'':<34}" + "".join(f"{name[:12]:>14}" for name in tables))
    for row in next(iter(tables.values())):
        cells = "".join(f"{_text(table[row]):>14}" for table in tables.values())
        print(f"{row:<34}{cells}")
    for name, sources in columns.items():
        if args.worst:
            print(f"\n{name}", *most_branched(sources, args.worst), sep="\n")


if __name__ == "__main__":
    main()
