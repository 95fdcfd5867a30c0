"""Tables of what evidence.py found: means, how often the recipe stands behind, new types, and every study."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t

# columns in this order; the plain ones that the recipe must not be worse than
SHOWN = ("scbert", "l2", "svm", "l1", "knn", "celltypist")
PEERS = ("l2", "svm", "l1")


def read_results(work: Path) -> dict[str, dict[str, dict]]:
    """Method -> task -> scores."""
    found = defaultdict(dict)
    for path in sorted(work.glob("*/*.json")):
        result = json.loads(path.read_text())
        found[path.parent.name][result["task"]] = result
    return found


def write_tables(work: Path, path: Path) -> None:
    """Markdown: for each half, macro-F1 by study and protocol beside the best plain classifier, then the means."""
    results = read_results(work)
    lines = [
        "<!-- written by scripts/evidence.py -->",
        "",
        "What the recipe is less the best plain one of l2, svm and l1 has a 95% interval paired by fold, where there "
        "are folds.",
        "",
    ]
    for half in ("report", "choose"):
        rows = rows_of(results, half)
        title = "that chose nothing" if half == "report" else "that settings were chosen on"
        lines += [f"## Studies {title}", "", *means(rows), "", *standing(rows), ""]
        lines += [*novelty(results, half), "", *table(rows), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def rows_of(results: dict, half: str) -> list[dict]:
    """One for each study and protocol, over the tasks that we and at least one plain classifier did."""
    groups = defaultdict(list)
    for name, result in results["scbert"].items():
        if result["half"] == half and "macro_f1" in result:
            groups[tuple(name.split("|")[:2])].append(name)
    rows = []
    for (study, protocol), names in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])):
        row = {"study": study, "protocol": protocol, "tasks": len(names), "scores": {}}
        for method in SHOWN:
            if all(name in results[method] for name in names):
                row["scores"][method] = {
                    score: np.array([results[method][name][score] for name in names])
                    for score in ("accuracy", "macro_f1", "ece")
                }
        rows.append(row)
    return rows


def table(rows: list[dict]) -> list[str]:
    """Macro-F1 of all, the difference to the best plain one with its paired 95% interval, and ECE of ours."""
    shown = [name for name in SHOWN if any(name in row["scores"] for row in rows)]
    lines = [f"| study | protocol | tasks | {' | '.join(shown)} | less the best plain | ECE |"]
    lines += ["|---|---|---|" + "---|" * (len(shown) + 2)]
    for row in rows:
        scores = row["scores"]
        cells = [f"{scores[name]['macro_f1'].mean():.3f}" if name in scores else "" for name in shown]
        lines.append(
            f"| {row['study']} | {row['protocol']} | {row['tasks']} | {' | '.join(cells)} | {difference(scores)} | "
            f"{scores['scbert']['ece'].mean():.3f} |"
        )
    return lines


def difference(scores: dict) -> str:
    """Ours less the best of the plain ones in the mean, paired by task."""
    if not set(PEERS) & set(scores):
        return ""
    best, gap, half = against_the_best(scores)
    return f"{gap:+.3f}{'' if half is None else f' ± {half:.3f}'} ({best})"


def against_the_best(scores: dict, method: str = "scbert") -> tuple[str, float, float | None]:
    """The best of the other ones in the mean, what the method is less it, and half of the 95% interval, if any."""
    others = [name for name in ("scbert", *PEERS) if name in scores and name != method]
    best = max(others, key=lambda name: scores[name]["macro_f1"].mean())
    gap = scores[method]["macro_f1"] - scores[best]["macro_f1"]
    if len(gap) < 2:
        return best, float(gap.mean()), None
    half = student_t.ppf(0.975, len(gap) - 1) * gap.std(ddof=1) / len(gap) ** 0.5
    return best, float(gap.mean()), float(half)


def standing(rows: list[dict]) -> list[str]:
    """How often each of ours and the plain ones stands behind the best of the other three, where there are folds."""
    found = [row["scores"] for row in rows if row["tasks"] > 1 and {"scbert", *PEERS} <= set(row["scores"])]
    if not found:
        return []
    lines = [
        "| against the best of the other three | sets and protocols | more than 0.005 behind | interval below 0 | "
        "interval above 0 | mean difference |",
        "|---|---|---|---|---|---|",
    ]
    for method in ("scbert", *PEERS):
        gaps = [against_the_best(scores, method)[1:] for scores in found]
        behind = sum(gap < -0.005 for gap, _ in gaps)
        below, above = sum(gap + half < 0 for gap, half in gaps), sum(gap - half > 0 for gap, half in gaps)
        mean = np.mean([gap for gap, _ in gaps])
        lines.append(f"| {method} | {len(gaps)} | {behind} | {below} | {above} | {mean:+.3f} |")
    return lines


def means(rows: list[dict]) -> list[str]:
    """Over the studies that L2 and the support vector machine did as well, by protocol: every method that did them."""
    lines = ["| protocol | studies | method | accuracy | macro-F1 | ECE |", "|---|---|---|---|---|---|"]
    for protocol in sorted({row["protocol"] for row in rows}):
        of_protocol = [row["scores"] for row in rows if row["protocol"] == protocol]
        of_protocol = [scores for scores in of_protocol if {"l2", "svm"} <= set(scores)]
        for method in SHOWN:
            if of_protocol and all(method in scores for scores in of_protocol):
                found = [
                    np.mean([scores[method][name].mean() for scores in of_protocol])
                    for name in ("accuracy", "macro_f1", "ece")
                ]
                numbers = " | ".join(f"{value:.3f}" for value in found)
                lines.append(f"| {protocol} | {len(of_protocol)} | {method} | {numbers} |")
    return lines


def novelty(results: dict, half: str) -> list[str]:
    """Known and novel accuracy, the mean over left-out types of every study, by the model's own threshold."""
    groups = defaultdict(list)
    for name, result in results["scbert"].items():
        if result["half"] == half and "novel_accuracy" in result:
            groups[name.split("|")[0]].append((result["known_accuracy"], result["novel_accuracy"]))
    lines = [
        "| study, types left out in turn | types | known accuracy | novel accuracy |",
        "|---|---|---|---|",
    ]
    found = {study: np.mean(pairs, axis=0) for study, pairs in sorted(groups.items())}
    for study, (known, novel) in found.items():
        lines.append(f"| {study} | {len(groups[study])} | {known:.3f} | {novel:.3f} |")
    if found:
        known, novel = np.mean(list(found.values()), axis=0)
        lines.append(f"| mean of studies | | {known:.3f} | {novel:.3f} |")
    return lines
