"""Studies: runs that answer a question, what is measured on them, and claims with verdicts."""

from tangentlab.studies.claims import ledger, of_source
from tangentlab.studies.study import judge_study, run_study

__all__ = ["judge_study", "ledger", "of_source", "run_study"]
