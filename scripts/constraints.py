"""Print the installed versions of all that FlowRL and its development tools need, as constraints
for pip: make constraints
"""

from flowrl.launch.program import run_program

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Requirement("flowrl-lightning[dev]")


def closure(root: Requirement) -> dict[str, str]:
    """Return the version of each package that is needed here, directly or not, by name.

    A package that is not installed is left out with what it needs.
    """
    versions: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    todo = [root]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        # A build's own mark, as in 2.9.0+cpu, would keep all other builds out.
        versions[name] = Version(package.version).public
        # Each extra brings needs of its own; without one the package has its usual ones.
        for extra in sorted({"", *wanted.extras}):
            if (name, extra) not in done:
                done.add((name, extra))
                needs = map(Requirement, package.requires or ())
                todo += [need for need in needs if _applies(need, extra)]
    del versions[canonicalize_name(root.name)]
    return versions


def _applies(need: Requirement, extra: str) -> bool:
    return need.marker is None or need.marker.evaluate({"extra": extra})


def main() -> None:
    """Print one line a package."""
    print("# The versions that CI ran with: make setup CONSTRAINTS=constraints.txt")
    for name, version in sorted(closure(ROOT).items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    raise SystemExit(run_program(main))
