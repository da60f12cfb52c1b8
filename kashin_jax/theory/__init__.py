"""Kashin's theorem as code: the l1 bound, its constants, and rival solvers."""

from kashin_jax.theory.accelerated_bound import (
    accelerated_constant as accelerated_constant,
)
from kashin_jax.theory.accelerated_bound import accelerated_ratio as accelerated_ratio
from kashin_jax.theory.accelerated_bound import spread as spread
from kashin_jax.theory.alternating import AlternatingSolution as AlternatingSolution
from kashin_jax.theory.alternating import solve_alternating as solve_alternating
from kashin_jax.theory.alternating_trace import AlternatingCheck as AlternatingCheck
from kashin_jax.theory.alternating_trace import AlternatingTrace as AlternatingTrace
from kashin_jax.theory.alternating_trace import alternating_level as alternating_level
from kashin_jax.theory.alternating_trace import check_alternating as check_alternating
from kashin_jax.theory.alternating_trace import round_rate as round_rate
from kashin_jax.theory.alternating_trace import trace_alternating as trace_alternating
from kashin_jax.theory.comparison import SOLVERS as SOLVERS
from kashin_jax.theory.comparison import ComparedSolver as ComparedSolver
from kashin_jax.theory.comparison import compare_solvers as compare_solvers
from kashin_jax.theory.comparison import solve_greedy as solve_greedy
from kashin_jax.theory.counter_example import FORMS as FORMS
from kashin_jax.theory.counter_example import FormCourse as FormCourse
from kashin_jax.theory.counter_example import compare_forms as compare_forms
from kashin_jax.theory.counter_example import (
    rank_one_counter_example as rank_one_counter_example,
)
from kashin_jax.theory.greedy_trace import RESIDUAL_FLOOR as RESIDUAL_FLOOR
from kashin_jax.theory.greedy_trace import GreedyTrace as GreedyTrace
from kashin_jax.theory.greedy_trace import TheoremCheck as TheoremCheck
from kashin_jax.theory.greedy_trace import check_theorem as check_theorem
from kashin_jax.theory.greedy_trace import trace_greedy as trace_greedy
from kashin_jax.theory.l1_bound import EigenvectorRatios as EigenvectorRatios
from kashin_jax.theory.l1_bound import eigenvector_ratios as eigenvector_ratios
from kashin_jax.theory.l1_bound import l1_ratio as l1_ratio
from kashin_jax.theory.l1_bound import level_from_rate as level_from_rate
from kashin_jax.theory.l1_bound import rate_from_constant as rate_from_constant
from kashin_jax.theory.minimax import MinimaxSolution as MinimaxSolution
from kashin_jax.theory.minimax import solve_minimax as solve_minimax
from kashin_jax.theory.solution import FrameSolution as FrameSolution
from kashin_jax.theory.truncation import solve_truncation as solve_truncation
from kashin_jax.theory.worst_case import WorstCase as WorstCase
from kashin_jax.theory.worst_case import search_worst_case as search_worst_case
from kashin_jax.theory.worst_case import structured_starts as structured_starts

__all__ = [
    "FORMS",
    "RESIDUAL_FLOOR",
    "SOLVERS",
    "AlternatingCheck",
    "AlternatingSolution",
    "AlternatingTrace",
    "ComparedSolver",
    "EigenvectorRatios",
    "FormCourse",
    "FrameSolution",
    "GreedyTrace",
    "MinimaxSolution",
    "TheoremCheck",
    "WorstCase",
    "accelerated_constant",
    "accelerated_ratio",
    "alternating_level",
    "check_alternating",
    "check_theorem",
    "compare_forms",
    "compare_solvers",
    "eigenvector_ratios",
    "l1_ratio",
    "level_from_rate",
    "rank_one_counter_example",
    "rate_from_constant",
    "round_rate",
    "search_worst_case",
    "solve_alternating",
    "solve_greedy",
    "solve_minimax",
    "solve_truncation",
    "spread",
    "structured_starts",
    "trace_alternating",
    "trace_greedy",
]
