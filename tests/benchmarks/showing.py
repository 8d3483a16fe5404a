"""Results as text: for the console, and as a Markdown table of all that is stored."""

import json

from measuring import RESULTS


def spread(cells, digits=3):
    return "{:.{d}f} ({:.{d}f}..{:.{d}f})".format(
        cells["median"], cells["low"], cells["high"], d=digits
    )


def show(case):
    """A case on the console."""
    print(f"\n{case['title']}, {case['unit']}: median (quartiles)")
    for name, cells in case["contestants"].items():
        rate = f"{cells['rows_a_second']:12,.0f} rows/s" if "rows_a_second" in cells else ""
        print(f"  {name:44s}{spread(cells):>32s}{rate}")
    for found in case["ratios"]:
        print(f"  {title(found):44s}{spread(found):>32s}{goal(found)}")
    if "exponent" in case:
        print(f"  {in_words(case['exponent'])}")
    for note in case["notes"]:
        print(f"  ({note})")


def title(found):
    return f"{found['ours']} / {found['rival']}"


def goal(found):
    """Whether a ratio is what was aimed at."""
    if found["most"] is None:
        return ""
    reached = "reached" if found["median"] <= found["most"] else "not reached"
    return f"  aim: {found['most']:.3g}, {reached}"


def in_words(exponent):
    error = "" if exponent["error"] is None else f" (standard error {exponent['error']:.2f})"
    return f"time grows as size^{exponent['slope']:.2f}{error}; at the end ^{exponent['last']:.2f}"


def stored(folder=RESULTS):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def markdown(records):
    """A table of the ratios that something was aimed at, and one of exponents, of stored results."""
    lines = ["| work | ours | rival | ratio of times, median (quartiles) | aim |"]
    lines += ["|---|---|---|---|---|"]
    curves = ["| work | exponent | at the end |", "|---|---|---|"]
    for record in records:
        for case in record["cases"]:
            for found in case["ratios"]:
                if found["most"] is None:
                    continue
                most = f"<= {found['most']:.3g}"
                cells = (case["title"], ours(case, found), rival(case, found))
                lines.append(f"| {' | '.join(cells)} | {spread(found, 2)} | {most} |")
            if slope := case.get("exponent"):
                cells = (case["title"], f"{slope['slope']:.2f}", f"{slope['last']:.2f}")
                curves.append(f"| {' | '.join(cells)} |")
    circumstances = under([record["circumstances"] for record in records])
    parts = [lines] if len(lines) > 2 else []
    parts += [curves] if len(curves) > 2 else []
    return "\n\n".join(["\n".join(part) for part in parts] + circumstances)


def ours(case, found):
    return timed(case, found["ours"])


def rival(case, found):
    return timed(case, found["rival"])


def timed(case, name):
    cells = case["contestants"][name]
    what = case["unit"].split()[0]
    median = cells["median"]
    return f"{name}: {f'{median:.3g}' if median < 1000 else f'{median:,.0f}'} {what}"


def under(circumstances):
    """Machines, threads and versions, a sentence for each."""
    groups = {}
    for found in circumstances:
        groups.setdefault((found["machine"], found["threads"]), []).append(found)
    lines = []
    for (machine, threads), some in groups.items():
        loads = [found["load"][0] for found in some]
        versions = {f"{name} {v}": None for found in some for name, v in found["versions"].items()}
        lines.append(
            f"{machine}; {threads} thread(s) on as many cores; load at the start {min(loads):.1f} to"
            f" {max(loads):.1f}; {', '.join(versions)}."
        )
    return lines
