"""Rewrites what would go stale by hand: docs/cli.md, and the README's tree and results table.

python scripts/generate_docs.py           rewrite
python scripts/generate_docs.py --check   exit 1 and say so if anything is stale
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import click

from mlx_dmpo.cli.main import cli

ROOT = Path(__file__).resolve().parents[1]


def command_reference() -> str:
    parts = ["# Command line", "", "Made by `scripts/generate_docs.py` from the commands' own help.", ""]

    def add(command: click.Command, name: str, parent: click.Context | None) -> None:
        context = click.Context(command, info_name=name, parent=parent, max_content_width=110)
        parts.extend([f"## {context.command_path}", "", "```", command.get_help(context).rstrip(), "```", ""])
        if isinstance(command, click.Group):
            for inner, subcommand in command.commands.items():
                add(subcommand, inner, context)

    add(cli, "mlx-dmpo", None)
    return "\n".join(parts)


def tree() -> str:
    """Each module with the first sentence of its docstring."""
    rows = []
    package = ROOT / "mlx_dmpo"
    for path in sorted(package.rglob("*.py")):
        if path.name == "__main__.py":
            continue
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        name = path.relative_to(package).as_posix()
        depth = name.count("/")
        if path.name == "__init__.py":
            name = "mlx_dmpo/" if path.parent == package else f"{path.parent.name}/"
        else:
            depth += 1
            name = path.name
        sentence = re.split(r"(?<=[a-z)])[.:;](?:\s|$)", " ".join(text.split()))[0].rstrip(".")
        rows.append((path.parent != package and path.name != "__init__.py", "  " * depth + name, sentence))
    width = max(len(name) for _, name, _ in rows)
    return "```\n" + "\n".join(f"{name:<{width}}  {sentence}" for _, name, sentence in rows) + "\n```"


def results() -> str:
    """The README's table of the demo, from docs/demo-results.json as a demo run wrote it (summary.json)."""
    summary = json.loads((ROOT / "docs" / "demo-results.json").read_text(encoding="utf-8"))
    rows = ["| model | pairs | pair accuracy | AUC | position bias | mean margin (nats) |", "|---|---|---|---|---|---|"]
    for name in ("base", "sft", "dmpo"):
        m = summary[name]

        def told(key: str, m: dict = m) -> str:
            return f"{m[key]['value']:.3f} ({m[key]['low']:.3f} to {m[key]['high']:.3f})"

        rows.append(
            f"| {name} | {m['n']} | {told('pair_accuracy')} | {told('auc')} | {told('position_bias')} | {told('mean_margin')} |"
        )
    return "\n".join(rows)


def between(text: str, name: str, content: str) -> str:
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    if not re.search(pattern, text, re.DOTALL):
        raise SystemExit(f"README.md has no <!-- {name} --> block")
    return re.sub(pattern, lambda match: match[1] + content + "\n" + match[2], text, flags=re.DOTALL)


def main() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, content in (("tree", tree()), ("results", results())):
        readme = between(readme, name, content)
    wanted = {ROOT / "docs" / "cli.md": command_reference(), ROOT / "README.md": readme}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is stale" if "--check" in sys.argv else f"wrote {path.relative_to(ROOT)}")
        if "--check" not in sys.argv:
            path.write_text(wanted[path], encoding="utf-8")
    if stale and "--check" in sys.argv:
        raise SystemExit("run: python scripts/generate_docs.py")


if __name__ == "__main__":
    main()
