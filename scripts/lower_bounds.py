"""The lower bounds of the small packages in setup.py, as pip takes them: rich==12 tyro==0.9.20 ...

    python scripts/lower_bounds.py            prints them
    python scripts/lower_bounds.py --check    exit status 1 if other versions are installed

torch, torchvision and triton are left out: they are gigabytes, and belong together.
"""

import ast
import sys
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

SETUP = Path(__file__).parents[1] / "setup.py"
LARGE = ("torch", "torchvision", "triton")


def lower_bounds() -> list[Requirement]:
    """The requirements of `install_requires` with `==` for `>=`. Raises ValueError if one has no lower bound."""
    calls = [node for node in ast.walk(ast.parse(SETUP.read_text())) if isinstance(node, ast.Call)]
    keywords = [keyword for call in calls for keyword in call.keywords if keyword.arg == "install_requires"]
    found = []
    for text in ast.literal_eval(keywords[0].value):
        wanted = Requirement(text)
        if wanted.name in LARGE:
            continue
        bounds = [each.version for each in wanted.specifier if each.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"setup.py: {text} has no lower bound")
        found.append(Requirement(f"{wanted.name}=={bounds[0]}"))
    return found


def main() -> None:
    wanted = lower_bounds()
    if "--check" not in sys.argv:
        print(*wanted, sep="\n")
        return
    others = [each for each in wanted if not each.specifier.contains(version(each.name))]
    print(*(f"{each.name} {version(each.name)}" for each in wanted), sep=", ")
    if others:
        sys.exit(f"other versions are installed: {', '.join(map(str, others))}")


if __name__ == "__main__":
    main()
