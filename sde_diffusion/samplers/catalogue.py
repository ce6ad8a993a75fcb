"""The table of all solvers, for people."""

from sde_diffusion.prediction import lookup
from sde_diffusion.samplers import ode
from sde_diffusion.samplers import sde as reverse

KINDS = {"ode": ode.METHODS, "sde": reverse.METHODS}


class _Text(str):
    """Prints itself in a notebook too."""

    __repr__ = str.__str__


def solvers(kind: str | None = None) -> str:
    """The named solvers of "ode" (`sample_ode`) or "sde" (`sample_sde`) or both, as a table: order, evaluations a step, source.

    Raises:
      ValueError: unknown kind.
    """
    tables = KINDS if kind is None else {kind: lookup(KINDS, kind, "kind of solver")}
    rows = [("method", "for", "order", "NFE/step", "what it does", "source")]
    for name, methods in tables.items():
        for method, solver in methods.items():
            rows.append((method, f"sample_{name}", str(solver.order), str(solver.evaluations), solver.summary, solver.source))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return _Text("\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[5]]).rstrip() for row in rows))
