"""From attributions to an edited model: a goal, the components chosen for it, and what came of it."""

from coar.editing.edits import Edit, edit
from coar.editing.goals import EditGoal
from coar.editing.judging import effect_curve, judge_edit
from coar.editing.prediction import Change, Prediction, predict_edit, predicted_edit
from coar.editing.ranking import welch_t
from coar.editing.selection import Selection, select
from coar.editing.tasks import (
    TASKS,
    TaskResult,
    fix_errors,
    forget_class,
    reach_goal,
    remove_backdoor,
    resist_typographic,
    strengthen_group,
)
from coar.editing.tradeoff import Bound, TradeOff

__all__ = [
    "TASKS",
    "Bound",
    "Change",
    "Edit",
    "EditGoal",
    "Prediction",
    "Selection",
    "TaskResult",
    "TradeOff",
    "edit",
    "effect_curve",
    "fix_errors",
    "forget_class",
    "judge_edit",
    "predict_edit",
    "predicted_edit",
    "reach_goal",
    "remove_backdoor",
    "resist_typographic",
    "select",
    "strengthen_group",
    "welch_t",
]
