"""Solvers of the exact programme by name, through PuLP, and the bounds that they prove.

PuLP passes on a solver's answer but not its bound, and calls an answer "Optimal" that a time limit
cut short. HiGHS tells its bound itself; CBC writes it into its log.
"""

from __future__ import annotations

import math
import re
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqpar.errors import PlanError

if TYPE_CHECKING:
    import pulp

__all__ = ["Solver"]

_ALIASES = {"cbc": "PULP_CBC_CMD", "highs": "HiGHS", "scip": "SCIP_PY"}


class Solver:
    """One solver with its time limit.

    Raises:
        PlanError: a time limit that is not over 0, a solver that PuLP does not know, or one that
            is not installed.
    """

    def __init__(self, name: str, time_limit_s: float) -> None:
        import pulp

        if not 0 < time_limit_s < math.inf:
            raise PlanError(
                f"the exact programme's time limit must be over 0 s, got {time_limit_s}"
            )
        wanted = _ALIASES.get(name.lower(), name)
        known = {solver.lower(): solver for solver in pulp.listSolvers()}
        if wanted.lower() not in known:
            raise PlanError(
                f"PuLP knows no solver {name!r}: choose one of {', '.join(known.values())}"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            backend = pulp.getSolver(known[wanted.lower()], msg=False, timeLimit=time_limit_s)
            if not backend.available():
                installed = ", ".join(pulp.listSolvers(onlyAvailable=True))
                raise PlanError(f"the solver {name} is not installed; PuLP finds {installed}")
        self.backend: Any = backend

    def solve(self, problem: pulp.LpProblem) -> float | None:
        """Solve, leave the answer in the variables, and return the proven bound, if it is told."""
        import pulp

        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            # PuLP 3.3.2 announces version 4's names; the ones used here work throughout 3.3.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            if not isinstance(self.backend, pulp.COIN_CMD):
                problem.solve(self.backend)
                return _bound_of_highs(problem)
            log = Path(folder) / "cbc.log"
            self.backend.optionsDict["logPath"] = str(log)
            problem.solve(self.backend)
            return _bound_of_cbc(log.read_text(errors="replace"))


def _bound_of_highs(problem: pulp.LpProblem) -> float | None:
    model: Any = getattr(problem, "solverModel", None)
    if model is None or not hasattr(model, "getInfo"):
        return None
    return _positive(float(model.getInfo().mip_dual_bound))


def _bound_of_cbc(log: str) -> float | None:
    """Its lower bound; where it proved an optimum, the objective."""
    said = dict(re.findall(r"^(Result -|Objective value:|Lower bound:)\s+(.*\S)\s*$", log, re.M))
    if said.get("Result -", "").startswith("Optimal"):
        return _positive(float(said["Objective value:"]))
    return _positive(float(said.get("Lower bound:", "nan")))


def _positive(bound: float) -> float | None:
    return bound if math.isfinite(bound) and bound > 0 else None
