"""Benchmarks against named rivals: ``pyrozoo bench``, or ``python tests/benchmarks``.

    pyrozoo bench                      what there is
    pyrozoo bench vade m2 --rounds 40  two of them
    pyrozoo bench all                  all but those that take hours
    pyrozoo bench --table              what is stored, as Markdown

A rival that cannot be imported is named, with how to install it, and the others go on.
"""

import argparse
import ast
import datetime
import importlib
import os
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

#: name -> module and function
WORKS = {
    "vade": ("steps", "vade_steps"),
    "m2": ("steps", "m2_steps"),
    "small": ("steps", "small_steps"),
    "seeds": ("seeds", "seeds"),
    "mnist": ("epochs", "mnist_epochs"),
    "mvae": ("epochs", "mvae_epochs"),
    "numpyro": ("jax_rivals", "numpyro_works"),
    "genjax": ("jax_rivals", "genjax_works"),
    "peak": ("peak", "peak"),
    "curves": ("curves", "curves"),
    "evidence": ("evidence", "evidence"),
    "accuracy": ("accuracy", "accuracy"),
}
#: scripts with options of their own
SCRIPTS = ("memory", "flame", "processes")
HOURS = ("accuracy",)


def scripts():
    return [name for name in SCRIPTS if (HERE / f"{name}.py").exists()]


def about(name):
    """The first sentence of what a work says of itself; nothing is imported."""
    module, function = WORKS.get(name, (name, None))
    found = ast.parse((HERE / f"{module}.py").read_text())
    if function is not None:
        found = next(x for x in found.body if getattr(x, "name", "") == function)
    return ast.get_docstring(found).split("\n\n")[0].replace("\n", " ")


def parse(arguments):
    parser = argparse.ArgumentParser("pyrozoo bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--rounds", type=int, help="turns of each contestant")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="and cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the results")
    parser.add_argument("--tiny", action="store_true", help="only see that it runs")
    parser.add_argument("--no-compile", action="store_true", help="skip what is compiled")
    parser.add_argument("--data-root", default=os.environ.get("ZOO_DATA"))
    parser.add_argument("--table", action="store_true", help="print stored results as Markdown")
    given = parser.parse_args(arguments)
    known = [*WORKS, *scripts(), "all"]
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"no work is called {', '.join(unknown)} (works: {', '.join(known)})")
    if given.rounds is not None and given.rounds < 1:
        parser.error(f"--rounds is at least 1, got {given.rounds}")
    if not 1 <= given.threads <= (os.cpu_count() or 1):
        parser.error(f"--threads is from 1 to {os.cpu_count()}, got {given.threads}")
    return given


def limit(threads):
    """Give every library the same cores and threads; before any of them is imported."""
    os.environ.update({"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"})
    os.environ["JAX_PLATFORMS"] = "cpu"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if threads == 1:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()


def run(name, options):
    """Run one of the works; gives what is to be stored."""
    import pyro
    from measuring import circumstances
    from showing import show

    module, function = WORKS[name]
    print(f"\n== {name}: {about(name)}", flush=True)
    record = {"work": name, "circumstances": circumstances(options), "cases": []}
    record["date"] = datetime.date.today().isoformat()
    with pyro.validation_enabled(False):
        for case in getattr(importlib.import_module(module), function)(options):
            record["cases"].append(case.record())
            show(record["cases"][-1])
            sys.stdout.flush()
    record["circumstances"]["load_after"] = [round(x, 2) for x in os.getloadavg()]
    return record


def main(arguments=None):
    given = parse(arguments)
    if given.table:
        from showing import markdown, stored

        print(markdown(stored()))
        return 0
    if not given.names:
        for name in [*WORKS, *scripts()]:
            print(f"  {name:10s} {about(name)}")
        return 0
    everything = [name for name in WORKS if name not in HOURS]
    names = everything if "all" in given.names else given.names
    limit(given.threads)
    import logging

    import torch
    from measuring import Options, circumstances, store
    from showing import under

    torch.set_num_threads(given.threads)
    logging.disable(logging.INFO)
    options = Options(
        given.rounds, given.threads, given.tiny, not given.no_compile, given.data_root
    )
    print(*under([circumstances(options)]), sep="\n")
    failed = 0
    for name in dict.fromkeys(names):
        if name not in WORKS:
            sys.argv = [f"{name}.py"]
            runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
            continue
        try:
            record = run(name, options)
        except (OSError, ImportError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            failed += 1
            continue
        if given.json and record["cases"]:
            several = len(names) > 1
            path = given.json.with_stem(f"{given.json.stem}-{name}") if several else given.json
            store(path, record)
            print(f"stored in {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
