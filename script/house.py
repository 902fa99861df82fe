"""The house in numbers: floors, circles, long lines, complex functions, density, lines by room.

    python script/house.py                       # this checkout
    python script/house.py --tree OTHER --out house.json

Indicators, no verdicts: what counts is that a newcomer finds the room and understands the line.

    imports upwards   imports from a floor to a higher one; floors: [tool.importlinter] in
                      pyproject.toml
    circles           sets of modules that import each other (imports inside functions count)
    long lines        beyond 100 columns
    complex           functions whose cyclomatic complexity is above 10 (radon's count;
                      assertions of tests are no branches)
    nodes a line      nodes of the syntax tree per line of code (no comments, docstrings, blank
                      lines)
    name length       mean length of variables and parameters where they are written
    conditionals      `a if b else c`, per 1,000 lines of code

Needs what `make lint` installs: radon, and grimp (which import-linter reads imports with).
"""

import argparse
import ast
import json
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path
from typing import Any

import networkx
from radon.complexity import cc_visit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ringx", "apps")
COLUMNS, COMPLEXITY = 100, 10
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tree", type=Path, default=ROOT, help="a checkout (default: this one)")
    p.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    args = p.parse_args()
    report = measure(args.tree.resolve())
    print(as_text(report))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(tree: Path) -> dict[str, Any]:
    """All indicators of a checkout."""
    files = python_files(tree)
    rooms: dict[str, Counter] = {}
    for file in files:
        rooms.setdefault(room_of(file.relative_to(tree)), Counter()).update(count(file))
    total: Counter = sum(rooms.values(), Counter())
    long_lines = {room: numbers["long lines"] for room, numbers in sorted(rooms.items())}
    return {
        "imports": imports_of(tree),
        "long_lines": {room: n for room, n in long_lines.items() if n},
        "complex_functions": complex_functions(tree, files),
        "density": {scope: density(rooms, scope) for scope in scopes_of(rooms)},
        "lines": {room: numbers["lines"] for room, numbers in sorted(rooms.items())},
        "total_lines": total["lines"],
    }


def python_files(tree: Path) -> list[Path]:
    command = ["git", "-C", str(tree), "ls-files", "*.py"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [tree / name for name in listed if (tree / name).exists()]


def room_of(file: Path) -> str:
    """The folder, two deep; a module that lies in the package itself is a room of its own floor."""
    return "/".join(file.parts[:-1][:2]) or "."


def count(file: Path) -> Counter:
    text = file.read_text(encoding="utf-8")
    syntax = ast.parse(text)
    nodes = [n for n in ast.walk(syntax) if not isinstance(n, (ast.expr_context, ast.operator))]
    names = names_written(nodes)
    lines = text.splitlines()
    return Counter(
        {
            "lines": len(lines),
            "code lines": len(code_lines(file) - docstring_lines(syntax)),
            "long lines": sum(len(line) > COLUMNS for line in lines),
            "nodes": len(nodes),
            "names": len(names),
            "letters": sum(len(name) for name in names),
            "conditionals": sum(isinstance(n, ast.IfExp) for n in nodes),
            "functions": sum(isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in nodes),
        }
    )


def names_written(nodes: list[ast.AST]) -> list[str]:
    """Variables where they are assigned, and parameters."""
    variables = [n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return variables + [n.arg for n in nodes if isinstance(n, ast.arg)]


def code_lines(file: Path) -> set[int]:
    lines: set[int] = set()
    with tokenize.open(file) as f:
        for token in tokenize.generate_tokens(f.readline):
            if token.type not in NO_CODE:
                lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def docstring_lines(syntax: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(syntax):
        if isinstance(node, ast.Expr) and is_text(node.value):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def scopes_of(rooms: dict[str, Counter]) -> list[str]:
    """The folders at the top that hold code, and "" for all together."""
    return [*sorted({room.split("/")[0] for room in rooms if rooms[room]["names"]} - {"."}), ""]


def density(rooms: dict[str, Counter], scope: str) -> dict[str, float]:
    numbers: Counter = Counter()
    for room, counted in rooms.items():
        if scope in ("", room.split("/")[0]):
            numbers.update(counted)
    return {
        "functions": numbers["functions"],
        "nodes_per_line": round(numbers["nodes"] / numbers["code lines"], 2),
        "name_length": round(numbers["letters"] / numbers["names"], 2),
        "conditionals_per_1000_lines": round(
            1000 * numbers["conditionals"] / numbers["code lines"], 1
        ),
    }


def complex_functions(tree: Path, files: list[Path]) -> list[str]:
    """ "file:line name (complexity)" of every function above the limit."""
    entries = []
    for file in files:
        is_test = file.relative_to(tree).parts[0] == "test"
        for block in cc_visit(file.read_text(encoding="utf-8"), no_assert=is_test):
            methods = getattr(block, "methods", None)
            if methods is None and block.complexity > COMPLEXITY:  # a class is its methods
                place = f"{file.relative_to(tree)}:{block.lineno}"
                entries.append(f"{place} {block.fullname} ({block.complexity})")
    return sorted(entries)


# ---- imports


def imports_of(tree: Path) -> dict[str, Any]:
    """Imports that run upwards, and circles, of the packages of a checkout."""
    packages = [name for name in PACKAGES if (tree / name / "__init__.py").exists()]
    if not packages:  # another project's checkout
        return {"upwards": None, "circles": []}
    imports = list_imports(tree, packages)
    houses = floors_of(tree)
    upwards = [f"{a} -> {b}" for floors in houses for a, b in imports if goes_up(a, b, floors)]
    graph = networkx.DiGraph(imports)
    components = networkx.strongly_connected_components(graph)
    circles = sorted(sorted(modules) for modules in components if len(modules) > 1)
    return {"upwards": upwards if houses else None, "circles": circles}


def list_imports(tree: Path, packages: list[str]) -> list[tuple[str, str]]:
    """(importer, imported) of all modules of these packages."""
    listing = subprocess.run(
        [sys.executable, "-c", LIST_IMPORTS, *packages],
        cwd=tree,
        capture_output=True,
        text=True,
        check=True,
    )
    return [(importer, imported) for importer, imported in json.loads(listing.stdout)]


# in a process of its own: it imports the packages of the tree that is its current folder
LIST_IMPORTS = """
import json, sys, grimp
sys.path.insert(0, "")
graph = grimp.build_graph(*sys.argv[1:], cache_dir=None)
pairs = [(a, b) for a in graph.modules for b in graph.find_modules_directly_imported_by(a)]
print(json.dumps(sorted(pairs)))
"""


def floors_of(tree: Path) -> list[dict[str, int]]:
    """{module: floor, 0 the lowest} of each contract of layers in pyproject.toml."""
    settings = tomllib.loads((tree / "pyproject.toml").read_text())
    contracts = settings.get("tool", {}).get("importlinter", {}).get("contracts", [])
    houses = []
    for contract in contracts:
        floors = {}
        prefixes = [f"{container}." for container in contract.get("containers", [])] or [""]
        for number, layer in enumerate(reversed(contract["layers"])):
            for name in layer.replace("|", ":").split(":"):
                floors |= {prefix + name.strip(): number for prefix in prefixes}
        houses.append(floors)
    return houses


def goes_up(importer: str, imported: str, floors: dict[str, int]) -> bool:
    lower, upper = floor_of(importer, floors), floor_of(imported, floors)
    return lower is not None and upper is not None and upper > lower


def floor_of(module: str, floors: dict[str, int]) -> int | None:
    """That of the module, or of the nearest package around it."""
    while module and module not in floors:
        module = module.rpartition(".")[0]
    return floors.get(module)


# ---- the table


def as_text(report: dict[str, Any]) -> str:
    upwards, circles = report["imports"]["upwards"], report["imports"]["circles"]
    if upwards is None:
        lines = ["imports upwards    no floors are declared"]
    else:
        lines = section("imports upwards", len(upwards), upwards)
    lines += section("circles", len(circles), [" <-> ".join(modules) for modules in circles])
    lines += section("long lines", *by_room(report["long_lines"]))
    complex_ones = report["complex_functions"]
    lines += section("complex functions", len(complex_ones), complex_ones)
    heads = ("functions", "nodes a line", "name length", "conditionals")
    lines.append(f"{'':<19}" + "".join(f"{head:>13}" for head in heads))
    for scope, numbers in report["density"].items():
        values = "".join(f"{value:>13}" for value in numbers.values())
        lines.append(f"{scope or 'all':<19}{values}")
    lines += section("lines", *by_room(report["lines"]))
    return "\n".join(lines)


def section(title: str, total: int, entries: list[str]) -> list[str]:
    return [f"{title:<19}{total}", *(f"    {entry}"[:COLUMNS] for entry in entries)]


def by_room(numbers: dict[str, int]) -> tuple[int, list[str]]:
    """(the sum, a line for each room)"""
    return sum(numbers.values()), [f"{room:<20} {n}" for room, n in numbers.items()]


if __name__ == "__main__":
    sys.exit(main())
