"""The zoo as a table: every case exported, run through the interpreter, compared with eager.

Each outcome is one line of JSON in the results file as soon as it is known; a case that is there
already is not run again, so that a run may be cut off and go on.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

from tests.zoo import functions, layers, networks, transformers_models  # noqa: E402
from tests.zoo.case import Case, Model, run_case  # noqa: E402

PAGE = ROOT / "docs" / "coverage.md"
SECTIONS = {
    "Architectures of transformers": transformers_models.CASES,
    "Networks": networks.CASES,
    "Layers of torch.nn": layers.CASES,
    "Functions": functions.CASES,
}
TIMEOUT_S = 240


class _TookTooLongError(BaseException):
    pass


def _give_up(signum: int, frame: Any) -> NoReturn:
    raise _TookTooLongError(f"more than {TIMEOUT_S} s")


def outcome_of(section: str, case: Case) -> dict[str, Any]:
    """One case as a row: what it took, how near to eager, or why not."""
    row: dict[str, Any] = {"section": section, "name": case.name, "family": case.family}
    started = time.perf_counter()
    try:
        # Not under the alarm: an import that is cut off leaves its module broken.
        model = _built(case)
        signal.alarm(TIMEOUT_S)
        row |= _tried(case, model)
        if "error" in row and model.other is not None:
            row["dynamic_error"] = row.pop("error")
            row |= _tried(case, Model(model.module, model.args, model.kwargs))
    except Exception as exc:
        row["error"] = f"eager: {type(exc).__name__}: {exc}"
    except _TookTooLongError as exc:
        row["error"] = str(exc)
    signal.alarm(0)
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def _built(case: Case) -> Model:
    torch.manual_seed(0)
    model = case.build()
    with torch.no_grad():
        model.module(*model.args, **model.kwargs)
    return model


def _tried(case: Case, model: Model) -> dict[str, Any]:
    try:
        outcome = run_case(Case(case.name, case.family, lambda: model, case.tolerance))
    except Exception as exc:
        return {"error": f"{type(exc).__name__}: {exc}"}
    return {
        "nodes": outcome.nodes,
        "operators": outcome.operators,
        "difference": outcome.difference,
        "dynamic": outcome.dynamic,
        "export_s": round(outcome.export_s, 2),
        "ops": sorted({node.op for node in outcome.program.spec.step.nodes}),
    }


def run(results: Path, only: list[str], part: str) -> list[dict[str, Any]]:
    which, of = map(int, part.split("/"))
    done = _read(results)
    with results.open("a") as file:
        for section, cases in SECTIONS.items():
            for case in _mixed(cases)[which::of]:
                key = f"{section}/{case.name}"
                if key in done or (only and not {case.name, section} & set(only)):
                    continue
                done[key] = outcome_of(section, case)
                print(json.dumps(done[key]), file=file, flush=True)
                if "error" in done[key]:
                    print(f"{case.name}: {done[key]['error'][:500]}", file=sys.stderr)
    return list(done.values())


def _mixed(cases: list[Case]) -> list[Case]:
    """One of each family after the other, so that a part of the run says much."""
    seen: Counter[str] = Counter()
    turn = {}
    for case in cases:
        turn[case] = seen[case.family]
        seen[case.family] += 1
    return sorted(cases, key=lambda case: turn[case])


def _read(results: Path) -> dict[str, dict[str, Any]]:
    if not results.exists():
        return {}
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return {f"{row['section']}/{row['name']}": row for row in rows}


# ---------------------------------------------------------------- the page


def page(rows: list[dict[str, Any]]) -> str:
    known = {(section, case.name) for section, cases in SECTIONS.items() for case in cases}
    rows = [row for row in rows if (row["section"], row["name"]) in known]
    ran = {(row["section"], row["name"]) for row in rows}
    good = [row for row in rows if "error" not in row]
    names = {op for row in good for op in row["ops"]}
    lines = [
        "# Coverage",
        "",
        "Written by `scripts/coverage`. Every model here has random weights; it is exported, sent",
        "through the wire format, run by the interpreter as a worker runs it, and compared with",
        "eager torch. *Difference* is the largest one over all outputs, relative to the largest",
        "value of its output (at least 1); *equal* means bit for bit. *Sizes*: `vary` where the",
        "batch (and the sequence, for texts) was dynamic and a second run had other sizes than the",
        "example.",
        "",
        f"torch {torch.__version__}, transformers {transformers.__version__}, device cpu: "
        f"{len(good)} of {len(rows)} work, with {len(names)} operators of the table.",
    ]
    if left := sorted(name for _, name in known - ran):
        lines += ["", f"Not run for this page: {', '.join(left)}."]
    for section in SECTIONS:
        order = [case.name for case in SECTIONS[section]]
        here = [row for row in rows if row["section"] == section]
        here.sort(key=lambda row: order.index(row["name"]))
        works = [row for row in here if "error" not in row]
        lines += ["", f"## {section}: {len(works)} of {len(here)}", ""]
        lines += [
            "| model | family | nodes | operators | difference | sizes |",
            "|---|---|--:|--:|--:|---|",
        ]
        lines += [_table_row(row) for row in works]
        lines += list(_failures(here))
    return "\n".join(lines) + "\n"


def _table_row(row: dict[str, Any]) -> str:
    sizes = "vary" if row["dynamic"] else "fixed: see below" if "dynamic_error" in row else "fixed"
    difference = f"{row['difference']:.0e}" if row["difference"] else "equal"
    cells = (row["name"], row["family"], row["nodes"], row["operators"], difference, sizes)
    return f"| {' | '.join(map(str, cells))} |"


def _failures(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    failed = [(row["name"], row["error"]) for row in rows if "error" in row]
    if failed:
        yield from ["", "What does not work:", ""]
        yield from (f"- {name}: {_short(error)}" for name, error in failed)
    fixed = [(row["name"], row["dynamic_error"]) for row in rows if "dynamic_error" in row]
    if fixed:
        yield from ["", "What works at the sizes of the example only:", ""]
        yield from (f"- {name}: {_short(error)}" for name, error in fixed)


def _short(error: str) -> str:
    text = " ".join(error.split())
    _, _, inside = text.rpartition("site-packages/")
    return (inside or text)[:300].replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="names of cases or sections")
    parser.add_argument("--page", action="store_true", help="write the page, run nothing")
    parser.add_argument("--part", default="0/1", help="0/2 and 1/2: two runs side by side")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "coverage.jsonl")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _give_up)
    arguments.results.parent.mkdir(exist_ok=True)
    if arguments.page:
        PAGE.write_text(page(list(_read(arguments.results).values())))
        return
    rows = run(arguments.results, arguments.only, arguments.part)
    if not arguments.only and arguments.part == "0/1":
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
