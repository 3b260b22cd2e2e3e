"""The command line; see the package's docstring."""

from __future__ import annotations

import argparse
import importlib
import pkgutil

import torch

import experiments
from experiments.harness import Experiment
from robustood import engine


def tables() -> dict[str, Experiment]:
    """All experiments, by the names of their tables."""
    names = [module.name for module in pkgutil.iter_modules(experiments.__path__)]
    modules = [importlib.import_module(f"experiments.{n}") for n in names if n != "__main__"]
    found = [each for module in modules for each in vars(module).values()]
    return {each.name: each for each in found if isinstance(each, Experiment)}


def main() -> None:
    """List the tables, or measure those that are named."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m experiments", description=experiments.__doc__, formatter_class=style
    )
    parser.add_argument("names", nargs="*", help="names of tables, or prefixes of names")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    parser.add_argument("--again", action="store_true", help="measure existing rows again")
    args = parser.parse_args()
    known = tables()
    if unknown := [n for n in args.names if not any(name.startswith(n) for name in known)]:
        parser.error(f"no table starts with {unknown[0]!r}; there are: {', '.join(known)}")
    if not args.names:
        for name, each in known.items():
            table = each.table()
            seconds = sum(row["seconds"] for row in table["rows"])
            print(f"{name:28} {table['made_by']}, {seconds:.0f} s\n    {table['what']}")
    chosen = [each for name, each in known.items() if name.startswith((*args.names,))]
    torch.set_num_threads(1)
    engine.keep_memory()
    for seed in args.seeds or sorted({seed for each in chosen for seed in each.seeds}):
        for each in chosen:  # all tables for one seed first, because they share networks
            if seed in each.seeds:
                each.measure(seed, again=args.again)


if __name__ == "__main__":
    main()
