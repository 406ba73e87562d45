"""What the converter prints: the mapping table, what is ignored or initialised, and a progress bar."""

from collections.abc import Callable, Iterator
import contextlib
from typing import Any

from .inspector import size_text
from .plans import Plan


def print_plan(plan: Plan, full: bool) -> None:
    """Prints what an import does: a line of totals, with `full` also the mapping, and always what is left out."""
    for part in plan.parts:
        used = part.table.source_keys()
        ignored = {key: part.table.ignored_reason(key) for key in part.source if key not in used} | part.source.dropped
        if full:
            for rule in part.table.rules:
                for line in _rule_lines(rule, plan):
                    print(line)
        for reason in sorted(set(ignored.values())):
            keys = sorted(key for key in ignored if ignored[key] == reason)
            few = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            print(f"ignored: {', '.join(keys) if full else few}: {reason}")
        for key, is_kept in part.kept.items():
            old, kept = part.source.entries[key].shape[0], int(is_kept.sum())
            padding = f" ({old - kept} of the {old} rows belong to no token)" if old > kept else ""
            print(f"grown: {key}: {kept} rows of the source{padding}, and {len(is_kept) - kept} that are the mean row")
        for note in part.source.notes:
            print(note)
    for path in sorted(plan.fresh):
        print(f"initialised: {path} {list(plan.shapes[path][0])}: {plan.fresh[path]}")
    if full:
        print("missing in the source: none; not known in the source: none")
    sources = ", ".join(str(part.source.path) for part in plan.parts)
    print(f"{sources}: {plan.kind}, {sum(len(part.source) for part in plan.parts)} tensors"
          f" → {len(plan.shapes)} parameters, {size_text(plan.nbytes)}")  # fmt: skip


def _rule_lines(rule: Any, plan: Plan) -> list[str]:
    """`keys → parameters`, layers of a stack in one line."""
    if rule.layers is None:
        layers = ""
    elif list(rule.layers) == list(range(rule.layers[0], rule.layers[-1] + 1)):
        layers = f"{{{rule.layers[0]}..{rule.layers[-1]}}}"
    else:
        layers = "{" + ",".join(map(str, rule.layers)) + "}"
    keys = " + ".join(key.replace("{}", layers) for key, _ in rule.sources)
    if not rule.targets:
        return [f"{keys} → (a constant, checked)"]
    targets = []
    for path, _ in rule.targets:
        shape, dtype = plan.shapes[path]
        targets.append(f"{path} {list(shape)} {dtype}")
    return [f"{keys} → {' + '.join(targets)}"]


@contextlib.contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes; gives a function that moves it on."""
    with late_progress(name) as (begin, advance):
        begin(total)
        yield advance


@contextlib.contextmanager
def late_progress(name: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A progress bar whose total comes later: gives (begin(total), advance(nbytes))."""
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"), bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )  # fmt: skip
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        yield (lambda total: bar.update(task, total=total)), (lambda nbytes: bar.advance(task, nbytes))
